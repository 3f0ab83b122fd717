//! One exchange with the token endpoint: a session's bearer and proof in, a [`Token`] out.
//!
//! Runner and sidecar share it. It makes one try; when to try again is [`crate::retry`]'s matter,
//! which each error answers by its [`Retryable`] side.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use http::{StatusCode, header};
use serde::Deserialize;
use url::Url;

use crate::{
    bearer::Bearer,
    clock::{self, CLOCKS_AGREE, Clock},
    proof::{self, SessionKey},
    retry::{Retry, Retryable},
    token::{InvalidToken, Token},
};

/// Longest try (contract section 1: existing clients wait as long).
pub const TIMEOUT: Duration = Duration::from_secs(10);

/// Largest answer that is read.
const MAX_ANSWER: usize = 128 * 1024;

/// A token endpoint as seen by one session.
#[derive(Debug)]
pub struct Exchange {
    client: reqwest::Client,
    url: Url,
    bearer: Bearer,
    key: Mutex<Option<SessionKey>>,
    clock: Clock,
}

/// Why a URL cannot be a token endpoint's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEndpoint {
    /// It is not a URL.
    #[error("not a URL")]
    NotAUrl,
    /// Only http and https.
    #[error("the scheme must be http or https")]
    Scheme,
    /// No host.
    #[error("a host is missing")]
    NoHost,
    /// `user:password@` would end up in logs.
    #[error("user name and password are not allowed in it")]
    UserInfo,
}

/// Checks a token endpoint's URL (contract section 1): http or https, a host, no user info.
///
/// # Errors
/// [`InvalidEndpoint`] says which rule it breaks.
pub fn parse_endpoint(url: &str) -> Result<Url, InvalidEndpoint> {
    let url: Url = url.parse().map_err(|error| match error {
        url::ParseError::EmptyHost => InvalidEndpoint::NoHost,
        _ => InvalidEndpoint::NotAUrl,
    })?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(InvalidEndpoint::Scheme);
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(InvalidEndpoint::NoHost);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(InvalidEndpoint::UserInfo);
    }
    Ok(url)
}

/// Why one exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// No connection, or it broke.
    #[error("cannot reach token endpoint {url}; is the control plane running?")]
    Connect {
        /// The endpoint.
        url: Url,
        /// What the HTTP client said.
        source: reqwest::Error,
    },
    /// 429 or 503.
    #[error("token endpoint {url} is overloaded ({status})")]
    Busy {
        /// The endpoint.
        url: Url,
        /// 429 or 503.
        status: StatusCode,
        /// From `Retry-After`.
        retry_after: Option<Duration>,
    },
    /// 401 or 403.
    #[error("token endpoint {url} refuses this session ({status}: {reason})")]
    Refused {
        /// The endpoint.
        url: Url,
        /// 401 or 403.
        status: StatusCode,
        /// The body's first line.
        reason: String,
    },
    /// 408 or another 5xx.
    #[error("token endpoint {url} failed ({status}: {reason})")]
    Server {
        /// The endpoint.
        url: Url,
        /// As answered.
        status: StatusCode,
        /// The body's first line.
        reason: String,
    },
    /// Another 4xx, or a redirect: this URL is no token endpoint.
    #[error("{url} does not answer like a token endpoint ({status}); check AMBIENT_CP_TOKEN_URL")]
    NotAnEndpoint {
        /// The endpoint.
        url: Url,
        /// As answered.
        status: StatusCode,
    },
    /// A 200 without a usable token.
    #[error("token endpoint {url} answered 200 without a usable token ({reason})")]
    Malformed {
        /// The endpoint.
        url: Url,
        /// What was wrong.
        reason: String,
    },
}

impl Retryable for ExchangeError {
    fn retry(&self) -> Retry {
        match self {
            Self::Connect { .. } | Self::Server { .. } | Self::Malformed { .. } => Retry::Backoff,
            Self::Busy { retry_after, .. } => retry_after.map_or(Retry::Backoff, Retry::After),
            Self::Refused { .. } => Retry::Briefly,
            Self::NotAnEndpoint { .. } => Retry::Never,
        }
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: String,
    #[serde(default)]
    expires_at: Option<String>,
}

impl Exchange {
    /// An endpoint and what this session shows it. Without a `key` no proof is sent, which only
    /// existing control planes accept.
    pub fn new(
        client: reqwest::Client,
        url: Url,
        bearer: Bearer,
        key: Option<SessionKey>,
        clock: Clock,
    ) -> Self {
        Self {
            client,
            url,
            bearer,
            key: Mutex::new(key),
            clock,
        }
    }

    /// Proves with this key from now on: the control plane replaces it when its root changes.
    pub fn use_key(&self, key: SessionKey) {
        *self.key.lock().unwrap_or_else(PoisonError::into_inner) = Some(key);
    }

