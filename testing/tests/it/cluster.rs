//! The test cluster itself: what the tests on it rely on.

use std::{
    fs,
    net::TcpStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster, ClusterOptions, NOBODY},
    processes,
    programs::{Program, binary},
};
use nix::sys::signal::Signal;
use reqwest::{Certificate, Client};
use serde_json::json;
use tokio::time::sleep;

const POLL: Duration = Duration::from_millis(20);

/// Longest start of a cluster.
const START: Duration = Duration::from_secs(180);

const POD: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: pod, namespace: NAMESPACE}
spec:
  containers: [{name: agent, image: 'agent:1'}]
";

#[test]
fn what_users_ask_is_in_the_log() {
    let cluster = Cluster::shared();
    cluster.create_namespace("asked");

    let refused = cluster.try_kubectl(NOBODY, &["get", "secrets", "--namespace", "asked"]);

    let message = refused.unwrap_err();
    assert!(message.contains("forbidden"), "{message}");
    let list = cluster.wait_for_request(|it| it.user == NOBODY.name && it.resource == "secrets");
    assert_eq!((list.verb.as_str(), list.code), ("list", 403));
    assert_eq!(
        (list.namespace.as_str(), list.group.as_str()),
        ("asked", "")
    );
    assert!(list.user_agent.starts_with("kubectl/"), "{list:?}");
    let made = cluster.wait_for_request(|it| {
        it.verb == "create" && it.resource == "namespaces" && it.name == "asked"
    });
    assert_eq!(made.code, 201);
    // What the cluster's own programs ask is left out, or the log would be theirs.
    let asked = cluster.requests();
    let theirs = asked.iter().find(|it| it.user.starts_with("system:kube"));
    assert_eq!(theirs, None);
}

#[test]
fn a_right_is_what_a_role_gives() {
    let cluster = Cluster::shared();
    cluster.create_namespace("rights");
    let can = |verb: &str| {
        let arguments = ["auth", "can-i", verb, "secrets", "--namespace", "rights"];
        cluster.try_kubectl(CONTROL_PLANE, &arguments).is_ok()
    };
    assert!(!can("create"));

    cluster.apply(
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: writer, namespace: rights}
rules: [{apiGroups: [''], resources: [secrets], verbs: [create]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: writer, namespace: rights}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: writer}
subjects: [{kind: ServiceAccount, namespace: ambient-code, name: ambient-control-plane}]
",
    );

    let deadline = Instant::now() + DEADLINE;
    while !can("create") {
        assert!(Instant::now() < deadline, "the role is not in force");
    }
    assert!(!can("get"));
}

