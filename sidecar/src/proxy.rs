//! Reverse proxy to the API server that adds the token.
//!
//! In: requests on loopback without a credential. Out: the same to the one configured upstream,
//! with `Authorization`, streaming both ways: HTTP/1.1, HTTP/2, gRPC, server-sent events,
//! WebSocket. Here is who gets in, which way each request goes and how failures look; `forward.rs`
//! is the way of one request.

mod body;
mod forward;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use ambient_shared::{
    client::{self, CONNECT_TIMEOUT, ClientError},
    resolve::Resolver,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header, request::Parts};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use metrics::counter;
use tower::{ServiceExt as _, timeout::Timeout, util::BoxCloneSyncService};
use tracing::{info, warn};

use crate::{
    guard::{Guard, Refusal},
    metrics as names,
    serve::{Body, BoxError, Connection, Handler, full},
    settings::{Settings, Upstream},
    tokens::Tokens,
};
use body::{Budget, Outgoing};

/// How long an idle connection to the API server is kept: shorter than servers and load balancers
/// keep theirs (60 s and more), so that no request meets a closed connection.
const POOL_IDLE: Duration = Duration::from_secs(45);

/// Most idle HTTP/1.1 connections kept: an agent and its tools ask a few things at a time.
const POOL_MOST_IDLE: usize = 16;

/// How often a silent HTTP/2 connection to the API server is pinged. Existing API servers are
/// written in Go, whose gRPC closes connections that ping more often than every 5 minutes; TCP's
/// own keep-alive finds dead ones sooner.
const PING: Duration = Duration::from_mins(6);

/// How long the answer to a ping may take.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// When TCP asks whether a silent peer is still there, and how long it waits before the next try.
const TCP_KEEP_ALIVE: Duration = Duration::from_secs(30);
const TCP_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How long sent bytes may stay unacknowledged before the connection counts as dead.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(60);

/// Flow-control window of HTTP/2: bytes in memory that a slow agent makes us hold for it.
const WINDOW: u32 = 512 * 1024;

/// TLS, DNS and TCP together get as long as TCP and DNS alone, and a little more.
const WHOLE_CONNECT_TIMEOUT: Duration = CONNECT_TIMEOUT.saturating_mul(2);

type HttpsStream = hyper_rustls::MaybeHttpsStream<hyper_util::rt::TokioIo<tokio::net::TcpStream>>;
type Connector = BoxCloneSyncService<Uri, HttpsStream, BoxError>;
type Http = Client<Connector, Outgoing>;

/// How a request travels, and how its failures look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// Plain HTTP, server-sent events included.
    Rest,
    /// A status of its own, in trailers.
    Grpc,
    /// A change to WebSocket, for which the connection must be HTTP/1.1.
    WebSocket,
}

impl Protocol {
    fn of(request: &Request<Incoming>) -> Self {
        if is_grpc(request.headers()) {
            Self::Grpc
        } else if wants_websocket(request) {
            Self::WebSocket
        } else {
            Self::Rest
        }
    }

    fn label(self) -> &'static str {
        match self {
            Self::Rest => "rest",
            Self::Grpc => "grpc",
            Self::WebSocket => "websocket",
        }
    }
}

/// `application/grpc`, and with a suffix (gRPC over HTTP/2, Content-Type).
fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|value| {
        let grpc = b"application/grpc";
        value
            .as_bytes()
            .get(..grpc.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(grpc))
    })
}

/// RFC 6455, section 4.1. Other upgrades are not offered.
fn wants_websocket(request: &Request<Incoming>) -> bool {
    request.version() == http::Version::HTTP_11
        && request.method() == http::Method::GET
        && forward::has_word(request.headers(), &header::CONNECTION, "upgrade")
        && forward::has_word(request.headers(), &header::UPGRADE, "websocket")
}

/// The proxy.
pub(crate) struct Proxy {
    tokens: Tokens,
    guard: Guard,
    rest: Upstream,
    grpc: Upstream,
    /// HTTP/2 where TLS agrees on it, else HTTP/1.1.
    any: Http,
    /// HTTP/1.1 alone.
    http1: Http,
    /// HTTP/2 alone, also without TLS.
    http2: Http,
    budget: Budget,
    /// Whether the upstream could be reached last time, so that a change is said once.
    reached: AtomicBool,
}

