//! Snapshots of all kinds of sessions, and what must hold for each of them.

use std::time::{Duration, SystemTime};

use ambient_shared::{proof::SessionKey, session::SessionId, token::Token};
use k8s_openapi::api::core::v1::{Container, Pod, PodTemplateSpec};
use proptest::prelude::*;
use secrecy::SecretString;
use serde_json::{Value, json};

use super::*;
use crate::backend::{
    Agent, BackendError, DesiredRun, ResourceOverrides,
    kubernetes::settings::{
        Companions, Images, KubernetesSettings, ModelAccess, Platform, PodSettings, PodUser,
        Provider, SecretRef, Vertex,
    },
};

mod restricted;
mod snapshot;

use restricted::assert_restricted;
use snapshot::assert_snapshot;

const OWNER: &str = "11111111-2222-3333-4444-555555555555";
const TOKEN: &str = "the-secret-token";
const KEY: &str = "the-secret-key";
const API_KEY: &str = "the-secret-api-key";

fn settings() -> KubernetesSettings {
    KubernetesSettings {
        namespace: "ambient-code".to_owned(),
        platform: Platform::Standard,
        images: Images {
            agent: Some("quay.io/team/agent:1".to_owned()),
            runner: Some("quay.io/ambient/runner:1".to_owned()),
            sidecar: Some("quay.io/ambient/sidecar:1".to_owned()),
            pull_namespace: None,
            pull_secret: None,
        },
        overlay: None,
        upstream: "http://api.ambient-code.svc:8000".to_owned(),
        grpc_upstream: "http://api.ambient-code.svc:8001".to_owned(),
        model_access: ModelAccess::default(),
        companions: Companions::default(),
        pods: PodSettings::default(),
    }
}

fn session_in(settings: &KubernetesSettings) -> SessionRef {
    let id = SessionId::parse("01991F2E-0000-7000-8000-000000000001").unwrap();
    SessionRef::new(&id, "Team", &settings.namespace_of("Team")).unwrap()
}

fn run(agent: Agent) -> DesiredRun {
    let variables = [
        ("SESSION_ID", "01991F2E-0000-7000-8000-000000000001"),
        (
            "AMBIENT_CP_TOKEN_URL",
            "http://cp.ambient-code.svc:8080/token",
        ),
        (
            "AMBIENT_CP_TOKEN_PUBLIC_KEY",
            "-----BEGIN PUBLIC KEY-----\n",
        ),
        ("AMBIENT_API_URL", "http://api.ambient-code.svc:8000"),
        ("AGENTIC_SESSION_NAMESPACE", "team"),
        ("INITIAL_PROMPT", "cost: $5, $(HOME) and $$"),
        ("LOG_LEVEL", "info"),
    ];
    DesiredRun {
        id: SessionId::parse("01991F2E-0000-7000-8000-000000000001").unwrap(),
        generation: 2,
        name: "my session".to_owned(),
        project: "Team".to_owned(),
        agent,
        environment: variables
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        resources: ResourceOverrides::default(),
    }
}

fn command(image: Option<&str>) -> Agent {
    let words = ["agent", "--price", "$(PRICE)"];
    Agent::Command {
        command: words.map(ToOwned::to_owned).into(),
        image: image.map(ToOwned::to_owned),
    }
}

fn pod_of(run: &DesiredRun, settings: &KubernetesSettings) -> Pod {
    pod(run, &session_in(settings), OWNER, settings).unwrap()
}

fn refusal(run: &DesiredRun, settings: &KubernetesSettings) -> (&'static str, String) {
    match pod(run, &session_in(settings), OWNER, settings) {
        Err(BackendError::Impossible { reason, message }) => (reason, message),
        other => panic!("{other:?}"),
    }
}

fn container_of<'a>(pod: &'a Pod, name: &str) -> &'a Container {
    let spec = pod.spec.as_ref().unwrap();
    let mut all = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers);
    all.find(|it| it.name == name)
        .unwrap_or_else(|| panic!("no container {name}"))
}

fn value_of<'a>(pod: &'a Pod, container: &str, variable: &str) -> Option<&'a str> {
    let variables = container_of(pod, container).env.iter().flatten();
    let mut values = variables.filter(|it| it.name == variable);
    let value = values.next()?.value.as_deref();
    assert!(values.next().is_none(), "{variable} twice");
    value
}

fn overlay(template: Value) -> Option<Box<PodTemplateSpec>> {
    Some(serde_json::from_value(template).unwrap())
}

