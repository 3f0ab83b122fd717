//! Sessions as processes on this machine (design section 6).
//!
//! In: what the controller asks. Out: a folder and a detached shim for each session, and their
//! state. All that matters is on disk or in a lock: a backend that is opened on the same folder
//! later knows what the one before knew.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use ambient_shared::{
    clock::Clock,
    retry::{Backoff, Policy},
    session::SessionId,
};
use futures_util::future::BoxFuture;
use metrics::{counter, gauge};
use rustix::process::Signal;
use tokio::{task::JoinSet, time::sleep};
use tracing::{info, warn};

use crate::metrics::{PROCESS_STARTS, PROCESSES};

use super::{
    Backend, BackendError, Credentials, DesiredRun, Observer, RunState, RunStatus, TokenTimes,
};
use entry::{Entry, blocking, failed, lock};
use folder::SessionFolder;
use launch::LaunchError;
use watch::Sight;

mod entry;
pub(crate) mod folder;
pub(crate) mod identity;
pub(crate) mod launch;
mod plan;
mod records;
pub(crate) mod tree;
mod watch;

pub use launch::{MissingProgram, Programs};

/// A sidecar looks at its file every second, whatever else wakes it.
const LAG: Duration = Duration::from_secs(1);

/// Waits before a folder that could not be looked at is looked at again.
const LOOK_AGAIN: Policy = Policy {
    initial: Duration::from_secs(1),
    max: Duration::from_secs(30),
    brief: Duration::MAX,
    longest_asked: Duration::from_secs(30),
};

/// What the process backend needs to know.
#[derive(Debug, Clone)]
pub struct ProcessSettings {
    /// Folder of the sessions' folders; made if missing.
    pub sessions: PathBuf,
    /// Our binaries.
    pub programs: Programs,
    /// Environment of every program that is started, below that of the run. Holds no secret.
    pub environment: BTreeMap<String, String>,
    /// REST base URL of the API server, for the sidecar.
    pub upstream: String,
    /// gRPC URL of the API server, for the sidecar.
    pub grpc_upstream: String,
    /// Whether runs end with this process.
    pub tied: bool,
}

/// Why the backend cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the sessions in {}", folder.display())]
pub struct OpenError {
    folder: PathBuf,
    source: io::Error,
}

/// The process backend.
pub struct ProcessBackend {
    inner: Arc<Inner>,
    /// One task for each run that has not ended; dropping the backend ends them, not the runs.
    watchers: Mutex<JoinSet<()>>,
}

struct Inner {
    settings: ProcessSettings,
    observer: Observer,
    clock: Clock,
    entries: Mutex<HashMap<SessionId, Arc<Entry>>>,
}

impl ProcessBackend {
    /// Opens the folder and adopts what is in it: runs whose shim lives go on, those that ended
    /// meanwhile are known to have ended, and what a lost shim left is ended.
    ///
    /// # Errors
    /// When the folder cannot be made or read.
    pub async fn open(
        settings: ProcessSettings,
        observer: Observer,
        clock: Clock,
    ) -> Result<Self, OpenError> {
        let sessions = settings.sessions.clone();
        let backend = Self {
            inner: Arc::new(Inner {
                settings,
                observer,
                clock,
                entries: Mutex::default(),
            }),
            watchers: Mutex::default(),
        };
        let found = blocking({
            let sessions = sessions.clone();
            move || {
                folder::private_dir(&sessions)?;
                SessionFolder::all(&sessions)
            }
        })
        .await
        .map_err(|source| OpenError {
            folder: sessions,
            source,
        })?;
        for folder in found {
            backend.adopt(folder);
        }
        Ok(backend)
    }

    /// Whether the shim of any session lives.
    pub fn any_alive(&self) -> bool {
        self.inner.entries().values().any(|entry| entry.is_alive())
    }

    /// The session's folder.
    pub fn session_folder(&self, id: &SessionId) -> PathBuf {
        SessionFolder::of(&self.inner.settings.sessions, id)
            .path()
            .to_owned()
    }

    /// Ends the session's run at once, without any grace.
    ///
    /// # Errors
    /// As [`Backend::stop`].
    pub async fn kill(&self, id: &SessionId) -> Result<(), BackendError> {
        match self.inner.entry(id) {
            Some(entry) => entry.signal(Signal::QUIT).await,
            None => Ok(()),
        }
    }

