//! Our API server and control plane, outside the cluster.

use std::{fs, path::PathBuf};

use ambient_shared::rest::Session;
use ambient_testing::{
    DEADLINE as REQUEST,
    images::Image,
    local::NewSession,
    node::Node,
    programs::{Program, Running},
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{kube::Kube, target::Target};

mod user;

/// The project of the scenarios, and so its namespace.
pub const PROJECT: &str = "ambient-e2e";

/// The control plane's own namespace.
const OWN_NAMESPACE: &str = "ambient-e2e-system";

/// Its ServiceAccount there.
const ACCOUNT: &str = "ambient-control-plane";

/// Ports on the address towards the pods, which is nobody else's: the programs must know each
/// other's before they start.
const REST: u16 = 18_000;
const GRPC: u16 = 18_001;
const TOKENS: u16 = 18_080;

/// Life of a session's token. Too short for use on Kubernetes, of which the control plane warns: a
/// token is due when less is left than [`REFRESH_INTERVAL`], the kubelet's 120 s and a tenth, so 50 s
/// after its issue. That is longer than a slow kubelet takes to swap it.
const TOKEN_LIFE: &str = "200s";

/// How often the ticker looks for tokens that are due.
const REFRESH_INTERVAL: &str = "10s";

/// The whole system on a cluster.
#[derive(Debug)]
pub struct System {
    control_plane: Option<Running>,
    _api_server: Running,
    folder: TempDir,
    service_token: String,
    operator_token: String,
    client: reqwest::Client,
    target: Target,
}

impl System {
    /// Starts API server and control plane, and creates the project.
    ///
    /// # Panics
    /// When one of them does not come up.
    pub async fn start(target: Target) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let service_token = uuid::Uuid::new_v4().to_string();
        let operator_token = uuid::Uuid::new_v4().to_string();
        let address = target.address;
        let mut api_server = Program::new("ambient-api-server")
            .env("AMBIENT_REST_LISTEN", format!("{address}:{REST}"))
            .env("AMBIENT_GRPC_LISTEN", format!("{address}:{GRPC}"))
            .env("AMBIENT_DATABASE", folder.path().join("sessions.db"))
            .env("AMBIENT_API_TOKEN", &service_token)
            .env("AMBIENT_OPERATOR_TOKEN", &operator_token)
            .env(
                "AMBIENT_SESSION_JWKS",
                format!("http://{address}:{TOKENS}/.well-known/jwks.json"),
            )
            .start();
        api_server.listening("rest").await;
        api_server.listening("grpc").await;
        let mut system = Self {
            control_plane: None,
            _api_server: api_server,
            folder,
            service_token,
            operator_token,
            client: reqwest::Client::builder()
                .no_proxy()
                .build()
                .expect("a client"),
            target,
        };
        system.give_rights().await;
        system.start_control_plane().await;
        let project = json!({ "name": PROJECT });
        let (status, answer) = system
            .request(Method::POST, "/projects", Some(project))
            .await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        system
    }

    /// Makes the control plane's namespace and ServiceAccount, with the rights that it asks for and
    /// no others.
    async fn give_rights(&self) {
        let kube = self.kube();
        kube.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {OWN_NAMESPACE}}}}}\n---\n\
             {{apiVersion: v1, kind: ServiceAccount, metadata: \
             {{name: {ACCOUNT}, namespace: {OWN_NAMESPACE}}}}}"
        ))
        .await;
        kube.apply(&self.rules().await).await;
        let kubeconfig = kube.kubeconfig_of(OWN_NAMESPACE, ACCOUNT).await;
        fs::write(self.kubeconfig(), kubeconfig).expect("disk is there");
    }

    /// The objects that give the control plane its rights.
    async fn rules(&self) -> String {
        let mut program = Program::new("ambient-control-plane")
            .arg("rules")
            .env("CP_RUNTIME_NAMESPACE", OWN_NAMESPACE)
            .env("AMBIENT_API_TOKEN", &self.service_token)
            .start();
        let status = program.wait().await;
        assert!(status.success(), "rules: {status}: {:#?}", program.log());
        program.output().join("\n")
    }

    /// The control plane's own access to the cluster.
    fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// Starts the control plane and waits until it serves tokens.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start_control_plane(&mut self) {
        let address = self.target.address;
        let mut program = Program::new("ambient-control-plane")
            .env("KUBECONFIG", self.kubeconfig())
            .env("AMBIENT_API_SERVER_URL", self.api_url())
            .env("AMBIENT_GRPC_SERVER_ADDR", format!("{address}:{GRPC}"))
            .env("AMBIENT_API_TOKEN", &self.service_token)
            .env("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")
            .env("CP_RUNTIME_NAMESPACE", OWN_NAMESPACE)
            .env("CP_TOKEN_ISSUER", "minted")
            .env("CP_TOKEN_TTL", TOKEN_LIFE)
            .env("CP_REFRESH_INTERVAL", REFRESH_INTERVAL)
            .env("CP_TOKEN_LISTEN_ADDR", format!("{address}:{TOKENS}"))
            .env("CP_TOKEN_URL", format!("http://{address}:{TOKENS}/token"))
            .env("AMBIENT_RUNNER_IMAGE", Image::reference("ambient-runner"))
            .env("AMBIENT_SIDECAR_IMAGE", Image::reference("ambient-sidecar"))
            .env("AGENT_IMAGE_ALLOW", "images.example/*")
            .start();
        program.listening("endpoint").await;
        self.control_plane = Some(program);
    }

    /// Kills the control plane with SIGKILL, and waits for its end.
    ///
    /// # Panics
    /// When it does not run.
    pub async fn kill_control_plane(&mut self) {
        let program = self.control_plane.as_mut().expect("it runs");
        program.kill().await;
    }

    /// Ends our programs; what remains is the cluster, without what was made there.
    pub async fn end(mut self) -> Target {
        if let Some(program) = &mut self.control_plane {
            program.signal(nix::sys::signal::Signal::SIGTERM);
            let _ = program.ended_within(REQUEST).await;
        }
        if self.node().is_none() {
            // Somebody's cluster, which goes on.
            let delete = [
                "delete",
                "--ignore-not-found",
                "--wait=false",
                "--filename=-",
            ];
            let _ = self.kube().attempt(&delete, &self.rules().await).await;
            let namespaces = ["delete", "namespace", "--ignore-not-found", "--wait=false"];
            let namespaces = [namespaces.as_slice(), &[OWN_NAMESPACE, PROJECT]].concat();
            let _ = self.kube().attempt(&namespaces, "").await;
        }
        self.target
    }

    /// The cluster.
    pub fn kube(&self) -> &Kube {
        &self.target.kube
    }

    /// The cluster, whosever it is.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The node, when it is on this machine.
    pub fn node(&self) -> Option<&Node> {
        self.target.node.as_ref()
    }

    /// Base URL of the API server.
    pub fn api_url(&self) -> String {
        format!("http://{}:{REST}", self.target.address)
    }

    /// What a person would look at after a failure.
    pub async fn scene(&self) -> String {
        let log = self.control_plane.as_ref().map(Running::log);
        let log = log.unwrap_or_default();
        let last = log[log.len().saturating_sub(80)..].join("\n");
        let cluster = self.target.scene(PROJECT).await;
        format!("{cluster}--- control plane\n{last}\n")
    }
}

/// Name of the container that runs the agent (contract section 3).
pub const AGENT: &str = "ambient-code-runner";

/// Name of a session's pod (contract section 3).
pub fn pod(id: &str) -> String {
    format!("session-{id}-runner")
}

/// A session whose agent is this shell script, in an image that knows nothing of us. What it writes
/// is in its pod's log.
pub fn shell(script: &str) -> NewSession {
    NewSession::script(script)
        .annotation("agent-image", &Image::reference("shell"))
        .io("none")
}

/// The reason of a session's condition `Ready`.
pub fn reason(session: &Session) -> String {
    let conditions = session.conditions.as_deref().unwrap_or("[]");
    let conditions: Value = serde_json::from_str(conditions).expect("JSON");
    let ours = conditions
        .as_array()
        .and_then(|all| all.iter().find(|it| it["type"] == "Ready"));
    ours.and_then(|it| it["reason"].as_str())
        .unwrap_or_default()
        .to_owned()
}
