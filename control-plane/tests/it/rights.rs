//! Every right of the control plane is used: the real program lives through all that needs one, and
//! the audit log is asked for the rights that were not.

use std::time::{Duration, Instant};

use ambient_control_plane::{
    keypair::secret::SECRETS,
    rules::{Right, Rules},
};
use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
    programs::{Program, Running},
};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    permissions::{self, IMAGES, MODELS_SECRET, NAMESPACE, PULL_SECRET},
    real_api::{RealApi, SERVICE},
};

/// The project whose namespace the control plane makes.
const OURS: &str = "rights-ours";
/// The project whose namespace was there before.
const GIVEN: &str = "rights-given";

/// How often is looked for what nothing announces.
const POLL: Duration = Duration::from_millis(100);

/// A control plane with everything that is optional.
async fn control_plane(cluster: &Cluster, api: &RealApi) -> Running {
    let mut program = program(cluster, api).start();
    program.listening("endpoint").await;
    program
}

fn program(cluster: &Cluster, api: &RealApi) -> Program {
    Program::new("ambient-control-plane")
        .env("KUBECONFIG", cluster.kubeconfig(CONTROL_PLANE))
        .env("AMBIENT_API_SERVER_URL", format!("http://{}", api.rest))
        .env("AMBIENT_GRPC_SERVER_ADDR", api.grpc.to_string())
        .env("AMBIENT_API_TOKEN", SERVICE)
        .env("CP_RUNTIME_NAMESPACE", NAMESPACE)
        .env("CP_TOKEN_LISTEN_ADDR", "127.0.0.1:0")
        .env("CP_TOKEN_URL", "http://control-plane.test:8080/token")
        .env("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")
        .env("RUNNER_IMAGE", "agent:1")
        .env("AMBIENT_RUNNER_IMAGE", "runner:1")
        .env("AMBIENT_SIDECAR_IMAGE", "sidecar:1")
        .env("AGENT_COMMAND", r#"["agent"]"#)
        .env("RUNNER_IMAGE_NAMESPACE", IMAGES)
        .env("IMAGE_PULL_SECRET", PULL_SECRET)
        .env("USE_VERTEX", "true")
        .env("VERTEX_SECRET_NAME", MODELS_SECRET)
}

fn put(cluster: &Cluster, path: &str, object: &Value) {
    let (status, answer) = cluster.request("POST", path, Some(object));
    assert!(matches!(status, 201 | 409), "{path}: {answer}");
}

fn patch(cluster: &Cluster, path: &str, change: &Value) {
    let (status, answer) = cluster.request("PATCH", path, Some(change));
    assert_eq!(status, 200, "{path}: {answer}");
}

/// A session, and the paths of its objects.
struct Session {
    id: String,
    namespace: &'static str,
}

impl Session {
    async fn create(api: &RealApi, project: &'static str) -> Self {
        let body = json!({"name": "a session", "project_id": project, "prompt": "hello"});
        let made = api.call(Method::POST, "/sessions", Some(body)).await;
        Self {
            id: made["id"].as_str().unwrap().to_owned(),
            namespace: project,
        }
    }

    async fn delete(&self, api: &RealApi) {
        let path = format!("/sessions/{}", self.id);
        api.call(Method::DELETE, &path, None).await;
    }

    fn path(&self, resource: &str, ending: &str) -> String {
        let (namespace, id) = (self.namespace, &self.id);
        format!("/api/v1/namespaces/{namespace}/{resource}/session-{id}{ending}")
    }

    fn pod(&self) -> String {
        self.path("pods", "-runner")
    }
}

fn label(name: &str, value: &Value) -> Value {
    json!({"metadata": {"labels": {format!("ambient-code.io/{name}"): value}}})
}

fn managed_by_us(object: &Value) -> bool {
    let label = &object["metadata"]["labels"]["ambient-code.io/managed-by"];
    *label == "ambient-control-plane"
}

fn has_owner(object: &Value) -> bool {
    object["metadata"]["ownerReferences"].is_array()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_right_is_unused() {
    let _quiet = permissions::quiet().await;
    let cluster = permissions::quiet_cluster();
    let folder = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let api = RealApi::start(&folder.path().join("db"), any, any).await;
    for name in [PULL_SECRET, MODELS_SECRET] {
        let secret = json!({"metadata": {"name": name}, "stringData": {"key": "value"}});
        put(
            cluster,
            &format!("/api/v1/namespaces/{NAMESPACE}/secrets"),
            &secret,
        );
    }

    keys(cluster, &api).await;
    no_place(cluster, &api).await;
    let mut program = control_plane(cluster, &api).await;
    projects(cluster, &api).await;
    sessions(cluster, &api).await;
    ends(cluster, &api).await;

    program.signal(Signal::SIGTERM);
    assert!(program.wait().await.success(), "{:#?}", program.log());
    api.stop().await;
    assert_all_used(cluster).await;
}

/// Keys are made at a first start; then they lose their owner, and get it back at the next.
async fn keys(cluster: &Cluster, api: &RealApi) {
    let mut first = control_plane(cluster, api).await;
    first.signal(Signal::SIGTERM);
    assert!(first.wait().await.success(), "{:#?}", first.log());
    for name in SECRETS {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/secrets/{name}");
        assert!(has_owner(&cluster.get(&path).unwrap()), "{name}");
        patch(
            cluster,
            &path,
            &json!({"metadata": {"ownerReferences": null}}),
        );
    }
}

/// One that cannot start, since somebody else has its port, says so on its pod.
async fn no_place(cluster: &Cluster, api: &RealApi) {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut program = program(cluster, api)
        .env(
            "CP_TOKEN_LISTEN_ADDR",
            taken.local_addr().unwrap().to_string(),
        )
        .env("AMBIENT_POD_UID", "a-pod-of-ours")
        .start();
    assert!(!program.wait().await.success());
}

async fn projects(cluster: &Cluster, api: &RealApi) {
    let given = json!({"metadata": {"name": GIVEN, "labels": {"ambient-code.io/managed": "true"}}});
    put(cluster, "/api/v1/namespaces", &given);
    for project in [OURS, GIVEN] {
        let body = json!({"name": project});
        api.call(Method::POST, "/projects", Some(body)).await;
    }
    let access = json!([{"groupName": "devs", "role": "edit"}]).to_string();
    let body = json!({"project_id": GIVEN, "group_access": access});
    let settings = api
        .call(Method::POST, "/project_settings", Some(body))
        .await;
    let of = |namespace: &str, name: &str| {
        format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings/{name}")
    };
    cluster.wait_for(&of(GIVEN, "devs-edit"), |_| true);

    let path = format!("/project_settings/{}", settings["id"].as_str().unwrap());
    let nobody = json!({"group_access": "[]"});
    api.call(Method::PATCH, &path, Some(nobody)).await;

    cluster.wait_gone(&of(GIVEN, "devs-edit"));
    for namespace in [OURS, GIVEN] {
        let copy = format!("/api/v1/namespaces/{namespace}/secrets/{PULL_SECRET}");
        cluster.wait_for(&copy, |_| true);
    }
}

/// Two sessions: one whose objects somebody changes and takes away, one that is deleted as it runs.
async fn sessions(cluster: &Cluster, api: &RealApi) {
    let session = Session::create(api, OURS).await;
    let brief = Session::create(api, OURS).await;
    let (pod, service) = (session.pod(), session.path("services", ""));
    let account = session.path("serviceaccounts", "-sa");
    cluster.wait_for(&pod, |_| true);
    cluster.wait_for(&brief.pod(), |_| true);

    // Out of the sight of our watches: looked for by name.
    patch(cluster, &pod, &label("managed-by", &Value::Null));
    cluster.wait_for(&pod, managed_by_us);
    patch(cluster, &account, &label("managed-by", &Value::Null));
    cluster.wait_for(&account, managed_by_us);
    cluster.request("DELETE", &service, None);
    cluster.wait_for(&service, has_owner);

    brief.delete(api).await;
    cluster.wait_gone(&brief.pod());

    // What has lost its owner is not collected with it.
    let name = pod.rsplit('/').next().unwrap();
    cluster.finish_pod(OURS, name);
    let path = format!("/sessions/{}", session.id);
    let deadline = Instant::now() + DEADLINE;
    loop {
        let now = api.call(Method::GET, &path, None).await;
        if now["phase"] == "Failed" {
            break;
        }
        assert!(Instant::now() < deadline, "{now:#}");
        sleep(POLL).await;
    }
    let nobodys = json!({"metadata": {"ownerReferences": null}});
    let secret = session.path("secrets", "-creds");
    patch(cluster, &service, &nobodys);
    patch(cluster, &secret, &nobodys);
    session.delete(api).await;
    for path in [account, service, secret] {
        cluster.wait_gone(&path);
    }
}

/// The one namespace goes with its project, the other is left.
async fn ends(cluster: &Cluster, api: &RealApi) {
    for project in [OURS, GIVEN] {
        let path = format!("/projects/{project}");
        api.call(Method::DELETE, &path, None).await;
    }
    cluster.wait_gone(&format!("/api/v1/namespaces/{OURS}"));
    cluster.wait_for(&format!("/api/v1/namespaces/{GIVEN}"), |it| {
        it["metadata"]["labels"]["ambient-code.io/managed"].is_null()
    });
    let pulling = format!("/apis/rbac.authorization.k8s.io/v1/namespaces/{IMAGES}/rolebindings");
    cluster.wait_for(&pulling, |it| {
        let mut left = it["items"].as_array().unwrap().iter();
        !left.any(managed_by_us)
    });
}

async fn assert_all_used(cluster: &Cluster) {
    let rights = Rules::new(&permissions::full()).rights();
    let idle = Right {
        verb: "escalate".to_owned(),
        ..rights[0].clone()
    };
    let requests = cluster.requests();
    let unused = permissions::unused(std::slice::from_ref(&idle), CONTROL_PLANE.name, &requests);
    assert_eq!(unused, [idle]);
    let deadline = Instant::now() + DEADLINE;
    loop {
        // The log is written some time after the answer.
        let unused = permissions::unused(&rights, CONTROL_PLANE.name, &cluster.requests());
        if unused.is_empty() {
            return;
        }
        let shown: Vec<_> = unused.iter().map(ToString::to_string).collect();
        assert!(Instant::now() < deadline, "never used: {shown:#?}");
        sleep(POLL).await;
    }
}