fn credentials() -> Credentials {
    let expires_at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_600);
    Credentials {
        token: Token::new(TOKEN, Some(expires_at)).unwrap(),
        session_key: SessionKey::from_text(KEY).unwrap(),
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_900)
}

/// Settings of an existing installation, with everything that can be beside a runner.
fn existing() -> KubernetesSettings {
    let images = [
        (Provider::Github, "quay.io/mcp/github:1"),
        (Provider::Jira, "quay.io/mcp/jira:1"),
        (Provider::Kubernetes, "quay.io/mcp/k8s:1"),
        (Provider::Google, "quay.io/mcp/google:1"),
    ];
    KubernetesSettings {
        images: Images {
            agent: Some("quay.io/team/existing-runner:1".to_owned()),
            pull_secret: Some("pull".to_owned()),
            ..Images::default()
        },
        model_access: ModelAccess {
            anthropic_api_key: Some(SecretString::from(API_KEY)),
            vertex: Some(Vertex {
                secret: Some(SecretRef {
                    namespace: "ambient-code".to_owned(),
                    name: "vertex-key".to_owned(),
                }),
                variables: [(
                    "ANTHROPIC_VERTEX_PROJECT_ID".to_owned(),
                    "our-project".to_owned(),
                )]
                .into(),
            }),
        },
        companions: Companions {
            mcp: Some("quay.io/mcp/ambient:1".to_owned()),
            mcp_api_server_url: Some("http://mcp-api:8000".to_owned()),
            credentials: images
                .map(|(provider, image)| (provider, image.to_owned()))
                .into(),
        },
        pods: PodSettings {
            service_ca: Some("openshift-service-ca.crt".to_owned()),
            ..PodSettings::default()
        },
        ..settings()
    }
}

/// An overlay as operators write it.
fn usual_overlay() -> Option<Box<PodTemplateSpec>> {
    overlay(json!({
        "metadata": {
            "labels": {"cost-center": "42"},
            "annotations": {"example.com/note": "hello"},
        },
        "spec": {
            "nodeSelector": {"pool": "agents"},
            "tolerations": [{"key": "agents", "operator": "Exists"}],
            "priorityClassName": "batch",
            "containers": [
                {
                    "name": "ambient-code-runner",
                    "env": [
                        {"name": "LOG_LEVEL", "value": "debug"},
                        {"name": "EXTRA", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    ],
                    "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": true}],
                    "resources": {"limits": {"memory": "6Gi"}},
                },
                {"name": "ambient-mcp", "resources": {"limits": {"memory": "1Gi"}}},
                {
                    "name": "logs",
                    "image": "quay.io/team/logs:1",
                    "securityContext": {
                        "allowPrivilegeEscalation": false,
                        "capabilities": {"drop": ["ALL"]},
                    },
                },
            ],
            "initContainers": [
                {"name": "ambient-sidecar", "resources": {"limits": {"memory": "512Mi"}}},
            ],
            "volumes": [
                {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": true}},
                {"name": "workspace", "emptyDir": {"sizeLimit": "20Gi"}},
            ],
        },
    }))
}

#[test]
fn a_sessions_objects_are_these() {
    let settings = settings();
    let session = session_in(&settings);
    let objects = json!([
        service_account(&session),
        token_secret(&session, OWNER, &credentials(), now()),
        service(&session, OWNER),
    ]);
    assert_snapshot("objects", &objects);
}

#[test]
fn a_command_runs_in_this_pod() {
    let pod = pod_of(&run(command(None)), &settings());
    assert_snapshot("command", &json!(pod));
    assert_restricted(&pod);
}

#[test]
fn a_command_in_its_own_image_with_an_overlay_runs_in_this_pod() {
    let settings = KubernetesSettings {
        overlay: usual_overlay(),
        pods: PodSettings {
            service_ca: Some("openshift-service-ca.crt".to_owned()),
            ..PodSettings::default()
        },
        ..settings()
    };
    let mut run = run(command(Some("docker.io/library/python:3.14")));
    run.resources.requests = [("cpu".to_owned(), "3".to_owned())].into();
    run.resources.limits = [("memory".to_owned(), "8Gi".to_owned())].into();
    let pod = pod_of(&run, &settings);
    assert_snapshot("command_with_overlay", &json!(pod));
    assert_restricted(&pod);
}

