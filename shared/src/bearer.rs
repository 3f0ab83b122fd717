//! What a runner sends to prove which session it is: its id, encrypted for the control plane.
//!
//! In: public key PEM and session id. Out: base64 of the RSA-OAEP ciphertext (contract section 1).
//! The `rsa` crate only ever encrypts here: its private-key operations are open to timing attacks
//! (RUSTSEC-2023-0071).

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rsa::{Oaep, pkcs8::DecodePublicKey as _, traits::PublicKeyParts as _};

use crate::session::SessionId;

/// Fewest bits of a key that our client accepts (contract section 1).
pub const MIN_KEY_BITS: usize = 2048;

/// Most bits of a key that our client accepts (contract section 1).
pub const MAX_KEY_BITS: usize = 8192;

/// The control plane's public key.
#[derive(Debug, Clone)]
pub struct PublicKey(rsa::PublicKey);

/// Base64 of a session id's ciphertext: what follows `Bearer ` in a token request.
#[derive(Clone)]
pub struct Bearer(String);

/// Why there is no bearer.
#[derive(Debug, thiserror::Error)]
pub enum BearerError {
    /// The PEM holds no RSA public key.
    #[error("not an RSA public key in PEM (`BEGIN PUBLIC KEY`)")]
    NotAKey(#[source] rsa::pkcs8::spki::Error),
    /// The key is too weak, or so large that using it would take seconds.
    #[error("RSA key has {0} bits; {MIN_KEY_BITS} to {MAX_KEY_BITS} are accepted")]
    KeySize(usize),
    /// The session id is longer than the key allows.
    #[error("cannot encrypt the session id with this key")]
    Encrypt(#[source] rsa::Error),
}

impl PublicKey {
    /// Reads SubjectPublicKeyInfo PEM. Line ends written as `\n` in two characters, as they come
    /// out of some templates, are accepted.
    ///
    /// # Errors
    /// When it is not an RSA key of [`MIN_KEY_BITS`] to [`MAX_KEY_BITS`].
    pub fn from_pem(pem: &str) -> Result<Self, BearerError> {
        let pem = pem.replace("\\n", "\n");
        let der = rsa::pkcs8::Document::from_pem(pem.trim())
            .map_err(|error| BearerError::NotAKey(error.into()))?;
        let key =
            rsa::PublicKey::from_public_key_der(der.1.as_bytes()).map_err(BearerError::NotAKey)?;
        Self::checked(key)
    }

    fn checked(key: rsa::PublicKey) -> Result<Self, BearerError> {
        let bits = key.size() * 8;
        if (MIN_KEY_BITS..=MAX_KEY_BITS).contains(&bits) {
            Ok(Self(key))
        } else {
            Err(BearerError::KeySize(bits))
        }
    }

    /// Encrypts a session id: RSA-OAEP with SHA-256, MGF1 SHA-256 and an empty label.
    ///
    /// # Errors
    /// When the id is longer than the key allows.
    pub fn encrypt(&self, id: &SessionId) -> Result<Bearer, BearerError> {
        self.0
            .encrypt(
                &mut rand::rng(),
                Oaep::<sha2::Sha256>::new(),
                id.as_str().as_bytes(),
            )
            .map(|ciphertext| Bearer(STANDARD.encode(ciphertext)))
            .map_err(BearerError::Encrypt)
    }
}

impl Bearer {
    /// The base64 text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Bearer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Bearer(..)")
    }
}
