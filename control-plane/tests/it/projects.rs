//! Projects of a real API server on a real Kubernetes control plane, under the rights that
//! `rules` gives.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ambient_control_plane::{
    backend::{
        BackendError,
        kubernetes::{
            projects::Projects,
            settings::{
                Companions, Images, KubernetesSettings, ModelAccess, Platform, PodSettings,
                SecretRef,
            },
        },
    },
    cluster::{ClusterSettings, Fence, connect},
    projects::ProjectController,
};
use ambient_shared::{
    api::Api,
    client::{GrpcAddress, grpc_channel, install_crypto_provider},
    clock::Clock,
    resolve::Resolver,
    token::Token,
};
use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    permissions,
    real_api::{RealApi, SERVICE},
};

mod asked;
mod foreign;
mod life;
mod tenants;

/// How often a test looks.
const POLL: Duration = Duration::from_millis(100);

/// The shared cluster, where the control plane has its rights.
fn cluster() -> &'static Cluster {
    let cluster = Cluster::shared();
    permissions::grant(cluster);
    cluster
}

/// Settings of an installation of its own, so that tests on one cluster keep apart.
fn settings(namespace: &str) -> KubernetesSettings {
    KubernetesSettings {
        namespace: namespace.to_owned(),
        platform: Platform::Standard,
        images: Images::default(),
        overlay: None,
        upstream: "http://api:8000".to_owned(),
        grpc_upstream: "http://api:8001".to_owned(),
        model_access: ModelAccess::default(),
        companions: Companions::default(),
        pods: PodSettings::default(),
    }
}

/// An API server, and the folder of its database.
async fn api() -> (TempDir, RealApi) {
    let folder = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let real = RealApi::start(&folder.path().join("db"), any, any).await;
    (folder, real)
}

/// Projects by themselves, as the session backend uses them.
async fn projects(cluster: &Cluster, settings: KubernetesSettings) -> Arc<Projects> {
    install_crypto_provider();
    let access = ClusterSettings {
        kubeconfig: Some(cluster.kubeconfig(CONTROL_PLANE)),
        project_token_file: None,
    };
    let clients = connect(&access, Fence::open()).await.unwrap();
    Arc::new(Projects::new(clients, Arc::new(settings)))
}

/// A controller of projects at work.
struct Scene {
    projects: Arc<Projects>,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl Scene {
    /// One that looks at everything twice a second: what a test changes by hand is soon put right.
    async fn start(real: &RealApi, cluster: &Cluster, settings: KubernetesSettings) -> Self {
        Self::with_resync(real, cluster, settings, Duration::from_millis(500)).await
    }

    async fn with_resync(
        real: &RealApi,
        cluster: &Cluster,
        settings: KubernetesSettings,
        resync: Duration,
    ) -> Self {
        let projects = projects(cluster, settings).await;
        let address = GrpcAddress {
            address: real.grpc.to_string(),
            tls: false,
            ca: None,
        };
        let channel = grpc_channel(&Resolver::system(), &address).unwrap();
        let (_, token) = watch::channel(Some(Token::new(SERVICE, None).unwrap()));
        let controller = ProjectController::new(
            Api::new(channel, token),
            Arc::clone(&projects),
            resync,
            Clock::system(),
        );
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let stops = shutdown.clone();
        running.spawn(async move { controller.run(stops, DEADLINE).await.unwrap() });
        Self {
            projects,
            shutdown,
            running,
        }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = timeout(DEADLINE, self.running.join_next()).await;
        ended.unwrap().unwrap().unwrap();
    }
}

async fn create_project(real: &RealApi, name: &str) {
    let body = json!({"name": name});
    real.call(Method::POST, "/projects", Some(body)).await;
}

async fn delete_project(real: &RealApi, name: &str) {
    let path = format!("/projects/{name}");
    real.call(Method::DELETE, &path, None).await;
}

/// Sets the project's `group_access`; gives the settings' path.
async fn create_settings(real: &RealApi, project: &str, access: &Value) -> String {
    let body = json!({"project_id": project, "group_access": access.to_string()});
    let made = real.call(Method::POST, "/project_settings", Some(body));
    let made = made.await;
    format!("/project_settings/{}", made["id"].as_str().unwrap())
}

fn namespace_path(name: &str) -> String {
    format!("/api/v1/namespaces/{name}")
}

fn bindings_path(namespace: &str) -> String {
    format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings")
}

fn policy_path(namespace: &str) -> String {
    format!(
        "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies/allow-ambient-api-server"
    )
}

/// Waits until a namespace has all that sessions need, whatever the settings.
fn wait_furnished(cluster: &Cluster, namespace: &str) {
    cluster.wait_for(&policy_path(namespace), |_| true);
}

/// The RoleBindings of a namespace: name to role.
fn bindings(cluster: &Cluster, namespace: &str) -> BTreeMap<String, String> {
    let list = cluster.get(&bindings_path(namespace)).unwrap_or_default();
    let items = list["items"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    items
        .iter()
        .map(|it| (text(&it["metadata"]["name"]), text(&it["roleRef"]["name"])))
        .collect()
}

/// Waits until the namespace has exactly these RoleBindings beside our own.
async fn until_access(cluster: &Cluster, namespace: &str, wanted: &[(&str, &str)]) {
    let mut expected: BTreeMap<_, _> = wanted
        .iter()
        .map(|(name, role)| ((*name).to_owned(), (*role).to_owned()))
        .collect();
    expected.insert(
        "ambient-control-plane".to_owned(),
        "ambient-session-manager".to_owned(),
    );
    until(&format!("{expected:?} in {namespace}"), || {
        bindings(cluster, namespace) == expected
    })
    .await;
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "not seen: {what}");
        sleep(POLL).await;
    }
}

/// What asking for a project's namespace came to.
type Asked = Result<String, BackendError>;

fn reason(result: &Asked) -> &'static str {
    match result {
        Err(BackendError::Impossible { reason, .. } | BackendError::Refused { reason, .. }) => {
            reason
        }
        other => panic!("{other:?}"),
    }
}

/// A Role that lets the control plane read one Secret, as the rules give it where it is configured.
fn may_read(secret: &SecretRef) -> String {
    let SecretRef { namespace, name } = secret;
    format!(
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: copied, namespace: {namespace}}}
rules: [{{apiGroups: [''], resources: [secrets], resourceNames: [{name}], verbs: [get]}}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: copied, namespace: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: copied}}
subjects: [{{kind: ServiceAccount, namespace: {}, name: ambient-control-plane}}]
",
        permissions::NAMESPACE
    )
}
