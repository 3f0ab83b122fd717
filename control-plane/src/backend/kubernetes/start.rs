//! Starting a session's run.
//!
//! In: what is to run, and its token. Out: `ServiceAccount`, token Secret, Service and pod, in this
//! order: what comes later needs what is before it. Each step may find itself done already, by a
//! call that was cut off. Two sessions may have the same names, as these have only a part of the id:
//! whose `ServiceAccount` it is decides whose names they are.

use std::time::Duration;

use ambient_shared::session::SessionId;
use k8s_openapi::{
    api::core::v1::{Pod, Secret, Service, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, ResourceExt as _,
    api::{Patch, PatchParams, PostParams},
    core::PartialObjectMeta,
};
use tracing::info;

use super::{
    Inner,
    events::News,
    names::{FIELD_MANAGER, SESSION_ID, SessionRef, check_project},
    objects,
    refusal::{backend_error, is_already_there, is_not_found},
    seen::{
        Entry, Found,
        facts::{Kind, PodFacts, What},
    },
};
use crate::backend::{BackendError, Credentials, DesiredRun, RunStatus};

/// Longest wait until it is seen what there is in a namespace. Not longer, as who waits here keeps a
/// worker from others; the next try goes on waiting.
const SIGHT_LIMIT: Duration = Duration::from_secs(3);

impl Inner {
    pub(super) async fn start(
        &self,
        run: &DesiredRun,
        credentials: &Credentials,
    ) -> Result<(), BackendError> {
        let namespace = self.settings.namespace_of(&run.project);
        // Before anything is made for it.
        check_project(&run.project, &namespace)?;
        let session = SessionRef::new(&run.id, &run.project, &namespace)?;
        objects::pod(run, &session, "", &self.settings)?;
        self.projects.ensure(&run.project).await?;
        self.see(&namespace).await?;
        match self.start_in_namespace(run, &session, credentials).await {
            Ok(()) => Ok(()),
            Err(error) => {
                if is_about_the_namespace(&error) {
                    self.projects.forget(&namespace);
                }
                Err(self.projects.explain(&namespace, error).await)
            }
        }
    }

    async fn start_in_namespace(
        &self,
        run: &DesiredRun,
        session: &SessionRef,
        credentials: &Credentials,
    ) -> Result<(), BackendError> {
        if self.is_started(run, session).await? {
            return Ok(());
        }
        let owner = self.owner(session).await?;
        let client = &self.clients.starting;
        self.apply_secret(client, session, &owner, credentials, FIELD_MANAGER)
            .await?;
        self.apply_service(client, session, &owner).await?;
        self.create_pod(run, session, &owner).await
    }

    /// Waits until it is seen what there is in a namespace: what runs there must not be started once
    /// more. Not where others have just waited in vain.
    async fn see(&self, namespace: &str) -> Result<(), BackendError> {
        self.seen.namespace_seen(&Found {
            name: namespace.to_owned(),
            uid: None,
            version: 0,
        });
        if !self.unseen.contains_key(namespace) {
            let is_seen = self.seen.until(SIGHT_LIMIT, |it| it.is_listed(namespace));
            if is_seen.await {
                return Ok(());
            }
            self.unseen.insert(namespace.to_owned(), ());
            // Our RoleBinding may be gone.
            self.projects.forget(namespace);
        } else if self.seen.is_listed(namespace) {
            return Ok(());
        }
        Err(BackendError::Refused {
            reason: "NamespaceUnreadable",
            message: format!(
                "it cannot be seen what runs in namespace {namespace}; may the control plane list \
                 and watch pods there?"
            ),
        })
    }

    /// Whether this run is there already. Ends those of other generations first.
    async fn is_started(
        &self,
        run: &DesiredRun,
        session: &SessionRef,
    ) -> Result<bool, BackendError> {
        let mut is_ending = false;
        for (namespace, entry) in self.seen.everywhere(&run.id) {
            let is_here = namespace == session.namespace;
            if is_here
                && let Some(ended) = entry.ended()
                && ended.generation == run.generation
            {
                return Ok(true);
            }
            let Some((held, pod)) = entry.pod() else {
                continue;
            };
            if is_here && pod.generation == run.generation && !pod.deleting {
                return Ok(true);
            }
            let there = SessionRef::new(&run.id, &run.project, &namespace)?;
            if !pod.deleting {
                self.delete_pod(&self.clients.starting, &there, &held.facts.uid)
                    .await?;
            } else if self.is_lost(&entry) {
                return Err(BackendError::Refused {
                    reason: "NodeLost",
                    message:
                        "the session's previous pod is on a node that does not answer; it can \
                              start once the node is back, or its Node object is deleted"
                            .to_owned(),
                });
            }
            is_ending = true;
        }
        if is_ending {
            return Err(BackendError::StillEnding);
        }
        Ok(false)
    }

    /// Whether a pod that is being deleted is on a node that is lost.
    fn is_lost(&self, entry: &Entry) -> bool {
        entry.pod().is_some_and(|(held, pod)| {
            let has_ended_unseen = matches!(
                pod.stage.status(held.since(), self.clock.now()),
                RunStatus::Ended { .. }
            );
            has_ended_unseen && pod.stage.changes_at(held.since()).is_some()
        })
    }

    /// The UID of the session's `ServiceAccount`, which is made if it is not there.
    async fn owner(&self, session: &SessionRef) -> Result<String, BackendError> {
        let entry = self.seen.entry(&session.namespace, &session.id);
        if let Some(account) = entry.held(Kind::Account) {
            return match account.facts.what {
                What::Account { deleting: true } => Err(BackendError::StillEnding),
                _ => Ok(account.facts.uid.clone()),
            };
        }
        let api: Api<ServiceAccount> =
            Api::namespaced(self.clients.starting.clone(), &session.namespace);
        let account = objects::service_account(session);
        let name = session.service_account();
        let metadata = match api.create(&made_by_us(), &account).await {
            Ok(account) => account.metadata,
            Err(error) if is_already_there(&error) => {
                let found = api.get_metadata_opt(&name).await;
                let found = found.map_err(|it| backend_error("look for a ServiceAccount", it))?;
                // Deleted in between.
                let found = found.ok_or(BackendError::StillEnding)?;
                check_owner(&found.metadata, &session.id, &name)?;
                found.metadata
            }
            Err(error) => return Err(backend_error("make a session's ServiceAccount", error)),
        };
        if metadata.deletion_timestamp.is_some() {
            return Err(BackendError::StillEnding);
        }
        let sighting = self.reader(&session.namespace).account(&metadata);
        self.seen.wrote(&session.namespace, Kind::Account, sighting);
        Ok(metadata.uid.unwrap_or_default())
    }

    /// Writes the whole token Secret, with one request. The answer has no data.
    pub(super) async fn apply_secret(
        &self,
        client: &kube::Client,
        session: &SessionRef,
        owner: &str,
        credentials: &Credentials,
        manager: &str,
    ) -> Result<(), BackendError> {
        let api: Api<PartialObjectMeta<Secret>> =
            Api::namespaced(client.clone(), &session.namespace);
        let secret = objects::token_secret(session, owner, credentials, self.clock.now());
        let parameters = PatchParams::apply(manager).force();
        let written = api
            .patch(&session.token_secret(), &parameters, &Patch::Apply(secret))
            .await
            .map_err(|error| backend_error("write the token of a session", error))?;
        let sighting = self.reader(&session.namespace).secret(&written.metadata);
        self.seen.wrote(&session.namespace, Kind::Secret, sighting);
        Ok(())
    }

    /// Makes the Service, or makes it as it was.
    pub(super) async fn apply_service(
        &self,
        client: &kube::Client,
        session: &SessionRef,
        owner: &str,
    ) -> Result<(), BackendError> {
        let api: Api<PartialObjectMeta<Service>> =
            Api::namespaced(client.clone(), &session.namespace);
        let service = objects::service(session, owner);
        let parameters = PatchParams::apply(FIELD_MANAGER).force();
        let written = api
            .patch(&session.service(), &parameters, &Patch::Apply(service))
            .await
            .map_err(|error| backend_error("make the Service of a session", error))?;
        let sighting = self.reader(&session.namespace).service(&written.metadata);
        self.seen.wrote(&session.namespace, Kind::Service, sighting);
        Ok(())
    }

    async fn create_pod(
        &self,
        run: &DesiredRun,
        session: &SessionRef,
        owner: &str,
    ) -> Result<(), BackendError> {
        let api: Api<Pod> = Api::namespaced(self.clients.starting.clone(), &session.namespace);
        let pod = objects::pod(run, session, owner, &self.settings)?;
        let made = match api.create(&made_by_us(), &pod).await {
            Ok(made) => made,
            Err(error) if is_already_there(&error) => {
                return self.find_pod(run, session, &api).await;
            }
            Err(error) => return Err(backend_error("make the pod of a session", error)),
        };
        let uid = made.uid().unwrap_or_default();
        let sighting = self.reader(&session.namespace).pod(&made);
        self.seen.wrote(&session.namespace, Kind::Pod, sighting);
        let generation = run.generation;
        // Its name has the session's id in it.
        let (session_hash, namespace) = (session.id.hash(), &session.namespace);
        info!(session = %session_hash, %namespace, pod_uid = %uid, "pod created");
        self.teller
            .tell(session, &uid, News::Started { generation });
        Ok(())
    }

    /// There is a pod of that name that was not seen yet.
    async fn find_pod(
        &self,
        run: &DesiredRun,
        session: &SessionRef,
        api: &Api<Pod>,
    ) -> Result<(), BackendError> {
        let name = session.pod();
        let found = match api.get(&name).await {
            Ok(found) => found,
            Err(error) if is_not_found(&error) => return Err(BackendError::StillEnding),
            Err(error) => return Err(backend_error("look for a session's pod", error)),
        };
        check_owner(&found.metadata, &session.id, &name)?;
        let sighting = self.reader(&session.namespace).pod(&found);
        let facts = sighting.facts.clone();
        self.seen.wrote(&session.namespace, Kind::Pod, sighting);
        match facts.map(|facts| facts.what) {
            Some(What::Pod(PodFacts {
                generation,
                deleting: false,
                ..
            })) if generation == run.generation => Ok(()),
            // Of another generation: the next try ends it.
            _ => Err(BackendError::StillEnding),
        }
    }
}

/// Whether an error tells that the namespace is not as it was found once.
fn is_about_the_namespace(error: &BackendError) -> bool {
    match error {
        BackendError::Refused { .. } | BackendError::Failed { .. } => true,
        BackendError::StillEnding | BackendError::NotFound | BackendError::Impossible { .. } => {
            false
        }
    }
}

/// # Errors
/// `Impossible` when an object of the session's name is another session's, or nobody's that we know.
fn check_owner(metadata: &ObjectMeta, id: &SessionId, name: &str) -> Result<(), BackendError> {
    let said = |map: &Option<std::collections::BTreeMap<String, String>>| {
        map.as_ref().and_then(|map| map.get(SESSION_ID)).cloned()
    };
    let of = said(&metadata.annotations).or_else(|| said(&metadata.labels));
    let message = match of {
        Some(of) if of == id.as_str() => return Ok(()),
        Some(_) => {
            "another session has the same names: only the first 40 characters of a session's id, \
             in lower case, are part of them"
                .to_owned()
        }
        None => {
            format!("an object of the session's name {name} is there, and is not one of a session")
        }
    };
    Err(BackendError::Impossible {
        reason: "NameTaken",
        message,
    })
}

fn made_by_us() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}
