//! Collects every child that ends: the agent, the commands of the runner, and orphans.
//!
//! One place waits for all: whoever waited for one child beside it would find its status taken.
//! Starting and collecting exclude each other, so a child cannot end before it is known.

use std::{
    collections::HashMap,
    io,
    process::{Child, Command},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use metrics::counter;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, oneshot},
};
use tracing::debug;

use super::sys::{self, Ended};
use crate::metrics as names;

/// The runner's children. Clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waited_for: Mutex<HashMap<i32, oneshot::Sender<Ended>>>,
    reaped: Notify,
}

/// A child whose end is waited for.
#[derive(Debug)]
pub(crate) struct Started {
    /// Its process id; nobody else's until the end is known.
    pub(crate) pid: i32,
    /// Its stdio. Never wait for it: that is the reaper's.
    pub(crate) child: Child,
    /// Tells how it ended.
    pub(crate) ended: oneshot::Receiver<Ended>,
}

impl Reaper {
    /// Starts a child and remembers it.
    ///
    /// # Errors
    /// Why it cannot be started.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Started> {
        let mut waited_for = self.lock();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let (sender, ended) = oneshot::channel();
        waited_for.insert(pid, sender);
        Ok(Started { pid, child, ended })
    }

    /// The children that somebody waits for.
    pub(crate) fn known(&self) -> Vec<i32> {
        self.lock().keys().copied().collect()
    }

    /// Waits until a child has been collected; may also return for one that was before.
    pub(crate) async fn reaped(&self) {
        self.0.reaped.notified().await;
    }

    /// Collects what has ended by now.
    pub(crate) fn reap(&self) {
        let mut waited_for = self.lock();
        while let Some((pid, ended)) = sys::reap_one() {
            counter!(names::REAPED).increment(1);
            if let Some(waiter) = waited_for.remove(&pid) {
                // Nobody listens any more when the wait had a limit.
                let _ = waiter.send(ended);
            } else {
                debug!(pid, ?ended, "orphan reaped");
            }
            self.0.reaped.notify_waiters();
        }
    }

    /// Collects whatever ends, for ever.
    pub(crate) async fn run(self, mut children: Signal) {
        // What ended before the signal was caught.
        self.reap();
        while children.recv().await.is_some() {
            self.reap();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Ended>>> {
        self.0
            .waited_for
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// SIGCHLD, from now on.
///
/// # Errors
/// When it cannot be caught.
pub(crate) fn children() -> io::Result<Signal> {
    signal(SignalKind::child())
}