/// Why a request was not answered by the API server.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the path of the request cannot be sent to the API server")]
    Path,
    #[error("there is no API token yet")]
    NoToken,
    #[error("the API token has expired, and no fresh one has come yet")]
    Expired,
    #[error("cannot reach the API server {upstream}")]
    Unreachable {
        upstream: String,
        source: hyper_util::client::legacy::Error,
    },
    #[error(
        "the API server {upstream} did not begin to answer within {}",
        humantime::format_duration(forward::ANSWER_TIMEOUT)
    )]
    Silent { upstream: String },
}

impl Failure {
    /// The HTTP status, the gRPC status (its codes are on the gRPC pages, "Status codes") and a
    /// word for metrics.
    fn status(&self) -> (StatusCode, u16, &'static str) {
        const INVALID_ARGUMENT: u16 = 3;
        const DEADLINE_EXCEEDED: u16 = 4;
        const PERMISSION_DENIED: u16 = 7;
        const UNAVAILABLE: u16 = 14;
        match self {
            Self::Refused(refusal) => (refusal.status(), PERMISSION_DENIED, "refused"),
            Self::Path => (StatusCode::BAD_REQUEST, INVALID_ARGUMENT, "bad_path"),
            Self::NoToken | Self::Expired => {
                (StatusCode::SERVICE_UNAVAILABLE, UNAVAILABLE, "no_token")
            }
            Self::Unreachable { .. } => (StatusCode::BAD_GATEWAY, UNAVAILABLE, "unreachable"),
            Self::Silent { .. } => (StatusCode::GATEWAY_TIMEOUT, DEADLINE_EXCEEDED, "silent"),
        }
    }

    /// The answer that says so, in the caller's protocol.
    fn answer(&self, protocol: Protocol) -> Response<Body> {
        let (status, grpc_status, _) = self.status();
        let text = ambient_shared::exit::report(self);
        let mut answer = Response::new(full(""));
        if protocol == Protocol::Grpc {
            // Trailers-Only: the status in the headers of an answer without a body.
            let headers = answer.headers_mut();
            let grpc = HeaderValue::from_static("application/grpc");
            headers.insert(header::CONTENT_TYPE, grpc);
            headers.insert("grpc-status", HeaderValue::from(grpc_status));
            if let Ok(message) = HeaderValue::try_from(percent_encode(&text)) {
                headers.insert("grpc-message", message);
            }
        } else {
            *answer.status_mut() = status;
            *answer.body_mut() = full(format!("{text}\n"));
            let plain = HeaderValue::from_static("text/plain; charset=utf-8");
            answer.headers_mut().insert(header::CONTENT_TYPE, plain);
        }
        if matches!(self, Self::NoToken | Self::Expired) {
            let soon = HeaderValue::from_static("1");
            answer.headers_mut().insert(header::RETRY_AFTER, soon);
        }
        answer
    }
}

/// As gRPC wants messages: printable ASCII but `%`; other bytes percent-encoded.
fn percent_encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if (b' '..=b'~').contains(&byte) && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

impl Proxy {
    /// A proxy to the upstreams of `settings`.
    ///
    /// # Errors
    /// When the CA certificates cannot be read.
    pub(crate) fn new(
        settings: &Settings,
        resolver: &Resolver,
        tokens: Tokens,
    ) -> Result<Self, ClientError> {
        let roots = client::trust_roots(settings.ca_file.as_deref())?;
        let mut tls = client::tls_config(roots)?;
        // The connectors put in what each can speak.
        tls.alpn_protocols.clear();
        let connect = || HttpsConnectorBuilder::new().with_tls_config(tls.clone());
        let tcp = || {
            let mut tcp = HttpConnector::new_with_resolver(resolver.clone());
            tcp.enforce_http(false);
            tcp.set_nodelay(true);
            tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
            tcp.set_keepalive(Some(TCP_KEEP_ALIVE));
            tcp.set_keepalive_interval(Some(TCP_KEEP_ALIVE_INTERVAL));
            tcp.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
            tcp
        };
        let any = connect().https_or_http().enable_all_versions();
        let http1 = connect().https_or_http().enable_http1();
        let http2 = connect().https_or_http().enable_http2();
        Ok(Self {
            tokens,
            guard: Guard::new(settings.require_header),
            rest: settings.upstream.clone(),
            grpc: settings.grpc_upstream.clone(),
            any: http_client(any.wrap_connector(tcp()), false),
            http1: http_client(http1.wrap_connector(tcp()), false),
            http2: http_client(http2.wrap_connector(tcp()), true),
            budget: Budget::default(),
            reached: AtomicBool::new(true),
        })
    }

