//! The pod of a run.
//!
//! In: the run, its session and the settings. Out: a pod that meets Pod Security `restricted`, with
//! the operator's overlay laid over it. Pods are created, never applied: what is not right here stays
//! wrong for as long as the session runs.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, LocalObjectReference, Pod, PodSpec, Volume,
};

use super::{
    AGENT, AGUI, AGUI_PORT, command,
    container::{Resources, Variables, pod_security, set, variable},
    image, metadata, overlay, resources, volumes,
};
use crate::backend::{
    Agent, BackendError, DesiredRun,
    kubernetes::{
        names::{GENERATION, SESSION_ID, SESSION_NAME, SessionRef, TOKEN_KEYPAIR},
        settings::KubernetesSettings,
    },
};

/// Seconds from SIGTERM to SIGKILL (contract section 3).
const GRACE_PERIOD: i64 = 60;

/// Resources of the agent's container (contract section 3).
pub(super) const AGENT_RESOURCES: Resources = Resources {
    requests: ["500m", "1Gi"],
    limits: ["2", "4Gi"],
};

/// Largest pod, in bytes of JSON. etcd takes 1.5 MiB; the pod's status and the fields' owners need
/// room too.
const MAX_SIZE: usize = 1024 * 1024;

/// Most characters of a session's name in an annotation, which is for people.
const MAX_NAME: usize = 500;

/// Annotation: what `kubectl logs` and `kubectl exec` mean when they are told nothing.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// What a kind of agent needs of its pod.
pub(super) struct Plan {
    /// In the order in which they start.
    pub(super) init_containers: Vec<Container>,
    /// The agent's first.
    pub(super) containers: Vec<Container>,
    /// Beside those that all agents have.
    pub(super) volumes: Vec<Volume>,
}

/// The pod of a run.
///
/// # Errors
/// `Impossible` when an image is not set that it needs, or when it would be larger than an object
/// may be.
pub(crate) fn pod(
    run: &DesiredRun,
    session: &SessionRef,
    owner_uid: &str,
    settings: &KubernetesSettings,
) -> Result<Pod, BackendError> {
    let plan = match &run.agent {
        Agent::Command { command, image } => {
            command::plan(run, command, image.as_deref(), &session.namespace, settings)?
        }
        Agent::RunnerImage => image::plan(run, &session.namespace, settings)?,
    };
    let annotations = [
        (SESSION_ID, session.id.as_str().to_owned()),
        (SESSION_NAME, run.name.chars().take(MAX_NAME).collect()),
        (GENERATION, run.generation.to_string()),
        (TOKEN_KEYPAIR, run.keypair.to_string()),
        (DEFAULT_CONTAINER, AGENT.to_owned()),
    ];
    let annotations = annotations.map(|(name, value)| (name.to_owned(), value));
    let mut pod = Pod {
        metadata: metadata(session, session.pod(), Some(owner_uid), annotations.into()),
        spec: Some(spec(plan, session, settings)),
        status: None,
    };
    if let Some(template) = &settings.overlay {
        overlay::lay_over(&mut pod, template);
    }
    resources::override_agent(&mut pod, &run.resources);
    check_size(&pod)?;
    Ok(pod)
}

fn spec(plan: Plan, session: &SessionRef, settings: &KubernetesSettings) -> PodSpec {
    let mut volumes = vec![
        volumes::token(session),
        volumes::empty(volumes::WORKSPACE),
        volumes::empty(volumes::HOME),
        volumes::empty(volumes::TMP),
    ];
    volumes.extend(settings.pods.service_ca.as_deref().map(volumes::service_ca));
    volumes.extend(plan.volumes);
    let pull_secret = settings.images.pull_secret.as_ref();
    let pull_secret = pull_secret.map(|name| vec![LocalObjectReference { name: name.clone() }]);
    PodSpec {
        service_account_name: Some(session.service_account()),
        automount_service_account_token: Some(false),
        // Variables of all Services of the namespace: nothing that an agent should be told.
        enable_service_links: Some(false),
        restart_policy: Some("Never".to_owned()),
        termination_grace_period_seconds: Some(GRACE_PERIOD),
        security_context: Some(pod_security(settings.pods.user)),
        image_pull_secrets: pull_secret,
        init_containers: (!plan.init_containers.is_empty()).then_some(plan.init_containers),
        containers: plan.containers,
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

/// The environment of the run, and what holds in every pod. That wins: the paths are these, whatever
/// a session says.
pub(super) fn agent_variables(run: &DesiredRun, namespace: &str) -> Variables {
    let of_run = run.environment.iter();
    let mut variables: Variables = of_run
        .map(|(name, value)| (name.clone(), variable(name, value)))
        .collect();
    set(
        &mut variables,
        [
            ("HOME", volumes::HOME_FOLDER.to_owned()),
            ("WORKSPACE_PATH", volumes::WORKSPACE_FOLDER.to_owned()),
            ("AGENTIC_SESSION_NAMESPACE", namespace.to_owned()),
        ],
    );
    if let Some(direct) = without_proxy(&run.environment) {
        set(&mut variables, [("NO_PROXY", direct)]);
    }
    variables
}

/// `NO_PROXY` with this pod itself: no proxy reaches what listens on its loopback. None where there
/// is no proxy.
fn without_proxy(environment: &BTreeMap<String, String>) -> Option<String> {
    let has_proxy = |name: &str| environment.get(name).is_some_and(|url| !url.is_empty());
    if !["HTTP_PROXY", "HTTPS_PROXY"].into_iter().any(has_proxy) {
        return None;
    }
    let given = environment.get("NO_PROXY").map_or("", String::as_str);
    let given = given.split(',').map(str::trim).filter(|it| !it.is_empty());
    let mut hosts: Vec<&str> = given.collect();
    for own in ["localhost", "127.0.0.1", "::1"] {
        if !hosts.contains(&own) {
            hosts.push(own);
        }
    }
    Some(hosts.join(","))
}

/// The port at which existing API servers reach the agent.
pub(super) fn agui_port() -> ContainerPort {
    ContainerPort {
        name: Some(AGUI.to_owned()),
        container_port: AGUI_PORT,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

/// An image that must be set.
///
/// # Errors
/// `Impossible` when it is not.
pub(super) fn required<'a>(
    image: Option<&'a String>,
    reason: &'static str,
    setting: &str,
) -> Result<&'a str, BackendError> {
    image
        .map(String::as_str)
        .ok_or_else(|| BackendError::Impossible {
            reason,
            message: format!("no image is set for it; the control plane needs {setting}"),
        })
}

fn check_size(pod: &Pod) -> Result<(), BackendError> {
    let size = serde_json::to_vec(pod).map(|json| json.len());
    let size = size.map_err(|source| BackendError::Failed {
        action: "write down the pod of a session",
        source: Box::new(source),
    })?;
    if size <= MAX_SIZE {
        return Ok(());
    }
    Err(BackendError::Impossible {
        reason: "PodTooLarge",
        message: format!(
            "its pod would have {size} bytes, mostly environment and command; at most {MAX_SIZE} \
             are possible"
        ),
    })
}
