//! A pod that starts an agent's command under our runner.
//!
//! The agent's image is anybody's: an init container copies the runner, a static program, into a
//! volume, and the agent's container runs it from there. The sidecar is an init container that
//! restarts: it is there before the agent, and ends with it.

use ambient_shared::telemetry;
use k8s_openapi::api::core::v1::{Container, ContainerPort};

use super::{
    AGENT, BOT_TOKEN, SESSION_KEY,
    container::{
        Patience, Resources, Variables, container, http_probe, literal, mount, read_only, set,
    },
    pod::{AGENT_RESOURCES, Plan, agent_variables, agui_port, required},
    volumes,
};
use crate::backend::{BackendError, DesiredRun, kubernetes::settings::KubernetesSettings};

/// The init container that copies the runner.
pub(super) const INSTALL: &str = "install-runner";
/// The container beside the agent.
pub(super) const SIDECAR: &str = "ambient-sidecar";

/// Ports of `/healthz`, `/readyz` and `/metrics`, where no agent is likely to listen.
const RUNNER_ADMIN: u16 = 18001;
const SIDECAR_ADMIN: u16 = 18002;

/// Where our programs are in their images.
const RUNNER: &str = "/ambient-runner";
const SIDECAR_PROGRAM: &str = "/ambient-sidecar";

/// The copy holds the program in memory once, some 10 MB.
const INSTALL_RESOURCES: Resources = Resources {
    requests: ["10m", "16Mi"],
    limits: ["500m", "128Mi"],
};

/// 6 MB at rest; what the proxy keeps of requests to replay them is bounded.
const SIDECAR_RESOURCES: Resources = Resources {
    requests: ["10m", "32Mi"],
    limits: ["1", "256Mi"],
};

/// A sidecar is there in milliseconds; the agent waits for it no longer than this, then it is
/// started again.
const SIDECAR_START: Patience = Patience {
    period: 1,
    timeout: 5,
    failures: 60,
};

/// A restart of the sidecar keeps its addresses, so it may be tried early.
const SIDECAR_LIFE: Patience = Patience {
    period: 10,
    timeout: 5,
    failures: 6,
};

const READY: Patience = Patience {
    period: 5,
    timeout: 5,
    failures: 3,
};

/// A runner that does not answer for 5 minutes is beyond help. Not earlier: what ends it ends the
/// session, and an agent may take all of the processor for a while.
const RUNNER_LIFE: Patience = Patience {
    period: 30,
    timeout: 10,
    failures: 10,
};

/// The containers and volumes of a run that starts this command.
///
/// # Errors
/// `Impossible` when an image is not set that it needs.
pub(super) fn plan(
    run: &DesiredRun,
    command: &[String],
    image: Option<&str>,
    namespace: &str,
    settings: &KubernetesSettings,
) -> Result<Plan, BackendError> {
    let images = &settings.images;
    let runner_image = required(
        images.runner.as_ref(),
        "RunnerImageMissing",
        "AMBIENT_RUNNER_IMAGE",
    )?;
    let sidecar_image = required(
        images.sidecar.as_ref(),
        "SidecarImageMissing",
        "AMBIENT_SIDECAR_IMAGE",
    )?;
    let image = match image {
        Some(image) => image,
        None => required(images.agent.as_ref(), "AgentImageMissing", "RUNNER_IMAGE")?,
    };
    let volumes = vec![
        volumes::empty(volumes::PROGRAMS),
        volumes::handover(),
        volumes::empty(volumes::SPOOL),
        volumes::empty(volumes::SIDECAR),
    ];
    Ok(Plan {
        init_containers: vec![install(runner_image), sidecar(run, sidecar_image, settings)],
        containers: vec![agent(run, command, image, namespace, settings)],
        volumes,
    })
}

fn install(image: &str) -> Container {
    Container {
        command: Some(owned(&[RUNNER, "install", volumes::PROGRAMS_FOLDER])),
        volume_mounts: Some(vec![mount(volumes::PROGRAMS, volumes::PROGRAMS_FOLDER)]),
        termination_message_policy: Some(LOG_AS_LAST_WORDS.to_owned()),
        ..container(INSTALL, image, &INSTALL_RESOURCES)
    }
}

/// Of our own programs, whose logs hold no secrets: a panic is shown, too.
const LOG_AS_LAST_WORDS: &str = "FallbackToLogsOnError";

