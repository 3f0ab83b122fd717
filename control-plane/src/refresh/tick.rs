//! The account of one tick: what was due, and what became of it.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use ambient_shared::session::SessionId;
use tokio::time::Instant;
use tracing::info;

/// What one tick has done so far.
#[derive(Debug, Default)]
pub(crate) struct Tick {
    /// Due and not settled yet.
    open: HashSet<SessionId>,
    /// Since when those have been due that no tick has seen settled yet.
    due_since: HashMap<SessionId, Instant>,
    /// Nothing is added any more.
    complete: bool,
    running: usize,
    due: usize,
    written: usize,
    skipped: usize,
    failures: usize,
}

/// How one due token was settled.
#[derive(Debug, Clone, Copy)]
pub(super) enum Settled {
    Written,
    /// The session ended, or somebody else wrote it.
    Skipped,
}

impl Tick {
    /// Starts the account of the next tick. What the last one has left open stays in the queue.
    pub(super) fn begin(&mut self) {
        if !self.open.is_empty() {
            self.summarise();
        }
        *self = Self {
            due_since: std::mem::take(&mut self.due_since),
            ..Self::default()
        };
    }

    /// A session runs, and its token may be due.
    pub(super) fn found(&mut self, id: &SessionId, due: bool) {
        self.running += 1;
        if due {
            self.due += 1;
            self.open.insert(id.clone());
            let now = Instant::now();
            self.due_since.entry(id.clone()).or_insert(now);
        }
    }

    /// All sessions were looked at. Gives the number of those that are due.
    pub(super) fn complete(&mut self) -> usize {
        self.complete = true;
        self.summarise_if_done();
        self.due
    }

    /// A token was settled, or (none) a try failed. Gives for how long one that was written had
    /// been due.
    pub(super) fn settle(&mut self, id: &SessionId, settled: Option<Settled>) -> Option<Duration> {
        let Some(settled) = settled else {
            self.failures += 1;
            return None;
        };
        let due_since = self.due_since.remove(id);
        // Others were marked by somebody else than this tick.
        if self.open.remove(id) {
            match settled {
                Settled::Written => self.written += 1,
                Settled::Skipped => self.skipped += 1,
            }
            self.summarise_if_done();
        }
        due_since
            .filter(|_| matches!(settled, Settled::Written))
            .map(|since| since.elapsed())
    }

    fn summarise_if_done(&self) {
        if self.complete && self.open.is_empty() {
            self.summarise();
        }
    }

    fn summarise(&self) {
        info!(
            running = self.running,
            due = self.due,
            written = self.written,
            skipped = self.skipped,
            failures = self.failures,
            unfinished = self.open.len(),
            "refresh"
        );
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_lag_counts_from_when_a_token_was_first_found_due() {
        let (late, fresh) = ("session-late", "session-fresh");
        let [late, fresh] = [late, fresh].map(|it| SessionId::parse(it).unwrap());
        let mut tick = Tick::default();
        tick.begin();
        tick.found(&late, true);
        tick.found(&fresh, false);
        tick.complete();
        sleep(Duration::from_secs(7)).await;
        assert_eq!(tick.settle(&late, None), None, "a try that failed");

        // The next tick finds it due still.
        tick.begin();
        tick.found(&late, true);
        sleep(Duration::from_secs(3)).await;
        let lag = tick.settle(&late, Some(Settled::Written));
        assert_eq!(lag, Some(Duration::from_secs(10)));
        // What nobody found due, such as a Secret that was deleted, has no lag.
        assert_eq!(tick.settle(&fresh, Some(Settled::Written)), None);
        assert!(tick.due_since.is_empty());
    }
}
