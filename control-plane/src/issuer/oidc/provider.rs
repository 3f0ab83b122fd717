//! One request for a token by client credentials (RFC 6749, section 4.4).
//!
//! Signs in by HTTP Basic, which every provider must take, and when that is refused by the form's
//! fields (section 2.3.1); what worked last is tried first.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use ambient_shared::{
    clock::{CLOCKS_AGREE, apart},
    exit,
    token::{InvalidToken, Token},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::Value;
use url::{Url, form_urlencoded};
use zeroize::Zeroizing;

/// Largest answer that is read: a token of 64 KiB and its envelope.
const MAX_ANSWER: usize = 128 * 1024;

/// An identity provider as its client sees it.
pub(super) struct Provider {
    client: reqwest::Client,
    url: Url,
    id: String,
    secret: SecretString,
    by_form: AtomicBool,
}

/// Why a request gave no token; says nothing of the token or secret.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// No answer, or one that says that the provider has failed.
    Unreachable {
        reason: String,
        retry_after: Option<Duration>,
    },
    /// It does not take our id and secret.
    Refused(String),
    /// It answered, but not with a token that can be used.
    Malformed(String),
}

#[derive(Deserialize)]
struct Answer {
    access_token: String,
    #[serde(default)]
    expires_in: Option<Value>,
}

#[derive(Deserialize)]
struct Refusal {
    error: String,
}

impl Provider {
    pub(super) fn new(client: reqwest::Client, url: Url, id: String, secret: SecretString) -> Self {
        Self {
            client,
            url,
            id,
            secret,
            by_form: AtomicBool::new(false),
        }
    }

    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// Asks once, or twice when the first way of signing in is refused. `asked_at` is when the
    /// token's life begins at the latest.
    pub(super) async fn ask(&self, asked_at: SystemTime) -> Result<Token, Failure> {
        let by_form = self.by_form.load(Ordering::Relaxed);
        match self.ask_by(by_form, asked_at).await {
            Err(Failure::Refused(_)) => {
                let token = self.ask_by(!by_form, asked_at).await?;
                self.by_form.store(!by_form, Ordering::Relaxed);
                Ok(token)
            }
            decided => decided,
        }
    }

    async fn ask_by(&self, by_form: bool, asked_at: SystemTime) -> Result<Token, Failure> {
        // Finished here: a serializer held across an await could not move between threads.
        let form = {
            let mut form = form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "client_credentials");
            if by_form {
                form.append_pair("client_id", &self.id);
                form.append_pair("client_secret", self.secret.expose_secret());
            }
            form.finish()
        };
        let mut request = self
            .client
            .post(self.url.clone())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json");
        if !by_form {
            request = request.header(header::AUTHORIZATION, self.basic());
        }
        let lost = |error: reqwest::Error| Failure::Unreachable {
            reason: exit::report(&error.without_url()),
            retry_after: None,
        };
        let mut response = request.body(form).send().await.map_err(lost)?;
        let mut body = Zeroizing::new(Vec::new());
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if body.len() + chunk.len() > MAX_ANSWER {
                return Err(Failure::Malformed(format!("more than {MAX_ANSWER} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        judge(response.status(), response.headers(), &body, asked_at)
    }

    /// Id and secret are form-encoded before they are joined (RFC 6749, section 2.3.1).
    fn basic(&self) -> HeaderValue {
        let encode =
            |text: &str| -> String { form_urlencoded::byte_serialize(text.as_bytes()).collect() };
        let secret = Zeroizing::new(encode(self.secret.expose_secret()));
        let pair = Zeroizing::new(format!("{}:{}", encode(&self.id), *secret));
        let value = Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes())));
        // Base64 is always a header value.
        let mut value =
            HeaderValue::from_str(&value).unwrap_or_else(|_| HeaderValue::from_static("Basic"));
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider")
            .field("url", &self.url.as_str())
            .finish_non_exhaustive()
    }
}

impl Failure {
    pub(super) fn slow(limit: Duration) -> Self {
        Self::Unreachable {
            reason: format!("no answer within {} s", limit.as_secs()),
            retry_after: None,
        }
    }

