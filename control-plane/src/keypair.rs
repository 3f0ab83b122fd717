//! The keys of a control plane: its RSA keypair, the root of session keys, the signing keys.
//!
//! A [`KeypairStore`] makes what is missing and reads what is there; [`Keys`] is what the rest of
//! the program works with. During a rotation the previous key and root are accepted beside the
//! current ones.

use std::{fmt, io, path::PathBuf, sync::Arc};

use ambient_shared::{
    exit,
    proof::{SessionKey, SessionRoot},
    session::SessionId,
};
use aws_lc_rs::digest;
use futures_util::future::BoxFuture;
use zeroize::Zeroizing;

pub use self::keyring::Keyring;
use self::{decrypting::DecryptingKey, id::KeyId, pem::InvalidKey, signing::SigningKeys};

pub mod decrypting;
pub mod files;
pub mod id;
mod keyring;
pub mod kind;
pub mod pem;
mod readers;
pub mod reload;
mod root;
pub mod rotation;
pub mod secret;
pub mod signing;

/// Where the keys are kept: files, or Secrets.
pub trait KeypairStore: Send + Sync + 'static {
    /// Reads the keys; makes those that are missing. What is there is never overwritten, and
    /// whoever makes a key first wins: of many that start at once, all get the same.
    fn load_or_create(&self) -> BoxFuture<'_, Result<Keys, KeypairError>>;
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeypairError {
    /// A file cannot be read or made.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A key is there, but is not one.
    #[error("{place} is malformed; mend it, or move it away to have a new one made")]
    Malformed {
        /// The file, or the Secret and its key.
        place: String,
        /// What is wrong with it.
        source: InvalidKey,
    },
    /// A public key without its private key.
    #[error("{public} is there, but {private} is not; restore it, or move the public key away")]
    Incomplete {
        /// Where the public key is.
        public: String,
        /// Where the private key should be.
        private: String,
    },
    /// A public key and a private key that are not a pair.
    #[error("{public} does not belong to {private}; restore the pair, or move the public key away")]
    Mismatch {
        /// Where the public key is.
        public: String,
        /// Where the private key is.
        private: String,
    },
    /// A Secret without one of its keys.
    #[error("{secret} has no key {key}; restore it, or delete the Secret to have a new one made")]
    Absent {
        /// The Secret.
        secret: String,
        /// The key of its data.
        key: String,
    },
    /// A Secret is not there.
    #[error("{secret} is not there; a control plane that starts makes a new one")]
    Missing {
        /// The Secret.
        secret: String,
    },
    /// The Kubernetes API refuses, or cannot be reached.
    #[error("cannot {action} {object}")]
    Kubernetes {
        /// `read`, `make` or `change`.
        action: &'static str,
        /// The object.
        object: String,
        /// What went wrong.
        source: Box<kube::Error>,
    },
    /// Somebody keeps making and deleting an object.
    #[error("{object} comes and goes; does something else delete it?")]
    Unsettled {
        /// The object.
        object: String,
    },
    /// A new key cannot be made.
    #[error("cannot make a new key")]
    Generate(#[source] InvalidKey),
    /// The work was cut off, as the program ends.
    #[error("loading the keys was cut off")]
    CutOff,
}

impl KeypairError {
    /// The exit code that says whose fault it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Malformed { .. }
            | Self::Incomplete { .. }
            | Self::Mismatch { .. }
            | Self::Missing { .. }
            | Self::Absent { .. } => exit::CONFIG,
            Self::Kubernetes { .. } | Self::Unsettled { .. } => exit::UNAVAILABLE,
            Self::File { .. } | Self::Generate(_) | Self::CutOff => exit::SOFTWARE,
        }
    }
}

/// What is used now, and what is accepted beside it during a rotation.
#[derive(Debug)]
pub struct Rotating<T> {
    /// What is given out.
    pub current: T,
    /// What was given out before, and is still used by some.
    pub previous: Option<T>,
}

impl<T> From<T> for Rotating<T> {
    fn from(current: T) -> Self {
        Self {
            current,
            previous: None,
        }
    }
}

impl<T> Rotating<T> {
    /// What is accepted, the current first.
    fn accepted(&self) -> impl Iterator<Item = &T> {
        std::iter::once(&self.current).chain(&self.previous)
    }
}

/// A public key as sessions are given it.
#[derive(Debug, Clone, Copy)]
pub struct PublicHalf<'a> {
    /// SubjectPublicKeyInfo PEM.
    pub pem: &'a str,
    /// Its id.
    pub id: KeyId,
}

