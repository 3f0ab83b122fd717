//! Where the API token comes from: the endpoint, else the mounted file, else `BOT_TOKEN`.

use std::{
    io,
    path::{Path, PathBuf},
};

use ambient_shared::{
    exchange::Exchange,
    proof::SessionKey,
    token::{InvalidToken, MAX_LENGTH, Token},
};
use tokio::io::AsyncReadExt as _;

mod handle;
pub(crate) mod handover;
pub(crate) mod refresher;

/// Largest session key that is read: 44 characters are written, white space may be around them.
const MAX_KEY: u64 = 4096;

/// The places a token can come from, in the order in which they are asked (contract section 3).
#[derive(Debug)]
pub(crate) struct Sources {
    /// Pull.
    pub(crate) endpoint: Option<Exchange>,
    /// The session's key for that, which the control plane may have replaced.
    pub(crate) key_file: PathBuf,
    /// Push: the file that the control plane has rewritten.
    pub(crate) file: PathBuf,
    /// `BOT_TOKEN`.
    pub(crate) fixed: Option<Token>,
}

/// Which source a token came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The token endpoint.
    Endpoint,
    /// The mounted file.
    File,
    /// `BOT_TOKEN`.
    Fixed,
}

impl Source {
    /// For logs and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::File => "file",
            Self::Fixed => "fixed",
        }
    }
}

/// Why a mounted file gave nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// Not there, or not readable.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        source: io::Error,
    },
    /// More than fits.
    #[error("{} has more than {limit} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Most bytes that are read.
        limit: u64,
    },
    /// Not UTF-8.
    #[error("{} is not text", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// Text, but no token.
    #[error("{} holds no token", path.display())]
    NotAToken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: InvalidToken,
    },
}

/// Reads the mounted token. Expired ones are given too: whoever asks knows the time.
///
/// # Errors
/// When there is no file, or it holds no token.
pub(crate) async fn read_token(path: &Path) -> Result<Token, ReadError> {
    let text = read_bounded(path, MAX_LENGTH as u64).await?;
    Token::new(&text, None).map_err(|source| ReadError::NotAToken {
        path: path.to_owned(),
        source,
    })
}

/// Reads the session's key. A missing file is no error: existing control planes mount none.
///
/// # Errors
/// When the file is there, but is no text of a sane length.
pub(crate) async fn read_session_key(path: &Path) -> Result<Option<SessionKey>, ReadError> {
    match read_bounded(path, MAX_KEY).await {
        Ok(text) => Ok(SessionKey::from_text(&text)),
        Err(ReadError::Io { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn read_bounded(path: &Path, limit: u64) -> Result<String, ReadError> {
    let path = path.to_owned();
    let broken = |source| ReadError::Io {
        path: path.clone(),
        source,
    };
    let file = tokio::fs::File::open(&path).await.map_err(broken)?;
    let mut content = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut content)
        .await
        .map_err(broken)?;
    if content.len() as u64 > limit {
        return Err(ReadError::TooLong { path, limit });
    }
    String::from_utf8(content).map_err(|_| ReadError::NotText { path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_only_as_far_as_a_token_can_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bot-token");
        assert!(matches!(
            read_token(&path).await.unwrap_err(),
            ReadError::Io { .. }
        ));
        for (content, text) in [
            (vec![b'x'; MAX_LENGTH + 1], "more than 65536 bytes"),
            (vec![0xff, 0xfe], "is not text"),
            (b" \n".to_vec(), "holds no token"),
            (b"two words".to_vec(), "holds no token"),
        ] {
            std::fs::write(&path, content).unwrap();
            let error = read_token(&path).await.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        std::fs::write(&path, "a-token\n").unwrap();
        assert_eq!(read_token(&path).await.unwrap().expose(), "a-token");
    }

    #[tokio::test]
    async fn a_missing_key_is_no_key_but_a_broken_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session-key");
        assert!(read_session_key(&path).await.unwrap().is_none());
        std::fs::write(&path, "k2V5\n").unwrap();
        let key = read_session_key(&path).await.unwrap().unwrap();
        assert_eq!(key.expose(), "k2V5");
        std::fs::write(&path, vec![b'x'; 5000]).unwrap();
        assert!(read_session_key(&path).await.is_err());
    }
}
