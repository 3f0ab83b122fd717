//! A replica that cannot work says so on its pod: what `kubectl describe` shows.

use axum::{Router, routing::get};
use tokio::{net::TcpListener, task::JoinSet};

use super::*;

const UID: &str = "0c5a7c6e-8f0e-4b43-9a55-0f3a4c6c7a10";

/// The note of the Event with this reason on the replica's pod, once it is there.
fn note(installation: &str, reason: &str) -> String {
    let path = format!("/api/v1/namespaces/{installation}/events");
    let said = |events: &Value| {
        let events = events["items"].as_array().into_iter().flatten();
        let mut ours = events.filter(|it| {
            it["reason"] == reason && it["involvedObject"]["uid"] == UID && it["type"] == "Warning"
        });
        ours.next()
            .map(|it| it["message"].as_str().unwrap_or_default().to_owned())
    };
    let events = Cluster::shared().wait_for(&path, |events| said(events).is_some());
    said(&events).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_server_that_lacks_a_feature_is_said_on_the_pod() {
    let (api, _folder) = api().await;
    let stranger = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", stranger.local_addr().unwrap());
    let routes = Router::new().fallback(get(|| async { "any other API" }));
    let mut serving = JoinSet::new();
    serving.spawn(async move { axum::serve(stranger, routes).await.unwrap() });

    let mut program = program(&api, "notices-stranger")
        .env("AMBIENT_API_SERVER_URL", &url)
        .env("AMBIENT_POD_UID", UID)
        .start();
    let status = program.ended_within(DEADLINE).await;

    assert!(!status.expect("it ends").success());
    let note = note("notices-stranger", "ControlPlaneEnded");
    let why = "does not limit minted tokens to one session";
    assert!(note.contains(why) && note.contains(&url), "{note}");
    let log = program.log().concat();
    assert!(log.contains(why), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_that_is_refused_is_said_on_the_pod() {
    let (api, _folder) = api().await;
    let wrong = "a-wrong-service-token";
    let mut program = program(&api, "notices-refused")
        .env("AMBIENT_API_TOKEN", wrong)
        .env("AMBIENT_POD_UID", UID)
        .start();
    let endpoint = program.listening("admin").await;

    let note = note("notices-refused", "ControlPlaneNotReady");
    let url = format!("http://{endpoint}/readyz");
    let ready = reqwest::get(url).await.unwrap().text().await.unwrap();

    for said in [&note, &ready] {
        assert!(said.contains("sessions are not listed: "), "{said}");
        assert!(said.contains("Unauthenticated"), "{said}");
        assert!(!said.contains(wrong), "{said}");
    }
    program.signal(Signal::SIGTERM);
    program.ended_within(DEADLINE).await;
}
