//! What sessions may ask for in pods.

use super::*;

fn in_pods(limits: PodLimits) -> DesiredSettings {
    DesiredSettings {
        default_agent_command: None,
        place: Place::Pods(limits),
        ..settings()
    }
}

fn limits() -> PodLimits {
    PodLimits {
        default_image: Some("registry.example/team/runner:1".to_owned()),
        allowed_images: vec!["registry.example/team/*".to_owned()],
        ..PodLimits::default()
    }
}

/// A session with these annotations, in pods.
fn annotated_in(settings: &DesiredSettings, annotations: &Value) -> Result<Agent, CannotRun> {
    let session = session(|session| session.annotations = Some(annotations.to_string()));
    desired_run(&session, &[], settings, PUBLIC_KEY).map(|run| run.agent)
}

#[test]
fn in_pods_the_operators_image_runs_as_it_is_where_nobody_names_a_command() {
    let settings = in_pods(limits());
    assert_eq!(annotated_in(&settings, &json!({})), Ok(Agent::RunnerImage));

    let without_image = in_pods(PodLimits::default());
    let refusal = annotated_in(&without_image, &json!({})).unwrap_err();
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
        annotated_in(&settings, &json!({})),
        command("operators", None)
    );
    assert_eq!(annotated_in(&settings, &own), command("own", None));
    let image = "registry.example/team/agent:2";
    let with_image = json!({"ambient-code.io/agent-image": image});
    assert_eq!(
        annotated_in(&settings, &with_image),
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
        annotated_in(&settings, &annotations).map_err(|refusal| refusal.reason)
    };
    assert_eq!(
        refused("registry.example/team/agent:2", false),
        Err("AgentCommandMissing")
    );
    assert!(refused("registry.example/team/agent:2", true).is_ok());
    assert!(refused("registry.example/team/runner:1", true).is_ok());
    for image in [
        "alpine",
        "registry.example/other/agent",
        "evil.org/registry.example/team/agent",
    ] {
        assert_eq!(refused(image, true), Err("AgentImageNotAllowed"), "{image}");
    }
    let long = format!("registry.example/team/{}", "a".repeat(600));
    for image in [
        "registry.example/team/a b",
        "registry.example/team/ü",
        &long,
    ] {
        assert_eq!(refused(image, true), Err("AnnotationMalformed"), "{image}");
    }
}

/// A session that asks for these resources, in pods.
fn asking(text: &str) -> Result<ResourceOverrides, CannotRun> {
    let session = session(|session| session.resource_overrides = Some(text.to_owned()));
    desired_run(&session, &[], &in_pods(limits()), PUBLIC_KEY).map(|run| run.resources)
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
    let refusal = desired_run(&session, &[], &in_pods(strict), PUBLIC_KEY).unwrap_err();
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
fn a_command_has_a_limit() {
    let long = json!(["agent", "x".repeat(131_000)]).to_string();
    let annotations = json!({ "ambient-code.io/agent-command": long });
    let refusal = annotated_in(&in_pods(limits()), &annotations).unwrap_err();
    assert_eq!(refusal.reason, "AnnotationMalformed");
    assert!(refusal.message.contains("KiB"), "{refusal}");
}
