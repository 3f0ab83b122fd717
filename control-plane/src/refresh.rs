//! The refresh ticker: keeps the tokens in running sessions' Secrets fresh (push).
//!
//! In: all pages of running sessions, the cache, and what the backend sees run. Out: one write for
//! each Secret that is due. Each source may miss a session (pages shift, a watch is behind, the API
//! server is away); a session that any of them has is not missed. A write that fails is tried again
//! on its own; the next tick does not wait for it.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use ambient_shared::{
    clock::{Clock, unix_seconds},
    exit,
    phase::Phase,
    retry::Policy,
    session::SessionId,
};
use metrics::{counter, gauge, histogram};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span, debug, debug_span, field::Empty, info_span, warn};

use crate::{
    backend::{Backend, BackendError, Credentials},
    issuer::{IssueError, Issuer, Subject},
    keypair::Keyring,
    metrics::{
        EARLIEST_EXPIRY, LAST_REFRESH, LIFE_USED, OLDEST_ISSUE, REFRESH_DUE, REFRESH_INTERVAL,
        REFRESH_LAG, REFRESHES,
    },
    queue::WorkQueue,
    reconcile::due::Due,
    sessions::{
        SessionCache,
        list::{Lister, Query},
    },
};

mod rule;
mod tick;

pub use rule::Interval;
pub(crate) use rule::Rule;
use tick::Settled;
pub(crate) use tick::Tick;

/// Longest wait for all pages; the tick goes on with what it has.
const LIST_LIMIT: Duration = Duration::from_mins(1);

/// The ticker looks at the clock this often: the machine may have slept, and the tokens' life may
/// have become known.
const GLANCE: Duration = Duration::from_secs(1);

/// How often the times of all tokens are shown: what a tick has found due is replaced soon, and
/// what it showed then is old.
const SHOW_EVERY: Duration = Duration::from_secs(5);

/// Settings of the refresh.
#[derive(Debug, Clone, Copy)]
pub struct RefreshSettings {
    /// How often.
    pub interval: Interval,
    /// How many Secrets are written at once.
    pub concurrency: usize,
}

impl Default for RefreshSettings {
    fn default() -> Self {
        Self {
            interval: Interval::Auto,
            concurrency: 16,
        }
    }
}

/// Why a token was not written. All of these are tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RefreshError {
    /// There is none to write.
    #[error("cannot get a token for the session")]
    Issue(#[from] IssueError),
    /// The issuer has only what the session has already.
    #[error("the issuer has no token that lives longer than the session's")]
    NoFresher,
    /// It cannot be written.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Looks for due tokens, and replaces them.
pub(crate) struct Refresh {
    pub(crate) cache: SessionCache,
    pub(crate) lister: Lister,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) issuer: Arc<dyn Issuer>,
    pub(crate) keys: Keyring,
    pub(crate) due: Arc<Due>,
    pub(crate) tokens: WorkQueue<(), SessionId>,
    pub(crate) interval: Interval,
    pub(crate) clock: Clock,
    pub(crate) started_at: SystemTime,
    pub(crate) tick: Mutex<Tick>,
}

