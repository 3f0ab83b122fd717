//! One session's folder: what is where in it, and the records that are kept there.
//!
//! ```text
//! session.json   which session this is          (control plane)
//! secret/        the mounted Secret              (control plane)
//! token.json     times of the token in it        (control plane)
//! run.json       how the run is to be started    (control plane)
//! lock           locked while the shim lives     (inherited by the shim)
//! shim.json      processes of the run            (shim)
//! exit.json      how the run ended               (shim; control plane when the shim is lost)
//! run/           token file, addresses, last words, "started"; made anew for each run
//! spool/         messages not yet acknowledged   (runner)
//! workspace/     the agent's working folder
//! *.log
//! ```

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use ambient_shared::{
    session::{SessionHash, SessionId},
    swap::{SECRET_DIR, SECRET_FILE, SecretVolume, write_atomic},
};
use serde::{Serialize, de::DeserializeOwned};

pub(crate) use super::records::{Exit, ExitRecord, ProgramRecord, RunRecord, ShimRecord};
use super::records::{SessionRecord, TokenRecord};
use crate::backend::{Credentials, TokenTimes};

/// File of the Secret with the API token.
const TOKEN: &str = "bot-token";
/// File of the Secret with the session's key.
const SESSION_KEY: &str = "session-key";

/// Longest session id that is its own folder name; a UUID has 36 characters.
const LONGEST_PLAIN_NAME: usize = 64;

/// Name prefix of a folder that is being made.
const NEW: &str = ".new-";
/// Name prefix of a folder that is being removed.
const GONE: &str = ".gone-";

/// A session's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionFolder(PathBuf);

impl SessionFolder {
    /// The folder at this path, whether it exists or not.
    pub(crate) fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder of a session below `sessions`. Ids are chosen by the API server: what is no
    /// plain name is replaced by its hash.
    pub(crate) fn of(sessions: &Path, id: &SessionId) -> Self {
        Self(sessions.join(folder_name(id)))
    }

    /// Makes the folder if it is missing, complete with its [`SessionRecord`] or not at all.
    pub(crate) fn create(&self, id: &SessionId) -> io::Result<()> {
        if self.0.exists() {
            return Ok(());
        }
        let sessions = self.0.parent().unwrap_or_else(|| Path::new("."));
        let new = Self(sessions.join(format!("{NEW}{}", uuid::Uuid::new_v4().simple())));
        private_dir(&new.0)?;
        new.write(
            &new.0.join("session.json"),
            &SessionRecord { id: id.clone() },
        )?;
        fs::rename(&new.0, &self.0)
    }

    /// Makes it vanish as a whole, then deletes what was in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let sessions = self.0.parent().unwrap_or_else(|| Path::new("."));
        let gone = sessions.join(format!("{GONE}{}", uuid::Uuid::new_v4().simple()));
        match fs::rename(&self.0, &gone) {
            Ok(()) => fs::remove_dir_all(gone),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// All folders below `sessions`; what an interrupted [`Self::create`] or [`Self::remove`] left
    /// is deleted.
    pub(crate) fn all(sessions: &Path) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(sessions)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(NEW) || name.starts_with(GONE) {
                fs::remove_dir_all(entry.path())?;
            } else if entry.file_type()?.is_dir() {
                found.push(Self(entry.path()));
            }
        }
        Ok(found)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// The volume with the session's token and key.
    pub(crate) fn secret(&self) -> SecretVolume {
        SecretVolume::new(self.0.join("secret"))
    }

    pub(crate) fn token_mount(&self) -> PathBuf {
        self.secret().folder().join(TOKEN)
    }

    pub(crate) fn session_key_mount(&self) -> PathBuf {
        self.secret().folder().join(SESSION_KEY)
    }

    pub(crate) fn workspace(&self) -> PathBuf {
        self.0.join("workspace")
    }

    pub(crate) fn spool(&self) -> PathBuf {
        self.0.join("spool")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Where the runner puts the agent's token.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.0.join("run/token")
    }

    /// Where the sidecar writes its addresses.
    pub(crate) fn sidecar_addresses(&self) -> PathBuf {
        self.0.join("run/sidecar.json")
    }

    /// Where the runner writes why it ends.
    pub(crate) fn termination_log(&self) -> PathBuf {
        self.0.join("run/termination-log")
    }

    /// Made by the runner when it has started the agent.
    pub(crate) fn started(&self) -> PathBuf {
        self.0.join("run/started")
    }

