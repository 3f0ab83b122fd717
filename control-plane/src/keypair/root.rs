//! The bytes of a root of session keys.

use ambient_shared::proof::{ROOT_LENGTH, SessionRoot};
use aws_lc_rs::rand;
use zeroize::Zeroizing;

use super::pem::InvalidKey;

/// A new root, at random.
///
/// # Errors
/// When the library fails.
pub(super) fn generate() -> Result<Zeroizing<Vec<u8>>, InvalidKey> {
    let mut root = Zeroizing::new(vec![0; ROOT_LENGTH]);
    rand::fill(&mut root)?;
    Ok(root)
}

/// Reads a root.
///
/// # Errors
/// When it has another length.
pub(super) fn parse(bytes: &[u8]) -> Result<SessionRoot, InvalidKey> {
    let root = <[u8; ROOT_LENGTH]>::try_from(bytes);
    root.map(SessionRoot::new)
        .map_err(|_| InvalidKey::RootLength(bytes.len()))
}
