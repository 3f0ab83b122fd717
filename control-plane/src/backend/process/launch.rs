//! Starting a session's shim so that it outlives this process.
//!
//! The lock is taken before anything of the run is prepared, and inherited by the shim as its
//! stdin: a lock of this kind belongs to the open file, so it is held without a gap from before the
//! shim exists until it ends, and no second shim can start in between.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use ambient_shared::harden;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

use super::folder::{SessionFolder, open_log};

/// What the shim writes to its stdout once its record is on disk.
pub(crate) const READY: &str = "ready";

/// Longest wait for that: it reads and writes one small file, but a machine can be slow.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Longest answer that is read.
const MAX_ANSWER: u64 = 4096;

/// Where our programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// `ambient-control-plane`, whose hidden subcommand is the shim.
    pub control_plane: PathBuf,
    /// `ambient-runner`.
    pub runner: PathBuf,
    /// `ambient-sidecar`.
    pub sidecar: PathBuf,
}

/// Why a program of ours is not there.
#[derive(Debug, thiserror::Error)]
pub enum MissingProgram {
    /// The machine does not say where this program is.
    #[error("cannot find out where this program is")]
    Own(#[from] io::Error),
    /// Runner or sidecar.
    #[error("{} is missing; it must lie beside ambient-control-plane", .0.display())]
    Beside(PathBuf),
}

impl Programs {
    /// Finds the runner and the sidecar beside this program's own binary.
    ///
    /// # Errors
    /// When one of them is not there.
    pub fn find() -> Result<Self, MissingProgram> {
        let control_plane = std::env::current_exe()?;
        let folder = control_plane.parent().unwrap_or_else(|| Path::new("/"));
        let beside = |name: &str| {
            let path = folder.join(name);
            path.is_file()
                .then(|| path.clone())
                .ok_or(MissingProgram::Beside(path))
        };
        Ok(Self {
            runner: beside("ambient-runner")?,
            sidecar: beside("ambient-sidecar")?,
            control_plane,
        })
    }
}

/// Why a shim was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    /// Something below failed.
    #[error("cannot start the session's shim")]
    Io(#[from] io::Error),
    /// The shim said why it cannot.
    #[error("the session's shim refuses to start: {0}")]
    Refused(String),
    /// It said nothing in time.
    #[error("the session's shim did not start within {} s", READY_LIMIT.as_secs())]
    Silent,
}

/// Starts the shim of a folder that was [claimed](SessionFolder::claim), handing it the lock, and
/// returns when its record is on disk.
///
/// Not cancel-safe on purpose: a shim that was started runs on whatever becomes of the caller, and
/// its lock tells so.
pub(crate) async fn launch(
    programs: &Programs,
    folder: &SessionFolder,
    lock: File,
    environment: impl Iterator<Item = (&String, &String)>,
) -> Result<(), LaunchError> {
    let mut shim = Command::new(&programs.control_plane)
        .arg("shim")
        .arg("--folder")
        .arg(folder.path())
        .arg("--open-files")
        .arg(harden::open_files_before().to_string())
        .env_clear()
        .envs(environment)
        .current_dir(folder.path())
        .stdin(Stdio::from(lock))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(open_log(&folder.shim_log())?))
        .kill_on_drop(false)
        .spawn()?;
    let mut answer = String::new();
    if let Some(stdout) = shim.stdout.take() {
        let mut stdout = BufReader::new(stdout.take(MAX_ANSWER));
        let Ok(read) = timeout(READY_LIMIT, stdout.read_line(&mut answer)).await else {
            shim.start_kill()?;
            return Err(LaunchError::Silent);
        };
        read?;
    }
    match answer.trim() {
        READY => Ok(()),
        // Its last words are in its log.
        "" => Err(LaunchError::Refused("see shim.log".to_owned())),
        why => Err(LaunchError::Refused(why.to_owned())),
    }
}
