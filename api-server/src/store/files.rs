//! The files of a database: its owner's alone, and one process's at a time.

use std::{
    fs::{self, File, Permissions, TryLockError},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ambient_shared::swap::SECRET_FILE;

use super::OpenError;

/// Takes the files of a database from other users, if an earlier version left them open.
///
/// # Errors
/// When one cannot be changed.
pub(super) fn keep_private(database: &Path) -> Result<(), OpenError> {
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let path = beside(database, suffix);
        let made_private = match fs::metadata(&path) {
            Ok(file) if file.permissions().mode() & 0o777 == SECRET_FILE => Ok(()),
            Ok(_) => fs::set_permissions(&path, Permissions::from_mode(SECRET_FILE)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        made_private.map_err(|source| OpenError::Private { path, source })?;
    }
    Ok(())
}

fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut path = database.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Locks the database for this process. The system lets go of it when the process ends, however.
///
/// # Errors
/// When another process has it.
pub(super) fn lock(database: &Path) -> Result<File, OpenError> {
    let path = beside(database, ".lock");
    let failed = |source| OpenError::Lock {
        path: path.clone(),
        source,
    };
    let file = private_file(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse {
            path: database.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// Opens a file for its owner alone, and makes it if need be. SQLite would make the database
/// readable for all, and gives its log the mode that the database has.
///
/// # Errors
/// When it cannot be opened.
pub(super) fn private_file(path: &Path) -> io::Result<File> {
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(SECRET_FILE)
        .open(path)
}