#[test]
fn a_service_account_is_known_by_its_own_name() {
    let cluster = Cluster::shared();
    cluster.create_namespace("accounts");
    let kubeconfig = cluster.service_account("accounts", "own");
    let output = Command::new(cluster.program("kubectl"))
        .arg("--kubeconfig")
        .arg(&kubeconfig)
        .args([
            "auth",
            "whoami",
            "--output=jsonpath={.status.userInfo.username}",
        ])
        .output()
        .unwrap();
    let name = String::from_utf8_lossy(&output.stdout);
    assert_eq!(name, "system:serviceaccount:accounts:own", "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn our_tls_trusts_its_certificate() {
    let cluster = Cluster::shared();
    let ca = Certificate::from_pem(&fs::read(cluster.ca()).unwrap()).unwrap();
    let client = Client::builder().tls_certs_only([ca]).build().unwrap();
    for name in ["127.0.0.1", "localhost"] {
        let url = format!("https://{name}:{}/version", cluster.address().port());
        let answer = client.get(url).send().await.unwrap();
        assert!(answer.status().is_success(), "{answer:?}");
    }
}

#[test]
fn a_bound_pod_terminates_until_its_kubelet_finishes_it() {
    let cluster = Cluster::shared();
    cluster.create_namespace("pods");
    cluster.add_node("pods-node");
    let path = "/api/v1/namespaces/pods/pods/pod";

    // Unbound: nobody needs to agree.
    cluster.apply(&POD.replace("NAMESPACE", "pods"));
    cluster.request("DELETE", path, None);
    assert_eq!(cluster.get(path), None);

    cluster.apply(&POD.replace("NAMESPACE", "pods"));
    cluster.bind_pod("pods", "pod", "pods-node");
    cluster.set_pod_status("pods", "pod", json!({"phase": "Running"}));
    assert_eq!(cluster.get(path).unwrap()["status"]["phase"], "Running");
    cluster.request("DELETE", path, None);
    let pod = cluster.get(path).expect("a pod that terminates");
    assert!(pod["metadata"]["deletionTimestamp"].is_string(), "{pod:#}");
    cluster.finish_pod("pods", "pod");
    assert_eq!(cluster.get(path), None);
}

#[test]
fn pods_are_refused_by_pod_security_and_by_quota() {
    let cluster = Cluster::shared();
    cluster.apply(
        "\
apiVersion: v1
kind: Namespace
metadata: {name: strict, labels: {pod-security.kubernetes.io/enforce: restricted}}
",
    );
    cluster.create_namespace("full");
    cluster.apply(
        "\
apiVersion: v1
kind: ResourceQuota
metadata: {name: none, namespace: full}
spec: {hard: {pods: '0'}}
",
    );
    cluster.wait_for("/api/v1/namespaces/strict/serviceaccounts/default", |_| {
        true
    });
    cluster.wait_for("/api/v1/namespaces/full/resourcequotas/none", |quota| {
        quota["status"]["hard"]["pods"] == "0"
    });
    for (namespace, reason) in [
        ("strict", "violates PodSecurity"),
        ("full", "exceeded quota"),
    ] {
        let pod = json!({
            "metadata": {"name": "pod"},
            "spec": {"containers": [{"name": "agent", "image": "agent:1"}]},
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let (status, answer) = cluster.request("POST", &path, Some(&pod));
        assert_eq!(status, 403, "{answer:#}");
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn dependents_and_namespaces_are_collected() {
    let cluster = Cluster::shared();
    cluster.create_namespace("owners");
    let accounts = "/api/v1/namespaces/owners/serviceaccounts";
    let body = json!({"metadata": {"name": "owner"}});
    let (_, owner) = cluster.request("POST", accounts, Some(&body));
    let secret = json!({"metadata": {"name": "owned", "ownerReferences": [{
        "apiVersion": "v1", "kind": "ServiceAccount", "name": "owner",
        "uid": owner["metadata"]["uid"],
    }]}});
    let (status, _) = cluster.request("POST", "/api/v1/namespaces/owners/secrets", Some(&secret));
    assert_eq!(status, 201);

    cluster.request("DELETE", &format!("{accounts}/owner"), None);
    cluster.wait_gone("/api/v1/namespaces/owners/secrets/owned");
    cluster.request("DELETE", "/api/v1/namespaces/owners", None);
    cluster.wait_gone("/api/v1/namespaces/owners");
}

#[test]
fn api_server_comes_back_with_all_objects_and_nothing_is_left() {
    let mut cluster = Cluster::start(ClusterOptions {
        names: vec!["api.example".to_owned()],
        nodes: true,
        ..ClusterOptions::default()
    });
    let address = cluster.address();
    cluster.create_namespace("kept");

    cluster.stop_api_server();
    assert_eq!(cluster.request("GET", "/version", None).0, 0);
    cluster.start_api_server();

    assert_eq!(cluster.address(), address);
    assert!(cluster.get("/api/v1/namespaces/kept").is_some());
    cluster.freeze_api_server();
    TcpStream::connect_timeout(&address, DEADLINE).unwrap();
    cluster.thaw_api_server();
    // Its controllers, too, have found it again.
    cluster.create_namespace("new");
    let folder = cluster.folder().to_owned();
    drop(cluster);
    assert_eq!(left(&folder), [""; 0]);
}

#[tokio::test]
async fn a_killed_test_leaves_nothing() {
    let mut program = Program::at(binary("test-cluster"));
    if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") {
        program = program.env("KUBEBUILDER_ASSETS", assets);
    }
    let mut held = program.start();
    let deadline = Instant::now() + START;
    let folder = loop {
        let output = held.output();
        let mut lines = output.iter();
        if let Some(path) = lines.find_map(|line| line.strip_prefix("KUBECONFIG=")) {
            break Path::new(path).parent().unwrap().to_owned();
        }
        let ended = held.ended_within(POLL).await;
        let waits = ended.is_none() && Instant::now() < deadline;
        assert!(waits, "no cluster: {ended:?} {:?}", held.log());
    };
    assert_eq!(in_folder(&folder).len(), 3, "{:?}", in_folder(&folder));

    held.signal(Signal::SIGKILL);
    held.wait().await;

    let deadline = Instant::now() + DEADLINE;
    while !left(&folder).is_empty() {
        assert!(Instant::now() < deadline, "left: {:#?}", left(&folder));
        sleep(POLL).await;
    }
}

/// Ids of the processes that run in this folder.
fn in_folder(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| {
            fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// What is left of a cluster: its folder, and the processes that run in it or name it.
fn left(folder: &Path) -> Vec<String> {
    let named = processes::with(&folder.to_string_lossy());
    let named = named.into_iter().map(|it| it.arguments.join(" "));
    let itself = folder.exists().then(|| folder.display().to_string());
    in_folder(folder)
        .into_iter()
        .chain(named)
        .chain(itself)
        .collect()
}
