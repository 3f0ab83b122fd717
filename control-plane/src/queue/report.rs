//! How long queues are, and how old what waits in them, as metrics.

use std::{hash::Hash, time::Duration};

use ambient_shared::clock::Clock;
use metrics::gauge;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Work, WorkQueue};
use crate::metrics::{QUEUE_LENGTH, QUEUE_OLDEST};

/// How often queues are reported.
pub(crate) const INTERVAL: Duration = Duration::from_secs(5);

/// Reports what waits for these handlers of a queue, under one name.
pub(crate) fn report<H, K>(
    queue: &WorkQueue<H, K>,
    handlers: &[H],
    name: &'static str,
    clock: &Clock,
) where
    H: Work,
    K: Clone + Eq + Hash,
{
    let oldest = handlers.iter().filter_map(|it| queue.oldest_due(*it)).max();
    let length: usize = handlers.iter().map(|it| queue.depth(*it)).sum();
    // A moment, so that a report which is stuck shows too.
    let now = Duration::from_secs(clock.unix_seconds());
    let oldest = now.saturating_sub(oldest.unwrap_or_default());
    gauge!(QUEUE_OLDEST, "handler" => name).set(oldest.as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    gauge!(QUEUE_LENGTH, "handler" => name).set(length as f64);
}

/// Reports it again and again until `shutdown`.
pub(crate) async fn keep_reporting<H, K>(
    queue: WorkQueue<H, K>,
    handlers: &[H],
    name: &'static str,
    clock: Clock,
    shutdown: CancellationToken,
) where
    H: Work,
    K: Clone + Eq + Hash,
{
    let reporting = async {
        loop {
            report(&queue, handlers, name, &clock);
            sleep(INTERVAL).await;
        }
    };
    shutdown.run_until_cancelled(reporting).await;
}