    fn adopt(&self, folder: SessionFolder) {
        let id = match folder.session() {
            Ok(Some(record)) => record.id,
            Ok(None) => {
                warn!(folder = %folder.path().display(), "no session's folder; left as it is");
                return;
            }
            Err(error) => {
                warn!(folder = %folder.path().display(), %error, "session cannot be read");
                return;
            }
        };
        let entry = self.inner.add(&id, folder);
        match entry.folder.token_times() {
            Ok(times) => *entry.token() = times,
            Err(error) => warn!(session = %id.hash(), %error, "token times cannot be read"),
        }
        match watch::look(&entry.folder) {
            Ok(Sight::Nothing) => {}
            Ok(Sight::Ended(state)) => *entry.state_mut() = Some(state),
            Ok(Sight::Alive(state)) => {
                info!(session = %id.hash(), generation = state.generation, "session adopted");
                *entry.state_mut() = Some(state);
                self.watch(entry);
            }
            Ok(Sight::Lost { generation }) => {
                *entry.state_mut() = Some(RunState {
                    generation,
                    status: RunStatus::Starting,
                });
                self.watch(entry);
            }
            Err(error) => {
                warn!(session = %id.hash(), %error, "session cannot be read; trying again");
                self.watch(entry);
            }
        }
    }

    /// Follows the entry's run from now on.
    fn watch(&self, entry: Arc<Entry>) {
        let inner = Arc::clone(&self.inner);
        let mut watchers = lock(&self.watchers);
        // Those that have ended make room.
        while watchers.try_join_next().is_some() {}
        watchers.spawn(async move { inner.follow(&entry).await });
    }

    /// Learns of a run that was started without our seeing it through: the call that started it
    /// was cut off, or it was only just starting when the control plane before us was killed.
    async fn look_again(&self, entry: &Arc<Entry>) -> Result<(), BackendError> {
        if entry.state().is_some() {
            return Ok(());
        }
        let folder = entry.folder.clone();
        let seen = blocking(move || watch::look(&folder))
            .await
            .map_err(|error| failed("look at a session", error))?;
        let state = match seen {
            Sight::Nothing => return Ok(()),
            Sight::Alive(state) | Sight::Ended(state) => state,
            Sight::Lost { generation } => RunState {
                generation,
                status: RunStatus::Starting,
            },
        };
        *entry.state_mut() = Some(state);
        self.watch(Arc::clone(entry));
        Ok(())
    }

    async fn start_run(
        &self,
        run: &DesiredRun,
        credentials: &Credentials,
    ) -> Result<(), BackendError> {
        let entry = self.inner.make(&run.id).await?;
        let _busy = entry.busy.lock().await;
        self.look_again(&entry).await?;
        if let Some(state) = entry.state() {
            if state.generation == run.generation {
                return Ok(());
            }
            if !matches!(state.status, RunStatus::Ended { .. }) {
                entry.signal(Signal::TERM).await?;
                return Err(BackendError::StillEnding);
            }
        }
        self.inner.write_credentials(&entry, credentials).await?;
        let record = plan::plan(&self.inner.settings, &entry.folder, run)?;
        let prepare = entry.folder.clone();
        blocking(move || prepare.prepare(&record))
            .await
            .map_err(|error| failed("prepare a session's folder", error))?;
        let environment = self.inner.settings.environment.iter();
        let launched =
            launch::launch(&self.inner.settings.programs, &entry.folder, environment).await;
        let result = if launched.is_ok() { "ok" } else { "failed" };
        counter!(PROCESS_STARTS, "result" => result).increment(1);
        match launched {
            Ok(()) => {}
            Err(LaunchError::Locked) => return Err(BackendError::StillEnding),
            Err(error) => return Err(failed("start a session's shim", error)),
        }
        info!(session = %run.id.hash(), generation = run.generation, "session started");
        *entry.state_mut() = Some(RunState {
            generation: run.generation,
            status: RunStatus::Starting,
        });
        self.inner.count();
        self.watch(Arc::clone(&entry));
        Ok(())
    }

    async fn remove_session(&self, id: &SessionId) -> Result<(), BackendError> {
        let Some(entry) = self.inner.entry(id) else {
            return Ok(());
        };
        let _busy = entry.busy.lock().await;
        self.look_again(&entry).await?;
        if entry.is_alive() {
            entry.signal(Signal::TERM).await?;
            return Err(BackendError::StillEnding);
        }
        let folder = entry.folder.clone();
        blocking(move || {
            // A shim that nobody has seen yet: one that was being started when we were killed.
            if folder.is_locked()? {
                return Ok(false);
            }
            folder.remove().map(|()| true)
        })
        .await
        .map_err(|error| failed("delete a session's folder", error))?
        .then_some(())
        .ok_or(BackendError::StillEnding)?;
        self.inner.entries().remove(id);
        info!(session = %id.hash(), "session removed");
        Ok(())
    }
}

