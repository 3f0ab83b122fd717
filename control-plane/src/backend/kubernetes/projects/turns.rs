//! One at a time for each namespace, and one failure for all who want it.
//!
//! A hundred sessions of a project whose namespace cannot be made would else try one after the
//! other, each as slowly as the first, and keep all workers from the sessions of others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use moka::sync::Cache;
use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard},
    time::Instant,
};

use super::again;
use crate::backend::BackendError;

/// How long nobody tries again what has failed.
const FRESH: Duration = Duration::from_secs(5);
/// How long a failure is remembered: meanwhile nobody waits for who tries again.
const KEPT: Duration = Duration::from_mins(1);
/// Most failures that are remembered, one for each namespace. A forgotten one costs a try.
const MAX_FAILED: u64 = 1_000;

pub(super) struct Turns {
    /// There only while somebody has or awaits a turn: no more than there are callers.
    entries: Entries,
    failed: Failed,
}

type Entries = Arc<Mutex<HashMap<String, Entry>>>;
type Entry = Arc<AsyncMutex<()>>;
/// The last failure of each namespace, until it succeeds.
type Failed = Cache<String, Arc<Failure>>;

struct Failure {
    at: Instant,
    project: String,
    error: BackendError,
}

/// The right to be the only one at work on a namespace.
pub(super) struct Turn {
    entries: Entries,
    failed: Failed,
    namespace: String,
    held: Option<OwnedMutexGuard<()>>,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            entries: Entries::default(),
            failed: Cache::builder()
                .max_capacity(MAX_FAILED)
                .time_to_live(KEPT)
                .build(),
        }
    }
}

impl Turns {
    /// Waits for the turn. Cancel-safe.
    pub(super) async fn take(&self, namespace: &str) -> Turn {
        let entry = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(entries.entry(namespace.to_owned()).or_default())
        };
        self.wait(namespace, entry).await
    }

    /// As [`Turns::take`], for one of many who want the same. Of a project that has failed lately,
    /// one at a time tries again, and the others do not wait for it. Cancel-safe.
    ///
    /// # Errors
    /// The failure of who has just tried.
    pub(super) async fn share(&self, namespace: &str, project: &str) -> Result<Turn, BackendError> {
        let asked = Instant::now();
        let entry = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(failure) = self.failure(namespace, project)
                && (failure.at.elapsed() < FRESH || entries.contains_key(namespace))
            {
                return Err(again(&failure.error));
            }
            Arc::clone(entries.entry(namespace.to_owned()).or_default())
        };
        let turn = self.wait(namespace, entry).await;
        match self.failure(namespace, project) {
            Some(failure) if failure.at >= asked => Err(again(&failure.error)),
            _ => Ok(turn),
        }
    }

    async fn wait(&self, namespace: &str, entry: Entry) -> Turn {
        // From here on its entry is taken back, whether the turn comes or is given up.
        let mut turn = Turn {
            entries: Arc::clone(&self.entries),
            failed: self.failed.clone(),
            namespace: namespace.to_owned(),
            held: None,
        };
        turn.held = Some(entry.lock_owned().await);
        turn
    }

    /// The same namespace by another project's name is another question.
    fn failure(&self, namespace: &str, project: &str) -> Option<Arc<Failure>> {
        let failure = self.failed.get(namespace)?;
        (failure.project == project).then_some(failure)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.len()
    }
}

impl Turn {
    /// What has failed before has not any more.
    pub(super) fn succeed(&self) {
        self.failed.invalidate(&self.namespace);
    }

    /// Leaves the failure to the others, and gives it back.
    pub(super) fn fail(&self, project: &str, error: BackendError) -> BackendError {
        let failure = Failure {
            at: Instant::now(),
            project: project.to_owned(),
            error: again(&error),
        };
        self.failed
            .insert(self.namespace.clone(), Arc::new(failure));
        error
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held = None;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody else has it, and nobody can get it meanwhile.
        let is_last = |entry: &Entry| Arc::strong_count(entry) == 1;
        if entries.get(&self.namespace).is_some_and(is_last) {
            entries.remove(&self.namespace);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        sync::mpsc,
        task::JoinSet,
        time::{sleep, timeout},
    };

    use super::*;

    fn refused() -> BackendError {
        BackendError::Refused {
            reason: "Forbidden",
            message: "no".to_owned(),
        }
    }

    fn is_refused(shared: &Result<Turn, BackendError>) -> bool {
        matches!(
            shared,
            Err(BackendError::Refused {
                reason: "Forbidden",
                ..
            })
        )
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_waited_share_the_failure_and_later_ones_try_again() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        let work = async {
            sleep(Duration::from_secs(1)).await;
            let error = first.fail("project", refused());
            assert!(matches!(error, BackendError::Refused { .. }));
            drop(first);
        };
        let (second, ()) = tokio::join!(turns.share("a", "project"), work);
        assert!(is_refused(&second));
        assert!(is_refused(&turns.share("a", "project").await));
        // The same namespace by another project's name is another question.
        assert!(turns.share("a", "Project").await.is_ok());
        sleep(FRESH).await;
        let third = turns.share("a", "project").await.ok().unwrap();
        // Others do not wait for who tries what may well fail again.
        assert!(is_refused(&turns.share("a", "project").await));
        third.succeed();
        drop(third);
        assert!(turns.share("a", "project").await.is_ok());
        assert_eq!(turns.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_waits_for_its_own_only_and_nothing_is_left() {
        let turns = Turns::default();
        let first = turns.take("a").await;
        let other = turns.take("b").await;
        let waited = timeout(Duration::from_secs(1), turns.take("a")).await;
        assert!(waited.is_err());
        drop((first, other));
        assert!(turns.take("a").await.held.is_some());
        assert_eq!(turns.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn sessions_of_a_bad_project_do_not_keep_the_workers_from_a_good_one() {
        let turns = Arc::new(Turns::default());
        let (again, jobs) = mpsc::channel(100);
        for _ in 0..20 {
            again.send("bad").await.unwrap();
        }
        again.send("good").await.unwrap();
        let jobs = Arc::new(AsyncMutex::new(jobs));
        let begun = Instant::now();
        let mut workers = JoinSet::new();
        for _ in 0..8 {
            let (turns, jobs, again) = (Arc::clone(&turns), Arc::clone(&jobs), again.clone());
            workers.spawn(async move {
                loop {
                    let project = jobs.lock().await.recv().await.unwrap();
                    let turn = turns.share(project, project).await;
                    if project == "good" {
                        return begun.elapsed();
                    }
                    if let Ok(turn) = turn {
                        // As long as a tenant operator is waited for.
                        sleep(Duration::from_secs(3)).await;
                        turn.fail(project, refused());
                    }
                    sleep(Duration::from_millis(1)).await;
                    again.send(project).await.unwrap();
                }
            });
        }
        let waited = workers.join_next().await.unwrap().unwrap();
        assert!(waited < Duration::from_secs(4), "{waited:?}");

        // Nor later, while one of them tries again.
        sleep(FRESH).await;
        let asked = Instant::now();
        again.send("good").await.unwrap();
        workers.join_next().await.unwrap().unwrap();
        assert!(asked.elapsed() < Duration::from_secs(1));
    }
}
