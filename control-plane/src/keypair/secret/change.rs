//! Changes of key Secrets that are there: rotations, and the steps that complete them.
//!
//! Each is one patch that names the version it was decided on, so that of two at a time one is
//! refused and decides again. A Secret without our label is never written.

use std::time::{Duration, SystemTime};

use k8s_openapi::{ByteString, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::api::Patch;
use serde_json::{Map, Value, json};

use super::{
    CONTROL_PLANE, MANAGED_BY, ROUNDS, SecretKeypairStore, Version,
    content::{Change, Content},
    patched_by_us,
};
use crate::keypair::{KeypairError, kind::KeyKind, pem::InvalidKey};

/// Why a key Secret is not changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// It cannot be read or written, or is malformed.
    #[error(transparent)]
    Keypair(#[from] KeypairError),
    /// Somebody else keeps it.
    #[error(
        "{secret} is somebody else's: it has no label {MANAGED_BY}={CONTROL_PLANE}; rotate it \
         where it comes from"
    )]
    Foreign {
        /// The Secret.
        secret: String,
    },
    /// The rotation before is not complete.
    #[error(
        "the {kind} is being rotated already: {waits_for}; the control plane completes that by \
         itself, and another rotation now would cut off who still needs the old one"
    )]
    Underway {
        /// What.
        kind: KeyKind,
        /// What it waits for.
        waits_for: &'static str,
    },
}

impl ChangeError {
    /// The exit code that says whose fault it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Keypair(error) => error.exit_code(),
            Self::Foreign { .. } => ambient_shared::exit::CONFIG,
            Self::Underway { .. } => ambient_shared::exit::UNAVAILABLE,
        }
    }
}

/// A step that completes a rotation. It names what it was decided on; where that has changed,
/// nothing is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// The next signing key signs from now on.
    Promote {
        /// Its `kid`.
        next: String,
        /// The life of the tokens that it signs.
        life: Duration,
    },
    /// Nobody needs the previous key any more.
    Drop {
        /// Of what kind.
        kind: KeyKind,
        /// Its id.
        previous: String,
    },
}

impl Step {
    pub(crate) fn kind(&self) -> KeyKind {
        match self {
            Self::Promote { .. } => KeyKind::SigningKey,
            Self::Drop { kind, .. } => *kind,
        }
    }
}

impl SecretKeypairStore {
    /// Begins a rotation: a new key is there beside the one before. Takes about a second.
    ///
    /// # Errors
    /// When the Secret is not ours, a rotation is under way, or the Secret cannot be read or
    /// written.
    pub async fn rotate(&self, kind: KeyKind) -> Result<(), ChangeError> {
        let decide = move |content: &Content| {
            if let Some(waits_for) = content.unfinished(kind)? {
                return Err(ChangeError::Underway { kind, waits_for });
            }
            let change = match kind {
                KeyKind::Keypair => content.rotate_keypair(),
                KeyKind::SessionRoot => content.rotate_root(),
                KeyKind::SigningKey => Content::publish_signing_key(),
            };
            Ok(Some(change.map_err(generate_failed)?))
        };
        self.change(kind, decide).await.map(drop)
    }

    /// Takes a step at this moment, and says whether there was anything to do.
    ///
    /// # Errors
    /// When the Secret is not ours, or cannot be read or written.
    pub(crate) async fn take(&self, step: &Step, now: SystemTime) -> Result<bool, ChangeError> {
        self.change(step.kind(), |content| Ok(content.step(step, now)?))
            .await
    }

    /// Notes with the signing key that it signs tokens which live so long, unless it is somebody
    /// else's, or there is none yet.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub async fn note_token_life(&self, life: Duration) -> Result<(), ChangeError> {
        let noted = self.change(KeyKind::SigningKey, |content| Ok(content.note_life(life)?));
        match noted.await {
            Ok(_)
            | Err(
                ChangeError::Foreign { .. } | ChangeError::Keypair(KeypairError::Missing { .. }),
            ) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn change(
        &self,
        kind: KeyKind,
        decide: impl Fn(&Content) -> Result<Option<Change>, ChangeError>,
    ) -> Result<bool, ChangeError> {
        let name = kind.secret();
        for _ in 0..ROUNDS {
            let secret = self
                .read(name)
                .await?
                .ok_or_else(|| KeypairError::Missing {
                    secret: self.place(name),
                })?;
            if !is_ours(&secret.metadata) {
                return Err(ChangeError::Foreign {
                    secret: self.place(name),
                });
            }
            let version = Version::of(&secret);
            let Some(change) = decide(&self.content(name, secret))? else {
                return Ok(false);
            };
            match self.patch(name, &version, change).await {
                Ok(()) => return Ok(true),
                // Somebody else was faster; what is there now counts.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                Err(error) => return Err(self.failed("change", name, error).into()),
            }
        }
        let object = self.place(name);
        Err(KeypairError::Unsettled { object }.into())
    }

    async fn patch(
        &self,
        name: &str,
        version: &Version,
        change: Change,
    ) -> Result<(), kube::Error> {
        let value = |bytes: Vec<u8>| serde_json::to_value(ByteString(bytes)).unwrap_or_default();
        let data = change.into_iter().map(|(key, bytes)| {
            let value = bytes.map_or(Value::Null, |bytes| value(bytes.to_vec()));
            (key.to_owned(), value)
        });
        let patch = json!({
            "metadata": {"resourceVersion": version.version, "uid": version.uid},
            "data": data.collect::<Map<_, _>>(),
        });
        let (secrets, patch) = (self.secrets(), Patch::Merge(&patch));
        secrets
            .patch(name, &patched_by_us(), &patch)
            .await
            .map(drop)
    }
}

/// Whether it has our label.
pub(super) fn is_ours(secret: &ObjectMeta) -> bool {
    let labels = secret.labels.as_ref();
    labels.and_then(|it| it.get(MANAGED_BY)).map(String::as_str) == Some(CONTROL_PLANE)
}

fn generate_failed(error: InvalidKey) -> KeypairError {
    KeypairError::Generate(error)
}
