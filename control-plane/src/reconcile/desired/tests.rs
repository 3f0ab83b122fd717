use ambient_shared::proto;

use super::*;
use crate::backend::Agent;

fn settings() -> DesiredSettings {
    DesiredSettings {
        token_url: "http://127.0.0.1:8080/token".to_owned(),
        public_key_pem: "-----BEGIN PUBLIC KEY-----\n".to_owned(),
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
    desired_run(&session(change), &[], &settings()).unwrap()
}

fn refusal(change: impl FnOnce(&mut proto::Session)) -> CannotRun {
    desired_run(&session(change), &[], &settings()).unwrap_err()
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
    assert_eq!(run.generation, 0);
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
        grpc_tls: true,
        grpc_ca_file: Some("/ca.pem".into()),
        ..settings()
    };
    let run = desired_run(&session, &["be kind", "", "be quick"], &settings).unwrap();
    assert_eq!(command(&run), ["my-agent", "--fast"]);
    assert_eq!(run.generation, 2);
    let expected = r#"AGENTIC_SESSION_NAME=my session
AGENTIC_SESSION_NAMESPACE=team-a
AGENT_ID=agent-1
AMBIENT_AGENT_IO=lines
AMBIENT_AGENT_TURNS=3
AMBIENT_API_URL=http://127.0.0.1:8000
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
    let run = desired_run(&session(|_| {}), &[], &settings).unwrap();
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
    let refusal = desired_run(&session(|_| {}), &[], &settings).unwrap_err();
    assert_eq!(refusal.reason, "AgentCommandMissing");
}

#[test]
fn a_session_does_not_decide_what_the_runner_trusts_or_loads() {
    let wanted = r#"{"LD_PRELOAD":"x","Https_Proxy":"x","http_proxy":"x","PATH":"x","KEPT":"x"}"#;
    let session = session(|session| session.environment_variables = Some(wanted.to_owned()));
    let run = desired_run(&session, &[], &settings()).unwrap();
    let theirs = run.environment.iter().filter(|(_, value)| *value == "x");
    assert_eq!(theirs.map(|(name, _)| name).collect::<Vec<_>>(), ["KEPT"]);
}

fn in_pods(limits: PodLimits) -> DesiredSettings {
    DesiredSettings {
        default_agent_command: None,
        place: Place::Pods(limits),
        ..settings()
    }
}

fn limits() -> PodLimits {
    PodLimits {
        default_image: Some("quay.io/team/runner:1".to_owned()),
        allowed_images: vec!["quay.io/team/*".to_owned()],
        ..PodLimits::default()
    }
}

/// A session with these annotations, in pods.
fn annotated_in(settings: &DesiredSettings, annotations: Value) -> Result<Agent, CannotRun> {
    let session = session(|session| session.annotations = Some(annotations.to_string()));
    desired_run(&session, &[], settings).map(|run| run.agent)
}

#[test]
fn in_pods_the_operators_image_runs_as_it_is_where_nobody_names_a_command() {
    let settings = in_pods(limits());
    assert_eq!(annotated_in(&settings, json!({})), Ok(Agent::RunnerImage));

    let without_image = in_pods(PodLimits::default());
    let refusal = annotated_in(&without_image, json!({})).unwrap_err();
    assert_eq!(refusal.reason, "AgentCommandMissing");
    assert!(refusal.message.contains("RUNNER_IMAGE"), "{refusal}");
}

#[test]
fn a_command_is_the_sessions_or_else_the_operators() {
    let settings = DesiredSettings {
        default_agent_command: Some(vec!["operators".to_owned()]),
        ..in_pods(limits())
    };
    let command = |command: &str, image: Option<&str>| {
        Ok(Agent::Command {
            command: vec![command.to_owned()],
            image: image.map(ToOwned::to_owned),
        })
    };
    let own = json!({"ambient-code.io/agent-command": "[\"own\"]"});
    assert_eq!(
        annotated_in(&settings, json!({})),
        command("operators", None)
    );
    assert_eq!(annotated_in(&settings, own), command("own", None));
    let image = "quay.io/team/agent:2";
    let with_image = json!({"ambient-code.io/agent-image": image});
    assert_eq!(
        annotated_in(&settings, with_image),
        command("operators", Some(image))
    );
}

#[test]
fn an_image_must_be_allowed_and_needs_a_command() {
    let settings = in_pods(limits());
    let refused = |image: &str, command: bool| {
        let mut annotations = json!({"ambient-code.io/agent-image": image});
        if command {
            annotations["ambient-code.io/agent-command"] = json!("[\"agent\"]");
        }
        annotated_in(&settings, annotations).map_err(|refusal| refusal.reason)
    };
    assert_eq!(
        refused("quay.io/team/agent:2", false),
        Err("AgentCommandMissing")
    );
    assert!(refused("quay.io/team/agent:2", true).is_ok());
    assert!(refused("quay.io/team/runner:1", true).is_ok());
    for image in [
        "alpine",
        "quay.io/other/agent",
        "evil.org/quay.io/team/agent",
    ] {
        assert_eq!(refused(image, true), Err("AgentImageNotAllowed"), "{image}");
    }
    let long = format!("quay.io/team/{}", "a".repeat(600));
    for image in ["quay.io/team/a b", "quay.io/team/ü", &long] {
        assert_eq!(refused(image, true), Err("AnnotationMalformed"), "{image}");
    }
}

