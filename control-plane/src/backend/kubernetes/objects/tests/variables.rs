//! What is in the containers' environments, and what is in no object but the Secret.

use proptest::prelude::*;

use super::*;

#[test]
fn paths_are_the_pods_whatever_the_run_says() {
    let mut run = run(command(None));
    for name in [
        "AMBIENT_TOKEN_FILE",
        "AMBIENT_BOT_TOKEN_FILE",
        "AMBIENT_ADMIN_LISTEN",
        "WORKSPACE_PATH",
        "HOME",
        "AGENTIC_SESSION_NAMESPACE",
    ] {
        run.environment
            .insert(name.to_owned(), "elsewhere".to_owned());
    }
    let pod = pod_of(&run, &settings());
    let variables = container_of(&pod, AGENT).env.iter().flatten();
    let moved = variables.filter(|it| it.value.as_deref() == Some("elsewhere"));
    assert_eq!(
        moved.map(|it| &it.name).collect::<Vec<_>>(),
        Vec::<&String>::new()
    );
}

#[test]
fn a_log_level_that_a_sidecar_would_not_start_with_is_not_passed_on() {
    let mut run = run(command(None));
    run.environment
        .insert("LOG_LEVEL".to_owned(), "=".to_owned());
    let pod = pod_of(&run, &settings());
    assert_eq!(value_of(&pod, "ambient-sidecar", "LOG_LEVEL"), None);
    assert_eq!(value_of(&pod, AGENT, "LOG_LEVEL"), Some("="));
}

#[test]
fn companions_join_for_the_credentials_that_the_session_has() {
    let names = |ids: Option<&str>| -> Vec<String> {
        let mut run = run(Agent::RunnerImage);
        let ids = ids.map(|ids| ("CREDENTIAL_IDS".to_owned(), ids.to_owned()));
        run.environment.extend(ids);
        let spec = pod_of(&run, &existing()).spec.unwrap();
        spec.containers.into_iter().map(|it| it.name).collect()
    };
    assert_eq!(names(Some("{}")), [AGENT, "ambient-mcp"]);
    assert_eq!(
        names(Some(r#"{"jira":"c","gitlab":"d"}"#)),
        [AGENT, "ambient-mcp", "credential-jira"]
    );
    assert_eq!(names(None).len(), 6);
}

#[test]
fn a_companion_knows_its_own_credential_alone_and_the_runner_none() {
    let mut run = run(Agent::RunnerImage);
    let ids = r#"{"github":"c1","jira":"c2"}"#.to_owned();
    run.environment.insert("CREDENTIAL_IDS".to_owned(), ids);
    let pod = pod_of(&run, &existing());
    assert_eq!(
        value_of(&pod, "credential-jira", "CREDENTIAL_IDS"),
        Some(r#"{"jira":"c2"}"#)
    );
    assert_eq!(value_of(&pod, AGENT, "CREDENTIAL_IDS"), None);
    assert_eq!(
        value_of(&pod, AGENT, "CREDENTIAL_MCP_URLS"),
        Some(r#"{"github":"http://localhost:8091","jira":"http://localhost:8092"}"#)
    );
}

/// What the kubelet makes of a value: `$$` is a dollar, `$(NAME)` a variable.
fn expanded(text: &str) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let reference = after.strip_prefix('(').and_then(|it| it.split_once(')'));
        if let Some(after) = after.strip_prefix('$') {
            expanded.push('$');
            rest = after;
        } else if let Some((_, after)) = reference {
            expanded.push_str("<resolved>");
            rest = after;
        } else {
            expanded.push('$');
            rest = after;
        }
    }
    expanded + rest
}

#[test]
fn the_kubelet_replaces_what_is_not_protected() {
    assert_eq!(expanded("a$(HOME) $$ $x $("), "a<resolved> $ $x $(");
}

proptest! {
    #[test]
    fn the_kubelet_hands_over_what_was_written(
        value in "([$()]|\\PC){0,20}",
        word in "([$()]|[a-z]){0,20}",
    ) {
        let mut run = run(Agent::Command { command: vec!["agent".to_owned(), word.clone()], image: None });
        run.environment.insert("VALUE".to_owned(), value.clone());
        let pod = pod_of(&run, &settings());
        let seen = value_of(&pod, AGENT, "VALUE").map(expanded);
        prop_assert_eq!(seen, Some(value));
        let command = container_of(&pod, AGENT).command.clone().unwrap();
        prop_assert_eq!(command.last().map(|it| expanded(it)), Some(word));
    }

    #[test]
    fn only_the_secret_has_secrets(
        token in "[!-~]{8,64}",
        key in "[A-Za-z0-9+/=]{8,64}",
        api_key in "sk-[A-Za-z0-9]{16,64}",
        as_it_is: bool,
    ) {
        let mut settings = existing();
        settings.images.runner = Some("runner".to_owned());
        settings.images.sidecar = Some("sidecar".to_owned());
        settings.model_access.anthropic_api_key = Some(SecretString::from(api_key.clone()));
        let agent = if as_it_is { Agent::RunnerImage } else { command(None) };
        let credentials = Credentials {
            token: Token::new(&token, None).unwrap(),
            session_key: SessionKey::from_text(&key).unwrap(),
            root: KeyId::from_bytes([2; 8]),
            generation: 0,
        };
        let session = session_in(&settings);
        let secret = token_secret(&session, OWNER, &credentials, now());
        let others = json!([
            service_account(&session),
            service(&session, OWNER),
            pod_of(&run(agent), &settings),
            secret.metadata,
        ]);
        let others = others.to_string();
        for one in [&token, &key, &api_key] {
            let quoted = Value::from(one.as_str()).to_string();
            let encoded = json!(ByteString(one.as_bytes().to_vec()));
            prop_assert!(!others.contains(quoted.trim_matches('"')));
            prop_assert!(!others.contains(encoded.as_str().unwrap()));
        }
        let data = secret.data.unwrap();
        prop_assert_eq!(&data["api-token"].0, token.as_bytes());
        prop_assert_eq!(&data["session-key"].0, key.as_bytes());
    }
}
