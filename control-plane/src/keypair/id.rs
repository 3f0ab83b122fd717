//! Short public names of keys, by which objects in a cluster say which keys they were made with.

use std::{fmt, str::FromStr};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

/// Characters of an id.
const LENGTH: usize = 16;

/// The id of a key: 16 hexadecimal digits that say nothing of the key itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct KeyId(u64);

/// A text that is no id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not {LENGTH} hexadecimal digits")]
pub struct InvalidKeyId;

impl KeyId {
    /// Of 8 bytes that are public.
    pub const fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_be_bytes(bytes))
    }

    /// Of a public key: the first 8 bytes of the SHA-256 of its SubjectPublicKeyInfo.
    pub(super) fn of_public_key(der: &[u8]) -> Self {
        let hash = digest::digest(&digest::SHA256, der);
        let mut first = [0; 8];
        for (byte, of_hash) in first.iter_mut().zip(hash.as_ref()) {
            *byte = *of_hash;
        }
        Self::from_bytes(first)
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0LENGTH$x}", self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = InvalidKeyId;

    fn from_str(text: &str) -> Result<Self, InvalidKeyId> {
        let is_hex = text.len() == LENGTH && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = is_hex.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        number.map(Self).ok_or(InvalidKeyId)
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for KeyId {
    type Error = InvalidKeyId;

    fn try_from(text: String) -> Result<Self, InvalidKeyId> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_as_it_was_written() {
        for text in ["0000000000000001", "00ff12ab34cd56ef", "ffffffffffffffff"] {
            assert_eq!(text.parse::<KeyId>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "1",
            "+000000000000001",
            "00000000000000001",
            "000000000000000g",
            "0000000 00000001",
        ] {
            assert_eq!(text.parse::<KeyId>(), Err(InvalidKeyId), "{text}");
        }
    }

    #[test]
    fn the_id_of_a_public_key_is_its_fingerprint_s_beginning() {
        // SHA-256 of "abc" (FIPS 180-2).
        assert_eq!(KeyId::of_public_key(b"abc").to_string(), "ba7816bf8f01cfea");
    }
}