impl Inner {
    fn entries(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<Entry>>> {
        lock(&self.entries)
    }

    fn entry(&self, id: &SessionId) -> Option<Arc<Entry>> {
        self.entries().get(id).map(Arc::clone)
    }

    fn add(&self, id: &SessionId, folder: SessionFolder) -> Arc<Entry> {
        let new = || Arc::new(Entry::new(id.clone(), folder));
        Arc::clone(self.entries().entry(id.clone()).or_insert_with(new))
    }

    /// The session's entry, with its folder on disk.
    async fn make(&self, id: &SessionId) -> Result<Arc<Entry>, BackendError> {
        if let Some(entry) = self.entry(id) {
            return Ok(entry);
        }
        let folder = SessionFolder::of(&self.settings.sessions, id);
        let made = blocking({
            let (folder, id) = (folder.clone(), id.clone());
            move || folder.create(&id)
        });
        made.await
            .map_err(|error| failed("make a session's folder", error))?;
        Ok(self.add(id, folder))
    }

    async fn write_credentials(
        &self,
        entry: &Entry,
        credentials: &Credentials,
    ) -> Result<(), BackendError> {
        let (folder, credentials) = (entry.folder.clone(), credentials.clone());
        let now = self.clock.now();
        let times = blocking(move || folder.write_credentials(&credentials, now))
            .await
            .map_err(|error| failed("write a session's token", error))?;
        *entry.token() = Some(times);
        Ok(())
    }

    /// Keeps the entry's state true until its run has ended.
    async fn follow(&self, entry: &Entry) {
        let mut backoff = Backoff::new(LOOK_AGAIN);
        loop {
            let folder = entry.folder.clone();
            let state = match blocking(move || watch::look(&folder)).await {
                Ok(Sight::Alive(state)) => state,
                Ok(Sight::Ended(state)) => return self.set(entry, Some(state)),
                // It never came to life, or its folder is gone: it may be started (again).
                Ok(Sight::Nothing) => return self.set(entry, None),
                Ok(Sight::Lost { generation }) => {
                    match watch::bury(&entry.folder, generation, &self.clock).await {
                        Ok(state) => {
                            warn!(session = %entry.id.hash(), "session's shim is lost");
                            return self.set(entry, Some(state));
                        }
                        Err(error) => {
                            warn!(session = %entry.id.hash(), %error, "leftovers cannot be ended");
                            sleep(backoff.next_wait()).await;
                            continue;
                        }
                    }
                }
                Err(error) => {
                    warn!(session = %entry.id.hash(), %error, "session cannot be looked at");
                    sleep(backoff.next_wait()).await;
                    continue;
                }
            };
            backoff.reset();
            self.set(entry, Some(state.clone()));
            watch::wait_for_change(&entry.folder, &state).await;
        }
    }

    /// Publishes how many shims live.
    fn count(&self) {
        let alive = self.entries().values().filter(|it| it.is_alive()).count();
        #[expect(clippy::cast_precision_loss, reason = "exact up to 2^52 sessions")]
        gauge!(PROCESSES).set(alive as f64);
    }

    fn set(&self, entry: &Entry, state: Option<RunState>) {
        let changed = {
            let mut known = entry.state_mut();
            let changed = *known != state;
            *known = state;
            changed
        };
        if changed {
            self.count();
            (self.observer)(&entry.id);
        }
    }
}

impl Backend for ProcessBackend {
    fn lag(&self) -> Duration {
        LAG
    }

    fn start<'a>(
        &'a self,
        run: &'a DesiredRun,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(self.start_run(run, credentials))
    }

    fn stop<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(async move {
            match self.inner.entry(id) {
                Some(entry) => entry.signal(Signal::TERM).await,
                None => Ok(()),
            }
        })
    }

    fn remove<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(self.remove_session(id))
    }

    fn run_state(&self, id: &SessionId) -> Option<RunState> {
        self.inner.entry(id)?.state()
    }

    fn token_times(&self, id: &SessionId) -> Option<TokenTimes> {
        let entry = self.inner.entry(id)?;
        // Somebody may have deleted it; it is then made again.
        entry.folder.has_secret().then(|| *entry.token())?
    }

    fn write_token<'a>(
        &'a self,
        id: &'a SessionId,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(async move {
            let entry = self.inner.entry(id).ok_or(BackendError::NotFound)?;
            let _busy = entry.busy.lock().await;
            // It may have been removed while we waited.
            if self.inner.entry(id).is_none() {
                return Err(BackendError::NotFound);
            }
            self.inner.write_credentials(&entry, credentials).await
        })
    }

    fn sessions(&self) -> Vec<SessionId> {
        self.inner.entries().keys().cloned().collect()
    }
}

impl std::fmt::Debug for ProcessBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessBackend")
            .field("settings", &self.inner.settings)
            .finish_non_exhaustive()
    }
}
