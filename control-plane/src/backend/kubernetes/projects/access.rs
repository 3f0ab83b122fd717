//! Who may do what in a project, from its settings.
//!
//! In: the settings' `group_access`, a JSON array of `{"groupName", "role"}`. Out: one RoleBinding
//! `<group>-<role>` for each, to the ClusterRoles `ambient-project-{admin,edit,view}`; those of
//! ours that are not wanted any more go. A text that is not understood changes nothing: access that
//! was given by mistake is mended by writing better settings, access that was taken by mistake is
//! an outage.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use aws_lc_rs::digest;
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, PostParams, Preconditions},
};
use serde::Deserialize;
use tracing::info;

use super::{Projects, list_all, objects};
use crate::backend::{
    BackendError,
    kubernetes::{
        names::{FIELD_MANAGER, MANAGED_BY},
        refusal::{backend_error, is_already_there, is_not_found},
    },
};

/// Most groups of one project: each is an object in its namespace.
const MAX_GRANTS: usize = 200;
/// Longest name of a group, in bytes: with the role it is an object's name.
const MAX_GROUP: usize = 200;

/// What a group may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Everything in the project, its members included.
    Admin,
    /// Work in it.
    Edit,
    /// See it.
    View,
}

/// One group's access.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Grant {
    /// The group, as the cluster's authentication names it.
    pub group: String,
    /// Its role.
    pub role: Role,
}

/// Why `group_access` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// It is no such JSON.
    #[error("group_access is no JSON array of {{\"groupName\", \"role\"}}")]
    Json(#[source] serde_json::Error),
    /// A group has no name that can be used.
    #[error(
        "group_access has a group whose name is empty, has control characters or is longer than \
         {MAX_GROUP} bytes"
    )]
    Group,
    /// It would let everybody in, without a name.
    #[error("group_access names system:unauthenticated; people without a name get no access")]
    Anonymous,
    /// An unknown role.
    #[error("group_access gives {group:?} the role {role:?}; there are admin, edit and view")]
    Role {
        /// The group.
        group: String,
        /// As given.
        role: String,
    },
    /// Too many.
    #[error("group_access has more than {MAX_GRANTS} groups")]
    TooMany,
}

impl Role {
    const ALL: [Self; 3] = [Self::Admin, Self::Edit, Self::View];

    fn as_str(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Edit => "edit",
            Self::View => "view",
        }
    }

    /// The role in the cluster.
    pub(crate) fn cluster_role(self) -> &'static str {
        match self {
            Self::Admin => "ambient-project-admin",
            Self::Edit => "ambient-project-edit",
            Self::View => "ambient-project-view",
        }
    }
}

impl Grant {
    /// Name of its binding: `<group>-<role>` where that can be a name and a path's part as it is,
    /// else with `-` for what cannot and a hash, so that two groups never share one.
    pub(crate) fn binding_name(&self) -> String {
        let role = self.role.as_str();
        let fits = |it: char| it.is_ascii_alphanumeric() || "-_.:@".contains(it);
        if self.group.chars().all(fits) {
            return format!("{}-{role}", self.group);
        }
        let plain = self.group.replace(|it| !fits(it), "-");
        let hash = digest::digest(&digest::SHA256, self.group.as_bytes());
        let mut name = format!("{plain}-");
        for byte in hash.as_ref().iter().take(4) {
            let _ = write!(name, "{byte:02x}");
        }
        format!("{name}-{role}")
    }
}

/// What the settings of a project give to whom. No text gives nothing to nobody.
///
/// # Errors
/// [`AccessError`]; the whole text counts as not understood when a part is not.
pub fn parse(text: &str) -> Result<BTreeSet<Grant>, AccessError> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "groupName", alias = "group_name", alias = "group")]
        group: String,
        role: String,
    }
    if text.trim().is_empty() {
        return Ok(BTreeSet::new());
    }
    let entries = serde_json::from_str::<Option<Vec<Entry>>>(text).map_err(AccessError::Json)?;
    let mut grants = BTreeSet::new();
    for Entry { group, role } in entries.unwrap_or_default() {
        if group.is_empty() || group.len() > MAX_GROUP || group.chars().any(char::is_control) {
            return Err(AccessError::Group);
        }
        if group == "system:unauthenticated" {
            return Err(AccessError::Anonymous);
        }
        let known = Role::ALL
            .into_iter()
            .find(|it| it.as_str().eq_ignore_ascii_case(&role));
        let Some(role) = known else {
            return Err(AccessError::Role { group, role });
        };
        grants.insert(Grant { group, role });
    }
    if grants.len() > MAX_GRANTS {
        return Err(AccessError::TooMany);
    }
    Ok(grants)
}

