//! The `oidc` issuer: the control plane's own token, from an identity provider.
//!
//! In: client credentials. Out: the newest token, to whoever asks, and to the control plane's own
//! calls ([`OidcIssuer::subscribe`]). One task asks the provider, one request at a time, and renews
//! at about half of the token's life; askers only read what it has, or wait for its next answer. So
//! a hundred of them make one request, and one that goes away cuts off nobody's. While the provider
//! is down or hangs the last token is handed out until it expires.

use std::time::{Duration, SystemTime};

use ambient_shared::{
    client::{ClientError, http_client_to, trust_roots},
    clock::{self, CLOCKS_AGREE, Clock},
    exit,
    resolve::Resolver,
    retry::{Backoff, Policy, Retry},
    token::{ASSUMED_LIFE, Token},
};
use futures_util::future::BoxFuture;
use metrics::{counter, gauge, histogram};
use secrecy::SecretString;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug_span, field::Empty, info, warn};
use url::Url;

use self::provider::{Failure, Provider};
use super::{IssueError, Issuer, Subject};
use crate::metrics::{OIDC_EXPIRY, OIDC_LAST_SUCCESS, OIDC_REQUESTS, OIDC_SECONDS, TOKENS_ISSUED};

mod provider;

/// Longest wait for the provider's answer, both ways of signing in together.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait of one asker: shorter than the 10 s that clients of the token endpoint wait
/// (contract section 1), so that they are told what is wrong.
const ISSUE_LIMIT: Duration = Duration::from_secs(8);

/// Longest wait of one asker for a token with more life than that of the one at hand.
const BETTER_LIMIT: Duration = Duration::from_secs(1);

/// Shortest wait between two renewals.
const MIN_PAUSE: Duration = Duration::from_secs(1);

/// Waits after failures. The cap is short: one client asks, and all sessions wait for it.
const POLICY: Policy = Policy {
    initial: Duration::from_millis(250),
    max: Duration::from_secs(10),
    brief: Duration::MAX,
    longest_asked: Duration::from_secs(60),
};

/// Keeps one token of an identity provider fresh; [`OidcIssuer::run`] must run.
#[derive(Debug)]
pub struct OidcIssuer {
    provider: Provider,
    clock: Clock,
    state: watch::Sender<State>,
    token: watch::Sender<Option<Token>>,
}

/// What is known of the provider.
#[derive(Debug, Clone, Default)]
struct State {
    held: Option<Held>,
    /// Why the last request failed; none when it did not.
    failure: Option<Failure>,
    /// Requests that have ended.
    ended: u64,
    /// Whether a request is under way.
    asking: bool,
    /// The number of requests that must have ended before everybody who waits is content.
    wanted: u64,
}

/// A token, and how it came.
#[derive(Debug, Clone)]
struct Held {
    token: Token,
    /// From its issue to its expiry.
    life: Option<Duration>,
    /// Of that, what was left when it came.
    left: Option<Duration>,
    since: Instant,
}

impl Held {
    /// The token, unless it has expired. When our clock was set back meanwhile, its expiry is told
    /// anew by that.
    fn valid(&self, now: SystemTime) -> Option<Token> {
        if self.token.is_expired(now) {
            return None;
        }
        let (Some(left), Some(by_clock)) = (self.left, self.token.life_left(now)) else {
            return Some(self.token.clone());
        };
        let left = left.saturating_sub(self.since.elapsed());
        if by_clock < left + CLOCKS_AGREE {
            return Some(self.token.clone());
        }
        let expires_at = now.checked_add(left).filter(|_| !left.is_zero())?;
        // It was a token before.
        Token::new(self.token.expose(), Some(expires_at)).ok()
    }
}

/// What an asker does.
enum Choice {
    Take(Token),
    Fail(Failure),
    /// Wait until so many requests have ended, but not longer than this.
    Wait(u64, Duration),
}