    /// Asks for a token once. A proof that the server calls stale is signed once more with the
    /// server's own time: a wrong clock must not cost a session its token.
    ///
    /// Cancel-safe: nothing is kept between calls.
    ///
    /// # Errors
    /// [`ExchangeError`]; its [`Retryable`] side says whether to try again.
    pub async fn fetch(&self) -> Result<Token, ExchangeError> {
        let key = self.key();
        let (status, headers, body) = self.ask(key.as_ref(), self.clock.now()).await?;
        let stale = status == StatusCode::UNAUTHORIZED
            && key.is_some()
            && first_line(&body) == proof::ProofError::Stale.to_string();
        match date(&headers).filter(|_| stale) {
            Some(server_time) => {
                let (status, headers, body) = self.ask(key.as_ref(), server_time).await?;
                self.judge(status, &headers, &body)
            }
            None => self.judge(status, &headers, &body),
        }
    }

    fn key(&self) -> Option<SessionKey> {
        self.key
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    async fn ask(
        &self,
        key: Option<&SessionKey>,
        now: SystemTime,
    ) -> Result<(StatusCode, http::HeaderMap, Vec<u8>), ExchangeError> {
        let lost = |source: reqwest::Error| ExchangeError::Connect {
            url: self.url.clone(),
            source: source.without_url(),
        };
        let mut authorization =
            http::HeaderValue::try_from(format!("Bearer {}", self.bearer.as_str()))
                .unwrap_or_else(|_| http::HeaderValue::from_static("Bearer"));
        authorization.set_sensitive(true);
        let mut request = self
            .client
            .get(self.url.clone())
            .timeout(TIMEOUT)
            .header(header::AUTHORIZATION, authorization)
            .header(header::ACCEPT, "application/json");
        if let Some(key) = key {
            request = request.header(proof::HEADER, key.sign(self.bearer.as_str(), now));
        }
        let mut response = request.send().await.map_err(lost)?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                return Err(self.malformed(format!("more than {MAX_ANSWER} bytes")));
            }
        }
        Ok((response.status(), response.headers().clone(), body))
    }

    fn judge(
        &self,
        status: StatusCode,
        headers: &http::HeaderMap,
        body: &[u8],
    ) -> Result<Token, ExchangeError> {
        let url = self.url.clone();
        match status {
            StatusCode::OK => self.read_answer(headers, body),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                let retry_after = retry_after(headers, self.clock.now());
                Err(ExchangeError::Busy {
                    url,
                    status,
                    retry_after,
                })
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(ExchangeError::Refused {
                url,
                status,
                reason: first_line(body),
            }),
            _ if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT => {
                Err(ExchangeError::Server {
                    url,
                    status,
                    reason: first_line(body),
                })
            }
            _ => Err(ExchangeError::NotAnEndpoint { url, status }),
        }
    }

    fn read_answer(&self, headers: &http::HeaderMap, body: &[u8]) -> Result<Token, ExchangeError> {
        // The parser's own message could quote the token.
        let answer: Answer =
            serde_json::from_slice(body).map_err(|_| self.malformed("not the expected JSON"))?;
        let expires_at = match answer.expires_at.as_deref() {
            None | Some("") => None,
            Some(text) => Some(
                text.parse::<prost_types::Timestamp>()
                    .ok()
                    .and_then(|time| SystemTime::try_from(time).ok())
                    .ok_or_else(|| self.malformed("`expires_at` is not an RFC 3339 time"))?,
            ),
        };
        let invalid = |error: InvalidToken| self.malformed(error.to_string());
        let told = expires_at.map(|told| self.by_our_clock(told, headers));
        let own = Token::new(&answer.token, None)
            .map_err(invalid)?
            .expires_at();
        let expires_at = [told, own].into_iter().flatten().min();
        Token::new(&answer.token, expires_at).map_err(invalid)
    }

    /// A time of the server's by our clock: the server's may be wrong, and then it is not the moment
    /// that counts but how far away it is.
    fn by_our_clock(&self, time: SystemTime, headers: &http::HeaderMap) -> SystemTime {
        let now = self.clock.now();
        let Some(theirs) = date(headers) else {
            return time;
        };
        if clock::apart(theirs, now) < CLOCKS_AGREE {
            return time;
        }
        match time.duration_since(theirs) {
            Ok(left) => now.checked_add(left).unwrap_or(time),
            Err(_) => now,
        }
    }

    fn malformed(&self, reason: impl Into<String>) -> ExchangeError {
        ExchangeError::Malformed {
            url: self.url.clone(),
            reason: reason.into(),
        }
    }
}

/// The first line of an error body, cut to what a log line can hold.
fn first_line(body: &[u8]) -> String {
    String::from_utf8_lossy(body)
        .lines()
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| !c.is_control())
        .take(200)
        .collect::<String>()
        .trim()
        .to_owned()
}

fn date(headers: &http::HeaderMap) -> Option<SystemTime> {
    httpdate::parse_http_date(headers.get(header::DATE)?.to_str().ok()?).ok()
}

/// RFC 9110, section 10.2.3: seconds, or a date.
fn retry_after(headers: &http::HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests;
