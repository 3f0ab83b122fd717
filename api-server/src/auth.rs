//! Who calls: static tokens, and JWTs against one or more JWKS.
//!
//! In: `authorization` values as sent. Out: a [`Caller`]. What callers may do is in [`access`].

pub(crate) mod access;
pub(crate) mod keys;

use std::{sync::Arc, time::SystemTime};

use ambient_shared::{
    client::ClientError,
    clock::{Clock, from_unix_seconds, unix_seconds},
    session::SessionId,
    telemetry,
    token::MAX_LENGTH,
};
use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{Digest, SHA256, digest},
};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use jsonwebtoken::{Algorithm, TokenData, Validation, decode, decode_header};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use self::{
    access::{Caller, Who},
    keys::{Key, KeyRing, Signs},
};
use crate::{error::Error, metrics, settings::Settings};

/// User name of who calls with the operator token.
pub(crate) const OPERATOR: &str = "operator";

/// What a token for a session has as `sub`, before the session's id.
const SESSION_SUBJECT: &str = "session:";

/// How far a token's `nbf` may lie ahead: clocks differ. `exp` has no such allowance.
const NOT_BEFORE_LEEWAY: u64 = 60;

/// Algorithms with a public key. With any other, who can verify could sign.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];

/// Tells who calls.
pub(crate) struct Auth {
    keys: Arc<KeyRing>,
    fixed: Vec<(Digest, Who)>,
    issuers: Vec<String>,
    audiences: Vec<String>,
    /// The same for tokens by keys that sign session tokens alone.
    session_issuers: Vec<String>,
    session_audiences: Vec<String>,
    service_account: Option<String>,
    admins: Vec<String>,
    clock: Clock,
}

type Claims = Map<String, Value>;

impl Auth {
    /// As the settings say; no keys are read yet.
    ///
    /// # Errors
    /// When the HTTP client for keys cannot be set up.
    pub(crate) fn new(settings: &Settings, clock: Clock) -> Result<Self, ClientError> {
        let users = if settings.session_jwks.is_empty() {
            Signs::Both
        } else {
            Signs::Users
        };
        let sources = settings
            .jwks
            .iter()
            .map(|source| (source.clone(), users))
            .chain(
                settings
                    .session_jwks
                    .iter()
                    .map(|source| (source.clone(), Signs::Sessions)),
            );
        let fixed = [
            (&settings.api_token, Who::Service(None)),
            (
                &settings.operator_token,
                Who::Administrator(OPERATOR.to_owned()),
            ),
        ];
        let (issuers, audiences) = (trimmed(&settings.issuer), trimmed(&settings.audience));
        let of_sessions = |own: &[String], users: &[String]| {
            let own = trimmed(own);
            if own.is_empty() { users.to_vec() } else { own }
        };
        Ok(Self {
            keys: Arc::new(KeyRing::new(sources, clock.clone())?),
            fixed: fixed
                .into_iter()
                .filter_map(|(token, who)| Some((fingerprint(token.as_ref()?), who)))
                .collect(),
            session_issuers: of_sessions(&settings.session_issuer, &issuers),
            session_audiences: of_sessions(&settings.session_audience, &audiences),
            issuers,
            audiences,
            service_account: settings.service_account.clone(),
            admins: trimmed(&settings.admins),
            clock,
        })
    }

    /// Keeps keys fresh until `shutdown`.
    pub(crate) async fn run(self: Arc<Self>, shutdown: CancellationToken) {
        Arc::clone(&self.keys).run(shutdown).await;
    }