    fn upstream(&self, protocol: Protocol) -> (&Http, &Upstream) {
        match protocol {
            Protocol::Rest => (&self.any, &self.rest),
            Protocol::WebSocket => (&self.http1, &self.rest),
            Protocol::Grpc => (&self.http2, &self.grpc),
        }
    }

    fn check(&self, request: &Parts) -> Result<(), Failure> {
        self.guard.check(request).map_err(|refusal| {
            let labels = [("port", "proxy"), ("reason", refusal.label())];
            counter!(names::REFUSED, &labels).increment(1);
            Failure::Refused(refusal)
        })
    }

    /// Says once that the API server cannot be reached, and once that it can again.
    fn note(&self, result: Result<(), &Failure>) {
        let reached = match result {
            Ok(()) => true,
            Err(Failure::Unreachable { .. } | Failure::Silent { .. }) => false,
            Err(_) => return,
        };
        if self.reached.swap(reached, Ordering::Relaxed) == reached {
            return;
        }
        match result {
            Ok(()) => info!("the API server can be reached again"),
            Err(failure) => warn!(
                reason = %ambient_shared::exit::report(failure),
                "the API server cannot be reached"
            ),
        }
    }
}

impl Handler for Proxy {
    async fn handle(&self, request: Request<Incoming>, connection: &Connection) -> Response<Body> {
        let protocol = Protocol::of(&request);
        let result = self.forward(request, protocol, connection).await;
        self.note(result.as_ref().map(|_| ()));
        let label = match &result {
            Ok(_) => "answered",
            Err(failure) => failure.status().2,
        };
        let labels = [("protocol", protocol.label()), ("result", label)];
        counter!(names::PROXIED, &labels).increment(1);
        result.unwrap_or_else(|failure| failure.answer(protocol))
    }
}

fn http_client<C>(connector: C, http2_only: bool) -> Http
where
    C: tower::Service<Uri, Response = HttpsStream, Error = BoxError>
        + Clone
        + Send
        + Sync
        + 'static,
    C::Future: Send + 'static,
{
    let connector = BoxCloneSyncService::new(
        Timeout::new(connector, WHOLE_CONNECT_TIMEOUT).map_err(|error: BoxError| {
            if error.is::<tower::timeout::error::Elapsed>() {
                "no connection in time".into()
            } else {
                error
            }
        }),
    );
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .timer(TokioTimer::new())
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(POOL_MOST_IDLE)
        .http2_only(http2_only)
        .http2_initial_stream_window_size(WINDOW)
        .http2_initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(PING)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build(connector)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_is_known_by_its_content_type() {
        for (content_type, grpc) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("Application/gRPC", true),
            ("application/json", false),
            ("application/grp", false),
        ] {
            let value = HeaderValue::from_static(content_type);
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, value)]);
            assert_eq!(is_grpc(&headers), grpc, "{content_type}");
        }
    }

    #[test]
    fn failures_speak_the_callers_protocol() {
        let answer = Failure::NoToken.answer(Protocol::Rest);
        assert_eq!(answer.status(), 503);
        assert_eq!(answer.headers()[header::RETRY_AFTER], "1");
        let answer = Failure::Refused(Refusal::Origin).answer(Protocol::Grpc);
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["grpc-status"], "7");
        assert!(http_body::Body::is_end_stream(answer.body()));
    }

    #[test]
    fn grpc_messages_are_encoded() {
        assert_eq!(percent_encode("a b"), "a b");
        assert_eq!(percent_encode("50%\nö"), "50%25%0A%C3%B6");
    }
}
