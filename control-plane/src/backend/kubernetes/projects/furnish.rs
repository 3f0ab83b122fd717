//! What is put into a project's namespace: our own rights first, then what sessions need.

use std::time::Duration;

use k8s_openapi::api::{
    authentication::v1::SelfSubjectReview,
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::Secret,
    networking::v1::NetworkPolicy,
    rbac::v1::{RoleBinding, Subject},
};
use kube::{
    Api, ResourceExt as _,
    api::{ListParams, PatchParams, PostParams},
    core::PartialObjectMeta,
};
use tokio::time::{Instant, sleep};

use super::{
    Projects, apply, apply_as,
    objects::{self, ANTHROPIC_API_KEY},
};
use crate::{
    backend::{
        BackendError,
        kubernetes::{
            names::{FIELD_MANAGER, MANAGED_BY},
            refusal::backend_error,
            settings::SecretRef,
        },
    },
    rules::SESSION_MANAGER,
};

/// Longest wait until a new RoleBinding is in force: API servers hear of it by their own watch. Not
/// longer, as who waits here keeps a worker from others; the next try goes on waiting.
const RIGHTS_LIMIT: Duration = Duration::from_secs(3);
/// How often that is asked for; nothing tells of it.
const RIGHTS_POLL: Duration = Duration::from_millis(200);

impl Projects {
    /// Puts into the namespace what sessions need.
    pub(super) async fn furnish(&self, project: &str, name: &str) -> Result<(), BackendError> {
        let client = &self.clients.projects;
        self.bind_ourselves(project, name).await?;
        let policies: Api<NetworkPolicy> = Api::namespaced(client.clone(), name);
        let policy = objects::network_policy(name, project, &self.settings.namespace);
        apply(&policies, &policy, "make the NetworkPolicy of a project").await?;

        let images = &self.settings.images;
        if let Some(from) = images
            .pull_namespace
            .as_deref()
            .filter(|from| *from != name)
        {
            let there: Api<RoleBinding> = Api::namespaced(client.clone(), from);
            let puller = objects::image_puller(from, name, project);
            let action = "let a project's namespace pull images";
            self.apply_binding(&there, &puller, action).await?;
        }
        let secrets: Api<Secret> = Api::namespaced(client.clone(), name);
        for (setting, source) in self.copied() {
            self.copy(&secrets, project, setting, &source).await?;
        }
        if let Some(key) = &self.settings.model_access.anthropic_api_key {
            let secret = objects::model_access(name, project, key);
            let action = "give a project access to models";
            put_secret(&secrets, &secret, ANTHROPIC_API_KEY, action).await?;
        }
        Ok(())
    }

    /// Gives us our rights in the namespace, and waits until we have them.
    pub(super) async fn bind_ourselves(
        &self,
        project: &str,
        name: &str,
    ) -> Result<(), BackendError> {
        let bindings: Api<RoleBinding> = Api::namespaced(self.clients.projects.clone(), name);
        let us = self.us.get_or_try_init(|| self.ask_who_we_are()).await?;
        let own = objects::own_binding(name, project, us);
        let action = "bind the control plane to a project's namespace";
        self.apply_binding(&bindings, &own, action).await?;
        self.wait_for_rights(name).await
    }

    /// The Secrets that each project has a copy of, with the setting that names them.
    fn copied(&self) -> Vec<(&'static str, SecretRef)> {
        let pull = self.settings.images.pull_secret.as_ref();
        let pull = pull.map(|name| {
            let namespace = self.settings.namespace.clone();
            let name = name.clone();
            ("IMAGE_PULL_SECRET", SecretRef { namespace, name })
        });
        let vertex = self.settings.model_access.vertex.as_ref();
        let vertex = vertex.and_then(|it| Some(("VERTEX_SECRET_NAME", it.secret.clone()?)));
        pull.into_iter().chain(vertex).collect()
    }

