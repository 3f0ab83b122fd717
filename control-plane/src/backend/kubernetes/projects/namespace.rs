//! The namespace itself: made by us, or by a tenant operator that we ask for it.

use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, ResourceExt as _,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{
    Projects, has_labels,
    objects::{self, FOLLOWS_PROJECT},
};
use crate::backend::{
    BackendError,
    kubernetes::{
        names::FIELD_MANAGER,
        refusal::{backend_error, is_already_there, is_not_found},
        settings::Platform,
    },
};

/// Longest wait for the tenant operator at one go, which makes a namespace within some 10 s. Not
/// as long, as who waits here keeps a worker from others; the next try goes on waiting.
const TENANT_LIMIT: Duration = Duration::from_secs(3);
/// How often is looked whether it has.
const TENANT_POLL: Duration = Duration::from_secs(1);

impl Projects {
    pub(super) fn namespaces(&self) -> Api<Namespace> {
        Api::all(self.clients.projects.clone())
    }

    pub(super) fn tenants(&self, config_namespace: &str) -> Api<DynamicObject> {
        let client = self.clients.projects.clone();
        Api::namespaced_with(client, config_namespace, &objects::tenant_resource())
    }

    pub(super) async fn find(&self, name: &str) -> Result<Option<Namespace>, BackendError> {
        let found = self.namespaces().get_opt(name).await;
        found.map_err(|error| backend_error("read a project's namespace", error))
    }

    /// The project's namespace, with its labels; made when there is none.
    pub(super) async fn namespace(
        &self,
        project: &str,
        name: &str,
    ) -> Result<Namespace, BackendError> {
        let found = match self.find(name).await? {
            Some(found) => found,
            None => match &self.settings.platform {
                Platform::Standard => match self.create(project, name).await? {
                    Some(created) => created,
                    // Somebody else was faster: maybe another control plane.
                    None => self.find(name).await?.ok_or_else(|| missing(name))?,
                },
                Platform::Mpp { config_namespace } => {
                    self.ask_tenant_operator(config_namespace, project, name)
                        .await?
                }
            },
        };
        self.ground().check(&found, project)?;
        self.label(found, project).await
    }

    /// None when there is one already.
    async fn create(&self, project: &str, name: &str) -> Result<Option<Namespace>, BackendError> {
        let wanted = objects::namespace(name, project, &self.settings.namespace);
        match self.namespaces().create(&as_us(), &wanted).await {
            Ok(created) => {
                info!(project, namespace = name, "namespace created");
                Ok(Some(created))
            }
            Err(error) if is_already_there(&error) => Ok(None),
            Err(error) => Err(backend_error("create a project's namespace", error)),
        }
    }

    /// Puts the labels of a project on its namespace.
    async fn label(&self, found: Namespace, project: &str) -> Result<Namespace, BackendError> {
        let labels = objects::namespace_labels(project, &self.settings.namespace);
        if has_labels(&found, &labels) {
            return Ok(found);
        }
        let name = found.name_any();
        let patch = json!({"metadata": {"uid": found.uid(), "labels": labels}});
        match self.patch(&name, &patch).await {
            Ok(labelled) => {
                info!(project, namespace = name, "namespace labelled");
                Ok(labelled)
            }
            // A tenant may not be allowed to change its namespaces; sessions run without labels.
            Err(BackendError::Refused {
                reason: "Forbidden" | "AdmissionDenied",
                message,
            }) if self.is_tenant() => {
                debug!(project, namespace = name, %message, "namespace not labelled");
                Ok(found)
            }
            Err(error) => Err(error),
        }
    }

