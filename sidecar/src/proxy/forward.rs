//! The way of one request: headers, streams, replay.
//!
//! In: a client's request. Out: the API server's answer as it comes. What concerns one connection
//! only (RFC 9110, section 7.6.1) is taken off in both directions, the client's credential is
//! replaced by the token, and an answer that refuses the token leads to a look for a fresher one
//! and a second request.

use std::{mem, time::Duration};

use ambient_shared::token::Token;
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version, header,
    request::Parts,
};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use metrics::counter;
use tokio::time::timeout;
use tracing::debug;

use super::{Failure, Protocol, Proxy, body::Kept, body::Outgoing};
use crate::{
    guard::REQUIRED_HEADER,
    metrics as names,
    serve::{Body, Connection},
};

/// Longest wait for the head of an answer. Long, as it includes the sending of the request, and
/// requests that wait for something are allowed; gRPC has no such limit, as some servers send the
/// head with the first message only, and pings find dead connections.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_mins(10);

/// gRPC status `UNAUTHENTICATED`.
const UNAUTHENTICATED: &str = "16";

/// What concerns one connection only (RFC 9110, section 7.6.1; `Proxy-Connection` is no standard,
/// but sent). `TE` and `Upgrade` are put back where they are meant.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

impl Proxy {
    /// Sends a request on and gives the API server's answer.
    pub(super) async fn forward(
        &self,
        mut request: Request<Incoming>,
        protocol: Protocol,
        connection: &Connection,
    ) -> Result<Response<Body>, Failure> {
        let upgrade = (protocol == Protocol::WebSocket).then(|| hyper::upgrade::on(&mut request));
        let (parts, incoming) = request.into_parts();
        self.check(&parts)?;
        let (_, upstream) = self.upstream(protocol);
        let uri = upstream
            .uri(parts.uri.path_and_query())
            .ok_or(Failure::Path)?;
        let head = Head::of(parts, uri, protocol);
        let token = self.tokens.fresh().await.ok_or(Failure::NoToken)?;

        let kept = Kept::new(incoming, &self.budget);
        let mut answer = self.send(&head, kept.first(), &token, protocol).await?;
        if refuses_token(&answer) {
            answer = self
                .second_try(answer, &head, &kept, &token, protocol)
                .await?;
        }
        if let Some(client) = upgrade
            && answer.status() == StatusCode::SWITCHING_PROTOCOLS
        {
            let server = hyper::upgrade::on(&mut answer);
            connection.then(tunnel(client, server));
        }
        Ok(cleaned(answer))
    }

    async fn send(
        &self,
        head: &Head,
        body: Outgoing,
        token: &Token,
        protocol: Protocol,
    ) -> Result<Response<Incoming>, Failure> {
        let (client, upstream) = self.upstream(protocol);
        let sent = client.request(head.request(body, token));
        let answered = if protocol == Protocol::Grpc {
            sent.await
        } else {
            let silent = |_| Failure::Silent {
                upstream: upstream.to_string(),
            };
            timeout(ANSWER_TIMEOUT, sent).await.map_err(silent)?
        };
        answered.map_err(|source| Failure::Unreachable {
            upstream: upstream.to_string(),
            source,
        })
    }

    /// Looks for a fresher token and sends the request again with it; else the first answer
    /// stands, or, where the token has expired, a failure that says so.
    async fn second_try(
        &self,
        answer: Response<Incoming>,
        head: &Head,
        kept: &Kept,
        refused: &Token,
        protocol: Protocol,
    ) -> Result<Response<Incoming>, Failure> {
        self.tokens.look_again().await;
        let fresher = self
            .tokens
            .latest()
            .filter(|token| !token.same_secret(refused));
        let Some(fresher) = fresher else {
            return if self.tokens.expired(refused) {
                Err(Failure::Expired)
            } else {
                Ok(answer)
            };
        };
        let Some(body) = kept.again() else {
            debug!("token was refused, but the body is too large to be sent again");
            return Ok(answer);
        };
        drop(answer);
        counter!(names::REPLAYS).increment(1);
        self.send(head, body, &fresher, protocol).await
    }
}

/// The head of a request as it goes to the API server, but for the token.
struct Head {
    parts: Parts,
}

impl Head {
    fn of(mut parts: Parts, uri: http::Uri, protocol: Protocol) -> Self {
        parts.uri = uri;
        parts.extensions = http::Extensions::new();
        // What the connection speaks is found out by the client; the version is only checked.
        parts.version = if protocol == Protocol::Grpc {
            Version::HTTP_2
        } else {
            Version::HTTP_11
        };
        let headers = &mut parts.headers;
        let takes_trailers = has_word(headers, &header::TE, "trailers");
        remove_hop_by_hop(headers);
        // The client library writes the upstream's; the server answers `100-continue` itself.
        for name in [
            header::HOST,
            header::EXPECT,
            header::AUTHORIZATION,
            REQUIRED_HEADER,
        ] {
            headers.remove(name);
        }
        // gRPC demands it; servers refuse calls without it.
        if takes_trailers || protocol == Protocol::Grpc {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        match protocol {
            Protocol::WebSocket => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            }
            // RFC 9110, section 10.1.4: `TE` concerns this connection only.
            Protocol::Rest if takes_trailers => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
            }
            Protocol::Rest | Protocol::Grpc => {}
        }
        Self { parts }
    }

    fn request(&self, body: Outgoing, token: &Token) -> Request<Outgoing> {
        let mut request = Request::new(body);
        *request.method_mut() = self.parts.method.clone();
        *request.uri_mut() = self.parts.uri.clone();
        *request.version_mut() = self.parts.version;
        *request.headers_mut() = self.parts.headers.clone();
        request
            .headers_mut()
            .insert(header::AUTHORIZATION, token.authorization());
        request
    }
}

