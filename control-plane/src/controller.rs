//! The session controller: makes what runs follow what the API server says.
//!
//! ```text
//! feed → cache, due → queue → workers → reconciler → backend, API server
//! ticker → tokens due → workers → issuer → backend
//! ```
//!
//! Of several replicas all follow, so that each knows which sessions may have tokens and is warm
//! when it has to take over; one leads, and does the work.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use ambient_shared::{
    api::Api,
    clock::Clock,
    phase::Phase,
    retry::Policy,
    session::SessionId,
    tasks::{TaskFailure, Tasks},
};
use futures_util::FutureExt as _;
use metrics::gauge;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    authority::Authority,
    backend::{Backend, Observer},
    cluster::Fence,
    issuer::Issuer,
    keypair::Keyring,
    metrics::SESSIONS,
    queue::{self, WorkQueue},
    reconcile::{
        ReconcileError, Reconciler,
        desired::DesiredSettings,
        due::{Due, Handler, Share, by_project},
    },
    refresh::{Interval, Refresh, RefreshSettings, Rule, Tick},
    sessions::{SessionCache, feed::Feed, list::Lister, remote::Remote, rest::RestClient},
    worker::Worker,
};

/// Longest time for one handler's run. Calls have shorter limits of their own; this one is for a
/// backend that hangs.
const HANDLER_LIMIT: Duration = Duration::from_mins(2);

/// Longest time for one token's issue and write.
const TOKEN_LIMIT: Duration = Duration::from_secs(30);

/// How long work that has begun may go on after the shutdown: below the 30 s that Kubernetes gives.
const DRAIN: Duration = Duration::from_secs(20);

/// How long what only reads may take to end: it has nothing to finish.
const FOLLOW_DRAIN: Duration = Duration::from_secs(5);

/// Settings of the controller.
#[derive(Debug, Clone)]
pub struct ControllerSettings {
    /// What sessions' runs have in common.
    pub desired: DesiredSettings,
    /// CA certificates that runners trust for the token endpoint, from a file; before those that
    /// `desired` names.
    pub authority: Option<Arc<Authority>>,
    /// The refresh of tokens.
    pub refresh: RefreshSettings,
    /// Time between two complete lists while the watch is healthy.
    pub resync: Duration,
    /// How many sessions are started at once.
    pub provision_workers: usize,
    /// How many sessions' phases are written back at once.
    pub write_back_workers: usize,
    /// How many sessions are stopped, confirmed or cleaned up at once.
    pub clean_up_workers: usize,
    /// How many sessions the API server is asked about at once.
    pub ask_workers: usize,
    /// Closed while another replica leads: nothing is written then.
    pub fence: Fence,
}

impl Default for ControllerSettings {
    fn default() -> Self {
        Self {
            desired: DesiredSettings::default(),
            authority: None,
            refresh: RefreshSettings::default(),
            resync: Duration::from_mins(5),
            provision_workers: 16,
            write_back_workers: 16,
            clean_up_workers: 8,
            ask_workers: 8,
            fence: Fence::open(),
        }
    }
}

/// The controller, ready to run.
pub struct Controller {
    api: Api,
    rest: RestClient,
    issuer: Arc<dyn Issuer>,
    keys: Keyring,
    settings: ControllerSettings,
    clock: Clock,
    cache: SessionCache,
    due: Arc<Due>,
}

impl Controller {
    /// A controller that knows nothing yet.
    pub fn new(
        api: Api,
        rest: RestClient,
        issuer: Arc<dyn Issuer>,
        keys: Keyring,
        settings: ControllerSettings,
        clock: Clock,
    ) -> Self {
        let cache = SessionCache::new();
        let refreshing = settings.refresh.interval != Interval::Off;
        let tokens = refreshing.then(|| WorkQueue::new(Policy::default(), by_project(&cache)));
        let due = Arc::new(Due::new(cache.clone(), tokens));
        Self {
            api,
            rest,
            issuer,
            keys,
            settings,
            clock,
            cache,
            due,
        }
    }

    /// The sessions as last seen.
    pub fn cache(&self) -> SessionCache {
        self.cache.clone()
    }

    /// What the backend calls with each session whose run or Secret changed. Only marks work as
    /// due; never blocks.
    pub fn observer(&self) -> Observer {
        let due = Arc::clone(&self.due);
        Arc::new(move |id| due.touch(id))
    }

