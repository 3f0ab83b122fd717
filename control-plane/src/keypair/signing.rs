//! The keys that sign minted tokens, and their public halves as JWKS.

use std::{fmt, time::SystemTime};

use aws_lc_rs::{
    digest,
    encoding::{AsDer as _, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::{KeyPair, KeySize},
    signature::{KeyPair as _, RSA_PKCS1_SHA256},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use rsa::{pkcs8::DecodePublicKey as _, traits::PublicKeyParts as _};
use serde::Serialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{
    Ids,
    pem::{self, InvalidKey},
};

/// One RSA key for RS256.
pub struct SigningKey {
    key: KeyPair,
    kid: String,
    modulus: String,
    exponent: String,
    /// The JWT's header, encoded once.
    header: String,
}

/// Why a token cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The claims are no JSON.
    #[error("the claims cannot be written as JSON")]
    Claims(#[from] serde_json::Error),
    /// The cryptographic library failed.
    #[error("the cryptographic library failed")]
    Library(#[from] aws_lc_rs::error::Unspecified),
}

impl SigningKey {
    /// A new key of 2048 bits, as PKCS#1 PEM.
    ///
    /// # Errors
    /// When the library fails.
    pub fn generate() -> Result<Zeroizing<String>, InvalidKey> {
        pem::write(&KeyPair::generate(KeySize::Rsa2048)?)
    }

    /// Reads a private key, PKCS#1 or PKCS#8.
    ///
    /// # Errors
    /// [`InvalidKey`] says what it is instead.
    pub fn from_pem(private: &str) -> Result<Self, InvalidKey> {
        let key = pem::read(private)?;
        let der: PublicKeyX509Der<'_> = key.public_key().as_der()?;
        let public =
            rsa::PublicKey::from_public_key_der(der.as_ref()).map_err(|_| InvalidKey::NotPublic)?;
        let modulus = URL_SAFE_NO_PAD.encode(public.n_bytes());
        let exponent = URL_SAFE_NO_PAD.encode(public.e_bytes());
        // RFC 7638: the same key has the same id wherever it is computed.
        let members = format!(r#"{{"e":"{exponent}","kty":"RSA","n":"{modulus}"}}"#);
        let thumbprint = digest::digest(&digest::SHA256, members.as_bytes());
        let kid = URL_SAFE_NO_PAD.encode(thumbprint.as_ref());
        let header = json!({"alg": "RS256", "typ": "JWT", "kid": kid}).to_string();
        Ok(Self {
            key,
            kid,
            modulus,
            exponent,
            header: URL_SAFE_NO_PAD.encode(header),
        })
    }

    /// Its id: the RFC 7638 thumbprint.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// A JWT with these claims. Takes about 0.4 ms of a core.
    ///
    /// # Errors
    /// When the claims are no JSON, or the library fails.
    pub fn sign(&self, claims: &impl Serialize) -> Result<Zeroizing<String>, SignError> {
        let claims = URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims)?);
        let mut jwt = Zeroizing::new(format!("{}.{claims}", self.header));
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key.sign(
            &RSA_PKCS1_SHA256,
            &SystemRandom::new(),
            jwt.as_bytes(),
            &mut signature,
        )?;
        jwt.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut jwt);
        Ok(jwt)
    }

    fn jwk(&self) -> Value {
        json!({
            "kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.kid,
            "n": self.modulus, "e": self.exponent,
        })
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey")
            .field("kid", &self.kid)
            .finish_non_exhaustive()
    }
}

/// The key that signs, and those that are only published: the next one, shortly before it is
/// used, and old ones until their last token has expired.
#[derive(Debug)]
pub struct SigningKeys {
    current: SigningKey,
    ids: Ids<String>,
    jwks: Bytes,
    previous_until: Option<SystemTime>,
}

impl SigningKeys {
    /// One key that signs; the others are published beside it.
    pub fn new(
        current: SigningKey,
        next: Option<&SigningKey>,
        previous: Option<&SigningKey>,
    ) -> Self {
        let kid = |key: &SigningKey| key.kid.clone();
        let all = [&current].into_iter().chain(next).chain(previous);
        let jwks = json!({"keys": all.map(SigningKey::jwk).collect::<Vec<_>>()});
        Self {
            jwks: Bytes::from(jwks.to_string()),
            ids: Ids {
                current: kid(&current),
                previous: previous.map(kid),
                next: next.map(kid),
            },
            current,
            previous_until: None,
        }
    }

    /// The same, where tokens of the previous key may be valid until then.
    #[must_use]
    pub fn needing_previous_until(self, until: Option<SystemTime>) -> Self {
        Self {
            previous_until: until,
            ..self
        }
    }

    /// Until when tokens of the previous key may be valid, where that was noted.
    pub fn previous_until(&self) -> Option<SystemTime> {
        self.previous_until
    }

    /// The key that signs.
    pub fn current(&self) -> &SigningKey {
        &self.current
    }

    /// What each says as `kid`.
    pub fn ids(&self) -> Ids<String> {
        self.ids.clone()
    }

    /// All public halves: the JSON text of a JWK set (RFC 7517).
    pub fn jwks(&self) -> Bytes {
        self.jwks.clone()
    }
}
