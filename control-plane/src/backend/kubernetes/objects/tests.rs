//! Snapshots of all kinds of sessions, and what must hold for each of them.

use std::time::{Duration, SystemTime};

use ambient_shared::{proof::SessionKey, session::SessionId, token::Token};
use k8s_openapi::api::core::v1::{Container, Pod, PodTemplateSpec};
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
use crate::keypair::id::KeyId;

mod overlay;
mod restricted;
mod snapshot;
mod variables;

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
            agent: Some("registry.example/team/agent:1".to_owned()),
            runner: Some("registry.example/ambient/runner:1".to_owned()),
            sidecar: Some("registry.example/ambient/sidecar:1".to_owned()),
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
        keypair: KeyId::from_bytes([1; 8]),
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

fn overlay_of(template: Value) -> Box<PodTemplateSpec> {
    serde_json::from_value(template).unwrap()
}

fn credentials() -> Credentials {
    let expires_at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_600);
    Credentials {
        token: Token::new(TOKEN, Some(expires_at)).unwrap(),
        session_key: SessionKey::from_text(KEY).unwrap(),
        root: KeyId::from_bytes([2; 8]),
        generation: 0,
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_900)
}

/// Settings of an existing installation, with everything that can be beside a runner.
fn existing() -> KubernetesSettings {
    let images = [
        (Provider::Github, "registry.example/mcp/github:1"),
        (Provider::Jira, "registry.example/mcp/jira:1"),
        (Provider::Kubernetes, "registry.example/mcp/k8s:1"),
        (Provider::Google, "registry.example/mcp/google:1"),
    ];
    KubernetesSettings {
        images: Images {
            agent: Some("registry.example/team/existing-runner:1".to_owned()),
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
            mcp: Some("registry.example/mcp/ambient:1".to_owned()),
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
fn usual_overlay() -> Box<PodTemplateSpec> {
    overlay_of(json!({
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
                    "image": "registry.example/team/logs:1",
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
        overlay: Some(usual_overlay()),
        pods: PodSettings {
            service_ca: Some("openshift-service-ca.crt".to_owned()),
            ..PodSettings::default()
        },
        ..settings()
    };
    let mut run = run(command(Some("hub.example/library/python:3.14")));
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
            mcp: Some("registry.example/mcp/ambient:1".to_owned()),
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