    pub(crate) fn agent_log(&self) -> PathBuf {
        self.0.join("agent.log")
    }

    pub(crate) fn runner_log(&self) -> PathBuf {
        self.0.join("runner.log")
    }

    pub(crate) fn sidecar_log(&self) -> PathBuf {
        self.0.join("sidecar.log")
    }

    pub(crate) fn shim_log(&self) -> PathBuf {
        self.0.join("shim.log")
    }

    pub(crate) fn session(&self) -> io::Result<Option<SessionRecord>> {
        read(&self.0.join("session.json"))
    }

    pub(crate) fn run(&self) -> io::Result<Option<RunRecord>> {
        read(&self.0.join("run.json"))
    }

    /// The processes of the run of this generation.
    pub(crate) fn shim(&self, generation: u32) -> io::Result<Option<ShimRecord>> {
        let record = self.any_shim()?;
        Ok(record.filter(|record| record.generation == generation))
    }

    /// The processes of the last run. While the lock is held it is that of who holds it, as a
    /// record is deleted under the lock before another run starts.
    pub(crate) fn any_shim(&self) -> io::Result<Option<ShimRecord>> {
        read(&self.0.join("shim.json"))
    }

    /// The generation of the last run when `run.json` does not tell.
    pub(crate) fn generation_of_leftovers(&self) -> Option<u32> {
        let shim = self.any_shim().ok().flatten();
        let exit = || read(&self.0.join("exit.json")).ok().flatten();
        shim.map(|record| record.generation)
            .or_else(|| exit().map(|record: ExitRecord| record.generation))
    }

    /// The session whose folder has this name, when the name tells.
    pub(crate) fn id_of_name(&self) -> Option<SessionId> {
        let id = SessionId::parse(self.0.file_name()?.to_str()?).ok()?;
        (Self::of(self.0.parent()?, &id) == *self).then_some(id)
    }

    /// What logs show of a folder whose session is not known: its name may be the id.
    pub(crate) fn hash(&self) -> SessionHash {
        SessionHash::of(&self.0.file_name().unwrap_or_default().to_string_lossy())
    }

    /// How the run of this generation ended.
    pub(crate) fn exit(&self, generation: u32) -> io::Result<Option<ExitRecord>> {
        let record: Option<ExitRecord> = read(&self.0.join("exit.json"))?;
        Ok(record.filter(|record| record.generation == generation))
    }

    pub(crate) fn write_shim(&self, record: &ShimRecord) -> io::Result<()> {
        self.write(&self.0.join("shim.json"), record)
    }

    pub(crate) fn write_exit(&self, record: &ExitRecord) -> io::Result<()> {
        self.write(&self.0.join("exit.json"), record)
    }

    /// Takes the lock and then makes room for a run. The lock goes on to the shim. None when a shim
    /// holds it, or one of this generation did: nothing was touched then; look again.
    pub(crate) fn claim(&self, run: &RunRecord) -> io::Result<Option<fs::File>> {
        let lock = self.open_lock()?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
        let shim = unless_malformed(self.shim(run.generation))?;
        if shim.is_some() || unless_malformed(self.exit(run.generation))?.is_some() {
            return Ok(None);
        }
        self.prepare(run)?;
        Ok(Some(lock))
    }

    /// Makes room for a run: everything of an earlier one goes, but spool and workspace stay. The
    /// record of the run comes last; without it there is no run. For who holds the lock.
    pub(crate) fn prepare(&self, run: &RunRecord) -> io::Result<()> {
        for file in ["run.json", "shim.json", "exit.json"] {
            remove_if_there(fs::remove_file(self.0.join(file)))?;
        }
        let runtime = self.0.join("run");
        remove_if_there(fs::remove_dir_all(&runtime))?;
        for folder in [&runtime, &self.workspace(), &self.spool()] {
            private_dir(folder)?;
        }
        // The runner writes its last words only where Kubernetes, or we, made the file.
        write_atomic(&self.termination_log(), b"", SECRET_FILE)?;
        self.write(&self.0.join("run.json"), run)
    }

