//! Keys that sign tokens, read from JWKS (RFC 7517) at URLs and in files.
//!
//! In: the sources of the settings. Out: the keys of a key id. Each source is read again now and
//! then, and when a token names a key that nobody knows, but not more often than every few
//! seconds. While a source cannot be read its last good keys stay in use.

use std::{
    io::{self, Read as _},
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use ambient_shared::{
    client::{ClientError, http_client_to, trust_roots},
    clock::Clock,
    exit,
    resolve::Resolver,
    retry::{Backoff, Policy},
};
use futures_util::future::join_all;
use jsonwebtoken::{Algorithm, DecodingKey, jwk::Jwk};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::AsyncReadExt as _,
    sync::Mutex,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use url::Url;

use crate::{metrics, settings::JwksSource};

/// How often each source is read without cause: so long a key that was withdrawn may stay in use.
const REFRESH: Duration = Duration::from_mins(5);

/// Shortest time between two reads that unknown key ids cause: from a URL, and from a file.
const PAUSE_URL: Duration = Duration::from_secs(5);
const PAUSE_FILE: Duration = Duration::from_secs(1);

/// The same after a failure: the issuer may be starting just now.
const PAUSE_FAILED: Duration = Duration::from_millis(500);

/// Longest wait for a source.
const FETCH_LIMIT: Duration = Duration::from_secs(5);

/// Largest JWKS, in bytes; real ones have a few keys of 1 KiB.
const MAX_SIZE: usize = 1024 * 1024;

/// Most keys tried for a token without a key id.
const MAX_TRIES: usize = 8;

/// What a key may sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signs {
    /// Tokens of people and programs.
    Users,
    /// Tokens of sessions.
    Sessions,
    /// Both.
    Both,
}

/// A key that verifies tokens.
pub(crate) struct Key {
    id: Option<String>,
    /// The only algorithm it is for, if it says so.
    pub(crate) algorithm: Option<Algorithm>,
    /// What it may sign.
    pub(crate) signs: Signs,
    /// The key itself.
    pub(crate) verifier: DecodingKey,
}

/// All keys of all sources.
pub(crate) struct KeyRing {
    sources: Vec<Source>,
    clock: Clock,
}

struct Source {
    from: JwksSource,
    /// For a URL.
    client: Option<reqwest::Client>,
    signs: Signs,
    keys: RwLock<Vec<Arc<Key>>>,
    /// The last read, if any. Locked during a read, so that there is one at a time.
    last: Mutex<Option<LastRead>>,
}

#[derive(Clone, Copy)]
struct LastRead {
    at: Instant,
    succeeded: bool,
}

/// Why a JWKS cannot be read.
#[derive(Debug, thiserror::Error)]
enum KeysError {
    #[error("cannot read {path}")]
    File {
        path: String,
        source: std::io::Error,
    },
    #[error("cannot fetch {url}")]
    Fetch { url: Url, source: reqwest::Error },
    #[error("{url} answered {status}")]
    Status { url: Url, status: http::StatusCode },
    #[error("JWKS has more than {MAX_SIZE} bytes")]
    TooLarge,
    #[error("not a JWKS")]
    Malformed(#[from] serde_json::Error),
    #[error("JWKS has no key that can verify signatures")]
    NoKeys,
}

impl KeyRing {
    /// No keys read yet.
    ///
    /// # Errors
    /// When the HTTP client cannot be set up.
    pub(crate) fn new(
        sources: impl IntoIterator<Item = (JwksSource, Signs)>,
        clock: Clock,
    ) -> Result<Self, ClientError> {
        let resolver = Resolver::system();
        let client_of = |from: &JwksSource| match from {
            JwksSource::Url(url) => {
                http_client_to(url, &resolver, trust_roots(None)?, FETCH_LIMIT).map(Some)
            }
            JwksSource::File(_) => Ok(None),
        };
        let sources = sources
            .into_iter()
            .map(|(from, signs)| {
                Ok(Source {
                    client: client_of(&from)?,
                    from,
                    signs,
                    keys: RwLock::default(),
                    last: Mutex::default(),
                })
            })
            .collect::<Result<Vec<_>, ClientError>>()?;
        if !sources.is_empty() {
            metrics::keys_unread();
        }
        Ok(Self { sources, clock })
    }

    /// The keys of this id; without one, all that a token could be signed with.
    pub(crate) async fn find(&self, id: Option<&str>) -> Vec<Arc<Key>> {
        let known = self.known(id);
        if !known.is_empty() {
            return known;
        }
        let reads = self.sources.iter().map(|source| source.read_again(self));
        join_all(reads).await;
        self.known(id)
    }

    /// Reads all sources now and then, until `shutdown`.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        let kept_fresh = join_all(self.sources.iter().map(|source| source.keep_fresh(&self)));
        shutdown.run_until_cancelled(kept_fresh).await;
    }

    fn known(&self, id: Option<&str>) -> Vec<Arc<Key>> {
        let mut found = Vec::new();
        for source in &self.sources {
            let keys = source.keys.read().unwrap_or_else(PoisonError::into_inner);
            let matching = keys
                .iter()
                .filter(|key| id.is_none() || key.id.as_deref() == id);
            found.extend(matching.cloned());
        }
        found.truncate(MAX_TRIES);
        found
    }
}

