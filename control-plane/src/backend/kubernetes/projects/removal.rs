//! What becomes of a namespace when its project was deleted.
//!
//! One that we made goes, with all that is in it. Any other stays: groups lose their access at once;
//! what sessions need stays while there are sessions in it, so that these end in order; then our
//! Secrets, policy, bindings and labels go too (the Pod Security level stays: it protects). Giving
//! it to a project again takes labelling it again.

use std::{collections::BTreeSet, fmt::Debug};

use k8s_openapi::api::{
    core::v1::{Namespace, Secret, ServiceAccount},
    networking::v1::NetworkPolicy,
    rbac::v1::RoleBinding,
};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Preconditions},
    core::PartialObjectMeta,
};
use serde_json::json;
use tracing::info;

use super::{
    Projects,
    claim::{is_made_by_us, is_terminating},
    objects::{self, FOLLOWS_PROJECT, OWN_BINDING, POLICY},
};
use crate::backend::{
    BackendError,
    kubernetes::{
        names::{FIELD_MANAGER, INSTALLATION, MANAGED, MANAGED_BY, PROJECT_ID, SESSION_ID},
        refusal::{backend_error, is_not_found},
        settings::Platform,
    },
};

/// What came of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Removed {
    /// Nothing of the project is left, or it is being deleted.
    Everything,
    /// The namespace is somebody else's and has sessions in it: look again later.
    NotYet,
    /// There is no namespace of this project that would go with it.
    Nothing,
}

impl Projects {
    /// Removes what a deleted project has in the cluster. The caller has made sure that the API
    /// server does not have the project, and says whether it ever saw it there: a namespace that was
    /// made for a session of a project that never was stays.
    ///
    /// # Errors
    /// When the API server refuses.
    pub(crate) async fn remove(
        &self,
        project: &str,
        existed: bool,
    ) -> Result<Removed, BackendError> {
        let name = self.settings.namespace_of(project);
        let _turn = self.turns.take(&name).await;
        if existed {
            self.gone.insert(project.to_owned(), ());
        }
        let found = self.find(&name).await?.filter(|found| {
            // A tenant may not be allowed to label its namespaces.
            let is_its = self.ground().is_labelled(found, project)
                || (!found.labels().contains_key(PROJECT_ID) && self.is_ready(&name, project));
            is_its && (existed || found.annotations().contains_key(FOLLOWS_PROJECT))
        });
        self.ready.invalidate(&name);
        if found.is_some() {
            self.gone.insert(project.to_owned(), ());
        }
        let is_withdrawn = match &self.settings.platform {
            Platform::Mpp { config_namespace } if existed || found.is_some() => {
                self.withdraw(config_namespace, project).await?
            }
            _ => false,
        };
        let removed = match found {
            None if is_withdrawn => Removed::Everything,
            None => return Ok(Removed::Nothing),
            Some(found) if is_withdrawn || is_terminating(&found) => Removed::Everything,
            Some(found) if is_made_by_us(&found) => {
                delete(&self.namespaces(), &found, "delete a project's namespace").await?;
                info!(
                    project,
                    namespace = name,
                    "namespace deleted with its project"
                );
                Removed::Everything
            }
            Some(found) => self.leave(project, &found).await?,
        };
        if removed == Removed::Everything {
            self.stop_pulling(&name).await?;
        }
        Ok(removed)
    }

    /// Deletes the `TenantNamespace` of a project, if it is ours; the tenant operator then deletes
    /// the namespace. Says whether it was.
    async fn withdraw(&self, config_namespace: &str, project: &str) -> Result<bool, BackendError> {
        let tenants = self.tenants(config_namespace);
        let found = tenants.get_opt(&objects::tenant_name(project)).await;
        let found = found.map_err(|error| backend_error("read a TenantNamespace", error))?;
        let is_ours =
            |it: &DynamicObject| is_made_by_us(it) && self.ground().is_labelled(it, project);
        let Some(tenant) = found.filter(is_ours) else {
            return Ok(false);
        };
        delete(&tenants, &tenant, "delete a TenantNamespace").await?;
        info!(project, "TenantNamespace deleted with its project");
        Ok(true)
    }

