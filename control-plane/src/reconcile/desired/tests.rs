use ambient_shared::proto;

use super::*;
use crate::{backend::Agent, keypair::id::KeyId};

mod pods;

const PUBLIC_KEY: PublicHalf<'static> = PublicHalf {
    pem: "-----BEGIN PUBLIC KEY-----\n",
    id: KeyId::from_bytes([9; 8]),
};

fn settings() -> DesiredSettings {
    DesiredSettings {
        token_url: "http://127.0.0.1:8080/token".to_owned(),
        token_ca: None,
        api_rest_url: "http://127.0.0.1:8000".to_owned(),
        api_grpc_url: "127.0.0.1:8001".to_owned(),
        grpc_tls: false,
        grpc_ca_file: None,
        messages: true,
        default_agent_command: Some(vec!["demo-agent".to_owned()]),
        default_agent_io: None,
        runner_log_level: Some("info".to_owned()),
        passed_on: BTreeMap::from([("HTTP_PROXY".to_owned(), "http://proxy:3128".to_owned())]),
        place: Place::Processes,
    }
}

fn session(change: impl FnOnce(&mut proto::Session)) -> Session {
    let mut object = proto::Session {
        metadata: Some(proto::ObjectReference {
            id: "session-0001".to_owned(),
            ..Default::default()
        }),
        name: "my session".to_owned(),
        project_id: Some("Team-A".to_owned()),
        ..Default::default()
    };
    change(&mut object);
    object.try_into().unwrap()
}

fn run(change: impl FnOnce(&mut proto::Session)) -> DesiredRun {
    desired_run(&session(change), &[], &settings(), PUBLIC_KEY).unwrap()
}

fn refusal(change: impl FnOnce(&mut proto::Session)) -> CannotRun {
    desired_run(&session(change), &[], &settings(), PUBLIC_KEY).unwrap_err()
}

/// `NAME=value` lines, sorted by name.
fn snapshot(run: &DesiredRun) -> String {
    let line = |(name, value): (&String, &String)| format!("{name}={}\n", value.escape_debug());
    run.environment.iter().map(line).collect()
}

fn command(run: &DesiredRun) -> &[String] {
    let Agent::Command { command, .. } = &run.agent else {
        panic!("{run:?}");
    };
    command
}

#[test]
fn a_plain_session_has_this_environment() {
    let run = run(|_| {});
    assert_eq!(command(&run), ["demo-agent"]);
    assert_eq!((run.generation, run.keypair), (0, PUBLIC_KEY.id));
    let expected = r"AGENTIC_SESSION_NAME=my session
AGENTIC_SESSION_NAMESPACE=team-a
AMBIENT_AGENT_IO=stream-json
AMBIENT_AGENT_TURNS=0
AMBIENT_API_URL=http://127.0.0.1:8000
AMBIENT_CP_TOKEN_PUBLIC_KEY=-----BEGIN PUBLIC KEY-----\n
AMBIENT_CP_TOKEN_URL=http://127.0.0.1:8080/token
AMBIENT_GRPC_ENABLED=true
AMBIENT_GRPC_URL=127.0.0.1:8001
AMBIENT_GRPC_USE_TLS=false
ARTIFACTS_DIR=artifacts
BACKEND_API_URL=http://127.0.0.1:8000
HTTP_PROXY=http://proxy:3128
LOG_LEVEL=info
PROJECT_NAME=Team-A
SESSION_ID=session-0001
";
    assert_eq!(snapshot(&run), expected);
}

