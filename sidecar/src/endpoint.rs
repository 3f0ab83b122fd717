//! `GET /token`: the latest token, at once or when it changes.
//!
//! JSON, or the bare token for `Accept: text/plain`. `?after=HASH&wait=30s` answers when the token
//! is another than the one of that hash, and 304 when it still is that one at the end of the wait;
//! `?wait=30s` alone waits for the first token. The hash is in the JSON and in `ETag`.

use std::time::Duration;

use ambient_shared::{settings::parse_duration, token::Token};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use metrics::counter;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use url::form_urlencoded;

use crate::{
    guard::Guard,
    metrics as names,
    serve::{Body, Connection, Handler, full},
    tokens::Tokens,
};

/// Longest wait; more counts as this much, as proxies and clients in between give up too.
const LONGEST_WAIT: Duration = Duration::from_mins(5);

/// Wait of a request with `after` that names none.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// What `Retry-After` says while there is no token. The watch looks each second.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Serves the token.
pub(crate) struct Endpoint {
    tokens: Tokens,
    guard: Guard,
    /// Ends waits: who waits for a change should not hold up the end.
    shutdown: CancellationToken,
}

/// What a request asks for.
#[derive(Debug, Default, PartialEq)]
struct Query {
    after: Option<String>,
    wait: Duration,
}

#[derive(Serialize)]
struct Answer<'a> {
    token: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    hash: &'a str,
}

impl Endpoint {
    /// Serves what `tokens` has, to whom `guard` lets in.
    pub(crate) fn new(tokens: Tokens, guard: Guard, shutdown: CancellationToken) -> Self {
        Self {
            tokens,
            guard,
            shutdown,
        }
    }

    async fn get(&self, query: Option<&str>, headers: &HeaderMap) -> Response<Body> {
        let query = match Query::parse(query.unwrap_or_default()) {
            Ok(query) => query,
            Err(fault) => return text(StatusCode::BAD_REQUEST, fault),
        };
        let Some(token) = self.wait_for(&query).await else {
            let reason = self.tokens.ready().err();
            let reason = reason.unwrap_or_else(|| "no token yet".to_owned());
            let mut answer = text(StatusCode::SERVICE_UNAVAILABLE, reason);
            answer
                .headers_mut()
                .insert(header::RETRY_AFTER, RETRY_AFTER);
            return answer;
        };
        let hash = token.hash().to_string();
        let known = query.after.as_ref() == Some(&hash) || is_known(headers, &hash);
        let mut answer = if known {
            let mut answer = Response::new(full(""));
            *answer.status_mut() = StatusCode::NOT_MODIFIED;
            answer
        } else if wants_text(headers) {
            text(StatusCode::OK, token.expose().to_owned())
        } else {
            json(&token, &hash)
        };
        let headers = answer.headers_mut();
        headers.insert(header::VARY, HeaderValue::from_name(header::ACCEPT));
        if let Ok(tag) = HeaderValue::try_from(format!("\"{hash}\"")) {
            headers.insert(header::ETAG, tag);
        }
        answer
    }

    /// The valid token: another than the one named, if there is one before the wait is over.
    async fn wait_for(&self, query: &Query) -> Option<Token> {
        let deadline = Instant::now() + query.wait;
        let mut changes = self.tokens.changes();
        loop {
            changes.mark_unchanged();
            let token = self.tokens.valid().await;
            let hash = token.as_ref().map(|token| token.hash().to_string());
            if hash.is_some() && hash != query.after {
                return token;
            }
            let is_over = tokio::select! {
                () = sleep_until(deadline) => true,
                () = self.shutdown.cancelled() => true,
                changed = changes.changed() => changed.is_err(),
            };
            if is_over {
                // It may have expired during the wait.
                return token.filter(|token| !self.tokens.expired(token));
            }
        }
    }
}

impl Handler for Endpoint {
    async fn handle(&self, request: Request<Incoming>, _: &Connection) -> Response<Body> {
        let (request, _) = request.into_parts();
        let mut answer = if let Err(refusal) = self.guard.check(&request) {
            let labels = [("port", "endpoint"), ("reason", refusal.label())];
            counter!(names::REFUSED, &labels).increment(1);
            text(refusal.status(), refusal.to_string())
        } else if request.uri.path() != "/token" {
            text(
                StatusCode::NOT_FOUND,
                "not found; the token is at /token".to_owned(),
            )
        } else if request.method != Method::GET && request.method != Method::HEAD {
            let mut answer = text(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and HEAD are served".to_owned(),
            );
            let allow = HeaderValue::from_static("GET, HEAD");
            answer.headers_mut().insert(header::ALLOW, allow);
            answer
        } else {
            self.get(request.uri.query(), &request.headers).await
        };
        let headers = answer.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let nosniff = HeaderValue::from_static("nosniff");
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
        answer
    }
}

