//! Sessions as pods (contract section 3; design sections 5.5 to 5.8).
//!
//! In: what the controller asks. Out: a `ServiceAccount` for each session, and what it owns: token
//! Secret, Service and pod, in the namespace of the session's project. What is there is known from
//! watches alone, so that a control plane that starts finds what the one before left. Pods are
//! created, never applied: an upgrade of the control plane touches no session that runs.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ambient_shared::{
    clock::Clock,
    retry::Policy,
    session::SessionId,
    tasks::{TaskFailure, Tasks},
};
use futures_util::future::BoxFuture;
use moka::sync::Cache;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Backend, BackendError, Credentials, DesiredRun, Observer, RunState, TokenTimes};
use crate::{
    cluster::Clients,
    queue::{Group, GroupOf, WorkQueue, report},
    worker::Worker,
};
use events::{Events, Teller, events};
use names::SessionRef;
use projects::Projects;
use repair::{Repair, Share};
use seen::{Entry, Seen, facts::Reader};
use settings::{KubernetesSettings, Platform};
use watches::Watches;

mod ending;
pub(crate) mod events;
mod follow;
mod look;
mod managed;
pub(crate) mod names;
pub(crate) mod objects;
mod pod_state;
pub mod projects;
pub(crate) mod refusal;
mod repair;
mod seen;
pub mod settings;
mod start;
mod token;
mod watches;

pub use follow::WatchTimes;
pub use seen::ProjectOf;

/// From a write to its being seen in the pod: a kubelet looks at each pod once a minute, and at a
/// Secret that it has cached for another minute at most.
const LAG: Duration = Duration::from_secs(120);

/// How often is looked whether a run has waited too long.
const GLANCE: Duration = Duration::from_secs(5);

/// How long nobody waits for the sight of a namespace after it was waited for in vain.
const UNSEEN_FOR: Duration = Duration::from_secs(5);

/// Most such namespaces. A forgotten one costs its next session a wait.
const MAX_UNSEEN: u64 = 1_000;

/// How long work that has begun may go on after the shutdown.
const DRAIN: Duration = Duration::from_secs(10);

/// The Kubernetes backend. Does nothing by itself without its [`KubernetesTasks`].
pub struct KubernetesBackend {
    inner: Arc<Inner>,
}

/// What the backend does by itself: it watches and tells.
pub struct KubernetesTasks {
    inner: Arc<Inner>,
    events: Events,
    times: WatchTimes,
}

struct Inner {
    clients: Clients,
    settings: Arc<KubernetesSettings>,
    projects: Arc<Projects>,
    seen: Arc<Seen>,
    repairs: WorkQueue<Repair, SessionId>,
    teller: Teller,
    clock: Clock,
    /// Sessions whose token could not be written when that was last tried.
    failing: Mutex<HashSet<SessionId>>,
    /// Namespaces whose sight was waited for in vain: for some seconds nobody waits once more, so
    /// that the sessions of one do not keep all workers from those of others.
    unseen: Cache<String, ()>,
}

impl KubernetesBackend {
    /// A backend that knows nothing yet. `project_of` gives the project of a session that the API
    /// server has; `observer` is told of each change.
    pub fn new(
        clients: &Clients,
        settings: Arc<KubernetesSettings>,
        projects: Arc<Projects>,
        project_of: ProjectOf,
        observer: Observer,
        clock: Clock,
    ) -> (Self, KubernetesTasks) {
        let repairs = WorkQueue::new(Policy::default(), groups(&project_of));
        let namespace_of = {
            let settings = Arc::clone(&settings);
            Arc::new(move |project: &str| settings.namespace_of(project))
        };
        let seen = Seen::new(
            project_of,
            namespace_of,
            observer,
            repairs.clone(),
            clock.clone(),
        );
        let (teller, events) = events(clients.upkeep.clone(), clock.clone());
        let inner = Arc::new(Inner {
            clients: clients.clone(),
            settings,
            projects,
            seen: Arc::new(seen),
            repairs,
            teller,
            clock,
            failing: Mutex::default(),
            unseen: Cache::builder()
                .max_capacity(MAX_UNSEEN)
                .time_to_live(UNSEEN_FOR)
                .build(),
        });
        let tasks = KubernetesTasks {
            inner: Arc::clone(&inner),
            events,
            times: WatchTimes::default(),
        };
        (Self { inner }, tasks)
    }

    /// Waits until all that there is has been seen, or cannot be, at most `limit`: a controller that
    /// runs before takes runs that are not seen yet for unknown, and does nothing about these. Says
    /// whether that came to pass. The tasks must run.
    pub async fn synced(&self, limit: Duration) -> bool {
        self.inner.seen.until(limit, Seen::is_settled).await
    }

