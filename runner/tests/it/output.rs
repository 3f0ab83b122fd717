//! What leaves: the agent's stdio with secrets masked, and no secret anywhere else.

use std::{fs, path::Path, time::Duration};

use ambient_testing::keypair::RsaKey;

use crate::scene::{Agent as _, Answer, Endpoint, Scene, session_key, token};

const TYPE: &str = r#"{"type":"user","message":"#;

#[tokio::test]
async fn with_messages_off_the_prompt_goes_first_then_what_is_typed() {
    for (io, prompt) in [
        ("lines", "two lines".to_owned()),
        (
            "stream-json",
            format!(
                r#"{TYPE}{{"content":[{{"text":"two\nlines","type":"text"}}],"role":"user"}}}}"#
            ),
        ),
    ] {
        let scene = Scene::new();
        let mut runner = scene
            .runner_with_token()
            .env("AMBIENT_AGENT_IO", io)
            .env("INITIAL_PROMPT", "two\nlines")
            .agent("test -z \"$INITIAL_PROMPT\" && cat")
            .start();
        runner.write_line("typed").await;
        runner.close_stdin();
        assert_eq!(runner.wait().await.code(), Some(0));
        let got = runner.output();
        assert_eq!(got.len(), 2, "{got:?}");
        if io == "lines" {
            assert_eq!(got[0], prompt);
        } else {
            let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
            assert_eq!(parse(&got[0]), parse(&prompt));
        }
        assert_eq!(got[1], "typed");
    }
}

#[tokio::test]
async fn the_prompt_is_handed_over_in_the_environment_without_pipes_and_never_on_resume() {
    for (io, resume, expected) in [
        ("none", "false", "prompt=hello"),
        ("none", "true", "prompt="),
        ("lines", "true", "prompt="),
    ] {
        let scene = Scene::new();
        let mut runner = scene
            .runner_with_token()
            .env("AMBIENT_AGENT_IO", io)
            .env("INITIAL_PROMPT", "hello")
            .env("IS_RESUME", resume)
            .agent("echo prompt=$INITIAL_PROMPT; cat")
            .start();
        runner.close_stdin();
        assert_eq!(runner.wait().await.code(), Some(0));
        assert_eq!(runner.output(), [expected], "{io} {resume}");
    }
}

#[tokio::test]
async fn secrets_are_masked_in_all_that_an_agent_with_pipes_writes() {
    let scene = Scene::new();
    let life = Duration::from_secs(600);
    let endpoint = Endpoint::start([], Answer::Token(life)).await;
    scene.mount(&token("pushed", life));
    let script = r#"printf 'out %s.\n' "$(cat $AMBIENT_TOKEN_FILE)"
        printf 'err %s.\n' "$(cat $AMBIENT_TOKEN_FILE)" >&2
        printf 'key %s.\n' "$(cat $KEY)"
        printf 'mounted %s.\n' "$(cat $MOUNTED)"
        printf 'no line break'"#;
    let mut runner = scene
        .runner_of(&endpoint)
        .env("AMBIENT_AGENT_IO", "lines")
        .env("KEY", scene.path("mount/session-key"))
        .env("MOUNTED", scene.path("mount/bot-token"))
        .agent(script)
        .start();
    assert_eq!(runner.wait().await.code(), Some(0));
    let expected = [
        "out [masked].",
        "key [masked].",
        "mounted [masked].",
        "no line break",
    ];
    assert_eq!(runner.output(), expected);
    assert!(runner.log().contains(&"err [masked].".to_owned()));
}

#[tokio::test]
async fn what_is_passed_through_is_untouched() {
    let scene = Scene::new();
    let mut runner = scene
        .runner_with_token()
        .agent("read -r line; echo \"$line $(cat $AMBIENT_TOKEN_FILE)\"")
        .start();
    runner.write_line("got").await;
    assert_eq!(runner.wait().await.code(), Some(0));
    assert_eq!(runner.output(), ["got fixed-token-of-the-tests"]);
}

#[tokio::test]
async fn no_secret_is_in_the_agents_environment_or_arguments_nor_in_any_log() {
    let scene = Scene::new();
    let endpoint = Endpoint::start(
        [
            Answer::Status(500, None, "oh"),
            Answer::Status(200, None, r#"{"tok":"en"}"#),
        ],
        Answer::Token(Duration::from_secs(2)),
    )
    .await;
    let mut runner = scene
        .runner_of(&endpoint)
        .env("BOT_TOKEN", "a-fixed-token-beside-it")
        .env("LOG_LEVEL", "trace")
        .env("HELD", "held-back-value")
        .env("AMBIENT_HOLD_BACK", "HELD, OTHER")
        .agent("echo agent $$; exec sleep 600")
        .start();
    let agent = runner.output_line("agent ").await;
    let agent = agent.trim_start_matches("agent ");
    let mut so_far = 0;
    for _ in 0..2 {
        let handed = runner.log_line_after(so_far, "a token for the agent", |line| {
            line["message"] == "token handed to agent"
        });
        so_far = handed.await.0;
    }
    let token = fs::read_to_string(scene.token_file()).unwrap();

    let of_agent = |file: &str| {
        let content = fs::read(Path::new("/proc").join(agent).join(file)).unwrap();
        String::from_utf8_lossy(&content).into_owned()
    };
    let environment = of_agent("environ");
    let arguments = of_agent("cmdline");
    let log = runner.log().join("\n");
    assert!(environment.contains("AMBIENT_TOKEN_FILE=") && log.contains("token refreshed"));
    let bearer = &endpoint.requests()[0].bearer;
    let pem = RsaKey::shared().public_pem();
    let key = session_key();
    for secret in [
        &token,
        bearer,
        key.expose(),
        "a-fixed-token-beside-it",
        "tok-pulled",
    ] {
        for (place, text) in [("env", &environment), ("argv", &arguments), ("log", &log)] {
            assert!(!text.contains(secret), "{secret} is in the {place}: {text}");
        }
    }
    for name in [
        "BOT_TOKEN=",
        "AMBIENT_CP_TOKEN_",
        "HELD=",
        pem.lines().nth(1).unwrap(),
    ] {
        assert!(!environment.contains(name), "{name} is in {environment}");
    }
    assert!(!log.contains(crate::scene::SESSION), "{log}");
    // Nobody but root may look into the runner itself, nor does it leave a core.
    let runners = Path::new("/proc").join(runner.pid().to_string());
    let limits = fs::read_to_string(runners.join("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
}

#[tokio::test]
async fn the_sidecars_addresses_are_waited_for_and_handed_on() {
    let scene = Scene::new();
    let file = scene.path("addresses.json");
    let mut runner = scene
        .runner_with_token()
        .env("AMBIENT_SIDECAR_ADDRESSES", &file)
        .agent("echo $AMBIENT_TOKEN_ENDPOINT $AMBIENT_PROXY_URL $AMBIENT_PROXY_GRPC")
        .start();
    runner.listening("admin").await;
    let addresses = r#"{"endpoint":"127.0.0.1:11","proxy":"127.0.0.1:12","admin":"127.0.0.1:13"}"#;
    ambient_shared::swap::write_atomic(&file, addresses.as_bytes(), 0o600).unwrap();
    assert_eq!(runner.wait().await.code(), Some(0));
    let expected = "http://127.0.0.1:11/token http://127.0.0.1:12 127.0.0.1:12";
    assert_eq!(runner.output(), [expected]);
}
