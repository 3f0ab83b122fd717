//! `ambient-runner install DIR`: an image from scratch has no `cp`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use ambient_shared::swap::write_atomic;

/// Name of the copy.
const NAME: &str = "ambient-runner";

/// Why the program could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The running program's file cannot be read.
    #[error("cannot read this program from /proc/self/exe")]
    Read(#[source] io::Error),
    /// The folder is missing, full or read-only.
    #[error("cannot write {}", path.display())]
    Write {
        /// The copy.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
}

/// Copies the running program to `folder`/`ambient-runner`, mode 0755, whole or not at all. A copy
/// that is there already is replaced, even while it runs.
///
/// # Errors
/// [`InstallError`]; what was there before is untouched.
pub fn install(folder: &Path) -> Result<PathBuf, InstallError> {
    let path = folder.join(NAME);
    let own = fs::read("/proc/self/exe").map_err(InstallError::Read)?;
    match write_atomic(&path, &own, 0o755) {
        Ok(()) => Ok(path),
        Err(source) => Err(InstallError::Write { path, source }),
    }
}
