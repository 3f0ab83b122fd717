//! What the Kubernetes backend needs to know. Parsed and checked before it starts.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::PodTemplateSpec;
use secrecy::SecretString;

/// How session pods are made, and where.
#[derive(Debug, Clone)]
pub struct KubernetesSettings {
    /// The control plane's own namespace.
    pub namespace: String,
    /// Who makes the projects' namespaces.
    pub platform: Platform,
    /// Images of session pods.
    pub images: Images,
    /// What the operator lays over the pod template: node selectors, tolerations, resources, more
    /// volumes. Merged as `kubectl patch` does it (strategic merge).
    pub overlay: Option<Box<PodTemplateSpec>>,
    /// Base URL of the API server's REST, as pods reach it.
    pub upstream: String,
    /// URL of the API server's gRPC, as pods reach it.
    pub grpc_upstream: String,
    /// Model access of existing runner images.
    pub model_access: ModelAccess,
    /// Containers beside existing runner images.
    pub companions: Companions,
    /// What the platform wants of session pods.
    pub pods: PodSettings,
}

/// What the platform wants of session pods.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSettings {
    /// Whom they run as.
    pub user: PodUser,
    /// ConfigMap in each project's namespace with the platform's own certificates, in the file
    /// `service-ca.crt`; on OpenShift `openshift-service-ca.crt`.
    pub service_ca: Option<String>,
}

/// User, group and volume group of session pods.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PodUser {
    /// 65532, as in the images of our own programs.
    #[default]
    Ours,
    /// What the platform gives each namespace, as OpenShift does: any other is refused there.
    Platform,
}

/// Who makes the projects' namespaces (`PLATFORM_MODE`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Platform {
    /// We do: a project's namespace has the project's id, lower case.
    Standard,
    /// A tenant operator does, on a `TenantNamespace` of ours in this namespace; the project's is
    /// then `ambient-code--<project>`.
    Mpp {
        /// `MPP_CONFIG_NAMESPACE`.
        config_namespace: String,
    },
}

/// Images of session pods, and who may pull them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Images {
    /// `RUNNER_IMAGE`: the agent's image, unless a session names another; without a command an
    /// existing runner image that runs as it is.
    pub agent: Option<String>,
    /// `AMBIENT_RUNNER_IMAGE`: has our runner, which is copied beside the agent.
    pub runner: Option<String>,
    /// `AMBIENT_SIDECAR_IMAGE`: has our sidecar.
    pub sidecar: Option<String>,
    /// `RUNNER_IMAGE_NAMESPACE`: the namespace whose image streams the session's namespace may pull
    /// (OpenShift).
    pub pull_namespace: Option<String>,
    /// `IMAGE_PULL_SECRET`: Secret in our own namespace that is copied to the projects'.
    pub pull_secret: Option<String>,
}

/// Model access of existing runner images (contract section 3).
#[derive(Debug, Clone, Default)]
pub struct ModelAccess {
    /// `ANTHROPIC_API_KEY`; handed on by a Secret, never as a value in a pod.
    pub anthropic_api_key: Option<SecretString>,
    /// `USE_VERTEX`, and what goes with it.
    pub vertex: Option<Vertex>,
}

/// Vertex AI in place of the Anthropic API.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vertex {
    /// Secret with the credentials: `VERTEX_SECRET_NAME` in `VERTEX_SECRET_NAMESPACE`.
    pub secret: Option<SecretRef>,
    /// Variables of the runner's container: `ANTHROPIC_VERTEX_PROJECT_ID`, `CLOUD_ML_REGION`.
    pub variables: BTreeMap<String, String>,
}

/// A Secret of somebody else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretRef {
    /// Where.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Containers that join existing runner images when their images are set (contract section 6).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Companions {
    /// `MCP_IMAGE`.
    pub mcp: Option<String>,
    /// `MCP_API_SERVER_URL`: what that container is told, in place of the API server's URL.
    pub mcp_api_server_url: Option<String>,
    /// `GITHUB_MCP_IMAGE`, `JIRA_MCP_IMAGE`, `K8S_MCP_IMAGE`, `GOOGLE_MCP_IMAGE`, by provider.
    pub credentials: BTreeMap<Provider, String>,
}

/// Providers of credentials that have a container of their own, in the order of their ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Provider {
    /// Port 8091.
    Github,
    /// Port 8092.
    Jira,
    /// Port 8093.
    Kubernetes,
    /// Port 8094.
    Google,
}

impl KubernetesSettings {
    /// The namespace of a project.
    pub fn namespace_of(&self, project: &str) -> String {
        let project = project.to_lowercase();
        match &self.platform {
            Platform::Standard => project,
            Platform::Mpp { .. } => format!("ambient-code--{project}"),
        }
    }
}
