//! Answers of the token endpoint, by contract section 1. Error bodies are plain text of one line.

use std::time::{Duration, SystemTime};

use ambient_shared::{clock, token::Token};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use http_body_util::Full;
use serde::Serialize;
use zeroize::Zeroizing;

pub(super) type Body = Full<Bytes>;
pub(super) type Response = http::Response<Body>;

/// How long others may keep our JWKS: less than the two minutes for which a new key is to be
/// published before it is used.
const JWKS_CACHE: &str = "public, max-age=60";

/// The last second of the year 9999, beyond which RFC 3339 has no times.
const LAST_TIME: u64 = 253_402_300_799;

/// The whole of [`Refusal::Overloaded`]'s answer, for a connection that nothing else is done for.
pub(super) const OVERLOADED: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\n\
    content-type: text/plain; charset=utf-8\r\nretry-after: 1\r\nconnection: close\r\n\
    content-length: 11\r\n\r\noverloaded\n";

/// Why a caller gets no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// No `Authorization` header.
    NoHeader,
    /// Another scheme than `Bearer`.
    NotBearer,
    /// Not base64 of a ciphertext of any accepted key's length.
    NotBase64,
    /// No accepted key decrypts it.
    Undecryptable,
    /// Made by the right key, at a wrong time; the server's time helps to mend it.
    StaleProof(SystemTime),
    /// Decrypted, but the id or the proof is wrong, or there is no proof: nothing shows that the
    /// caller is a session.
    Unproven,
    /// The caller is a session, but may not have a token. Answered like [`Refusal::Unproven`].
    Inactive,
    /// The source address has used up its share of failures.
    SourceLimited(Duration),
    /// The session has used up its share of tokens.
    SessionLimited(Duration),
    /// The line for decryption is full.
    Overloaded,
    /// It fits none of our keys, and whether there are newer ones cannot be seen now.
    KeysUnread,
    /// Where the session stands is not known yet.
    NotSynced,
    /// The issuer has no token.
    NoToken,
}

impl Refusal {
    /// For metrics and logs.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::NoHeader => "no_header",
            Self::NotBearer => "not_bearer",
            Self::NotBase64 => "not_base64",
            Self::Undecryptable => "undecryptable",
            Self::StaleProof(_) => "stale_proof",
            Self::Unproven => "unproven",
            Self::Inactive => "inactive",
            Self::SourceLimited(_) => "source_limited",
            Self::SessionLimited(_) => "session_limited",
            Self::Overloaded => "overloaded",
            Self::KeysUnread => "keys_unread",
            Self::NotSynced => "not_synced",
            Self::NoToken => "no_token",
        }
    }

    /// Whether it is charged to the source address: the caller has not shown who it is.
    pub(super) fn before_authentication(self) -> bool {
        match self {
            Self::NoHeader
            | Self::NotBearer
            | Self::NotBase64
            | Self::Undecryptable
            | Self::KeysUnread
            | Self::Unproven => true,
            Self::StaleProof(_)
            | Self::Inactive
            | Self::SourceLimited(_)
            | Self::SessionLimited(_)
            | Self::Overloaded
            | Self::NotSynced
            | Self::NoToken => false,
        }
    }

    /// Whether it is the session's own doing, in ways that it can repeat without end.
    pub(super) fn of_a_session(self) -> bool {
        matches!(
            self,
            Self::StaleProof(_) | Self::Inactive | Self::SessionLimited(_)
        )
    }

    /// Whether a limit of ours refuses it.
    pub(super) fn by_limit(self) -> bool {
        matches!(
            self,
            Self::SourceLimited(_) | Self::SessionLimited(_) | Self::Overloaded
        )
    }

    pub(super) fn into_response(self) -> Response {
        match self {
            Self::NoHeader => unauthorized("the Authorization header is missing\n"),
            Self::NotBearer => unauthorized("the Authorization scheme is not Bearer\n"),
            Self::NotBase64 => unauthorized("the bearer is not base64 of a ciphertext\n"),
            Self::Undecryptable => unauthorized("the bearer cannot be decrypted\n"),
            Self::StaleProof(now) => stale(now),
            Self::Unproven | Self::Inactive => text(StatusCode::FORBIDDEN, "no token for you\n"),
            Self::SourceLimited(wait) | Self::SessionLimited(wait) => {
                later(StatusCode::TOO_MANY_REQUESTS, "too many requests\n", wait)
            }
            Self::Overloaded => later(
                StatusCode::SERVICE_UNAVAILABLE,
                "overloaded\n",
                Duration::from_secs(1),
            ),
            Self::KeysUnread => later(
                StatusCode::SERVICE_UNAVAILABLE,
                "the keys cannot be read now\n",
                Duration::from_secs(5),
            ),
            Self::NotSynced => later(
                StatusCode::SERVICE_UNAVAILABLE,
                "sessions are not known yet\n",
                Duration::from_secs(2),
            ),
            Self::NoToken => text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "a token could not be obtained\n",
            ),
        }
    }
}