fn sidecar(run: &DesiredRun, image: &str, settings: &KubernetesSettings) -> Container {
    let mut variables = Variables::new();
    set(
        &mut variables,
        [
            ("AMBIENT_UPSTREAM_URL", settings.upstream.clone()),
            ("AMBIENT_UPSTREAM_GRPC_URL", settings.grpc_upstream.clone()),
            ("AMBIENT_BOT_TOKEN_FILE", token_file(BOT_TOKEN)),
            ("AMBIENT_SIDECAR_ADDRESSES", addresses()),
            ("AMBIENT_ADMIN_LISTEN", everywhere(SIDECAR_ADMIN)),
        ],
    );
    // One that it would not start with is the session's own, and nothing that the sidecar needs.
    let level = run.environment.get("LOG_LEVEL");
    if let Some(level) = level.filter(|level| telemetry::parse_level(level).is_ok()) {
        set(&mut variables, [("LOG_LEVEL", level.clone())]);
    }
    let mut mounts = vec![
        volumes::token_mount(),
        mount(volumes::SIDECAR, volumes::SIDECAR_FOLDER),
    ];
    if settings.pods.service_ca.is_some() {
        let file = volumes::SERVICE_CA_FILE.to_owned();
        set(&mut variables, [("AMBIENT_CA_FILE", file)]);
        mounts.push(volumes::service_ca_mount());
    }
    Container {
        command: Some(owned(&[SIDECAR_PROGRAM])),
        restart_policy: Some("Always".to_owned()),
        env: Some(variables.into_values().collect()),
        volume_mounts: Some(mounts),
        startup_probe: Some(http_probe("/healthz", SIDECAR_ADMIN, &SIDECAR_START)),
        liveness_probe: Some(http_probe("/healthz", SIDECAR_ADMIN, &SIDECAR_LIFE)),
        readiness_probe: Some(http_probe("/readyz", SIDECAR_ADMIN, &READY)),
        ports: Some(vec![admin_port("sidecar-admin", SIDECAR_ADMIN)]),
        termination_message_policy: Some(LOG_AS_LAST_WORDS.to_owned()),
        ..container(SIDECAR, image, &SIDECAR_RESOURCES)
    }
}

fn agent(
    run: &DesiredRun,
    command: &[String],
    image: &str,
    namespace: &str,
    settings: &KubernetesSettings,
) -> Container {
    let mut variables = agent_variables(run, namespace);
    let handed_over = format!("{}/token", volumes::HANDOVER_FOLDER);
    // Within the volume, which is not the runner's own: it makes a folder that only it may enter.
    let spool = format!("{}/messages", volumes::SPOOL_FOLDER);
    set(
        &mut variables,
        [
            ("AMBIENT_BOT_TOKEN_FILE", token_file(BOT_TOKEN)),
            ("AMBIENT_SESSION_KEY_FILE", token_file(SESSION_KEY)),
            ("AMBIENT_TOKEN_FILE", handed_over),
            ("AMBIENT_SPOOL_DIR", spool),
            ("AMBIENT_SIDECAR_ADDRESSES", addresses()),
            ("AMBIENT_ADMIN_LISTEN", everywhere(RUNNER_ADMIN)),
        ],
    );
    let mut mounts = volumes::of_agents();
    mounts.extend([
        read_only(volumes::PROGRAMS, volumes::PROGRAMS_FOLDER),
        mount(volumes::HANDOVER, volumes::HANDOVER_FOLDER),
        mount(volumes::SPOOL, volumes::SPOOL_FOLDER),
        read_only(volumes::SIDECAR, volumes::SIDECAR_FOLDER),
    ]);
    if settings.pods.service_ca.is_some() {
        let file = volumes::SERVICE_CA_FILE.to_owned();
        set(&mut variables, [("AMBIENT_GRPC_CA_CERT_FILE", file)]);
        mounts.push(volumes::service_ca_mount());
    }
    let runner = format!("{}{RUNNER}", volumes::PROGRAMS_FOLDER);
    let words = [runner.as_str(), "--"].into_iter();
    let words = words
        .map(ToOwned::to_owned)
        .chain(command.iter().map(|word| literal(word)));
    Container {
        command: Some(words.collect()),
        // As in local mode: what it leaves in the working directory is found in the workspace.
        working_dir: Some(volumes::WORKSPACE_FOLDER.to_owned()),
        env: Some(variables.into_values().collect()),
        volume_mounts: Some(mounts),
        ports: Some(vec![agui_port(), admin_port("runner-admin", RUNNER_ADMIN)]),
        readiness_probe: Some(http_probe("/readyz", RUNNER_ADMIN, &READY)),
        liveness_probe: Some(http_probe("/healthz", RUNNER_ADMIN, &RUNNER_LIFE)),
        // The runner's last words, never the agent's: those may hold anything.
        termination_message_policy: Some("File".to_owned()),
        ..container(AGENT, image, &AGENT_RESOURCES)
    }
}

/// A file of the token Secret.
fn token_file(name: &str) -> String {
    format!("{}/{name}", volumes::TOKEN_FOLDER)
}

fn addresses() -> String {
    format!("{}/addresses.json", volumes::SIDECAR_FOLDER)
}

/// Where the kubelet's probes can reach it.
fn everywhere(port: u16) -> String {
    format!("0.0.0.0:{port}")
}

fn admin_port(name: &str, port: u16) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: port.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
