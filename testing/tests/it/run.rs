//! `local run -- COMMAND`: a conversation with any command, on a pipe here.

use ambient_testing::programs::{Program, Running};

fn run(command: &[&str]) -> Running {
    Program::new("ambient-control-plane")
        .args(["local", "run", "--"])
        .args(command)
        .start()
}

#[tokio::test]
async fn a_conversation_ends_with_the_input() {
    let mut program = run(&[
        "sh",
        "-c",
        r#"while read -r l; do echo "you said $l"; done"#,
    ]);
    program.write_line("hello").await;
    program.output_line("you said hello").await;
    program.write_line("and this").await;
    program.write_line("the last word").await;
    program.close_stdin();
    assert_eq!(program.wait().await.code(), Some(0));
    assert_eq!(
        program.output(),
        [
            "you said hello",
            "you said and this",
            "you said the last word"
        ]
    );
}

#[tokio::test]
async fn all_input_at_once_works_too() {
    let mut program = run(&["cat"]);
    for number in 0..50 {
        program.write_line(&format!("line {number}")).await;
    }
    program.close_stdin();
    assert!(program.wait().await.success());
    let wanted: Vec<_> = (0..50).map(|number| format!("line {number}")).collect();
    assert_eq!(program.output(), wanted);
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
        let mut program = run(command);
        program.close_stdin();
        assert_eq!(program.wait().await.code(), Some(code), "{command:?}");
    }
}

#[tokio::test]
async fn nothing_is_left_behind() {
    let mark = uuid::Uuid::new_v4().to_string();
    let script = format!("sleep 600 & : {mark}; echo started; wait");
    let mut program = run(&["sh", "-c", &script]);
    program.output_line("started").await;
    program.signal(nix::sys::signal::Signal::SIGTERM);
    program.wait().await;
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
        assert_eq!(log.len(), 1, "{arguments:?}: {log:?}");
    }
}
