//! The `minted` issuer: the control plane signs a short-lived token for one session.
//!
//! RS256, `kid`, claims `iss`, `aud`, `sub` = `session:<id>`, `typ` = `Bearer`, `iat`, `exp` and
//! `gen`. A token is signed once and handed out again while it is young, so that who asks always
//! gets one with most of its life left, and a flood of requests costs no signatures.

use std::time::Duration;

use ambient_shared::{
    clock::{self, Clock},
    session::SessionId,
    token::Token,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use metrics::counter;
use moka::future::Cache;
use serde::Serialize;
use tracing::{Instrument as _, debug_span};

use super::{IssueError, Issuer, Subject};
use crate::{keypair::Keyring, metrics::TOKENS_ISSUED};

/// `iss` of our minted tokens.
pub const ISSUER: &str = "ambient-control-plane";

/// `aud` of our minted tokens.
pub const AUDIENCE: &str = "ambient-api";

/// Most tokens kept to be handed out again: about 1 KiB each, and some 10,000 sessions run at a
/// time; what is evicted is signed again.
const KEPT_TOKENS: u64 = 20_000;

/// A token is handed out again until it has used up this part of its life.
const YOUNG: u32 = 10;

/// Signs tokens.
pub struct MintedIssuer {
    keys: Keyring,
    issuer: String,
    audience: String,
    life: Duration,
    clock: Clock,
    young: Cache<(SessionId, u32), Minted>,
}

#[derive(Clone)]
struct Minted {
    token: Token,
    issued_at: u64,
}

#[derive(Serialize)]
struct Claims<'a> {
    iss: &'a str,
    aud: &'a str,
    sub: String,
    typ: &'static str,
    iat: u64,
    exp: u64,
    #[serde(rename = "gen")]
    generation: u32,
}

impl MintedIssuer {
    /// Signs with the signing key that `keys` has at that moment. `life` counts in whole seconds, as `exp` does; at least
    /// one.
    pub fn new(
        keys: Keyring,
        issuer: String,
        audience: String,
        life: Duration,
        clock: Clock,
    ) -> Self {
        let life = Duration::from_secs(life.as_secs().max(1));
        Self {
            keys,
            issuer,
            audience,
            life,
            clock,
            young: Cache::builder()
                .max_capacity(KEPT_TOKENS)
                .time_to_live((life / YOUNG).max(Duration::from_secs(1)))
                .build(),
        }
    }

    fn mint(&self, subject: &Subject, now: u64) -> Result<Minted, IssueError> {
        let sign_failed = |error: Box<dyn std::error::Error + Send + Sync>| IssueError::Sign(error);
        let expires_at = now.saturating_add(self.life.as_secs());
        let claims = Claims {
            iss: &self.issuer,
            aud: &self.audience,
            sub: format!("session:{}", subject.session.as_str()),
            typ: "Bearer",
            iat: now,
            exp: expires_at,
            generation: subject.generation,
        };
        let jwt = self.keys.current().signing().current().sign(&claims);
        let jwt = jwt.map_err(|error| sign_failed(error.into()))?;
        let token = Token::new(&jwt, clock::from_unix_seconds(expires_at));
        counter!(TOKENS_ISSUED, "issuer" => "minted").increment(1);
        Ok(Minted {
            token: token.map_err(|error| sign_failed(error.into()))?,
            issued_at: now,
        })
    }

    /// Whether signing again would gain too little: it is young and lives long enough, or would
    /// come out the same, as its times are whole seconds.
    fn is_good(&self, minted: &Minted, min_life: Duration, now: u64) -> bool {
        let age = Duration::from_secs(now.abs_diff(minted.issued_at));
        let left = self.life.saturating_sub(age);
        now == minted.issued_at
            || (now > minted.issued_at && age <= self.life / YOUNG && left >= min_life)
    }
}

impl Issuer for MintedIssuer {
    fn issue<'a>(
        &'a self,
        subject: &'a Subject,
        min_life: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>> {
        let span = debug_span!("issue token", issuer = "minted");
        let issued = async move {
            let key = (subject.session.clone(), subject.generation);
            let now = self.clock.unix_seconds();
            if let Some(minted) = self.young.get(&key).await
                && self.is_good(&minted, min_life, now)
            {
                return Ok(minted.token);
            }
            let minted = self.mint(subject, now)?;
            self.young.insert(key, minted.clone()).await;
            Ok(minted.token)
        };
        Box::pin(issued.instrument(span))
    }

    fn life(&self) -> Option<Duration> {
        Some(self.life)
    }

    fn jwks(&self) -> Option<Bytes> {
        Some(self.keys.current().signing().jwks())
    }
}

impl std::fmt::Debug for MintedIssuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MintedIssuer")
            .field("issuer", &self.issuer)
            .field("audience", &self.audience)
            .field("life", &self.life)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