    /// Replaces the Secret. Its times come second: after a crash in between the token looks older
    /// than it is, and is renewed too early rather than too late.
    pub(crate) fn write_credentials(
        &self,
        credentials: &Credentials,
        now: SystemTime,
    ) -> io::Result<TokenTimes> {
        self.secret().write(&[
            (TOKEN, credentials.token.expose().as_bytes()),
            (SESSION_KEY, credentials.session_key.expose().as_bytes()),
        ])?;
        let expires_at = credentials.token.expires_at();
        // Of one that never expires it matters when it was written: under an earlier configuration?
        let issued_at = expires_at.and(credentials.token.issued_at()).unwrap_or(now);
        let times = TokenTimes {
            issued_at,
            expires_at,
            root: Some(credentials.root),
        };
        let record = TokenRecord {
            issued_at: times.issued_at,
            expires_at: times.expires_at,
            root: times.root,
        };
        self.write(&self.0.join("token.json"), &record)?;
        Ok(times)
    }

    /// The times of the token in the Secret; none without a Secret.
    pub(crate) fn token_times(&self) -> io::Result<Option<TokenTimes>> {
        if !self.has_secret() {
            return Ok(None);
        }
        let record: Option<TokenRecord> = read(&self.0.join("token.json"))?;
        Ok(record.map(|record| TokenTimes {
            issued_at: record.issued_at,
            expires_at: record.expires_at,
            root: record.root,
        }))
    }

    /// Whether the Secret is there; somebody may have deleted it.
    pub(crate) fn has_secret(&self) -> bool {
        self.token_mount().exists() && self.session_key_mount().exists()
    }

    /// When the runner started the agent; none before.
    pub(crate) fn started_at(&self) -> Option<SystemTime> {
        fs::metadata(self.started()).ok()?.modified().ok()
    }

    /// The runner's last words, when it left any. At most 4 KiB, as in Kubernetes.
    pub(crate) fn last_words(&self) -> Option<String> {
        const MOST: usize = 4096;
        let words = fs::read(self.termination_log()).ok()?;
        let words = String::from_utf8_lossy(&words[..words.len().min(MOST)]);
        let words = words.trim();
        (!words.is_empty()).then(|| words.to_owned())
    }

    /// Opens the lock file, making it if need be.
    pub(crate) fn open_lock(&self) -> io::Result<fs::File> {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(SECRET_FILE)
            .open(self.lock())
    }

    /// Whether a shim holds the lock.
    pub(crate) fn is_locked(&self) -> io::Result<bool> {
        let lock = match fs::File::open(self.lock()) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        match lock.try_lock_shared() {
            Ok(()) => {
                // Not left to closing: a child being started may have a copy of it for a moment.
                lock.unlock()?;
                Ok(false)
            }
            Err(fs::TryLockError::WouldBlock) => Ok(true),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn write(&self, path: &Path, record: &impl Serialize) -> io::Result<()> {
        debug_assert!(path.starts_with(&self.0));
        let mut json = serde_json::to_vec_pretty(record)?;
        json.push(b'\n');
        write_atomic(path, &json, SECRET_FILE)
    }
}

/// Opens a log for appending, readable for its owner only.
pub(crate) fn open_log(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(SECRET_FILE)
        .open(path)
}

/// Makes a folder, and those above it, that only its owner may enter.
pub(crate) fn private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(SECRET_DIR)
        .create(path)
}

fn folder_name(id: &SessionId) -> String {
    let plain = id.as_str().len() <= LONGEST_PLAIN_NAME
        && id
            .as_str()
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !id.as_str().starts_with('-');
    if plain {
        return id.as_str().to_owned();
    }
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, id.as_str().as_bytes());
    digest
        .as_ref()
        .iter()
        .fold("id_".to_owned(), |mut name, byte| {
            use std::fmt::Write as _;
            // Writing to a String cannot fail.
            let _ = write!(name, "{byte:02x}");
            name
        })
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(json) => serde_json::from_slice(&json)
            .map(Some)
            .map_err(|error| malformed(path, &error)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Says what and where, but neither the folder, whose name may be the session's id, nor what is
/// in the file.
fn malformed(path: &Path, error: &serde_json::Error) -> io::Error {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (line, column) = (error.line(), error.column());
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{name} is malformed at line {line}, column {column}"),
    )
}

/// Whether a file could be read, but is no record. Reading it again cannot help then.
pub(crate) fn is_malformed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
}

/// A malformed record says nothing.
fn unless_malformed<T>(record: io::Result<Option<T>>) -> io::Result<Option<T>> {
    match record {
        Err(error) if is_malformed(&error) => Ok(None),
        record => record,
    }
}

fn remove_if_there(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