    /// Takes what is ours out of a namespace that is not.
    async fn leave(&self, project: &str, found: &Namespace) -> Result<Removed, BackendError> {
        let name = found.name_any();
        let client = &self.clients.projects;
        // Also after an earlier try that failed half-way: without it we may do nothing of this.
        self.bind_ourselves(project, &name).await?;
        self.grant(project, &BTreeSet::new()).await?;
        if self.has_sessions(&name).await? {
            return Ok(Removed::NotYet);
        }
        let policies: Api<NetworkPolicy> = Api::namespaced(client.clone(), &name);
        gone(policies.delete(POLICY, &DeleteParams::default()).await)
            .map_err(|error| backend_error("delete the NetworkPolicy of a project", error))?;
        self.take_secrets(&name).await?;
        let bindings: Api<RoleBinding> = Api::namespaced(client.clone(), &name);
        gone(bindings.delete(OWN_BINDING, &DeleteParams::default()).await)
            .map_err(|error| backend_error("delete our RoleBinding", error))?;
        let patch = json!({"metadata": {
            "uid": found.uid(),
            "labels": {MANAGED: null, MANAGED_BY: null, PROJECT_ID: null, INSTALLATION: null},
            "annotations": {FOLLOWS_PROJECT: null},
        }});
        self.patch(&name, &patch).await?;
        info!(
            project,
            namespace = name,
            "namespace left as its project is deleted"
        );
        Ok(Removed::Everything)
    }

    async fn has_sessions(&self, namespace: &str) -> Result<bool, BackendError> {
        let accounts: Api<ServiceAccount> =
            Api::namespaced(self.clients.projects.clone(), namespace);
        let sessions = ListParams::default().labels(SESSION_ID).limit(1);
        let page = accounts.list_metadata(&sessions).await;
        let page = page.map_err(|error| backend_error("list the sessions of a project", error))?;
        Ok(!page.items.is_empty())
    }

    /// Deletes the Secrets that we put there for the whole project.
    async fn take_secrets(&self, namespace: &str) -> Result<(), BackendError> {
        let api: Api<Secret> = Api::namespaced(self.clients.projects.clone(), namespace);
        let ours = format!("{MANAGED_BY}={FIELD_MANAGER},!{SESSION_ID}");
        let secrets = api
            .list_metadata(&ListParams::default().labels(&ours))
            .await;
        let secrets = secrets.map_err(|it| backend_error("list the Secrets of a project", it))?;
        for secret in secrets {
            delete_found(&api, &secret, "delete a Secret of a project").await?;
        }
        Ok(())
    }

    /// Takes back what lets a namespace pull images.
    async fn stop_pulling(&self, namespace: &str) -> Result<(), BackendError> {
        let Some(from) = &self.settings.images.pull_namespace else {
            return Ok(());
        };
        let api: Api<RoleBinding> = Api::namespaced(self.clients.projects.clone(), from);
        let name = objects::image_puller_name(namespace);
        gone(api.delete(&name, &DeleteParams::default()).await)
            .map_err(|error| backend_error("take back a project's right to pull images", error))
    }
}

/// Deletes this very object, not one that came after it.
async fn delete<K>(api: &Api<K>, object: &K, action: &'static str) -> Result<(), BackendError>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + Debug,
{
    let parameters = this_one(object.uid());
    gone(api.delete(&object.name_any(), &parameters).await)
        .map_err(|error| backend_error(action, error))
}

async fn delete_found<K>(
    api: &Api<K>,
    object: &PartialObjectMeta<K>,
    action: &'static str,
) -> Result<(), BackendError>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + Debug,
{
    let parameters = this_one(object.metadata.uid.clone());
    let name = object.metadata.name.as_deref().unwrap_or_default();
    gone(api.delete(name, &parameters).await).map_err(|error| backend_error(action, error))
}

fn this_one(uid: Option<String>) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions {
            uid,
            resource_version: None,
        }),
        ..DeleteParams::default()
    }
}

/// Deleted already is deleted.
fn gone<T>(deleted: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match deleted {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) => Ok(()),
        Err(error) => Err(error),
    }
}
