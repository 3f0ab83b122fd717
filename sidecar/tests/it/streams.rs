//! What goes on for long: server-sent events, WebSocket, uploads.

use std::time::Duration;

use ambient_testing::{DEADLINE, faults::Relay};
use futures_util::StreamExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::{
    scene::{Scene, volume},
    upstream::Upstream,
};

#[tokio::test]
async fn events_arrive_before_the_answer_ends() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    let mut answer = scene.get("/sse").send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    for number in 1..5 {
        let chunk = timeout(DEADLINE, answer.chunk())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(chunk, format!("data: {number}\n\n"));
        upstream.shared.gate.notify_one();
    }
    // The token changes meanwhile: the stream goes on.
    scene.mount("two");
    scene.serves("two").await;
    assert!(
        timeout(DEADLINE, answer.chunk())
            .await
            .unwrap()
            .unwrap()
            .is_some()
    );
    // A client that goes away takes the request to the API server with it.
    drop(answer);
    timeout(DEADLINE, upstream.shared.gone.notified())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_stream_that_breaks_off_does_not_look_like_an_end() {
    let upstream = Upstream::start().await;
    let relay = Relay::start(upstream.address).await;
    let scene = Scene::with_token("one", &format!("http://{}", relay.address())).await;
    for break_off in [Relay::cut, Relay::reset] {
        let mut answer = scene.get("/sse").send().await.unwrap();
        assert!(answer.chunk().await.unwrap().is_some());
        break_off(&relay);
        let end = timeout(DEADLINE, answer.chunk()).await.unwrap();
        assert!(end.is_err(), "{end:?}");
        assert_eq!(scene.get("/x").send().await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn an_upload_streams_too() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    let chunk = vec![7_u8; 100_000];
    let body = futures_util::stream::iter(0..50).then(move |_| {
        let chunk = chunk.clone();
        async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok::<_, std::io::Error>(chunk)
        }
    });
    let request = scene.post("/x").body(reqwest::Body::wrap_stream(body));
    let answer = request.send().await.unwrap();
    assert_eq!(answer.bytes().await.unwrap().len(), 5_000_000);
}

/// A WebSocket client of a few lines: handshake, then text frames masked with zeros.
struct WebSocket(TcpStream);

impl WebSocket {
    async fn open(scene: &Scene) -> Result<Self, String> {
        let mut stream = TcpStream::connect(scene.proxy).await.unwrap();
        let handshake = "GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive, Upgrade\r\n\
                         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        stream.write_all(handshake.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(DEADLINE, stream.read_u8()).await.unwrap().unwrap());
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        // RFC 6455, section 1.3: the answer to that key.
        let accepted = head.starts_with("http/1.1 101")
            && head.contains("sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=");
        if accepted {
            Ok(Self(stream))
        } else {
            Err(head)
        }
    }

    async fn echo(&mut self, text: &str) -> String {
        let length = u8::try_from(text.len()).unwrap();
        let mut frame = vec![0x81, 0x80 | length, 0, 0, 0, 0];
        frame.extend_from_slice(text.as_bytes());
        self.0.write_all(&frame).await.unwrap();
        let mut answer = vec![0; 2 + text.len()];
        timeout(DEADLINE, self.0.read_exact(&mut answer))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer[..2], [0x81, length]);
        String::from_utf8(answer[2..].to_vec()).unwrap()
    }
}

#[tokio::test]
async fn a_websocket_is_passed_through() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    upstream.shared.accept_only("one");
    let mut socket = WebSocket::open(&scene).await.unwrap();
    assert_eq!(socket.echo("hello").await, "hello");
    scene.mount("two");
    scene.serves("two").await;
    assert_eq!(socket.echo("again").await, "again");
    scene.in_flight("proxy", 1).await;
    drop(socket);
    scene.in_flight("proxy", 0).await;
}

#[tokio::test]
async fn a_websocket_that_is_refused_is_asked_for_again() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    upstream.shared.accept_only("two");
    let refused = WebSocket::open(&scene).await.err().unwrap();
    assert!(refused.starts_with("http/1.1 401"), "{refused}");
    let secret = volume(&scene.dir);
    upstream.shared.on_refusal(move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
    });
    let mut socket = WebSocket::open(&scene).await.unwrap();
    assert_eq!(socket.echo("hello").await, "hello");
}