    /// Who sent these `authorization` values: existing clients send the same one twice.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when nobody we know did.
    pub(crate) async fn caller<'v>(
        &self,
        values: impl IntoIterator<Item = &'v [u8]>,
    ) -> Result<Caller, Error> {
        let caller = match bearer(values) {
            Ok(token) => self.caller_of(token).await,
            Err(error) => Err(error),
        };
        if caller.is_err() {
            metrics::sign_in_refused();
        }
        caller
    }

    /// Makes a call's span, which nobody has entered yet, a part of its caller's trace, if the caller
    /// is signed in: by a stranger's word nothing is exported.
    pub(crate) async fn follow(&self, span: &Span, headers: &HeaderMap) {
        if !telemetry::is_told(span, headers) {
            return;
        }
        let values = headers.get_all(AUTHORIZATION).iter();
        // A refusal is counted when the call itself is refused.
        if let Ok(token) = bearer(values.map(HeaderValue::as_bytes))
            && self.caller_of(token).await.is_ok()
        {
            telemetry::follow(span, headers);
        }
    }

    async fn caller_of(&self, token: &str) -> Result<Caller, Error> {
        if let Some(who) = self.fixed_caller(token) {
            return Ok(Caller {
                who,
                expires_at: None,
            });
        }
        let header = decode_header(token)
            .map_err(|_| Error::unauthenticated("token is neither a known one nor a JWT"))?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(Error::unauthenticated(
                "token is signed with an algorithm that is not accepted",
            ));
        }
        let candidates = self.keys.find(header.kid.as_deref()).await;
        let (claims, signs) = candidates
            .iter()
            .find_map(|key| Some((verified(token, header.alg, key)?, key.signs)))
            .ok_or_else(|| Error::unauthenticated("token is not signed by a known key"))?;
        let expires_at = self.check_claims(&claims, signs)?;
        Ok(Caller {
            who: self.who(&claims, signs)?,
            expires_at: Some(expires_at),
        })
    }

    /// Compares with every static token, in the same time whether or not one matches.
    fn fixed_caller(&self, token: &str) -> Option<Who> {
        let sent = digest(&SHA256, token.as_bytes());
        let mut found = None;
        for (known, who) in &self.fixed {
            if verify_slices_are_equal(known.as_ref(), sent.as_ref()).is_ok() {
                found = Some(who.clone());
            }
        }
        found
    }

    fn check_claims(&self, claims: &Claims, signs: Signs) -> Result<SystemTime, Error> {
        let now = self.clock.now();
        let expires_at = date(claims, "exp")
            .and_then(from_unix_seconds)
            .ok_or_else(|| Error::unauthenticated("token does not say when it expires"))?;
        if expires_at <= now {
            return Err(Error::unauthenticated("token expired"));
        }
        if date(claims, "nbf").is_some_and(|from| from > unix_seconds(now) + NOT_BEFORE_LEEWAY) {
            return Err(Error::unauthenticated("token is not valid yet"));
        }
        let (issuers, audiences) = match signs {
            Signs::Sessions => (&self.session_issuers, &self.session_audiences),
            Signs::Users | Signs::Both => (&self.issuers, &self.audiences),
        };
        if !accepted(issuers, claims.get("iss")) {
            return Err(Error::unauthenticated("token is of another issuer"));
        }
        if !accepted(audiences, claims.get("aud")) {
            return Err(Error::unauthenticated("token is for another audience"));
        }
        Ok(expires_at)
    }

    fn who(&self, claims: &Claims, signs: Signs) -> Result<Who, Error> {
        let text = |name| claims.get(name).and_then(Value::as_str);
        let of_session = text("sub").and_then(|subject| subject.strip_prefix(SESSION_SUBJECT));
        match (of_session, signs) {
            (Some(id), Signs::Sessions | Signs::Both) => session(id, claims),
            (Some(_), Signs::Users) => Err(Error::unauthenticated(
                "token is for a session, but not signed by a key for these",
            )),
            (None, Signs::Sessions) => Err(Error::unauthenticated(
                "token is not for a session, but signed by a key for these alone",
            )),
            (None, Signs::Users | Signs::Both) => ["preferred_username", "username", "sub"]
                .into_iter()
                .filter_map(text)
                // Names of other worlds, such as `system:serviceaccount:…`, are not user names.
                .find(|name| !name.is_empty() && !name.contains(':'))
                .ok_or_else(|| Error::unauthenticated("token names no user"))
                .and_then(|name| self.user(name)),
        }
    }

    fn user(&self, name: &str) -> Result<Who, Error> {
        if self.admins.iter().any(|admin| admin == name) {
            return Ok(Who::Administrator(name.to_owned()));
        }
        let is_service = self.service_account.as_deref().is_some_and(|account| {
            name == account || name.strip_prefix("service-account-") == Some(account)
        });
        if is_service {
            return Ok(Who::Service(Some(name.to_owned())));
        }
        if name == OPERATOR
            && self
                .fixed
                .iter()
                .any(|(_, who)| matches!(who, Who::Administrator(_)))
        {
            // Else that user would own what the operator token made.
            return Err(Error::unauthenticated(
                "the user name operator belongs to the operator token",
            ));
        }
        Ok(Who::Person(name.to_owned()))
    }
}

