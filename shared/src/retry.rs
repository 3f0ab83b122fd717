//! When to try again: one policy for every client.
//!
//! The only file that names the `backoff` crate, which is no longer maintained: what replaces it
//! changes this file alone.

use std::{future::Future, time::Duration};

use backoff::{ExponentialBackoff, ExponentialBackoffBuilder, backoff::Backoff as _};
use tokio::time::{Instant, sleep};

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Try again, each time after a longer wait.
    Backoff,
    /// Try again after the wait that the server asked for, but not before backoff allows.
    After(Duration),
    /// Try again, but give up after [`Policy::brief`]: the other side may just have restarted.
    Briefly,
    /// Trying again cannot help.
    Never,
}

/// An error that knows whether trying again can help.
pub trait Retryable {
    /// What a retry loop does next.
    fn retry(&self) -> Retry;
}

/// How long to wait, and when to give up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Upper bound of the first wait.
    pub initial: Duration,
    /// Upper bound that waits grow to, doubling each time.
    pub max: Duration,
    /// How long failures of kind [`Retry::Briefly`] in a row are borne.
    pub brief: Duration,
    /// Longest wait that a server may ask for; more counts as this much.
    pub longest_asked: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(200),
            max: Duration::from_secs(30),
            brief: Duration::from_secs(20),
            longest_asked: Duration::from_mins(5),
        }
    }
}

/// The waits of one row of failures: exponential with full jitter, each a random part of a bound
/// that doubles up to [`Policy::max`].
#[derive(Debug)]
pub struct Backoff {
    policy: Policy,
    bounds: ExponentialBackoff,
    brief_since: Option<Instant>,
}

impl Backoff {
    /// Starts with the shortest wait.
    pub fn new(policy: Policy) -> Self {
        let bounds = ExponentialBackoffBuilder::new()
            .with_initial_interval(policy.initial)
            .with_max_interval(policy.max)
            .with_multiplier(2.0)
            .with_randomization_factor(0.0)
            .with_max_elapsed_time(None)
            .build();
        Self {
            policy,
            bounds,
            brief_since: None,
        }
    }

    /// After a success: the next failure starts with the shortest wait again.
    pub fn reset(&mut self) {
        self.bounds.reset();
        self.brief_since = None;
    }

    /// The next wait of plain exponential backoff.
    pub fn next_wait(&mut self) -> Duration {
        let bound = self.bounds.next_backoff().unwrap_or(self.policy.max);
        bound.mul_f64(rand::random::<f64>())
    }

    /// The wait before the next try; none when there is to be no next try.
    pub fn after(&mut self, retry: Retry) -> Option<Duration> {
        if retry != Retry::Briefly {
            self.brief_since = None;
        }
        match retry {
            Retry::Never => None,
            Retry::Backoff => Some(self.next_wait()),
            Retry::After(asked) => {
                // A part of the backoff on top: not everybody comes back in the same moment.
                Some(asked.min(self.policy.longest_asked) + self.next_wait())
            }
            Retry::Briefly => {
                let since = *self.brief_since.get_or_insert_with(Instant::now);
                (since.elapsed() < self.policy.brief).then(|| self.next_wait())
            }
        }
    }
}

/// Why a retried operation ended without success.
#[derive(Debug, thiserror::Error)]
pub enum GaveUp<E: std::error::Error + 'static> {
    /// The last error was one that no retry mends.
    #[error("trying again cannot help")]
    Final(#[source] E),
    /// The deadline passed; with the last error, when a try had ended by then.
    #[error("no success within {}", humantime::format_duration(*within))]
    Deadline {
        /// The time that was given.
        within: Duration,
        /// The last failure.
        #[source]
        last: Option<E>,
    },
}

/// Runs `operation` until it succeeds, `deadline` has passed, or its error is final.
///
/// `on_failure` sees each failure that is tried again, with the wait before the next try.
///
/// Cancel-safe when `operation` is.
///
/// # Errors
/// [`GaveUp`] with the last error.
pub async fn retry<T, E, F>(
    policy: Policy,
    deadline: Option<Duration>,
    mut operation: impl FnMut() -> F,
    mut on_failure: impl FnMut(&E, Duration),
) -> Result<T, GaveUp<E>>
where
    E: Retryable + std::error::Error + 'static,
    F: Future<Output = Result<T, E>>,
{
    let mut backoff = Backoff::new(policy);
    let mut last = None;
    let attempts = async {
        loop {
            let error = match operation().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let Some(wait) = backoff.after(error.retry()) else {
                return Err(GaveUp::Final(error));
            };
            on_failure(&error, wait);
            last = Some(error);
            sleep(wait).await;
        }
    };
    let Some(within) = deadline else {
        return attempts.await;
    };
    match tokio::time::timeout(within, attempts).await {
        Ok(ended) => ended,
        Err(_) => Err(GaveUp::Deadline { within, last }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("failed")]
    struct Failure(Retry);

    impl Retryable for Failure {
        fn retry(&self) -> Retry {
            self.0
        }
    }

    const POLICY: Policy = Policy {
        initial: Duration::from_millis(100),
        max: Duration::from_secs(1),
        brief: Duration::from_secs(5),
        longest_asked: Duration::from_secs(60),
    };

    async fn always(retry: Retry, deadline: Option<Duration>) -> (GaveUp<Failure>, Vec<Duration>) {
        let mut waits = Vec::new();
        let error = super::retry(
            POLICY,
            deadline,
            || async move { Err::<(), _>(Failure(retry)) },
            |_, wait| waits.push(wait),
        )
        .await
        .unwrap_err();
        (error, waits)
    }

    #[tokio::test(start_paused = true)]
    async fn final_errors_are_not_retried() {
        let (error, waits) = always(Retry::Never, None).await;
        assert!(matches!(error, GaveUp::Final(_)));
        assert!(waits.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn waits_stay_below_the_cap_until_the_deadline() {
        let (error, waits) = always(Retry::Backoff, Some(Duration::from_secs(120))).await;
        assert!(matches!(error, GaveUp::Deadline { last: Some(_), .. }));
        assert!(waits.iter().all(|wait| *wait <= POLICY.max), "{waits:?}");
        // Full jitter: on average half the cap, so some 240 tries; never the 1,000s of a busy loop.
        assert!((120..600).contains(&waits.len()), "{}", waits.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_asks_for_time_gets_it_up_to_a_limit() {
        let (_, waits) = always(
            Retry::After(Duration::from_secs(7)),
            Some(Duration::from_secs(60)),
        )
        .await;
        assert!(
            waits.iter().all(|wait| *wait >= Duration::from_secs(7)),
            "{waits:?}"
        );
        let (_, waits) = always(Retry::After(Duration::MAX), Some(Duration::from_secs(60))).await;
        assert!(waits[0] <= Duration::from_secs(61), "{waits:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_retried_only_briefly() {
        let started = Instant::now();
        let (error, _) = always(Retry::Briefly, None).await;
        assert!(matches!(error, GaveUp::Final(_)));
        assert!(started.elapsed() >= POLICY.brief && started.elapsed() < POLICY.brief * 2);
    }

    #[test]
    fn reset_starts_with_short_waits_again() {
        let mut backoff = Backoff::new(POLICY);
        for _ in 0..20 {
            backoff.next_wait();
        }
        backoff.reset();
        assert!(backoff.next_wait() <= POLICY.initial);
    }
}