/// 401, or gRPC `UNAUTHENTICATED` in the head: an answer without a body, so nothing was done.
fn refuses_token<B>(answer: &Response<B>) -> bool {
    answer.status() == StatusCode::UNAUTHORIZED
        || answer
            .headers()
            .get("grpc-status")
            .is_some_and(|status| status == UNAUTHENTICATED)
}

/// An answer as the client gets it.
fn cleaned(mut answer: Response<Incoming>) -> Response<Body> {
    let upgrade = answer.headers().get(header::UPGRADE).cloned();
    remove_hop_by_hop(answer.headers_mut());
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let headers = answer.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(upgrade) = upgrade {
            headers.insert(header::UPGRADE, upgrade);
        }
    }
    // The server writes the version that its own connection speaks.
    *answer.version_mut() = Version::HTTP_11;
    answer.map(|body| body.map_err(Into::into).boxed_unsync())
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = words(headers, &header::CONNECTION)
        .filter_map(|name| name.parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Whether a header that is a list has this word, in any case.
pub(super) fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    words(headers, name).any(|found| found.eq_ignore_ascii_case(word))
}

fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.split(','))
        .map(|word| word.split(';').next().unwrap_or_default().trim())
        .filter(|word| !word.is_empty())
}

/// Copies both ways between a client and the API server until either ends.
async fn tunnel(client: OnUpgrade, server: OnUpgrade) {
    let (client, server) = match tokio::try_join!(client, server) {
        Ok(both) => both,
        Err(error) => {
            debug!(reason = %error, "connection did not change its protocol");
            return;
        }
    };
    let mut client = TokioIo::new(client);
    let mut server = TokioIo::new(server);
    let copied = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    // Both are closed by being dropped; a broken one is no fault of ours.
    mem::drop((client, server));
    if let Err(error) = copied {
        debug!(reason = %error, "tunnel broke");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(protocol: Protocol, headers: &[(&str, &str)]) -> HeaderMap {
        let mut request = Request::builder().uri("/x");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let parts = request.body(()).unwrap().into_parts().0;
        let uri = http::Uri::from_static("http://api.example/x");
        Head::of(parts, uri, protocol).parts.headers
    }

    #[test]
    fn what_concerns_one_connection_is_taken_off() {
        let headers = head(
            Protocol::Rest,
            &[
                ("host", "127.0.0.1:1"),
                ("connection", "keep-alive, X-Mine"),
                ("x-mine", "1"),
                ("keep-alive", "timeout=5"),
                ("proxy-authorization", "Basic eA=="),
                ("transfer-encoding", "chunked"),
                ("upgrade", "h2c"),
                ("te", "gzip"),
                ("expect", "100-continue"),
                ("authorization", "Bearer stolen"),
                ("x-ambient-request", "true"),
                ("x-forwarded-for", "192.0.2.1"),
                ("accept", "*/*"),
            ],
        );
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "x-forwarded-for"]);
    }

    #[test]
    fn trailers_stay_possible() {
        let grpc = head(Protocol::Grpc, &[("te", "trailers")]);
        assert_eq!(grpc[header::TE], "trailers");
        assert!(!grpc.contains_key(header::CONNECTION));
        let rest = head(Protocol::Rest, &[("te", "trailers, deflate;q=0.5")]);
        assert_eq!(rest[header::TE], "trailers");
        assert_eq!(rest[header::CONNECTION], "te");
    }

    #[test]
    fn a_client_cannot_name_our_own_header_away() {
        let headers = [
            ("connection", "authorization, te, upgrade"),
            ("upgrade", "websocket"),
        ];
        let websocket = head(Protocol::WebSocket, &headers);
        assert_eq!(websocket[header::UPGRADE], "websocket");
        assert_eq!(websocket[header::CONNECTION], "upgrade");
    }

    #[test]
    fn refusals_are_recognised_in_the_head() {
        let answer = |status: u16, grpc: Option<&str>| {
            let mut answer = Response::builder().status(status);
            if let Some(grpc) = grpc {
                answer = answer.header("grpc-status", grpc);
            }
            answer.body(()).unwrap()
        };
        assert!(refuses_token(&answer(401, None)));
        assert!(refuses_token(&answer(200, Some("16"))));
        assert!(!refuses_token(&answer(200, Some("0"))));
        assert!(!refuses_token(&answer(403, None)));
        assert!(!refuses_token(&answer(200, None)));
    }
}
