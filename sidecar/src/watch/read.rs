//! One safe read of a token file.
//!
//! In: a path that anybody may have put anything at. Out: a [`Token`] or why there is none. It
//! never blocks on a pipe, never reads more than the limit, and wipes what it read.

use std::{
    fs,
    io::{ErrorKind, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use ambient_shared::token::{InvalidToken, MAX_LENGTH, Token};
use rustix::fs::{OFlags, StatVfsMountFlags, statvfs};
use zeroize::Zeroizing;

/// Why a token file gives no token. What is in the file is never part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReadError {
    /// It cannot be opened or read: missing, forbidden, a loop of symlinks.
    #[error("{0}")]
    Io(ErrorKind),
    /// A folder, pipe, socket or device.
    #[error("not a regular file")]
    NotAFile,
    /// Larger than any token.
    #[error("more than {MAX_LENGTH} bytes")]
    TooLong,
    /// Bytes that are no text.
    #[error("not UTF-8")]
    NotText,
    /// Empty, or not fit for a header.
    #[error(transparent)]
    Invalid(#[from] InvalidToken),
}

impl ReadError {
    /// A word for metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Io(ErrorKind::NotFound) => "missing",
            Self::Io(ErrorKind::PermissionDenied) => "denied",
            Self::Io(_) => "io",
            Self::NotAFile => "not_a_file",
            Self::TooLong => "too_long",
            Self::NotText => "not_text",
            Self::Invalid(InvalidToken::Empty) => "empty",
            Self::Invalid(_) => "invalid",
        }
    }
}

/// Reads a token file. Blocks for as long as the file system does.
///
/// # Errors
/// [`ReadError`].
pub(crate) fn read_token(path: &Path) -> Result<Token, ReadError> {
    let io = |error: std::io::Error| ReadError::Io(error.kind());
    let file = fs::OpenOptions::new()
        .read(true)
        // A pipe without a writer would block the open for ever.
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)
        .map_err(io)?;
    let about = file.metadata().map_err(io)?;
    if !about.is_file() {
        return Err(ReadError::NotAFile);
    }
    let limit = MAX_LENGTH as u64;
    if about.len() > limit {
        return Err(ReadError::TooLong);
    }
    // Large enough from the start: a vector that grows leaves copies behind.
    let capacity = usize::try_from(about.len() + 1).unwrap_or(MAX_LENGTH + 1);
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() > MAX_LENGTH {
        return Err(ReadError::TooLong);
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| ReadError::NotText)?;
    Ok(Token::new(text, None)?)
}

/// Which folder a path leads to just now: two folders of the same name are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FolderId {
    device: u64,
    inode: u64,
}

/// The folder at `path`, through symlinks; none when there is none.
pub(crate) fn folder_id(path: &Path) -> Option<FolderId> {
    let about = fs::metadata(path).ok()?;
    about.is_dir().then(|| FolderId {
        device: about.dev(),
        inode: about.ino(),
    })
}

/// Whether the file is one that nobody can update: a file itself (not a symlink through `..data`)
/// in a read-only mount. That is how a subPath mount looks, which the kubelet leaves as it was
/// when the container started.
pub(crate) fn is_frozen(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|about| about.is_file())
        && statvfs(path).is_ok_and(|mount| mount.f_flag.contains(StatVfsMountFlags::RDONLY))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use ambient_shared::swap::SecretVolume;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_token_file_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bot-token");
        let read = |content: &[u8]| {
            fs::write(&path, content).unwrap();
            read_token(&path)
        };

        assert_eq!(read(b"good\n").unwrap().expose(), "good");
        assert_eq!(read(b"").unwrap_err().label(), "empty");
        assert_eq!(read(b" \n").unwrap_err().label(), "empty");
        assert_eq!(read(b"a\xff").unwrap_err(), ReadError::NotText);
        assert_eq!(read(b"two words").unwrap_err().label(), "invalid");
        assert_eq!(
            read(&vec![b'x'; MAX_LENGTH]).unwrap().expose().len(),
            MAX_LENGTH
        );
        assert_eq!(
            read(&vec![b'x'; MAX_LENGTH + 1]).unwrap_err(),
            ReadError::TooLong
        );
        assert_eq!(read_token(dir.path()).unwrap_err(), ReadError::NotAFile);
        fs::remove_file(&path).unwrap();
        assert_eq!(read_token(&path).unwrap_err().label(), "missing");
        symlink("bot-token", &path).unwrap();
        assert_eq!(read_token(&path).unwrap_err().label(), "io");
    }

    #[test]
    fn a_pipe_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bot-token");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read_token(&path).unwrap_err(), ReadError::NotAFile);
    }

    #[test]
    fn a_volume_of_files_is_not_frozen() {
        let dir = tempfile::tempdir().unwrap();
        SecretVolume::new(dir.path())
            .write(&[("bot-token", b"t")])
            .unwrap();
        assert!(!is_frozen(&dir.path().join("bot-token")));
        fs::write(dir.path().join("plain"), "t").unwrap();
        assert!(!is_frozen(&dir.path().join("plain")));
        assert!(!is_frozen(&dir.path().join("missing")));
    }

    #[test]
    fn a_folder_put_in_the_place_of_another_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        assert_eq!(folder_id(&path), None);
        fs::create_dir(&path).unwrap();
        let first = folder_id(&path);
        fs::rename(&path, dir.path().join("old")).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(first.is_some() && folder_id(&path).is_some());
        assert_ne!(folder_id(&path), first);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Whatever bytes are in the file: no panic, and what is given out is the file's text
        /// without the white space around it, and fit for a header.
        #[test]
        fn any_bytes_give_a_token_or_an_error(bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "[ \\t\\r\\n]{0,3}[!-~]{0,80}[ \\t\\r\\n]{0,3}".prop_map(String::into_bytes),
        ]) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("bot-token");
            fs::write(&path, &bytes).unwrap();
            match read_token(&path) {
                Ok(token) => {
                    let text = String::from_utf8(bytes).unwrap();
                    prop_assert_eq!(token.expose(), text.trim());
                    prop_assert!(http::HeaderValue::from_str(token.expose()).is_ok());
                }
                Err(error) => {
                    let text = String::from_utf8_lossy(&bytes).trim().to_owned();
                    let fit = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
                    prop_assert!(!fit, "{error}: {text:?}");
                }
            }
        }
    }
}
