//! The projects that the API server has, and what each is to have in the cluster.
//!
//! ```text
//! feeds of projects and settings, watch of namespaces → catalog, queue → worker → backend
//! ```
//!
//! Feeds only say that there may be news about a project. The worker asks the API server about that
//! one project: when it is there, its namespace and its groups' access are made as they should be;
//! when it is not, they go. So no list, however incomplete, and no event, however old, ever deletes
//! anything. Every project is looked at again at each resync, which puts right what people changed.

use std::{sync::Arc, time::Duration};

use ambient_shared::{
    api::Api,
    clock::Clock,
    proto,
    retry::Policy,
    tasks::{TaskFailure, Tasks},
};
use metrics::counter;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tracing::{debug, info, warn};

use crate::{
    backend::{
        BackendError,
        kubernetes::projects::{Projects, Removed, access},
    },
    metrics::PROJECT_RECONCILES,
    queue::{WorkQueue, report},
    sessions::remote::{RemoteError, call},
    worker::Worker,
};

mod catalog;
mod feed;
mod namespaces;

use catalog::{Catalog, ProjectId};
use feed::{Feed, OfProjects, OfSettings};
use namespaces::Namespaces;

/// How many projects are worked on at once: enough that some that wait for a tenant operator hold up
/// nobody, few enough that a resync of thousands leaves room for sessions.
const WORKERS: usize = 8;

/// Longest time for one project. Calls have shorter limits of their own.
const LIMIT: Duration = Duration::from_mins(2);

/// Waits after failures of one project.
const RETRIES: Policy = Policy {
    initial: Duration::from_millis(500),
    max: Duration::from_mins(1),
    brief: Duration::ZERO,
    longest_asked: Duration::from_mins(1),
};

/// Keeps namespaces and access as projects and their settings say. One for each installation: run
/// it where the session controller runs.
pub struct ProjectController {
    api: Api,
    projects: Arc<Projects>,
    namespaces: kube::Client,
    resync: Duration,
    clock: Clock,
}

impl std::fmt::Debug for ProjectController {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProjectController").finish_non_exhaustive()
    }
}

/// Why a project is not as it should be. All of these are tried again.
#[derive(Debug, thiserror::Error)]
enum ProjectError {
    /// The API server could not be asked.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The cluster could not be changed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl ProjectController {
    /// A controller that knows nothing yet. `resync` is the time between two complete looks.
    pub fn new(api: Api, projects: Arc<Projects>, resync: Duration, clock: Clock) -> Self {
        let namespaces = projects.client();
        Self {
            api,
            projects,
            namespaces,
            resync,
            clock,
        }
    }

    /// Runs until `shutdown`, then finishes what has begun within `drain`. Each run starts without
    /// knowledge.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn run(
        &self,
        shutdown: CancellationToken,
        drain: Duration,
    ) -> Result<(), TaskFailure> {
        let (api, projects, resync) = (&self.api, &self.projects, self.resync);
        let shutdown = shutdown.child_token();
        let mut tasks = Tasks::new(shutdown.clone());
        let queue = WorkQueue::new(RETRIES, catalog::each_for_itself());
        let catalog = Arc::new(Catalog::new(queue.clone()));
        let reconciler = Arc::new(Reconciler {
            api: api.clone(),
            catalog: Arc::clone(&catalog),
            projects: Arc::clone(projects),
        });
        let reporting = report::keep_reporting(
            queue.clone(),
            &[()],
            "project",
            self.clock.clone(),
            shutdown.clone(),
        );
        tasks.spawn("report", reporting);
        let worker = Worker {
            queue,
            share: (),
            limit: WORKERS,
            time_limit: LIMIT,
            run: Arc::new(move |(), id: ProjectId| {
                let reconciler = Arc::clone(&reconciler);
                Box::pin(async move { reconciler.run(&id).await })
            }),
        };
        tasks.spawn("workers of projects", worker.run(shutdown.clone()));
        let of_projects = Feed::<OfProjects>::new(api.clone(), Arc::clone(&catalog), resync);
        tasks.spawn("feed of projects", of_projects.run(shutdown.clone()));
        let of_settings = Feed::<OfSettings>::new(api.clone(), Arc::clone(&catalog), resync);
        tasks.spawn("feed of settings", of_settings.run(shutdown.clone()));
        let namespaces = self.namespaces.clone();
        let namespaces = Namespaces::new(namespaces, Arc::clone(projects), catalog, resync);
        tasks.spawn("watch of namespaces", namespaces.run(shutdown));
        tasks.run_until_shutdown(drain).await
    }
}