impl Query {
    /// Unknown names are ignored.
    fn parse(query: &str) -> Result<Self, String> {
        let mut after = None;
        let mut wait = None;
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match &*name {
                "after" => {
                    let hash = value.trim_matches('"').to_ascii_lowercase();
                    // Any other text would differ from every token, and so be answered at once,
                    // again and again.
                    if hash.len() != 12 || !hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                        return Err(
                            "`after` must be the hash of a token, as in an answer".to_owned()
                        );
                    }
                    after = Some(hash);
                }
                "wait" => {
                    let asked =
                        parse_duration(&value).map_err(|fault| format!("`wait`: {fault}"))?;
                    wait = Some(asked.min(LONGEST_WAIT));
                }
                _ => {}
            }
        }
        let default = if after.is_some() {
            DEFAULT_WAIT
        } else {
            Duration::ZERO
        };
        Ok(Self {
            after,
            wait: wait.unwrap_or(default),
        })
    }
}

fn text(status: StatusCode, body: String) -> Response<Body> {
    let mut answer = Response::new(full(body));
    *answer.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    answer.headers_mut().insert(header::CONTENT_TYPE, plain);
    answer
}

fn json(token: &Token, hash: &str) -> Response<Body> {
    let answer = Answer {
        token: token.expose(),
        expires_at: token.expires_at_text(),
        hash,
    };
    let Ok(body) = serde_json::to_vec(&answer) else {
        // A struct of strings can always be written.
        return text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "cannot write JSON".to_owned(),
        );
    };
    let mut answer = Response::new(full(body));
    let json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(header::CONTENT_TYPE, json);
    answer
}

/// Whether `If-None-Match` names this token (RFC 9110, section 13.1.2).
fn is_known(headers: &HeaderMap, hash: &str) -> bool {
    headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|tags| tags.split(','))
        .map(|tag| tag.trim().trim_start_matches("W/"))
        .any(|tag| tag == "*" || tag.trim_matches('"') == hash)
}

/// Whether text is preferred to JSON: named with a higher quality, or earlier with the same
/// (RFC 9110, section 12.5.1).
fn wants_text(headers: &HeaderMap) -> bool {
    let mut best_text: Option<f32> = None;
    let mut best_json: Option<f32> = None;
    let mut text_first = false;
    let ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|ranges| ranges.split(','));
    for range in ranges {
        let mut parts = range.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
        let quality = parts
            .find_map(|part| part.strip_prefix("q="))
            .map_or(1.0, |quality| quality.parse().unwrap_or(0.0));
        match kind.as_str() {
            "text/plain" | "text/*" if quality > 0.0 => {
                text_first |= best_json.is_none();
                best_text = Some(best_text.map_or(quality, |best| best.max(quality)));
            }
            "application/json" | "application/*" if quality > 0.0 => {
                best_json = Some(best_json.map_or(quality, |best| best.max(quality)));
            }
            _ => {}
        }
    }
    match (best_text, best_json) {
        (Some(_), None) => true,
        (Some(text), Some(json)) => {
            text > json || (text_first && (text - json).abs() < f32::EPSILON)
        }
        (None, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn text_only_for_who_prefers_it() {
        for (accept, text) in [
            ("text/plain", true),
            ("Text/Plain; charset=utf-8", true),
            ("text/plain, */*", true),
            ("text/*", true),
            ("application/json;q=0.5, text/plain", true),
            ("text/plain, application/json", true),
            ("*/*", false),
            ("", false),
            ("application/json", false),
            ("application/json, text/plain, */*", false),
            ("text/plain;q=0.5, application/json", false),
            ("text/plain;q=0", false),
            ("text/html", false),
        ] {
            let headers = headers(header::ACCEPT, accept);
            assert_eq!(wants_text(&headers), text, "{accept}");
        }
        assert!(!wants_text(&HeaderMap::new()));
    }

    #[test]
    fn queries_are_checked() {
        let query = |after: Option<&str>, wait| Query {
            after: after.map(str::to_owned),
            wait: Duration::from_secs(wait),
        };
        assert_eq!(Query::parse("").unwrap(), query(None, 0));
        assert_eq!(Query::parse("x=y&wait=2m").unwrap(), query(None, 120));
        assert_eq!(Query::parse("wait=2h").unwrap(), query(None, 300));
        let hash = "ba7816bf8f01";
        assert_eq!(
            Query::parse(&format!("after={hash}")).unwrap(),
            query(Some(hash), 30)
        );
        assert_eq!(
            Query::parse(&format!("after=%22{hash}%22&wait=1s")).unwrap(),
            query(Some(hash), 1)
        );
        for bad in [
            "after=",
            "after=short",
            "after=ba7816bf8f0g",
            "wait=soon",
            "wait=-1s",
            "wait=",
        ] {
            assert!(Query::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn known_tags_are_recognised() {
        for (tag, known) in [
            ("\"ba7816bf8f01\"", true),
            ("\"x\", W/\"ba7816bf8f01\"", true),
            ("*", true),
            ("\"ba7816bf8f02\"", false),
        ] {
            let headers = headers(header::IF_NONE_MATCH, tag);
            assert_eq!(is_known(&headers, "ba7816bf8f01"), known, "{tag}");
        }
    }
}
