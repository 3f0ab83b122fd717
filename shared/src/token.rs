//! An API token: the secret, how long it lives, and when to renew it.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use crate::{
    clock::{self, CLOCKS_AGREE},
    session::short_digest,
};

/// Life of a token that says nothing about its expiry: that of short-lived tokens in general use.
pub const ASSUMED_LIFE: Duration = Duration::from_mins(5);

/// Longest life that a token which looks expired on arrival is taken to have.
const DOUBTFUL_LIFE: Duration = Duration::from_secs(30);

/// Largest token accepted, in bytes: more than any server takes in a header.
pub const MAX_LENGTH: usize = 64 * 1024;

/// Shortest wait before a refresh: an expired token must not cause a busy loop.
pub const MIN_REFRESH: Duration = Duration::from_secs(1);

/// An API token. Clones share the secret; `Debug` shows only its [`TokenHash`].
#[derive(Clone)]
pub struct Token {
    secret: Arc<SecretString>,
    issued_at: Option<SystemTime>,
    expires_at: Option<SystemTime>,
}

/// Why a text cannot be a token. The text itself is never part of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidToken {
    /// Nothing but white space.
    #[error("token is empty")]
    Empty,
    /// More than [`MAX_LENGTH`] bytes.
    #[error("token has {0} bytes; at most {MAX_LENGTH} are accepted")]
    TooLong(usize),
    /// It holds bytes that no HTTP header can carry.
    #[error("token has characters that cannot be sent in an HTTP header")]
    NotAHeaderValue,
}

impl Token {
    /// A token from its text, without the white space around it.
    ///
    /// `expires_at` is what the issuer said; where it said nothing, a JWT's own `exp` counts. Where
    /// the two are apart, the JWT's times are of another clock, and its `iat` counts for nothing.
    ///
    /// # Errors
    /// When the text is empty, too long, or cannot stand in an `Authorization` header.
    pub fn new(secret: &str, expires_at: Option<SystemTime>) -> Result<Self, InvalidToken> {
        let secret = secret.trim();
        if secret.is_empty() {
            return Err(InvalidToken::Empty);
        }
        if secret.len() > MAX_LENGTH {
            return Err(InvalidToken::TooLong(secret.len()));
        }
        if !secret.bytes().all(|byte| (0x21..=0x7e).contains(&byte)) {
            return Err(InvalidToken::NotAHeaderValue);
        }
        let claims = JwtTimes::of(secret);
        let own = claims.exp.and_then(clock::from_unix_seconds);
        let issued_at = claims.iat.and_then(clock::from_unix_seconds);
        let is_of_one_clock = match (expires_at, own) {
            (Some(told), Some(own)) => clock::apart(told, own) < CLOCKS_AGREE,
            _ => true,
        };
        Ok(Self {
            secret: Arc::new(SecretString::from(secret.to_owned())),
            issued_at: issued_at.filter(|_| is_of_one_clock),
            expires_at: expires_at.or(own),
        })
    }

    /// The secret text. Never for logs, arguments or errors.
    pub fn expose(&self) -> &str {
        self.secret.expose_secret()
    }

