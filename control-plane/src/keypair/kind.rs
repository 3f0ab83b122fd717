//! The kinds of keys that there are, each in a Secret of its own.

use std::fmt;

use clap::ValueEnum;

use super::secret::{SESSION_ROOT, SIGNING_KEY, TOKEN_KEYPAIR};

/// A kind of key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum KeyKind {
    /// The RSA keypair that runners encrypt their session's id for.
    Keypair,
    /// The root from which sessions' keys are made.
    SessionRoot,
    /// The RSA key that signs minted tokens.
    SigningKey,
}

impl KeyKind {
    /// All, in the order in which people are shown them.
    pub const ALL: [Self; 3] = [Self::Keypair, Self::SessionRoot, Self::SigningKey];

    /// Name on the command line and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Keypair => "keypair",
            Self::SessionRoot => "session-root",
            Self::SigningKey => "signing-key",
        }
    }

    /// Name of its Secret.
    pub fn secret(self) -> &'static str {
        match self {
            Self::Keypair => TOKEN_KEYPAIR,
            Self::SessionRoot => SESSION_ROOT,
            Self::SigningKey => SIGNING_KEY,
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Keypair => "keypair",
            Self::SessionRoot => "session root",
            Self::SigningKey => "signing key",
        })
    }
}
