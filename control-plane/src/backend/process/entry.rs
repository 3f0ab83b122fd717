//! One session as the backend knows it, and what is done to it by signals.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ambient_shared::session::SessionId;
use rustix::process::Signal;
use tokio::task::spawn_blocking;

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
    /// Its run, as last seen.
    pub(super) state: Mutex<Option<RunState>>,
    /// The token in its Secret.
    pub(super) token: Mutex<Option<TokenTimes>>,
}

impl Entry {
    pub(super) fn new(id: SessionId, folder: SessionFolder) -> Self {
        Self {
            id,
            folder,
            busy: tokio::sync::Mutex::new(()),
            state: Mutex::new(None),
            token: Mutex::new(None),
        }
    }

    pub(super) fn state(&self) -> Option<RunState> {
        lock(&self.state).clone()
    }

    /// Whether a run of it has not ended, as far as we have seen.
    pub(super) fn is_alive(&self) -> bool {
        self.state()
            .is_some_and(|state| !matches!(state.status, RunStatus::Ended { .. }))
    }

    pub(super) fn state_mut(&self) -> MutexGuard<'_, Option<RunState>> {
        lock(&self.state)
    }

    pub(super) fn token(&self) -> MutexGuard<'_, Option<TokenTimes>> {
        lock(&self.token)
    }

    /// Signals the shim, if it lives.
    pub(super) async fn signal(&self, signal: Signal) -> Result<(), BackendError> {
        let Some(state) = self.state() else {
            return Ok(());
        };
        let folder = self.folder.clone();
        blocking(move || {
            if !folder.is_locked()? {
                return Ok(());
            }
            // A shim that is about to write its record is signalled when asked again.
            let record = folder
                .shim(state.generation)?
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
