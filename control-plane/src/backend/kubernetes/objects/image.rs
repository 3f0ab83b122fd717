//! A pod that runs an existing runner image as it is (contract section 3).
//!
//! The image brings runner and agent; beside it stand the containers of contract section 6 whose
//! images are set.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Container, EnvVar, EnvVarSource, Probe, SecretKeySelector, TCPSocketAction},
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::{
    AGENT, AGUI_PORT,
    companions::{self, CREDENTIAL_IDS},
    container::{Patience, Variables, container, probe, read_only, set, variable},
    pod::{AGENT_RESOURCES, Plan, agent_variables, agui_port, required},
    volumes,
};
use crate::backend::{
    BackendError, DesiredRun,
    kubernetes::{
        projects::objects::{ANTHROPIC_API_KEY, MODEL_ACCESS},
        settings::{KubernetesSettings, Vertex},
    },
};

/// The credentials for Vertex AI.
const VERTEX: &str = "vertex";
/// Variable: their file.
const VERTEX_FILE: &str = "GOOGLE_APPLICATION_CREDENTIALS";
/// Where existing runner images have it by default.
const VERTEX_FILE_DEFAULT: &str = "/app/vertex/ambient-code-key.json";

/// An existing runner image has no other probe that all versions of it have.
const READY: Patience = Patience {
    period: 10,
    timeout: 5,
    failures: 3,
};

/// The containers and volumes of a run of `RUNNER_IMAGE`.
///
/// # Errors
/// `Impossible` when it is not set.
pub(super) fn plan(
    run: &DesiredRun,
    namespace: &str,
    settings: &KubernetesSettings,
) -> Result<Plan, BackendError> {
    let image = required(
        settings.images.agent.as_ref(),
        "AgentImageMissing",
        "RUNNER_IMAGE",
    )?;
    let companions = companions::plan(run, namespace, settings);
    let vertex = settings.model_access.vertex.as_ref();
    let mut variables = agent_variables(run, namespace);
    set(&mut variables, of_runner(run));
    set(&mut variables, of_vertex(vertex.is_some()));
    let mut mounts = volumes::of_agents();
    let mut volumes = companions.volumes;
    if let Some(vertex) = vertex {
        let (file, of_vertex) = vertex_variables(vertex);
        variables.extend(of_vertex);
        if let Some(secret) = &vertex.secret {
            volumes.push(volumes::secret(VERTEX, secret.name.clone(), None));
            let folder = file.rsplit_once('/').map_or("/", |(folder, _)| folder);
            mounts.push(read_only(VERTEX, folder));
        }
    }
    if settings.pods.service_ca.is_some() {
        set(&mut variables, service_ca());
        mounts.push(volumes::service_ca_mount());
    }
    if settings.model_access.anthropic_api_key.is_some() {
        variables.insert(ANTHROPIC_API_KEY.to_owned(), api_key());
    }
    if companions.hold_credentials {
        // They fetch them: the agent needs no name for what it must not fetch.
        variables.remove(CREDENTIAL_IDS);
    }
    set(&mut variables, companions.variables_of_runner);
    let runner = Container {
        env: Some(variables.into_values().collect()),
        volume_mounts: Some(mounts),
        ports: Some(vec![agui_port()]),
        readiness_probe: Some(Probe {
            tcp_socket: Some(TCPSocketAction {
                port: IntOrString::Int(AGUI_PORT),
                ..TCPSocketAction::default()
            }),
            ..probe(&READY)
        }),
        ..container(AGENT, image, &AGENT_RESOURCES)
    };
    let mut containers = vec![runner];
    containers.extend(companions.containers);
    Ok(Plan {
        init_containers: Vec::new(),
        containers,
        volumes,
    })
}

/// How existing runner images are told to serve.
fn of_runner(run: &DesiredRun) -> Vec<(&'static str, String)> {
    let mut variables = vec![
        ("AGUI_PORT", AGUI_PORT.to_string()),
        ("USE_AGUI", "true".to_owned()),
    ];
    let level = run.environment.get("LOG_LEVEL");
    if level.is_some_and(|level| level.eq_ignore_ascii_case("debug")) {
        variables.push(("DEBUG", "true".to_owned()));
    }
    variables
}

fn of_vertex(used: bool) -> [(&'static str, String); 2] {
    let flag = if used { "1" } else { "0" };
    ["USE_VERTEX", "CLAUDE_CODE_USE_VERTEX"].map(|name| (name, flag.to_owned()))
}

/// The file of the credentials, and all variables of Vertex AI.
fn vertex_variables(vertex: &Vertex) -> (String, Variables) {
    let mut given: BTreeMap<&str, &str> = BTreeMap::from([
        // No machine of the provider is asked: pods elsewhere would wait for an answer.
        ("GCE_METADATA_HOST", "metadata.invalid"),
        ("GCE_METADATA_TIMEOUT", "1"),
        ("CLOUD_ML_REGION", "global"),
    ]);
    if vertex.secret.is_some() {
        given.insert(VERTEX_FILE, VERTEX_FILE_DEFAULT);
    }
    let set = vertex.variables.iter();
    given.extend(set.map(|(name, value)| (name.as_str(), value.as_str())));
    let file = given
        .get(VERTEX_FILE)
        .copied()
        .unwrap_or_default()
        .to_owned();
    let variables = given.into_iter();
    let variables = variables.map(|(name, value)| (name.to_owned(), variable(name, value)));
    (file, variables.collect())
}

/// Whom existing images trust, for gRPC and for everything else.
pub(super) fn service_ca() -> [(&'static str, String); 3] {
    [
        "AMBIENT_GRPC_CA_CERT_FILE",
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
    ]
    .map(|name| (name, volumes::SERVICE_CA_FILE.to_owned()))
}

/// From the Secret that each project's namespace has.
fn api_key() -> EnvVar {
    EnvVar {
        name: ANTHROPIC_API_KEY.to_owned(),
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: MODEL_ACCESS.to_owned(),
                key: ANTHROPIC_API_KEY.to_owned(),
                optional: None,
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}
