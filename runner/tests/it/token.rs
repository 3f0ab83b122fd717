//! The token: pulled with retries, pushed by the mount, always fresh in the agent's file.

use std::{
    os::unix::fs::PermissionsExt as _,
    time::{Duration, SystemTime},
};

use ambient_shared::{
    clock::Clock,
    proof::{SessionKey, SessionRoot},
    session::SessionId,
    swap::SecretVolume,
};
use ambient_testing::{
    DEADLINE,
    disk::SmallDisk,
    programs::{Running, binary},
};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep, timeout};

use crate::scene::{
    Agent as _, Answer, Endpoint, LIMITS, Request, SESSION, Scene, eventually, life_of,
    session_key, token,
};

const LONG: Duration = Duration::from_secs(600);

/// An agent that does nothing until it is ended.
const WAITS: &str = "echo started; exec sleep 600";

fn token_in(scene: &Scene) -> String {
    std::fs::read_to_string(scene.token_file()).unwrap()
}

/// Reads the token file again and again for this time. Gives how many different tokens there were.
///
/// # Errors
/// The token that had expired before it was read.
async fn watch_file(scene: &Scene, during: Duration) -> Result<usize, String> {
    let until = Instant::now() + during;
    let mut seen = Vec::new();
    while Instant::now() < until {
        let now = Clock::system().now();
        let token = token_in(scene);
        if life_of(&token, now).is_zero() {
            return Err(token);
        }
        if seen.last() != Some(&token) {
            seen.push(token);
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(seen.len())
}

async fn source_of_next(runner: &mut Running, from: usize, source: &str) -> usize {
    let what = format!("a token from {source}");
    let found = runner.log_line_after(from, &what, |line| {
        line["message"] == "token refreshed" && line["source"] == source
    });
    found.await.0
}

#[tokio::test]
async fn failures_that_may_pass_are_retried_as_the_server_asks() {
    let scene = Scene::new();
    let endpoint = Endpoint::start(
        [
            Answer::Status(503, Some(1), "busy"),
            Answer::Status(429, Some(1), "slower"),
            Answer::Status(401, None, "who are you"),
            Answer::Status(403, None, "not yet"),
            Answer::Status(500, None, "oh"),
            Answer::Status(408, None, "late"),
            Answer::Status(200, None, "<html>"),
            Answer::Status(200, None, r#"{"token":""}"#),
        ],
        Answer::Token(LONG),
    )
    .await;
    let mut runner = scene.runner_of(&endpoint).agent("exit 0").start();

    assert_eq!(runner.wait().await.code(), Some(0));

    let requests = endpoint.requests();
    assert_eq!(requests.len(), 9);
    for pair in requests[..3].windows(2) {
        assert!(pair[1].at - pair[0].at >= Duration::from_secs(1));
    }
    for request in &requests {
        // One ciphertext for the whole process, so that the server's cache knows it.
        assert_eq!(request.bearer, requests[0].bearer);
        let proof = request.proof.as_deref().unwrap();
        let now = Clock::system().now();
        session_key().verify(proof, &request.bearer, now).unwrap();
    }
}

#[tokio::test]
async fn a_session_key_that_was_replaced_proves_the_next_request_and_is_masked() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Token(Duration::from_secs(3))).await;
    let mut runner = scene
        .runner_of(&endpoint)
        .env("AMBIENT_AGENT_IO", "lines")
        .env("KEY", scene.path("mount/session-key"))
        .env("GO", scene.path("go"))
        .agent(
            "echo started; until test -e \"$GO\"; do sleep 0.1; done; cat \"$KEY\"; echo; exec sleep 600",
        )
        .start();
    eventually("a first request", || endpoint.requests().pop()).await;
    let session = SessionId::parse(SESSION).unwrap();
    let new = SessionRoot::new([8; 32]).session_key(&session);
    SecretVolume::new(scene.path("mount"))
        .write(&[("session-key", new.expose().as_bytes())])
        .unwrap();

    let proven = |request: &Request, key: &SessionKey| {
        let proof = request.proof.as_deref().unwrap();
        let now = Clock::system().now();
        key.verify(proof, &request.bearer, now).is_ok()
    };
    let request = eventually("a request with the new key", || {
        let requests = endpoint.requests();
        requests.into_iter().find(|it| proven(it, &new))
    })
    .await;

    assert!(!proven(&request, &session_key()));
    assert!(proven(&endpoint.requests()[0], &session_key()));
    std::fs::write(scene.path("go"), "").unwrap();
    eventually("the agent's output", || {
        let output = runner.output();
        (output.len() > 1).then_some(output)
    })
    .await;
    let output = runner.output().join("\n");
    assert!(!output.contains(new.expose()), "{output}");
    runner.kill().await;
}

#[tokio::test]
async fn what_no_retry_mends_ends_at_once_with_69_and_the_reason() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Status(404, None, "no such page")).await;
    let mut runner = scene
        .runner_of(&endpoint)
        .agent("touch agent-started")
        .start();

    assert_eq!(runner.wait().await.code(), Some(69));

    assert_eq!(endpoint.requests().len(), 1);
    let words = scene.last_words();
    assert!(
        words.contains("404") && words.contains(&endpoint.url),
        "{words}"
    );
    assert!(runner.log().contains(&format!("ambient-runner: {words}")));
    assert!(!scene.token_file().exists());
}

