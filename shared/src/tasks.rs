//! Owned tasks: each is known by name, stops on one [`CancellationToken`], and its end is seen.

use std::{future::Future, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    task::{AbortHandle, JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// The tasks of a program or of a part of it. Dropping it aborts what still runs.
#[derive(Debug)]
pub struct Tasks {
    running: JoinSet<(&'static str, Result<(), String>)>,
    shutdown: CancellationToken,
}

/// How a program's tasks ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskFailure {
    /// A task ended with an error.
    #[error("task {task} failed: {reason}")]
    Failed {
        /// Its name.
        task: &'static str,
        /// Its error.
        reason: String,
    },
    /// A task panicked.
    #[error("a task panicked: {0}")]
    Panicked(String),
    /// Tasks were still running at the drain limit and were aborted.
    #[error("{0} tasks did not end in time")]
    Stuck(usize),
}

impl Tasks {
    /// No tasks yet; all will be told to end by `shutdown`.
    pub fn new(shutdown: CancellationToken) -> Self {
        Self {
            running: JoinSet::new(),
            shutdown,
        }
    }

    /// What tells the tasks to end.
    pub fn shutdown(&self) -> &CancellationToken {
        &self.shutdown
    }

    /// Starts a task that cannot fail.
    pub fn spawn<F>(&mut self, name: &'static str, task: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.running.spawn(async move {
            task.await;
            (name, Ok(()))
        })
    }

    /// Starts a task whose failure ends the program (see [`Tasks::run_until_shutdown`]).
    pub fn spawn_fallible<F, E>(&mut self, name: &'static str, task: F) -> AbortHandle
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::error::Error + 'static,
    {
        self.running.spawn(async move {
            let result = task.await.map_err(|error| crate::exit::report(&error));
            (name, result)
        })
    }

    /// Waits until the shutdown is asked for or a task fails (which asks for it), then for the
    /// tasks to end, at most `drain`; what runs after that is aborted.
    ///
    /// # Errors
    /// The first failure.
    pub async fn run_until_shutdown(mut self, drain: Duration) -> Result<(), TaskFailure> {
        let mut first = Ok(());
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => break,
                Some(ended) = self.running.join_next() => {
                    if let Err(failure) = judge(ended) {
                        first = Err(failure);
                        self.shutdown.cancel();
                        break;
                    }
                }
                else => self.shutdown.cancelled().await,
            }
        }
        let drained = self.drain(drain).await;
        first.and(drained)
    }

    /// Does `work` while the tasks run. The end of it asks for the shutdown, and so does a task that
    /// fails; `work` then ends in its own time, the tasks have `drain`.
    ///
    /// # Errors
    /// That of `work`, else the tasks' first failure.
    pub async fn around<T, E: From<TaskFailure>>(
        self,
        drain: Duration,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let shutdown = self.shutdown.clone();
        let work = async {
            let done = work.await;
            shutdown.cancel();
            done
        };
        let (done, ended) = tokio::join!(work, self.run_until_shutdown(drain));
        let done = done?;
        ended?;
        Ok(done)
    }

    /// Waits for the tasks to end, at most `limit`; what runs after that is aborted.
    ///
    /// # Errors
    /// The first failure.
    pub async fn drain(&mut self, limit: Duration) -> Result<(), TaskFailure> {
        let mut first = Ok(());
        let all_ended = async {
            while let Some(ended) = self.running.join_next().await {
                first = std::mem::replace(&mut first, Ok(())).and(judge(ended));
            }
        };
        if tokio::time::timeout(limit, all_ended).await.is_err() {
            let stuck = self.running.len();
            warn!(
                tasks = stuck,
                limit_s = limit.as_secs(),
                "tasks did not end in time"
            );
            self.running.shutdown().await;
            return first.and(Err(TaskFailure::Stuck(stuck)));
        }
        first
    }
}

fn judge(ended: Result<(&'static str, Result<(), String>), JoinError>) -> Result<(), TaskFailure> {
    match ended {
        Ok((task, Ok(()))) => {
            debug!(task, "task ended");
            Ok(())
        }
        Ok((task, Err(reason))) => {
            error!(task, %reason, "task failed");
            Err(TaskFailure::Failed { task, reason })
        }
        Err(error) if error.is_cancelled() => Ok(()),
        Err(error) => {
            error!(%error, "task panicked");
            Err(TaskFailure::Panicked(error.to_string()))
        }
    }
}

/// Cancels `shutdown` on SIGTERM or SIGINT; returns when it did, or when somebody else did.
///
/// # Errors
/// When the signals cannot be caught.
pub async fn cancel_on_signal(shutdown: CancellationToken) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        () = shutdown.cancelled() => return Ok(()),
    };
    info!(signal = name, "shutting down");
    shutdown.cancel();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("broken")]
    struct Broken;

    #[tokio::test(start_paused = true)]
    async fn a_failing_task_ends_the_others_and_is_reported() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("waits", shutdown.clone().cancelled_owned());
        tasks.spawn_fallible("breaks", async { Err(Broken) });
        let failure = tasks
            .run_until_shutdown(Duration::from_secs(1))
            .await
            .unwrap_err();
        assert_eq!(
            failure,
            TaskFailure::Failed {
                task: "breaks",
                reason: "broken".to_owned()
            }
        );
        assert!(shutdown.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_fails_ends_what_it_is_around() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn_fallible("breaks", async { Err(Broken) });
        let work = async {
            shutdown.cancelled().await;
            Ok(())
        };
        let ended: Result<(), TaskFailure> = tasks.around(Duration::from_secs(1), work).await;
        assert!(matches!(
            ended,
            Err(TaskFailure::Failed { task: "breaks", .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_end_with_what_they_are_around() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("waits", shutdown.clone().cancelled_owned());
        let work = async { Ok::<_, TaskFailure>(7) };
        assert_eq!(tasks.around(Duration::from_secs(1), work).await, Ok(7));
        assert!(shutdown.is_cancelled());
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_seen() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.spawn("panics", async { panic!("oh") });
        let failure = tasks
            .run_until_shutdown(Duration::from_secs(1))
            .await
            .unwrap_err();
        assert!(matches!(failure, TaskFailure::Panicked(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn stuck_tasks_are_aborted_at_the_limit() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::new(shutdown.clone());
        tasks.spawn("stuck", std::future::pending());
        shutdown.cancel();
        let failure = tasks
            .run_until_shutdown(Duration::from_secs(5))
            .await
            .unwrap_err();
        assert_eq!(failure, TaskFailure::Stuck(1));
    }
}