/// Does what is due for one project.
struct Reconciler {
    api: Api,
    catalog: Arc<Catalog>,
    projects: Arc<Projects>,
}

impl Reconciler {
    async fn run(&self, id: &ProjectId) -> Result<(), ProjectError> {
        let mut counted = Counted { result: "failed" };
        let done = match self.is_there(id).await {
            Ok(true) => self.restore(id).await,
            Ok(false) => self.remove(id).await,
            Err(error) => Err(error.into()),
        };
        counted.result = match &done {
            Ok(()) => "ok",
            Err(ProjectError::Backend(BackendError::Impossible { .. })) => "impossible",
            Err(_) => "failed",
        };
        match done {
            // Trying again soon cannot help; the resync will.
            Err(ProjectError::Backend(BackendError::Impossible { reason, message })) => {
                warn!(project = %id, reason, %message, "project cannot have a namespace");
                Ok(())
            }
            done => done,
        }
    }

    /// Whether the API server has the project now.
    async fn is_there(&self, id: &ProjectId) -> Result<bool, RemoteError> {
        let request = proto::GetProjectRequest {
            id: id.as_str().to_owned(),
        };
        let mut client = self.api.projects();
        match call("read a project", client.get_project(Request::new(request))).await {
            Ok(_) => {
                self.catalog.exists(id);
                Ok(true)
            }
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn restore(&self, id: &ProjectId) -> Result<(), ProjectError> {
        self.projects.restore(id.as_str()).await?;
        // All are marked again when the settings are known.
        if !self.catalog.knows_settings() {
            return Ok(());
        }
        let Some(access) = self.access_of(id).await? else {
            return Ok(());
        };
        match access::parse(&access) {
            Ok(grants) => Ok(self.projects.grant(id.as_str(), &grants).await?),
            Err(error) => {
                let reason = ambient_shared::exit::report(&error);
                warn!(project = %id, %reason, "access of groups stays as it is");
                Ok(())
            }
        }
    }

    /// The project's `group_access` as it is now; none when it is not certain that there are no
    /// settings.
    async fn access_of(&self, id: &ProjectId) -> Result<Option<String>, RemoteError> {
        let mut newest: Option<proto::ProjectSettings> = None;
        for settings in self.catalog.settings_of(id) {
            let request = proto::GetProjectSettingsRequest {
                id: settings.clone(),
            };
            let mut client = self.api.project_settings();
            let answer = client.get_project_settings(Request::new(request));
            match call("read the settings of a project", answer).await {
                Ok(found) if found.project_id != id.as_str() => {
                    self.catalog.settings_seen(&settings, &found.project_id);
                }
                Ok(found) => {
                    if newest
                        .as_ref()
                        .is_none_or(|it| updated(it) < updated(&found))
                    {
                        newest = Some(found);
                    }
                }
                Err(error) if error.is_not_found() => self.catalog.settings_gone(&settings),
                Err(error) => return Err(error),
            }
        }
        Ok(match newest {
            Some(settings) => Some(settings.group_access.unwrap_or_default()),
            None => self.catalog.is_certain_of_settings().then(String::new),
        })
    }

    async fn remove(&self, id: &ProjectId) -> Result<(), ProjectError> {
        let existed = self.catalog.existed(id);
        match self.projects.remove(id.as_str(), existed).await? {
            Removed::Everything => info!(project = %id, "project removed"),
            Removed::NotYet => {
                // Its namespace is looked at again at the next resync.
                info!(project = %id, "project deleted, its sessions not yet");
            }
            Removed::Nothing => debug!(project = %id, "no project of this id"),
        }
        self.catalog.removed(id);
        Ok(())
    }
}

/// Counts a look when it ends, in whatever way: also by being dropped at its limit, or by a panic.
struct Counted {
    result: &'static str,
}

impl Drop for Counted {
    fn drop(&mut self) {
        counter!(PROJECT_RECONCILES, "result" => self.result).increment(1);
    }
}

fn updated(settings: &proto::ProjectSettings) -> Option<(i64, i32)> {
    let time = settings.metadata.as_ref()?.updated_at.as_ref()?;
    Some((time.seconds, time.nanos))
}
