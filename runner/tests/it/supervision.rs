//! Supervision: exit codes, signals, time limits, and nothing that is left behind.

use std::{fs, path::Path, time::Duration};

use ambient_testing::programs::{Program, Running, binary};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::Instant};

use crate::scene::{
    Agent as _, Answer, Endpoint, FIXED, LIMITS, Scene, eventually, is_running, is_there,
    namespaces,
};

/// The pid that a line of output ends with.
async fn pid_after(runner: &mut Running, label: &str) -> String {
    let line = runner.output_line(label).await;
    line.rsplit(' ').next().unwrap().to_owned()
}

async fn gone(pid: &str) {
    eventually(&format!("the end of {pid}"), || {
        (!is_there(pid)).then_some(())
    })
    .await;
}

fn parent_of(pid: &str) -> Option<u32> {
    let status = fs::read_to_string(Path::new("/proc").join(pid).join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

#[tokio::test]
async fn the_agents_end_is_the_runners() {
    for (script, code) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -KILL $$", 137),
        ("kill -USR1 $$", 138),
        ("kill -SEGV $$", 139),
        ("kill -40 $$", 168),
    ] {
        let scene = Scene::new();
        let mut runner = scene.runner_with_token().agent(script).start();
        assert_eq!(runner.wait().await.code(), Some(code), "{script}");
        assert_eq!(scene.last_words().is_empty(), code == 0, "{script}");
    }
}

#[tokio::test]
async fn an_agent_that_cannot_be_started_is_126_or_127_with_a_clear_line() {
    let scene = Scene::new();
    let script = scene.path("script");
    fs::write(&script, "#!/no/such/interpreter\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode;
    fs::set_permissions(&script, mode(0o755)).unwrap();
    for (program, code, line) in [
        ("no-such-program".as_ref(), 127, "not found"),
        ("/no/such/program".as_ref(), 127, "not found"),
        (script.as_path(), 127, "interpreter"),
        ("/etc/passwd".as_ref(), 126, "cannot be executed"),
        ("/".as_ref(), 126, "cannot be executed"),
    ] {
        let mut runner = scene.runner_with_token().arg("--").arg(program).start();
        assert_eq!(runner.wait().await.code(), Some(code), "{program:?}");
        let words = scene.last_words();
        let name = program.to_str().unwrap();
        assert!(words.contains(line) && words.contains(name), "{words}");
    }
}

#[tokio::test]
async fn every_forwardable_signal_reaches_the_agents_group() {
    let scene = Scene::new();
    let numbers = [
        1, 3, 10, 12, 14, 16, 18, 20, 23, 26, 27, 28, 29, 30, 34, 50, 64,
    ];
    let list = numbers.map(|number| number.to_string()).join(" ");
    // Both the agent and its child answer.
    let script = format!(
        r#"loop() {{
             for n in {list}; do trap "echo $1 got $n" $n; done
             echo $1 is ready
             while :; do sleep 600 & wait $!; done
           }}
           loop child & loop agent"#
    );
    let mut runner = scene.runner_with_token().agent(&script).start();
    runner.output_line("agent is ready").await;
    runner.output_line("child is ready").await;
    let pid = i32::try_from(runner.pid()).unwrap();
    for number in numbers {
        let sent = Program::at("bash")
            .args(["-c", &format!("kill -{number} {pid}")])
            .start()
            .wait()
            .await;
        assert!(sent.success());
        // A shell has its background jobs ignore SIGQUIT.
        let both = ["agent", "child"];
        for who in &both[..if number == 3 { 1 } else { 2 }] {
            let line = format!("{who} got {number}");
            eventually(&line, || runner.output().contains(&line).then_some(())).await;
        }
    }
    kill(Pid::from_raw(pid), Signal::SIGTERM).unwrap();
    assert_eq!(runner.wait().await.code(), Some(143));
}

#[tokio::test]
async fn asked_to_end_the_agent_ends_in_its_own_way() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let scene = Scene::new();
        let script = "trap 'echo saving; exit 5' TERM INT
            echo started; while :; do sleep 600 & wait $!; done";
        let mut runner = scene.runner_with_token().agent(script).start();
        runner.output_line("started").await;
        runner.signal(signal);
        assert_eq!(runner.wait().await.code(), Some(5), "{signal}");
        runner.output_line("saving").await;
    }
}

