//! The key that session ids are encrypted for.

use std::fmt;

use aws_lc_rs::{
    encoding::{AsDer as _, Pkcs8V1Der, PublicKeyX509Der},
    rsa::{
        KeyPair, KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey,
    },
};
use rsa::pkcs8::{Document, LineEnding};
use zeroize::Zeroizing;

use super::{
    id::KeyId,
    pem::{self, InvalidKey},
};

/// Label of SubjectPublicKeyInfo.
const PUBLIC: &str = "PUBLIC KEY";

/// An RSA private key for decryption, and its public half.
pub struct DecryptingKey {
    key: OaepPrivateDecryptingKey,
    public_pem: String,
    id: KeyId,
}

impl DecryptingKey {
    /// A new key of 4096 bits (contract section 1), as PKCS#1 PEM. Takes about half a second.
    ///
    /// # Errors
    /// When the library fails.
    pub fn generate() -> Result<Zeroizing<String>, InvalidKey> {
        pem::write(&KeyPair::generate(KeySize::Rsa4096)?)
    }

    /// Reads a private key, PKCS#1 or PKCS#8.
    ///
    /// # Errors
    /// [`InvalidKey`] says what it is instead.
    pub fn from_pem(private: &str) -> Result<Self, InvalidKey> {
        let pkcs8: Pkcs8V1Der<'_> = pem::read(private)?.as_der()?;
        let key = PrivateDecryptingKey::from_pkcs8(pkcs8.as_ref()).map_err(InvalidKey::NotRsa)?;
        let public: PublicKeyX509Der<'_> = key.public_key().as_der()?;
        let public_pem = Document::try_from(public.as_ref())
            .and_then(|document| document.to_pem(PUBLIC, LineEnding::LF))
            .map_err(InvalidKey::NotPem)?;
        Ok(Self {
            key: OaepPrivateDecryptingKey::new(key)?,
            public_pem,
            id: KeyId::of_public_key(public.as_ref()),
        })
    }

    /// Its public half: SubjectPublicKeyInfo PEM.
    pub fn public_pem(&self) -> &str {
        &self.public_pem
    }

    /// Its public name.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Whether this PEM, however it is broken into lines, is the public half.
    ///
    /// # Errors
    /// When it is not a public key at all.
    pub fn is_pair_of(&self, public_pem: &str) -> Result<bool, InvalidKey> {
        let read = |pem: &str| match Document::from_pem(pem.trim()) {
            Ok((PUBLIC, document)) => Ok(document.into_vec()),
            _ => Err(InvalidKey::NotPublic),
        };
        Ok(read(public_pem)? == read(&self.public_pem)?)
    }

    /// Bytes of every ciphertext for this key.
    pub fn ciphertext_length(&self) -> usize {
        self.key.key_size_bytes()
    }

    /// RSA-OAEP with SHA-256, MGF1 SHA-256 and an empty label. None, whatever is wrong with the
    /// ciphertext: telling more would help to forge one.
    pub fn open(&self, ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let mut plaintext = Zeroizing::new(vec![0; self.key.min_output_size()]);
        let length = self
            .key
            .decrypt(&OAEP_SHA256_MGF1SHA256, ciphertext, &mut plaintext, None)
            .ok()?
            .len();
        plaintext.truncate(length);
        Some(plaintext)
    }
}

impl fmt::Debug for DecryptingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecryptingKey")
            .field("id", &self.id)
            .field("bits", &self.key.key_size_bits())
            .finish_non_exhaustive()
    }
}
