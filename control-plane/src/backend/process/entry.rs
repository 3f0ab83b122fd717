//! One session as the backend knows it, and what is done to it by signals.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ambient_shared::session::SessionId;
use rustix::process::Signal;
use tokio::task::spawn_blocking;
use tracing::warn;

use super::folder::SessionFolder;
use crate::backend::{BackendError, RunState, RunStatus, TokenTimes};

/// One session.
pub(super) struct Entry {
    /// Which.
    pub(super) id: SessionId,
    /// Where.
    pub(super) folder: SessionFolder,
    /// Held while something is done to the session: one thing at a time.
    pub(super) busy: tokio::sync::Mutex<()>,
    seen: Mutex<Seen>,
    /// The token in its Secret.
    pub(super) token: Mutex<Option<TokenTimes>>,
}

/// Its run, as last seen.
#[derive(Default)]
struct Seen {
    state: Option<RunState>,
    /// Number of the watch that may say more; an earlier one has nothing to say any more.
    watch: u64,
}

impl Entry {
    pub(super) fn new(id: SessionId, folder: SessionFolder) -> Self {
        Self {
            id,
            folder,
            busy: tokio::sync::Mutex::new(()),
            seen: Mutex::default(),
            token: Mutex::new(None),
        }
    }

    pub(super) fn state(&self) -> Option<RunState> {
        lock(&self.seen).state.clone()
    }

    /// Whether a run of it has not ended, as far as we have seen.
    pub(super) fn is_alive(&self) -> bool {
        self.state()
            .is_some_and(|state| !matches!(state.status, RunStatus::Ended { .. }))
    }

    /// Whether nothing could be read of it yet.
    pub(super) fn is_unknown(&self) -> bool {
        self.state()
            .is_some_and(|state| state.status == RunStatus::Unknown)
    }

    /// Replaces what is known. Gives the number of the watch that may go on from there; all
    /// earlier ones end.
    pub(super) fn begin(&self, state: Option<RunState>) -> u64 {
        let mut seen = lock(&self.seen);
        seen.state = state;
        seen.watch += 1;
        seen.watch
    }

    /// What a watch has seen; whether that is new. None when another watch has taken over.
    pub(super) fn saw(&self, watch: u64, state: Option<RunState>) -> Option<bool> {
        let mut seen = lock(&self.seen);
        if seen.watch != watch {
            return None;
        }
        let changed = seen.state != state;
        seen.state = state;
        Some(changed)
    }

    /// Whether this watch is the last one.
    pub(super) fn is_watched_by(&self, watch: u64) -> bool {
        lock(&self.seen).watch == watch
    }

    pub(super) fn token(&self) -> MutexGuard<'_, Option<TokenTimes>> {
        lock(&self.token)
    }

    /// Learns which token is in the Secret.
    pub(super) fn read_token_times(&self) {
        match self.folder.token_times() {
            Ok(times) => *self.token() = times,
            Err(error) => {
                warn!(session = %self.id.hash(), %error, "token times cannot be read");
            }
        }
    }

    /// Signals the shim, if it lives.
    pub(super) async fn signal(&self, signal: Signal) -> Result<(), BackendError> {
        if self.state().is_none() {
            return Ok(());
        }
        let folder = self.folder.clone();
        blocking(move || {
            if !folder.is_locked()? {
                return Ok(());
            }
            // A shim that is about to write its record is signalled when asked again.
            let record = folder
                .any_shim()?
                .ok_or_else(|| io::Error::other("the shim is only just starting"))?;
            record.shim.signal(signal).map(|_| ())
        })
        .await
        .map_err(|error| failed("signal a session's shim", error))
    }
}

/// Runs file work off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error)),
    }
}

pub(super) fn failed(
    action: &'static str,
    source: impl std::error::Error + Send + Sync + 'static,
) -> BackendError {
    BackendError::Failed {
        action,
        source: Box::new(source),
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