    /// `Bearer <token>`, marked sensitive so that HTTP libraries do not print it.
    pub fn authorization(&self) -> HeaderValue {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.expose()))
            .unwrap_or_else(|_| HeaderValue::from_static("Bearer"));
        value.set_sensitive(true);
        value
    }

    /// When it was issued, if it is a JWT that says so, by the clock of its expiry.
    pub fn issued_at(&self) -> Option<SystemTime> {
        self.issued_at
    }

    /// When it expires, if anybody said so.
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.expires_at
    }

    /// When it expires, as RFC 3339 text in seconds. None also for a time that cannot be written so,
    /// past the year 9999.
    pub fn expires_at_text(&self) -> Option<String> {
        let seconds = i64::try_from(clock::unix_seconds(self.expires_at?)).ok()?;
        // 9999-12-31T23:59:59Z
        (seconds <= 253_402_300_799)
            .then(|| prost_types::Timestamp { seconds, nanos: 0 }.to_string())
    }

    /// Whether it must no longer be used. A token of unknown expiry never expires.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|expiry| expiry <= now)
    }

    /// Life left at `now`; zero when expired, none when nobody said when it expires.
    pub fn life_left(&self, now: SystemTime) -> Option<Duration> {
        self.expires_at
            .map(|expiry| expiry.duration_since(now).unwrap_or_default())
    }

    /// From issue to expiry, for a JWT that says both.
    fn whole_life(&self) -> Option<Duration> {
        self.expires_at?.duration_since(self.issued_at?).ok()
    }

    /// What logs and time lines show in place of the token.
    pub fn hash(&self) -> TokenHash {
        TokenHash(short_digest(self.expose().as_bytes()))
    }

    /// Whether both are the same secret.
    pub fn same_secret(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.secret, &other.secret) || self.expose() == other.expose()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("hash", &self.hash())
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// A short one-way name of a token: the first 6 bytes of its SHA-256, in hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash([u8; 6]);

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Wait before the next refresh: 4/5 of the life left, less up to a tenth of it at random,
/// so that runners started together do not refresh together.
///
/// `jitter` is a sample from `0.0..1.0`. Never below [`MIN_REFRESH`], unless the token would expire
/// before. No expiry counts as [`ASSUMED_LIFE`]. A token has never more life left than its whole life:
/// where it seems so, our clock is behind. A token that looks expired on arrival is most
/// likely good and our clock wrong: it is renewed by its whole life, at most [`DOUBTFUL_LIFE`].
pub fn refresh_in(token: &Token, now: SystemTime, jitter: f64) -> Duration {
    let part = 0.8 - 0.1 * jitter.clamp(0.0, 1.0);
    let left = token.life_left(now).unwrap_or(ASSUMED_LIFE);
    if left.is_zero() {
        let whole = token.whole_life().unwrap_or(ASSUMED_LIFE);
        return whole.min(DOUBTFUL_LIFE).mul_f64(part).max(MIN_REFRESH);
    }
    let left = token.whole_life().map_or(left, |whole| left.min(whole));
    let wait = left.mul_f64(part);
    // A token of 2 s is renewed after 1 s at the latest, not after it has expired.
    wait.max(MIN_REFRESH.min(left.mul_f64(0.5)).max(MIN_REFRESH / 4))
}

/// The times in a JWT's payload. Nothing is verified: they only say when to renew.
#[derive(Default, Deserialize)]
struct JwtTimes {
    #[serde(default, deserialize_with = "numeric_date")]
    iat: Option<u64>,
    #[serde(default, deserialize_with = "numeric_date")]
    exp: Option<u64>,
}

impl JwtTimes {
    /// Empty for whatever is not a JWT.
    fn of(token: &str) -> Self {
        let mut parts = token.split('.');
        let (Some(_), Some(payload), Some(_), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Self::default();
        };
        URL_SAFE_NO_PAD
            .decode(payload.trim_end_matches('='))
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default()
    }
}