/// The one bearer token of all `authorization` values.
fn bearer<'v>(values: impl IntoIterator<Item = &'v [u8]>) -> Result<&'v str, Error> {
    let mut values = values.into_iter();
    let first = values
        .next()
        .ok_or_else(|| Error::unauthenticated("authorization is missing"))?;
    if values.any(|other| other != first) {
        return Err(Error::unauthenticated("authorization is given twice"));
    }
    let (_, token) = std::str::from_utf8(first)
        .ok()
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .ok_or_else(|| Error::unauthenticated("authorization is not a bearer token"))?;
    let token = token.trim();
    if token.is_empty() || token.len() > MAX_LENGTH {
        return Err(Error::unauthenticated("authorization has no usable token"));
    }
    Ok(token)
}

/// The claims, if the key signed them. Times are checked by the caller, against our own clock.
fn verified(token: &str, algorithm: Algorithm, key: &Key) -> Option<Claims> {
    if key.algorithm.is_some_and(|only| only != algorithm) {
        return None;
    }
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    let TokenData { claims, .. } = decode(token, &key.verifier, &validation).ok()?;
    Some(claims)
}

fn session(id: &str, claims: &Claims) -> Result<Who, Error> {
    let id = SessionId::parse(id)
        .map_err(|_| Error::unauthenticated("token is for something that is no session id"))?;
    let generation = claims.get("gen").and_then(Value::as_i64);
    let typed = claims.get("typ").and_then(Value::as_str) == Some("Bearer");
    let Some(generation) = generation.filter(|_| typed) else {
        return Err(Error::unauthenticated(
            "session token without typ=Bearer and gen",
        ));
    };
    Ok(Who::Session {
        id: id.into(),
        generation,
    })
}

/// RFC 7519, section 2: seconds since the epoch, maybe with a fraction, which is dropped.
fn date(claims: &Claims, name: &str) -> Option<u64> {
    let value = claims.get(name)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast from f64 saturates; the fraction is dropped on purpose"
    )]
    value.as_u64().or_else(|| {
        value
            .as_f64()
            .filter(|date| *date >= 0.0)
            .map(|date| date as u64)
    })
}

/// Whether a claim, a text or several, has one of the accepted values; all are when none is set.
fn accepted(values: &[String], claim: Option<&Value>) -> bool {
    let is_one = |value: &Value| {
        value
            .as_str()
            .is_some_and(|text| values.iter().any(|value| value == text))
    };
    values.is_empty()
        || match claim {
            Some(Value::Array(several)) => several.iter().any(is_one),
            Some(one) => is_one(one),
            None => false,
        }
}

fn fingerprint(token: &SecretString) -> Digest {
    digest(&SHA256, token.expose_secret().trim().as_bytes())
}

fn trimmed(values: &[String]) -> Vec<String> {
    values
        .iter()
        .map(|value| value.trim().to_owned())
        .filter(|value| !value.is_empty())
        .collect()
}

#[cfg(test)]
mod tests;
