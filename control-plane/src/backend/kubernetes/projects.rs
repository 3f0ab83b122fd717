//! What a project has in the cluster: its namespace and all that sessions need there.
//!
//! In: a project's id. Out: the name of its namespace, when that is there and has our RoleBinding,
//! the NetworkPolicy, access to images and the Secrets of existing runner images. What was made is
//! remembered, so that starting a session costs no calls; it is forgotten when the namespace goes
//! or anything about it fails.
//!
//! A namespace is ours to use when we made it, when the tenant operator made it for us, or when
//! whoever rules the cluster has labelled it `ambient-code.io/managed=true` (as existing control
//! planes have): whoever may create a project must not lay hands on any namespace by its name. It
//! is ours to delete only when we made it.

use std::{collections::BTreeMap, fmt::Debug, sync::Arc, time::Duration};

use ambient_shared::exit;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{core::v1::Namespace, rbac::v1::Subject},
};
use kube::{
    Api, Resource, ResourceExt as _,
    api::{ListParams, Patch, PatchParams},
};
use moka::sync::Cache;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::OnceCell;

use super::{
    names::{FIELD_MANAGER, INSTALLATION, MANAGED, check_project},
    refusal::{backend_error, is_not_found},
    settings::KubernetesSettings,
};
use crate::{backend::BackendError, cluster::Clients};

pub(crate) mod access;
mod claim;
mod furnish;
mod namespace;
pub(crate) mod objects;
mod removal;
mod turns;

use claim::{Ground, is_terminating, terminating};
use namespace::missing;
pub(crate) use removal::Removed;
use turns::Turns;

/// Most namespaces that are remembered as ready. A forgotten one costs its next session five
/// calls.
const MAX_READY: u64 = 10_000;

/// How long a namespace counts as ready without being looked at: two resyncs of projects. A replica
/// that does not run them looks again by itself.
const READY_FOR: Duration = Duration::from_mins(10);

/// Most deleted projects that are remembered. A session of one that was forgotten gets a namespace
/// again.
const MAX_GONE: u64 = 10_000;

/// Objects on one page of a list.
const PAGE: u32 = 500;

/// Makes and removes what projects have in the cluster.
pub struct Projects {
    clients: Clients,
    settings: Arc<KubernetesSettings>,
    /// Namespaces that have all that sessions need, with their project.
    ready: Cache<String, String>,
    /// Projects that were deleted while we looked.
    gone: Cache<String, ()>,
    turns: Turns,
    /// Who we are for the API server.
    us: OnceCell<Subject>,
}

impl Debug for Projects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Projects").finish_non_exhaustive()
    }
}

impl Projects {
    /// Nothing is known yet.
    pub fn new(clients: Clients, settings: Arc<KubernetesSettings>) -> Self {
        Self {
            clients,
            settings,
            ready: Cache::builder()
                .max_capacity(MAX_READY)
                .time_to_live(READY_FOR)
                .build(),
            gone: Cache::new(MAX_GONE),
            turns: Turns::default(),
            us: OnceCell::new(),
        }
    }

    /// The project's namespace, ready for sessions; made if it is not. Of many that ask at once for
    /// one project, one does the work, and all share its failure; for some seconds after that, all
    /// who ask are told of it at once.
    ///
    /// Cancel-safe: what was made stays, and is found again.
    ///
    /// # Errors
    /// `Impossible` when the project cannot have this namespace; `Refused` when it terminates, when
    /// its project was deleted, when we lack a right or a Secret that is to be copied, or while a
    /// tenant operator has not made it yet.
    pub async fn ensure(&self, project: &str) -> Result<String, BackendError> {
        let namespace = self.settings.namespace_of(project);
        if self.is_ready(&namespace, project) {
            return Ok(namespace);
        }
        self.check_gone(project)?;
        let turn = self.turns.share(&namespace, project).await?;
        if self.is_ready(&namespace, project) {
            return Ok(namespace);
        }
        self.check_gone(project)?;
        match self.make(project, &namespace).await {
            Ok(_) => {
                turn.succeed();
                Ok(namespace)
            }
            Err(error) => Err(turn.fail(project, error)),
        }
    }

    /// As [`Projects::ensure`], for a project that the API server has; looks at everything again,
    /// and marks the namespace as one that goes with its project.
    ///
    /// # Errors
    /// As [`Projects::ensure`].
    pub(crate) async fn restore(&self, project: &str) -> Result<(), BackendError> {
        let namespace = self.settings.namespace_of(project);
        let turn = self.turns.take(&namespace).await;
        self.gone.invalidate(project);
        match self.make(project, &namespace).await {
            Ok(made) => {
                turn.succeed();
                self.follow_project(&made).await
            }
            Err(error) => Err(turn.fail(project, error)),
        }
    }