impl Source {
    async fn keep_fresh(&self, ring: &KeyRing) {
        let mut backoff = Backoff::new(Policy::default());
        loop {
            let succeeded = self.read(ring, &mut *self.last.lock().await).await;
            let pause = if succeeded {
                backoff.reset();
                REFRESH
            } else {
                backoff.next_wait()
            };
            sleep(pause).await;
        }
    }

    /// Reads, unless it was read a moment ago.
    async fn read_again(&self, ring: &KeyRing) {
        let mut last = self.last.lock().await;
        let pause = match (*last, &self.from) {
            (None, _) => Duration::ZERO,
            (Some(read), _) if !read.succeeded => PAUSE_FAILED,
            (Some(_), JwksSource::Url(_)) => PAUSE_URL,
            (Some(_), JwksSource::File(_)) => PAUSE_FILE,
        };
        if last.is_none_or(|read| read.at.elapsed() >= pause) {
            self.read(ring, &mut last).await;
        }
    }

    async fn read(&self, ring: &KeyRing, last: &mut Option<LastRead>) -> bool {
        let read = match (&self.from, &self.client) {
            (JwksSource::Url(url), Some(client)) => fetch(client, url).await,
            (JwksSource::Url(_), None) => Err(KeysError::NoKeys),
            (JwksSource::File(path), _) => read_file(path).await,
        };
        let result = read.and_then(|json| keys_of(&json, self.signs));
        let failed_before = last.is_some_and(|read| !read.succeeded);
        let succeeded = match result {
            Ok(keys) => {
                if failed_before {
                    info!(jwks = %self.from, "keys can be read again");
                }
                metrics::keys_fetched(Some(ring.clock.unix_seconds()));
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
                true
            }
            Err(error) => {
                if !failed_before {
                    warn!(
                        jwks = %self.from,
                        reason = %exit::report(&error),
                        "keys cannot be read; those known stay in use"
                    );
                }
                metrics::keys_fetched(None);
                false
            }
        };
        *last = Some(LastRead {
            at: Instant::now(),
            succeeded,
        });
        succeeded
    }
}

async fn fetch(client: &reqwest::Client, url: &Url) -> Result<Vec<u8>, KeysError> {
    let failed = |source: reqwest::Error| KeysError::Fetch {
        url: url.clone(),
        source: source.without_url(),
    };
    let mut answer = client.get(url.clone()).send().await.map_err(failed)?;
    if answer.status() != http::StatusCode::OK {
        return Err(KeysError::Status {
            url: url.clone(),
            status: answer.status(),
        });
    }
    let mut json = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(failed)? {
        if json.len() + chunk.len() > MAX_SIZE {
            return Err(KeysError::TooLarge);
        }
        json.extend_from_slice(&chunk);
    }
    Ok(json)
}

async fn read_file(path: &Path) -> Result<Vec<u8>, KeysError> {
    let failed = |source| KeysError::File {
        path: path.display().to_string(),
        source,
    };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut json = Vec::new();
    let limit = MAX_SIZE as u64 + 1;
    file.take(limit)
        .read_to_end(&mut json)
        .await
        .map_err(failed)?;
    if json.len() > MAX_SIZE {
        return Err(KeysError::TooLarge);
    }
    Ok(json)
}

/// Whether a file is a JWKS that can be used now, before anything is started.
///
/// # Errors
/// On one line, why not.
pub(crate) fn check_file(path: &Path) -> Result<(), String> {
    let failed = |source| KeysError::File {
        path: path.display().to_string(),
        source,
    };
    let read = || {
        let mut json = Vec::new();
        let file = std::fs::File::open(path).map_err(failed)?;
        io::Read::take(file, MAX_SIZE as u64 + 1)
            .read_to_end(&mut json)
            .map_err(failed)?;
        if json.len() > MAX_SIZE {
            return Err(KeysError::TooLarge);
        }
        keys_of(&json, Signs::Both)
    };
    read().map(drop).map_err(|error| exit::report(&error))
}

/// The keys that can verify; others (for encryption, of unknown kinds, secret ones) are passed
/// over, as a JWKS may hold them.
fn keys_of(json: &[u8], signs: Signs) -> Result<Vec<Arc<Key>>, KeysError> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(json)?;
    let keys: Vec<_> = set
        .keys
        .into_iter()
        .filter_map(|key| key_of(key, signs))
        .map(Arc::new)
        .collect();
    if keys.is_empty() {
        return Err(KeysError::NoKeys);
    }
    Ok(keys)
}

fn key_of(jwk: Value, signs: Signs) -> Option<Key> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    let verifies = text("use").is_none_or(|use_| use_ == "sig");
    // Never a shared secret ("oct"): then whoever can verify could sign.
    if !verifies || !matches!(text("kty"), Some("RSA" | "EC" | "OKP")) {
        return None;
    }
    let algorithm = match text("alg") {
        Some(name) => Some(name.parse().ok()?),
        None => None,
    };
    let id = text("kid").map(str::to_owned);
    let jwk: Jwk = serde_json::from_value(jwk).ok()?;
    Some(Key {
        id,
        algorithm,
        signs,
        verifier: DecodingKey::from_jwk(&jwk).ok()?,
    })
}
