//! What is in the key Secrets. Pure.

use std::collections::BTreeMap;

use ambient_shared::proof::SessionRoot;
use k8s_openapi::ByteString;
use zeroize::Zeroizing;

use crate::keypair::{
    KeypairError, Rotating,
    decrypting::DecryptingKey,
    pem::{self, InvalidKey},
    root,
    signing::{SigningKey, SigningKeys},
};

const PRIVATE: &str = "private.pem";
const PUBLIC: &str = "public.pem";
const PREVIOUS_PRIVATE: &str = "previous-private.pem";
const NEXT_PRIVATE: &str = "next-private.pem";
const ROOT: &str = "root";
const PREVIOUS_ROOT: &str = "previous-root";

/// Data of a new Secret.
pub(super) type Made = Vec<(&'static str, Zeroizing<Vec<u8>>)>;

/// A keypair; takes about half a second.
pub(super) fn new_keypair() -> Result<Made, InvalidKey> {
    let private = DecryptingKey::generate()?;
    let public = DecryptingKey::from_pem(&private)?.public_pem().to_owned();
    Ok(vec![
        (PRIVATE, Zeroizing::new(private.as_bytes().to_vec())),
        (PUBLIC, Zeroizing::new(public.into_bytes())),
    ])
}

/// A root of session keys.
pub(super) fn new_root() -> Result<Made, InvalidKey> {
    Ok(vec![(ROOT, root::generate()?)])
}

/// A signing key.
pub(super) fn new_signing_key() -> Result<Made, InvalidKey> {
    let private = SigningKey::generate()?;
    Ok(vec![(PRIVATE, Zeroizing::new(private.as_bytes().to_vec()))])
}

/// The data of one Secret.
pub(in crate::keypair) struct Content {
    place: String,
    data: BTreeMap<String, Zeroizing<Vec<u8>>>,
}

impl Content {
    /// `place` names the Secret in errors.
    pub(super) fn new(place: String, data: BTreeMap<String, ByteString>) -> Self {
        let data = data.into_iter();
        Self {
            place,
            data: data
                .map(|(key, value)| (key, Zeroizing::new(value.0)))
                .collect(),
        }
    }

    /// The keypair, and the key before it.
    pub(in crate::keypair) fn keypair(&self) -> Result<Rotating<DecryptingKey>, KeypairError> {
        let current = self.required(PRIVATE, |bytes| DecryptingKey::from_pem(pem::text(bytes)?))?;
        let is_pair = self.required(PUBLIC, |bytes| current.is_pair_of(pem::text(bytes)?))?;
        if !is_pair {
            return Err(KeypairError::Mismatch {
                public: self.key(PUBLIC),
                private: self.key(PRIVATE),
            });
        }
        let previous = self.optional(PREVIOUS_PRIVATE, |bytes| {
            DecryptingKey::from_pem(pem::text(bytes)?)
        })?;
        Ok(Rotating { current, previous })
    }

    /// The root of session keys, and the one before it.
    pub(in crate::keypair) fn root(&self) -> Result<Rotating<SessionRoot>, KeypairError> {
        Ok(Rotating {
            current: self.required(ROOT, root::parse)?,
            previous: self.optional(PREVIOUS_ROOT, root::parse)?,
        })
    }

    /// The key that signs, and those that are only published.
    pub(in crate::keypair) fn signing(&self) -> Result<SigningKeys, KeypairError> {
        let parse = |bytes: &[u8]| SigningKey::from_pem(pem::text(bytes)?);
        let current = self.required(PRIVATE, parse)?;
        let next = self.optional(NEXT_PRIVATE, parse)?;
        let previous = self.optional(PREVIOUS_PRIVATE, parse)?;
        Ok(SigningKeys::new(current, next, previous))
    }

    fn required<T>(
        &self,
        key: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, InvalidKey>,
    ) -> Result<T, KeypairError> {
        self.optional(key, parse)?
            .ok_or_else(|| KeypairError::Absent {
                secret: self.place.clone(),
                key: key.to_owned(),
            })
    }

    fn optional<T>(
        &self,
        key: &str,
        parse: impl FnOnce(&[u8]) -> Result<T, InvalidKey>,
    ) -> Result<Option<T>, KeypairError> {
        let Some(bytes) = self.data.get(key) else {
            return Ok(None);
        };
        parse(bytes)
            .map(Some)
            .map_err(|source| KeypairError::Malformed {
                place: self.key(key),
                source,
            })
    }

    fn key(&self, key: &str) -> String {
        format!("key {key} of {}", self.place)
    }
}