    /// Forgets that this namespace was ready: it is gone, is terminating, or something that should
    /// be in it was missing.
    pub fn forget(&self, namespace: &str) {
        self.ready.invalidate(namespace);
    }

    /// The same error, unless it is that we lack a right because the namespace ends: our RoleBinding
    /// goes soon after its deletion is asked for, and then the API server says no more than that.
    pub(crate) async fn explain(&self, namespace: &str, error: BackendError) -> BackendError {
        let is_about_rights = matches!(
            error,
            BackendError::Refused {
                reason: "Forbidden" | "RightsMissing",
                ..
            }
        );
        if !is_about_rights {
            return error;
        }
        match self.find(namespace).await {
            Ok(Some(found)) if is_terminating(&found) => terminating(namespace),
            Ok(None) => missing(namespace),
            Ok(Some(_)) | Err(_) => error,
        }
    }

    /// Selects the namespaces that this installation uses, by label.
    pub(crate) fn selector(&self) -> String {
        format!("{MANAGED}=true,{INSTALLATION}={}", self.settings.namespace)
    }

    /// The client that watches namespaces.
    pub(crate) fn client(&self) -> kube::Client {
        self.clients.watching.clone()
    }

    /// # Errors
    /// `Refused` when the project was deleted.
    fn check_gone(&self, project: &str) -> Result<(), BackendError> {
        if !self.gone.contains_key(project) {
            return Ok(());
        }
        Err(BackendError::Refused {
            reason: "ProjectDeleted",
            message: format!("project {project} was deleted"),
        })
    }

    fn is_ready(&self, namespace: &str, project: &str) -> bool {
        self.ready.get(namespace).is_some_and(|of| of == project)
    }

    /// Makes what is missing, or finds it, and remembers.
    async fn make(&self, project: &str, name: &str) -> Result<Namespace, BackendError> {
        let made = async {
            check_project(project, name)?;
            self.ground().check_name(name)?;
            let namespace = self.namespace(project, name).await?;
            self.furnish(project, name).await?;
            Ok(namespace)
        }
        .await;
        match made {
            Ok(made) => {
                self.ready.insert(name.to_owned(), project.to_owned());
                Ok(made)
            }
            Err(error) => {
                self.ready.invalidate(name);
                Err(self.explain(name, error).await)
            }
        }
    }

    fn ground(&self) -> Ground<'_> {
        Ground(&self.settings)
    }
}

/// Applies an object whole: what is not in it, and was ours, goes; what was others' is ours.
async fn apply<K>(api: &Api<K>, object: &K, action: &'static str) -> Result<(), BackendError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Serialize
        + DeserializeOwned
        + Clone
        + Debug,
{
    apply_as(
        api,
        object,
        &PatchParams::apply(FIELD_MANAGER).force(),
        action,
    )
    .await
}

async fn apply_as<K>(
    api: &Api<K>,
    object: &K,
    parameters: &PatchParams,
    action: &'static str,
) -> Result<(), BackendError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Serialize
        + DeserializeOwned
        + Clone
        + Debug,
{
    let name = object.name_any();
    match api.patch(&name, parameters, &Patch::Apply(object)).await {
        Ok(_) => Ok(()),
        Err(error) if is_not_found(&error) => Err(missing(&object.namespace().unwrap_or_default())),
        Err(error) => Err(backend_error(action, error)),
    }
}

/// All objects with these labels, page by page.
async fn list_all<K>(
    api: &Api<K>,
    labels: &str,
    action: &'static str,
) -> Result<Vec<K>, BackendError>
where
    K: Clone + DeserializeOwned + Debug,
{
    let mut parameters = ListParams::default().labels(labels).limit(PAGE);
    let mut all = Vec::new();
    loop {
        let page = api.list(&parameters).await;
        let page = page.map_err(|error| backend_error(action, error))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => parameters = parameters.continue_token(&token),
            None => return Ok(all),
        }
    }
}

/// Whether the object has at least these labels.
fn has_labels<K: Resource>(object: &K, wanted: &BTreeMap<String, String>) -> bool {
    let labels = object.meta().labels.as_ref();
    wanted
        .iter()
        .all(|(name, value)| labels.and_then(|it| it.get(name)) == Some(value))
}

/// The same error, for one more who waited for it.
fn again(error: &BackendError) -> BackendError {
    match error {
        BackendError::StillEnding => BackendError::StillEnding,
        BackendError::NotFound => BackendError::NotFound,
        BackendError::Impossible { reason, message } => BackendError::Impossible {
            reason,
            message: message.clone(),
        },
        BackendError::Refused { reason, message } => BackendError::Refused {
            reason,
            message: message.clone(),
        },
        BackendError::Failed { action, source } => BackendError::Failed {
            action,
            source: exit::report(source.as_ref()).into(),
        },
    }
}
