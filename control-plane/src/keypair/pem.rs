//! RSA private keys as PEM.
//!
//! Read as PKCS#1 or PKCS#8, written as PKCS#1, which is all that existing servers read (contract
//! section 1).

use aws_lc_rs::{
    encoding::{AsDer as _, Pkcs8V1Der},
    error::{KeyRejected, Unspecified},
    rsa::KeyPair,
};
use rsa::pkcs8::{LineEnding, PrivateKeyInfoRef, SecretDocument, der};
use zeroize::Zeroizing;

/// Label of PKCS#1.
const PKCS1: &str = "RSA PRIVATE KEY";

/// Label of PKCS#8.
const PKCS8: &str = "PRIVATE KEY";

/// Fewest and most bits of a key that our clients accept (contract section 1).
const BITS: std::ops::RangeInclusive<usize> =
    ambient_shared::bearer::MIN_KEY_BITS..=ambient_shared::bearer::MAX_KEY_BITS;

/// Why something is not the key it should be. Holds nothing of the key.
#[derive(Debug, thiserror::Error)]
pub enum InvalidKey {
    /// Not text.
    #[error("it is not text")]
    NotText,
    /// Not PEM, or cut off.
    #[error("it is not PEM")]
    NotPem(#[source] der::Error),
    /// PEM of something else.
    #[error("it holds a PEM block `{0}`; `{PKCS1}` or `{PKCS8}` is needed")]
    OtherBlock(String),
    /// DER that is no consistent RSA private key.
    #[error("it is not an RSA private key ({0})")]
    NotRsa(KeyRejected),
    /// Too weak, or so large that using it would take seconds.
    #[error("its RSA key has {0} bits; {min} to {max} are accepted", min = BITS.start(), max = BITS.end())]
    KeySize(usize),
    /// Not a public key.
    #[error("it is not an RSA public key in PEM (`BEGIN PUBLIC KEY`)")]
    NotPublic,
    /// A root of session keys of the wrong length.
    #[error("it has {0} bytes; {needed} are needed", needed = ambient_shared::proof::ROOT_LENGTH)]
    RootLength(usize),
    /// A time that is no number of seconds.
    #[error("it is not a number of seconds")]
    NotSeconds,
    /// The cryptographic library failed.
    #[error("the cryptographic library failed")]
    Library(#[from] Unspecified),
}

/// PEM as text.
///
/// # Errors
/// When it is none.
pub fn text(bytes: &[u8]) -> Result<&str, InvalidKey> {
    std::str::from_utf8(bytes).map_err(|_| InvalidKey::NotText)
}

/// Reads a private key.
///
/// # Errors
/// [`InvalidKey`] says what it is instead.
pub fn read(pem: &str) -> Result<KeyPair, InvalidKey> {
    let (label, document) = SecretDocument::from_pem(pem.trim()).map_err(InvalidKey::NotPem)?;
    let key = match label {
        PKCS1 => KeyPair::from_der(document.as_bytes()),
        PKCS8 => KeyPair::from_pkcs8(document.as_bytes()),
        other => return Err(InvalidKey::OtherBlock(other.to_owned())),
    };
    let key = key.map_err(InvalidKey::NotRsa)?;
    let bits = key.public_modulus_len() * 8;
    if BITS.contains(&bits) {
        Ok(key)
    } else {
        Err(InvalidKey::KeySize(bits))
    }
}

/// Writes a private key as PKCS#1.
///
/// # Errors
/// When the library fails.
pub fn write(key: &KeyPair) -> Result<Zeroizing<String>, InvalidKey> {
    let pkcs8: Pkcs8V1Der<'_> = key.as_der()?;
    // PKCS#8 of an RSA key is an envelope around its PKCS#1 form (RFC 5208, RFC 8017 A.1).
    let envelope = PrivateKeyInfoRef::try_from(pkcs8.as_ref()).map_err(|_| Unspecified)?;
    SecretDocument::try_from(envelope.private_key.as_bytes())
        .and_then(|pkcs1| pkcs1.to_pem(PKCS1, LineEnding::LF))
        .map_err(InvalidKey::NotPem)
}
