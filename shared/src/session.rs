//! Session ids, and the hash under which they may be logged.

use std::{fmt, sync::Arc};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

/// Fewest characters of a session id (contract section 1).
pub const MIN_LENGTH: usize = 8;

/// Most bytes of a session id: the longest plaintext of RSA-4096 OAEP with SHA-256
/// (RFC 8017, section 7.1.1: 512 - 2 * 32 - 2).
pub const MAX_LENGTH: usize = 446;

/// A valid session id.
///
/// Clones share the text. `Debug` shows its [`SessionHash`]: whoever reads a log must not learn ids.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SessionId(Arc<str>);

/// Why a text is not a session id. The text itself is left out on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSessionId {
    /// Fewer than [`MIN_LENGTH`] characters.
    #[error("session id has {0} characters; at least {MIN_LENGTH} are needed")]
    TooShort(usize),
    /// More than [`MAX_LENGTH`] bytes.
    #[error("session id has {0} bytes; at most {MAX_LENGTH} fit into one RSA block")]
    TooLong(usize),
    /// A space, tab, CR or LF.
    #[error("session id has white space in it")]
    WhiteSpace,
}

/// How many characters of a session's id are in the names of its Kubernetes objects (contract
/// section 3).
pub const IN_NAMES: usize = 40;

impl SessionId {
    /// Checks a session id against contract section 1.
    ///
    /// # Errors
    /// When it is too short, too long, or has a space, tab, CR or LF.
    pub fn parse(id: impl Into<String>) -> Result<Self, InvalidSessionId> {
        let id = id.into();
        if id.contains([' ', '\t', '\r', '\n']) {
            return Err(InvalidSessionId::WhiteSpace);
        }
        let characters = id.chars().count();
        if characters < MIN_LENGTH {
            return Err(InvalidSessionId::TooShort(characters));
        }
        if id.len() > MAX_LENGTH {
            return Err(InvalidSessionId::TooLong(id.len()));
        }
        Ok(Self(id.into()))
    }

    /// The id as text. Not for logs: see [`SessionId::hash`].
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What logs show in place of the id.
    pub fn hash(&self) -> SessionHash {
        SessionHash::of(&self.0)
    }

    /// A text with the hash in place of the id, and of its beginning as names of Kubernetes objects
    /// have it ([`IN_NAMES`]), in whatever case: for what others say, which may quote either.
    pub fn masked_in(&self, text: &str) -> String {
        let hash = self.hash().to_string();
        let short: String = self.0.chars().take(IN_NAMES).collect();
        let masked = replace_any_case(text, &self.0, &hash);
        replace_any_case(&masked, &short, &hash)
    }
}

/// ASCII letters of `what` in any case.
fn replace_any_case(text: &str, what: &str, with: &str) -> String {
    let (folded, what) = (text.to_ascii_lowercase(), what.to_ascii_lowercase());
    let mut replaced = String::with_capacity(text.len());
    let mut from = 0;
    while let Some(found) = folded[from..].find(&what) {
        replaced.push_str(&text[from..from + found]);
        replaced.push_str(with);
        from += found + what.len();
    }
    replaced.push_str(&text[from..]);
    replaced
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({})", self.hash())
    }
}

impl TryFrom<String> for SessionId {
    type Error = InvalidSessionId;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        Self::parse(id)
    }
}

impl From<SessionId> for String {
    fn from(id: SessionId) -> Self {
        id.as_str().to_owned()
    }
}

impl std::str::FromStr for SessionId {
    type Err = InvalidSessionId;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        Self::parse(id)
    }
}

/// A short one-way name of a session, the same in all programs: the first 6 bytes of the
/// SHA-256 of the id, in hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionHash([u8; 6]);

impl SessionHash {
    /// The hash of any id, valid or not.
    pub fn of(id: &str) -> Self {
        Self(short_digest(id.as_bytes()))
    }
}

impl fmt::Display for SessionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The first 6 bytes of a SHA-256: enough to tell sessions and tokens of one installation apart.
pub(crate) fn short_digest(bytes: &[u8]) -> [u8; 6] {
    let digest = digest::digest(&digest::SHA256, bytes);
    let mut short = [0; 6];
    short.copy_from_slice(&digest.as_ref()[..6]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_masked_wherever_others_quote_it() {
        let text = format!("Session-ABCDEF-{}", "x".repeat(40));
        let id = SessionId::parse(text.clone()).unwrap();
        let hash = id.hash();
        let short = text[..IN_NAMES].to_lowercase();
        assert_eq!(
            id.masked_in(&format!("pod \"session-{short}-runner\" of {text} é")),
            format!("pod \"session-{hash}-runner\" of {hash} é")
        );
        assert_eq!(id.masked_in("nothing of it"), "nothing of it");
    }

    #[test]
    fn ids_outside_the_contract_are_refused() {
        assert_eq!(
            SessionId::parse("short"),
            Err(InvalidSessionId::TooShort(5))
        );
        assert_eq!(
            SessionId::parse("with a space"),
            Err(InvalidSessionId::WhiteSpace)
        );
        assert_eq!(
            SessionId::parse("tab\tinside"),
            Err(InvalidSessionId::WhiteSpace)
        );
        assert_eq!(
            SessionId::parse("x".repeat(447)),
            Err(InvalidSessionId::TooLong(447))
        );
        assert!(SessionId::parse("x".repeat(446)).is_ok());
        assert!(SessionId::parse("ünïcödé8").is_ok());
    }

    #[test]
    fn debug_output_hides_the_id() {
        let id = SessionId::parse("session-0001").unwrap();
        let shown = format!("{id:?}");
        assert!(!shown.contains("session-0001"), "{shown}");
        assert!(shown.contains(&id.hash().to_string()), "{shown}");
    }

    #[test]
    fn hash_is_the_start_of_sha256() {
        // printf abc | sha256sum
        assert_eq!(SessionHash::of("abc").to_string(), "ba7816bf8f01");
    }
}
