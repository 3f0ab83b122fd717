//! A cluster that the chart is installed in. The control plane runs beside it as the Deployment
//! says, with the rights and by the token of the ServiceAccount that helm made.

use std::collections::{BTreeMap, HashSet};

use ambient_api_server::{Server, Settings};
use ambient_shared::clock::Clock;
use ambient_testing::{
    cluster::{ADMIN, Cluster, ClusterOptions, Request},
    operator::Operator,
    ports::Port,
    programs::{Program, Running},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::Method;
use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::*;

pub(super) const SERVICE: &str = "service-token";
const OPERATOR: &str = "operator-token";
pub(super) const PROJECT: &str = "chart-team";

/// A cluster with a session API beside it.
pub(super) struct Scene {
    pub(super) cluster: Cluster,
    pub(super) helm: Helm,
    pub(super) operator: Operator,
    tokens: Port,
    rest: String,
    grpc: String,
    _api: JoinSet<()>,
}

impl Scene {
    pub(super) async fn start() -> Self {
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

    /// The control plane was allowed each kind of call that it made. One that was refused once was
    /// about a namespace whose rights had just been given, or that was going.
    pub(super) fn has_all_rights(&self) {
        let user = format!("system:serviceaccount:{NAMESPACE}:ambient-control-plane");
        let mut asked = self.cluster.requests();
        asked.retain(|it| it.user == user);
        let kind = |it: &Request| {
            let Request {
                verb,
                group,
                resource,
                subresource,
                ..
            } = it;
            [verb, group, resource, subresource].map(Clone::clone)
        };
        let allowed = asked.iter().filter(|it| (200..300).contains(&it.code));
        let allowed: HashSet<_> = allowed.map(kind).collect();
        assert!(allowed.len() > 10, "{allowed:?}");
        asked.retain(|it| it.code == 403 && !allowed.contains(&kind(it)));
        assert!(asked.is_empty(), "{asked:#?}");
    }

    /// `helm VERB ambient`, with the chart, values that fit the scene, and these.
    pub(super) fn helm(&self, verb: &[&str], values: &[&str]) -> Result<String, String> {
        self.helm_of(&self.helm, verb, values)
    }

    /// The same by somebody else's helm.
    pub(super) fn helm_of(
        &self,
        helm: &Helm,
        verb: &[&str],
        values: &[&str],
    ) -> Result<String, String> {
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
        helm.run(&arguments)
    }

    /// What is installed is what `helm template` shows, with nothing added on the way.
    pub(super) fn has_what_template_gives(&self) {
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

    pub(super) fn own(&self, path: &str) -> Option<Value> {
        self.cluster
            .get(&format!("/api/v1/namespaces/{NAMESPACE}/{path}"))
    }

    pub(super) fn uid(&self, path: &str) -> String {
        let object = self.own(path).unwrap_or_else(|| panic!("no {path}"));
        text(&object, "/metadata/uid").to_owned()
    }

    /// Waits until what belonged to the release's own objects has gone too.
    pub(super) fn wait_for_collection(&self) {
        for kind in [
            "apis/apps/v1/namespaces/NS/replicasets",
            "apis/discovery.k8s.io/v1/namespaces/NS/endpointslices",
            "api/v1/namespaces/NS/endpoints",
        ] {
            let path = format!("/{}", kind.replace("NS", NAMESPACE));
            self.cluster.wait_for(&path, |it| it["items"] == json!([]));
        }
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods");
        self.cluster.wait_for(&path, |it| {
            let pods = it["items"].as_array().unwrap();
            pods.iter()
                .all(|it| it["metadata"]["ownerReferences"].is_null())
        });
    }

    /// Names of our objects that are in no namespace.
    pub(super) fn left_in_cluster(&self) -> String {
        let kinds = "clusterroles,clusterrolebindings,validatingadmissionpolicies,\
                     validatingadmissionpolicybindings";
        let selector = "app=ambient-control-plane";
        let get = ["get", kinds, "--selector", selector, "--output=name"];
        self.cluster.kubectl(ADMIN, &get)
    }

    /// A session of a project of its own.
    pub(super) async fn create(&self) -> String {
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
    pub(super) fn program(&self, container: &Value) -> Program {
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

    /// The control plane's container, as the Deployment has it.
    pub(super) fn container(&self) -> Value {
        let path =
            format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/ambient-control-plane");
        let deployment = self.cluster.get(&path).unwrap();
        deployment["spec"]["template"]["spec"]["containers"][0].clone()
    }

    pub(super) async fn control_plane(&self) -> Running {
        let mut running = self.program(&self.container()).start();
        running.listening("endpoint").await;
        running
    }

    /// `keys …` in a replica's pod; gives what it prints.
    pub(super) async fn keys(&self, arguments: &[&str]) -> String {
        let mut program = self.program(&self.container()).arg("keys");
        for argument in arguments {
            program = program.arg(argument);
        }
        let mut running = program.start();
        let status = running.wait().await;
        let output = running.output().join("\n");
        assert_eq!(status.code(), Some(0), "{output} {:?}", running.log());
        output
    }

    /// Names of all objects of our own namespace, events apart.
    pub(super) fn left(&self) -> Vec<String> {
        let kubectl = |arguments: &[&str]| self.cluster.kubectl(ADMIN, arguments);
        let kinds = kubectl(&[
            "api-resources",
            "--namespaced",
            "--verbs=list,get",
            "--output=name",
        ]);
        let kinds: Vec<_> = kinds
            .lines()
            .filter(|it| !it.starts_with("events"))
            .collect();
        let kinds = kinds.join(",");
        let found = kubectl(&["get", &kinds, "--namespace", NAMESPACE, "--output=name"]);
        let mut found: Vec<_> = found.lines().map(str::to_owned).collect();
        found.sort();
        found
    }

    /// The pod of `helm test`: its containers one after the other, on this machine.
    pub(super) async fn test(&self) {
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
