//! A collector of traces (OTLP over HTTP, protobuf) that keeps what it is sent.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    routing::post,
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{Span as Sent, Status, status::StatusCode as SpanStatus},
};
use prost::Message as _;
use tokio::{net::TcpListener, sync::Notify, task::JoinSet, time::timeout};

use crate::DEADLINE;

/// A span as the collector got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Who sent it.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its trace, in hex.
    pub trace: String,
    /// Its id, in hex.
    pub id: String,
    /// The id of the span that it is part of; empty for the first of a trace.
    pub parent: String,
    /// Its attributes.
    pub attributes: BTreeMap<String, String>,
    /// Names of what happened within.
    pub events: Vec<String>,
    /// Whether it says that it failed.
    pub failed: bool,
}

impl Span {
    /// One of its attributes; empty when it has none of this name.
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

#[derive(Debug, Default)]
struct Seen {
    spans: Mutex<Vec<Span>>,
    /// All that was sent, as it came.
    bodies: Mutex<Vec<Bytes>>,
    headers: Mutex<Vec<HeaderMap>>,
    more: Notify,
}

/// A running collector; ends when dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    seen: Arc<Seen>,
    _serving: JoinSet<()>,
}

impl Collector {
    /// Starts one at a free port.
    pub async fn start() -> Self {
        let seen = Arc::new(Seen::default());
        let routes = Router::new()
            .route("/v1/traces", post(take))
            .with_state(Arc::clone(&seen));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self {
            address,
            seen,
            _serving: serving,
        }
    }

    /// For `OTEL_EXPORTER_OTLP_ENDPOINT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What came so far.
    pub fn spans(&self) -> Vec<Span> {
        lock(&self.seen.spans).clone()
    }

    /// The headers of each export.
    pub fn headers(&self) -> Vec<HeaderMap> {
        lock(&self.seen.headers).clone()
    }

    /// Whether any of this text is in what came, wherever.
    pub fn was_told(&self, text: &str) -> bool {
        let bodies = lock(&self.seen.bodies);
        bodies.iter().any(|body| {
            let mut windows = body.windows(text.len());
            windows.any(|it| it == text.as_bytes())
        })
    }

    /// Waits for a span, among those that came before too.
    ///
    /// # Panics
    /// When none comes in time, with the names of those that came.
    pub async fn span(&self, what: &str, wanted: impl Fn(&Span) -> bool) -> Span {
        let found = async {
            loop {
                let more = self.seen.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                if let Some(span) = self.spans().into_iter().find(&wanted) {
                    return span;
                }
                // Looks again by itself: what is wanted may depend on more than spans.
                let _ = timeout(Duration::from_secs(1), more).await;
            }
        };
        let found = timeout(DEADLINE, found).await;
        found.unwrap_or_else(|_| panic!("no span: {what}; there are {:#?}", self.spans()))
    }
}

async fn take(
    State(seen): State<Arc<Seen>>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, [(header::HeaderName, &'static str); 1], Vec<u8>) {
    let kind = [(header::CONTENT_TYPE, "application/x-protobuf")];
    let Ok(request) = ExportTraceServiceRequest::decode(body.clone()) else {
        return (StatusCode::BAD_REQUEST, kind, Vec::new());
    };
    lock(&seen.headers).push(headers);
    lock(&seen.bodies).push(body);
    for of_resource in request.resource_spans {
        let attributes = of_resource.resource.map(|it| texts(it.attributes));
        let service = attributes.and_then(|mut it| it.remove("service.name"));
        let service = service.unwrap_or_default();
        let sent = of_resource.scope_spans.into_iter().flat_map(|it| it.spans);
        lock(&seen.spans).extend(sent.map(|span| read(&service, span)));
    }
    seen.more.notify_waiters();
    let answer = ExportTraceServiceResponse::default().encode_to_vec();
    (StatusCode::OK, kind, answer)
}

fn read(service: &str, span: Sent) -> Span {
    let failed = span.status.as_ref().map(Status::code);
    Span {
        service: service.to_owned(),
        name: span.name,
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        attributes: texts(span.attributes),
        events: span.events.into_iter().map(|event| event.name).collect(),
        failed: failed == Some(SpanStatus::Error),
    }
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|it| it.value) {
        Some(Value::StringValue(text)) => text,
        Some(other) => format!("{other:?}"),
        None => String::new(),
    };
    let pair = |it: KeyValue| (it.key, text(it.value));
    attributes.into_iter().map(pair).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn lock<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}
