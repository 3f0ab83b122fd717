//! The chart's life on a real Kubernetes API: install, upgrade, rollback, uninstall.

use ambient_testing::cluster::{ADMIN, NOBODY};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::json;

use super::{
    scene::{PROJECT, SERVICE, Scene},
    *,
};

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
    assert!(scene.keys(&["show"]).await.contains("keypair"));
    scene.keys(&["rotate", "session-root"]).await;
    let keypair = scene.own("secrets/ambient-cp-token-keypair").unwrap();
    let owner = scene.uid("configmaps/ambient-cp-keys");

    // Upgraded with other values, the pod and the keys are the same ones.
    let other = [
        "replicas=3",
        r#"image.tag="2""#,
        r#"tokens.life="10m""#,
        r#"resources.requests.memory="256Mi""#,
        r#"commonLabels={"team": "platform"}"#,
        "networkPolicy.enabled=false",
        "podDisruptionBudget.enabled=false",
    ];
    scene.helm(&["upgrade"], &other).unwrap();
    let container = scene.container();
    assert!(text(&container, "/image").ends_with("control-plane:2"));
    assert_eq!(text(&container, "/resources/requests/memory"), "256Mi");
    assert!(scene.left().iter().all(|it| !it.contains("policies")));
    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    let mut control_plane = scene.control_plane().await;
    scene.test().await;
    assert_eq!(text(&cluster.get(&pod).unwrap(), "/metadata/uid"), uid);
    let now = scene.own("secrets/ambient-cp-token-keypair").unwrap();
    assert!(now["data"].is_object() && now["data"] == keypair["data"]);

    let deployment =
        format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments/ambient-control-plane");
    assert_eq!(cluster.get(&deployment).unwrap()["spec"]["replicas"], 3);
    let back = ["rollback", "ambient", "1", "--namespace", NAMESPACE];
    scene.helm.run(&back).unwrap();
    assert_eq!(cluster.get(&deployment).unwrap()["spec"]["replicas"], 2);
    scene.has_what_template_gives();

    // Cleaned up while the rights are there.
    let path = format!("/sessions/{session}");
    scene.operator.request(Method::DELETE, &path, None).await;
    cluster.wait_gone(&pod);
    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    scene.has_all_rights();

    // Uninstalled: projects and keys stay, which helm says; what follows takes them over.
    let uninstall = ["uninstall", "ambient", "--namespace", NAMESPACE];
    let said = scene.helm.run(&uninstall).unwrap();
    assert!(said.contains("kept due to the resource policy"), "{said}");
    assert!(said.contains("ambient-cp-keys"), "{said}");
    scene.wait_for_collection();
    assert_eq!(
        scene.left(),
        [
            "configmap/ambient-cp-keys",
            "configmap/kube-root-ca.crt",
            "lease.coordination.k8s.io/ambient-control-plane",
            "secret/ambient-cp-session-root",
            "secret/ambient-cp-signing-key",
            "secret/ambient-cp-token-keypair",
            "serviceaccount/default",
        ]
    );
    assert_eq!(scene.left_in_cluster(), "");
    assert!(
        cluster
            .get(&format!("/api/v1/namespaces/{PROJECT}"))
            .is_some()
    );
    scene.helm(&["install"], &["keys.keep=false"]).unwrap();
    let now = scene.own("secrets/ambient-cp-token-keypair").unwrap();
    assert_eq!(now["data"], keypair["data"]);
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
    assert_eq!(scene.left_in_cluster(), "");
}

/// What `docs/install.md` says to type after these words.
fn documented(words: &str) -> String {
    let text = fs::read_to_string(chart().join("../../docs/install.md")).unwrap();
    let (_, after) = text.split_once(words).expect("the words");
    let (_, after) = after.split_once("```sh\n").expect("a block");
    let (block, _) = after.split_once("```").expect("its end");
    block.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn removing_all_of_it_removes_what_was_made_and_nothing_else() {
    let scene = Scene::start().await;
    let cluster = &scene.cluster;
    let namespace = |name: &str, installation: &str, is_made: bool| {
        let mut metadata = json!({
            "name": name,
            "labels": {
                "ambient-code.io/managed": "true",
                "ambient-code.io/installation": installation,
            },
        });
        if is_made {
            metadata["annotations"] =
                json!({"ambient-code.io/created-by": "ambient-control-plane"});
        }
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
        cluster.apply(&object.to_string());
    };
    scene.helm(&["install"], &[]).unwrap();
    let mut control_plane = scene.control_plane().await;
    scene.operator.create_project(PROJECT).await;
    cluster.wait_for(&format!("/api/v1/namespaces/{PROJECT}"), |it| {
        it["metadata"]["uid"].is_string()
    });
    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    namespace("made", NAMESPACE, true);
    namespace("adopted", NAMESPACE, false);
    namespace("of-others", "elsewhere", true);
    let hooks = ["get", "hooks", "ambient", "--namespace", NAMESPACE];
    cluster.apply(&scene.helm.run(&hooks).unwrap());
    let tokens = json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {"name": "ambient-tokens", "namespace": NAMESPACE},
    });
    cluster.apply(&tokens.to_string());
    let uninstall = ["uninstall", "ambient", "--namespace", NAMESPACE];
    scene.helm.run(&uninstall).unwrap();
    scene.wait_for_collection();
    let pod = "pod/ambient-control-plane-test".to_owned();
    assert!(scene.left().contains(&pod), "{:?}", scene.left());

    cluster.shell(ADMIN, &documented("To remove all of it"));

    for name in ["made", PROJECT] {
        cluster.wait_gone(&format!("/api/v1/namespaces/{name}"));
    }
    for name in ["adopted", "of-others"] {
        let namespace = cluster.get(&format!("/api/v1/namespaces/{name}")).unwrap();
        assert!(
            namespace["metadata"]["deletionTimestamp"].is_null(),
            "{name}"
        );
    }
    for secret in ["token-keypair", "session-root", "signing-key"] {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/secrets/ambient-cp-{secret}");
        cluster.wait_gone(&path);
    }
    assert_eq!(
        scene.left(),
        [
            "configmap/kube-root-ca.crt",
            "secret/ambient-tokens",
            "serviceaccount/default",
        ]
    );
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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_rules_only_the_namespace_installs_without_rules() {
    let scene = Scene::start().await;
    let rights = ["create", "rolebinding", "installer", "--clusterrole=admin"];
    let whose = ["--user=nobody", "--namespace", NAMESPACE];
    scene
        .cluster
        .kubectl(ADMIN, &[rights.as_slice(), &whose].concat());
    let helm = Helm::of_cluster(&scene.cluster.kubeconfig(NOBODY));
    let values = ["rbac.create=false", r#"sessions.imageNamespace="images""#];

    scene.helm_of(&helm, &["install"], &values).unwrap();

    let refused = scene.helm_of(&helm, &["upgrade"], &[]).unwrap_err();
    assert!(refused.contains("forbidden"), "{refused}");
}
