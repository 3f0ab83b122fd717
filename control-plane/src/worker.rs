//! Runs handlers for due work, each share of work with its own limit.
//!
//! In: due entries of the [`WorkQueue`]. Out: calls of one function, at most `limit` at once, and
//! at most half of them for one group; what it says decides whether the entry is forgotten or
//! retried.

use std::{fmt::Debug, hash::Hash, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use ambient_shared::{exit, session::SessionId};
use futures_util::{FutureExt as _, future::BoxFuture};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::queue::{Failed, Lease, Work, WorkQueue};

/// What a worker does with one entry.
pub(crate) type Run<H, E, K = SessionId> =
    Arc<dyn Fn(H, K) -> BoxFuture<'static, Result<(), E>> + Send + Sync>;

/// Failures in a row before they are warned of: what a restart of the other side causes is no
/// news.
pub(crate) const WARN_FROM: u32 = 3;

/// What work is for.
pub(crate) trait WorkKey: Clone + Eq + Hash + Send + Sync + 'static {
    /// Logs that work on it failed, without naming what no log may name.
    fn log_failure(&self, handler: &dyn Debug, failed: Failed, reason: &str);

    /// Logs that work on it panicked.
    fn log_panic(&self, handler: &dyn Debug);
}

/// A task that runs one share of the work.
pub(crate) struct Worker<H: Work, E, K = SessionId> {
    /// Where the work comes from.
    pub(crate) queue: WorkQueue<H, K>,
    /// The share whose entries it takes.
    pub(crate) share: H::Share,
    /// How many entries it works on at once.
    pub(crate) limit: usize,
    /// Longest time for one entry; then it counts as failed.
    pub(crate) time_limit: Duration,
    /// What is done.
    pub(crate) run: Run<H, E, K>,
}

impl<H, E, K> Worker<H, E, K>
where
    H: Work<Share: Send + Sync> + Send + Sync + 'static,
    E: std::error::Error + Send + 'static,
    K: WorkKey,
{
    /// Works until `shutdown`, then finishes what it has begun.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let places = self.limit.max(1);
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                Some(ended) = running.join_next() => report_panic(ended),
                lease = self.queue.next(self.share, places), if running.len() < places => {
                    running.spawn(work_off(lease, Arc::clone(&self.run), self.time_limit));
                }
            }
        }
        while let Some(ended) = running.join_next().await {
            report_panic(ended);
        }
    }
}

fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        // The lease was dropped on the way, so the entry is retried.
        error!(%error, "a worker panicked");
    }
}

async fn work_off<H, E, K>(lease: Lease<H, K>, run: Run<H, E, K>, time_limit: Duration)
where
    H: Work,
    E: std::error::Error + 'static,
    K: WorkKey,
{
    let (handler, key) = (lease.handler(), lease.key().clone());
    // Nothing of a run outlives it.
    let running = AssertUnwindSafe(run(handler, key.clone())).catch_unwind();
    let done = tokio::time::timeout(time_limit, running).await;
    let reason = match done {
        Ok(Ok(Ok(()))) => {
            lease.succeed();
            return;
        }
        Ok(Ok(Err(error))) => exit::report(&error),
        Ok(Err(_)) => {
            key.log_panic(&handler);
            "it panicked".to_owned()
        }
        Err(_) => format!("not done within {time_limit:?}"),
    };
    if let Some(failed) = lease.fail() {
        key.log_failure(&handler, failed, &reason);
    }
}

impl WorkKey for SessionId {
    fn log_failure(&self, handler: &dyn Debug, failed: Failed, reason: &str) {
        let session = self.hash();
        // Whatever is below may quote the id, in a path or in what a server answered.
        let reason = self.masked_in(reason);
        let (failures, retry_in_s) = (failed.failures, failed.wait.as_secs_f32());
        if failures >= WARN_FROM {
            warn!(%session, ?handler, failures, retry_in_s, %reason, "work on a session failed");
        } else {
            debug!(%session, ?handler, failures, retry_in_s, %reason, "work on a session failed");
        }
    }

    fn log_panic(&self, handler: &dyn Debug) {
        error!(session = %self.hash(), ?handler, "work on a session panicked");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use ambient_shared::retry::Policy;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::queue::{Group, GroupOf};

    #[derive(Debug, thiserror::Error)]
    #[error("failed")]
    struct Failure;

    impl Work for &'static str {
        type Share = Self;

        fn share(self) -> Self {
            self
        }
    }

    fn each_for_itself() -> GroupOf<SessionId> {
        Arc::new(|id| Group::of(id.as_str()))
    }

    fn id(number: usize) -> SessionId {
        SessionId::parse(format!("session-{number:04}")).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn each_share_has_its_own_limit() {
        let queue = WorkQueue::new(Policy::default(), each_for_itself());
        let (slow_runs, quick_runs) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let run: Run<&str, Failure> = {
            let (slow_runs, quick_runs) = (Arc::clone(&slow_runs), Arc::clone(&quick_runs));
            Arc::new(move |handler, _| {
                if handler == "slow" {
                    slow_runs.fetch_add(1, Ordering::SeqCst);
                    return Box::pin(std::future::pending());
                }
                quick_runs.add_permits(1);
                Box::pin(std::future::ready(Ok(())))
            })
        };
        let worker = |handler| Worker {
            queue: queue.clone(),
            share: handler,
            limit: 2,
            time_limit: Duration::from_secs(3600),
            run: Arc::clone(&run),
        };
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(worker("slow").run(shutdown.clone()));
        tasks.spawn(worker("quick").run(shutdown.clone()));

        for number in 0..10 {
            queue.mark("slow", &id(number));
            queue.mark("quick", &id(100 + number));
        }

        let all = tokio::time::timeout(Duration::from_secs(60), quick_runs.acquire_many(10)).await;
        assert!(all.is_ok(), "quick work waited behind slow work");
        assert_eq!(slow_runs.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn panics_and_hangs_are_failures_that_are_tried_again() {
        let queue = WorkQueue::new(Policy::default(), each_for_itself());
        let tries = Arc::new(AtomicUsize::new(0));
        let done = Arc::new(Semaphore::new(0));
        let run: Run<(), Failure> = {
            let (tries, done) = (Arc::clone(&tries), Arc::clone(&done));
            Arc::new(move |(), _| {
                let (attempt, done) = (tries.fetch_add(1, Ordering::SeqCst), Arc::clone(&done));
                Box::pin(async move {
                    match attempt {
                        0 => panic!("in a handler"),
                        1 => std::future::pending().await,
                        2 => Err(Failure),
                        _ => {
                            done.add_permits(1);
                            Ok(())
                        }
                    }
                })
            })
        };
        let shutdown = CancellationToken::new();
        let worker = Worker {
            queue: queue.clone(),
            share: (),
            limit: 1,
            time_limit: Duration::from_secs(10),
            run,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(worker.run(shutdown.clone()));
        queue.mark((), &id(1));
        let all = tokio::time::timeout(Duration::from_secs(3600), done.acquire()).await;
        assert!(all.is_ok());
        shutdown.cancel();
        tasks.join_next().await.unwrap().unwrap();
        assert_eq!(queue.depth(()), 0);
    }
}