#[tokio::test]
async fn an_agent_that_does_not_end_is_killed_with_all_it_started() {
    let scene = Scene::new();
    // In its own session, so that no signal to the group reaches it.
    let script = r#"trap '' TERM
        setsid sh -c 'trap "" TERM; echo other $$; while :; do sleep 600; done' &
        echo started; while :; do sleep 600; done"#;
    let mut runner = scene
        .runner_with_token()
        .env("AMBIENT_GRACE_PERIOD", "700ms")
        .agent(script)
        .start();
    let other = pid_after(&mut runner, "other ").await;
    runner.output_line("started").await;
    let asked = Instant::now();
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(137));
    assert!(asked.elapsed() >= Duration::from_millis(700));
    assert!(!is_running(&other), "{other} was left behind");
}

#[tokio::test]
async fn a_stopped_agent_can_be_ended() {
    let scene = Scene::new();
    let mut runner = scene
        .runner_with_token()
        .agent("trap 'exit 4' TERM; echo agent $$; while :; do sleep 600 & wait $!; done")
        .start();
    let agent = pid_after(&mut runner, "agent ").await;
    kill(Pid::from_raw(agent.parse().unwrap()), Signal::SIGSTOP).unwrap();
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(4));
}

#[tokio::test]
async fn a_timeout_ends_the_agent_with_124() {
    for limit in LIMITS {
        let scene = Scene::new();
        let mut runner = scene
            .runner_with_token()
            .env("TIMEOUT", limit.trim_end_matches('s'))
            .agent(
                "trap 'echo told; exit 0' TERM
                echo ready; while :; do sleep 600 & wait $!; done",
            )
            .start();
        assert_eq!(runner.wait().await.code(), Some(124));
        assert!(scene.last_words().contains(&format!("TIMEOUT of {limit}")));
        if runner.output().contains(&"ready".to_owned()) {
            runner.output_line("told").await;
            return;
        }
    }
    panic!("the agent was not ready in {LIMITS:?}");
}

#[tokio::test]
async fn orphans_are_reaped_and_leftovers_ended() {
    let scene = Scene::new();
    let script = r#"(sh -c 'echo short $$; read -r x < pipe' &)
        (setsid sh -c 'trap "" TERM; echo long $$; while :; do sleep 600; done' &)
        read -r x; exit 3"#;
    Program::at("mkfifo")
        .arg(scene.path("pipe"))
        .start()
        .wait()
        .await;
    let mut runner = scene
        .runner_with_token()
        .folder(scene.path("."))
        .agent(script)
        .start();
    let short = pid_after(&mut runner, "short ").await;
    let long = pid_after(&mut runner, "long ").await;
    let pid = runner.pid();
    eventually("adoption of the orphan", || {
        (parent_of(&short) == Some(pid)).then_some(())
    })
    .await;

    // An orphan that ends is collected at once, while the agent runs.
    fs::write(scene.path("pipe"), "\n").unwrap();
    gone(&short).await;
    assert!(is_there(&long));

    runner.write_line("end").await;
    assert_eq!(runner.wait().await.code(), Some(3));
    assert!(!is_running(&long), "{long} was left behind");
}

#[tokio::test]
async fn many_children_at_once_leave_no_zombie_and_no_status_is_mixed_up() {
    let scene = Scene::new();
    let script = r#"for i in $(seq 200); do (sh -c 'exit 9' &); done
        sh -c 'exit 42'; echo "own child $?"; read -r x; exit 17"#;
    let mut runner = scene.runner_with_token().agent(script).start();
    runner.output_line("own child 42").await;
    let children = format!("/proc/{0}/task/{0}/children", runner.pid());
    eventually("only the agent as a child", || {
        let children = fs::read_to_string(&children).unwrap();
        (children.split_whitespace().count() == 1).then_some(())
    })
    .await;
    runner.write_line("end").await;
    assert_eq!(runner.wait().await.code(), Some(17));
}