    /// Puts right what others have changed of sessions that run, until `shutdown`; then finishes
    /// what has begun. For the replica that leads.
    pub async fn repair(&self, shutdown: CancellationToken) {
        let _mending = self.inner.seen.mend();
        let worker = repairs(&self.inner, Share::Mending);
        let queue = worker.queue.clone();
        let clock = self.inner.clock.clone();
        let reporting =
            report::keep_reporting(queue, &Repair::ALL, "repair", clock, shutdown.clone());
        tokio::join!(worker.run(shutdown), reporting);
    }
}

impl fmt::Debug for KubernetesBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesBackend").finish_non_exhaustive()
    }
}

impl fmt::Debug for KubernetesTasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesTasks").finish_non_exhaustive()
    }
}

impl KubernetesTasks {
    /// The same with other lengths of watches, for tests that cannot wait minutes.
    #[must_use]
    pub fn with_watch_times(self, times: WatchTimes) -> Self {
        Self { times, ..self }
    }

    /// Runs until `shutdown`.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), TaskFailure> {
        let Self {
            inner,
            events,
            times,
        } = self;
        // A failure here ends these tasks; what it means for the program, the caller decides.
        let shutdown = shutdown.child_token();
        let mut tasks = Tasks::new(shutdown.clone());
        let watches = Watches {
            client: inner.clients.watching.clone(),
            seen: Arc::clone(&inner.seen),
            installation: inner.settings.namespace.clone(),
            tenants: matches!(inner.settings.platform, Platform::Mpp { .. }),
            times,
        };
        tasks.spawn("watches of Kubernetes", watches.run(shutdown.clone()));
        tasks.spawn(
            "runs that wait too long",
            glance(Arc::clone(&inner.seen), shutdown.clone()),
        );
        tasks.spawn(
            "pods that do not show any more",
            repairs(&inner, Share::Asking).run(shutdown.clone()),
        );
        tasks.spawn("Kubernetes Events", events.run(shutdown));
        tasks.run_until_shutdown(DRAIN).await
    }
}

/// Work is fair by project.
fn groups(project_of: &ProjectOf) -> GroupOf<SessionId> {
    let project_of = Arc::clone(project_of);
    Arc::new(move |id| project_of(id).map_or_else(Group::none, |project| Group::of(&project)))
}

/// Works on one share of what is damaged.
fn repairs(inner: &Arc<Inner>, share: Share) -> Worker<Repair, BackendError> {
    let inner = Arc::clone(inner);
    Worker {
        queue: inner.repairs.clone(),
        share,
        limit: repair::CONCURRENCY,
        time_limit: repair::LIMIT,
        run: Arc::new(move |repair, id: SessionId| {
            let inner = Arc::clone(&inner);
            Box::pin(async move { inner.repair(repair, &id).await })
        }),
    }
}

/// Looks now and then whether time alone has changed a run.
async fn glance(seen: Arc<Seen>, shutdown: CancellationToken) {
    let mut glances = interval(GLANCE);
    glances.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(glances.tick()).await.is_some() {
        seen.tick();
    }
}

impl Inner {
    /// Reads objects of a namespace.
    fn reader(&self, namespace: &str) -> Reader {
        Reader {
            namespace: namespace.to_owned(),
            project_of: self.seen.project_of(),
        }
    }

    /// The names of a session whose objects are there. Its project is empty when nobody knows it,
    /// which is in no name.
    fn session(&self, id: &SessionId, namespace: &str, entry: &Entry) -> Option<SessionRef> {
        let project = (self.seen.project_of())(id).or_else(|| entry.project());
        SessionRef::new(id, &project.unwrap_or_default(), namespace).ok()
    }

    /// Whether the token of this session could not be written when that was last tried, as a place
    /// to note whether it can now. Gives what was noted before.
    fn note_failing(&self, id: &SessionId, fails: bool) -> bool {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if fails {
            !failing.insert(id.clone())
        } else {
            failing.remove(id)
        }
    }
}

impl Backend for KubernetesBackend {
    fn lag(&self) -> Duration {
        LAG
    }

    fn start<'a>(
        &'a self,
        run: &'a DesiredRun,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(self.inner.start(run, credentials))
    }

    fn stop<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(self.inner.stop(id))
    }

    fn remove<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(self.inner.remove(id))
    }

    fn forget_end(&self, id: &SessionId) {
        self.inner.forget_end(id);
    }

    fn run_state(&self, id: &SessionId) -> Option<RunState> {
        self.inner.seen.run_state(id)
    }

    fn is_gone<'a>(
        &'a self,
        id: &'a SessionId,
        generation: u32,
    ) -> BoxFuture<'a, Result<bool, BackendError>> {
        Box::pin(self.inner.is_gone(id, generation))
    }

    fn token_times(&self, id: &SessionId) -> Option<TokenTimes> {
        self.inner.seen.token_times(id)
    }

    fn write_token<'a>(
        &'a self,
        id: &'a SessionId,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(self.inner.write_token(id, credentials))
    }

    fn sees_all(&self) -> bool {
        self.inner.seen.sees_all()
    }

    fn sessions(&self) -> Vec<SessionId> {
        self.inner.seen.sessions()
    }
}
