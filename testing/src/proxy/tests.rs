use std::time::Duration;

use axum::{Router, body::Body, extract::Path, routing::get};
use futures_util::StreamExt as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::*;

/// A server that gives back the last part of the path, and under `/stream` what it is sent.
struct Scene {
    proxy: Proxy,
    lines: mpsc::Sender<Result<String, std::convert::Infallible>>,
    http: reqwest::Client,
    _server: JoinSet<()>,
}

impl Scene {
    async fn start() -> Self {
        let (lines, streamed) = mpsc::channel(8);
        let streamed = Arc::new(Mutex::new(Some(streamed)));
        let stream = move || async move {
            let receiver = streamed.lock().unwrap().take().expect("asked for once");
            Body::from_stream(ReceiverStream::new(receiver))
        };
        let routes = Router::new()
            .route("/echo/{text}", get(async |Path(text): Path<String>| text))
            .route("/stream", get(stream));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self {
            proxy: Proxy::start(&Upstream::Http(address)).await,
            lines,
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            _server: server,
        }
    }

    async fn get(&self, path: &str) -> reqwest::Result<reqwest::Response> {
        let url = format!("http://{}{path}", self.proxy.address());
        self.http.get(url).send().await
    }

    async fn text(&self, path: &str) -> (u16, String) {
        let answer = self.get(path).await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// Whether there is no answer, as far as one can wait.
    async fn is_silent(&self, path: &str) -> bool {
        let limit = Duration::from_millis(200);
        timeout(limit, self.get(path)).await.is_err()
    }
}

fn is(path: &'static str) -> impl Fn(&Call) -> bool + Send + Sync + 'static {
    move |call| call.path == path
}

fn ok(text: &str) -> (u16, String) {
    (200, text.to_owned())
}

#[tokio::test]
async fn calls_pass_and_are_written_down() {
    let scene = Scene::start().await;
    assert_eq!(scene.text("/echo/a?x=1").await, ok("a"));
    assert_eq!(scene.text("/none").await.0, 404);
    let calls = scene.proxy.calls();
    assert_eq!(calls.len(), 2);
    assert_eq!(
        (calls[0].path.as_str(), calls[0].query.as_str()),
        ("/echo/a", "x=1")
    );
    assert_eq!(calls[1].answered, Some(StatusCode::NOT_FOUND));
}

#[tokio::test]
async fn a_fault_befalls_as_many_calls_as_it_should_and_ends_when_dropped() {
    let scene = Scene::start().await;
    let busy = Answer::new(429, "busy").header(http::header::RETRY_AFTER, "1");
    let twice = scene.proxy.inject(2, is("/echo/a"), Fault::Answer(busy));
    for _ in 0..2 {
        assert_eq!(scene.text("/echo/b").await, ok("b"));
        assert_eq!(scene.text("/echo/a").await, (429, "busy".to_owned()));
    }
    assert_eq!(scene.text("/echo/a").await, ok("a"));
    assert_eq!(twice.hits(), 2);

    let hang = scene.proxy.inject(usize::MAX, is("/echo/a"), Fault::Hang);
    assert!(scene.is_silent("/echo/a").await);
    drop(hang);
    assert_eq!(scene.text("/echo/a").await, ok("a"));

    let held = scene.proxy.inject(1, is("/echo/a"), Fault::Held);
    let (answer, ()) = tokio::join!(scene.text("/echo/a"), async {
        while held.hits() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(scene.text("/echo/b").await, ok("b"));
        drop(held);
    });
    assert_eq!(answer, ok("a"));

    let lost = scene.proxy.inject(1, is("/echo/a"), Fault::Lost);
    assert!(scene.get("/echo/a").await.is_err());
    assert_eq!(lost.hits(), 1);
}

#[tokio::test]
async fn a_silent_stream_stays_silent_and_a_new_one_flows() {
    let scene = Scene::start().await;
    let answer = scene.get("/stream").await.unwrap();
    let mut stream = answer.bytes_stream();
    scene.lines.send(Ok("one".to_owned())).await.unwrap();
    assert_eq!(stream.next().await.unwrap().unwrap(), "one");

    let silent = scene.proxy.inject(usize::MAX, is("/stream"), Fault::Silent);
    scene.lines.send(Ok("two".to_owned())).await.unwrap();
    drop(silent);
    let next = timeout(Duration::from_millis(200), stream.next()).await;
    assert!(next.is_err(), "{next:?}");

    assert_eq!(scene.proxy.end_streams(is("/stream"), "end"), 1);
    assert_eq!(stream.next().await.unwrap().unwrap(), "end");
    assert!(stream.next().await.is_none());
}

#[tokio::test]
async fn the_world_stops_before_or_after_the_call_of_that_number() {
    for side in [Side::Before, Side::After] {
        let scene = Scene::start().await;
        let cut = Cut::at(2, side);
        scene.proxy.cut(&cut, |call| call.path != "/echo/read");
        assert_eq!(scene.text("/echo/read").await, ok("read"));
        assert_eq!(scene.text("/echo/a").await, ok("a"));
        assert!(!cut.is_reached());

        assert!(scene.is_silent("/echo/b").await);

        timeout(crate::DEADLINE, cut.reached()).await.unwrap();
        assert!(scene.is_silent("/echo/read").await);
        scene.proxy.mend();
        assert_eq!(scene.text("/echo/c").await, ok("c"));
    }
}
