//! `GET /token`.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;
use tokio::time::Instant;

use crate::scene::{NOWHERE, Scene, program, read};

#[tokio::test]
async fn json_unless_text_is_preferred() {
    let scene = Scene::with_token("secret-1", NOWHERE).await;
    let answer = scene.token("").send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/json");
    assert_eq!(answer.headers()["cache-control"], "no-store");
    let tag = answer.headers()["etag"].to_str().unwrap().to_owned();
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["token"], "secret-1");
    assert_eq!(tag, format!("\"{}\"", answer["hash"].as_str().unwrap()));
    assert!(answer.get("expires_at").is_none());

    let text = scene.token("").header("accept", "text/plain");
    let answer = text.send().await.unwrap();
    assert!(
        answer.headers()["content-type"]
            .to_str()
            .unwrap()
            .starts_with("text/plain")
    );
    assert_eq!(read(answer).await, (200, "secret-1".to_owned()));

    let known = scene.token("").header("if-none-match", &tag);
    assert_eq!(
        read(known.send().await.unwrap()).await,
        (304, String::new())
    );
}

#[tokio::test]
async fn expiry_is_told_when_known() {
    // {"exp":4102444800}: the first second of 2100.
    let scene = Scene::with_token("e30.eyJleHAiOjQxMDI0NDQ4MDB9.sig", NOWHERE).await;
    let answer: Value = scene.token("").send().await.unwrap().json().await.unwrap();
    assert_eq!(answer["expires_at"], "2100-01-01T00:00:00Z");
}

#[tokio::test]
async fn an_expiry_that_no_text_can_tell_is_left_out() {
    let scene = Scene::with_token("one", NOWHERE).await;
    // The year 10000, milliseconds by mistake, and the most that fits.
    for exp in [253_402_300_800, 4_102_444_800_000, u64::MAX >> 1, u64::MAX] {
        let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"exp":{exp}}}"#));
        let token = format!("e30.{claims}.sig");
        scene.mount(&token);
        scene.serves(&token).await;
        let answer: Value = scene.token("").send().await.unwrap().json().await.unwrap();
        assert_eq!(answer["token"], token);
        assert_eq!(answer.get("expires_at"), None, "{exp}");
        assert_eq!(scene.readiness().await.0, 200);
    }
}

#[tokio::test]
async fn a_wait_ends_when_the_token_changes() {
    let scene = Scene::with_token("one", NOWHERE).await;
    let answer: Value = scene.token("").send().await.unwrap().json().await.unwrap();
    let hash = answer["hash"].as_str().unwrap().to_owned();

    let started = Instant::now();
    let query = format!("?after={hash}&wait=5m");
    let waiting = scene.token(&query).send();
    let swap = async {
        scene.in_flight("endpoint", 1).await;
        scene.mount("two");
    };
    let (answer, ()) = tokio::join!(waiting, swap);
    let answer: Value = answer.unwrap().json().await.unwrap();
    assert_eq!(answer["token"], "two");
    assert!(started.elapsed() < Duration::from_mins(5));

    // The one before is another one: answered at once.
    let answer = scene.token(&query).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let hash = answer.headers()["etag"].to_str().unwrap().to_owned();
    // The same one still: told so at the end of the wait.
    let query = format!("?after={hash}&wait=200ms");
    let answer = scene.token(&query).send().await.unwrap();
    assert_eq!(read(answer).await, (304, String::new()));
}

#[tokio::test]
async fn a_wait_without_a_hash_is_for_the_first_token() {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::start(program(&dir, NOWHERE), dir).await;
    let answer = scene.token("?wait=100ms").send().await.unwrap();
    assert_eq!(answer.status(), 503);
    let waiting = scene.token("?wait=30s").send();
    let mounting = async {
        scene.in_flight("endpoint", 1).await;
        scene.mount("first");
    };
    let (answer, ()) = tokio::join!(waiting, mounting);
    let answer: Value = answer.unwrap().json().await.unwrap();
    assert_eq!(answer["token"], "first");
}

#[tokio::test]
async fn what_is_not_served_is_told() {
    let scene = Scene::with_token("one", NOWHERE).await;
    let url = format!("http://{}", scene.endpoint);
    let post = scene
        .client
        .post(format!("{url}/token"))
        .send()
        .await
        .unwrap();
    assert_eq!(post.status(), 405);
    assert_eq!(post.headers()["allow"], "GET, HEAD");
    let head = scene
        .client
        .head(format!("{url}/token"))
        .send()
        .await
        .unwrap();
    assert_eq!(head.status(), 200);
    assert_eq!(head.headers()["content-type"], "application/json");
    assert_eq!(read(head).await.1, "");
    let other = scene.client.get(format!("{url}/")).send().await.unwrap();
    assert_eq!(other.status(), 404);
    for query in ["?after=x", "?wait=soon", "?after=ba7816bf8f01&wait="] {
        let (status, reason) = read(scene.token(query).send().await.unwrap()).await;
        assert_eq!(status, 400, "{query}");
        assert!(reason.starts_with('`'), "{reason}");
    }
}

#[tokio::test]
async fn pages_and_other_hosts_are_refused_on_both_ports() {
    let dir = tempfile::tempdir().unwrap();
    crate::scene::mount(&dir, "one");
    let program = program(&dir, NOWHERE).env("AMBIENT_REQUIRE_HEADER", "true");
    let scene = Scene::start(program, dir).await;
    let ask = |address, headers: &'static [(&'static str, &'static str)]| {
        let mut request = scene.client.get(format!("http://{address}/token"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        async { read(request.send().await.unwrap()).await }
    };
    for address in [scene.endpoint, scene.proxy] {
        let (status, text) = ask(
            address,
            &[("x-ambient-request", "true"), ("host", "evil.example")],
        )
        .await;
        assert_eq!(status, 403);
        assert!(text.contains("loopback"), "{text}");
        let (status, text) = ask(
            address,
            &[
                ("x-ambient-request", "true"),
                ("origin", "http://localhost"),
            ],
        )
        .await;
        assert_eq!(status, 403);
        assert!(text.contains("Origin"), "{text}");
        let (status, text) = ask(address, &[]).await;
        assert_eq!(status, 403);
        assert!(text.contains("X-Ambient-Request"), "{text}");
    }
    let (status, _) = ask(
        scene.endpoint,
        &[("x-ambient-request", "true"), ("host", "agent.localhost")],
    )
    .await;
    assert_eq!(status, 200);
    let refused = r#"ambient_sidecar_requests_refused_total{port="proxy",reason="host"}"#;
    assert_eq!(scene.metric(refused).await, Some(1.0));
}
