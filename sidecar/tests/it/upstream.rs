//! An API server that shows what reached it.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State, WebSocketUpgrade, ws::WebSocket},
    http::{HeaderMap, StatusCode, Version},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::{net::TcpListener, sync::Notify, task::JoinSet};

/// One request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    pub uri: String,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

type OnRefusal = Box<dyn FnMut() + Send>;

#[derive(Clone, Default)]
pub struct Shared {
    seen: Arc<Mutex<Vec<Seen>>>,
    /// The one token that is accepted; any while none.
    accepted: Arc<Mutex<Option<String>>>,
    /// Runs before a refusal is answered.
    on_refusal: Arc<Mutex<Option<OnRefusal>>>,
    /// Lets `/slow`, `/sse` go on, one each time.
    pub gate: Arc<Notify>,
    /// Told when somebody waits at the gate.
    pub waiting: Arc<Notify>,
    /// Told when a stream was dropped before its end.
    pub gone: Arc<Notify>,
}

/// A running API server.
pub struct Upstream {
    pub address: SocketAddr,
    pub shared: Shared,
    _running: JoinSet<()>,
}

impl Upstream {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let shared = Shared::default();
        let address = listener.local_addr().unwrap();
        let routes = routes(shared.clone());
        let mut running = JoinSet::new();
        running.spawn(async move {
            axum::serve(listener, routes).await.unwrap();
        });
        Self {
            address,
            shared,
            _running: running,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Shared {
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn last(&self) -> Seen {
        self.seen().last().expect("a request arrived").clone()
    }

    pub fn accept_only(&self, token: &str) {
        *self.accepted.lock().unwrap() = Some(token.to_owned());
    }

    pub fn on_refusal(&self, run: impl FnMut() + Send + 'static) {
        *self.on_refusal.lock().unwrap() = Some(Box::new(run));
    }

    fn refuses(&self, headers: &HeaderMap) -> bool {
        let accepted = self.accepted.lock().unwrap().clone();
        let shown = headers.get("authorization");
        let refused = accepted.is_some_and(|token| {
            shown.is_none_or(|shown| shown.as_bytes() != format!("Bearer {token}").as_bytes())
        });
        if refused && let Some(run) = &mut *self.on_refusal.lock().unwrap() {
            run();
        }
        refused
    }
}

pub fn routes(shared: Shared) -> Router {
    Router::new()
        .route("/slow", get(slow))
        .route("/sse", get(sse))
        .route("/refuse-early", post(refuse_early))
        .route("/ws", get(websocket))
        .fallback(show)
        .with_state(shared)
}

/// Answers with the body that was sent, after reading all of it.
async fn show(State(shared): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    shared.seen.lock().unwrap().push(Seen {
        method: parts.method.to_string(),
        uri: parts.uri.to_string(),
        version: parts.version,
        headers: parts.headers.clone(),
        body: body.clone(),
    });
    if shared.refuses(&parts.headers) {
        return (StatusCode::UNAUTHORIZED, "who are you?").into_response();
    }
    let headers = [
        ("x-upstream", "yes"),
        ("connection", "x-private"),
        ("x-private", "1"),
    ];
    (headers, body).into_response()
}

/// Refuses without reading the body.
async fn refuse_early(State(shared): State<Shared>, headers: HeaderMap, body: Body) -> Response {
    if shared.refuses(&headers) {
        return (StatusCode::UNAUTHORIZED, "who are you?").into_response();
    }
    axum::body::to_bytes(body, usize::MAX)
        .await
        .unwrap()
        .into_response()
}

async fn slow(State(shared): State<Shared>) -> &'static str {
    shared.waiting.notify_one();
    shared.gate.notified().await;
    "done"
}

/// Tells when it is dropped.
struct Gone(Arc<Notify>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// An event each time the gate opens.
async fn sse(State(shared): State<Shared>) -> Response {
    let gone = Gone(Arc::clone(&shared.gone));
    let events = async_stream::stream! {
        let _gone = gone;
        for number in 1.. {
            yield Ok::<_, std::io::Error>(format!("data: {number}\n\n"));
            shared.gate.notified().await;
        }
    };
    let headers = [("content-type", "text/event-stream")];
    (headers, Body::from_stream(events)).into_response()
}

async fn websocket(
    State(shared): State<Shared>,
    headers: HeaderMap,
    up: WebSocketUpgrade,
) -> Response {
    if shared.refuses(&headers) {
        return (StatusCode::UNAUTHORIZED, "who are you?").into_response();
    }
    up.on_upgrade(echo)
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        if socket.send(message).await.is_err() {
            return;
        }
    }
}
