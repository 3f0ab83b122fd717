//! Keeps a valid token: fetches ahead of expiry, publishes, and renews what a server rejected.
//!
//! In: the [`Sources`]. Out: a `watch` with the latest [`Token`]. The endpoint is asked when the
//! token is due; the other sources count only without an endpoint, or while it fails. A token that
//! is still valid is never given up for nothing.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ambient_shared::{
    clock::{self, Clock},
    exchange::{Exchange, ExchangeError},
    exit,
    retry::{Backoff, GaveUp, Policy, Retry, Retryable as _, retry},
    session::SessionId,
    token::{ASSUMED_LIFE, Token, refresh_in},
};
use metrics::{counter, gauge};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub(crate) use super::handle::TokenHandle;
use super::{ReadError, Source, Sources, read_session_key, read_token};
use crate::{agent::mask::Masker, metrics as names};

/// Retries of the endpoint. Ten thousand runners that lost their control plane come back at two
/// thousand a second at most.
const POLICY: Policy = Policy {
    initial: Duration::from_millis(200),
    max: Duration::from_secs(10),
    brief: Duration::from_secs(20),
    longest_asked: Duration::from_mins(5),
};

/// How long the endpoint is waited for before the other sources count as well.
const HEAD_START: Duration = Duration::from_secs(1);

/// How often the mounted file is read: the kubelet gives no sign.
const POLL: Duration = Duration::from_secs(1);

/// Least time between two fetches: a server that rejects every token must not make us flood
/// the endpoint.
const LEAST_GAP: Duration = Duration::from_secs(1);

/// Shortest wait before a retry, however near the expiry.
const LEAST_RETRY: Duration = Duration::from_millis(250);

/// Keeps the token fresh; owns the only sender.
pub(crate) struct Refresher {
    sources: Sources,
    session: Option<SessionId>,
    latest: watch::Sender<Option<Token>>,
    rejected: watch::Receiver<Option<Token>>,
    /// Where the current token came from, and when.
    origin: Mutex<Option<(Source, Instant)>>,
    /// The endpoint is failing, or slower than the token's life allows.
    behind: AtomicBool,
    masker: Masker,
    clock: Clock,
}

/// Why there is no first token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoToken {
    /// The endpoint gave none, and no other source had one.
    #[error("no token for this session")]
    Endpoint(#[source] Box<GaveUp<ExchangeError>>),
    /// Without an endpoint, the file is all there is.
    #[error("no token within {}", humantime::format_duration(*within))]
    File {
        /// The time that was given.
        within: Duration,
        /// What was wrong with the file.
        #[source]
        last: Unusable,
    },
}

/// Why a source beside the endpoint has no token to use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// There is none.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It has expired.
    #[error("the mounted token has expired; is the control plane running?")]
    Expired,
}

impl Refresher {
    /// Nothing is fetched yet.
    pub(crate) fn new(
        sources: Sources,
        session: Option<SessionId>,
        masker: Masker,
        clock: Clock,
    ) -> (Self, TokenHandle) {
        let (latest, receiver) = watch::channel(None);
        let (rejections, rejected) = watch::channel(None);
        let refresher = Self {
            sources,
            session,
            latest,
            rejected,
            origin: Mutex::default(),
            behind: AtomicBool::new(false),
            masker,
            clock,
        };
        (refresher, TokenHandle::new(receiver, rejections))
    }

