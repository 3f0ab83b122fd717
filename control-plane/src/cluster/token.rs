//! A bearer token in a file that is replaced while the program runs.
//!
//! Kubernetes mounts tokens of service accounts as files and renews them. The file is read again
//! when what is known of it is [`FRESH`] old, and at once when the API server refuses the token. A
//! bad read keeps the last good token.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::HeaderValue;
use tokio::time::Instant;
use tracing::warn;
use zeroize::Zeroizing;

/// How long a token is used before its file is looked at again. A token is renewed when a fifth of
/// its life is left (kubelet), so minutes before it expires.
const FRESH: Duration = Duration::from_secs(10);

/// Longest file that is read, in bytes: headers of servers are no longer.
const MAX_FILE: u64 = 64 * 1024;

/// The file, and what was last read of it. Clones share it.
#[derive(Clone)]
pub(super) struct TokenFile(Arc<Shared>);

struct Shared {
    path: PathBuf,
    last: Mutex<Read>,
}

#[derive(Clone)]
struct Read {
    header: HeaderValue,
    at: Instant,
    failing: bool,
}

impl TokenFile {
    /// Reads it for the first time.
    ///
    /// # Errors
    /// When it cannot be read, or holds no token.
    pub(super) async fn open(path: &Path) -> Result<Self, io::Error> {
        let last = Read {
            header: read(path).await?,
            at: Instant::now(),
            failing: false,
        };
        Ok(Self(Arc::new(Shared {
            path: path.to_owned(),
            last: Mutex::new(last),
        })))
    }

    /// The value of the header `Authorization`.
    pub(super) async fn header(&self) -> HeaderValue {
        let last = self.last();
        if last.at.elapsed() < FRESH {
            return last.header;
        }
        self.read_again(last).await
    }

    /// Reads the file now; its token, if it is another than this one.
    pub(super) async fn newer_than(&self, refused: &HeaderValue) -> Option<HeaderValue> {
        let header = self.read_again(self.last()).await;
        (header != refused).then_some(header)
    }

    async fn read_again(&self, last: Read) -> HeaderValue {
        let (header, failing) = match read(&self.0.path).await {
            Ok(header) => (header, false),
            Err(error) => {
                if !last.failing {
                    let file = self.0.path.display();
                    warn!(%file, %error, "cannot read the token of the Kubernetes API; using the last");
                }
                (last.header, true)
            }
        };
        *self.0.last.lock().unwrap_or_else(PoisonError::into_inner) = Read {
            header: header.clone(),
            at: Instant::now(),
            failing,
        };
        header
    }

    fn last(&self) -> Read {
        let last = self.0.last.lock();
        last.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn read(path: &Path) -> Result<HeaderValue, io::Error> {
    if tokio::fs::metadata(path).await?.len() > MAX_FILE {
        return Err(io::Error::other("too large for a token"));
    }
    let text = Zeroizing::new(tokio::fs::read_to_string(path).await?);
    let token = text.trim();
    if token.is_empty() {
        return Err(io::Error::other("there is no token in it"));
    }
    let mut header = HeaderValue::try_from(format!("Bearer {token}"))
        .map_err(|_| io::Error::other("it holds no token, or more than one"))?;
    header.set_sensitive(true);
    Ok(header)
}
