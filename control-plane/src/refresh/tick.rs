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
