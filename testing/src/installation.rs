//! Our API server and control plane with a cluster of their own, as an operator installs them.
//!
//! In: a [`Cluster`]. Out: programs that know each other, and the REST API as an operator uses it.
//! All ports stay the same when a program is killed and started again. The control plane has the
//! rights that it asks for, and no others.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command};

use tempfile::TempDir;
use uuid::Uuid;

use crate::{
    cluster::{CONTROL_PLANE, Cluster},
    kwok::NODE,
    operator::Operator,
    ports::Port,
    programs::{Program, Running, binary},
};

/// The control plane's own namespace.
pub const NAMESPACE: &str = "ambient-code";

/// An installation. Its programs end when it is dropped.
#[derive(Debug)]
pub struct Installation {
    /// The cluster that sessions run in.
    pub cluster: Cluster,
    /// The API server.
    pub api_server: Running,
    api_program: Program,
    replicas: Vec<Replica>,
    rest: Port,
    grpc: Port,
    folder: TempDir,
    service_token: String,
    operator: Operator,
}

/// Where one control plane listens.
#[derive(Debug)]
struct Replica {
    tokens: Port,
    admin: Port,
}

impl Installation {
    /// Starts the API server, with these variables beside its own, and prepares the cluster for so
    /// many control planes, which are to be started: see [`Installation::control_plane`].
    ///
    /// # Panics
    /// When the API server does not come up, or the cluster refuses.
    pub async fn start(cluster: Cluster, replicas: usize, variables: &[(&str, String)]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let replica = |_| Replica {
            tokens: Port::free(),
            admin: Port::free(),
        };
        let replicas: Vec<_> = (0..replicas).map(replica).collect();
        let (rest, grpc) = (Port::free(), Port::free());
        let (service_token, operator_token) =
            (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
        let jwks = replicas.iter().map(|it| it.tokens.address());
        let jwks: Vec<_> = jwks
            .map(|it| format!("http://{it}/.well-known/jwks.json"))
            .collect();
        let mut program = Program::new("ambient-api-server")
            .env("AMBIENT_REST_LISTEN", rest.address().to_string())
            .env("AMBIENT_GRPC_LISTEN", grpc.address().to_string())
            .env("AMBIENT_DATABASE", folder.path().join("sessions.db"))
            .env("AMBIENT_API_TOKEN", &service_token)
            .env("AMBIENT_OPERATOR_TOKEN", &operator_token)
            .env("AMBIENT_SESSION_JWKS", jwks.join(","));
        for (name, value) in variables {
            program = program.env(name, value);
        }
        let installation = Self {
            operator: Operator::new(&format!("http://{}", rest.address()), &operator_token),
            api_server: up(program.clone()).await,
            api_program: program,
            cluster,
            replicas,
            rest,
            grpc,
            folder,
            service_token,
        };
        installation.give_rights();
        fs::write(
            installation.pod_template(),
            POD_TEMPLATE.replace("NODE", NODE),
        )
        .expect("disk is there");
        installation
    }

    /// One control plane, which is to be started; more variables may be set, and others again.
    ///
    /// # Panics
    /// When there are not so many replicas.
    pub fn control_plane(&self, replica: usize) -> Program {
        let Replica { tokens, admin } = &self.replicas[replica];
        Program::new("ambient-control-plane")
            .env("KUBECONFIG", self.cluster.kubeconfig(CONTROL_PLANE))
            .env("CP_RUNTIME_NAMESPACE", NAMESPACE)
            .env("AMBIENT_API_SERVER_URL", self.rest_url())
            .env("AMBIENT_GRPC_SERVER_ADDR", self.grpc.address().to_string())
            .env("AMBIENT_API_TOKEN", &self.service_token)
            .env("AMBIENT_ADMIN_LISTEN", admin.address().to_string())
            .env("CP_TOKEN_ISSUER", "minted")
            .env("CP_TOKEN_LISTEN_ADDR", tokens.address().to_string())
            .env("CP_TOKEN_URL", self.token_url(0))
            .env("RUNNER_IMAGE", "images.example/agent:1")
            .env("AMBIENT_RUNNER_IMAGE", "images.example/ambient-runner:1")
            .env("AMBIENT_SIDECAR_IMAGE", "images.example/ambient-sidecar:1")
            .env("AGENT_COMMAND", r#"["agent"]"#)
            .env("AMBIENT_POD_TEMPLATE", self.pod_template())
    }

    /// Starts the API server again after it was killed, on the same database and ports.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start_api_server(&mut self) {
        self.api_server = up(self.api_program.clone()).await;
    }

    /// Where the API server serves REST.
    pub fn rest(&self) -> SocketAddr {
        self.rest.address()
    }

    /// Where the API server serves gRPC.
    pub fn grpc(&self) -> SocketAddr {
        self.grpc.address()
    }

    /// URL of the API server's REST, without the base path.
    pub fn rest_url(&self) -> String {
        format!("http://{}", self.rest.address())
    }

    /// Where a control plane serves tokens.
    pub fn token_url(&self, replica: usize) -> String {
        format!("http://{}/token", self.replicas[replica].tokens.address())
    }

    /// Where a control plane serves its metrics and health.
    pub fn admin(&self, replica: usize) -> SocketAddr {
        self.replicas[replica].admin.address()
    }

    /// The REST API as an operator uses it.
    pub fn operator(&self) -> &Operator {
        &self.operator
    }

    fn pod_template(&self) -> PathBuf {
        self.folder.path().join("pod-template.yaml")
    }

    fn give_rights(&self) {
        let rules = Command::new(binary("ambient-control-plane"))
            .arg("rules")
            .env_clear()
            .env("CP_RUNTIME_NAMESPACE", NAMESPACE)
            .env("AMBIENT_API_TOKEN", &self.service_token)
            .output()
            .expect("the control plane can be started");
        let rules = String::from_utf8_lossy(&rules.stdout);
        self.cluster.create_namespace(NAMESPACE);
        self.cluster.apply(&rules);
    }
}

/// No scheduler binds the pods.
const POD_TEMPLATE: &str = "spec: {nodeName: NODE, containers: []}\n";

async fn up(program: Program) -> Running {
    let mut running = program.start();
    running.listening("rest").await;
    running.listening("grpc").await;
    running
}