#[test]
fn a_full_session_has_this_environment() {
    let session = session(|session| {
        session.prompt = Some("fix it".to_owned());
        session.repo_url = Some("https://git/a".to_owned());
        session.repos = Some(
            r#"["https://git/b", {"url":"https://git/c","branch":"x"}, {"url":"https://git/a"}]"#
                .to_owned(),
        );
        session.llm_model = Some("some-model".to_owned());
        session.llm_temperature = Some(0.7);
        session.llm_max_tokens = Some(4000);
        session.timeout = Some(90);
        session.agent_id = Some("agent-1".to_owned());
        session.sdk_restart_count = Some(2);
        session.annotations = Some(
            r#"{"ambient-code.io/agent-command":"[\"my-agent\",\"--fast\"]",
                "ambient-code.io/agent-io":"lines","ambient-code.io/agent-turns":"3"}"#
                .to_owned(),
        );
        session.environment_variables = Some(
            r#"{"MY_FLAG":"on","COUNT":7,"SESSION_ID":"other","BOT_TOKEN":"x",
                "AMBIENT_BOT_TOKEN_FILE":"/etc/shadow","AMBIENT_GRACE_PERIOD":"30s",
                "LOG_LEVEL":"debug"}"#
                .to_owned(),
        );
    });
    let settings = DesiredSettings {
        token_ca: Some("-----BEGIN CERTIFICATE-----\n".to_owned()),
        grpc_tls: true,
        grpc_ca_file: Some("/ca.pem".into()),
        ..settings()
    };
    let run = desired_run(
        &session,
        &["be kind", "", "be quick"],
        &settings,
        PUBLIC_KEY,
    )
    .unwrap();
    assert_eq!(command(&run), ["my-agent", "--fast"]);
    assert_eq!(run.generation, 2);
    let expected = r#"AGENTIC_SESSION_NAME=my session