impl OidcIssuer {
    /// As [`OidcIssuer::new`], with a client of its own.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn connect(
        token_url: &Url,
        client_id: &str,
        secret: &SecretString,
        clock: &Clock,
    ) -> Result<Self, ClientError> {
        let (resolver, roots) = (Resolver::system(), trust_roots(None)?);
        Ok(Self::new(
            http_client_to(token_url, &resolver, roots, REQUEST_LIMIT)?,
            token_url.clone(),
            client_id.to_owned(),
            secret.clone(),
            clock.clone(),
        ))
    }

    /// Asks `token_url` by client credentials (RFC 6749, section 4.4).
    pub fn new(
        client: reqwest::Client,
        token_url: Url,
        client_id: String,
        secret: SecretString,
        clock: Clock,
    ) -> Self {
        Self {
            provider: Provider::new(client, token_url, client_id, secret),
            clock,
            state: watch::Sender::new(State::default()),
            token: watch::Sender::new(None),
        }
    }

    /// The newest token, for the control plane's own calls; none before the first.
    pub fn subscribe(&self) -> watch::Receiver<Option<Token>> {
        self.token.subscribe()
    }

    /// Asks the provider until `shutdown`: at once, at about half of each token's life, when an
    /// asker needs more life than is left, and after a failure with backoff.
    ///
    /// Cancel-safe: what was received is published before the next wait.
    pub async fn run(&self, shutdown: CancellationToken) {
        // Long ago, so that one that never answers shows.
        gauge!(OIDC_EXPIRY).set(0.0);
        let mut backoff = Backoff::new(POLICY);
        let mut state = self.state.subscribe();
        loop {
            self.state.send_modify(|state| state.asking = true);
            let asked_at = self.clock.now();
            let Some(answer) = shutdown.run_until_cancelled(self.ask(asked_at)).await else {
                return;
            };
            let failed = answer.is_err();
            let pause = self.settle(answer, asked_at, &mut backoff);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep(pause) => {}
                // After a failure nobody can hurry us: the provider has enough to do.
                _ = state.wait_for(|state| state.wanted > state.ended), if !failed => {}
            }
        }
    }

    /// One request, timed.
    async fn ask(&self, asked_at: SystemTime) -> Result<Token, Failure> {
        let span = debug_span!(
            "identity provider",
            otel.kind = "client",
            result = Empty,
            otel.status_code = Empty
        );
        let began = Instant::now();
        let answer = timeout(REQUEST_LIMIT, self.provider.ask(asked_at));
        let answer = answer.instrument(span.clone()).await;
        let answer = answer.unwrap_or_else(|_| Err(Failure::slow(REQUEST_LIMIT)));
        let result = answer.as_ref().map_or_else(Failure::label, |_| "ok");
        histogram!(OIDC_SECONDS, "result" => result).record(began.elapsed());
        span.record("result", result);
        if answer.is_err() {
            span.record("otel.status_code", "ERROR");
        }
        answer
    }

    /// Publishes an answer; gives the wait before the next request.
    fn settle(
        &self,
        answer: Result<Token, Failure>,
        asked_at: SystemTime,
        backoff: &mut Backoff,
    ) -> Duration {
        let result = answer.as_ref().map_or_else(Failure::label, |_| "ok");
        counter!(OIDC_REQUESTS, "result" => result).increment(1);
        match answer {
            Ok(token) => {
                backoff.reset();
                let left = token.life_left(asked_at);
                counter!(TOKENS_ISSUED, "issuer" => "oidc").increment(1);
                gauge!(OIDC_LAST_SUCCESS).set(unix(asked_at));
                gauge!(OIDC_EXPIRY).set(token.expires_at().map_or(f64::INFINITY, unix));
                info!(
                    token = %token.hash(),
                    life_s = left.map(|left| left.as_secs()),
                    "identity provider gave a token"
                );
                self.token.send_replace(Some(token.clone()));
                self.state.send_modify(|state| {
                    state.held = Some(Held {
                        life: whole_life(&token, asked_at),
                        left,
                        token,
                        since: Instant::now(),
                    });
                    state.failure = None;
                    state.end_request();
                });
                let part = 0.5 - 0.1 * rand::random::<f64>();
                left.unwrap_or(ASSUMED_LIFE).mul_f64(part).max(MIN_PAUSE)
            }
            Err(failure) => {
                let asked_for = failure.retry_after().map_or(Retry::Backoff, Retry::After);
                let pause = backoff.after(asked_for).unwrap_or(POLICY.max);
                let error = self.error(failure.clone());
                warn!(
                    error = %exit::report(&error),
                    retry_in_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                    "identity provider gave no token"
                );
                self.state.send_modify(|state| {
                    state.failure = Some(failure);
                    state.end_request();
                });
                pause
            }
        }
    }

    async fn token_with(&self, min_life: Duration) -> Result<Token, IssueError> {
        let mut state = self.state.subscribe();
        let choice = state.borrow().choose(min_life, self.clock.now());
        let failure = match choice {
            Choice::Take(token) => return Ok(token),
            Choice::Fail(failure) => Some(failure),
            Choice::Wait(wanted, longest) => {
                self.state.send_if_modified(|state| state.want(wanted));
                let answered = state.wait_for(|state| state.ended >= wanted);
                match timeout(longest, answered).await {
                    Ok(Ok(state)) => state.failure.clone(),
                    // The sender lives in self: only the time can have run out.
                    Ok(Err(_)) | Err(_) => None,
                }
            }
        };
        // The best there is, even with less life than asked for.
        let now = self.clock.now();
        let token = self.state.borrow().valid(now).map(|(_, token)| token);
        token.ok_or_else(|| self.error(failure.unwrap_or_else(|| Failure::slow(ISSUE_LIMIT))))
    }

    fn error(&self, failure: Failure) -> IssueError {
        let url = self.provider.url().clone();
        match failure {
            Failure::Unreachable { reason, .. } => IssueError::Unreachable {
                url,
                source: reason.into(),
            },
            Failure::Refused(reason) => IssueError::Refused { url, reason },
            Failure::Malformed(reason) => IssueError::Malformed { url, reason },
        }
    }
}

