//! Due work: which handler is to run for which key, and when.
//!
//! In: marks, from whoever saw a change. Out: [`Lease`]s, the earliest due first, never two of one
//! key at a time. A mark carries no data: who runs reads the current object, so nothing old can be
//! replayed. An entry leaves the queue by success alone.
//!
//! There is at most one entry for each handler and key: the queue's bound is the number of sessions
//! times the number of handlers. Marking never blocks.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ambient_shared::retry::{Backoff, Policy};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// Shortest time from a first failure to the next try when a fresh mark asks for one; doubles with
/// each failure in a row. A handler that fails may cause the very event that marks it again.
const MARKED_PAUSE: Duration = Duration::from_millis(250);

/// What that grows to: how long news about an entry that keeps failing may have to wait.
const MAX_MARKED_PAUSE: Duration = Duration::from_secs(2);

/// Work by handler and key. Clones share it.
#[derive(Debug)]
pub(crate) struct WorkQueue<H, K>(Arc<Shared<H, K>>);

#[derive(Debug)]
struct Shared<H, K> {
    state: Mutex<State<H, K>>,
    changed: Notify,
}

#[derive(Debug)]
struct State<H, K> {
    entries: HashMap<(H, K), Entry>,
    /// The entries that wait, by when they are due.
    due: HashMap<H, BTreeMap<Turn, K>>,
    /// The keys that a handler runs for, each with its due entries of other handlers.
    processing: HashMap<K, Vec<H>>,
    turns: u64,
    policy: Policy,
}

/// When an entry is due; those due in the same moment keep the order in which they were marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    at: Instant,
    number: u64,
}

#[derive(Debug)]
struct Entry {
    stage: Stage,
    failures: Option<Failures>,
}

#[derive(Debug)]
enum Stage {
    /// In `due`.
    Waiting(Turn),
    /// Due, but its key is being processed; in `processing`.
    Parked(Turn),
    Running {
        /// Whether it was marked since it started.
        marked: bool,
    },
}

#[derive(Debug)]
struct Failures {
    backoff: Backoff,
    count: u32,
    last: Instant,
}

impl Failures {
    /// From the last failure to the earliest next try that a mark can ask for.
    fn marked_pause(&self) -> Duration {
        let doublings = self.count.saturating_sub(1).min(8);
        (MARKED_PAUSE * 2_u32.pow(doublings)).min(MAX_MARKED_PAUSE)
    }
}

/// What comes after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Failed {
    /// Failures in a row.
    pub(crate) failures: u32,
    /// Until the next try, unless a mark brings it forward.
    pub(crate) wait: Duration,
}

/// The right to run one handler for one key. Dropping it without a verdict counts as a failure:
/// work is not lost when a handler panics or is cut off.
#[derive(Debug)]
pub(crate) struct Lease<H, K>
where
    H: Copy + Eq + Hash + Debug,
    K: Clone + Eq + Hash,
{
    queue: WorkQueue<H, K>,
    handler: H,
    key: K,
    settled: bool,
}

impl<H, K> Clone for WorkQueue<H, K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H, K> WorkQueue<H, K>
where
    H: Copy + Eq + Hash + Debug,
    K: Clone + Eq + Hash,
{
    /// Empty; failures are retried after the waits of `policy`.
    pub(crate) fn new(policy: Policy) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                entries: HashMap::new(),
                due: HashMap::new(),
                processing: HashMap::new(),
                turns: 0,
                policy,
            }),
            changed: Notify::new(),
        }))
    }

    /// Says that `handler` is to run for `key`: now, or once more if it runs at this moment. An
    /// entry that waits after a failure is tried soon too, but never without a pause.
    pub(crate) fn mark(&self, handler: H, key: &K) {
        self.lock().mark(handler, key, Instant::now());
        self.0.changed.notify_waiters();
    }

    /// The waits of entries that fail for the first time from now on.
    pub(crate) fn set_policy(&self, policy: Policy) {
        self.lock().policy = policy;
    }

    /// The due entry of these handlers that has been due longest; waits for one.
    ///
    /// Cancel-safe: an entry is only taken when it is given.
    pub(crate) async fn next(&self, handlers: &[H]) -> Lease<H, K> {
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            // Before looking: a mark between the look and the wait must not be missed.
            changed.as_mut().enable();
            let next_due = match self.lock().take(handlers, Instant::now()) {
                Ok((handler, key)) => {
                    return Lease {
                        queue: self.clone(),
                        handler,
                        key,
                        settled: false,
                    };
                }
                Err(next_due) => next_due,
            };
            match next_due {
                Some(at) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(at) => {}
                },
                None => changed.await,
            }
        }
    }

    /// Number of entries of a handler: waiting, backing off or running.
    pub(crate) fn len(&self, handler: H) -> usize {
        let state = self.lock();
        let of_handler = |(of, _): &&(H, K)| *of == handler;
        state.entries.keys().filter(of_handler).count()
    }

    fn settle(&self, handler: H, key: &K, success: bool) -> Option<Failed> {
        let failed = self.lock().settle(handler, key, success, Instant::now());
        self.0.changed.notify_waiters();
        failed
    }

    fn lock(&self) -> MutexGuard<'_, State<H, K>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H, K> State<H, K>
