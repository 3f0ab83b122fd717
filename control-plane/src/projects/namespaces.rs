//! Watches the projects' namespaces: one that was deleted by hand comes back at once, and one whose
//! project was deleted while nobody looked is found.
//!
//! In: a watch of the metadata of namespaces that are labelled as ours, cluster-wide. Out: marks in
//! the [`Catalog`]; [`Projects`] forgets what is gone. Without the right to watch, the resync does
//! the same, later.

use std::{collections::HashMap, sync::Arc, time::Duration};

use ambient_shared::{
    exit,
    retry::{Backoff, Policy},
};
use futures_util::TryStreamExt as _;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, ResourceExt as _,
    core::PartialObjectMeta,
    runtime::watcher::{self, Event, watcher},
};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::catalog::{Catalog, ProjectId};
use crate::backend::kubernetes::{
    names::PROJECT_ID,
    projects::{Projects, objects::FOLLOWS_PROJECT},
};

/// Waits after a watch that failed.
const RETRIES: Policy = Policy {
    initial: Duration::from_secs(1),
    max: Duration::from_mins(1),
    brief: Duration::ZERO,
    longest_asked: Duration::from_mins(1),
};

type Meta = PartialObjectMeta<Namespace>;

/// The task.
pub(super) struct Namespaces {
    client: kube::Client,
    projects: Arc<Projects>,
    catalog: Arc<Catalog>,
    resync: Duration,
    /// The projects of those that go with their project, by name. No more than there are
    /// namespaces.
    following: HashMap<String, ProjectId>,
}

impl Namespaces {
    pub(super) fn new(
        client: kube::Client,
        projects: Arc<Projects>,
        catalog: Arc<Catalog>,
        resync: Duration,
    ) -> Self {
        Self {
            client,
            projects,
            catalog,
            resync,
            following: HashMap::new(),
        }
    }

    /// Watches until `shutdown`. Cancel-safe.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let api: Api<Meta> = Api::all(self.client.clone());
        let config = watcher::Config::default().labels(&self.projects.selector());
        let mut events = std::pin::pin!(watcher(api, config));
        let mut resync = interval(self.resync);
        resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut backoff = Backoff::new(RETRIES);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = resync.tick() => self.following.values().for_each(|id| self.catalog.mark(id)),
                event = events.try_next() => match event {
                    Ok(Some(event)) => {
                        backoff.reset();
                        self.take(event);
                    }
                    // It goes on by itself when asked again, and never ends.
                    Ok(None) => return,
                    Err(error) => {
                        let wait = backoff.next_wait();
                        warn!(reason = %exit::report(&error), retry_in_s = wait.as_secs_f32(), "watch of namespaces failed");
                        if shutdown.run_until_cancelled(sleep(wait)).await.is_none() {
                            return;
                        }
                    }
                }
            }
        }
    }

    fn take(&mut self, event: Event<Meta>) {
        match event {
            Event::Init => {
                // What is not among those that follow went while we did not look.
                for (name, id) in self.following.drain() {
                    self.projects.forget(&name);
                    self.catalog.mark(&id);
                }
            }
            Event::InitApply(found) => {
                if let Some(id) = self.note(&found) {
                    self.catalog.mark(&id);
                }
            }
            Event::Apply(found) => {
                self.note(&found);
            }
            Event::Delete(found) => {
                self.following.remove(&found.name_any());
                self.projects.forget(&found.name_any());
                if let Some(id) = project_of(&found) {
                    self.catalog.mark(&id);
                }
            }
            Event::InitDone => {}
        }
    }

    /// Remembers it, if it goes with its project.
    fn note(&mut self, found: &Meta) -> Option<ProjectId> {
        let name = found.name_any();
        if found.metadata.deletion_timestamp.is_some() {
            self.projects.forget(&name);
        }
        if !found.annotations().contains_key(FOLLOWS_PROJECT) {
            self.following.remove(&name);
            return None;
        }
        let id = project_of(found)?;
        self.following.insert(name, id.clone());
        Some(id)
    }
}

fn project_of(found: &Meta) -> Option<ProjectId> {
    found.labels().get(PROJECT_ID).map(ProjectId::new)
}