/// A session that asks for these resources, in pods.
fn asking(text: &str) -> Result<ResourceOverrides, CannotRun> {
    let session = session(|session| session.resource_overrides = Some(text.to_owned()));
    desired_run(&session, &[], &in_pods(limits())).map(|run| run.resources)
}

#[test]
fn resources_can_be_asked_for_in_two_forms() {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        pairs.iter().map(owned).collect()
    };
    let both = map(&[("cpu", "2"), ("memory", "4Gi")]);
    for text in [
        r#"{"cpu":"2","memory":"4Gi"}"#,
        r#"{"cpu":2,"memory":" 4Gi "}"#,
        r#"{"requests":{"cpu":2,"memory":"4Gi"},"limits":{"cpu":"2","memory":"4Gi"}}"#,
    ] {
        let asked = asking(text).unwrap();
        assert_eq!(asked.requests, both, "{text}");
        assert_eq!(asked.limits, both, "{text}");
    }
    let limits_alone = asking(r#"{"limits":{"memory":"8Gi"},"requests":null}"#).unwrap();
    assert_eq!(limits_alone.requests, map(&[]));
    assert_eq!(limits_alone.limits, map(&[("memory", "8Gi")]));
    for nothing in ["", " ", "null", "{}", r#"{"cpu":""}"#, r#"{"requests":{}}"#] {
        assert_eq!(
            asking(nothing),
            Ok(ResourceOverrides::default()),
            "{nothing}"
        );
    }
    assert!(asking(r#"{"cpu":"8000m","memory":"32Gi"}"#).is_ok());
}

#[test]
fn more_than_the_operator_allows_cannot_be_asked_for() {
    for text in [
        r#"{"cpu":"8001m"}"#,
        r#"{"memory":"33Gi"}"#,
        r#"{"requests":{"cpu":"9"}}"#,
        r#"{"limits":{"memory":"1Ti"}}"#,
    ] {
        let refusal = asking(text).unwrap_err();
        assert_eq!(refusal.reason, "ResourceOverridesTooLarge", "{text}");
        assert!(refusal.message.contains("at most"), "{refusal}");
    }
    let mut strict = limits();
    strict.max_resources = [("cpu".to_owned(), "a lot".to_owned())].into();
    let session = session(|session| session.resource_overrides = Some(r#"{"cpu":"1"}"#.to_owned()));
    let refusal = desired_run(&session, &[], &in_pods(strict)).unwrap_err();
    assert_eq!(refusal.reason, "ResourceOverridesTooLarge");
}

#[test]
fn resources_that_make_no_sense_say_why() {
    for (text, why) in [
        ("[]", "no JSON object"),
        ("2", "no JSON object"),
        (r#"{"cpu":"lots"}"#, "lots"),
        (r#"{"cpu":"-1"}"#, "-1"),
        (r#"{"cpu":true}"#, "cpu"),
        (r#"{"cpu":"0"}"#, "less than"),
        (r#"{"memory":"4"}"#, "less than 16Mi"),
        (r#"{"memory":"128m"}"#, "less than"),
        (r#"{"nvidia.com/gpu":"1"}"#, "cpu, memory"),
        (
            r#"{"requests":{"cpu":"2"},"limits":{"cpu":"1"}}"#,
            "limit of 1",
        ),
        (r#"{"requests":{"cpu":"2"},"cpu":"1"}"#, "beside"),
        (r#"{"requests":"2"}"#, "requests"),
    ] {
        let refusal = asking(text).unwrap_err();
        assert_eq!(refusal.reason, "ResourceOverridesMalformed", "{text}");
        assert!(refusal.message.contains(why), "{text}: {refusal}");
    }
}

#[test]
fn processes_take_what_resources_there_are() {
    let run = run(|session| session.resource_overrides = Some("nonsense".to_owned()));
    assert_eq!(run.resources, ResourceOverrides::default());
}

#[test]
fn an_environment_has_limits_of_number_and_size() {
    let of = |variables: &BTreeMap<String, String>| {
        let text = serde_json::to_string(variables).unwrap();
        let session = session(|session| session.environment_variables = Some(text));
        let run = desired_run(&session, &[], &settings());
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
fn a_command_has_a_limit() {
    let long = json!(["agent", "x".repeat(131_000)]).to_string();
    let annotations = json!({ "ambient-code.io/agent-command": long });
    let refusal = annotated_in(&in_pods(limits()), annotations).unwrap_err();
    assert_eq!(refusal.reason, "AnnotationMalformed");
    assert!(refusal.message.contains("KiB"), "{refusal}");
}

#[test]
fn a_session_does_not_choose_credentials() {
    let ids = r#"{"CREDENTIAL_IDS":"{\"github\":\"another-teams\"}"}"#;
    let session = session(|session| session.environment_variables = Some(ids.to_owned()));
    let run = desired_run(&session, &[], &settings()).unwrap();
    assert!(!run.environment.contains_key("CREDENTIAL_IDS"));
}
