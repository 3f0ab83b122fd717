//! Fetches the token where none is mounted, as the runner does.
//!
//! In: an [`Exchange`]. Out: a [`Feed`]. A token is renewed ahead of its expiry; failures are
//! tried again for ever, as the sidecar has nothing better to do, and the last token is kept.

use std::{path::PathBuf, time::Duration};

use ambient_shared::{
    clock::Clock,
    exchange::{Exchange, ExchangeError},
    exit,
    proof::SessionKey,
    retry::{self, GaveUp, Policy, Retryable as _},
    session::SessionHash,
    token::{Token, refresh_in},
};
use metrics::counter;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use crate::{metrics as names, tokens::Feed};

/// Shortest time between two fetches that the API server's refusals ask for: a token that it
/// refuses for good must not become a storm.
const BETWEEN_WISHES: Duration = Duration::from_secs(5);

/// Pause after an answer that no retry mends, such as a URL that is no token endpoint: somebody
/// may mend it on the other side.
const AFTER_FINAL: Duration = Duration::from_secs(30);

/// Keeps the token fresh; owns the only feed.
pub(crate) struct Fetcher {
    exchange: Exchange,
    key_file: PathBuf,
    feed: Feed,
    clock: Clock,
    session: SessionHash,
}

impl Fetcher {
    /// Fetches the token of the session with this hash, whose key is in this file.
    pub(crate) fn new(
        exchange: Exchange,
        key_file: PathBuf,
        feed: Feed,
        clock: Clock,
        session: SessionHash,
    ) -> Self {
        Self {
            exchange,
            key_file,
            feed,
            clock,
            session,
        }
    }

    /// Runs until `stop`.
    ///
    /// Cancel-safe: a fetch holds no state.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        stop.run_until_cancelled(self.keep_fresh()).await;
    }

    async fn keep_fresh(&mut self) {
        loop {
            let pause = match self.fetch().await {
                Ok(token) => {
                    let pause = refresh_in(&token, self.clock.now(), rand::random());
                    self.feed.publish(token, "endpoint");
                    pause
                }
                Err(failure) => {
                    let reason = exit::report(&failure);
                    error!(session = %self.session, %reason, "no token; trying again later");
                    AFTER_FINAL
                }
            };
            self.wait(pause).await;
        }
    }

    async fn fetch(&self) -> Result<Token, GaveUp<ExchangeError>> {
        retry::retry(
            Policy::default(),
            None,
            || self.fetch_once(),
            |failure, wait| {
                warn!(
                    session = %self.session,
                    reason = %exit::report(failure),
                    again_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                    "token was not fetched"
                );
            },
        )
        .await
    }

    async fn fetch_once(&self) -> Result<Token, ExchangeError> {
        // The control plane replaces it when its root changes; what cannot be read now leaves the
        // one before.
        if let Ok(text) = tokio::fs::read_to_string(&self.key_file).await
            && let Some(key) = SessionKey::from_text(&text)
        {
            self.exchange.use_key(key);
        }
        let fetched = self.exchange.fetch().await;
        let result = match &fetched {
            Ok(_) => "ok",
            Err(failure) => match failure.retry() {
                retry::Retry::Never => "final",
                retry::Retry::Briefly => "refused",
                retry::Retry::Backoff | retry::Retry::After(_) => "failed",
            },
        };
        counter!(names::TOKEN_FETCHES, "result" => result).increment(1);
        fetched
    }

    /// Waits for the next renewal; meanwhile fetches for those who doubt the token.
    async fn wait(&mut self, pause: Duration) {
        let mut due = Instant::now() + pause;
        let mut next_wish = Instant::now() + BETWEEN_WISHES;
        loop {
            let wishes = tokio::select! {
                () = sleep_until(due) => return,
                wishes = self.feed.wishes() => wishes,
            };
            if Instant::now() >= next_wish {
                match self.fetch_once().await {
                    Ok(token) => {
                        let again = refresh_in(&token, self.clock.now(), rand::random());
                        due = Instant::now() + again;
                        self.feed.publish(token, "endpoint");
                    }
                    Err(failure) => {
                        let reason = exit::report(&failure);
                        warn!(session = %self.session, %reason, "token was not fetched");
                    }
                }
                next_wish = Instant::now() + BETWEEN_WISHES;
            }
            for wish in wishes {
                // Who asked may have gone.
                let _ = wish.send(());
            }
        }
    }
}
