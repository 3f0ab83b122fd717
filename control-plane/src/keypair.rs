//! The keys of a control plane: its RSA keypair, the root of session keys, the signing keys.
//!
//! A [`KeypairStore`] makes what is missing and reads what is there; [`Keys`] is what the rest of
//! the program works with. During a rotation the previous key and root are accepted beside the
//! current ones.

use std::{fmt, io, path::PathBuf, sync::Arc, time::SystemTime};

use ambient_shared::{
    exit,
    proof::{ProofError, SessionKey, SessionRoot},
    session::SessionId,
};
use aws_lc_rs::digest;
use futures_util::future::BoxFuture;
use zeroize::Zeroizing;

pub use self::keyring::Keyring;
use self::{decrypting::DecryptingKey, pem::InvalidKey, signing::SigningKeys};

pub mod decrypting;
pub mod files;
mod keyring;
pub mod pem;
mod root;
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
    /// The Kubernetes API refuses, or cannot be reached.
    #[error("cannot {action} {object}")]
    Kubernetes {
        /// `read` or `make`.
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
            | Self::Absent { .. } => exit::CONFIG,
            Self::Kubernetes { .. } | Self::Unsettled { .. } => exit::UNAVAILABLE,
            Self::File { .. } | Self::Generate(_) | Self::CutOff => exit::SOFTWARE,
        }
    }
}

/// All keys of a control plane.
pub struct Keys {
    decrypting: DecryptingKey,
    previous: Option<DecryptingKey>,
    root: SessionRoot,
    previous_root: Option<SessionRoot>,
    signing: Arc<SigningKeys>,
    fingerprint: [u8; 32],
}

impl Keys {
    /// The current keys; none other is accepted.
    pub fn new(decrypting: DecryptingKey, root: SessionRoot, signing: SigningKeys) -> Self {
        Self {
            fingerprint: fingerprint([&decrypting]),
            decrypting,
            previous: None,
            root,
            previous_root: None,
            signing: Arc::new(signing),
        }
    }

    /// Accepts these beside the current ones, as during a rotation.
    #[must_use]
    pub fn with_previous(
        mut self,
        decrypting: Option<DecryptingKey>,
        root: Option<SessionRoot>,
    ) -> Self {
        self.previous = decrypting;
        self.previous_root = root;
        self.fingerprint = fingerprint(self.accepted());
        self
    }

    /// The public key that sessions are given: SubjectPublicKeyInfo PEM.
    pub fn public_pem(&self) -> &str {
        self.decrypting.public_pem()
    }

    /// The key that a session is given, made from the current root.
    pub fn session_key(&self, id: &SessionId) -> SessionKey {
        self.root.session_key(id)
    }

    /// Checks a proof against the session's key of the current root, then of the previous one.
    ///
    /// # Errors
    /// [`ProofError`] says why not. `Stale` only for who holds one of the keys.
    pub fn verify(
        &self,
        id: &SessionId,
        proof: &str,
        bearer: &str,
        now: SystemTime,
    ) -> Result<(), ProofError> {
        for root in std::iter::once(&self.root).chain(&self.previous_root) {
            match root.session_key(id).verify(proof, bearer, now) {
                Err(ProofError::Wrong) => {}
                decided => return decided,
            }
        }
        Err(ProofError::Wrong)
    }

    /// Whether a ciphertext of this many bytes can be one of any accepted key.
    pub fn fits(&self, ciphertext_length: usize) -> bool {
        self.accepted()
            .any(|key| key.ciphertext_length() == ciphertext_length)
    }

    /// Decrypts with whichever accepted key can. Takes a millisecond or more of a core.
    pub fn open(&self, ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        self.accepted().find_map(|key| key.open(ciphertext))
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

    fn accepted(&self) -> impl Iterator<Item = &DecryptingKey> {
        std::iter::once(&self.decrypting).chain(&self.previous)
    }
}

fn fingerprint<'a>(accepted: impl IntoIterator<Item = &'a DecryptingKey>) -> [u8; 32] {
    let mut all = digest::Context::new(&digest::SHA256);
    for key in accepted {
        all.update(key.public_pem().as_bytes());
    }
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(all.finish().as_ref());
    fingerprint
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("decrypting", &self.decrypting)
            .field("previous", &self.previous)
            .field("signing", &self.signing)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
