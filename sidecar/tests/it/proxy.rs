//! Plain requests through the proxy.

use std::sync::Arc;

use ambient_testing::{
    DEADLINE,
    faults::{Mode, Relay},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};

use crate::{
    scene::{NOWHERE, Scene, mount, program, read, volume},
    upstream::Upstream,
};

#[tokio::test]
async fn the_token_takes_the_place_of_what_the_client_sent() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("real", &upstream.url()).await;
    let answer = scene
        .post("/api/ambient/v1/sessions?page=2&search=a%20b")
        .header("authorization", "Bearer stolen")
        .header("x-forwarded-for", "192.0.2.1")
        .header("x-ambient-request", "true")
        .body("{\"a\":1}")
        .send()
        .await
        .unwrap();
    assert_eq!(answer.headers()["x-upstream"], "yes");
    assert!(!answer.headers().contains_key("x-private"));
    assert_eq!(read(answer).await, (200, "{\"a\":1}".to_owned()));

    let seen = upstream.shared.last();
    assert_eq!(seen.method, "POST");
    assert_eq!(seen.uri, "/api/ambient/v1/sessions?page=2&search=a%20b");
    assert_eq!(seen.header("authorization"), Some("Bearer real"));
    assert_eq!(seen.headers.get_all("authorization").iter().count(), 1);
    assert_eq!(
        seen.header("host"),
        Some(upstream.address.to_string().as_str())
    );
    assert_eq!(seen.header("x-forwarded-for"), Some("192.0.2.1"));
    assert_eq!(seen.header("x-ambient-request"), None);
    assert_eq!(seen.header("content-length"), Some("7"));
}

#[tokio::test]
async fn http2_clients_are_served_too() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("real", &upstream.url()).await;
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let url = format!("http://{}/x", scene.proxy);
    let answer = client.post(url).body("two").send().await.unwrap();
    assert_eq!(answer.version(), reqwest::Version::HTTP_2);
    assert_eq!(read(answer).await, (200, "two".to_owned()));
    assert_eq!(
        upstream.shared.last().header("authorization"),
        Some("Bearer real")
    );
}

#[tokio::test]
async fn a_refused_token_is_read_again_and_the_request_repeated_once() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    upstream.shared.accept_only("two");
    let secret = volume(&scene.dir);
    upstream.shared.on_refusal(move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
    });

    let body = "x".repeat(60_000);
    let answer = scene.post("/x").body(body.clone()).send().await.unwrap();
    assert_eq!(read(answer).await, (200, body.clone()));

    let seen = upstream.shared.seen();
    let shown: Vec<_> = seen
        .iter()
        .map(|seen| seen.header("authorization").unwrap())
        .collect();
    assert_eq!(shown, ["Bearer one", "Bearer two"]);
    assert!(seen.iter().all(|seen| seen.body.len() == body.len()));
    assert_eq!(
        scene.metric("ambient_sidecar_replays_total").await,
        Some(1.0)
    );
}

#[tokio::test]
async fn a_server_that_refuses_for_good_is_asked_twice_at_most() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("t0", &upstream.url()).await;
    upstream.shared.accept_only("never");
    // The same token still: no second request.
    let answer = scene.get("/x").send().await.unwrap();
    assert_eq!(read(answer).await, (401, "who are you?".to_owned()));
    assert_eq!(upstream.shared.seen().len(), 1);

    let secret = volume(&scene.dir);
    let mut number = 0;
    upstream.shared.on_refusal(move || {
        number += 1;
        let token = format!("t{number}");
        secret.write(&[("bot-token", token.as_bytes())]).unwrap();
    });
    let answer = scene.get("/x").send().await.unwrap();
    assert_eq!(answer.status(), 401);
    assert_eq!(upstream.shared.seen().len(), 3);
}

#[tokio::test]
async fn a_large_request_is_not_repeated() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    upstream.shared.accept_only("two");
    let secret = volume(&scene.dir);
    upstream.shared.on_refusal(move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
    });
    let large = vec![b'x'; 100_000];
    let answer = scene.post("/x").body(large.clone()).send().await.unwrap();
    assert_eq!(answer.status(), 401);
    assert_eq!(upstream.shared.seen().len(), 1);
    scene.serves("two").await;
    let answer = scene.post("/x").body(large.clone()).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(upstream.shared.last().body.len(), large.len());
}

#[tokio::test]
async fn a_refusal_before_the_body_was_read_is_repeated_too() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    upstream.shared.accept_only("two");
    let secret = volume(&scene.dir);
    upstream.shared.on_refusal(move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
    });
    let answer = scene
        .post("/refuse-early")
        .body("body")
        .send()
        .await
        .unwrap();
    assert_eq!(read(answer).await, (200, "body".to_owned()));
}

#[tokio::test]
async fn what_comes_after_the_refusal_goes_with_the_second_request() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    upstream.shared.accept_only("two");
    let secret = volume(&scene.dir);
    let (refused, mut refusals) = mpsc::channel(8);
    upstream.shared.on_refusal(move || {
        secret.write(&[("bot-token", b"two")]).unwrap();
        refused.try_send(()).unwrap();
    });
    let body = async_stream::stream! {
        yield Ok::<_, std::io::Error>("before ");
        refusals.recv().await.unwrap();
        yield Ok("after");
    };
    let request = scene
        .post("/refuse-early")
        .body(reqwest::Body::wrap_stream(body));
    let answer = request.send().await.unwrap();
    assert_eq!(read(answer).await, (200, "before after".to_owned()));
}

