//! What Kubernetes refuses, and what is said of it.

use ambient_shared::proof::SessionKey;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_sessions_of_the_same_names_do_not_share_them() {
    let scene = Scene::start("names").await;
    let long = "a".repeat(40);
    let first = run(&format!("{long}-first"), "names-team");
    let second = run(&format!("{long}-second"), "names-team");
    let upper = run(&format!("{}-FIRST", long.to_uppercase()), "names-team");
    scene.started(&first).await;
    let pod = scene.pod(&first).unwrap();

    for other in [&second, &upper] {
        let refused = scene.settled(other).await;
        assert_eq!(refusal(&refused), "impossible: NameTaken");
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("40 characters"), "{message}");
        assert!(!message.contains(first.id.as_str()), "{message}");
        assert_eq!(scene.state(other), None);
        // Nor does removing the other one touch what is not its own.
        scene.removed(&other.id).await;
    }

    assert_eq!(scene.pod(&first).unwrap(), pod);
    scene.removed(&first.id).await;
    scene.started(&second).await;
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_can_never_be_made_is_refused_before_anything_is() {
    let scene = Scene::start("never").await;
    let in_project = |project: &str| run("never-session", project);
    let mut too_large = in_project("never-team");
    let value = "x".repeat(2 * 1024 * 1024);
    too_large.environment.insert("LARGE".to_owned(), value);
    let cases = [
        (run("dots.in.it", "never-team"), "SessionIdUnusable"),
        (run("under_score", "never-team"), "SessionIdUnusable"),
        (run(&"a".repeat(64), "never-team"), "SessionIdUnusable"),
        (run("größer-als-alle", "never-team"), "SessionIdUnusable"),
        (in_project(""), "ProjectMissing"),
        (in_project("never_team"), "ProjectIdUnusable"),
        (too_large, "PodTooLarge"),
    ];
    for (impossible, reason) in cases {
        let refused = scene.settled(&impossible).await;
        assert_eq!(refusal(&refused), format!("impossible: {reason}"));
        let is_nowhere = || scene.state(&impossible).is_none();
        scene.until("it is nowhere", is_nowhere).await;
        scene.removed(&impossible.id).await;
    }
    assert_eq!(scene.cluster.get("/api/v1/namespaces/never-team"), None);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_secret_over_the_size_limit_fails_the_session() {
    let scene = Scene::start("large").await;
    let session = run("large-session", "large-team");
    // Tokens are never so long; the limit of a Secret is 1 MiB.
    let too_large = Credentials {
        session_key: SessionKey::from_text(&"k".repeat(1024 * 1024 + 1)).unwrap(),
        ..credentials(&session.id, 900)
    };
    // First of all the namespace, which may have to wait for its rights.
    scene.started(&run("large-first", "large-team")).await;
    scene.knows(&session);

    let refused = scene.backend.start(&session, &too_large).await;

    assert_eq!(refusal(&refused), "impossible: ObjectRefused");
    assert_eq!(scene.pod(&session), None);
    // One that fits is taken, and a later one that does not leaves it as it is.
    scene.started(&session).await;
    let secret = path(&session, "secrets", "-creds");
    let before = scene.cluster.get(&secret).unwrap();
    let written = scene.backend.write_token(&session.id, &too_large).await;
    assert_eq!(refusal(&written), "impossible: ObjectRefused");
    assert_eq!(scene.cluster.get(&secret).unwrap(), before);
    scene.removed(&session.id).await;
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_quota_holds_a_session_up_until_it_is_lifted() {
    let scene = Scene::start("quota").await;
    // Makes the namespace.
    scene.started(&run("quota-first", "quota-team")).await;
    scene.cluster.apply(
        "\
apiVersion: v1
kind: ResourceQuota
metadata: {name: few, namespace: quota-team}
spec: {hard: {pods: '1'}}
",
    );
    let quota = "/api/v1/namespaces/quota-team/resourcequotas/few";
    scene
        .cluster
        .wait_for(quota, |it| it["status"]["used"]["pods"] == "1");
    let second = run("quota-second", "quota-team");

    let refused = scene.settled(&second).await;

    assert_eq!(refusal(&refused), "refused: QuotaExceeded");
    assert_eq!(scene.state(&second), None);
    assert_eq!(scene.cluster.request("DELETE", quota, None).0, 200);
    let starting = async {
        while scene.try_start(&second).await.is_err() {
            sleep(AGAIN).await;
        }
    };
    timeout(DEADLINE, starting).await.expect("it is started");
    assert!(scene.state(&second).is_some());
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pod_that_pod_security_refuses_is_never_made() {
    let mut lax = settings("lax");
    let overlay = json!({"spec": {"hostNetwork": true, "containers": []}});
    lax.overlay = Some(serde_json::from_value(overlay).unwrap());
    let scene = Scene::with(lax, &Sessions::default()).await;
    let session = run("lax-session", "lax-team");

    let refused = scene.settled(&session).await;

    assert_eq!(refusal(&refused), "impossible: PodSecurityViolation");
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("hostNetwork"), "{message}");
    scene.removed(&session.id).await;
    for path in paths(&session) {
        assert_eq!(scene.cluster.get(&path), None);
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_that_comes_while_its_namespace_ends_waits_for_the_next_one() {
    let scene = Scene::start("ending").await;
    let first = run("ending-first", "ending-team");
    scene.started(&first).await;
    scene.runs(&first);
    scene.until_run(&first, "it runs", is_running).await;
    let namespace = "/api/v1/namespaces/ending-team";
    let uid = scene.cluster.get(namespace).unwrap()["metadata"]["uid"].clone();
    // Its pod keeps it, as no kubelet ends that.
    assert_eq!(scene.cluster.request("DELETE", namespace, None).0, 200);
    let second = run("ending-second", "ending-team");

    let refused = scene.settled(&second).await;

    assert_eq!(refusal(&refused), "refused: NamespaceTerminating");
    scene
        .cluster
        .wait_for(&path(&first, "pods", "-runner"), |pod| {
            pod["metadata"]["deletionTimestamp"].is_string()
        });
    scene.finish(&first);
    scene
        .until_run(&first, "its pod is gone", |it| was_killed(it, "PodDeleted"))
        .await;
    let starting = async {
        while scene.try_start(&second).await.is_err() {
            sleep(AGAIN).await;
        }
    };
    timeout(DEADLINE, starting).await.expect("it is started");
    assert_ne!(
        scene.cluster.get(namespace).unwrap()["metadata"]["uid"],
        uid
    );
    assert!(scene.state(&second).is_some());
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_namespace_without_rights_holds_up_no_other() {
    let scene = Scene::start("partly").await;
    let good = run("partly-good", "partly-team");
    scene.started(&good).await;
    let sessions = Arc::clone(&scene.sessions);
    scene.stop().await;
    // Ours by its labels, but nobody has bound us there.
    shared().apply(
        "\
apiVersion: v1
kind: Namespace
metadata:
  name: partly-closed
  labels:
    ambient-code.io/managed: 'true'
    ambient-code.io/installation: partly
    ambient-code.io/project-id: partly-closed
",
    );
    let closed = run("partly-hidden", "partly-closed");
    let project = closed.project.clone();
    sessions.lock().unwrap().insert(closed.id.clone(), project);

    let scene = Scene::with(settings("partly"), &sessions).await;

    // What cannot be seen is neither there nor gone.
    assert_eq!(scene.state(&closed).unwrap().status, RunStatus::Unknown);
    scene.backend.stop(&closed.id).await.unwrap();
    assert!(matches!(
        scene.state(&good).unwrap().status,
        RunStatus::Starting { .. }
    ));
    scene.started(&run("partly-next", "partly-team")).await;
    // With the right to see it, it shows that nothing is there.
    shared().apply(
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: ambient-control-plane, namespace: partly-closed}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ambient-session-manager}
subjects: [{kind: ServiceAccount, namespace: ambient-code, name: ambient-control-plane}]
",
    );
    scene
        .until("it is not there", || scene.state(&closed).is_none())
        .await;
    scene.started(&closed).await;
    scene.stop().await;
}