impl Refresh {
    /// Ticks until `shutdown`, the first time at once.
    ///
    /// Cancel-safe: what is due is in the queue or found again by the next tick.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let ticking = async {
            // Of who has never come to the end of a tick it shows for how long.
            self.show_tick();
            let mut is_warned = false;
            loop {
                if !is_warned && self.rule().is_too_short() {
                    is_warned = true;
                    let (life, lag) = (self.issuer.life().unwrap_or_default(), self.backend.lag());
                    warn!(
                        life_s = life.as_secs(),
                        lag_s = lag.as_secs(),
                        "tokens live too short for push alone; sessions must fetch theirs"
                    );
                }
                let (started, started_at) = (Instant::now(), self.clock.now());
                let span = info_span!("refresh");
                self.look().instrument(span).await;
                let mut shown = Instant::now();
                // The wall clock counts too: the machine may have slept.
                while let Some(interval) = self.interval.between_ticks(self.issuer.life()) {
                    let by_wall = self.clock.now().duration_since(started_at);
                    let passed = started.elapsed().max(by_wall.unwrap_or_default());
                    let Some(left) = interval.checked_sub(passed).filter(|it| !it.is_zero()) else {
                        break;
                    };
                    sleep(left.min(GLANCE)).await;
                    if shown.elapsed() >= SHOW_EVERY {
                        self.show_tokens();
                        shown = Instant::now();
                    }
                }
            }
        };
        shutdown.run_until_cancelled(ticking).await;
    }

    /// The rule at this moment.
    pub(crate) fn rule(&self) -> Rule {
        let lag = self.backend.lag();
        Rule::new(self.interval, self.issuer.life(), lag, self.started_at)
    }

    /// One tick: marks each due token.
    async fn look(&self) {
        self.begin();
        let mut seen = HashSet::new();
        let known = self.cache.sessions().into_iter();
        let known = known.filter(|session| session.phase.is_active());
        let known = known.map(|session| session.id.clone());
        // What runs here needs its token whether or not the API server can say so.
        let here = self.backend.sessions();
        for id in known.chain(here) {
            self.consider(&id, &mut seen);
        }
        // What both have missed: all pages of running sessions.
        let running = Query {
            phase: Some(Phase::Running),
        };
        let interval = self.interval.between_ticks(self.issuer.life());
        let limit = interval.unwrap_or(LIST_LIMIT).min(LIST_LIMIT);
        let list = self.lister.all(&running, limit, |objects| {
            for object in objects {
                let id = object.metadata.and_then(|it| SessionId::parse(it.id).ok());
                let Some(id) = id else { continue };
                self.consider(&id, &mut seen);
                if !self.cache.knows(&id) {
                    self.due.doubt(&id);
                }
            }
        });
        match timeout(limit, list).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                warn!(reason = %exit::report(&error), "refresh goes on without a list");
            }
            Err(_) => warn!("refresh goes on without a list: no answer in time"),
        }
        self.complete();
    }

    /// Marks a session's token if it runs and its token is due.
    fn consider(&self, id: &SessionId, seen: &mut HashSet<SessionId>) {
        if !seen.insert(id.clone()) || self.subject(id).is_none() {
            return;
        }
        let times = self.backend.token_times(id);
        let root = self.keys.current().root_id();
        let due = self.rule().is_due(times, root, self.clock.now());
        self.tick().found(id, due);
        if due {
            self.tokens.mark((), id);
        }
    }

    /// For whom a session's token is; none when it needs none any more.
    fn subject(&self, id: &SessionId) -> Option<Subject> {
        let run = self.backend.run_state(id)?;
        if !run.is_live() || self.cache.is_deleted(id) {
            return None;
        }
        // A session that the cache does not know is vouched for by its run.
        if let Some(session) = self.cache.get(id) {
            // What has ended for the API server, or was started again, is about to be stopped.
            if !session.phase.is_active() || session.generation != run.generation {
                return None;
            }
        }
        Some(Subject {
            session: id.clone(),
            generation: run.generation,
        })
    }

    /// Replaces one session's token, if that is (still) needed.
    ///
    /// # Errors
    /// When it is to be tried again.
    pub(crate) async fn replace(&self, id: &SessionId) -> Result<(), RefreshError> {
        let span = debug_span!(
            "replace token",
            session = %id.hash(),
            result = Empty,
            otel.status_code = Empty
        );
        let mut counted = Counted {
            refresh: self,
            id,
            span: span.clone(),
            settled: None,
        };
        counted.settled = Some(self.try_replace(id).instrument(span).await?);
        Ok(())
    }

    async fn try_replace(&self, id: &SessionId) -> Result<Settled, RefreshError> {
        let Some(subject) = self.subject(id) else {
            return Ok(Settled::Skipped);
        };
        let rule = self.rule();
        let before = self.backend.token_times(id);
        let root = self.keys.current().root_id();
        if !rule.is_due(before, root, self.clock.now()) {
            return Ok(Settled::Skipped);
        }
        let token = self.issuer.issue(&subject, rule.min_life()).await?;
        let before = before.filter(|times| rule::is_told_by(*times, self.clock.now()));
        let had = before.and_then(|times| times.expires_at);
        // Where only the session's key is old, the same token again is good.
        if rule.is_token_due(before, self.clock.now())
            && had.is_some_and(|had| token.expires_at().is_some_and(|has| has <= had))
        {
            return Err(RefreshError::NoFresher);
        }
        // Issuing may take long.
        if self.subject(id).as_ref() != Some(&subject) {
            return Ok(Settled::Skipped);
        }
        let hash = token.hash();
        let keys = self.keys.current();
        let credentials = Credentials {
            token,
            session_key: keys.session_key(id),
            root: keys.root_id(),
            generation: subject.generation,
        };
        let written = self.backend.write_token(id, &credentials).await;
        if self.cache.is_deleted(id) {
            // Deleted meanwhile: what was written must not be left behind.
            self.due
                .queue
                .mark(crate::reconcile::due::Handler::CleanUp, id);
        }
        match written {
            Ok(()) => {
                // One line for each would be many: the tick's summary counts them.
                debug!(session = %id.hash(), token = %hash, "token replaced");
                Ok(Settled::Written)
            }
            Err(_) if self.subject(id).is_none() => Ok(Settled::Skipped),
            Err(error) => Err(error.into()),
        }
    }

    fn begin(&self) {
        let interval = self.interval.between_ticks(self.issuer.life());
        let interval = interval.unwrap_or_default();
        // A token that failed is tried several times before the next tick.
        self.tokens.set_policy(Policy {
            initial: (interval / 40).max(Duration::from_millis(20)),
            max: (interval / 4).min(Duration::from_secs(30)),
            ..Policy::default()
        });
        gauge!(REFRESH_INTERVAL).set(interval.as_secs_f64());
        self.tick().begin();
    }

    fn complete(&self) {
        let due = self.tick().complete();
        self.show_tick();
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        gauge!(REFRESH_DUE).set(due as f64);
        self.show_tokens();
    }

    #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
    fn show_tick(&self) {
        gauge!(LAST_REFRESH).set(self.clock.unix_seconds() as f64);
    }

    /// Shows the times of what running sessions hold.
    fn show_tokens(&self) {
        let running = self.backend.sessions().into_iter();
        let running = running.filter(|id| self.subject(id).is_some());
        let times: Vec<_> = running
            .filter_map(|id| self.backend.token_times(&id))
            .collect();
        let earliest = times.iter().filter_map(|it| it.expires_at).min();
        // One that never expires is good however old.
        let expiring = times.iter().filter(|it| it.expires_at.is_some());
        let oldest = expiring.map(|it| it.issued_at).min();
        // Never, where there is none: an old moment would look like a token that is late.
        #[expect(clippy::cast_precision_loss, reason = "a moment in seconds")]
        let moment =
            |at: Option<SystemTime>| at.map_or(f64::INFINITY, |at| unix_seconds(at) as f64);
        gauge!(EARLIEST_EXPIRY).set(moment(earliest));
        gauge!(OLDEST_ISSUE).set(moment(oldest));
        let now = self.clock.now();
        let used = times.iter().filter_map(|it| it.life_used(now));
        gauge!(LIFE_USED).set(used.fold(0.0, f64::max));
    }

    fn tick(&self) -> MutexGuard<'_, Tick> {
        self.tick.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a try to replace a token when it ends, in whatever way: also by being dropped at its
/// limit, or by a panic.
struct Counted<'a> {
    refresh: &'a Refresh,
    id: &'a SessionId,
    span: Span,
    settled: Option<Settled>,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let result = match self.settled {
            Some(Settled::Written) => "written",
            Some(Settled::Skipped) => "skipped",
            None => "failed",
        };
        self.span.record("result", result);
        if self.settled.is_none() {
            self.span.record("otel.status_code", "ERROR");
        }
        counter!(REFRESHES, "result" => result).increment(1);
        if let Some(lag) = self.refresh.tick().settle(self.id, self.settled) {
            histogram!(REFRESH_LAG).record(lag);
        }
    }
}
