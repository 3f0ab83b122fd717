//! An installation on the shared cluster: an API server, the program, and a proxy between it and
//! each of the two servers that it needs.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ambient_testing::{
    DEADLINE,
    cluster::{ADMIN, CONTROL_PLANE, Cluster},
    kube_proxy::{Asked, KubeProxy, asked},
    programs::{Program, Running},
    proxy::{Call, Proxy, Upstream},
};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    sync::OnceCell,
    time::{Instant, sleep},
};

use crate::{
    permissions,
    real_api::{OPERATOR, RealApi, SERVICE},
};

mod session;

pub use session::Session;

/// How often is looked for what nothing announces.
const LOOK: Duration = Duration::from_millis(25);

/// The node of all pods.
pub const NODE: &str = "faults-node";

/// The Secrets of its keys.
pub const KEYS: [&str; 3] = [
    "ambient-cp-token-keypair",
    "ambient-cp-session-root",
    "ambient-cp-signing-key",
];

/// An installation.
pub struct Site {
    /// Its own namespace.
    pub name: String,
    /// A project, which is also the name of its namespace.
    pub project: String,
    pub api: RealApi,
    /// Between the program and kube-apiserver.
    pub kube: KubeProxy,
    /// Between the program and the API server's gRPC.
    pub grpc: Proxy,
    cluster: String,
    admin: String,
    kubeconfig: PathBuf,
    http: reqwest::Client,
    _folder: TempDir,
}

impl Site {
    /// An installation of this name on the shared cluster, with keys, and without a program that
    /// runs.
    pub async fn new(name: &str) -> Self {
        let cluster = Cluster::shared();
        permissions::grant(cluster);
        Self::on(cluster, name).await
    }

    /// As [`Site::new`], on a cluster of the test's own.
    pub async fn on(cluster: &Cluster, name: &str) -> Self {
        let site = Self::bare(cluster, name).await;
        for secret in keys().await {
            let path = format!("/api/v1/namespaces/{name}/secrets");
            let made = site.ask(Method::POST, &path, Some(secret)).await;
            assert_eq!(made.0, 201, "{}", made.1);
        }
        site
    }

    /// As [`Site::new`], without keys: the program makes them.
    pub async fn bare(cluster: &Cluster, name: &str) -> Self {
        permissions::grant_own(cluster, name);
        cluster.add_node(NODE);
        let folder = tempfile::tempdir().unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let api = RealApi::start(&folder.path().join("db"), any, any).await;
        let ca = std::fs::read(cluster.ca()).unwrap();
        let ca = reqwest::Certificate::from_pem(&ca).unwrap();
        let http = reqwest::Client::builder()
            .no_proxy()
            .add_root_certificate(ca)
            .build()
            .unwrap();
        let kube = KubeProxy::start(cluster).await;
        Self {
            cluster: cluster.url(),
            admin: cluster.token(ADMIN).to_owned(),
            kubeconfig: kube.kubeconfig(cluster, CONTROL_PLANE),
            name: name.to_owned(),
            project: format!("{name}-team"),
            grpc: Proxy::start(&Upstream::Grpc(api.grpc)).await,
            api,
            kube,
            http,
            _folder: folder,
        }
    }

    /// The program, with what every installation sets.
    pub fn program(&self) -> Program {
        Program::new("ambient-control-plane")
            .env("KUBECONFIG", &self.kubeconfig)
            .env("CP_RUNTIME_NAMESPACE", &self.name)
            .env(
                "AMBIENT_API_SERVER_URL",
                format!("http://{}", self.api.rest),
            )
            .env("AMBIENT_GRPC_SERVER_ADDR", self.grpc.address().to_string())
            .env("AMBIENT_API_TOKEN", SERVICE)
            .env("CP_TOKEN_ISSUER", "minted")
            .env("CP_TOKEN_LISTEN_ADDR", "127.0.0.1:0")
            .env("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")
            .env("RUNNER_IMAGE", "local/agent:1")
            .env("AMBIENT_RUNNER_IMAGE", "local/ambient-runner:1")
            .env("AMBIENT_SIDECAR_IMAGE", "local/ambient-sidecar:1")
            .env("AGENT_COMMAND", r#"["sh","-c","echo hello"]"#)
    }

    /// Kills the program as a lost machine does, and lets nobody wait for its Lease to run out.
    pub async fn kill(&self, program: &mut Running) {
        program.kill().await;
        let path = format!(
            "/apis/coordination.k8s.io/v1/namespaces/{}/leases/ambient-control-plane",
            self.name
        );
        self.ask(Method::DELETE, &path, None).await;
    }

    /// Makes the project, and waits until sessions can be there.
    pub async fn create_project(&self) {
        self.create_project_of(&self.project).await;
    }

    /// Makes a project of this name, and waits until sessions can be there.
    pub async fn create_project_of(&self, name: &str) {
        let body = json!({"name": name});
        self.rest(Method::POST, "/projects", Some(&body)).await;
        let path = format!("/api/v1/namespaces/{name}");
        self.wait_for(&path, |it| {
            it["metadata"]["annotations"]["ambient-code.io/follows-project"] == "true"
        })
        .await;
    }

    /// Makes a session of the project.
    pub async fn create(&self) -> Session<'_> {
        self.create_in(&self.project).await
    }

