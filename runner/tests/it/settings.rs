//! Settings are checked before anything starts; each fault is one line that names the variable.

use std::os::unix::fs::PermissionsExt as _;

use ambient_testing::{keypair::RsaKey, programs::Program};

use crate::scene::{Agent as _, Answer, Endpoint, Scene};

/// A variable, its bad value, and what else is set.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

/// Starts it, and gives its exit code and what it wrote to stderr. Its agent would leave a file.
async fn refused(scene: &Scene, runner: Program) -> (i32, Vec<String>) {
    let started = scene.path("agent-started");
    let mut runner = runner
        .agent(&format!("touch {}", started.display()))
        .start();
    let code = runner.wait().await.code().unwrap();
    assert!(!started.exists(), "the agent was started");
    (code, runner.log())
}

#[tokio::test]
async fn each_bad_setting_ends_with_78_and_one_line_that_names_it() {
    let pem = RsaKey::shared().public_pem();
    let url = "http://127.0.0.1:9/token";
    let endpoint = [
        ("AMBIENT_CP_TOKEN_URL", url),
        ("AMBIENT_CP_TOKEN_PUBLIC_KEY", &pem),
    ];
    let messages = [
        ("AMBIENT_GRPC_ENABLED", "true"),
        ("AMBIENT_GRPC_URL", "127.0.0.1:9"),
        ("AMBIENT_AGENT_IO", "lines"),
    ];
    let cases: &[Case] = &[
        ("SESSION_ID", "short", &[]),
        ("SESSION_ID", "with a space in it", &[]),
        ("SESSION_ID", "", &endpoint),
        ("AMBIENT_CP_TOKEN_URL", "ftp://cp/token", &endpoint[1..]),
        ("AMBIENT_CP_TOKEN_URL", "not a url", &endpoint[1..]),
        (
            "AMBIENT_CP_TOKEN_URL",
            "http://me:hunter2@cp/",
            &endpoint[1..],
        ),
        ("AMBIENT_CP_TOKEN_PUBLIC_KEY", "", &endpoint[..1]),
        ("AMBIENT_CP_TOKEN_PUBLIC_KEY", "no key", &endpoint[..1]),
        ("BOT_TOKEN", "hunter2 with spaces", &[]),
        ("AMBIENT_TOKEN_TIMEOUT", "soon", &[]),
        ("AMBIENT_TOKEN_TIMEOUT", "0s", &[]),
        ("AMBIENT_TOKEN_TIMEOUT", "500000000000y", &[]),
        ("AMBIENT_GRACE_PERIOD", "-1", &[]),
        ("AMBIENT_GRACE_PERIOD", "500000000000y", &[]),
        ("AMBIENT_GRACE_PERIOD", "366days", &[]),
        ("AMBIENT_AGENT_IO", "telepathy", &[]),
        ("AMBIENT_AGENT_TURNS", "3", &[]),
        ("AMBIENT_AGENT_TURNS", "many", &[]),
        ("AMBIENT_ON_REFRESH", "explode", &[]),
        ("AMBIENT_ON_REFRESH", "signal:KILL", &[]),
        ("AMBIENT_ON_REFRESH", "signal:NOSUCH", &[]),
        ("AMBIENT_ON_REFRESH", "command:relative", &[]),
        ("AMBIENT_HOLD_BACK", "A=B", &[]),
        ("AMBIENT_ADMIN_LISTEN", "nowhere", &[]),
        ("AMBIENT_GRPC_ENABLED", "perhaps", &[]),
        ("AMBIENT_GRPC_URL", "", &[("AMBIENT_GRPC_ENABLED", "true")]),
        (
            "AMBIENT_GRPC_URL",
            "not an address",
            &[("AMBIENT_GRPC_ENABLED", "true")],
        ),
        ("IS_RESUME", "perhaps", &[]),
        ("TIMEOUT", "1h", &[]),
        ("TIMEOUT", "-3", &[]),
        ("TIMEOUT", "18446744073709551615", &[]),
        ("TIMEOUT", "31536001", &[]),
        ("LOG_LEVEL", "loud", &[]),
        ("AMBIENT_LOG_FORMAT", "xml", &[]),
        ("AMBIENT_TOKEN_FILE", "/", &[]),
        ("AMBIENT_TOKEN_FILE", "/proc/nowhere/token", &[]),
        ("AMBIENT_SPOOL_DIR", "/proc/nowhere", &messages),
        ("AMBIENT_SPOOL_DIR", "/etc/passwd", &messages),
    ];
    for (variable, value, more) in cases {
        let scene = Scene::new();
        let mut runner = scene.runner_with_token();
        for (name, value) in *more {
            runner = runner.env(name, value);
        }

        let (code, log) = refused(&scene, runner.env(variable, value)).await;

        let scenery = format!("{variable}={value:?}: {log:#?}");
        assert_eq!(code, 78, "{scenery}");
        let line = log.iter().find(|line| line.starts_with("ambient-runner: "));
        let line = line.unwrap_or_else(|| panic!("no last words: {scenery}"));
        assert!(line.contains(variable), "{scenery}");
        assert!(!log.concat().contains("hunter2"), "{scenery}");
        assert_eq!(format!("ambient-runner: {}", scene.last_words()), *line);
    }
}