/// RFC 7519, section 2: seconds since the epoch, maybe with a fraction.
fn numeric_date<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let value = serde_json::Value::deserialize(from)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a cast from f64 saturates; the fraction is dropped on purpose"
    )]
    Ok(value.as_u64().or_else(|| {
        value
            .as_f64()
            .filter(|date| *date >= 0.0)
            .map(|date| date as u64)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(payload: &str) -> String {
        format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(payload))
    }

    fn at(seconds: u64) -> SystemTime {
        clock::from_unix_seconds(seconds).unwrap()
    }

    #[test]
    fn expiry_is_what_the_issuer_said_else_the_jwt() {
        let token = Token::new(&jwt(r#"{"exp":1000.7,"iat":900}"#), None).unwrap();
        assert_eq!(token.expires_at(), Some(at(1000)));
        assert_eq!(token.issued_at(), Some(at(900)));
        let told = Token::new(&jwt(r#"{"exp":1000}"#), Some(at(500))).unwrap();
        assert_eq!(told.expires_at(), Some(at(500)));
        let jwt_of_another_clock = jwt(r#"{"exp":1000,"iat":900}"#);
        for (told, issued) in [(999, Some(at(900))), (4600, None)] {
            let told = Token::new(&jwt_of_another_clock, Some(at(told))).unwrap();
            assert_eq!(told.issued_at(), issued);
        }
        assert_eq!(Token::new("opaque", None).unwrap().expires_at(), None);
        assert_eq!(
            Token::new(&jwt(r#"{"exp":"soon"}"#), None)
                .unwrap()
                .expires_at(),
            None
        );
    }

    #[test]
    fn text_that_is_no_header_value_is_refused() {
        assert_eq!(Token::new(" \n", None).unwrap_err(), InvalidToken::Empty);
        assert_eq!(
            Token::new("a\nb", None).unwrap_err(),
            InvalidToken::NotAHeaderValue
        );
        assert_eq!(
            Token::new("tök", None).unwrap_err(),
            InvalidToken::NotAHeaderValue
        );
        assert_eq!(
            Token::new(&"x".repeat(MAX_LENGTH + 1), None).unwrap_err(),
            InvalidToken::TooLong(MAX_LENGTH + 1)
        );
        assert_eq!(Token::new(" padded\n", None).unwrap().expose(), "padded");
    }

    #[test]
    fn refresh_comes_before_expiry_and_never_at_once() {
        let token = |life: u64| Token::new("opaque", Some(at(1000 + life))).unwrap();
        for life in [1, 2, 6, 60, 900] {
            for jitter in [0.0, 0.5, 1.0] {
                let wait = refresh_in(&token(life), at(1000), jitter);
                assert!(wait < Duration::from_secs(life), "{life} s: {wait:?}");
                assert!(wait >= Duration::from_millis(250), "{life} s: {wait:?}");
            }
        }
        assert_eq!(
            refresh_in(&token(900), at(1000), 0.0),
            Duration::from_secs(720)
        );
        // Expired on arrival: never a storm, not even with the least jitter.
        for jitter in [0.0, 1.0] {
            let wait = refresh_in(&token(0), at(2000), jitter);
            assert!(wait >= DOUBTFUL_LIFE / 2, "{wait:?}");
            let brief = Token::new(&jwt(r#"{"iat":100,"exp":101}"#), None).unwrap();
            assert!(refresh_in(&brief, at(2000), jitter) >= MIN_REFRESH);
        }
        // By a clock that is an hour behind.
        let read_early = Token::new(&jwt(r#"{"iat":4600,"exp":5500}"#), None).unwrap();
        assert_eq!(
            refresh_in(&read_early, at(1000), 0.0),
            Duration::from_secs(720)
        );
        assert_eq!(
            refresh_in(&Token::new("opaque", None).unwrap(), at(0), 0.0),
            ASSUMED_LIFE.mul_f64(0.8)
        );
    }

    #[test]
    fn expiry_is_written_or_left_out_but_never_a_fault() {
        let text = |exp: &str| {
            let token = Token::new(&jwt(&format!(r#"{{"exp":{exp}}}"#)), None).unwrap();
            token.expires_at_text()
        };
        assert_eq!(text("1767323045").unwrap(), "2026-01-02T03:04:05Z");
        for exp in [
            "253402300800",
            "1767323045000",
            "18446744073709551615",
            "1e300",
        ] {
            assert_eq!(text(exp), None, "{exp}");
        }
    }

    #[test]
    fn debug_output_hides_the_secret() {
        let shown = format!("{:?}", Token::new("hunter2-token", None).unwrap());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
