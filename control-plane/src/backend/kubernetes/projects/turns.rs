//! One at a time for each namespace, and one failure for all who waited for it.
//!
//! A hundred sessions of a project whose namespace cannot be made would else try one after the
//! other, each as slowly as the first.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    sync::{Mutex as AsyncMutex, OwnedMutexGuard},
    time::Instant,
};

use super::again;
use crate::backend::BackendError;

/// Entries are there only while somebody has or awaits a turn: no more than there are callers.
#[derive(Default)]
pub(super) struct Turns(Arc<Mutex<HashMap<String, Entry>>>);

type Entry = Arc<AsyncMutex<Option<Failure>>>;

/// The last failure.
struct Failure {
    at: Instant,
    project: String,
    error: BackendError,
}

/// The right to be the only one at work on a namespace.
pub(super) struct Turn {
    turns: Arc<Mutex<HashMap<String, Entry>>>,
    namespace: String,
    last: Option<OwnedMutexGuard<Option<Failure>>>,
}

impl Turns {
    /// Waits for the turn. Cancel-safe.
    pub(super) async fn take(&self, namespace: &str) -> Turn {
        let entry = {
            let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(entries.entry(namespace.to_owned()).or_default())
        };
        // From here on its entry is taken back, whether the turn comes or is given up.
        let mut turn = Turn {
            turns: Arc::clone(&self.0),
            namespace: namespace.to_owned(),
            last: None,
        };
        turn.last = Some(entry.lock_owned().await);
        turn
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Turn {
    /// How another caller's work on the same project failed, after this caller had asked for it.
    pub(super) fn failure_since(&self, asked: Instant, project: &str) -> Option<BackendError> {
        let failure = self.last.as_ref()?.as_ref()?;
        (failure.at >= asked && failure.project == project).then(|| again(&failure.error))
    }

    /// Leaves the failure to those who wait, and gives it back.
    pub(super) fn fail(&mut self, project: &str, error: BackendError) -> BackendError {
        if let Some(last) = &mut self.last {
            **last = Some(Failure {
                at: Instant::now(),
                project: project.to_owned(),
                error: again(&error),
            });
        }
        error
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.last = None;
        let mut entries = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody else has it, and nobody can get it meanwhile.
        let is_last = |entry: &Entry| Arc::strong_count(entry) == 1;
        if entries.get(&self.namespace).is_some_and(is_last) {
            entries.remove(&self.namespace);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;

    fn refused() -> BackendError {
        BackendError::Refused {
            reason: "Forbidden",
            message: "no".to_owned(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_waited_share_the_failure_and_later_ones_try_again() {
        let turns = Turns::default();
        let mut first = turns.take("a").await;
        let asked = Instant::now();
        let work = async {
            sleep(Duration::from_secs(1)).await;
            let error = first.fail("project", refused());
            assert!(matches!(error, BackendError::Refused { .. }));
            drop(first);
        };
        let (second, ()) = tokio::join!(turns.take("a"), work);
        assert!(matches!(
            second.failure_since(asked, "project"),
            Some(BackendError::Refused {
                reason: "Forbidden",
                ..
            })
        ));
        // The same namespace by another project's name is another question.
        assert!(second.failure_since(asked, "Project").is_none());
        sleep(Duration::from_secs(1)).await;
        assert!(second.failure_since(Instant::now(), "project").is_none());
        drop(second);
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
        assert!(turns.take("a").await.last.is_some());
        assert_eq!(turns.len(), 0);
    }
}
