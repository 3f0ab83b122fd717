//! Keeping a session's logs small.
//!
//! The programs append to files that they hold open, so a log that has grown too large is copied
//! to `NAME.1` and cut to nothing in place. What is written in between is lost; logs may be.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::warn;

use crate::backend::process::folder::SessionFolder;

/// A log larger than this is cut: two of them for each of four logs are 128 MiB a session.
const LARGEST: u64 = 16 * 1024 * 1024;

/// Cuts what has grown too large.
pub(super) fn keep_small(folder: &SessionFolder) {
    for log in [
        folder.agent_log(),
        folder.runner_log(),
        folder.sidecar_log(),
        folder.shim_log(),
    ] {
        if let Err(error) = cut(&log, LARGEST) {
            // The folder's name may be the session's id.
            let log = log.file_name().unwrap_or_default().to_string_lossy();
            warn!(%log, %error, "log cannot be cut");
        }
    }
}

fn cut(log: &Path, largest: u64) -> io::Result<()> {
    let length = match fs::metadata(log) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if length <= largest {
        return Ok(());
    }
    fs::copy(log, earlier(log))?;
    fs::OpenOptions::new().write(true).open(log)?.set_len(0)
}

fn earlier(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::backend::process::folder::open_log;

    #[test]
    fn a_large_log_starts_anew_for_its_open_writer() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("runner.log");
        let mut writer = open_log(&log).unwrap();
        writer.write_all(b"0123456789").unwrap();
        cut(&log, 10).unwrap();
        assert!(!earlier(&log).exists());

        writer.write_all(b"x").unwrap();
        cut(&log, 10).unwrap();
        writer.write_all(b"new").unwrap();

        assert_eq!(fs::read(&log).unwrap(), b"new");
        assert_eq!(fs::read(earlier(&log)).unwrap(), b"0123456789x");
    }
}