    /// Copies a Secret as it is now: what is no longer in it goes from the copy too.
    async fn copy(
        &self,
        to: &Api<Secret>,
        project: &str,
        setting: &str,
        source: &SecretRef,
    ) -> Result<(), BackendError> {
        let namespace = self.settings.namespace_of(project);
        if source.namespace == namespace {
            return Ok(());
        }
        let from: Api<Secret> = Api::namespaced(self.clients.own.clone(), &source.namespace);
        let found = from.get_opt(&source.name).await;
        let found = found.map_err(|error| backend_error("read a Secret to be copied", error))?;
        let Some(found) = found else {
            return Err(BackendError::Refused {
                reason: "SecretMissing",
                message: format!(
                    "there is no Secret {} in namespace {}; {setting} names it",
                    source.name, source.namespace
                ),
            });
        };
        let copy = objects::copied_secret(found, &namespace, project);
        put_secret(to, &copy, setting, "copy a Secret to a project").await
    }

    /// The subject that our credentials for projects' namespaces stand for.
    async fn ask_who_we_are(&self) -> Result<Subject, BackendError> {
        let api: Api<SelfSubjectReview> = Api::all(self.clients.projects.clone());
        let answer = api
            .create(&PostParams::default(), &SelfSubjectReview::default())
            .await
            .map_err(|error| backend_error("ask the API server who we are", error))?;
        let user = answer.status.and_then(|it| it.user_info?.username);
        user.map(|user| objects::subject(&user))
            .ok_or_else(|| BackendError::Refused {
                reason: "Forbidden",
                message: "the Kubernetes API does not say who we are".to_owned(),
            })
    }

    /// Waits until the binding is in force.
    async fn wait_for_rights(&self, namespace: &str) -> Result<(), BackendError> {
        let api: Api<SelfSubjectAccessReview> = Api::all(self.clients.projects.clone());
        let question = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    namespace: Some(namespace.to_owned()),
                    verb: Some("create".to_owned()),
                    resource: Some("secrets".to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let deadline = Instant::now() + RIGHTS_LIMIT;
        loop {
            let answer = api.create(&PostParams::default(), &question).await;
            let answer = answer.map_err(|it| backend_error("ask for our own rights", it))?;
            if answer.status.is_some_and(|status| status.allowed) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(BackendError::Refused {
                    reason: "RightsMissing",
                    message: format!(
                        "the control plane may not yet create Secrets in namespace {namespace}; is \
                         there a ClusterRole {SESSION_MANAGER} that allows it?"
                    ),
                });
            }
            sleep(RIGHTS_POLL).await;
        }
    }
}

/// Writes a Secret of ours, unless somebody else has one of its name. Its data is not read.
async fn put_secret(
    api: &Api<Secret>,
    wanted: &Secret,
    setting: &str,
    action: &'static str,
) -> Result<(), BackendError> {
    let name = wanted.name_any();
    // A list of one: we have no right to get Secrets.
    let this_one = ListParams::default().fields(&format!("metadata.name={name}"));
    let found = api.list_metadata(&this_one).await;
    let found = found.map_err(|error| backend_error("look for a Secret of a project", error))?;
    let is_ours = |it: &PartialObjectMeta<Secret>| {
        it.labels().get(MANAGED_BY).map(String::as_str) == Some(FIELD_MANAGER)
    };
    let parameters = PatchParams::apply(FIELD_MANAGER);
    let parameters = match found.items.first() {
        Some(found) if is_ours(found) => parameters.force(),
        Some(_) => {
            return Err(BackendError::Refused {
                reason: "SecretNameTaken",
                message: format!(
                    "namespace {} has a Secret of somebody else that is named {name}, as {setting} \
                     has it; rename it, or label it {MANAGED_BY}={FIELD_MANAGER} to hand it over",
                    wanted.namespace().unwrap_or_default()
                ),
            });
        }
        // What somebody else makes at the same time is a conflict.
        None => parameters,
    };
    apply_as(api, wanted, &parameters, action).await
}