#[tokio::test]
async fn at_the_deadline_the_last_error_is_told() {
    for limit in LIMITS {
        let scene = Scene::new();
        let endpoint = Endpoint::start([], Answer::Status(500, None, "the idp is down")).await;
        let mut runner = scene
            .runner_of(&endpoint)
            .env("AMBIENT_TOKEN_TIMEOUT", limit)
            .agent("exit 0")
            .start();
        assert_eq!(runner.wait().await.code(), Some(69));
        if endpoint.requests().len() >= 2 {
            let words = scene.last_words();
            assert!(words.contains("the idp is down"), "{words}");
            return;
        }
    }
    panic!("no second try in {LIMITS:?}");
}

#[tokio::test]
async fn without_an_endpoint_the_mounted_file_is_waited_for() {
    let scene = Scene::new();
    let mut runner = scene
        .runner()
        .env("AMBIENT_TOKEN_TIMEOUT", "300ms")
        .agent("exit 0")
        .start();
    assert_eq!(runner.wait().await.code(), Some(69));
    assert!(scene.last_words().contains("mount/bot-token"));

    let mut runner = scene.runner().agent("exit 6").start();
    runner.listening("admin").await;
    scene.mount(&token("late", LONG));
    assert_eq!(runner.wait().await.code(), Some(6));
}

#[tokio::test]
async fn asked_to_end_while_it_waits_for_a_token_it_ends() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Silence).await;
    let mut runner = scene.runner_of(&endpoint).agent("exit 0").start();
    eventually("a request", || endpoint.requests().pop()).await;
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(143));
    assert!(scene.last_words().contains("SIGTERM"));
}

#[tokio::test]
async fn pulled_tokens_of_a_few_seconds_never_expire_in_the_file() {
    // A machine that stands still for longer than the tokens' reserve proves nothing. A runner
    // that lets them expire does so each time.
    let mut expired = Vec::new();
    while expired.len() < 3 {
        let scene = Scene::new();
        let endpoint = Endpoint::start([], Answer::Token(Duration::from_secs(4))).await;
        let mut runner = scene.runner_of(&endpoint).agent(WAITS).start();
        runner.output_line("started").await;

        let different = match watch_file(&scene, Duration::from_secs(10)).await {
            Ok(different) => different,
            Err(token) => {
                expired.push(token);
                continue;
            }
        };

        assert!((3..=8).contains(&different), "{different} tokens in 10 s");
        let mode = |path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(scene.token_file()), 0o600);
        assert_eq!(mode(scene.path("run")), 0o700);
        runner.signal(Signal::SIGTERM);
        assert_eq!(runner.wait().await.code(), Some(143));
        assert!(!scene.token_file().exists(), "a token was left behind");
        return;
    }
    panic!("tokens expired in the file: {expired:?}");
}

#[tokio::test]
async fn pushed_tokens_alone_never_expire_in_the_file() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Status(500, None, "down")).await;
    let push = |number| scene.mount(&token(&format!("pushed{number}"), Duration::from_secs(8)));
    push(0);
    let mut runner = scene.runner_of(&endpoint).agent(WAITS).start();
    let pushing = async {
        for number in 1.. {
            sleep(Duration::from_millis(1500)).await;
            push(number);
        }
    };
    let watching = async {
        runner.output_line("started").await;
        watch_file(&scene, Duration::from_secs(11)).await
    };
    let different = tokio::select! {
        different = watching => different.expect("a token that is valid"),
        () = pushing => panic!("numbers have no end"),
    };
    assert!(different >= 3, "{different} tokens in 11 s");

    // And back, as soon as the endpoint is.
    let so_far = runner.log().len();
    endpoint.now_says(Answer::Token(LONG));
    source_of_next(&mut runner, so_far, "endpoint").await;
}

