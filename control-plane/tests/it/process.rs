//! Sessions as processes: adopted, stopped, deleted, started again, and nothing left behind.

use std::{fs, path::Path, time::Duration};

use ambient_shared::phase::Phase;
use ambient_testing::{
    DEADLINE,
    local::{Local, NewSession},
    processes::{self, Process},
    programs::Program,
};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::Value;
use tokio::time::{sleep, timeout};

const ECHO: &str = r#"while read -r line; do echo "got $line"; done"#;

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waited = timeout(DEADLINE, async {
        while !holds() {
            sleep(Duration::from_millis(50)).await;
        }
    });
    assert!(waited.await.is_ok(), "never: {what}");
}

fn addresses(local: &Local, id: &str) -> Value {
    let text = fs::read_to_string(local.file(id, "sidecar.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The session's shim.
fn shim(local: &Local, id: &str) -> Process {
    local.process(id, "ambient-control-plane")
}

#[tokio::test]
async fn a_killed_control_plane_finds_its_sessions_again() {
    let mut local = Local::start(&["--token-ttl", "6s"]).await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    local.say(&id, "one").await;
    local.message(&id, "assistant", "got one").await;
    let before = shim(&local, &id);
    local.kill().await;
    local.start_again().await;

    local.say(&id, "two").await;
    local.message(&id, "assistant", "got two").await;
    assert!(before.runs(), "the run is still the same");
    assert_eq!(local.texts(&id, "assistant").await, ["got one", "got two"]);

    local.act(&id, "stop").await;
    local.phase(&id, Phase::Stopped).await;
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn a_session_deleted_while_nobody_looks_is_cleaned_up_later() {
    let local = Local::start(&[]).await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    local.phase(&id, Phase::Running).await;
    let folder = local.folder(&id);
    let path = format!("/sessions/{id}");
    let (status, _) = local.request(Method::DELETE, &path, None).await;
    assert_eq!(status, 204);
    until("the folder is gone", || !folder.exists()).await;
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn stopping_gives_the_agent_its_grace() {
    let local = Local::start(&[]).await;
    let script = r"trap 'echo last words; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let id = local.create(NewSession::script(script).io("lines")).await;
    local.message(&id, "assistant", "ready").await;
    local.act(&id, "stop").await;
    local.phase(&id, Phase::Stopped).await;
    assert_eq!(local.texts(&id, "assistant").await, ["ready", "last words"]);
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn a_stopped_session_starts_again_in_its_workspace() {
    let local = Local::start(&[]).await;
    let script = r#"echo "resume ${IS_RESUME:-false} $(cat kept 2>/dev/null)"; echo yes >kept
        while :; do sleep 0.1; done"#;
    let id = local.create(NewSession::script(script).io("lines")).await;
    local.message(&id, "assistant", "resume false").await;
    local.act(&id, "stop").await;
    local.phase(&id, Phase::Stopped).await;
    local.act(&id, "start").await;
    local.message(&id, "assistant", "resume true yes").await;
    assert_eq!(shim(&local, &id).program(), "ambient-control-plane");
    local.act(&id, "stop").await;
    local.phase(&id, Phase::Stopped).await;
}

#[tokio::test]
async fn what_an_agent_forgot_in_the_background_is_ended() {
    let local = Local::start(&[]).await;
    // Out of the agent's process group, and of its session; without parent too.
    let script = "(setsid sleep 601 &) ; (trap '' TERM; setsid sleep 602 &) ; exit 0";
    let id = local.create(NewSession::script(script).io("none")).await;
    local.phase(&id, Phase::Completed).await;
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn a_sidecar_killed_again_and_again_keeps_its_addresses() {
    let local = Local::start(&[]).await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    local.phase(&id, Phase::Running).await;
    let before = addresses(&local, &id);
    for _ in 0..3 {
        let killed = local.process(&id, "ambient-sidecar");
        killed.signal(Signal::SIGKILL);
        until("another sidecar runs", || {
            let sidecars: Vec<_> = local
                .processes()
                .into_iter()
                .filter(|process| process.program() == "ambient-sidecar")
                .collect();
            sidecars.len() == 1 && sidecars[0].pid != killed.pid
        })
        .await;
        let endpoint = before["endpoint"].as_str().unwrap().to_owned();
        until("it listens where the last one did", || {
            std::net::TcpStream::connect(&endpoint).is_ok()
        })
        .await;
    }
    assert_eq!(addresses(&local, &id), before);
}

#[tokio::test]
async fn a_shim_killed_while_the_control_plane_is_down_is_found_lost() {
    let mut local = Local::start(&[]).await;
    // One that hides from the runner's group and from the terminal.
    let script = "setsid sleep 603 & sleep 604";
    let id = local.create(NewSession::script(script).io("none")).await;
    local.phase(&id, Phase::Running).await;
    let shim = shim(&local, &id);
    local.kill().await;
    shim.signal(Signal::SIGKILL);
    until("the shim is gone", || !shim.runs()).await;
    local.start_again().await;

    let session = local.phase(&id, Phase::Failed).await;
    assert!(
        session
            .conditions
            .clone()
            .unwrap_or_default()
            .contains("RunnerLost"),
        "{session:?}"
    );
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn a_signal_to_the_terminal_does_not_reach_sessions() {
    let local = Local::start(&[]).await;
    let id = local.create(NewSession::script(ECHO).io("lines")).await;
    local.phase(&id, Phase::Running).await;
    let session_of = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.to_owned();
        fields.split_ascii_whitespace().nth(3).unwrap().to_owned()
    };
    let own = session_of(local.program.pid());
    for process in local.processes() {
        assert_ne!(session_of(process.pid), own, "{process:?}");
    }
}

#[tokio::test]
async fn secrets_of_the_control_plane_are_not_passed_on() {
    let data = tempfile::tempdir().unwrap();
    let mut program = Program::new("ambient-control-plane")
        .args(["local", "run", "--data-dir"])
        .arg(data.path())
        .args(["--", "env"])
        .env("AMBIENT_API_TOKEN", "a-secret-of-ours")
        .env("SOMETHING_ELSE", "not-for-agents")
        .env("LANG", "C.UTF-8")
        .start();
    program.close_stdin();
    assert!(program.wait().await.success());
    let environment = program.output();
    assert!(
        environment.contains(&"LANG=C.UTF-8".to_owned()),
        "{environment:?}"
    );
    for line in &environment {
        assert!(
            !line.contains("a-secret-of-ours") && !line.contains("not-for-agents"),
            "{line}"
        );
        assert!(!line.contains("TOKEN_PUBLIC_KEY"), "{line}");
    }
    nothing_left(data.path());
}

fn nothing_left(data: &Path) {
    let left = processes::with(&data.display().to_string());
    assert!(left.is_empty(), "{left:#?}");
}

#[tokio::test]
async fn a_run_ends_with_a_control_plane_that_was_killed() {
    let data = tempfile::tempdir().unwrap();
    let mut program = Program::new("ambient-control-plane")
        .args(["local", "run", "--data-dir"])
        .arg(data.path())
        .args(["--", "sh", "-c", "echo ready; sleep 605"])
        .start();
    program.output_line("ready").await;
    program.kill().await;
    until("the session ended too", || {
        processes::with(&data.path().display().to_string()).is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_second_ctrl_c_does_not_wait_for_the_agent() {
    let data = tempfile::tempdir().unwrap();
    let mut program = Program::new("ambient-control-plane")
        .args(["local", "run", "--data-dir"])
        .arg(data.path())
        .args(["--", "sh", "-c"])
        .arg("trap 'echo stopping' TERM; echo ready; while :; do sleep 0.1; done")
        .start();
    program.output_line("ready").await;
    program.signal(Signal::SIGINT);
    program.output_line("stopping").await;
    program.signal(Signal::SIGINT);
    assert_eq!(program.wait().await.code(), Some(130));
    nothing_left(data.path());
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_run() {
    let data = tempfile::tempdir().unwrap();
    let binary = ambient_testing::programs::binary("ambient-control-plane");
    let mut shell = Program::at("sh")
        .arg("-c")
        .arg(format!(
            "{} local run --data-dir {} -- yes | head -n 3",
            binary.display(),
            data.path().display()
        ))
        .start();
    shell.close_stdin();
    assert!(shell.wait().await.success());
    assert_eq!(shell.output(), ["y", "y", "y"]);
    until("the session ended too", || {
        processes::with(&data.path().display().to_string()).is_empty()
    })
    .await;
}

#[tokio::test]
async fn much_input_keeps_its_order_and_memory_small() {
    const LINES: usize = 1_000;
    let data = tempfile::tempdir().unwrap();
    let binary = ambient_testing::programs::binary("ambient-control-plane");
    let mut shell = Program::at("sh")
        .arg("-c")
        .arg(format!(
            "seq 1 {LINES} | {} local run --data-dir {} -- cat",
            binary.display(),
            data.path().display()
        ))
        .start();
    shell.close_stdin();
    // Step by step, as each has a deadline of its own.
    for number in (100..=LINES).step_by(100) {
        shell.output_line(&number.to_string()).await;
    }
    assert!(shell.wait().await.success());
    let wanted: Vec<String> = (1..=LINES).map(|line| line.to_string()).collect();
    assert_eq!(shell.output(), wanted);
    nothing_left(data.path());
}

#[tokio::test]
async fn kills_at_any_moment_start_no_session_twice_and_lose_none() {
    const SESSIONS: usize = 8;
    let mut local = Local::start(&["--token-ttl", "6s"]).await;
    let runs = local.data().join("runs");
    let script = format!(r#"echo "$SESSION_ID" >>'{}'; echo done"#, runs.display());
    let mut ids = Vec::new();
    for number in 0..SESSIONS {
        ids.push(local.create(NewSession::script(&script).io("lines")).await);
        // From at once to well after the agent's start.
        sleep(Duration::from_millis(70 * number as u64)).await;
        local.kill().await;
        local.start_again().await;
    }
    for id in &ids {
        local.phase(id, Phase::Completed).await;
        assert_eq!(local.texts(id, "assistant").await, ["done"]);
    }
    let ran = fs::read_to_string(runs).unwrap();
    let mut ran: Vec<_> = ran.lines().map(str::to_owned).collect();
    ran.sort_unstable();
    ids.sort_unstable();
    assert_eq!(ran, ids);
    assert!(local.processes().is_empty(), "{:#?}", local.processes());
}

#[tokio::test]
async fn an_agent_without_messages_has_its_output_on_stdout() {
    let mut program = Program::new("ambient-control-plane")
        .args(["local", "run", "--io", "none", "--", "sh", "-c"])
        .arg("echo said; echo complained >&2; exit 4")
        .start();
    program.close_stdin();
    assert_eq!(program.wait().await.code(), Some(4));
    assert_eq!(program.output(), ["said"]);
    let log = program.log();
    assert!(log.contains(&"complained".to_owned()), "{log:?}");
}

#[tokio::test]
async fn a_line_too_long_for_a_message_is_refused_in_words() {
    let mut program = Program::new("ambient-control-plane")
        .args(["local", "run", "--", "wc", "-c"])
        .start();
    program.write_line(&"x".repeat(1000)).await;
    program.write_line(&"x".repeat(1024 * 1024 + 1)).await;
    program.close_stdin();
    program.wait().await;
    // What came before is not lost.
    assert_eq!(program.output(), ["1001"]);
    let log = program.log().join("\n");
    assert!(log.contains("too long for a message"), "{log}");
}
