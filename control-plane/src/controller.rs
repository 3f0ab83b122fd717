//! The session controller: makes what runs follow what the API server says.
//!
//! ```text
//! feed → cache, due → queue → workers → reconciler → backend, API server
//! ticker → tokens due → workers → issuer → backend
//! ```

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use ambient_shared::{
    api::Api,
    clock::Clock,
    phase::Phase,
    proof::SessionKey,
    retry::Policy,
    session::SessionId,
    tasks::{TaskFailure, Tasks},
};
use metrics::gauge;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    backend::{Backend, Observer},
    issuer::Issuer,
    metrics::{QUEUE_LENGTH, SESSIONS},
    queue::WorkQueue,
    reconcile::{
        Reconciler,
        desired::DesiredSettings,
        due::{Due, Handler},
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

/// How often the number of sessions and the queue's length are reported.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Gives the key of a session.
pub type SessionKeys = Arc<dyn Fn(&SessionId) -> SessionKey + Send + Sync>;

/// Settings of the controller.
#[derive(Debug, Clone)]
pub struct ControllerSettings {
    /// What sessions' runs have in common.
    pub desired: DesiredSettings,
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
}

impl Default for ControllerSettings {
    fn default() -> Self {
        Self {
            desired: DesiredSettings::default(),
            refresh: RefreshSettings::default(),
            resync: Duration::from_mins(5),
            provision_workers: 8,
            write_back_workers: 8,
            clean_up_workers: 4,
        }
    }
}

/// The controller, ready to run.
pub struct Controller {
    api: Api,
    rest: RestClient,
    issuer: Arc<dyn Issuer>,
    keys: SessionKeys,
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
        keys: SessionKeys,
        settings: ControllerSettings,
        clock: Clock,
    ) -> Self {
        let cache = SessionCache::new();
        let refreshing = settings.refresh.interval != Interval::Off;
        let tokens = refreshing.then(|| WorkQueue::new(Policy::default()));
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

    /// Runs until `shutdown`, then finishes what has begun. By now the backend must have found
    /// what an earlier life of the control plane left: a session in phase Running whose run it does
    /// not know is reported as lost.
    ///
    /// # Errors
    /// When a task fails or does not end in time.
    pub async fn run(
        self,
        backend: Arc<dyn Backend>,
        shutdown: CancellationToken,
    ) -> Result<(), TaskFailure> {
        let Self {
            api,
            rest,
            issuer,
            keys,
            settings,
            clock,
            cache,
            due,
        } = self;
        due.set_backend(Arc::clone(&backend));
        // A failure here ends this controller; what it means for the program, the caller decides.
        let shutdown = shutdown.child_token();
        let mut tasks = Tasks::new(shutdown.clone());
        let lister = Lister::new(api.clone(), rest);
        let started_at = clock.now();
        let interval = settings.refresh.interval;

        let reconciler = Arc::new(Reconciler {
            cache: cache.clone(),
            remote: Remote::new(api.clone()),
            backend: Arc::clone(&backend),
            issuer: Arc::clone(&issuer),
            keys: Arc::clone(&keys),
            desired: settings.desired,
            due: Arc::clone(&due),
            min_life: {
                let (issuer, lag) = (Arc::clone(&issuer), backend.lag());
                Arc::new(move || Rule::new(interval, issuer.life(), lag, started_at).min_life())
            },
            clock: clock.clone(),
        });
        let share = |handlers: &[Handler], limit| {
            let reconciler = Arc::clone(&reconciler);
            Worker {
                queue: due.queue.clone(),
                handlers: handlers.to_vec(),
                limit,
                time_limit: HANDLER_LIMIT,
                run: Arc::new(move |handler, id: SessionId| {
                    let reconciler = Arc::clone(&reconciler);
                    Box::pin(async move { reconciler.run(handler, &id).await })
                }),
            }
        };
        let starting = share(&Handler::STARTING, settings.provision_workers);
        let reporting = share(&Handler::REPORTING, settings.write_back_workers);
        let ending = share(&Handler::ENDING, settings.clean_up_workers);
        tasks.spawn(
            "workers that start sessions",
            starting.run(shutdown.clone()),
        );
        tasks.spawn(
            "workers that report sessions",
            reporting.run(shutdown.clone()),
        );
        tasks.spawn("workers that end sessions", ending.run(shutdown.clone()));

        if let Some(tokens) = due.tokens.clone() {
            let refresh = Arc::new(Refresh {
                cache: cache.clone(),
                lister: lister.clone(),
                backend,
                issuer,
                keys,
                due: Arc::clone(&due),
                tokens: tokens.clone(),
                interval,
                clock: clock.clone(),
                started_at,
                tick: Mutex::new(Tick::default()),
            });
            let writer = Worker {
                queue: tokens,
                handlers: vec![()],
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
            tasks.spawn("refresh ticker", refresh.run(shutdown.clone()));
        }

        tasks.spawn(
            "report",
            report(cache.clone(), Arc::clone(&due), shutdown.clone()),
        );
        let feed = Feed::new(api, lister, cache, due, settings.resync, clock);
        tasks.spawn("session feed", feed.run(shutdown));
        tasks.run_until_shutdown(DRAIN).await
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
async fn report(cache: SessionCache, due: Arc<Due>, shutdown: CancellationToken) {
    loop {
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        {
            for handler in Handler::ALL {
                gauge!(QUEUE_LENGTH, "handler" => handler.as_str())
                    .set(due.queue.len(handler) as f64);
            }
            let sessions = cache.sessions();
            for phase in Phase::ALL {
                let count = sessions.iter().filter(|it| it.phase == phase).count();
                gauge!(SESSIONS, "phase" => phase.as_str()).set(count as f64);
            }
        }
        let pause = shutdown.run_until_cancelled(sleep(REPORT_INTERVAL));
        if pause.await.is_none() {
            return;
        }
    }
}
