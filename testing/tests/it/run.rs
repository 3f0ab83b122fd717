//! `local run -- COMMAND`: a conversation with any command, on a pipe here.

use ambient_testing::{
    DEADLINE,
    local::put_keypair,
    programs::{Program, Running},
};
use tempfile::TempDir;

struct Run {
    program: Running,
    _data: TempDir,
}

fn run(command: &[&str]) -> Run {
    let data = tempfile::tempdir().unwrap();
    put_keypair(data.path());
    let program = Program::new("ambient-control-plane")
        .args(["local", "run", "--data-dir"])
        .arg(data.path())
        .arg("--")
        .args(command)
        .start();
    Run {
        program,
        _data: data,
    }
}

#[tokio::test]
async fn without_any_setting_it_works_and_leaves_no_folder() {
    let temporary = tempfile::tempdir().unwrap();
    let mut program = Program::new("ambient-control-plane")
        .args(["local", "run", "--", "false"])
        .env("TMPDIR", temporary.path())
        .start();
    // It makes a keypair, which takes its time, and says nothing until the end.
    let ended = program.ended_within(5 * DEADLINE).await;
    assert_eq!(ended.expect("it ends").code(), Some(1));
    let left: Vec<_> = std::fs::read_dir(temporary.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_conversation_ends_with_the_input() {
    let mut run = run(&[
        "sh",
        "-c",
        r#"while read -r l; do echo "you said $l"; done"#,
    ]);
    run.program.write_line("hello").await;
    run.program.output_line("you said hello").await;
    run.program.write_line("and this").await;
    run.program.write_line("the last word").await;
    run.program.close_stdin();
    assert_eq!(run.program.wait().await.code(), Some(0));
    assert_eq!(
        run.program.output(),
        [
            "you said hello",
            "you said and this",
            "you said the last word"
        ]
    );
}

#[tokio::test]
async fn all_input_at_once_works_too() {
    let mut run = run(&["cat"]);
    for number in 0..50 {
        run.program.write_line(&format!("line {number}")).await;
    }
    run.program.close_stdin();
    assert!(run.program.wait().await.success());
    let wanted: Vec<_> = (0..50).map(|number| format!("line {number}")).collect();
    assert_eq!(run.program.output(), wanted);
}

#[tokio::test]
async fn exit_code_is_the_agents() {
    let cases: [(&[&str], i32); 5] = [
        (&["true"], 0),
        (&["false"], 1),
        (&["sh", "-c", "exit 42"], 42),
        (&["/does/not/exist"], 127),
        (&["sh", "-c", "kill -TERM $$"], 143),
    ];
    for (command, code) in cases {
        let mut run = run(command);
        run.program.close_stdin();
        assert_eq!(run.program.wait().await.code(), Some(code), "{command:?}");
    }
}

#[tokio::test]
async fn nothing_is_left_behind() {
    let mark = uuid::Uuid::new_v4().to_string();
    let script = format!("sleep 600 & : {mark}; echo started; wait");
    let mut run = run(&["sh", "-c", &script]);
    run.program.output_line("started").await;
    run.program.signal(nix::sys::signal::Signal::SIGTERM);
    run.program.wait().await;
    let left = ambient_testing::processes::with(&mark);
    assert!(left.is_empty(), "{left:#?}");
}

#[tokio::test]
async fn bad_settings_are_one_line_that_names_the_setting() {
    let cases: [(&[&str], &str); 6] = [
        (&["local", "--token-ttl", "1s"], "--token-ttl"),
        (&["local", "--token-ttl", "soon"], "--token-ttl"),
        (&["local", "--api-listen", "nowhere"], "--api-listen"),
        (&["local", "--refresh-interval", "x"], "--refresh-interval"),
        (&["local", "--cp-token-issuer", "oidc"], "OIDC_TOKEN_URL"),
        (&["local", "run", "--io", "voice", "--", "cat"], "--io"),
    ];
    for (arguments, name) in cases {
        let mut program = Program::new("ambient-control-plane")
            .args(arguments)
            .start();
        assert_eq!(program.wait().await.code(), Some(78), "{arguments:?}");
        let log = program.log();
        assert!(
            log.iter().any(|line| line.contains(name)),
            "{arguments:?}: {log:?}"
        );
        // One line for each fault, and nothing else: nothing was started.
        let lines = log
            .iter()
            .all(|it| it.starts_with("ambient-control-plane: "));
        assert!(lines, "{arguments:?}: {log:?}");
    }
}