#[test]
fn an_existing_runner_image_runs_in_this_pod() {
    let mut run = run(Agent::RunnerImage);
    run.environment.extend(
        [
            ("HTTPS_PROXY", "http://proxy:3128"),
            ("NO_PROXY", "svc, localhost"),
            (
                "CREDENTIAL_IDS",
                r#"{"github":"c1","jira":"c2","kubeconfig":"c3","google":"c4"}"#,
            ),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned())),
    );
    let pod = pod_of(&run, &existing());
    assert_snapshot("runner_image", &json!(pod));
    assert_restricted(&pod);
}

#[test]
fn with_a_tenant_operator_a_session_has_these_objects() {
    let settings = KubernetesSettings {
        platform: Platform::Mpp {
            config_namespace: "ambient-code--config".to_owned(),
        },
        companions: Companions {
            mcp: Some("quay.io/mcp/ambient:1".to_owned()),
            ..Companions::default()
        },
        pods: PodSettings {
            user: PodUser::Platform,
            ..PodSettings::default()
        },
        ..settings()
    };
    let session = session_in(&settings);
    let pod = pod_of(&run(Agent::RunnerImage), &settings);
    let objects = json!([service_account(&session), pod]);
    assert_snapshot("mpp", &objects);
    assert_restricted(&pod);
}

#[test]
fn a_token_without_times_is_as_old_as_its_secret() {
    let session = session_in(&settings());
    let credentials = Credentials {
        token: Token::new("opaque", None).unwrap(),
        ..credentials()
    };
    let secret = token_secret(&session, OWNER, &credentials, now());
    let annotations = secret.metadata.annotations.unwrap();
    assert_eq!(annotations[TOKEN_ISSUED_AT], "2027-01-15T08:00:00Z");
    assert!(!annotations.contains_key(TOKEN_EXPIRES_AT));
}

#[test]
fn an_image_that_is_not_set_is_named_by_its_setting() {
    let mut without = settings();
    without.images = Images::default();
    let (reason, message) = refusal(&run(command(None)), &without);
    assert_eq!(reason, "RunnerImageMissing");
    assert!(message.contains("AMBIENT_RUNNER_IMAGE"), "{message}");

    without.images.runner = Some("runner".to_owned());
    let (reason, message) = refusal(&run(command(None)), &without);
    assert_eq!(reason, "SidecarImageMissing");
    assert!(message.contains("AMBIENT_SIDECAR_IMAGE"), "{message}");

    without.images.sidecar = Some("sidecar".to_owned());
    let (reason, message) = refusal(&run(command(None)), &without);
    assert_eq!(reason, "AgentImageMissing");
    assert!(message.contains("RUNNER_IMAGE"), "{message}");
    assert_eq!(
        refusal(&run(Agent::RunnerImage), &without).0,
        "AgentImageMissing"
    );
    pod_of(&run(command(Some("agent"))), &without);
}

#[test]
fn a_pod_that_no_object_can_hold_is_impossible() {
    let mut run = run(command(None));
    let value = "\n".repeat(100 * 1024);
    let variables = (0..6).map(|number| (format!("LONG_{number}"), value.clone()));
    run.environment.extend(variables);
    let (reason, message) = refusal(&run, &settings());
    assert_eq!(reason, "PodTooLarge");
    assert!(message.contains("environment"), "{message}");
}

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

/// Says everything that is not an overlay's to say.
fn hostile_overlay() -> Option<Box<PodTemplateSpec>> {
    overlay(json!({
        "metadata": {
            "name": "other",
            "namespace": "other",
            "labels": {"ambient-code.io/session-id": "other", "ambient-code.io/managed": "false"},
            "annotations": {"ambient-code.io/generation": "9"},
            "ownerReferences": [],
        },
        "spec": {
            "serviceAccountName": "admin",
            "serviceAccount": "admin",
            "automountServiceAccountToken": true,
            "restartPolicy": "Always",
            "ephemeralContainers": [{"name": "debug", "image": "x"}],
            "containers": [{
                "name": "ambient-code-runner",
                "image": "other",
                "command": ["other"],
                "args": ["other"],
                "env": [{"name": "SESSION_ID", "value": "other"}],
                "volumeMounts": [
                    {"name": "other", "mountPath": "/var/run/secrets/ambient/"},
                    {"name": "other", "mountPath": "/var/run/secrets/ambient", "subPath": "x"},
                ],
            }],
            "initContainers": [{"name": "ambient-sidecar", "restartPolicy": "Never"}],
            "volumes": [
                {"name": "ambient-token", "secret": {"secretName": "other"}},
                {"name": "other", "emptyDir": {}},
            ],
        },
    }))
}

