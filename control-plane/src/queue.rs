//! Due work: which handler is to run for which key, and when.
//!
//! In: marks, from whoever saw a change. Out: [`Lease`]s, never two of one key at a time, fair by
//! group: a project with ten thousand sessions that fail delays no other. Within a group the
//! earliest due comes first. A mark carries no data: who runs reads the current object, so nothing
//! old can be replayed. An entry leaves the queue by success alone, or when its share is cleared.
//!
//! There is at most one entry for each handler and key: the queue's bound is the number of sessions
//! times the number of handlers. Marking never blocks.

use std::{
    fmt::{self, Debug},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ambient_shared::retry::Policy;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

pub(crate) use groups::Group;
use state::{State, Turn};

mod groups;
pub(crate) mod report;
mod state;

/// What can be due for a key.
pub(crate) trait Work: Copy + Eq + Hash + Debug {
    /// Names of the shares of the workers.
    type Share: Copy + Eq + Hash + Debug;

    /// Whose work it is: each share has its own worker, so that none waits behind another.
    fn share(self) -> Self::Share;
}

/// Of one kind only.
impl Work for () {
    type Share = ();

    fn share(self) {}
}

/// Gives the group of a key. Asked at each mark and after each failure.
pub(crate) type GroupOf<K> = Arc<dyn Fn(&K) -> Group + Send + Sync>;

/// Work by handler and key. Clones share it.
pub(crate) struct WorkQueue<H: Work, K>(Arc<Shared<H, K>>);

struct Shared<H: Work, K> {
    state: Mutex<State<H, K>>,
    changed: Notify,
    group_of: GroupOf<K>,
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
    H: Work,
    K: Clone + Eq + Hash,
{
    queue: WorkQueue<H, K>,
    handler: H,
    key: K,
    settled: bool,
}

impl<H: Work, K> Clone for WorkQueue<H, K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<H: Work, K> Debug for WorkQueue<H, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkQueue").finish_non_exhaustive()
    }
}

impl<H, K> WorkQueue<H, K>
where
    H: Work,
    K: Clone + Eq + Hash,
{
    /// Empty; failures are retried after the waits of `policy`, and work is fair by `group_of`.
    pub(crate) fn new(policy: Policy, group_of: GroupOf<K>) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State::new(policy)),
            changed: Notify::new(),
            group_of,
        }))
    }

    /// Says that `handler` is to run for `key`: now, or once more if it runs at this moment. An
    /// entry that waits after a failure is tried soon too, but never without a pause.
    pub(crate) fn mark(&self, handler: H, key: &K) {
        let group = (self.0.group_of)(key);
        self.lock().mark(handler, key, group, Instant::now());
        self.0.changed.notify_waiters();
    }

    /// The waits of entries that fail for the first time from now on.
    pub(crate) fn set_policy(&self, policy: Policy) {
        self.lock().policy = policy;
    }

    /// The due entry of a share whose turn it is; waits for one. `places` is how many the share's
    /// worker runs at once: one group gets half of them, so that calls that hang for one project
    /// leave room for others.
    ///
    /// Cancel-safe: an entry is only taken when it is given.
    pub(crate) async fn next(&self, share: H::Share, places: usize) -> Lease<H, K> {
        let most = (places / 2).max(1);
        loop {
            let changed = self.0.changed.notified();
            tokio::pin!(changed);
            // Before looking: a mark between the look and the wait must not be missed.
            changed.as_mut().enable();
            let next_due = match self.lock().take(share, most, Instant::now()) {
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

    /// Forgets all that waits in a share. What runs ends as it will, and does not run again unless
    /// it is marked after this.
    pub(crate) fn clear(&self, share: H::Share) {
        self.lock().clear(share);
    }

    /// Number of entries of a handler: waiting, backing off or running.
    pub(crate) fn depth(&self, handler: H) -> usize {
        self.lock().depth(handler)
    }

    /// For how long the oldest entry of a handler has been due and not begun; none when none is
    /// due. One that backs off after a failure is not.
    pub(crate) fn oldest_due(&self, handler: H) -> Option<Duration> {
        let now = Instant::now();
        let since = self.lock().oldest_due(handler, now)?;
        Some(now.duration_since(since))
    }

    fn settle(&self, handler: H, key: &K, success: bool) -> Option<Failed> {
        let group = (self.0.group_of)(key);
        let now = Instant::now();
        let failed = self.lock().settle(handler, key, group, success, now);
        self.0.changed.notify_waiters();
        failed
    }

    fn lock(&self) -> MutexGuard<'_, State<H, K>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<H, K> Lease<H, K>
where
    H: Work,
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
    H: Work,
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