    /// Follows and leads until `shutdown`, as where there is one control plane only.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn run(
        self,
        backend: Arc<dyn Backend>,
        shutdown: CancellationToken,
    ) -> Result<(), TaskFailure> {
        let shutdown = shutdown.child_token();
        let follow = self.follow(Arc::clone(&backend), shutdown.clone());
        let lead = self.lead(backend, shutdown.clone(), DRAIN);
        // Whichever ends first, in whatever way, ends the other.
        let ends = |ended| {
            shutdown.cancel();
            ended
        };
        let (followed, led) = tokio::join!(follow.map(ends), lead.map(ends));
        followed.and(led)
    }

    /// Keeps the sessions known until `shutdown`: every replica does.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn follow(
        &self,
        backend: Arc<dyn Backend>,
        shutdown: CancellationToken,
    ) -> Result<(), TaskFailure> {
        self.due.set_backend(Arc::clone(&backend));
        // A failure here ends this part; what it means for the program, the caller decides.
        let shutdown = shutdown.child_token();
        let mut tasks = Tasks::new(shutdown.clone());
        let (cache, due) = (self.cache.clone(), Arc::clone(&self.due));
        let reconciler = Arc::new(self.reconciler(&backend, self.clock.now()));
        let asking = self.share(Share::Asking, self.settings.ask_workers, reconciler);
        tasks.spawn("workers that ask", asking.run(shutdown.clone()));
        tasks.spawn(
            "report",
            report(
                cache.clone(),
                Arc::clone(&due),
                self.clock.clone(),
                shutdown.clone(),
            ),
        );
        let (api, clock) = (self.api.clone(), self.clock.clone());
        let feed = Feed::new(api, self.lister(), cache, due, self.settings.resync, clock);
        tasks.spawn("session feed", feed.run(shutdown));
        tasks.run_until_shutdown(FOLLOW_DRAIN).await
    }

    /// Does what sessions need until `shutdown`, then finishes what has begun within `drain`. One
    /// replica at a time does. By now the backend must have found what is there: a session in phase
    /// Running whose run it does not know is reported as lost.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn lead(
        &self,
        backend: Arc<dyn Backend>,
        shutdown: CancellationToken,
        drain: Duration,
    ) -> Result<(), TaskFailure> {
        self.due.set_backend(Arc::clone(&backend));
        let shutdown = shutdown.child_token();
        let mut tasks = Tasks::new(shutdown.clone());
        let started_at = self.clock.now();
        let settings = &self.settings;
        let reconciler = Arc::new(self.reconciler(&backend, started_at));
        let shares: [(&str, Share, usize); 3] = [
            (
                "workers that start sessions",
                Share::Starting,
                settings.provision_workers,
            ),
            (
                "workers that report sessions",
                Share::Reporting,
                settings.write_back_workers,
            ),
            (
                "workers that end sessions",
                Share::Ending,
                settings.clean_up_workers,
            ),
        ];
        for (name, share, limit) in shares {
            let worker = self.share(share, limit, Arc::clone(&reconciler));
            tasks.spawn(name, worker.run(shutdown.clone()));
        }
        if let Some(tokens) = self.due.tokens.clone() {
            let refresh = Arc::new(self.refresh(backend, tokens.clone(), started_at));
            let writer = Worker {
                queue: tokens,
                share: (),
                limit: settings.refresh.concurrency,
                time_limit: TOKEN_LIMIT,
                run: {
                    let refresh = Arc::clone(&refresh);
                    Arc::new(move |(), id: SessionId| {
                        let refresh = Arc::clone(&refresh);
                        Box::pin(async move { refresh.replace(&id).await })
                    })
                },
            };
            tasks.spawn("workers that refresh tokens", writer.run(shutdown.clone()));
            tasks.spawn("refresh ticker", refresh.run(shutdown));
        }
        let _leading = self.due.lead();
        tasks.run_until_shutdown(drain).await
    }

    fn lister(&self) -> Lister {
        Lister::new(self.api.clone(), self.rest.clone())
    }

    fn reconciler(&self, backend: &Arc<dyn Backend>, started_at: SystemTime) -> Reconciler {
        Reconciler {
            cache: self.cache.clone(),
            remote: Remote::new(self.api.clone(), self.settings.fence.clone()),
            backend: Arc::clone(backend),
            issuer: Arc::clone(&self.issuer),
            keys: self.keys.clone(),
            desired: self.settings.desired.clone(),
            authority: self.settings.authority.clone(),
            due: Arc::clone(&self.due),
            min_life: {
                let (issuer, lag) = (Arc::clone(&self.issuer), backend.lag());
                let interval = self.settings.refresh.interval;
                Arc::new(move || Rule::new(interval, issuer.life(), lag, started_at).min_life())
            },
            clock: self.clock.clone(),
        }
    }

    fn share(
        &self,
        share: Share,
        limit: usize,
        reconciler: Arc<Reconciler>,
    ) -> Worker<Handler, ReconcileError> {
        Worker {
            queue: self.due.queue.clone(),
            share,
            limit,
            time_limit: HANDLER_LIMIT,
            run: Arc::new(move |handler, id: SessionId| {
                let reconciler = Arc::clone(&reconciler);
                Box::pin(async move { reconciler.run(handler, &id).await })
            }),
        }
    }

    fn refresh(
        &self,
        backend: Arc<dyn Backend>,
        tokens: WorkQueue<(), SessionId>,
        started_at: SystemTime,
    ) -> Refresh {
        Refresh {
            cache: self.cache.clone(),
            lister: self.lister(),
            backend,
            issuer: Arc::clone(&self.issuer),
            keys: self.keys.clone(),
            due: Arc::clone(&self.due),
            tokens,
            interval: self.settings.refresh.interval,
            clock: self.clock.clone(),
            started_at,
            tick: Mutex::new(Tick::default()),
        }
    }
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Reports how much there is of what, now and then.
async fn report(cache: SessionCache, due: Arc<Due>, clock: Clock, shutdown: CancellationToken) {
    loop {
        for handler in Handler::ALL {
            queue::report::report(&due.queue, &[handler], handler.as_str(), &clock);
        }
        if let Some(tokens) = &due.tokens {
            queue::report::report(tokens, &[()], "refresh", &clock);
        }
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        {
            let sessions = cache.sessions();
            for phase in Phase::ALL {
                let count = sessions.iter().filter(|it| it.phase == phase).count();
                gauge!(SESSIONS, "phase" => phase.as_str()).set(count as f64);
            }
        }
        let pause = shutdown.run_until_cancelled(sleep(queue::report::INTERVAL));
        if pause.await.is_none() {
            return;
        }
    }
}