/// The ids of one kind of key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids<T> {
    /// What is given out.
    pub current: T,
    /// What is accepted or published beside it, since some still use it.
    pub previous: Option<T>,
    /// What is about to be used.
    pub next: Option<T>,
}

/// The ids of all keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyIds {
    /// Of the keypairs; there is never a next one.
    pub keypair: Ids<KeyId>,
    /// Of the roots of session keys; there is never a next one.
    pub root: Ids<KeyId>,
    /// Of the keys that sign minted tokens: what these say as `kid`.
    pub signing: Ids<String>,
}

/// All keys of a control plane. Clones share them.
#[derive(Clone)]
pub struct Keys {
    keypair: Arc<Rotating<DecryptingKey>>,
    root: Arc<Rotating<SessionRoot>>,
    signing: Arc<SigningKeys>,
    fingerprint: [u8; 32],
}

impl Keys {
    /// These keys, each with the one before it where there is one.
    pub fn new(
        keypair: impl Into<Rotating<DecryptingKey>>,
        root: impl Into<Rotating<SessionRoot>>,
        signing: SigningKeys,
    ) -> Self {
        let keypair = keypair.into();
        Self {
            fingerprint: fingerprint(&keypair),
            keypair: Arc::new(keypair),
            root: Arc::new(root.into()),
            signing: Arc::new(signing),
        }
    }

    /// The same with another keypair.
    #[must_use]
    pub(crate) fn with_keypair(self, keypair: Rotating<DecryptingKey>) -> Self {
        Self {
            fingerprint: fingerprint(&keypair),
            keypair: Arc::new(keypair),
            ..self
        }
    }

    /// The same with another root.
    #[must_use]
    pub(crate) fn with_root(self, root: Rotating<SessionRoot>) -> Self {
        Self {
            root: Arc::new(root),
            ..self
        }
    }

    /// The same with other signing keys.
    #[must_use]
    pub(crate) fn with_signing(self, signing: SigningKeys) -> Self {
        Self {
            signing: Arc::new(signing),
            ..self
        }
    }

    /// The public names of all.
    pub fn ids(&self) -> KeyIds {
        let root_id = |root: &SessionRoot| KeyId::from_bytes(root.id());
        KeyIds {
            keypair: Ids {
                current: self.keypair.current.id(),
                previous: self.keypair.previous.as_ref().map(DecryptingKey::id),
                next: None,
            },
            root: Ids {
                current: self.root_id(),
                previous: self.root.previous.as_ref().map(root_id),
                next: None,
            },
            signing: self.signing.ids(),
        }
    }

    /// The public key that sessions are given: SubjectPublicKeyInfo PEM.
    pub fn public_pem(&self) -> &str {
        self.keypair.current.public_pem()
    }

    /// That key, with its id.
    pub fn public(&self) -> PublicHalf<'_> {
        PublicHalf {
            pem: self.public_pem(),
            id: self.keypair.current.id(),
        }
    }

    /// The key that a session is given, made from the current root.
    pub fn session_key(&self, id: &SessionId) -> SessionKey {
        self.root.current.session_key(id)
    }

    /// The id of that root.
    pub fn root_id(&self) -> KeyId {
        KeyId::from_bytes(self.root.current.id())
    }

    /// The session's keys of all accepted roots, that of the current one first.
    pub fn session_keys(&self, id: &SessionId) -> Vec<SessionKey> {
        let roots = self.root.accepted();
        roots.map(|root| root.session_key(id)).collect()
    }

    /// Whether a ciphertext of this many bytes can be one of any accepted key.
    pub fn fits(&self, ciphertext_length: usize) -> bool {
        self.keypair
            .accepted()
            .any(|key| key.ciphertext_length() == ciphertext_length)
    }

    /// Decrypts with whichever accepted key can. Takes a millisecond or more of a core.
    pub fn open(&self, ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.keypair.accepted().find_map(|key| key.open(ciphertext))
    }

    /// The keys that sign minted tokens.
    pub fn signing(&self) -> Arc<SigningKeys> {
        Arc::clone(&self.signing)
    }

    /// Changes whenever another set of keys is accepted: what was decrypted under other keys is
    /// not looked up any more.
    pub(crate) fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }
}

fn fingerprint(keypair: &Rotating<DecryptingKey>) -> [u8; 32] {
    let mut all = digest::Context::new(&digest::SHA256);
    for key in keypair.accepted() {
        all.update(key.public_pem().as_bytes());
    }
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(all.finish().as_ref());
    fingerprint
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("keypair", &self.keypair)
            .field("root", &self.root)
            .field("signing", &self.signing)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