#[test]
fn an_overlay_cannot_make_the_pod_somebody_elses() {
    let plain = pod_of(&run(command(None)), &settings());
    let settings = KubernetesSettings {
        overlay: hostile_overlay(),
        ..settings()
    };
    let mut pod = pod_of(&run(command(None)), &settings);
    let volumes = pod.spec.as_mut().unwrap().volumes.as_mut().unwrap();
    volumes.retain(|volume| volume.name != "other");
    assert_eq!(pod, plain);
}

#[test]
fn an_overlay_that_tries_is_refused_with_all_that_is_wrong() {
    let refused = check_overlay(&hostile_overlay().unwrap()).unwrap_err();
    for what in [
        "metadata.labels[ambient-code.io/session-id]",
        "metadata.labels[ambient-code.io/managed]",
        "metadata.annotations[ambient-code.io/generation]",
        "spec.serviceAccountName",
        "spec.serviceAccount",
        "spec.automountServiceAccountToken",
        "spec.restartPolicy",
        "spec.ephemeralContainers",
        "spec.volumes[ambient-token]",
        "image of ambient-code-runner",
        "command of ambient-code-runner",
        "args of ambient-code-runner",
        "the variable SESSION_ID of ambient-code-runner",
        "the mount at /var/run/secrets/ambient of ambient-code-runner",
        "restartPolicy of ambient-sidecar",
    ] {
        assert!(refused.contains(what), "{what} not in {refused}");
    }
    assert_eq!(check_overlay(&usual_overlay().unwrap()), Ok(()));
}

#[test]
fn an_overlay_replaces_a_volume_and_a_variable_as_a_whole() {
    let settings = KubernetesSettings {
        overlay: overlay(json!({"spec": {
            "containers": [{"name": AGENT, "env": [
                {"name": "INITIAL_PROMPT", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
            ]}],
            "volumes": [{"name": "workspace", "persistentVolumeClaim": {"claimName": "w"}}],
        }})),
        ..settings()
    };
    let pod = pod_of(&run(command(None)), &settings);
    let variables = container_of(&pod, AGENT).env.as_ref().unwrap();
    let prompt: Vec<_> = variables
        .iter()
        .filter(|it| it.name == "INITIAL_PROMPT")
        .collect();
    assert_eq!(prompt.len(), 1);
    assert_eq!(prompt[0].value, None);
    let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
    let workspace: Vec<_> = volumes.iter().filter(|it| it.name == "workspace").collect();
    assert_eq!(workspace.len(), 1);
    assert_eq!(workspace[0].empty_dir, None);
}

/// Requests and limits of the agent with this asked for, and the operator's overlay of both.
fn resources_with(overlaid: Value, requests: Value, limits: Value) -> Value {
    let settings = KubernetesSettings {
        overlay: overlay(json!({"spec": {"containers": [{"name": AGENT, "resources": overlaid}]}})),
        ..settings()
    };
    let mut run = run(command(None));
    run.resources.requests = serde_json::from_value(requests).unwrap();
    run.resources.limits = serde_json::from_value(limits).unwrap();
    let pod = pod_of(&run, &settings);
    json!(container_of(&pod, AGENT).resources)
}

#[test]
fn what_a_session_asks_for_moves_what_would_contradict_it() {
    let usual = json!({});
    for (overlaid, requests, limits, expected) in [
        (
            usual.clone(),
            json!({}),
            json!({}),
            json!({"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}}),
        ),
        (
            usual.clone(),
            json!({"cpu": "3"}),
            json!({}),
            json!({"requests": {"cpu": "3", "memory": "1Gi"}, "limits": {"cpu": "3", "memory": "4Gi"}}),
        ),
        (
            usual.clone(),
            json!({}),
            json!({"cpu": "0.25", "memory": "512Mi"}),
            json!({"requests": {"cpu": "0.25", "memory": "512Mi"}, "limits": {"cpu": "0.25", "memory": "512Mi"}}),
        ),
        (
            usual,
            json!({"memory": "2Gi"}),
            json!({"memory": "8Gi"}),
            json!({"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"cpu": "2", "memory": "8Gi"}}),
        ),
        (
            json!({"requests": {"cpu": "100m"}, "limits": {"memory": "16Gi"}}),
            json!({"memory": "5Gi"}),
            json!({}),
            json!({"requests": {"cpu": "100m", "memory": "5Gi"}, "limits": {"cpu": "2", "memory": "16Gi"}}),
        ),
    ] {
        assert_eq!(resources_with(overlaid, requests, limits), expected);
    }
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
