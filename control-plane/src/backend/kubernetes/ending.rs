//! Ending a session's run, and removing what there is of a session.
//!
//! In: a session. Out: deletions, each of exactly the object that was seen (by its UID). A pod gets
//! its own grace period. What a session's `ServiceAccount` owns is collected with it; a namespace is
//! never deleted here.

use ambient_shared::session::SessionId;
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{Pod, Secret, Service, ServiceAccount},
};
use kube::{
    Api,
    api::{DeleteParams, Preconditions, PropagationPolicy},
    core::PartialObjectMeta,
};

use super::{
    Inner,
    events::News,
    names::SessionRef,
    refusal::{backend_error, is_not_found},
    seen::{
        Entry,
        facts::{Kind, What},
    },
};
use crate::backend::{BackendError, RunStatus};

impl Inner {
    /// Asks the session's run to end. Of a namespace that is not seen there is nothing to ask yet:
    /// who was told "unknown" is told again.
    pub(super) async fn stop(&self, id: &SessionId) -> Result<(), BackendError> {
        let mut is_found = false;
        for (namespace, entry) in self.seen.everywhere(id) {
            let Some((held, pod)) = entry.pod() else {
                continue;
            };
            is_found = true;
            let status = pod.stage.status(held.since(), self.clock.now());
            if pod.deleting || matches!(status, RunStatus::Ended { .. }) {
                continue;
            }
            let Some(session) = self.session(id, &namespace, &entry) else {
                continue;
            };
            let news = match status {
                RunStatus::Doomed(reason) => News::Doomed(reason),
                _ => News::Stopping,
            };
            self.teller.tell(&session, &held.facts.uid, news);
            let client = &self.clients.ending;
            self.delete_pod(client, &session, &held.facts.uid).await?;
        }
        let is_unknown = self
            .seen
            .run_state(id)
            .is_some_and(|run| run.status == RunStatus::Unknown);
        if is_found || is_unknown {
            Ok(())
        } else {
            Err(BackendError::NotFound)
        }
    }

    /// Removes all that there is of the session.
    pub(super) async fn remove(&self, id: &SessionId) -> Result<(), BackendError> {
        self.forget_end(id);
        let mut is_left = false;
        for (namespace, entry) in self.seen.everywhere(id) {
            if entry.is_gone() {
                continue;
            }
            is_left = true;
            if let Some(session) = self.session(id, &namespace, &entry) {
                self.remove_objects(&session, &entry).await?;
            }
        }
        if is_left {
            return Err(BackendError::StillEnding);
        }
        Ok(())
    }

    /// Forgets what is remembered of a session beside its objects.
    pub(super) fn forget_end(&self, id: &SessionId) {
        self.seen.forget_end(id);
        self.note_failing(id, false);
    }

    /// The next step of a removal: first the pod, then the owner of the rest.
    async fn remove_objects(
        &self,
        session: &SessionRef,
        entry: &Entry,
    ) -> Result<(), BackendError> {
        let client = &self.clients.ending;
        if let Some((held, pod)) = entry.pod() {
            if pod.deleting {
                return Ok(());
            }
            return self.delete_pod(client, session, &held.facts.uid).await;
        }
        let account = entry.held(Kind::Account);
        if account.is_some_and(|it| it.facts.what == What::Account { deleting: true }) {
            return Ok(());
        }
        // By what it owns, when it has lost its labels and does not show.
        if let Some(uid) = entry.owner() {
            let name = session.service_account();
            self.delete::<ServiceAccount>(client, session, &name, uid)
                .await?;
        }
        // What has lost its owner is not collected with it.
        if let Some(secret) = entry.held(Kind::Secret).filter(|it| it.is_orphan()) {
            self.delete::<Secret>(client, session, &session.token_secret(), &secret.facts.uid)
                .await?;
        }
        if let Some(service) = entry.held(Kind::Service).filter(|it| it.is_orphan()) {
            self.delete::<Service>(client, session, &session.service(), &service.facts.uid)
                .await?;
        }
        Ok(())
    }

    /// Deletes the pod that was seen, with its own grace period, in the share of who asks for it.
    pub(super) async fn delete_pod(
        &self,
        client: &kube::Client,
        session: &SessionRef,
        uid: &str,
    ) -> Result<(), BackendError> {
        self.seen.asked(&session.namespace, &session.id, uid);
        self.delete::<Pod>(client, session, &session.pod(), uid)
            .await
    }

    async fn delete<K>(
        &self,
        client: &kube::Client,
        session: &SessionRef,
        name: &str,
        uid: &str,
    ) -> Result<(), BackendError>
    where
        K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
        K: Clone + std::fmt::Debug + serde::de::DeserializeOwned,
    {
        let api: Api<PartialObjectMeta<K>> = Api::namespaced(client.clone(), &session.namespace);
        let parameters = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                ..Preconditions::default()
            }),
            ..DeleteParams::default()
        };
        match api.delete(name, &parameters).await {
            Ok(_) => Ok(()),
            Err(error) if is_not_found(&error) => Ok(()),
            Err(error) => Err(backend_error("delete an object of a session", error)),
        }
    }
}
