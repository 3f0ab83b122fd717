//! Puts right what somebody else changed of a session that runs.
//!
//! In: what [`Seen`](super::seen::Seen) found damaged. Out: patches of labels and owners of pods and
//! `ServiceAccounts`, Services applied anew, by the replica that leads. A pod's template is never
//! touched. Secrets are not repaired here: one that was edited or deleted is a token that is due.

use std::time::Duration;

use ambient_shared::session::SessionId;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::{
    Api,
    api::{Patch, PatchParams},
    core::PartialObjectMeta,
};
use metrics::counter;
use serde_json::json;
use tracing::info;

use super::{
    Inner,
    events::News,
    names::{FIELD_MANAGER, GENERATION, SESSION_ID, SessionRef},
    objects,
    refusal::{backend_error, is_not_found},
    seen::{Entry, facts::Kind},
};
use crate::{backend::BackendError, metrics::REPAIRS, queue::Work};

/// Repairs at once.
pub(super) const CONCURRENCY: usize = 4;

/// Longest time for one.
pub(super) const LIMIT: Duration = Duration::from_secs(60);

/// What is to be repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Repair {
    /// A pod that does not show any more: is it there?
    Look,
    /// Labels, annotations and owner of the pod.
    Pod,
    /// Labels of the `ServiceAccount`.
    Account,
    /// The Service.
    Service,
    /// A pod whose agent has ended, and in which something else runs on.
    Rest,
}

/// Shares of the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Share {
    /// What only asks: on every replica, as each tells by its pods what runs.
    Asking,
    /// What writes: the work of the replica that leads.
    Mending,
}

impl Work for Repair {
    type Share = Share;

    fn share(self) -> Share {
        match self {
            Self::Look => Share::Asking,
            Self::Pod | Self::Account | Self::Service | Self::Rest => Share::Mending,
        }
    }
}

impl Repair {
    pub(super) const ALL: [Self; 5] = [
        Self::Look,
        Self::Pod,
        Self::Account,
        Self::Service,
        Self::Rest,
    ];

    /// The label in metrics, and what Events call it.
    fn as_str(self) -> &'static str {
        match self {
            Self::Look => "look",
            Self::Pod => "pod",
            Self::Account => "serviceaccount",
            Self::Service => "service",
            Self::Rest => "rest",
        }
    }

    /// The kind that must have been listed, or nothing can be said of it.
    pub(super) fn needs(self) -> Option<Kind> {
        match self {
            Self::Look | Self::Pod | Self::Rest => None,
            Self::Account => Some(Kind::Account),
            Self::Service => Some(Kind::Service),
        }
    }
}

impl Inner {
    /// Repairs a session's objects, if that is (still) needed.
    ///
    /// # Errors
    /// When it is to be tried again.
    pub(super) async fn repair(&self, repair: Repair, id: &SessionId) -> Result<(), BackendError> {
        for (namespace, entry) in self.seen.everywhere(id) {
            if !entry.damages().contains(&repair) {
                continue;
            }
            let Some(session) = self.session(id, &namespace, &entry) else {
                continue;
            };
            // Its labels cannot be made as they were.
            if session.project.is_empty() {
                continue;
            }
            match repair {
                Repair::Look => self.look_for_pod(&session, &entry).await?,
                Repair::Pod => self.repair_pod(&session, &entry).await?,
                Repair::Account => self.repair_account(&session, &entry).await?,
                Repair::Service => self.repair_service(&session, &entry).await?,
                Repair::Rest => self.end_rest(&session, &entry).await?,
            }
        }
        Ok(())
    }

    async fn look_for_pod(&self, session: &SessionRef, entry: &Entry) -> Result<(), BackendError> {
        let Some((held, _)) = entry.pod() else {
            return Ok(());
        };
        let api: Api<Pod> = Api::namespaced(self.clients.upkeep.clone(), &session.namespace);
        let name = session.pod();
        let found = api.get_metadata_opt(&name).await;
        let found = found.map_err(|error| backend_error("look for a session's pod", error))?;
        let uid = &held.facts.uid;
        let is_there = found.is_some_and(|it| it.metadata.uid.as_ref() == Some(uid));
        self.seen
            .looked_for(&session.namespace, &name, uid, is_there);
        Ok(())
    }

