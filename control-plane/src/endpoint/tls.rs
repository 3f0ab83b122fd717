//! TLS of the token port: a certificate and its key from two files, read again when they change.
//!
//! In: PEM files, such as those of a mounted Secret. Out: a `watch` with the configuration for the
//! next handshake. What the files say is compared, not their times: a Secret volume swaps a
//! symlink, others rename a file over the old one, one file before the other. A pair that cannot be
//! used keeps the last good one.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use ambient_shared::{
    clock::{self, Clock},
    exit,
};
use aws_lc_rs::digest;
use metrics::{counter, gauge};
use rustls::{
    InconsistentKeys, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
};
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use zeroize::Zeroizing;

use crate::metrics::{CERTIFICATE_EXPIRY, CERTIFICATE_LOADED, CERTIFICATE_RELOADS};

mod expiry;

/// How often the files are looked at, unless a test asks for more.
pub const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Where certificate and key are, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    /// The certificate, and after it those that lead to its root.
    pub certificate: PathBuf,
    /// Its private key: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
    /// How often they are looked at.
    pub look_every: Duration,
}

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// One of them cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It has no certificate in it, or one that is malformed.
    #[error("there is no PEM certificate in {}", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// It has no key in it.
    #[error("there is no PEM private key in {}", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
    },
    /// They are not a pair.
    #[error("the key in {} is not that of the certificate in {}", key.display(), certificate.display())]
    NotAPair {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// The TLS library refuses them.
    #[error("the key in {} or the certificate in {} cannot be used", key.display(), certificate.display())]
    Unusable {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
        /// What it said.
        source: rustls::Error,
    },
}

impl TlsError {
    /// Whether it is about the key's file alone.
    pub fn is_of_key(&self, files: &TlsSettings) -> bool {
        match self {
            Self::Read { path, .. } => *path == files.key,
            Self::NoKey { .. } => true,
            Self::NoCertificate { .. } | Self::NotAPair { .. } | Self::Unusable { .. } => false,
        }
    }
}

impl TlsSettings {
    /// Whether they can be used now.
    ///
    /// # Errors
    /// [`TlsError`] says why not.
    pub fn check(&self) -> Result<(), TlsError> {
        Contents::read(self)?.load(self).map(drop)
    }
}

/// What the files held at one moment.
struct Contents {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

/// What was made of them.
struct Loaded {
    config: Arc<ServerConfig>,
    expires_at: Option<SystemTime>,
}

impl Contents {
    fn read(files: &TlsSettings) -> Result<Self, TlsError> {
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: Zeroizing::new(read(&files.key)?),
        })
    }

    /// Tells one pair from another; the key itself is not kept.
    fn digest(&self) -> [u8; 32] {
        let mut digest = digest::Context::new(&digest::SHA256);
        digest.update(&self.certificate.len().to_be_bytes());
        digest.update(&self.certificate);
        digest.update(&self.key);
        let mut text = [0; 32];
        text.copy_from_slice(digest.finish().as_ref());
        text
    }

    fn load(&self, files: &TlsSettings) -> Result<Loaded, TlsError> {
        let chain: Result<Vec<_>, pem::Error> =
            CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.ok().filter(|chain| !chain.is_empty());
        let chain = chain.ok_or_else(|| TlsError::NoCertificate {
            path: files.certificate.clone(),
        })?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|_| TlsError::NoKey {
            path: files.key.clone(),
        })?;
        let expires_at = chain.first().and_then(|leaf| expiry::not_after(leaf));
        let (key_file, certificate) = (files.key.clone(), files.certificate.clone());
        let config = config(chain, key).map_err(|source| match source {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => TlsError::NotAPair {
                key: key_file,
                certificate,
            },
            source => TlsError::Unusable {
                key: key_file,
                certificate,
                source,
            },
        })?;
        Ok(Loaded {
            config: Arc::new(config),
            expires_at,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(failed(io::Error::other("it is larger than 1 MiB")));
    }
    Ok(bytes)
}

