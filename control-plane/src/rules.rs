//! What the control plane may do in a cluster: the one place where its permissions are written.
//!
//! In: [`RuleSettings`]. Out: [`Rules`], the objects that give these rights (`ambient-control-plane
//! rules` prints them; the chart and the tests take them from here), and the same rights one by one
//! for `check` and for the search for unused ones.
//!
//! Cluster-wide are only namespaces, and RoleBindings limited by `bind` to the roles that are named
//! here. What sessions need is in [`SESSION_MANAGER`], which the control plane binds to itself in
//! each project's namespace, and nowhere else: [`policies`] sees to that.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        admissionregistration::v1::{ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding},
        rbac::v1::{
            ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject,
        },
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::Serialize;

use crate::{
    backend::kubernetes::settings::{KubernetesSettings, Platform, SecretRef},
    keypair::secret,
    leader,
};

mod people;
mod policies;
mod rights;

pub use rights::{Place, Right};

/// Name of the control plane's ServiceAccount, its roles and its bindings.
pub const CONTROL_PLANE: &str = "ambient-control-plane";
/// ClusterRole that the control plane binds to itself in each project's namespace.
pub const SESSION_MANAGER: &str = "ambient-session-manager";
/// ClusterRoles that it binds to groups in a project's namespace.
pub const PROJECT_ROLES: [&str; 3] = [
    "ambient-project-admin",
    "ambient-project-edit",
    "ambient-project-view",
];
/// ClusterRole of OpenShift that it binds where images are pulled from.
pub const IMAGE_PULLER: &str = "system:image-puller";

const CORE: &str = "";
const COORDINATION: &str = "coordination.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
const TENANTS: &str = "tenant.paas.redhat.com";

/// Whose rights, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleSettings {
    /// The control plane's own namespace.
    pub namespace: String,
    /// Its ServiceAccount there.
    pub service_account: String,
    /// Who makes the projects' namespaces.
    pub platform: Platform,
    /// The namespace whose images projects may pull (OpenShift).
    pub pull_namespace: Option<String>,
    /// Secrets that are copied to each project.
    pub copied: Vec<SecretRef>,
}

impl From<&KubernetesSettings> for RuleSettings {
    fn from(from: &KubernetesSettings) -> Self {
        let pull_secret = from.images.pull_secret.clone().map(|name| SecretRef {
            namespace: from.namespace.clone(),
            name,
        });
        let vertex = from.model_access.vertex.as_ref();
        let vertex = vertex.and_then(|vertex| vertex.secret.clone());
        Self {
            namespace: from.namespace.clone(),
            service_account: CONTROL_PLANE.to_owned(),
            platform: from.platform.clone(),
            pull_namespace: from.images.pull_namespace.clone(),
            copied: pull_secret.into_iter().chain(vertex).collect(),
        }
    }
}

/// All objects that give and limit the control plane's rights.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Of the control plane itself, of its part in projects, of people.
    pub cluster_roles: Vec<ClusterRole>,
    /// What it may do in single namespaces.
    pub roles: Vec<Role>,
    /// Gives it its ClusterRole.
    pub cluster_role_binding: ClusterRoleBinding,
    /// Give it its Roles.
    pub role_bindings: Vec<RoleBinding>,
    /// Limits that RBAC cannot express.
    pub policies: Vec<ValidatingAdmissionPolicy>,
    /// Put these in force.
    pub policy_bindings: Vec<ValidatingAdmissionPolicyBinding>,
}

impl Rules {
    /// The rules for these settings.
    pub fn new(settings: &RuleSettings) -> Self {
        let roles = roles(settings);
        let subject = Subject {
            kind: "ServiceAccount".to_owned(),
            name: settings.service_account.clone(),
            namespace: Some(settings.namespace.clone()),
            api_group: None,
        };
        let role_bindings = roles.iter().map(|role| RoleBinding {
            metadata: role.metadata.clone(),
            role_ref: reference("Role", role.metadata.name.as_deref().unwrap_or_default()),
            subjects: Some(vec![subject.clone()]),
        });
        let policies = policies::policies(settings);
        Self {
            cluster_roles: [cluster_role(CONTROL_PLANE, cluster_wide(settings))]
                .into_iter()
                .chain([cluster_role(SESSION_MANAGER, in_projects())])
                .chain(people::roles().map(|(name, rules)| cluster_role(name, rules)))
                .collect(),
            cluster_role_binding: ClusterRoleBinding {
                metadata: metadata(&format!("{CONTROL_PLANE}:{}", settings.namespace), None),
                role_ref: reference("ClusterRole", CONTROL_PLANE),
                subjects: Some(vec![subject.clone()]),
            },
            role_bindings: role_bindings.collect(),
            policy_bindings: policies.iter().map(policies::in_force).collect(),
            policies,
            roles,
        }
    }

    /// All objects as YAML documents, for `kubectl apply --filename -`.
    ///
    /// # Errors
    /// When the library cannot write one, which would be a fault of ours.
    pub fn yaml(&self) -> Result<String, serde_saphyr::ser_error::Error> {
        let mut text = String::new();
        let mut add = |objects: Vec<String>| {
            for object in objects {
                text.push_str("---\n");
                text.push_str(&object);
            }
        };
        add(documents(&self.cluster_roles)?);
        add(documents(&self.roles)?);
        add(documents(std::slice::from_ref(&self.cluster_role_binding))?);
        add(documents(&self.role_bindings)?);
        add(documents(&self.policies)?);
        add(documents(&self.policy_bindings)?);
        Ok(text)
    }
}