    async fn repair_pod(&self, session: &SessionRef, entry: &Entry) -> Result<(), BackendError> {
        let Some((held, pod)) = entry.pod() else {
            return Ok(());
        };
        let api: Api<Pod> = Api::namespaced(self.clients.upkeep.clone(), &session.namespace);
        let name = session.pod();
        let uid = &held.facts.uid;
        let mut metadata = json!({
            "uid": uid,
            "labels": session.labels(),
            "annotations": {
                SESSION_ID: session.id.as_str(),
                GENERATION: pod.generation.to_string(),
            },
        });
        if let Some(account) = entry.held(Kind::Account) {
            metadata["ownerReferences"] = json!([objects::owner(session, &account.facts.uid)]);
        }
        let patch = Patch::Strategic(json!({ "metadata": metadata }));
        match api.patch(&name, &ours(), &patch).await {
            Ok(pod) => {
                let reader = self.reader(&session.namespace);
                self.seen
                    .wrote(&session.namespace, Kind::Pod, reader.pod(&pod));
                self.repaired(Repair::Pod, session, entry);
                Ok(())
            }
            Err(error) if is_not_found(&error) => {
                // Without its label nobody will tell of its end.
                self.seen.gone(&session.namespace, Kind::Pod, &name);
                Ok(())
            }
            Err(error) => Err(backend_error("repair the labels of a session's pod", error)),
        }
    }

    async fn repair_account(
        &self,
        session: &SessionRef,
        entry: &Entry,
    ) -> Result<(), BackendError> {
        let api: Api<PartialObjectMeta<ServiceAccount>> =
            Api::namespaced(self.clients.upkeep.clone(), &session.namespace);
        let name = session.service_account();
        let found = api.get_opt(&name).await;
        let found = found.map_err(|error| backend_error("look for a ServiceAccount", error))?;
        // One that is gone, or is going, takes the session's pod with it.
        let Some(found) = found.filter(|it| it.metadata.deletion_timestamp.is_none()) else {
            return Ok(());
        };
        let uid = found.metadata.uid.unwrap_or_default();
        let is_ours = entry
            .pod()
            .is_some_and(|(held, _)| held.facts.owners.contains(&uid));
        if !is_ours {
            return Ok(());
        }
        let patch = Patch::Strategic(json!({"metadata": {
            "uid": uid,
            "labels": session.labels(),
            "annotations": {SESSION_ID: session.id.as_str()},
        }}));
        match api.patch(&name, &ours(), &patch).await {
            Ok(account) => {
                let reader = self.reader(&session.namespace);
                let sighting = reader.account(&account.metadata);
                self.seen.wrote(&session.namespace, Kind::Account, sighting);
                self.repaired(Repair::Account, session, entry);
                Ok(())
            }
            Err(error) if is_not_found(&error) => Ok(()),
            Err(error) => Err(backend_error("repair a ServiceAccount's labels", error)),
        }
    }

    async fn repair_service(
        &self,
        session: &SessionRef,
        entry: &Entry,
    ) -> Result<(), BackendError> {
        let Some(owner) = entry.owner() else {
            return Ok(());
        };
        self.apply_service(&self.clients.upkeep, session, owner)
            .await?;
        self.repaired(Repair::Service, session, entry);
        Ok(())
    }

    /// The agent has ended, and with it the run: nothing beside it is to go on.
    async fn end_rest(&self, session: &SessionRef, entry: &Entry) -> Result<(), BackendError> {
        match entry.pod() {
            Some((held, _)) => {
                self.delete_pod(&self.clients.upkeep, session, &held.facts.uid)
                    .await
            }
            None => Ok(()),
        }
    }

    fn repaired(&self, repair: Repair, session: &SessionRef, entry: &Entry) {
        let what = repair.as_str();
        info!(session = %session.id.hash(), what, "repaired");
        counter!(REPAIRS, "what" => repair.as_str()).increment(1);
        if let Some((held, _)) = entry.pod() {
            self.teller
                .tell(session, &held.facts.uid, News::Repaired(what));
        }
    }
}

/// Patches in our name.
fn ours() -> PatchParams {
    PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    }
}
