//! In front of the API server: cuts pages of lists to a size, as existing API servers have it, and
//! counts them.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::Response,
};
use http::StatusCode;
use tokio::{net::TcpListener, task::JoinSet};

/// A running one.
pub struct Pages {
    url: String,
    count: Arc<AtomicU64>,
    _running: JoinSet<()>,
}

#[derive(Clone)]
struct Relay {
    client: reqwest::Client,
    upstream: String,
    page: u32,
    count: Arc<AtomicU64>,
}

impl Pages {
    /// One before the API server at this URL.
    pub async fn start(upstream: String, page: u32) -> Self {
        let count = Arc::new(AtomicU64::new(0));
        let relay = Relay {
            client: reqwest::Client::builder()
                .no_proxy()
                .build()
                .expect("a client"),
            upstream,
            page,
            count: Arc::clone(&count),
        };
        let app = Router::new().fallback(pass_on).with_state(relay);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let mut running = JoinSet::new();
        running.spawn(async move { axum::serve(listener, app).await.expect("serve") });
        Self {
            url,
            count,
            _running: running,
        }
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Pages so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Counts from nothing.
    pub fn restart(&self) {
        self.count.store(0, Ordering::Relaxed);
    }
}

async fn pass_on(State(relay): State<Relay>, request: Request) -> Response {
    let (head, _) = request.into_parts();
    let query = head.uri.query().unwrap_or_default();
    let mut is_list = false;
    let pairs: Vec<_> = query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| match pair.strip_prefix("size=") {
            Some(size) => {
                is_list = true;
                let asked: u32 = size.parse().unwrap_or(relay.page);
                format!("size={}", asked.min(relay.page))
            }
            None => pair.to_owned(),
        })
        .collect();
    if is_list {
        relay.count.fetch_add(1, Ordering::Relaxed);
    }
    let url = format!("{}{}?{}", relay.upstream, head.uri.path(), pairs.join("&"));
    let mut headers = head.headers;
    headers.remove(http::header::HOST);
    let asked = relay.client.request(head.method, url).headers(headers);
    let Ok(answer) = asked.send().await else {
        let mut refused = Response::new(Body::empty());
        *refused.status_mut() = StatusCode::BAD_GATEWAY;
        return refused;
    };
    let (status, mut headers) = (answer.status(), answer.headers().clone());
    headers.remove(http::header::TRANSFER_ENCODING);
    headers.remove(http::header::CONNECTION);
    let mut passed_on = Response::new(Body::from_stream(answer.bytes_stream()));
    *passed_on.status_mut() = status;
    *passed_on.headers_mut() = headers;
    passed_on
}