where
    H: Copy + Eq + Hash,
    K: Clone + Eq + Hash,
{
    fn turn(&mut self, at: Instant) -> Turn {
        self.turns += 1;
        Turn {
            at,
            number: self.turns,
        }
    }

    fn mark(&mut self, handler: H, key: &K, now: Instant) {
        let Some(entry) = self.entries.get_mut(&(handler, key.clone())) else {
            self.wait(handler, key, now, None);
            return;
        };
        match &mut entry.stage {
            Stage::Running { marked } => *marked = true,
            // It is due already.
            Stage::Parked(_) => {}
            Stage::Waiting(turn) => {
                let turn = *turn;
                let Some(failures) = &entry.failures else {
                    return;
                };
                let earliest = now.max(failures.last + failures.marked_pause());
                if earliest < turn.at {
                    let failures = entry.failures.take();
                    self.waiting(handler).remove(&turn);
                    self.wait(handler, key, earliest, failures);
                }
            }
        }
    }

    fn take(&mut self, handlers: &[H], now: Instant) -> Result<(H, K), Option<Instant>> {
        loop {
            let first = handlers
                .iter()
                .filter_map(|handler| {
                    let (turn, _) = self.due.get(handler)?.first_key_value()?;
                    Some((*turn, *handler))
                })
                .min_by_key(|(turn, _)| *turn);
            let Some((turn, handler)) = first else {
                return Err(None);
            };
            if turn.at > now {
                return Err(Some(turn.at));
            }
            let Some(key) = self.waiting(handler).remove(&turn) else {
                continue;
            };
            let parked = self.processing.get_mut(&key);
            let taken = parked.is_none();
            let stage = if let Some(parked) = parked {
                parked.push(handler);
                Stage::Parked(turn)
            } else {
                self.processing.insert(key.clone(), Vec::new());
                Stage::Running { marked: false }
            };
            if let Some(entry) = self.entries.get_mut(&(handler, key.clone())) {
                entry.stage = stage;
            }
            if taken {
                return Ok((handler, key));
            }
        }
    }

    fn settle(&mut self, handler: H, key: &K, success: bool, now: Instant) -> Option<Failed> {
        for parked in self.processing.remove(key).unwrap_or_default() {
            if let Some(entry) = self.entries.get_mut(&(parked, key.clone()))
                && let Stage::Parked(turn) = entry.stage
            {
                entry.stage = Stage::Waiting(turn);
                self.waiting(parked).insert(turn, key.clone());
            }
        }
        let entry = self.entries.remove(&(handler, key.clone()))?;
        let marked = matches!(entry.stage, Stage::Running { marked: true });
        if success {
            if marked {
                self.wait(handler, key, now, None);
            }
            return None;
        }
        let mut failures = entry.failures.unwrap_or_else(|| Failures {
            backoff: Backoff::new(self.policy),
            count: 0,
            last: now,
        });
        failures.count += 1;
        failures.last = now;
        let mut wait = failures.backoff.next_wait();
        if marked {
            wait = wait.min(failures.marked_pause());
        }
        let failed = Failed {
            failures: failures.count,
            wait,
        };
        self.wait(handler, key, now + wait, Some(failures));
        Some(failed)
    }

    /// Makes an entry that is due at `at`.
    fn wait(&mut self, handler: H, key: &K, at: Instant, failures: Option<Failures>) {
        let turn = self.turn(at);
        let entry = Entry {
            stage: Stage::Waiting(turn),
            failures,
        };
        self.entries.insert((handler, key.clone()), entry);
        self.waiting(handler).insert(turn, key.clone());
    }

    fn waiting(&mut self, handler: H) -> &mut BTreeMap<Turn, K> {
        self.due.entry(handler).or_default()
    }
}

impl<H, K> Lease<H, K>
where
    H: Copy + Eq + Hash + Debug,
    K: Clone + Eq + Hash,
{
    /// What is to run.
    pub(crate) fn handler(&self) -> H {
        self.handler
    }

    /// What it is to run for.
    pub(crate) fn key(&self) -> &K {
        &self.key
    }

    /// It is done: forget it, unless it was marked meanwhile.
    pub(crate) fn succeed(mut self) {
        self.settled = true;
        self.queue.settle(self.handler, &self.key, true);
    }

    /// It is not done: try again later.
    pub(crate) fn fail(mut self) -> Option<Failed> {
        self.settled = true;
        self.queue.settle(self.handler, &self.key, false)
    }
}

impl<H, K> Drop for Lease<H, K>
where
    H: Copy + Eq + Hash + Debug,
    K: Clone + Eq + Hash,
{
    fn drop(&mut self) {
        if !self.settled {
            self.queue.settle(self.handler, &self.key, false);
        }
    }
}

#[cfg(test)]
mod tests;