/// TLS 1.2 and 1.3, and HTTP/1.1 alone.
fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A pair that can be used.
struct Found {
    digest: [u8; 32],
    loaded: Loaded,
}

/// Looks at the files, off the threads that serve others.
async fn look(files: TlsSettings) -> Result<Found, TlsError> {
    let certificate = files.certificate.clone();
    let looking = spawn_blocking(move || {
        let contents = Contents::read(&files)?;
        Ok(Found {
            digest: contents.digest(),
            loaded: contents.load(&files)?,
        })
    });
    looking.await.unwrap_or_else(|error| {
        Err(TlsError::Read {
            path: certificate,
            source: io::Error::other(error),
        })
    })
}

/// Reads the files again and again.
pub(super) struct Reloader {
    files: TlsSettings,
    clock: Clock,
    config: watch::Sender<Arc<ServerConfig>>,
    /// The pair in use.
    used: [u8; 32],
    fault: Option<Fault>,
}

/// What was wrong at the last look.
struct Fault {
    what: String,
    /// Only at the second look: at the first, the pair may just be being replaced.
    was_told: bool,
}

impl Reloader {
    /// Reads the files for the first time.
    ///
    /// # Errors
    /// When they cannot be used.
    pub(super) async fn new(files: TlsSettings, clock: Clock) -> Result<Self, TlsError> {
        let Found { digest, loaded } = look(files.clone()).await?;
        let (config, _) = watch::channel(Arc::clone(&loaded.config));
        let reloader = Self {
            files,
            clock,
            config,
            used: digest,
            fault: None,
        };
        reloader.tell(&loaded);
        // So that the first failure is an increase.
        counter!(CERTIFICATE_RELOADS, "result" => "failed").increment(0);
        Ok(reloader)
    }

    /// The configuration for the next handshake.
    pub(super) fn config(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.config.subscribe()
    }

    /// Looks until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let pause = self.files.look_every;
        while shutdown.run_until_cancelled(sleep(pause)).await.is_some() {
            let looked = look(self.files.clone());
            match shutdown.run_until_cancelled(looked).await {
                Some(Ok(found)) => self.take(&found),
                Some(Err(error)) => self.keep(&error),
                None => return,
            }
        }
    }

    fn take(&mut self, found: &Found) {
        self.fault = None;
        if found.digest == self.used {
            return;
        }
        self.used = found.digest;
        self.config.send_replace(Arc::clone(&found.loaded.config));
        counter!(CERTIFICATE_RELOADS, "result" => "ok").increment(1);
        self.tell(&found.loaded);
    }

    fn keep(&mut self, error: &TlsError) {
        let what = exit::report(error);
        match &mut self.fault {
            Some(fault) if fault.what == what => {
                if !fault.was_told {
                    fault.was_told = true;
                    counter!(CERTIFICATE_RELOADS, "result" => "failed").increment(1);
                    warn!(reason = %what, "the certificate of the token port stays the last good one");
                }
            }
            _ => {
                self.fault = Some(Fault {
                    what,
                    was_told: false,
                });
            }
        }
    }

    fn tell(&self, loaded: &Loaded) {
        let now = self.clock.now();
        gauge!(CERTIFICATE_LOADED).set(seconds(now));
        let Some(expires_at) = loaded.expires_at else {
            info!("certificate of the token port loaded");
            return;
        };
        gauge!(CERTIFICATE_EXPIRY).set(seconds(expires_at));
        let expires = humantime::format_rfc3339_seconds(expires_at);
        if expires_at <= now {
            warn!(%expires, "certificate of the token port has expired");
        } else {
            info!(%expires, "certificate of the token port loaded");
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "seconds far below 2^52")]
fn seconds(time: SystemTime) -> f64 {
    clock::unix_seconds(time) as f64
}