    /// Marks a namespace as one that goes with its project.
    pub(super) async fn follow_project(&self, found: &Namespace) -> Result<(), BackendError> {
        if found.annotations().contains_key(FOLLOWS_PROJECT) {
            return Ok(());
        }
        let annotations = json!({FOLLOWS_PROJECT: "true"});
        let patch = json!({"metadata": {"uid": found.uid(), "annotations": annotations}});
        match self.patch(&found.name_any(), &patch).await {
            Err(BackendError::Refused {
                reason: "Forbidden" | "AdmissionDenied",
                ..
            }) if self.is_tenant() => Ok(()),
            patched => patched.map(|_| ()),
        }
    }

    /// A merge patch with the namespace's UID in it, and no apply: that would create, without the
    /// mark of what we created, a namespace that has just been deleted.
    pub(super) async fn patch(&self, name: &str, patch: &Value) -> Result<Namespace, BackendError> {
        let parameters = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let patched = self
            .namespaces()
            .patch(name, &parameters, &Patch::Merge(patch))
            .await;
        match patched {
            Ok(patched) => Ok(patched),
            Err(error) if is_not_found(&error) => Err(missing(name)),
            Err(error) => Err(backend_error("label a project's namespace", error)),
        }
    }

    fn is_tenant(&self) -> bool {
        matches!(self.settings.platform, Platform::Mpp { .. })
    }

    /// Asks for the namespace, and waits for it.
    async fn ask_tenant_operator(
        &self,
        config_namespace: &str,
        project: &str,
        name: &str,
    ) -> Result<Namespace, BackendError> {
        let tenants = self.tenants(config_namespace);
        let tenant = objects::tenant_name(project);
        let failed = |error| backend_error("ask the tenant operator for a namespace", error);
        let mut found = tenants.get_opt(&tenant).await.map_err(failed)?;
        if found.is_none() {
            let wanted =
                objects::tenant_namespace(config_namespace, project, &self.settings.namespace);
            match tenants.create(&as_us(), &wanted).await {
                Ok(created) => {
                    info!(project, tenant_namespace = tenant, "namespace asked for");
                    found = Some(created);
                }
                Err(error) if is_already_there(&error) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        if let Some(found) = &found {
            self.ground()
                .check_labels(found, project, "TenantNamespace")?;
        }
        let deadline = Instant::now() + TENANT_LIMIT;
        loop {
            if let Some(namespace) = self.find(name).await? {
                return Ok(namespace);
            }
            if Instant::now() >= deadline {
                break;
            }
            sleep(TENANT_POLL).await;
        }
        let now = tenants.get_opt(&tenant).await.map_err(failed)?;
        let said = now.as_ref().and_then(|it| said_by_operator(&it.data));
        let said = said.map_or_else(String::new, |said| format!(": {said}"));
        warn!(
            project,
            namespace = name,
            "the tenant operator has made no namespace yet{said}"
        );
        Err(BackendError::Refused {
            reason: "NamespacePending",
            message: format!(
                "the tenant operator has not made namespace {name} yet; TenantNamespace {tenant} in \
                 {config_namespace} asks for it{said}"
            ),
        })
    }
}

/// What the conditions of a `TenantNamespace` that are not met say.
fn said_by_operator(data: &Value) -> Option<String> {
    let conditions = data.pointer("/status/conditions")?.as_array()?;
    let unmet = conditions.iter().filter(|it| it["status"] != "True");
    let said: Vec<_> = unmet
        .filter_map(|it| it["message"].as_str().filter(|it| !it.is_empty()))
        .collect();
    (!said.is_empty()).then(|| said.join("; "))
}

pub(super) fn missing(name: &str) -> BackendError {
    BackendError::Refused {
        reason: "NamespaceMissing",
        message: format!("namespace {name} has just been deleted"),
    }
}

fn as_us() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_that_cannot_is_quoted() {
        let data = json!({"status": {"conditions": [
            {"type": "Reconciled", "status": "True", "message": "fine"},
            {"type": "Ready", "status": "False", "message": "no quota left"},
        ]}});
        assert_eq!(said_by_operator(&data).as_deref(), Some("no quota left"));
        assert_eq!(said_by_operator(&json!({})), None);
    }
}
