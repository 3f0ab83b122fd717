//! A data folder on a disk that is full: what runs goes on, what is new waits or is refused.

use std::{fs, time::Duration};

use ambient_shared::{
    bearer::PublicKey, clock::Clock, exchange::Exchange, phase::Phase, proof::SessionKey,
    session::SessionId, token::Token,
};
use ambient_testing::{
    DEADLINE,
    local::{Local, NewSession, Setup},
};
use reqwest::{Method, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::fresh::LOOK;

/// Life of tokens.
const LIFE: Duration = Duration::from_secs(5);

/// How long the disk is full: two lives of a token.
const FULL: Duration = Duration::from_secs(10);

/// A prompt that fits no page that is left somewhere.
const LARGE: usize = 200 * 1024;

/// Numbers its lines, five a second.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done";

/// The token that was pushed to a session.
fn pushed(local: &Local, id: &str) -> Token {
    let text = fs::read_to_string(local.file(id, "bot-token")).unwrap();
    Token::new(&text, None).unwrap()
}

/// What asks for a session's tokens, as its runner does.
fn exchange(local: &Local, id: &str) -> Exchange {
    let key = fs::read_to_string(local.file(id, "session-key")).unwrap();
    let public = PublicKey::from_pem(&local.public_key()).unwrap();
    let url = format!("http://{}/token", local.addresses().token);
    Exchange::new(
        reqwest::Client::new(),
        url.parse().unwrap(),
        public.encrypt(&SessionId::parse(id).unwrap()).unwrap(),
        SessionKey::from_text(&key),
        Clock::system(),
    )
}

/// How many lines of an agent that counts have come, without a gap and none twice.
async fn counted(local: &Local, id: &str) -> usize {
    let said = local.texts(id, "assistant").await;
    let expected: Vec<_> = (1..=said.len()).map(|number| number.to_string()).collect();
    assert_eq!(said, expected);
    said.len()
}

async fn until_counted(local: &Local, id: &str, count: usize) {
    let deadline = Instant::now() + DEADLINE;
    while counted(local, id).await < count {
        assert!(Instant::now() < deadline, "not {count} lines");
        sleep(LOOK).await;
    }
}

/// Creates sessions until one is refused. Gives those that were not, and what was said.
async fn until_refused(local: &Local) -> (Vec<String>, StatusCode, Value) {
    let mut created = Vec::new();
    loop {
        let session = NewSession::command(&["true"]).io("none");
        let session = session.field("prompt", "x".repeat(LARGE)).into_json();
        let (status, answer) = local
            .request(Method::POST, "/sessions", Some(session))
            .await;
        if status != StatusCode::CREATED {
            return (created, status, answer);
        }
        created.push(answer["id"].as_str().unwrap().to_owned());
        assert!(created.len() < 100, "the disk is never full");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_full_data_folder_stops_no_session_and_no_token() {
    let setup = Setup::new(&["--token-ttl", &format!("{}s", LIFE.as_secs())]);
    let local = setup.disk("16m").start().await;
    let stays = local.create(NewSession::script(COUNTS).io("lines")).await;
    until_counted(&local, &stays, 3).await;
    let processes = local.processes().len();
    let tokens = exchange(&local, &stays);

    let ballast = local.fill_disk();
    let (created, status, answer) = until_refused(&local).await;

    assert_eq!(status, StatusCode::INSUFFICIENT_STORAGE, "{answer}");
    let reason = answer["reason"].as_str().unwrap();
    assert!(reason.contains("disk is full"), "{reason}");
    let began = Instant::now();
    while began.elapsed() < FULL {
        let asked_at = Clock::system().now();
        let token = tokens.fetch().await.expect("a token");
        assert!(!token.is_expired(asked_at), "{token:?}");
        let session = local.session(&stays).await;
        assert_eq!(session.phase.as_deref(), Some("Running"));
        sleep(LOOK * 5).await;
    }
    let before = counted(&local, &stays).await;
    assert!(local.processes().len() >= processes);
    let log = local.program.log().join("\n");
    assert!(log.contains("database or disk is full"), "{log}");

    drop(ballast);

    // What the agent has said meanwhile, and after.
    until_counted(&local, &stays, before + 20).await;
    let deadline = Instant::now() + DEADLINE;
    while pushed(&local, &stays).is_expired(Clock::system().now()) {
        assert!(Instant::now() < deadline, "no new token is pushed");
        sleep(LOOK).await;
    }
    let new = local
        .create(NewSession::command(&["true"]).io("none"))
        .await;
    for session in created.iter().chain([&new]) {
        local.phase(session, Phase::Completed).await;
    }
    local.phase(&stays, Phase::Running).await;
    local.act(&stays, "stop").await;
    local.phase(&stays, Phase::Stopped).await;
}