#[tokio::test]
async fn a_silent_endpoint_does_not_hold_up_a_session_with_a_mounted_token() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Silence).await;
    scene.mount(&token("pushed", LONG));
    let mut runner = scene.runner_of(&endpoint).agent(WAITS).start();
    runner.output_line("started").await;
    assert!(token_in(&scene).contains(".tok-pushed-"));
    // No request has come to its time limit, so nothing waited for that.
    let log = runner.log().concat();
    assert!(!log.contains("token fetch failed"), "{log}");
}

#[tokio::test]
async fn a_valid_token_outlives_an_outage_and_a_bad_mount() {
    let scene = Scene::new();
    let endpoint = Endpoint::start(
        [Answer::Token(Duration::from_secs(8))],
        Answer::Status(403, None, "no"),
    )
    .await;
    let mut runner = scene.runner_of(&endpoint).agent(WAITS).start();
    runner.output_line("started").await;
    let first = token_in(&scene);

    // What is mounted is older, or no token at all.
    let left = life_of(&first, Clock::system().now());
    scene.mount(&token("older", left / 2));
    eventually("a refused refresh", || {
        (endpoint.requests().len() >= 3).then_some(())
    })
    .await;
    assert_eq!(token_in(&scene), first);
    scene.mount("no token\nat all");
    endpoint.now_says(Answer::Token(LONG));

    let refreshed = eventually("a fresh token", || {
        let now = token_in(&scene);
        (now != first).then_some(now)
    })
    .await;
    assert!(refreshed.contains(".tok-pulled"), "{refreshed}");
}

