//! Where sessions' API tokens come from.

use std::time::Duration;

use ambient_shared::{session::SessionId, token::Token};
use bytes::Bytes;
use futures_util::future::BoxFuture;

pub mod fixed;
pub mod minted;
pub mod oidc;

/// For whom a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The session.
    pub session: SessionId,
    /// How often it was started before.
    pub generation: u32,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The identity provider cannot be reached, or answered that it failed.
    #[error("identity provider {url} does not answer")]
    Unreachable {
        /// Its token URL.
        url: url::Url,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The identity provider refuses our client id or secret.
    #[error(
        "identity provider {url} refuses the client ({reason}); check OIDC_CLIENT_ID and OIDC_CLIENT_SECRET"
    )]
    Refused {
        /// Its token URL.
        url: url::Url,
        /// Status, and the OAuth error code.
        reason: String,
    },
    /// The identity provider's answer holds no usable token.
    #[error("identity provider {url} answered without a usable token ({reason})")]
    Malformed {
        /// Its token URL.
        url: url::Url,
        /// What is wrong with it; never the token.
        reason: String,
    },
    /// Signing failed.
    #[error("cannot sign a token")]
    Sign(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A source of API tokens: `static`, `oidc` or `minted`.
pub trait Issuer: Send + Sync + 'static {
    /// A token for this session that has at least `min_life` left, as far as the issuer can have
    /// one: what is nearer to its end is renewed first.
    fn issue<'a>(
        &'a self,
        subject: &'a Subject,
        min_life: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>>;

    /// The whole life of its tokens, as far as known now. None: they do not expire, or none was
    /// issued yet.
    fn life(&self) -> Option<Duration>;

    /// The public halves of the keys that sign its tokens at this moment, for
    /// `/.well-known/jwks.json`: the JSON text of a JWK set. None when somebody else signs them.
    fn jwks(&self) -> Option<Bytes> {
        None
    }
}
