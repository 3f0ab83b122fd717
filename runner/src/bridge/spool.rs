//! Messages that wait to be pushed, on disk until the server has them.
//!
//! In: messages, in order. Out: the same, one at a time, each until it is acknowledged. Bounded: a
//! full spool makes [`Spool::append`] wait. What is in it survives `kill -9` of the runner, ids
//! included, and is given out first after the next start. Nothing is flushed to the device: a
//! machine that loses power loses the pod's folder too.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ambient_shared::session::SessionId;
use tokio::sync::Notify;
use tracing::warn;
use uuid::Uuid;

use self::disk::Disk;
use super::format::EventType;

mod disk;
mod record;

/// Most bytes that wait: minutes of a talkative agent, and no danger to a small volume.
pub(super) const CAPACITY: u64 = 64 * 1024 * 1024;

/// Wait before the next try to read a disk that failed.
const READ_AGAIN: Duration = Duration::from_secs(1);

/// How often a spool that closes looks whether something still uses it.
const CLOSE_POLL: Duration = Duration::from_millis(5);

/// A message on its way to the server. Its id stays the same however often it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) id: Uuid,
    pub(super) kind: EventType,
    pub(super) payload: String,
}

/// The message whose turn it is.
#[derive(Debug, Clone)]
pub(super) struct Head {
    /// What [`Spool::acknowledge`] wants to know.
    pub(super) number: u64,
    pub(super) message: Arc<Outgoing>,
    /// Whether an earlier run of the runner left it here, and may have pushed it.
    pub(super) leftover: bool,
}

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpoolError {
    /// The folder cannot be made, read or written.
    #[error("cannot keep messages in {}", folder.display())]
    Folder {
        folder: PathBuf,
        source: std::io::Error,
    },
    /// Another runner uses it now.
    #[error("another runner of this session uses {}", folder.display())]
    InUse { folder: PathBuf },
}

/// One session's messages that wait to be pushed.
pub(super) struct Spool {
    disk: Arc<Mutex<Disk>>,
    changed: Notify,
    finished: AtomicBool,
}

impl Spool {
    /// Whether [`Spool::open`] will find a folder that it can use. Makes it.
    ///
    /// # Errors
    /// [`SpoolError`] when it cannot be used.
    pub(super) fn check(folder: &Path, session: &SessionId) -> Result<(), SpoolError> {
        disk::claim(&own_folder(folder, session)).map(drop)
    }

    /// Opens the session's own folder below `folder`, and takes up what an earlier run left.
    ///
    /// # Errors
    /// [`SpoolError`] when it cannot be used.
    pub(super) fn open(
        folder: &Path,
        session: &SessionId,
        capacity: u64,
    ) -> Result<Self, SpoolError> {
        let disk = Disk::open(&own_folder(folder, session), capacity)?;
        Ok(Self {
            disk: Arc::new(Mutex::new(disk)),
            changed: Notify::new(),
            finished: AtomicBool::new(false),
        })
    }

    /// Adds a message, waiting for room when the spool is full.
    ///
    /// Dropped while it waits for room, nothing was added; else the message is.
    pub(super) async fn append(&self, message: Outgoing) {
        let message = Arc::new(message);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let appended = {
                let message = Arc::clone(&message);
                self.with(move |disk| disk.append(&message)).await
            };
            if appended {
                self.changed.notify_waiters();
                return;
            }
            changed.await;
        }
    }

    /// The message whose turn it is, waiting for one; none when the spool is empty and finished.
    /// The same again until it is acknowledged.
    pub(super) async fn head(&self) -> Option<Head> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let finished = self.finished.load(Ordering::Acquire);
            match self.with(Disk::head).await {
                Ok(Some(head)) => return Some(head),
                Ok(None) if finished => return None,
                Ok(None) => changed.await,
                Err(error) => {
                    warn!(%error, "cannot read the spool; trying again");
                    tokio::time::sleep(READ_AGAIN).await;
                }
            }
        }
    }

    /// The server has this message, under this `seq`: it is not given out again.
    pub(super) async fn acknowledge(&self, number: u64, seq: i64) {
        self.with(move |disk| disk.acknowledge(number, seq)).await;
        self.changed.notify_waiters();
    }

    /// The `seq` of the message acknowledged last; 0 before the first.
    pub(super) async fn acknowledged_seq(&self) -> i64 {
        self.with(|disk| disk.acknowledged_seq()).await
    }

    /// How many messages and bytes wait.
    pub(super) async fn waiting(&self) -> (u64, u64) {
        self.with(|disk| disk.waiting()).await
    }

    /// Nothing will be added any more.
    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Waits until nobody uses the folder, so that the next spool can: work that was cut off goes
    /// on for a moment.
    pub(super) async fn close(self: Arc<Self>) {
        while Arc::strong_count(&self) > 1 || Arc::strong_count(&self.disk) > 1 {
            tokio::time::sleep(CLOSE_POLL).await;
        }
    }

    /// Runs on a thread of its own: a disk that hangs must not stop the handling of signals.
    async fn with<T: Send + 'static>(
        &self,
        use_it: impl FnOnce(&mut Disk) -> T + Send + 'static,
    ) -> T {
        let disk = Arc::clone(&self.disk);
        let done = tokio::task::spawn_blocking(move || {
            use_it(&mut disk.lock().unwrap_or_else(PoisonError::into_inner))
        });
        match done.await {
            Ok(value) => value,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime is shutting down, and this task with it.
            Err(_) => std::future::pending().await,
        }
    }
}

fn own_folder(folder: &Path, session: &SessionId) -> PathBuf {
    folder.join(session.hash().to_string())
}

#[cfg(test)]
pub(super) mod tests;