    /// Makes a session of a project.
    pub async fn create_in(&self, project: &str) -> Session<'_> {
        let body = json!({"name": "a session", "project_id": project});
        let session = self.rest(Method::POST, "/sessions", Some(&body)).await;
        Session {
            site: self,
            project: project.to_owned(),
            id: session["id"].as_str().unwrap().to_owned(),
        }
    }

    /// One request to the API server as its operator.
    pub async fn rest(&self, method: Method, path: &str, body: Option<&Value>) -> Value {
        let url = format!("http://{}/api/ambient/v1{path}", self.api.rest);
        let mut request = self.http.request(method, url).bearer_auth(OPERATOR);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert!(status.is_success(), "{path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// One request to the cluster as its administrator; a patch is a merge patch.
    pub async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> (u16, Value) {
        let url = format!("{}{path}", self.cluster);
        let kind = match method {
            Method::PATCH => "application/merge-patch+json",
            _ => "application/json",
        };
        let mut request = self.http.request(method, url).bearer_auth(&self.admin);
        if let Some(body) = body {
            request = request.header("content-type", kind).body(body.to_string());
        }
        let Ok(answer) = request.send().await else {
            return (0, Value::Null);
        };
        let status = answer.status().as_u16();
        let text = answer.text().await.unwrap_or_default();
        (status, serde_json::from_str(&text).unwrap_or_default())
    }

    /// An object of the cluster, if it is there.
    pub async fn get(&self, path: &str) -> Option<Value> {
        let (status, object) = self.ask(Method::GET, path, None).await;
        (status == 200).then_some(object)
    }

    /// Waits until an object is there and as wanted, and gives it.
    pub async fn wait_for(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let object = self.get(path).await;
            if let Some(object) = object.as_ref().filter(|it| wanted(it)) {
                return object.clone();
            }
            assert!(Instant::now() < deadline, "{path} is {object:#?}");
            sleep(LOOK).await;
        }
    }

    /// Waits until an object is gone.
    pub async fn wait_gone(&self, path: &str) {
        let deadline = Instant::now() + DEADLINE;
        while let Some(object) = self.get(path).await {
            assert!(Instant::now() < deadline, "still there: {object:#}");
            sleep(LOOK).await;
        }
    }

    /// Calls to kube-apiserver so far, as it names them, with the status of each answer.
    pub fn asked(&self) -> Vec<(Asked, Option<u16>)> {
        let calls = self.kube.calls();
        let answered = |call: &Call| call.answered.map(|status| status.as_u16());
        calls.iter().map(|it| (asked(it), answered(it))).collect()
    }
}

/// The keys of all sites: made once, by the program, as an RSA key takes a while.
async fn keys() -> &'static [Value] {
    static MADE: OnceCell<Vec<Value>> = OnceCell::const_new();
    let made = MADE.get_or_init(|| async {
        let cluster = Cluster::shared();
        permissions::grant(cluster);
        let site = Site::bare(cluster, "faults-keys").await;
        let mut program = site.program().start();
        let mut keys = Vec::new();
        for name in KEYS {
            let path = format!("/api/v1/namespaces/{}/secrets/{name}", site.name);
            let secret = site.wait_for(&path, |_| true).await;
            // Without our label: somebody else's, which is read and never written.
            keys.push(json!({"metadata": {"name": name}, "data": secret["data"]}));
        }
        site.kill(&mut program).await;
        keys
    });
    made.await
}
