//! Programs killed at the worst moment: the session goes on, or is reported; nothing is lost,
//! doubled or left behind.

use std::time::Duration;

use ambient_shared::phase::Phase;
use ambient_testing::{
    DEADLINE,
    local::{Local, NewSession},
};
use nix::sys::signal::Signal;
use tokio::time::{sleep, timeout};

/// Says a number each half second.
const COUNT: &str = r#"
    n=0
    while [ "$n" -lt 20 ]; do n=$((n + 1)); echo "tick $n"; sleep 0.5; done"#;

const ECHO: &str = r#"while read -r line; do echo "got $line"; done"#;

fn ticks() -> Vec<String> {
    (1..=20).map(|n| format!("tick {n}")).collect()
}

async fn assert_nothing_left(local: &Local) {
    let gone = async {
        while !local.processes().is_empty() {
            sleep(Duration::from_millis(100)).await;
        }
    };
    let waited = timeout(DEADLINE, gone).await;
    assert!(waited.is_ok(), "left running: {:#?}", local.processes());
}

fn conditions(session: &ambient_shared::rest::Session) -> String {
    session.conditions.clone().unwrap_or_default()
}

#[tokio::test]
async fn control_plane_and_api_server_killed_while_the_agent_speaks() {
    let mut local = Local::start(&["--token-ttl", "6s"]).await;
    let id = local.create(NewSession::script(COUNT).io("lines")).await;
    local.message(&id, "assistant", "tick 4").await;
    local.kill().await;
    // Not to win a race: the agent is to speak while nobody listens.
    sleep(Duration::from_secs(2)).await;
    local.start_again().await;

    local.phase(&id, Phase::Completed).await;
    assert_eq!(local.texts(&id, "assistant").await, ticks());
    assert_nothing_left(&local).await;
}

#[tokio::test]
async fn agent_that_ends_while_the_control_plane_is_down_is_reported_after() {
    let mut local = Local::start(&[]).await;
    let go = local.data().join("go");
    let script = format!(
        "until [ -e '{}' ]; do sleep 0.1; done; exit 5",
        go.display()
    );
    let id = local.create(NewSession::script(&script).io("none")).await;
    local.phase(&id, Phase::Running).await;
    local.kill().await;
    std::fs::write(go, "").unwrap();
    assert_nothing_left(&local).await;
    local.start_again().await;

    let session = local.phase(&id, Phase::Failed).await;
    assert!(conditions(&session).contains('5'), "{session:?}");
}

#[tokio::test]
async fn messages_to_the_agent_are_handed_over_once_across_restarts() {
    let mut local = Local::start(&["--token-ttl", "6s"]).await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    let mut wanted = Vec::new();
    for round in 0..3 {
        for number in 0..5 {
            let text = format!("message {round}.{number}");
            local.say(&id, &text).await;
            wanted.push(format!("got {text}"));
        }
        local.kill().await;
        local.start_again().await;
    }
    local.message(&id, "assistant", "got message 2.4").await;
    assert_eq!(local.texts(&id, "assistant").await, wanted);
    local.act(&id, "stop").await;
    local.phase(&id, Phase::Stopped).await;
}

#[tokio::test]
async fn sidecar_killed_comes_back_at_the_same_address() {
    let local = Local::start(&[]).await;
    let script = r#"
        try() { curl -sS --noproxy '*' -m 5 -o /dev/null -w '%{http_code}' \
            "$AMBIENT_PROXY_URL/api/ambient/v1/sessions/$SESSION_ID" 2>/dev/null; }
        echo "first $(try)"
        read -r wait
        n=0
        until [ "$(try)" = 200 ]; do n=$((n + 1)); [ "$n" -lt 100 ] || exit 1; sleep 0.1; done
        echo "second 200""#;
    let id = local.create(NewSession::script(script).io("lines")).await;
    local.message(&id, "assistant", "first 200").await;
    let killed = local.process(&id, "ambient-sidecar");
    killed.signal(Signal::SIGKILL);
    local.say(&id, "go on").await;
    local.message(&id, "assistant", "second 200").await;
    local.phase(&id, Phase::Completed).await;
    assert!(!killed.runs());
    assert_nothing_left(&local).await;
}

#[tokio::test]
async fn runner_killed_fails_the_session_and_ends_the_agent() {
    let local = Local::start(&[]).await;
    let script = "sleep 600 & sleep 600";
    let id = local.create(NewSession::script(script).io("none")).await;
    local.phase(&id, Phase::Running).await;
    local.process(&id, "ambient-runner").signal(Signal::SIGKILL);

    let session = local.phase(&id, Phase::Failed).await;
    assert!(conditions(&session).contains("RunnerLost"), "{session:?}");
    assert_nothing_left(&local).await;
}

#[tokio::test]
async fn shim_killed_fails_the_session_and_ends_what_it_held() {
    let local = Local::start(&[]).await;
    let script = "sleep 600 & sleep 600";
    let id = local.create(NewSession::script(script).io("none")).await;
    local.phase(&id, Phase::Running).await;
    local
        .process(&id, "ambient-control-plane")
        .signal(Signal::SIGKILL);

    let session = local.phase(&id, Phase::Failed).await;
    assert!(conditions(&session).contains("RunnerLost"), "{session:?}");
    assert_nothing_left(&local).await;
}

#[tokio::test]
async fn stopping_local_in_order_leaves_sessions_running() {
    let mut local = Local::start(&["--token-ttl", "6s"]).await;
    let id = local.create(NewSession::script(COUNT).io("lines")).await;
    local.message(&id, "assistant", "tick 2").await;
    local.program.signal(Signal::SIGTERM);
    assert!(local.program.wait().await.success());
    assert!(!local.processes().is_empty(), "the session goes on");
    local.start_again().await;
    local.phase(&id, Phase::Completed).await;
    assert_eq!(local.texts(&id, "assistant").await, ticks());
}