impl State {
    fn choose(&self, min_life: Duration, now: SystemTime) -> Choice {
        let next = self.ended + 1;
        if let Some((held, token)) = self.valid(now) {
            let enough = token.life_left(now).is_none_or(|left| left >= min_life);
            // As much as the provider can give: it may hand out the same token for a while.
            let young = held.since.elapsed() < (held.life.unwrap_or_default() / 10).max(MIN_PAUSE);
            // One that is down, or hangs, may be so for long.
            if enough || young || self.failure.is_some() {
                return Choice::Take(token);
            }
            return Choice::Wait(next, BETTER_LIMIT);
        }
        match &self.failure {
            Some(failure) if !self.asking => Choice::Fail(failure.clone()),
            _ => Choice::Wait(next, ISSUE_LIMIT),
        }
    }

    fn valid(&self, now: SystemTime) -> Option<(&Held, Token)> {
        let held = self.held.as_ref()?;
        Some((held, held.valid(now)?))
    }

    /// Says whether that is news.
    fn want(&mut self, wanted: u64) -> bool {
        let news = wanted > self.wanted;
        self.wanted = self.wanted.max(wanted);
        news
    }

    fn end_request(&mut self) {
        self.ended += 1;
        self.asking = false;
    }
}

impl Issuer for OidcIssuer {
    fn issue<'a>(
        &'a self,
        _subject: &'a Subject,
        min_life: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>> {
        let span = debug_span!("issue token", issuer = "oidc");
        Box::pin(self.token_with(min_life).instrument(span))
    }

    fn life(&self) -> Option<Duration> {
        self.state.borrow().held.as_ref()?.life
    }
}

/// By the JWT's own times where it has them: a provider may hand out a token that is not new.
/// Both are of the provider's clock, so that it does not matter whether ours agrees.
fn whole_life(token: &Token, asked_at: SystemTime) -> Option<Duration> {
    let own = Token::new(token.expose(), None).ok()?;
    match (own.issued_at(), own.expires_at()) {
        (Some(issued_at), Some(expires_at)) => expires_at.duration_since(issued_at).ok(),
        _ => token.life_left(asked_at),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are f64; exact until the year 285 million"
)]
fn unix(time: SystemTime) -> f64 {
    clock::unix_seconds(time) as f64
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_token_lives_no_longer_as_the_clock_is_set_back() {
        let life = Duration::from_secs(60);
        let came = SystemTime::UNIX_EPOCH + 2 * HOUR;
        let held = Held {
            token: Token::new("opaque", Some(came + life)).unwrap(),
            life: Some(life),
            left: Some(life),
            since: Instant::now(),
        };
        let left_at = |now| held.valid(now)?.life_left(now);
        advance(life / 2).await;
        assert_eq!(left_at(came + life / 2), Some(life / 2));
        assert_eq!(left_at(came + life / 2 - HOUR), Some(life / 2));
        // The machine slept, or the clock was set forward.
        assert_eq!(left_at(came + HOUR), None);
        advance(life / 2).await;
        assert_eq!(left_at(came + life), None);
        assert_eq!(left_at(came + life - HOUR), None);
    }
}