#[tokio::test]
async fn a_spool_that_cannot_be_used_is_found_before_a_token_is_asked_for() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Silence).await;
    let runner = scene
        .runner_of(&endpoint)
        .env("AMBIENT_GRPC_ENABLED", "true")
        .env("AMBIENT_GRPC_URL", "127.0.0.1:9")
        .env("AMBIENT_AGENT_IO", "lines")
        .env("AMBIENT_SPOOL_DIR", "/proc/nowhere");
    let (code, _) = refused(&scene, runner).await;
    assert_eq!(code, 78);
    let words = scene.last_words();
    assert!(words.starts_with("AMBIENT_SPOOL_DIR: "), "{words}");
    assert!(endpoint.requests().is_empty());
}

#[tokio::test]
async fn the_longest_times_that_may_be_set_can_be_counted() {
    let scene = Scene::new();
    let mut runner = scene
        .runner_with_token()
        .env("TIMEOUT", "31536000")
        .env("AMBIENT_GRACE_PERIOD", "365days")
        .env("AMBIENT_TOKEN_TIMEOUT", "365days")
        .agent("echo started; exec sleep 600")
        .start();
    runner.output_line("started").await;
    runner.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(143));
}

#[test]
fn help_that_nobody_reads_ends_in_order() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let help = std::process::Command::new(ambient_testing::programs::binary("ambient-runner"))
        .arg("--help")
        .stdout(writer)
        .output()
        .unwrap();
    assert_eq!(help.status.code(), Some(0), "{help:?}");
}

#[tokio::test]
async fn all_faults_are_told_at_once() {
    let scene = Scene::new();
    let runner = scene.runner_with_token().env("SESSION_ID", "short");
    let (code, log) = refused(&scene, runner.env("BOT_TOKEN", "ä")).await;
    assert_eq!(code, 78);
    assert_eq!(log.len(), 1, "{log:?}");
    assert!(log[0].contains("SESSION_ID") && log[0].contains("BOT_TOKEN"));
}

#[tokio::test]
async fn without_any_source_of_tokens_nothing_starts() {
    let scene = Scene::new();
    let runner = scene
        .runner()
        .env("AMBIENT_BOT_TOKEN_FILE", scene.path("no-mount/bot-token"));
    let (code, log) = refused(&scene, runner).await;
    assert_eq!(code, 78);
    let line = &log[0];
    for name in [
        "AMBIENT_CP_TOKEN_URL",
        "BOT_TOKEN",
        "AMBIENT_BOT_TOKEN_FILE",
    ] {
        assert!(line.contains(name), "{line}");
    }
}

#[tokio::test]
async fn without_a_command_the_usage_is_told() {
    let scene = Scene::new();
    for args in [&[][..], &["--"], &["--nonsense", "--", "true"], &["sh"]] {
        let mut runner = scene.runner_with_token().args(args).start();
        assert_eq!(runner.wait().await.code(), Some(78), "{args:?}");
        assert_eq!(runner.log().len(), 1, "{:?}", runner.log());
    }
}

#[tokio::test]
async fn flags_win_over_variables_and_empty_variables_count_as_not_set() {
    let scene = Scene::new();
    let mut runner = scene
        .runner_with_token()
        .env("TIMEOUT", "")
        .env("AMBIENT_GRACE_PERIOD", "nonsense")
        .args(["--grace-period", "1s"])
        .agent("exit 5")
        .start();
    assert_eq!(runner.wait().await.code(), Some(5));
}

#[tokio::test]
async fn help_shows_variables_but_no_values() {
    let scene = Scene::new();
    let prompt = "a-prompt-that-is-nobodys-business";
    let mut runner = scene
        .runner_with_token()
        .env("INITIAL_PROMPT", prompt)
        .arg("--help")
        .start();
    assert!(runner.wait().await.success());
    let help = runner.output().join("\n");
    assert!(help.contains("AMBIENT_TOKEN_TIMEOUT") && help.contains("install"));
    assert!(!help.contains(prompt) && !help.contains(crate::scene::SESSION));
}

#[tokio::test]
async fn install_copies_the_program_whole_and_over_a_running_copy() {
    let scene = Scene::new();
    let folder = scene.path("mount");
    for _ in 0..2 {
        let mut install = Program::new("ambient-runner")
            .arg("install")
            .arg(&folder)
            .start();
        assert!(install.wait().await.success(), "{:?}", install.log());
        let copy = folder.join("ambient-runner");
        let mode = std::fs::metadata(&copy).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
        let mut version = Program::at(&copy).arg("--version").start();
        assert!(version.wait().await.success());
    }
    let mut install = Program::new("ambient-runner")
        .args(["install", "/proc/nowhere"])
        .start();
    assert_eq!(install.wait().await.code(), Some(70));
    assert!(install.log()[0].contains("/proc/nowhere/ambient-runner"));
}