#[tokio::test]
async fn a_connection_to_the_admin_port_does_not_change_the_exit_code() {
    let scene = Scene::new();
    let mut runner = scene
        .runner_with_token()
        .agent("read -r go; exit 0")
        .start();
    let admin = runner.listening("admin").await;
    let mut half_open = TcpStream::connect(admin).await.unwrap();
    half_open.write_all(b"GET /healthz HT").await.unwrap();
    // Answered on another connection: the first was accepted before it.
    let url = format!("http://{admin}/healthz");
    assert!(reqwest::get(url).await.unwrap().status().is_success());
    runner.write_line("go").await;
    assert_eq!(runner.wait().await.code(), Some(0));
    assert_eq!(scene.last_words(), "");
}

#[tokio::test]
async fn a_file_tells_when_the_agent_has_been_started() {
    let scene = Scene::new();
    let endpoint = Endpoint::start([], Answer::Status(500, None, "down")).await;
    let started = scene.path("started");
    let mut runner = scene
        .runner_of(&endpoint)
        .env("AMBIENT_STARTED_FILE", &started)
        .agent("read -r go; exit 3")
        .start();
    eventually("a request", || endpoint.requests().pop()).await;
    assert!(!started.exists(), "there is no token yet");
    endpoint.now_says(Answer::Token(Duration::from_secs(600)));
    eventually("the file", || started.exists().then_some(())).await;
    runner.write_line("go").await;
    assert_eq!(runner.wait().await.code(), Some(3));
}

#[tokio::test]
async fn a_killed_runner_takes_the_agent_along() {
    let scene = Scene::new();
    let mut runner = scene
        .runner_with_token()
        .agent("echo agent $$; exec sleep 600")
        .start();
    let agent = pid_after(&mut runner, "agent ").await;
    runner.kill().await;
    gone(&agent).await;
}

/// The runner as PID 1 of a process namespace of its own.
fn as_pid_1(scene: &Scene, script: &str) -> Program {
    let namespace = ["--pid", "--fork", "--kill-child", "--mount-proc"];
    scene
        .dress(Program::at("unshare"))
        .env("BOT_TOKEN", FIXED)
        .args(namespaces())
        .args(namespace)
        .arg(binary("ambient-runner"))
        .agent(script)
}

#[tokio::test]
async fn as_pid_1_it_reaps_ends_all_and_passes_the_code_on() {
    let scene = Scene::new();
    let script = r#"echo "runner is $PPID"
        (sh -c 'exit 0' &)
        (setsid sh -c 'trap "" TERM; echo here; while :; do sleep 600; done' &)
        read -r x
        while cat /proc/[0-9]*/status 2>/dev/null | grep -q 'State:.*zombie'; do sleep 0.1; done
        trap 'exit 21' TERM
        echo waiting
        while :; do sleep 600 & wait $!; done"#;
    let mut runner = as_pid_1(&scene, script).start();
    runner.output_line("runner is 1").await;
    runner.output_line("here").await;
    runner.write_line("look").await;
    // There is no zombie any more.
    runner.output_line("waiting").await;

    // PID 1 gets no signal that it does not handle: it must handle this one.
    let children = format!("/proc/{0}/task/{0}/children", runner.pid());
    let first = fs::read_to_string(children).unwrap();
    let first: i32 = first.trim().parse().unwrap();
    kill(Pid::from_raw(first), Signal::SIGTERM).unwrap();

    assert_eq!(runner.wait().await.code(), Some(21));
}

#[tokio::test]
async fn with_a_terminal_the_agent_is_in_the_foreground() {
    let scene = Scene::new();
    let token = scene.token_file();
    let agent = "read -r line; echo \"got $line\"; exit 9";
    let command = format!(
        "AMBIENT_TOKEN_FILE={} BOT_TOKEN={FIXED} {} -- sh -c '{agent}'",
        token.display(),
        binary("ambient-runner").display(),
    );
    // Gives the command a terminal of its own, and its exit code back.
    let mut terminal = Program::at("script")
        .args(["-qec", &command, "/dev/null"])
        .start();
    eventually("the agent", || {
        let output = terminal.output().concat();
        output.contains("agent started").then_some(())
    })
    .await;
    terminal.write_line("typed").await;
    terminal.output_line("got typed").await;
    assert_eq!(terminal.wait().await.code(), Some(9));
}