    /// For metrics.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Refused(_) => "refused",
            Self::Malformed(_) => "malformed",
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unreachable { retry_after, .. } => *retry_after,
            Self::Refused(_) | Self::Malformed(_) => None,
        }
    }
}

fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    asked_at: SystemTime,
) -> Result<Token, Failure> {
    match status {
        StatusCode::OK => read(headers, body, asked_at),
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let code = serde_json::from_slice::<Refusal>(body)
                .map(|refusal| printable(&refusal.error))
                .unwrap_or_default();
            Err(Failure::Refused(
                format!("{status} {code}").trim_end().to_owned(),
            ))
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => unreachable(status, headers),
        _ if status.is_server_error() => unreachable(status, headers),
        _ => Err(Failure::Malformed(format!(
            "{status}; check OIDC_TOKEN_URL"
        ))),
    }
}

fn unreachable(status: StatusCode, headers: &HeaderMap) -> Result<Token, Failure> {
    let retry_after = headers
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok())
        .map(Duration::from_secs);
    Err(Failure::Unreachable {
        reason: format!("it answered {status}"),
        retry_after,
    })
}

fn read(headers: &HeaderMap, body: &[u8], asked_at: SystemTime) -> Result<Token, Failure> {
    let malformed = |reason: &str| Failure::Malformed(reason.to_owned());
    // The parser's own message could quote the token.
    let answer: Answer = serde_json::from_slice(body).map_err(|_| {
        let kind = headers
            .get(header::CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or("no content type");
        Failure::Malformed(format!(
            "not JSON with an access_token but {}",
            printable(kind)
        ))
    })?;
    let secret = Zeroizing::new(answer.access_token);
    let expires_at = match &answer.expires_in {
        None | Some(Value::Null) => None,
        Some(life) => {
            let life = seconds(life).ok_or_else(|| malformed("expires_in is no number"))?;
            // Beyond what the machine's clock can hold is as good as for ever.
            asked_at.checked_add(life)
        }
    };
    let invalid = |error: InvalidToken| Failure::Malformed(error.to_string());
    let own = Token::new(&secret, None).map_err(invalid)?.expires_at();
    let token = Token::new(&secret, earlier(expires_at, own)).map_err(invalid)?;
    if token.is_expired(asked_at) {
        return Err(malformed("it has expired already; is a clock wrong?"));
    }
    Ok(token)
}

/// When a token expires that is said to expire at `told`, by our clock, and says itself `own`, by the
/// provider's. Where the clocks agree, the earlier counts, as whoever verifies the token goes by
/// `own`; else ours, by which we renew it.
fn earlier(told: Option<SystemTime>, own: Option<SystemTime>) -> Option<SystemTime> {
    let (Some(told), Some(own)) = (told, own) else {
        return told;
    };
    let is_of_one_clock = apart(told, own) < CLOCKS_AGREE;
    Some(if is_of_one_clock { told.min(own) } else { told })
}

/// Some providers send the number as a text.
fn seconds(value: &Value) -> Option<Duration> {
    let seconds = match value {
        Value::String(text) => text.trim().parse::<f64>().ok()?,
        number => number.as_f64()?,
    };
    // A negative life is over; too large a one is cut to what fits.
    Some(Duration::try_from_secs_f64(seconds.clamp(0.0, 1e15)).unwrap_or_default())
}

/// What others wrote, cut to what a log line can hold.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| c.is_ascii_graphic() || *c == ' ')
        .take(80)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_earlier_expiry_counts_unless_a_clock_is_wrong() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        for (told, own, expiry) in [
            (at(1000), at(999), at(999)),
            (at(1000), at(1001), at(1000)),
            // Ours is an hour ahead, or behind.
            (at(4600), at(1000), at(4600)),
            (at(1000), at(4600), at(1000)),
            (at(1000), None, at(1000)),
            // The token's own counts by itself.
            (None, at(1000), None),
        ] {
            assert_eq!(earlier(told, own), expiry, "{told:?} {own:?}");
        }
    }
}