fn documents<T: Serialize>(objects: &[T]) -> Result<Vec<String>, serde_saphyr::ser_error::Error> {
    objects.iter().map(serde_saphyr::to_string).collect()
}

/// What the control plane may do in the whole cluster.
fn cluster_wide(settings: &RuleSettings) -> Vec<PolicyRule> {
    let namespaces: &[&str] = match settings.platform {
        Platform::Standard => &["get", "list", "watch", "create", "patch", "delete"],
        // A tenant operator makes and deletes them.
        Platform::Mpp { .. } => &["get", "list", "watch", "patch"],
    };
    let bound: Vec<&str> = [SESSION_MANAGER]
        .into_iter()
        .chain(PROJECT_ROLES)
        .chain(settings.pull_namespace.is_some().then_some(IMAGE_PULLER))
        .collect();
    vec![
        rule(CORE, &["namespaces"], namespaces),
        // To bind itself where it has no right yet. Listing and deleting come with that binding.
        rule(RBAC, &["rolebindings"], &["get", "create", "patch"]),
        named(RBAC, &["clusterroles"], &["bind"], &bound),
    ]
}

/// What the control plane may do in a project's namespace.
fn in_projects() -> Vec<PolicyRule> {
    vec![
        rule(
            CORE,
            &["pods", "serviceaccounts"],
            &["get", "list", "watch", "create", "patch", "delete"],
        ),
        // Never `get`: lists and watches of ours are of metadata only.
        rule(
            CORE,
            &["secrets"],
            &["list", "watch", "create", "patch", "delete"],
        ),
        rule(
            CORE,
            &["services"],
            &["list", "watch", "create", "patch", "delete"],
        ),
        rule(
            "networking.k8s.io",
            &["networkpolicies"],
            &["create", "patch", "delete"],
        ),
        rule(RBAC, &["rolebindings"], &["list", "delete"]),
        rule("events.k8s.io", &["events"], &["create"]),
    ]
}

/// What it may do in single namespaces: its own, and those that settings name.
fn roles(settings: &RuleSettings) -> Vec<Role> {
    let mut by_namespace: BTreeMap<&str, Vec<PolicyRule>> = BTreeMap::new();
    let own = by_namespace.entry(&settings.namespace).or_default();
    // RBAC cannot limit a create by name.
    own.push(rule(CORE, &["configmaps", "secrets"], &["create"]));
    own.push(rule(COORDINATION, &["leases"], &["create"]));
    own.push(named(
        COORDINATION,
        &["leases"],
        &["get", "update"],
        &[leader::LEASE],
    ));
    own.push(named(
        CORE,
        &["configmaps"],
        &["get"],
        &[secret::CONFIG_MAP],
    ));
    own.push(named(
        CORE,
        &["secrets"],
        &["get", "patch"],
        &secret::SECRETS,
    ));
    // About its own pod.
    own.push(rule("events.k8s.io", &["events"], &["create"]));
    for SecretRef { namespace, name } in &settings.copied {
        let there = by_namespace.entry(namespace).or_default();
        there.push(named(CORE, &["secrets"], &["get"], &[name]));
    }
    if let Some(namespace) = &settings.pull_namespace {
        let there = by_namespace.entry(namespace).or_default();
        there.push(rule(RBAC, &["rolebindings"], &["delete"]));
    }
    if let Platform::Mpp { config_namespace } = &settings.platform {
        let there = by_namespace.entry(config_namespace).or_default();
        there.push(rule(
            TENANTS,
            &["tenantnamespaces"],
            &["get", "create", "delete"],
        ));
    }
    let by_namespace = by_namespace.into_iter();
    by_namespace
        .map(|(namespace, rules)| Role {
            metadata: metadata(CONTROL_PLANE, Some(namespace)),
            rules: Some(rules),
        })
        .collect()
}

fn cluster_role(name: &str, rules: Vec<PolicyRule>) -> ClusterRole {
    ClusterRole {
        metadata: metadata(name, None),
        rules: Some(rules),
        aggregation_rule: None,
    }
}

fn reference(kind: &str, name: &str) -> RoleRef {
    RoleRef {
        api_group: RBAC.to_owned(),
        kind: kind.to_owned(),
        name: name.to_owned(),
    }
}

fn metadata(name: &str, namespace: Option<&str>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: namespace.map(ToOwned::to_owned),
        labels: Some([("app".to_owned(), CONTROL_PLANE.to_owned())].into()),
        ..ObjectMeta::default()
    }
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        api_groups: Some(vec![group.to_owned()]),
        resources: Some(owned(resources)),
        verbs: owned(verbs),
        ..PolicyRule::default()
    }
}

fn named(group: &str, resources: &[&str], verbs: &[&str], names: &[&str]) -> PolicyRule {
    PolicyRule {
        resource_names: Some(owned(names)),
        ..rule(group, resources, verbs)
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests;