    /// Gets the first token from the first source that answers: the endpoint has a head start of
    /// [`HEAD_START`], or until its first failure.
    ///
    /// # Errors
    /// When no source has a token `within` the given time, or the endpoint says for good that
    /// there is none and no other source has one.
    pub(crate) async fn first(&self, within: Duration) -> Result<(), NoToken> {
        self.mask_mounted().await;
        let Some(endpoint) = &self.sources.endpoint else {
            return match timeout(within, self.first_beside_endpoint()).await {
                Ok(()) => Ok(()),
                Err(_) => match self.beside_endpoint().await {
                    Ok((token, source)) => {
                        self.publish(token, source);
                        Ok(())
                    }
                    Err(last) => Err(NoToken::File { within, last }),
                },
            };
        };
        let failed = Notify::new();
        let pull = retry(
            POLICY,
            Some(within),
            || async { self.fetch(endpoint).await },
            |error, wait| {
                warn_of(error, wait);
                failed.notify_one();
            },
        );
        let push = async {
            let _ = timeout(HEAD_START, failed.notified()).await;
            self.first_beside_endpoint().await;
        };
        tokio::select! {
            biased;
            pulled = pull => match pulled {
                Ok(token) => {
                    self.publish(token, Source::Endpoint);
                    Ok(())
                }
                Err(gave_up) => match self.beside_endpoint().await {
                    Ok((token, source)) => {
                        warn!(error = %exit::report(&gave_up), "token endpoint gave up on");
                        self.behind.store(true, Ordering::Relaxed);
                        self.publish(token, source);
                        Ok(())
                    }
                    Err(_) => Err(NoToken::Endpoint(Box::new(gave_up))),
                },
            },
            () = push => {
                self.behind.store(true, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Keeps the token fresh until `shutdown`. After [`Refresher::first`].
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let push = self.follow_file();
        let work = async {
            match &self.sources.endpoint {
                Some(endpoint) => {
                    tokio::join!(self.pull(endpoint), push);
                }
                None => push.await,
            }
        };
        shutdown.run_until_cancelled(work).await;
    }

    /// Asks the endpoint whenever the token is due or was rejected. Never returns.
    async fn pull(&self, endpoint: &Exchange) {
        let mut rejected = self.rejected.clone();
        let mut backoff = Backoff::new(POLICY);
        let mut due = Instant::now();
        if !self.behind.load(Ordering::Relaxed) {
            due += self.refresh_in();
        }
        loop {
            tokio::select! {
                () = sleep_until(due) => {}
                // Gone only when all handles are, and then nobody asks.
                Ok(()) = rejected.changed() => if !self.is_rejected() { continue },
            }
            let started = Instant::now();
            let outcome = {
                let fetch = self.fetch(endpoint);
                tokio::pin!(fetch);
                tokio::select! {
                    outcome = &mut fetch => outcome,
                    () = sleep(HEAD_START.min(self.life_left() / 4)) => {
                        self.behind.store(true, Ordering::Relaxed);
                        fetch.await
                    }
                }
            };
            let wait = match outcome {
                Ok(token) if self.is_useful(&token) => {
                    self.publish(token, Source::Endpoint);
                    self.behind.store(false, Ordering::Relaxed);
                    backoff.reset();
                    self.refresh_in()
                }
                Ok(token) => {
                    debug!(token = %token.hash(), "token endpoint has no other token yet");
                    self.behind.store(true, Ordering::Relaxed);
                    let wait = self.retry_in(&mut backoff, Retry::Backoff);
                    // The server's own refresh is due when ours is: no reason to hurry.
                    if self.is_rejected() {
                        wait
                    } else {
                        wait.max(self.refresh_in())
                    }
                }
                Err(error) => {
                    self.behind.store(true, Ordering::Relaxed);
                    let wait = self.retry_in(&mut backoff, error.retry());
                    warn_of(&error, wait);
                    wait
                }
            };
            due = Instant::now() + wait;
            // Rejected again within the gap: that is seen after it.
            sleep_until(started + LEAST_GAP.min(self.life_left() / 4).max(LEAST_RETRY)).await;
        }
    }

    /// Looks at the mounted file: for a token whenever it counts, and always for what to mask.
    /// Never returns.
    async fn follow_file(&self) {
        let mut rejected = self.rejected.clone();
        loop {
            let poll = POLL.min(self.life_left() / 4).max(LEAST_RETRY);
            tokio::select! {
                () = sleep(poll) => {}
                Ok(()) = rejected.changed() => {}
            }
            let counts = self.sources.endpoint.is_none() || self.behind.load(Ordering::Relaxed);
            if !counts {
                self.mask_mounted().await;
            } else if let Ok((token, source)) = self.beside_endpoint().await {
                self.publish(token, source);
            }
        }
    }

    /// The agent can read the mounted file, so what is in it must not leave, even if nobody here
    /// uses it.
    async fn mask_mounted(&self) {
        if let Ok(token) = read_token(&self.sources.file).await {
            self.masker.add_token(&token);
        }
    }

    async fn first_beside_endpoint(&self) {
        loop {
            match self.beside_endpoint().await {
                Ok((token, source)) => {
                    self.publish(token, source);
                    return;
                }
                Err(error) => debug!(error = %exit::report(&error), "no mounted token yet"),
            }
            sleep(POLL).await;
        }
    }

    /// A token from the file or `BOT_TOKEN` that is better than the current one.
    async fn beside_endpoint(&self) -> Result<(Token, Source), Unusable> {
        let mounted = read_token(&self.sources.file).await;
        if let Ok(token) = &mounted {
            self.masker.add_token(token);
        }
        if let Ok(token) = &mounted
            && self.is_better(token, Source::File)
        {
            return Ok((token.clone(), Source::File));
        }
        if let Some(token) = &self.sources.fixed
            && self.is_better(token, Source::Fixed)
        {
            return Ok((token.clone(), Source::Fixed));
        }
        mounted?;
        Err(Unusable::Expired)
    }

    /// Whether a token beside the endpoint's should take the place of the current one.
    fn is_better(&self, token: &Token, source: Source) -> bool {
        let now = self.clock.now();
        if token.is_expired(now) || self.was_rejected(token) {
            return false;
        }
        let current = self.latest.borrow();
        let Some(current) = &*current else {
            return true;
        };
        if current.same_secret(token) {
            return false;
        }
        if current.is_expired(now) || self.was_rejected(current) {
            return true;
        }
        match source {
            // Last in order: only in place of one that is of no use.
            Source::Endpoint | Source::Fixed => false,
            // All there is: whatever was put there last.
            Source::File if self.sources.endpoint.is_none() => true,
            Source::File => match (token.expires_at(), current.expires_at()) {
                (Some(theirs), Some(ours)) => theirs > ours,
                // Nobody said: the file's newest, unless the endpoint's is still young.
                (_, None) => self.origin().is_none_or(|(source, since)| {
                    source != Source::Endpoint || since.elapsed() >= ASSUMED_LIFE
                }),
                (None, Some(_)) => false,
            },
        }
    }

    fn origin(&self) -> Option<(Source, Instant)> {
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a token from the endpoint brings us further.
    fn is_useful(&self, token: &Token) -> bool {
        if self.was_rejected(token) {
            return false;
        }
        match &*self.latest.borrow() {
            None => true,
            Some(current) if current.same_secret(token) => {
                // The same token, but now we know when it expires.
                token.expires_at() > current.expires_at()
            }
            // What looks expired on arrival may be the fault of our clock, so it is better than
            // nothing; but not than a token that is valid by the same clock.
            Some(current) => {
                let now = self.clock.now();
                !token.is_expired(now) || current.is_expired(now)
            }
        }
    }

    fn was_rejected(&self, token: &Token) -> bool {
        let rejected = self.rejected.borrow();
        rejected.as_ref().is_some_and(|it| it.same_secret(token))
    }

    /// Whether somebody waits for another token than the current one.
    fn is_rejected(&self) -> bool {
        let current = self.latest.borrow();
        current.as_ref().is_some_and(|it| self.was_rejected(it))
    }

    fn life_left(&self) -> Duration {
        let now = self.clock.now();
        let current = self.latest.borrow();
        current
            .as_ref()
            .and_then(|token| token.life_left(now))
            .unwrap_or(Duration::MAX)
    }

    fn refresh_in(&self) -> Duration {
        let current = self.latest.borrow();
        current.as_ref().map_or(LEAST_RETRY, |token| {
            refresh_in(token, self.clock.now(), rand::random())
        })
    }

    /// The wait after a failure: shorter as the expiry comes near, unless the server asked for
    /// time. There is always a next try: a session that runs is never given up.
    fn retry_in(&self, backoff: &mut Backoff, after: Retry) -> Duration {
        let wait = backoff.after(after).unwrap_or(POLICY.max);
        let left = self.life_left();
        if matches!(after, Retry::After(_)) || left.is_zero() {
            return wait.max(LEAST_RETRY);
        }
        wait.min(left / 4).max(LEAST_RETRY)
    }

    async fn fetch(&self, endpoint: &Exchange) -> Result<Token, ExchangeError> {
        self.renew_key(endpoint).await;
        let fetched = endpoint.fetch().await;
        let result = match &fetched {
            Ok(_) => "ok",
            Err(error) => match error {
                ExchangeError::Connect { .. } => "unreachable",
                ExchangeError::Busy { .. } => "busy",
                ExchangeError::Refused { .. } => "refused",
                ExchangeError::Server { .. } => "failed",
                ExchangeError::NotAnEndpoint { .. } => "not_an_endpoint",
                ExchangeError::Malformed { .. } => "malformed",
            },
        };
        let source = Source::Endpoint.as_str();
        counter!(names::TOKEN_FETCHES, "source" => source, "result" => result).increment(1);
        fetched
    }

    /// Proves with the key that is mounted now: the control plane replaces it when its root changes.
    /// One that cannot be read now leaves the one before.
    async fn renew_key(&self, endpoint: &Exchange) {
        match read_session_key(&self.sources.key_file).await {
            Ok(Some(key)) => {
                self.masker.add_secret(key.expose());
                endpoint.use_key(key);
            }
            Ok(None) => {}
            Err(error) => {
                debug!(reason = %exit::report(&error), "cannot read the session key again");
            }
        }
    }

    fn publish(&self, token: Token, source: Source) {
        let now = self.clock.now();
        // Before anybody can use it: what is used can be printed.
        self.masker.add_token(&token);
        let expiry = token.expires_at().map_or(0, clock::unix_seconds);
        #[expect(
            clippy::cast_precision_loss,
            reason = "exact until the year 285 million"
        )]
        {
            gauge!(names::TOKEN_EXPIRY).set(expiry as f64);
            gauge!(names::TOKEN_REFRESH).set(clock::unix_seconds(now) as f64);
        }
        if source != Source::Endpoint {
            let source = source.as_str();
            counter!(names::TOKEN_FETCHES, "source" => source, "result" => "ok").increment(1);
        }
        if token.is_expired(now) {
            warn!(token = %token.hash(), "token has expired by our clock; is the clock right?");
        }
        info!(
            session = self.session.as_ref().map(|id| id.hash().to_string()),
            source = source.as_str(),
            token = %token.hash(),
            life_s = token.life_left(now).map(|left| left.as_secs()),
            "token refreshed"
        );
        let origin = Some((source, Instant::now()));
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) = origin;
        self.latest.send_replace(Some(token));
    }
}

fn warn_of(error: &ExchangeError, wait: Duration) {
    let retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    warn!(error = %exit::report(error), retry_in_ms, "token fetch failed");
}

#[cfg(test)]
mod tests;
