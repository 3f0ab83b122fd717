//! The `static` issuer: one token from the settings, for every session.

use std::time::Duration;

use ambient_shared::token::{InvalidToken, Token};
use futures_util::future::BoxFuture;
use secrecy::{ExposeSecret as _, SecretString};

use super::{IssueError, Issuer, Subject};

/// Hands out the same token for ever. Where it is a JWT, its own `exp` is told to who gets it.
#[derive(Debug)]
pub struct FixedIssuer(Token);

impl FixedIssuer {
    /// An issuer of this token.
    ///
    /// # Errors
    /// When the text cannot be a token.
    pub fn new(token: &SecretString) -> Result<Self, InvalidToken> {
        Token::new(token.expose_secret(), None).map(Self)
    }

    /// The token, for the control plane's own calls.
    pub fn token(&self) -> &Token {
        &self.0
    }
}

impl Issuer for FixedIssuer {
    fn issue<'a>(
        &'a self,
        _subject: &'a Subject,
        _min_life: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>> {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }

    fn life(&self) -> Option<Duration> {
        None
    }
}
