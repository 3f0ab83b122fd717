//! Flags and variables of the control plane on Kubernetes, as they are given (contract section 6).

use std::path::PathBuf;

use clap::Args;

/// A flag is its variable's name in kebab case; secrets have none.
#[derive(Debug, Args)]
pub(in crate::settings) struct Serve {
    /// API server's REST, as this program and session pods reach it.
    #[arg(
        long,
        env = "AMBIENT_API_SERVER_URL",
        default_value = "http://localhost:8000",
        value_name = "URL"
    )]
    pub(in crate::settings) ambient_api_server_url: String,
    /// API server's gRPC, as this program and session pods reach it.
    #[arg(
        long,
        env = "AMBIENT_GRPC_SERVER_ADDR",
        default_value = "localhost:8001",
        value_name = "HOST:PORT"
    )]
    pub(in crate::settings) ambient_grpc_server_addr: String,
    /// Whether that speaks TLS: true or false.
    #[arg(
        long,
        env = "AMBIENT_GRPC_USE_TLS",
        default_value = "false",
        value_name = "BOOL"
    )]
    pub(in crate::settings) ambient_grpc_use_tls: String,
    /// Token URL of the identity provider; its client secret is `OIDC_CLIENT_SECRET`.
    #[arg(long, env = "OIDC_TOKEN_URL", value_name = "URL")]
    pub(in crate::settings) oidc_token_url: Option<String>,
    /// Client id at the identity provider.
    #[arg(long, env = "OIDC_CLIENT_ID", value_name = "ID")]
    pub(in crate::settings) oidc_client_id: Option<String>,
    /// Where sessions' tokens come from: oidc, static (`AMBIENT_API_TOKEN`) or minted [default:
    /// oidc when it is configured, else static].
    #[arg(long, env = "CP_TOKEN_ISSUER", value_name = "KIND")]
    pub(in crate::settings) cp_token_issuer: Option<String>,
    /// Life of minted tokens [default: 15m].
    #[arg(long, env = "CP_TOKEN_TTL", value_name = "DURATION")]
    pub(in crate::settings) cp_token_ttl: Option<String>,
    /// How often tokens of running sessions are looked at: a duration, or off [default: a third
    /// of the tokens' life].
    #[arg(long, env = "CP_REFRESH_INTERVAL", value_name = "DURATION")]
    pub(in crate::settings) cp_refresh_interval: Option<String>,
    /// The control plane's own namespace [default: `NAMESPACE`, else ambient-code].
    #[arg(long, env = "CP_RUNTIME_NAMESPACE", value_name = "NAME")]
    pub(in crate::settings) cp_runtime_namespace: Option<String>,
    /// Where sessions get their tokens; without a host on all addresses.
    #[arg(
        long,
        env = "CP_TOKEN_LISTEN_ADDR",
        default_value = ":8080",
        value_name = "[ADDR]:PORT"
    )]
    pub(in crate::settings) cp_token_listen_addr: String,
    /// PEM file with the certificate, and its chain, that sessions get their tokens over; read
    /// again when it changes. Without it that port speaks plain HTTP.
    #[arg(long, env = "CP_TOKEN_TLS_CERT_FILE", value_name = "FILE")]
    pub(in crate::settings) cp_token_tls_cert_file: Option<PathBuf>,
    /// PEM file with its private key.
    #[arg(long, env = "CP_TOKEN_TLS_KEY_FILE", value_name = "FILE")]
    pub(in crate::settings) cp_token_tls_key_file: Option<PathBuf>,
    /// PEM file with CA certificates that runners are to trust for `CP_TOKEN_URL`, beside those
    /// that they trust already; read again for each session that starts.
    #[arg(long, env = "CP_TOKEN_CA_FILE", value_name = "FILE")]
    pub(in crate::settings) cp_token_ca_file: Option<PathBuf>,
    /// That address as session pods reach it [default:
    /// <http://ambient-control-plane.NAMESPACE.svc:PORT/token>; https with a certificate].
    #[arg(long, env = "CP_TOKEN_URL", value_name = "URL")]
    pub(in crate::settings) cp_token_url: Option<String>,
    /// Where /healthz, /readyz and /metrics are served; without a host on all addresses.
    #[arg(
        long,
        env = "AMBIENT_ADMIN_LISTEN",
        default_value = ":9090",
        value_name = "[ADDR]:PORT"
    )]
    pub(in crate::settings) ambient_admin_listen: String,
    /// Image of agents; without a command an existing runner image, which runs as it is.
    #[arg(long, env = "RUNNER_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) runner_image: Option<String>,
    /// Image that has ambient-runner, which is copied beside each agent.
    #[arg(long, env = "AMBIENT_RUNNER_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) ambient_runner_image: Option<String>,
    /// Image that has ambient-sidecar.
    #[arg(long, env = "AMBIENT_SIDECAR_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) ambient_sidecar_image: Option<String>,
    /// Namespace whose images the projects' namespaces may pull (OpenShift).
    #[arg(long, env = "RUNNER_IMAGE_NAMESPACE", value_name = "NAME")]
    pub(in crate::settings) runner_image_namespace: Option<String>,
    /// Secret in our namespace, copied to the projects' to pull images with.
    #[arg(long, env = "IMAGE_PULL_SECRET", value_name = "NAME")]
    pub(in crate::settings) image_pull_secret: Option<String>,
    /// Log level of runners and sidecars.
    #[arg(long, env = "RUNNER_LOG_LEVEL", value_name = "LEVEL")]
    pub(in crate::settings) runner_log_level: Option<String>,
    /// YAML file with a pod template (`metadata`, `spec`) that is laid over session pods as a
    /// strategic merge: node selector, tolerations, resources, more volumes.
    #[arg(long, env = "AMBIENT_POD_TEMPLATE", value_name = "FILE")]
    pub(in crate::settings) ambient_pod_template: Option<PathBuf>,
    /// Whom session pods run as: ours (user 65532) or platform (what the platform gives each
    /// namespace, as OpenShift does) [default: ours; with a tenant operator platform].
    #[arg(long, env = "AMBIENT_POD_USER", value_name = "WHO")]
    pub(in crate::settings) ambient_pod_user: Option<String>,
    /// `ConfigMap` in each project's namespace with the platform's certificates in the file
    /// `service-ca.crt`, for session pods.
    #[arg(long, env = "AMBIENT_SERVICE_CA", value_name = "NAME")]
    pub(in crate::settings) ambient_service_ca: Option<String>,
    /// The agent of sessions that name none, as a JSON array.
    #[arg(long, env = "AGENT_COMMAND", value_name = "JSON")]
    pub(in crate::settings) agent_command: Option<String>,
    /// Images that sessions may ask for: globs with commas between [default: only
    /// `RUNNER_IMAGE`].
    #[arg(
        long,
        env = "AGENT_IMAGE_ALLOW",
        value_delimiter = ',',
        value_name = "GLOB"
    )]
    pub(in crate::settings) agent_image_allow: Vec<String>,
    /// The most of each resource that a session may ask for: a JSON object of Kubernetes
    /// quantities.
    #[arg(
        long,
        env = "AMBIENT_MAX_RESOURCES",
        default_value = r#"{"cpu":"8","memory":"32Gi"}"#,
        value_name = "JSON"
    )]
    pub(in crate::settings) ambient_max_resources: String,
    /// Who makes the projects' namespaces: standard (this program) or mpp (a tenant operator).
    #[arg(
        long,
        env = "PLATFORM_MODE",
        default_value = "standard",
        value_name = "MODE"
    )]
    pub(in crate::settings) platform_mode: String,
    /// Namespace of the `TenantNamespace` objects in mode mpp.
    #[arg(
        long,
        env = "MPP_CONFIG_NAMESPACE",
        default_value = "ambient-code--config",
        value_name = "NAME"
    )]
    pub(in crate::settings) mpp_config_namespace: String,
    /// Give existing runner images Vertex AI in place of the Anthropic API: true or false.
    #[arg(long, env = "USE_VERTEX", default_value = "false", value_name = "BOOL")]
    pub(in crate::settings) use_vertex: String,
    /// Secret with Vertex credentials.
    #[arg(long, env = "VERTEX_SECRET_NAME", value_name = "NAME")]
    pub(in crate::settings) vertex_secret_name: Option<String>,
    /// Its namespace [default: our own].
    #[arg(long, env = "VERTEX_SECRET_NAMESPACE", value_name = "NAME")]
    pub(in crate::settings) vertex_secret_namespace: Option<String>,
    /// Vertex project.
    #[arg(long, env = "ANTHROPIC_VERTEX_PROJECT_ID", value_name = "ID")]
    pub(in crate::settings) anthropic_vertex_project_id: Option<String>,
    /// Vertex region.
    #[arg(long, env = "CLOUD_ML_REGION", value_name = "REGION")]
    pub(in crate::settings) cloud_ml_region: Option<String>,
    /// Access to the cluster from outside it [default: the pod's own service account].
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub(in crate::settings) kubeconfig: Option<PathBuf>,
    /// File with another token for the projects' namespaces.
    #[arg(long, env = "PROJECT_KUBE_TOKEN_FILE", value_name = "FILE")]
    pub(in crate::settings) project_kube_token_file: Option<PathBuf>,
    /// Limit the rates of the token endpoint: on or off.
    #[arg(
        long,
        env = "CP_RATE_LIMITS",
        default_value = "on",
        value_name = "ON|OFF"
    )]
    pub(in crate::settings) cp_rate_limits: String,
    /// How long it takes at most until another replica leads when the leader was killed.
    #[arg(
        long,
        env = "CP_LEASE_DURATION",
        default_value = "15s",
        value_name = "DURATION"
    )]
    pub(in crate::settings) cp_lease_duration: String,
    /// How long a new key that signs minted tokens is published before it is used: longer than any
    /// API server keeps what it has read of `/.well-known/jwks.json`. The other waits of a rotation
    /// go by it.
    #[arg(
        long,
        env = "CP_KEY_ROTATION_WAIT",
        default_value = "2m",
        value_name = "DURATION"
    )]
    pub(in crate::settings) cp_key_rotation_wait: String,
    /// Give tokens to runners that send no proof, as existing runner images: true or false.
    #[arg(
        long,
        env = "CP_ALLOW_UNPROVEN",
        default_value = "false",
        value_name = "BOOL"
    )]
    pub(in crate::settings) cp_allow_unproven: String,
    /// Image of the container `ambient-mcp` beside existing runner images.
    #[arg(long, env = "MCP_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) mcp_image: Option<String>,
    /// API server as that container is told [default: `AMBIENT_API_SERVER_URL`].
    #[arg(long, env = "MCP_API_SERVER_URL", value_name = "URL")]
    pub(in crate::settings) mcp_api_server_url: Option<String>,
    /// Image of the container `credential-github`.
    #[arg(long, env = "GITHUB_MCP_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) github_mcp_image: Option<String>,
    /// Image of the container `credential-jira`.
    #[arg(long, env = "JIRA_MCP_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) jira_mcp_image: Option<String>,
    /// Image of the container `credential-k8s`.
    #[arg(long, env = "K8S_MCP_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) k8s_mcp_image: Option<String>,
    /// Image of the container `credential-google`.
    #[arg(long, env = "GOOGLE_MCP_IMAGE", value_name = "IMAGE")]
    pub(in crate::settings) google_mcp_image: Option<String>,
}