impl Projects {
    /// Makes the bindings of the project's groups be these. Its namespace must be there.
    ///
    /// # Errors
    /// `Refused` with `BindingNameTaken` when somebody else has a RoleBinding of such a name, after
    /// all others are as they should be; else when the API server refuses.
    pub(crate) async fn grant(
        &self,
        project: &str,
        grants: &BTreeSet<Grant>,
    ) -> Result<(), BackendError> {
        let namespace = self.settings.namespace_of(project);
        let api: Api<RoleBinding> = Api::namespaced(self.clients.projects.clone(), &namespace);
        let mut present = self.group_bindings(&api).await?;
        let mut taken = Vec::new();
        for grant in grants {
            let wanted = objects::group_binding(&namespace, project, grant);
            let name = wanted.name_any();
            match present.remove(&name) {
                Some(found) if is_as(&found, &wanted) => {}
                Some(_) => {
                    self.apply_binding(&api, &wanted, "change a group's access")
                        .await?;
                    info!(project, binding = name, "access of a group changed");
                }
                None => {
                    let parameters = PostParams {
                        field_manager: Some(FIELD_MANAGER.to_owned()),
                        ..PostParams::default()
                    };
                    match api.create(&parameters, &wanted).await {
                        Ok(_) => info!(project, binding = name, "access given to a group"),
                        Err(error) if is_already_there(&error) => taken.push(name),
                        Err(error) => return Err(backend_error("give a group access", error)),
                    }
                }
            }
        }
        for unwanted in present.into_values() {
            delete_binding(&api, &unwanted).await?;
            info!(
                project,
                binding = unwanted.name_any(),
                "access of a group taken back"
            );
        }
        if taken.is_empty() {
            return Ok(());
        }
        Err(BackendError::Refused {
            reason: "BindingNameTaken",
            message: format!(
                "namespace {namespace} has RoleBindings of somebody else that are named {}; rename \
                 them, or label them {MANAGED_BY}={FIELD_MANAGER} to hand them over",
                taken.join(", ")
            ),
        })
    }

    /// Our bindings of groups to projects' roles in a namespace, those of existing control planes
    /// included, by name.
    async fn group_bindings(
        &self,
        api: &Api<RoleBinding>,
    ) -> Result<BTreeMap<String, RoleBinding>, BackendError> {
        let ours = format!("{MANAGED_BY}={FIELD_MANAGER}");
        let bindings = list_all(api, &ours, "list the access of groups").await?;
        let of_group = |binding: &RoleBinding| {
            let role = binding.role_ref.name.as_str();
            Role::ALL.iter().any(|it| it.cluster_role() == role)
                && binding
                    .subjects
                    .iter()
                    .flatten()
                    .all(|subject| subject.kind == "Group")
        };
        Ok(bindings
            .into_iter()
            .filter(of_group)
            .map(|binding| (binding.name_any(), binding))
            .collect())
    }

    /// Applies a binding of ours. One that is there with another role is made anew, as a
    /// RoleBinding's role cannot be changed.
    pub(super) async fn apply_binding(
        &self,
        api: &Api<RoleBinding>,
        wanted: &RoleBinding,
        action: &'static str,
    ) -> Result<(), BackendError> {
        let name = wanted.name_any();
        if let Some(found) = api
            .get_opt(&name)
            .await
            .map_err(|it| backend_error(action, it))?
        {
            if is_as(&found, wanted) {
                return Ok(());
            }
            if found.role_ref != wanted.role_ref {
                if found.labels().get(MANAGED_BY).map(String::as_str) != Some(FIELD_MANAGER) {
                    return Err(BackendError::Refused {
                        reason: "BindingNameTaken",
                        message: format!(
                            "RoleBinding {name} in namespace {} is somebody else's; rename it",
                            wanted.namespace().unwrap_or_default()
                        ),
                    });
                }
                delete_binding(api, &found).await?;
            }
        }
        super::apply(api, wanted, action).await
    }
}

/// Deletes this very binding, not one that came after it.
pub(super) async fn delete_binding(
    api: &Api<RoleBinding>,
    binding: &RoleBinding,
) -> Result<(), BackendError> {
    let parameters = DeleteParams {
        preconditions: Some(Preconditions {
            uid: binding.uid(),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    match api.delete(&binding.name_any(), &parameters).await {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) => Ok(()),
        Err(error) => Err(backend_error("delete a RoleBinding", error)),
    }
}

/// Whether a binding is as wanted; the API server fills in what was left out.
fn is_as(found: &RoleBinding, wanted: &RoleBinding) -> bool {
    let subjects = |of: &RoleBinding| {
        let of = of.subjects.iter().flatten();
        of.map(|it| (it.kind.clone(), it.namespace.clone(), it.name.clone()))
            .collect::<BTreeSet<_>>()
    };
    found.role_ref == wanted.role_ref
        && subjects(found) == subjects(wanted)
        && super::has_labels(found, wanted.labels())
}

#[cfg(test)]
mod tests;