#[derive(Serialize)]
struct Granted<'a> {
    token: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
}

/// The body of the answer with a token: JSON, none if it cannot be written.
pub(super) fn body(token: &Token) -> Option<Bytes> {
    let expires_at = token
        .expires_at()
        .filter(|time| clock::unix_seconds(*time) <= LAST_TIME)
        .map(|time| humantime::format_rfc3339_seconds(time).to_string());
    let granted = Granted {
        token: token.expose(),
        expires_at,
    };
    let json = serde_json::to_vec(&granted).ok()?;
    Some(Bytes::from_owner(Zeroizing::new(json)))
}

/// 200 with a token in this body, and our time, by which the client reads when it expires.
pub(super) fn granted(body: Bytes, now: SystemTime) -> Response {
    let mut response = json_answer(body);
    set(&mut response, header::CACHE_CONTROL, "no-store");
    set_date(&mut response, now);
    response
}

pub(super) fn healthy() -> Response {
    text(StatusCode::OK, "ok")
}

pub(super) fn jwks(jwks: Bytes) -> Response {
    let mut response = json_answer(jwks);
    set(&mut response, header::CACHE_CONTROL, JWKS_CACHE);
    response
}

pub(super) fn not_found() -> Response {
    text(StatusCode::NOT_FOUND, "not found\n")
}

pub(super) fn method_not_allowed() -> Response {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET is allowed\n");
    set(&mut response, header::ALLOW, "GET");
    response
}

fn unauthorized(why: &'static str) -> Response {
    let mut response = text(StatusCode::UNAUTHORIZED, why);
    set(&mut response, header::WWW_AUTHENTICATE, "Bearer");
    response
}

fn stale(now: SystemTime) -> Response {
    let mut response = unauthorized("proof stale\n");
    set_date(&mut response, now);
    response
}

/// Ours, not the HTTP library's: of the clock that judges proofs.
fn set_date(response: &mut Response, now: SystemTime) {
    let seconds = clock::unix_seconds(now);
    if seconds <= LAST_TIME
        && let Ok(date) = HeaderValue::from_str(&httpdate::fmt_http_date(now))
    {
        response.headers_mut().insert(header::DATE, date);
    }
}

fn later(status: StatusCode, why: &'static str, wait: Duration) -> Response {
    let mut response = text(status, why);
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    let after = HeaderValue::from(seconds.max(1));
    response.headers_mut().insert(header::RETRY_AFTER, after);
    response
}

fn text(status: StatusCode, body: &'static str) -> Response {
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    set(
        &mut response,
        header::CONTENT_TYPE,
        "text/plain; charset=utf-8",
    );
    response
}

fn json_answer(body: Bytes) -> Response {
    let mut response = Response::new(Full::new(body));
    set(&mut response, header::CONTENT_TYPE, "application/json");
    response
}

fn set(response: &mut Response, name: header::HeaderName, value: &'static str) {
    response
        .headers_mut()
        .insert(name, HeaderValue::from_static(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_whole_seconds_and_never_none() {
        for (wait, shown) in [(0, "1"), (1, "1"), (999, "1"), (1000, "1"), (1001, "2")] {
            let response = Refusal::SourceLimited(Duration::from_millis(wait)).into_response();
            assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(response.headers()[header::RETRY_AFTER], shown, "{wait} ms");
        }
    }

    #[test]
    fn an_expiry_that_cannot_be_written_is_left_out() {
        let at = |seconds| clock::from_unix_seconds(seconds);
        let long_ago = SystemTime::UNIX_EPOCH;
        for expires_at in [None, at(LAST_TIME), at(LAST_TIME + 1), at(1 << 40)] {
            let token = Token::new("opaque", expires_at).unwrap();
            let response = granted(body(&token).unwrap(), long_ago);
            assert_eq!(response.status(), StatusCode::OK, "{expires_at:?}");
        }
        assert_eq!(
            stale(long_ago).headers()[header::DATE],
            "Thu, 01 Jan 1970 00:00:00 GMT"
        );
    }

    #[test]
    fn both_kinds_of_forbidden_look_alike() {
        let (one, other) = (Refusal::Unproven, Refusal::Inactive);
        let (one, other) = (one.into_response(), other.into_response());
        assert_eq!(format!("{one:?}"), format!("{other:?}"));
    }
}
