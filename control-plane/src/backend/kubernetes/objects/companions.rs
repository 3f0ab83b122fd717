//! The containers beside existing runner images (contract section 6).
//!
//! Each fetches its own token; none of them mounts the session's Secret. One for credentials is told
//! the id of its own credential alone. They join when their images are set, and where it is known
//! which credentials the session has ([`CREDENTIAL_IDS`]), only those of these.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, ContainerPort, Volume};
use serde_json::json;

use super::{
    container::{Resources, Variables, container, mount, set},
    image::service_ca,
    volumes,
};
use crate::backend::{
    DesiredRun,
    kubernetes::settings::{KubernetesSettings, Platform, Provider},
};

/// Variable: ids of the session's credentials by provider, a JSON object. The control plane's own to
/// set.
pub(super) const CREDENTIAL_IDS: &str = "CREDENTIAL_IDS";

const MCP: &str = "ambient-mcp";
const MCP_PORT: i32 = 8090;

const MCP_RESOURCES: Resources = Resources {
    requests: ["100m", "128Mi"],
    limits: ["500m", "256Mi"],
};

const CREDENTIAL_RESOURCES: Resources = Resources {
    requests: ["100m", "256Mi"],
    limits: ["500m", "512Mi"],
};

/// What the run gets of them.
#[derive(Default)]
pub(super) struct Companions {
    pub(super) containers: Vec<Container>,
    pub(super) volumes: Vec<Volume>,
    /// How the runner finds them.
    pub(super) variables_of_runner: Vec<(&'static str, String)>,
    /// Whether they fetch the credentials in the runner's place.
    pub(super) hold_credentials: bool,
}

/// A provider's container.
struct Kind {
    /// As the API server calls the provider.
    provider: &'static str,
    name: &'static str,
    port: i32,
}

/// Name and port of a provider's container, as existing runner images know them.
fn kind(provider: Provider) -> Kind {
    let (provider, name, port) = match provider {
        Provider::Github => ("github", "credential-github", 8091),
        Provider::Jira => ("jira", "credential-jira", 8092),
        Provider::Kubernetes => ("kubeconfig", "credential-k8s", 8093),
        Provider::Google => ("google", "credential-google", 8094),
    };
    Kind {
        provider,
        name,
        port,
    }
}

/// Names of all of them.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let providers = [
        Provider::Github,
        Provider::Jira,
        Provider::Kubernetes,
        Provider::Google,
    ];
    let names = providers.into_iter().map(|provider| kind(provider).name);
    std::iter::once(MCP).chain(names)
}

/// The containers that join this run.
pub(super) fn plan(run: &DesiredRun, namespace: &str, settings: &KubernetesSettings) -> Companions {
    let mut companions = Companions::default();
    let common = common_variables(run, namespace, settings);
    if let Some(image) = &settings.companions.mcp {
        let mut variables = common.clone();
        set(
            &mut variables,
            [
                ("MCP_TRANSPORT", "sse".to_owned()),
                ("MCP_BIND_ADDR", format!(":{MCP_PORT}")),
            ],
        );
        companions.add(MCP, "mcp-sse", MCP_PORT, image, variables, settings);
        let url = format!("http://localhost:{MCP_PORT}");
        companions
            .variables_of_runner
            .push(("AMBIENT_MCP_URL", url));
    }
    let known = run.environment.get(CREDENTIAL_IDS);
    let known: Option<BTreeMap<String, String>> =
        known.and_then(|text| serde_json::from_str(text).ok());
    let mut urls = BTreeMap::new();
    for (provider, image) in &settings.companions.credentials {
        let kind = kind(*provider);
        let ids = match &known {
            Some(known) => match known.get(kind.provider) {
                Some(id) => json!({ kind.provider: id }),
                None => continue,
            },
            None => json!({}),
        };
        let mut variables = common.clone();
        set(
            &mut variables,
            [
                (CREDENTIAL_IDS, ids.to_string()),
                ("CREDENTIAL_PROVIDER", kind.provider.to_owned()),
            ],
        );
        companions.add(kind.name, kind.name, kind.port, image, variables, settings);
        urls.insert(kind.provider, format!("http://localhost:{}", kind.port));
    }
    if !urls.is_empty() {
        companions.hold_credentials = true;
        companions.variables_of_runner.extend([
            ("CREDENTIAL_MCP_URLS", json!(urls).to_string()),
            ("CREDENTIAL_SIDECAR_MODE", "true".to_owned()),
        ]);
    }
    companions
}

/// Who the session is, where tokens are and whom to call.
fn common_variables(run: &DesiredRun, namespace: &str, settings: &KubernetesSettings) -> Variables {
    let mut variables = Variables::new();
    let mut pass_on = |name: &'static str| {
        if let Some(value) = run.environment.get(name) {
            set(&mut variables, [(name, value.clone())]);
        }
    };
    for name in [
        "SESSION_ID",
        "AMBIENT_CP_TOKEN_URL",
        "AMBIENT_CP_TOKEN_PUBLIC_KEY",
        "AMBIENT_API_URL",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    ] {
        pass_on(name);
    }
    let (mode, config_namespace) = match &settings.platform {
        Platform::Standard => ("standard", None),
        Platform::Mpp { config_namespace } => ("mpp", Some(config_namespace)),
    };
    set(
        &mut variables,
        [
            ("AGENTIC_SESSION_NAMESPACE", namespace.to_owned()),
            ("PLATFORM_MODE", mode.to_owned()),
            ("HOME", volumes::TMP_FOLDER.to_owned()),
        ],
    );
    if let Some(config_namespace) = config_namespace {
        set(
            &mut variables,
            [("MPP_CONFIG_NAMESPACE", config_namespace.clone())],
        );
    }
    if let Some(url) = &settings.companions.mcp_api_server_url {
        set(&mut variables, [("AMBIENT_API_URL", url.clone())]);
    }
    if settings.pods.service_ca.is_some() {
        set(&mut variables, service_ca());
    }
    variables
}

impl Companions {
    /// One more, with a folder of its own to write to.
    fn add(
        &mut self,
        name: &str,
        port_name: &str,
        port: i32,
        image: &str,
        variables: Variables,
        settings: &KubernetesSettings,
    ) {
        let resources = match name {
            MCP => &MCP_RESOURCES,
            _ => &CREDENTIAL_RESOURCES,
        };
        let tmp = format!("{name}-tmp");
        let mut mounts = vec![mount(&tmp, volumes::TMP_FOLDER)];
        if settings.pods.service_ca.is_some() {
            mounts.push(volumes::service_ca_mount());
        }
        // A port's name has 15 characters at most.
        let port_name: String = port_name.replace("credential", "cred");
        self.volumes.push(volumes::empty(&tmp));
        self.containers.push(Container {
            env: Some(variables.into_values().collect()),
            volume_mounts: Some(mounts),
            ports: Some(vec![ContainerPort {
                name: Some(port_name),
                container_port: port,
                protocol: Some("TCP".to_owned()),
                ..ContainerPort::default()
            }]),
            ..container(name, image, resources)
        });
    }
}
