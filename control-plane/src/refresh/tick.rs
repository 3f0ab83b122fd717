//! The account of one tick: what was due, and what became of it.

use std::collections::HashSet;

use ambient_shared::session::SessionId;
use tracing::info;

/// What one tick has done so far.
#[derive(Debug, Default)]
pub(crate) struct Tick {
    /// Due and not settled yet.
    open: HashSet<SessionId>,
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
        *self = Self::default();
    }

    /// A session runs, and its token may be due.
    pub(super) fn found(&mut self, id: &SessionId, due: bool) {
        self.running += 1;
        if due {
            self.due += 1;
            self.open.insert(id.clone());
        }
    }

    /// All sessions were looked at. Gives the number of those that are due.
    pub(super) fn complete(&mut self) -> usize {
        self.complete = true;
        self.summarise_if_done();
        self.due
    }

    /// A token was settled, or (none) a try failed.
    pub(super) fn settle(&mut self, id: &SessionId, settled: Option<Settled>) {
        let Some(settled) = settled else {
            self.failures += 1;
            return;
        };
        // Others were marked by somebody else than this tick.
        if !self.open.remove(id) {
            return;
        }
        match settled {
            Settled::Written => self.written += 1,
            Settled::Skipped => self.skipped += 1,
        }
        self.summarise_if_done();
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