#[tokio::test]
async fn without_a_token_or_a_server_a_sentence_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::start(program(&dir, NOWHERE), dir).await;
    let answer = scene.get("/x").send().await.unwrap();
    assert_eq!(answer.headers()["retry-after"], "1");
    assert_eq!(
        read(answer).await,
        (503, "there is no API token yet\n".to_owned())
    );
    scene.mount("one");
    scene.serves("one").await;
    let (status, text) = read(scene.get("/x").send().await.unwrap()).await;
    assert_eq!(status, 502);
    assert!(
        text.starts_with("cannot reach the API server http://127.0.0.1:9: ")
            && text.contains("refused"),
        "{text}"
    );
}

#[tokio::test]
async fn a_server_that_comes_back_is_used_again() {
    let upstream = Upstream::start().await;
    let relay = Relay::start(upstream.address).await;
    let mut scene = Scene::with_token("one", &format!("http://{}", relay.address())).await;
    assert_eq!(scene.get("/x").send().await.unwrap().status(), 200);
    relay.set(Mode::Refuse).await;
    relay.cut();
    // The open connection may still be there for a moment; then nobody listens.
    let refused = async { while scene.get("/x").send().await.unwrap().status() != 502 {} };
    timeout(DEADLINE, refused).await.unwrap();
    relay.set(Mode::Pass).await;
    assert_eq!(scene.get("/x").send().await.unwrap().status(), 200);
    assert_eq!(
        upstream.shared.last().header("authorization"),
        Some("Bearer one")
    );
    scene
        .sidecar
        .log_line("reached again", |line| {
            line["message"]
                .as_str()
                .is_some_and(|it| it.contains("can be reached again"))
        })
        .await;
}

/// Sends bytes and reads until the end or the first 64 KiB.
async fn raw(scene: &Scene, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(scene.proxy).await.unwrap();
    let _ = stream.write_all(request).await;
    let mut answer = vec![0; 64 * 1024];
    let mut length = 0;
    while let Ok(more @ 1..) = stream.read(&mut answer[length..]).await {
        length += more;
    }
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[tokio::test]
async fn nothing_but_the_upstream_can_be_reached() {
    let upstream = Upstream::start().await;
    let elsewhere = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    let other = elsewhere.address;
    for request in [
        format!("GET http://{other}/x HTTP/1.1\r\nHost: {other}\r\nConnection: close\r\n\r\n"),
        "GET //evil.example/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_owned(),
        "GET /x HTTP/1.0\r\n\r\n".to_owned(),
        "TRACE /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_owned(),
        format!("CONNECT {other} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
        "OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_owned(),
        format!("GET @{other}/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
    ] {
        let answer = raw(&scene, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1"), "{request}: {answer}");
    }
    assert!(elsewhere.shared.seen().is_empty());
    // An absolute target of a loopback name and a doubled slash reach the upstream, as paths.
    let uris: Vec<_> = upstream
        .shared
        .seen()
        .into_iter()
        .map(|seen| seen.uri)
        .collect();
    assert_eq!(uris, ["/x", "//evil.example/x"]);
}

#[tokio::test]
async fn broken_and_huge_requests_get_an_answer_and_harm_nobody() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    let huge = format!(
        "GET / HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(300_000)
    );
    assert!(
        raw(&scene, huge.as_bytes())
            .await
            .starts_with("HTTP/1.1 431")
    );
    assert!(
        raw(&scene, b"nonsense\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 400")
    );
    let two =
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy";
    assert!(raw(&scene, two).await.starts_with("HTTP/1.1 400"));
    assert!(upstream.shared.seen().is_empty());
    assert_eq!(scene.get("/x").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn heads_and_expectations_are_kept() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    let url = format!("http://{}/x", scene.proxy);
    let head = scene.client.head(url).send().await.unwrap();
    assert_eq!(
        (head.status().as_u16(), &head.headers()["x-upstream"]),
        (200, &"yes".parse().unwrap())
    );

    let mut stream = TcpStream::connect(scene.proxy).await.unwrap();
    let head = b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\
                 Expect: 100-continue\r\nConnection: close\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let mut answer = vec![0; 25];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"ab").await.unwrap();
    answer.clear();
    stream.read_to_end(&mut answer).await.unwrap();
    assert!(answer.ends_with(b"\r\n\r\nab"), "{answer:?}");
    assert_eq!(upstream.shared.last().header("expect"), None);
}

#[tokio::test]
async fn many_at_once_are_all_answered() {
    let upstream = Upstream::start().await;
    let scene = Arc::new(Scene::with_token("one", &upstream.url()).await);
    let mut asking = tokio::task::JoinSet::new();
    for number in 0..300 {
        let scene = Arc::clone(&scene);
        asking.spawn(async move {
            let body = format!("request {number}");
            let answer = scene.post("/x").body(body.clone()).send().await.unwrap();
            assert_eq!(read(answer).await, (200, body));
        });
    }
    while let Some(ended) = asking.join_next().await {
        ended.unwrap();
    }
    assert_eq!(upstream.shared.seen().len(), 300);
}

#[tokio::test]
async fn a_path_before_all_paths_cannot_be_left() {
    let upstream = Upstream::start().await;
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let scene = Scene::start(program(&dir, &format!("{}/base/", upstream.url())), dir).await;
    scene.get("/x").send().await.unwrap();
    assert_eq!(upstream.shared.last().uri, "/base/x");
    let request = b"GET /%2e%2e/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    assert!(raw(&scene, request).await.starts_with("HTTP/1.1 400"));
}
