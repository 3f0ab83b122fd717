//! The demo agent (`examples/agent/agent.sh`) alone, against an API that answers as it is told.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
};

use ambient_testing::{
    faults::{Mode, Relay},
    programs::{Program, Running},
};
use axum::{
    Router,
    http::{HeaderMap, StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

struct Api {
    address: SocketAddr,
    status: Arc<AtomicU16>,
    _server: JoinSet<()>,
}

/// Answers like the API behind a sidecar: a request that brings a credential is a fault.
async fn api() -> Api {
    let status = Arc::new(AtomicU16::new(200));
    let answer = Arc::clone(&status);
    let session = get(move |headers: HeaderMap| async move {
        if headers.contains_key(header::AUTHORIZATION) {
            return StatusCode::IM_A_TEAPOT.into_response();
        }
        let status = StatusCode::from_u16(answer.load(Ordering::Acquire)).unwrap();
        (status, r#"{"id":"session-0001","phase":"Running"}"#).into_response()
    });
    let app = Router::new().route("/api/ambient/v1/sessions/session-0001", session);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let _ = axum::serve(listener, app).await;
    });
    Api {
        address,
        status,
        _server: server,
    }
}

fn agent(address: SocketAddr, steps: &str) -> Running {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/agent/agent.sh");
    Program::at("sh")
        .arg(script)
        .env("SESSION_ID", "session-0001")
        .env("AMBIENT_PROXY_URL", format!("http://{address}"))
        .env("DEMO_STEPS", steps)
        .env("DEMO_PAUSE", "0.2")
        .start()
}

/// What it said; each line must be JSON.
fn said(agent: &Running) -> Vec<Value> {
    let lines = agent.output();
    lines
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .collect()
}

#[tokio::test]
async fn works_its_steps_and_ends_by_itself() {
    let api = api().await;
    let mut agent = agent(api.address, "3");
    agent.close_stdin();
    assert!(agent.wait().await.success());

    let said = said(&agent);
    assert_eq!(said[0]["subtype"], "init");
    assert_eq!(said.last().unwrap()["type"], "result");
    assert_eq!(said.last().unwrap()["is_error"], false);
    let results: Vec<_> = said.iter().filter(|it| it["type"] == "user").collect();
    assert_eq!(results.len(), 3);
    let first = results[0]["message"]["content"][0]["content"].as_str();
    assert!(first.unwrap().contains("HTTP 200, phase Running"));
}

#[tokio::test]
async fn hands_back_what_people_write_to_the_letter() {
    let api = api().await;
    let mut agent = agent(api.address, "5");
    let odd = "a \"quoted\" \\ back\nline\t%s $HOME `id` \"text\":\"no\" ünï \u{1}\u{1f600}";
    let content = json!([{"type": "text", "text": odd}]);
    let message = json!({"type": "user", "message": {"role": "user", "content": content}});
    agent.output_line("step-1").await;
    agent.write_line("not JSON").await;
    agent.write_line(&message.to_string()).await;
    assert!(agent.wait().await.success());

    let answers: Vec<_> = said(&agent)
        .iter()
        .filter_map(|it| {
            it["message"]["content"][0]["text"]
                .as_str()
                .map(str::to_owned)
        })
        .filter(|text| text.starts_with("You said"))
        .collect();
    assert_eq!(answers, [format!("You said: {odd}")]);
}

#[tokio::test]
async fn a_refusal_is_a_failure() {
    let api = api().await;
    api.status.store(401, Ordering::Release);
    let mut agent = agent(api.address, "3");
    assert_eq!(agent.wait().await.code(), Some(1));
    assert_eq!(said(&agent).last().unwrap()["is_error"], true);
}

#[tokio::test]
async fn an_api_that_comes_back_is_none() {
    let api = api().await;
    let relay = Relay::start(api.address).await;
    relay.set(Mode::Refuse).await;
    let mut agent = agent(relay.address(), "2");
    agent.output_line("step-1").await;
    relay.set(Mode::Pass).await;
    assert!(agent.wait().await.success());
}

#[tokio::test]
async fn bad_settings_are_named() {
    let mut agent = agent(([127, 0, 0, 1], 9).into(), "many");
    assert_eq!(agent.wait().await.code(), Some(78));
    assert!(agent.log()[0].contains("DEMO_STEPS"), "{:?}", agent.log());
}
