//! Sessions as processes on this machine (design section 6).
//!
//! In: what the controller asks. Out: a folder and a detached shim for each session, and their
//! state. All that matters is on disk or in a lock: a backend that is opened on the same folder
//! later knows what the one before knew.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use ambient_shared::{clock::Clock, session::SessionId};
use futures_util::future::BoxFuture;
use metrics::counter;
use rustix::process::Signal;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::metrics::PROCESS_STARTS;

use super::{
    Backend, BackendError, Credentials, DesiredRun, Observer, RunState, RunStatus, TokenTimes,
};
use entry::{Entry, blocking, failed, lock};
use folder::SessionFolder;
use watch::Sight;

mod entry;
pub(crate) mod folder;
mod follow;
pub(crate) mod identity;
pub(crate) mod launch;
mod plan;
mod records;
pub(crate) mod tree;
mod watch;

pub use launch::{MissingProgram, Programs};

/// A sidecar looks at its file every second, whatever else wakes it.
const LAG: Duration = Duration::from_secs(1);

/// A run of which nothing can be read now.
const UNKNOWN: RunState = RunState {
    generation: 0,
    status: RunStatus::Unknown,
    namespace: None,
    keypair: None,
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
    /// Folders whose session could not be read yet. Who asks for one by its id names it.
    unread: Mutex<HashSet<PathBuf>>,
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
                unread: Mutex::default(),
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
                warn!(folder = %folder.hash(), "no session's folder; left as it is");
                return;
            }
            Err(error) => {
                warn!(session = %folder.hash(), %error, "session cannot be read; trying again");
                lock(&self.inner.unread).insert(folder.path().to_owned());
                if let Some(id) = folder.id_of_name() {
                    self.inner.entry(&id);
                }
                let inner = Arc::clone(&self.inner);
                self.spawn(async move { inner.find_out(folder).await });
                return;
            }
        };
        let entry = self.inner.add(&id, folder);
        entry.read_token_times();
        match watch::look(&entry.folder) {
            Ok(Sight::Nothing) => {}
            Ok(Sight::Ended(state)) => {
                entry.begin(Some(state));
            }
            Ok(Sight::Alive(state)) => {
                info!(session = %id.hash(), generation = state.generation, "session adopted");
                self.watch(entry, state);
            }
            Ok(Sight::Lost { generation }) => self.watch(entry, starting(generation)),
            Err(error) => {
                warn!(session = %id.hash(), %error, "session cannot be looked at; trying again");
                self.watch(entry, UNKNOWN);
            }
        }
    }

    /// Follows the entry's run from this state on.
    fn watch(&self, entry: Arc<Entry>, state: RunState) {
        let inner = Arc::clone(&self.inner);
        let watch = entry.begin(Some(state));
        self.spawn(async move { inner.follow(&entry, watch).await });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut watchers = lock(&self.watchers);
        // Those that have ended make room.
        while watchers.try_join_next().is_some() {}
        watchers.spawn(task);
    }

    /// Learns of a run that was started without our seeing it through: it was only just starting
    /// when the control plane before us was killed. What is known to live is followed already, and
    /// what ended is final only for its own generation.
    async fn look_again(
        &self,
        entry: &Arc<Entry>,
        wanted: Option<u32>,
    ) -> Result<(), BackendError> {
        let known = entry.state();
        let is_settled = known.is_some_and(|state| match state.status {
            RunStatus::Unknown | RunStatus::Doomed(_) | RunStatus::Ending(_) => false,
            RunStatus::Starting { .. } | RunStatus::Running { .. } => true,
            RunStatus::Ended { .. } => wanted == Some(state.generation),
        });
        if is_settled {
            return Ok(());
        }
        let folder = entry.folder.clone();
        let seen = blocking(move || watch::look(&folder))
            .await
            .map_err(|error| failed("look at a session", error))?;
        match seen {
            Sight::Nothing if entry.is_unknown() => {
                entry.begin(None);
            }
            Sight::Nothing => {}
            Sight::Ended(state) => {
                entry.begin(Some(state));
            }
            Sight::Alive(state) => self.watch(Arc::clone(entry), state),
            Sight::Lost { generation } => self.watch(Arc::clone(entry), starting(generation)),
        }
        Ok(())
    }

    async fn start_run(
        &self,
        run: &DesiredRun,
        credentials: &Credentials,
    ) -> Result<(), BackendError> {
        let entry = self.inner.make(&run.id).await?;
        let _busy = entry.busy.lock().await;
        // It may have been removed while we waited.
        let current = self.inner.entry(&run.id);
        if !current.is_some_and(|current| Arc::ptr_eq(&current, &entry)) {
            return Err(BackendError::StillEnding);
        }
        self.look_again(&entry, Some(run.generation)).await?;
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
        // The lock goes in and comes out with the work: when this call is cut off, the folder stays
        // locked until the work on it has ended.
        let claim = entry.folder.clone();
        let claimed = blocking(move || claim.claim(&record))
            .await
            .map_err(|error| failed("prepare a session's folder", error))?;
        let session_lock = claimed.ok_or(BackendError::StillEnding)?;
        // Followed before it is there, so that it is seen whatever becomes of this call.
        self.watch(Arc::clone(&entry), starting(run.generation));
        let launched = launch::launch(
            &self.inner.settings.programs,
            &entry.folder,
            session_lock,
            self.inner.settings.environment.iter(),
        )
        .await;
        let result = if launched.is_ok() { "ok" } else { "failed" };
        counter!(PROCESS_STARTS, "result" => result).increment(1);
        if let Err(error) = launched {
            let folder = entry.folder.clone();
            if let Ok(Sight::Nothing) = blocking(move || watch::look(&folder)).await {
                entry.begin(None);
            }
            return Err(failed("start a session's shim", error));
        }
        info!(session = %run.id.hash(), generation = run.generation, "session started");
        self.inner.count();
        Ok(())
    }

    async fn remove_session(&self, id: &SessionId) -> Result<(), BackendError> {
        let Some(entry) = self.inner.entry(id) else {
            return Ok(());
        };
        let _busy = entry.busy.lock().await;
        self.look_again(&entry, None).await?;
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
        lock(&self.inner.unread).remove(entry.folder.path());
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
        if let Some(entry) = self.entries().get(id) {
            return Some(Arc::clone(entry));
        }
        let folder = SessionFolder::of(&self.settings.sessions, id);
        if !lock(&self.unread).contains(folder.path()) {
            return None;
        }
        // It says whose it is as well as its record would.
        let entry = self.add(id, folder);
        if entry.state().is_none() {
            entry.begin(Some(UNKNOWN));
        }
        Some(entry)
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

    fn sees_all(&self) -> bool {
        true
    }

    fn sessions(&self) -> Vec<SessionId> {
        self.inner.entries().keys().cloned().collect()
    }
}

fn starting(generation: u32) -> RunState {
    RunState {
        generation,
        status: RunStatus::Starting { waits_for: None },
        namespace: None,
        keypair: None,
    }
}

impl std::fmt::Debug for ProcessBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessBackend")
            .field("settings", &self.inner.settings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