AGENTIC_SESSION_NAMESPACE=team-a
AGENT_ID=agent-1
AMBIENT_AGENT_IO=lines
AMBIENT_AGENT_TURNS=3
AMBIENT_API_URL=http://127.0.0.1:8000
AMBIENT_CP_TOKEN_CA=-----BEGIN CERTIFICATE-----\n
AMBIENT_CP_TOKEN_PUBLIC_KEY=-----BEGIN PUBLIC KEY-----\n
AMBIENT_CP_TOKEN_URL=http://127.0.0.1:8080/token
AMBIENT_GRACE_PERIOD=30s
AMBIENT_GRPC_CA_CERT_FILE=/ca.pem
AMBIENT_GRPC_ENABLED=true
AMBIENT_GRPC_URL=127.0.0.1:8001
AMBIENT_GRPC_USE_TLS=true
AMBIENT_PREAMBLE=be kind\n\nbe quick
ARTIFACTS_DIR=artifacts
BACKEND_API_URL=http://127.0.0.1:8000
COUNT=7
HTTP_PROXY=http://proxy:3128
INITIAL_PROMPT=be kind\n\nbe quick\n\nfix it
IS_RESUME=true
LLM_MAX_TOKENS=4000
LLM_MODEL=some-model
LLM_TEMPERATURE=0.7
LOG_LEVEL=info
MY_FLAG=on
PROJECT_NAME=Team-A
REPOS_JSON=[{\"url\":\"https://git/a\"},{\"url\":\"https://git/b\"},{\"branch\":\"x\",\"url\":\"https://git/c\"}]
SESSION_ID=session-0001
TIMEOUT=90
"#;
    assert_eq!(snapshot(&run), expected);
}

#[test]
fn zeros_and_empty_texts_are_left_out() {
    let full = run(|session| {
        session.prompt = Some("  ".to_owned());
        session.llm_model = Some(String::new());
        session.llm_temperature = Some(0.0);
        session.llm_max_tokens = Some(0);
        session.timeout = Some(0);
        session.repo_url = Some(String::new());
        session.repos = Some("[]".to_owned());
        session.annotations = Some("null".to_owned());
        session.environment_variables = Some("{}".to_owned());
        session.agent_id = Some(String::new());
    });
    assert_eq!(full, run(|_| {}));
}

#[test]
fn without_messages_the_agents_stdio_is_its_own() {
    let settings = DesiredSettings {
        messages: false,
        ..settings()
    };
    let run = desired_run(&session(|_| {}), &[], &settings, PUBLIC_KEY).unwrap();
    assert_eq!(run.environment["AMBIENT_AGENT_IO"], "none");
    assert_eq!(run.environment["AMBIENT_GRPC_ENABLED"], "false");
}

#[test]
fn what_cannot_run_says_why() {
    let annotated = |text: &str| {
        let text = text.to_owned();
        refusal(|session| session.annotations = Some(text)).reason
    };
    assert_eq!(annotated("[1]"), "AnnotationsMalformed");
    assert_eq!(annotated("not json"), "AnnotationsMalformed");
    for command in [
        r#""sh -c x""#,
        r#""[]""#,
        r#""[\"\"]""#,
        r#""[1]""#,
        r#"["sh"]"#,
        r#""[\"a\\u0000b\"]""#,
    ] {
        let text = format!(r#"{{"ambient-code.io/agent-command":{command}}}"#);
        assert_eq!(annotated(&text), "AnnotationMalformed", "{text}");
    }
    assert_eq!(
        annotated(r#"{"ambient-code.io/agent-io":"telepathy"}"#),
        "AnnotationMalformed"
    );
    assert_eq!(
        annotated(r#"{"ambient-code.io/agent-turns":"-1"}"#),
        "AnnotationMalformed"
    );
    assert_eq!(
        annotated(r#"{"ambient-code.io/agent-image":"x:1"}"#),
        "AgentImageUnsupported"
    );
    let repos = |text: &str| refusal(|session| session.repos = Some(text.to_owned())).reason;
    assert_eq!(repos("{}"), "ReposMalformed");
    assert_eq!(repos(r#"[{"branch":"x"}]"#), "ReposMalformed");
    let environment = |text: &str| {
        refusal(|session| session.environment_variables = Some(text.to_owned())).reason
    };
    assert_eq!(environment("[]"), "EnvironmentMalformed");
    assert_eq!(environment(r#"{"A=B":"x"}"#), "EnvironmentMalformed");
    assert_eq!(environment(r#"{"1A":"x"}"#), "EnvironmentMalformed");
    assert_eq!(environment(r#"{"A":{}}"#), "EnvironmentMalformed");
    assert_eq!(environment(r#"{"A":"a\u0000b"}"#), "EnvironmentMalformed");
    let long = refusal(|session| session.prompt = Some("x".repeat(200_000)));
    assert_eq!(long.reason, "EnvironmentTooLarge");
    assert!(long.message.contains("INITIAL_PROMPT"), "{long}");
}

#[test]
fn a_session_without_any_command_says_so() {
    let settings = DesiredSettings {
        default_agent_command: None,
        ..settings()
    };
    let refusal = desired_run(&session(|_| {}), &[], &settings, PUBLIC_KEY).unwrap_err();
    assert_eq!(refusal.reason, "AgentCommandMissing");
}

#[test]
fn a_session_does_not_decide_what_the_runner_trusts_or_loads() {
    let wanted = r#"{"LD_PRELOAD":"x","Https_Proxy":"x","http_proxy":"x","PATH":"x","KEPT":"x"}"#;
    let session = session(|session| session.environment_variables = Some(wanted.to_owned()));
    let run = desired_run(&session, &[], &settings(), PUBLIC_KEY).unwrap();
    let theirs = run.environment.iter().filter(|(_, value)| *value == "x");
    assert_eq!(theirs.map(|(name, _)| name).collect::<Vec<_>>(), ["KEPT"]);
}

#[test]
fn an_environment_has_limits_of_number_and_size() {
    let of = |variables: &BTreeMap<String, String>| {
        let text = serde_json::to_string(variables).unwrap();
        let session = session(|session| session.environment_variables = Some(text));
        let run = desired_run(&session, &[], &settings(), PUBLIC_KEY);
        run.map(|_| ()).map_err(|refusal| refusal.reason)
    };
    let many = |count: usize, size: usize| {
        let named = |number| (format!("V{number}"), "x".repeat(size));
        (0..count).map(named).collect()
    };
    assert_eq!(of(&many(500, 1000)), Ok(()));
    assert_eq!(of(&many(501, 1)), Err("EnvironmentTooLarge"));
    assert_eq!(of(&many(6, 100_000)), Err("EnvironmentTooLarge"));
    let long_name = [("A".repeat(300), String::new())].into();
    assert_eq!(of(&long_name), Err("EnvironmentMalformed"));
}

#[test]
fn a_session_does_not_choose_credentials() {
    let ids = r#"{"CREDENTIAL_IDS":"{\"github\":\"another-teams\"}"}"#;
    let session = session(|session| session.environment_variables = Some(ids.to_owned()));
    let run = desired_run(&session, &[], &settings(), PUBLIC_KEY).unwrap();
    assert!(!run.environment.contains_key("CREDENTIAL_IDS"));
}
