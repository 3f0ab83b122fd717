//! The chart's life on a real Kubernetes API: install, upgrade, rollback, uninstall. The control
//! plane runs beside it as the Deployment says, with the rights and by the token of the
//! ServiceAccount that helm made.

use std::collections::BTreeMap;

use ambient_api_server::{Server, Settings};
use ambient_shared::clock::Clock;
use ambient_testing::{
    cluster::{ADMIN, Cluster, ClusterOptions},
    operator::Operator,
    ports::Port,
    programs::{Program, Running},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::*;

const SERVICE: &str = "service-token";
const OPERATOR: &str = "operator-token";
const PROJECT: &str = "chart-team";

/// A cluster with a session API beside it.
struct Scene {
    cluster: Cluster,
    helm: Helm,
    operator: Operator,
    tokens: Port,
    rest: String,
    grpc: String,
    _api: JoinSet<()>,
}

impl Scene {
    async fn start() -> Self {
        let cluster = Cluster::start(ClusterOptions::default());
        cluster.create_namespace(NAMESPACE);
        let tokens = Port::free();
        let jwks = format!("http://{}/.well-known/jwks.json", tokens.address());
        let settings = Settings {
            api_token: Some(SERVICE.to_owned().into()),
            operator_token: Some(OPERATOR.to_owned().into()),
            session_jwks: vec![jwks.parse().unwrap()],
            ..Settings::default()
        };
        let server = Server::bind(settings, Clock::system()).await.unwrap();
        let rest = format!("http://{}", server.rest_address());
        let grpc = server.grpc_address().to_string();
        let mut running = JoinSet::new();
        running.spawn(async move { server.run(CancellationToken::new()).await.unwrap() });
        Self {
            helm: Helm::of_cluster(&cluster.kubeconfig(ADMIN)),
            operator: Operator::new(&rest, OPERATOR),
            cluster,
            tokens,
            rest,
            grpc,
            _api: running,
        }
    }

    /// `helm VERB ambient`, with the chart, values that fit the scene, and these.
    fn helm(&self, verb: &[&str], values: &[&str]) -> Result<String, String> {
        let chart = chart();
        let fit = json!({
            "global": {"imageRegistry": "images.example"},
            "api": {"url": self.rest, "grpcAddress": self.grpc},
            "credential": {"apiToken": {"value": SERVICE}},
            "tokens": {"issuer": "minted", "url": format!("http://{}/token", self.tokens.address())},
            "sessions": {"agentImage": "images.example/agent:1", "agentCommand": ["agent"]},
        });
        let file = self.cluster.folder().join("values.json");
        fs::write(&file, fit.to_string()).unwrap();
        let mut arguments = verb.to_vec();
        arguments.extend(["ambient", chart.to_str().unwrap(), "--namespace", NAMESPACE]);
        arguments.extend(["--values", file.to_str().unwrap()]);
        for value in values {
            arguments.extend(["--set-json", value]);
        }
        self.helm.run(&arguments)
    }

    /// What is installed is what `helm template` shows, with nothing added on the way.
    fn has_what_template_gives(&self) {
        let sorted = |yaml: &str| {
            let mut objects = objects(yaml);
            objects.sort_by_key(|it| format!("{} {}", text(it, "/metadata/namespace"), title(it)));
            objects
        };
        let shown = self.helm(&["template", "--no-hooks"], &[]).unwrap();
        let get = ["get", "manifest", "ambient", "--namespace", NAMESPACE];
        let installed = self.helm.run(&get).unwrap();
        assert_eq!(sorted(&installed), sorted(&shown));
    }

    fn own(&self, path: &str) -> Option<Value> {
        self.cluster
            .get(&format!("/api/v1/namespaces/{NAMESPACE}/{path}"))
    }

    fn uid(&self, path: &str) -> String {
        let object = self.own(path).unwrap_or_else(|| panic!("no {path}"));
        text(&object, "/metadata/uid").to_owned()
    }

    /// A session of a project of its own.
    async fn create(&self) -> String {
        self.operator.create_project(PROJECT).await;
        let body = json!({"name": "a session", "project_id": PROJECT});
        let (_, session) = self
            .operator
            .request(Method::POST, "/sessions", Some(&body))
            .await;
        text(&session, "/id").to_owned()
    }

    /// What the container's `env` gives a program.
    fn variables(&self, container: &Value) -> BTreeMap<String, String> {
        let variables = container["env"].as_array().unwrap().iter();
        let value = |variable: &Value| {
            if let Some(secret) = variable.pointer("/valueFrom/secretKeyRef") {
                let path = format!("secrets/{}", text(secret, "/name"));
                let object = self.own(&path).unwrap();
                let value = text(&object["data"], &format!("/{}", text(secret, "/key"))).to_owned();
                return String::from_utf8(STANDARD.decode(value).unwrap()).unwrap();
            }
            if variable.pointer("/valueFrom/fieldRef").is_some() {
                return NAMESPACE.to_owned();
            }
            text(variable, "/value").to_owned()
        };
        variables
            .map(|it| (text(it, "/name").to_owned(), value(it)))
            .collect()
    }

    /// The program of this pod's first container, on this machine.
    fn program(&self, container: &Value) -> Program {
        let account = self
            .cluster
            .service_account(NAMESPACE, "ambient-control-plane");
        let mut program = Program::new("ambient-control-plane");
        for argument in container["args"].as_array().into_iter().flatten() {
            program = program.arg(argument.as_str().unwrap());
        }
        for (name, value) in self.variables(container) {
            program = program.env(name, value);
        }
        program
            .env("KUBECONFIG", account)
            .env("CP_TOKEN_LISTEN_ADDR", self.tokens.address().to_string())
            .env("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")
    }

    async fn control_plane(&self) -> Running {
        let path =
            format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/ambient-control-plane");
        let deployment = self.cluster.get(&path).unwrap();
        let container = deployment
            .pointer("/spec/template/spec/containers/0")
            .unwrap();
        let mut running = self.program(container).start();
        running.listening("endpoint").await;
        running
    }

    /// The pod of `helm test`: its containers one after the other, on this machine.
    async fn test(&self) {
        let manifests = self
            .helm
            .run(&["get", "hooks", "ambient", "--namespace", NAMESPACE]);
        let pod = objects(&manifests.unwrap()).pop().unwrap();
        assert_eq!(text(&pod, "/kind"), "Pod");
        for containers in ["initContainers", "containers"] {
            let container = &pod["spec"][containers][0];
            let mut running = self.program(container).start();
            let status = running.wait().await;
            let output = running.output().join("\n");
            assert_eq!(
                status.code(),
                Some(0),
                "{container:#} {output} {:?}",
                running.log()
            );
            if containers == "containers" {
                assert!(output.contains("session token  ok"), "{output}");
                assert!(output.contains("token in use   ok"), "{output}");
                assert!(output.contains("deleted: session, project"), "{output}");
            }
            assert!(!output.contains(SERVICE), "{output}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_release_lives_its_life_and_leaves_what_is_not_its_own() {
    let scene = Scene::start().await;
    let cluster = &scene.cluster;
    let said = scene.helm(&["install"], &[]).unwrap();
    for words in [
        "rollout status deployment/ambient-control-plane",
        "helm test ambient --namespace ambient-code",
        "WARNING: credential.apiToken.value is a secret",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert!(!said.contains(SERVICE), "{said}");
    scene.has_what_template_gives();

    // A session by the rights that helm gave, and no others.
    let mut control_plane = scene.control_plane().await;
    let session = scene.create().await;
    let path = format!("/api/v1/namespaces/{PROJECT}/pods");
    let pods = cluster.wait_for(&path, |pods| {
        pods["items"][0]["metadata"]["uid"].is_string()
    });
    let (pod, uid) = (
        text(&pods, "/items/0/metadata/name"),
        text(&pods, "/items/0/metadata/uid"),
    );
    let pod = format!("{path}/{pod}");
    scene.test().await;
    let keypair = scene.uid("secrets/ambient-cp-token-keypair");
    let owner = scene.uid("configmaps/ambient-cp-keys");

    // Upgraded with other values, the pod and the keys are the same ones.
    scene
        .helm(
            &["upgrade"],
            &["replicas=3", r#"tokens.life="10m""#, "keys.keep=true"],
        )
        .unwrap();
    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    let mut control_plane = scene.control_plane().await;
    scene.test().await;
    assert_eq!(text(&cluster.get(&pod).unwrap(), "/metadata/uid"), uid);
    assert_eq!(scene.uid("secrets/ambient-cp-token-keypair"), keypair);

    let deployment =
        format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/ambient-control-plane");
    assert_eq!(cluster.get(&deployment).unwrap()["spec"]["replicas"], 3);
    let back = ["rollback", "ambient", "1", "--namespace", NAMESPACE];
    scene.helm.run(&back).unwrap();
    assert_eq!(cluster.get(&deployment).unwrap()["spec"]["replicas"], 2);

    // Cleaned up while the rights are there.
    let path = format!("/sessions/{session}");
    scene.operator.request(Method::DELETE, &path, None).await;
    cluster.wait_gone(&pod);
    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    assert!(
        !control_plane.log().concat().contains("forbidden"),
        "{:?}",
        control_plane.log()
    );

    // Uninstalled: projects and keys stay, which helm says; what follows takes them over.
    let uninstall = ["uninstall", "ambient", "--namespace", NAMESPACE];
    let said = scene.helm.run(&uninstall).unwrap();
    assert!(said.contains("kept due to the resource policy"), "{said}");
    assert!(said.contains("ambient-cp-keys"), "{said}");
    cluster.wait_gone(&deployment);
    assert!(
        cluster
            .get(&format!("/api/v1/namespaces/{PROJECT}"))
            .is_some()
    );
    scene.helm(&["install"], &["keys.keep=false"]).unwrap();
    assert_eq!(scene.uid("secrets/ambient-cp-token-keypair"), keypair);
    assert_eq!(scene.uid("configmaps/ambient-cp-keys"), owner);

    // Asked to, it takes the keys along.
    scene.helm.run(&uninstall).unwrap();
    for secret in [
        "ambient-cp-token-keypair",
        "ambient-cp-session-root",
        "ambient-cp-signing-key",
    ] {
        cluster.wait_gone(&format!("/api/v1/namespaces/{NAMESPACE}/secrets/{secret}"));
    }
    let left = cluster.kubectl(ADMIN, &["get", "clusterroles", "--output", "name"]);
    assert!(!left.contains("ambient"), "{left}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_not_there_is_said_by_install() {
    let scene = Scene::start().await;
    let refused = |values: &[&str], why: &str| {
        let error = scene.helm(&["install"], values).unwrap_err();
        assert!(error.contains(why), "{values:?}: {error}");
    };
    refused(
        &[r#"serviceAccount={"create": false, "name": "nobody"}"#],
        "there is no ServiceAccount nobody in namespace ambient-code",
    );
    refused(
        &[r#"platform={"mode": "mpp", "mppConfigNamespace": "tenants"}"#],
        "platform.mppConfigNamespace is tenants, and there is no such namespace",
    );
    refused(
        &[r#"sessions.imageNamespace="images""#],
        "sessions.imageNamespace is images, and there is no such namespace",
    );
    refused(
        &["metrics.serviceMonitor.enabled=true"],
        "no matches for kind \"ServiceMonitor\"",
    );

    let nowhere = scene.helm.run(&[
        "install",
        "other",
        chart().to_str().unwrap(),
        "--namespace",
        "nowhere",
        "--values",
        value_set("minimal").to_str().unwrap(),
    ]);
    let error = nowhere.unwrap_err();
    assert!(
        error.contains("namespaces \"nowhere\" not found"),
        "{error}"
    );

    // Two releases in one namespace would share keys and a Lease.
    scene.helm(&["install"], &[]).unwrap();
    let second = scene.helm.run(&[
        "install",
        "second",
        chart().to_str().unwrap(),
        "--namespace",
        NAMESPACE,
        "--values",
        value_set("minimal").to_str().unwrap(),
    ]);
    let error = second.unwrap_err();
    assert!(
        error.contains("cannot be imported into the current release"),
        "{error}"
    );
}