#[tokio::test]
async fn ready_only_with_a_valid_token_and_a_running_agent() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Status(500, None, "down")).await;
    let mut runner = scene.runner_of(&endpoint).agent(WAITS).start();
    let admin = runner.listening("admin").await;
    let get = |path: &str| {
        let url = format!("http://{admin}{path}");
        async move {
            let answer = reqwest::get(url).await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        }
    };
    assert_eq!(get("/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(get("/readyz").await, (503, "no token yet\n".to_owned()));

    endpoint.now_says(Answer::Token(LONG));
    runner.output_line("started").await;
    // The agent may be faster with its first words than the runner with a note of its start.
    runner
        .log_line("the agent's start", |line| {
            line["message"] == "agent started"
        })
        .await;
    let ready = async {
        while get("/readyz").await.0 != 200 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, ready).await.expect("ready in time");

    let (_, metrics) = get("/metrics").await;
    for line in [
        r#"ambient_runner_token_handovers_total{result="ok"} 1"#,
        "ambient_runner_agent_starts_total 1",
        "ambient_runner_token_expiry_timestamp_seconds ",
    ] {
        assert!(metrics.contains(line), "{line} not in {metrics}");
    }
    for result in [r#"result="ok""#, r#"result="failed""#] {
        let is_wanted = |line: &str| {
            line.starts_with("ambient_runner_token_fetches_total{")
                && line.contains(r#"source="endpoint""#)
                && line.contains(result)
        };
        assert!(metrics.lines().any(is_wanted), "{result} not in {metrics}");
    }
    let now = Clock::system().now();
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    assert!(!metrics.contains("tok-pulled") && since > LONG);
}

#[tokio::test]
async fn on_refresh_a_signal_reaches_the_agent_but_not_its_children() {
    let scene = Scene::new();
    scene.mount(&token("first", LONG));
    // The child would be ended by the signal.
    let script = r#"trap 'echo "told of $(cat $AMBIENT_TOKEN_FILE)"' USR1
        sleep 600 & child=$!
        echo started
        while kill -0 $child; do wait $child; done
        echo "child ended""#;
    let mut runner = scene
        .runner()
        .env("AMBIENT_ON_REFRESH", "signal:USR1")
        .agent(script)
        .start();
    runner.output_line("started").await;
    for name in ["second", "third"] {
        scene.mount(&token(name, LONG));
        runner.output_line(&format!(".tok-{name}-")).await;
    }
    assert!(!runner.output().contains(&"child ended".to_owned()));
}

/// A runner with this script as its command on refresh, and an agent that was started.
async fn runner_with_command(scene: &Scene, script: &str) -> Running {
    let command = scene.path("on-refresh");
    std::fs::write(&command, script).unwrap();
    std::fs::set_permissions(&command, std::fs::Permissions::from_mode(0o755)).unwrap();
    scene.mount(&token("first", LONG));
    let mut runner = scene
        .runner()
        .env(
            "AMBIENT_ON_REFRESH",
            format!("command:{}", command.display()),
        )
        .agent(WAITS)
        .start();
    runner.output_line("started").await;
    runner
}

#[tokio::test]
async fn on_refresh_a_command_runs_once_for_each_new_token() {
    let scene = Scene::new();
    let log = scene.path("log");
    let script = format!(
        "#!/bin/sh\ncat $AMBIENT_TOKEN_FILE >> {0}; echo >> {0}\necho hook output\nexit 3\n",
        log.display()
    );
    let mut runner = runner_with_command(&scene, &script).await;

    let mut so_far = 0;
    for name in ["second", "third", "fourth"] {
        scene.mount(&token(name, LONG));
        let failure = runner.log_line_after(so_far, "the command's failure", |line| {
            line["message"] == "refresh command failed"
                && line["error"].as_str().unwrap().contains("ended with 3")
        });
        so_far = failure.await.0;
    }

    let tokens = std::fs::read_to_string(&log).unwrap();
    let tokens: Vec<_> = tokens.lines().collect();
    assert_eq!(tokens.len(), 3, "{tokens:?}");
    for (token, name) in tokens.iter().zip(["second", "third", "fourth"]) {
        assert!(token.contains(&format!(".tok-{name}-")), "{tokens:?}");
    }
    assert_eq!(runner.output(), ["started"], "output of the command got in");
}

#[tokio::test]
async fn a_refresh_command_that_hangs_does_not_hold_up_the_token_file() {
    let scene = Scene::new();
    let log = scene.path("log");
    // Only the first hangs: it may be killed, and the next be run, while the test waits.
    let script = format!(
        "#!/bin/sh\n[ -e {0} ] && exit\necho run >> {0}\nexec sleep 600\n",
        log.display()
    );
    let runner = runner_with_command(&scene, &script).await;
    scene.mount(&token("second", LONG));
    eventually("a run", || log.exists().then_some(())).await;

    for name in ["third", "fourth"] {
        scene.mount(&token(name, LONG));
        let wanted = format!(".tok-{name}-");
        eventually("the token in the file", || {
            token_in(&scene).contains(&wanted).then_some(())
        })
        .await;
    }

    let ended = |line: &String| line.contains("refresh command");
    let log = runner.log();
    assert!(!log.iter().any(ended), "more than one at a time: {log:#?}");
}

#[tokio::test]
async fn on_refresh_the_agent_is_started_again_with_its_new_token() {
    let scene = Scene::new();
    scene.mount(&token("first", LONG));
    let mut runner = scene
        .runner()
        .env("AMBIENT_ON_REFRESH", "restart")
        .env("INITIAL_PROMPT", "hello")
        .agent(r#"echo "got $(cat $AMBIENT_TOKEN_FILE) prompt=$INITIAL_PROMPT."; exec sleep 600"#)
        .start();
    let first = runner.output_line(".tok-first-").await;
    scene.mount(&token("second", LONG));
    let second = runner.output_line(".tok-second-").await;
    assert!(first.ends_with("prompt=hello.") && second.ends_with("prompt=."));
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(143));
}

#[tokio::test]
async fn the_same_token_again_is_no_refresh() {
    let scene = Scene::new();
    scene.mount(&token("same", LONG));
    let mut runner = scene
        .runner()
        .env("AMBIENT_ON_REFRESH", "restart")
        .agent(WAITS)
        .start();
    runner.output_line("started").await;
    let again = token_in(&scene);
    // The folder is swapped, the token in it is not.
    scene.mount(&again);
    scene.mount(&format!("{again}\n"));
    scene.mount(&token("other", LONG));
    source_of_next(&mut runner, 0, "file").await;
    eventually("a second start", || {
        (runner.output().len() == 2).then_some(())
    })
    .await;
    let refreshes = runner.log().join("\n").matches("token refreshed").count();
    assert_eq!(refreshes, 2);
}

#[tokio::test]
async fn a_full_disk_leaves_the_last_token_whole_and_gets_the_next_when_there_is_room() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Token(Duration::from_secs(4))).await;
    let folder = scene.path("run");
    std::fs::create_dir(&folder).unwrap();
    let disk = SmallDisk::new(&folder, "64k");
    let runner = disk.program(&binary("ambient-runner"));
    let mut runner = scene.pulling(runner, &endpoint).agent(WAITS).start();
    runner.output_line("started").await;
    let file = disk.seen_by(runner.pid()).join("token");
    let read = || std::fs::read_to_string(&file).unwrap();

    let ballast = disk.fill(runner.pid());
    let before = read();
    let failed = runner.log_line("a token that cannot be written", |line| {
        line["message"] == "token handover failed"
    });
    let failed = failed.await;
    let error = failed["error"].as_str().unwrap();
    assert!(error.contains("No space left"), "{error}");
    assert_eq!(read(), before);

    drop(ballast);
    eventually("a token that is valid", || {
        let life = life_of(&read(), Clock::system().now());
        (!life.is_zero()).then_some(())
    })
    .await;
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(143));
}
