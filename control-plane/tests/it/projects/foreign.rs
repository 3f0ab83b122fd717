//! Namespaces that others made, and those where we may do nothing.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_namespace_of_somebody_else_is_not_taken_by_its_name() {
    let cluster = cluster();
    cluster.create_namespace("fo-strange");
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings("fo-own")).await;

    create_project(&real, "fo-strange").await;
    create_project(&real, "kube-system").await;
    create_project(&real, "fo-fine").await;
    wait_furnished(cluster, "fo-fine");

    for (project, expected) in [
        ("fo-strange", "NamespaceForeign"),
        ("kube-system", "NamespaceReserved"),
        ("fo-own", "NamespaceReserved"),
        ("Fo-Fine", "NamespaceTaken"),
        ("no.name", "ProjectIdUnusable"),
    ] {
        assert_eq!(reason(&scene.projects.ensure(project).await), expected);
    }
    let another = projects(cluster, settings("fo-another")).await;
    assert_eq!(reason(&another.ensure("fo-fine").await), "NamespaceTaken");
    delete_project(&real, "fo-strange").await;
    delete_project(&real, "fo-fine").await;
    cluster.wait_gone(&namespace_path("fo-fine"));
    let untouched = cluster.get(&namespace_path("fo-strange")).unwrap();
    let labels = untouched["metadata"]["labels"].as_object().unwrap();
    assert_eq!(labels.len(), 1, "{untouched:#}");
    assert!(bindings(cluster, "fo-strange").is_empty());
    scene.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_namespace_that_was_given_to_a_project_is_given_back() {
    let cluster = cluster();
    cluster.create_namespace("gi-team");
    let given = json!({"metadata": {"labels": {"ambient-code.io/managed": "true"}}});
    cluster.request("PATCH", &namespace_path("gi-team"), Some(&given));
    let mut settings = settings("gi-own");
    settings.model_access.anthropic_api_key = Some("sk-1".to_owned().into());
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings).await;
    create_project(&real, "gi-team").await;
    let access = json!([{"groupName": "devs", "role": "edit"}]);
    create_settings(&real, "gi-team", &access).await;
    until_access(cluster, "gi-team", &[("devs-edit", "ambient-project-edit")]).await;
    let key = "/api/v1/namespaces/gi-team/secrets/ambient-model-access";
    cluster.wait_for(key, |_| true);
    cluster.apply(
        "\
apiVersion: v1
kind: ServiceAccount
metadata:
  name: session-1-sa
  namespace: gi-team
  labels: {ambient-code.io/session-id: session-1}
",
    );

    delete_project(&real, "gi-team").await;

    // Nobody gets in any more, but the session can still end in order.
    until_access(cluster, "gi-team", &[]).await;
    assert!(cluster.get(&policy_path("gi-team")).is_some());
    let account = "/api/v1/namespaces/gi-team/serviceaccounts/session-1-sa";
    cluster.request("DELETE", account, None);
    let left = cluster.wait_for(&namespace_path("gi-team"), |it| {
        it["metadata"]["labels"]["ambient-code.io/managed"].is_null()
    });
    assert!(left["metadata"]["deletionTimestamp"].is_null());
    assert!(left["metadata"]["labels"]["ambient-code.io/project-id"].is_null());
    assert!(bindings(cluster, "gi-team").is_empty());
    assert!(cluster.get(&policy_path("gi-team")).is_none());
    assert!(cluster.get(key).is_none());
    scene.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_namespace_without_rights_holds_up_no_other() {
    let cluster = cluster();
    // Somebody forbids our objects in this one namespace.
    cluster.apply(
        "\
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: no-policies-in-ri-closed}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [networking.k8s.io], apiVersions: ['*'], resources: [networkpolicies],
       operations: [CREATE, UPDATE]}
  validations:
  - {expression: \"request.namespace != 'ri-closed'\", reason: Forbidden, message: not here}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: no-policies-in-ri-closed}
spec: {policyName: no-policies-in-ri-closed, validationActions: [Deny]}
",
    );
    let probe = || {
        let policy = json!({"metadata": {"name": "probe"}, "spec": {"podSelector": {}}});
        let path = "/apis/networking.k8s.io/v1/namespaces/ri-closed/networkpolicies?dryRun=All";
        cluster.request("POST", path, Some(&policy)).0
    };
    // Given to the project, so that it is there before the controller.
    cluster.create_namespace("ri-closed");
    let given = json!({"metadata": {"labels": {"ambient-code.io/managed": "true"}}});
    cluster.request("PATCH", &namespace_path("ri-closed"), Some(&given));
    until("the policy is in force", || probe() == 403).await;
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings("ri-own")).await;
    create_project(&real, "ri-closed").await;
    for number in 0..10 {
        create_project(&real, &format!("ri-{number}")).await;
    }

    for number in 0..10 {
        wait_furnished(cluster, &format!("ri-{number}"));
    }
    let asked = scene.projects.ensure("ri-closed").await;
    assert_eq!(reason(&asked), "AdmissionDenied");
    assert!(asked.unwrap_err().to_string().contains("not here"));

    // As soon as it is allowed, it is done.
    let path = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings";
    cluster.request("DELETE", &format!("{path}/no-policies-in-ri-closed"), None);
    wait_furnished(cluster, "ri-closed");
    scene.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_namespace_that_terminates_is_waited_for() {
    let cluster = cluster();
    cluster.apply(
        "\
apiVersion: v1
kind: Namespace
metadata: {name: te-team, labels: {ambient-code.io/managed: 'true'}}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: holds, namespace: te-team, finalizers: [test.example/holds]}
",
    );
    cluster.request("DELETE", &namespace_path("te-team"), None);
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings("te-own")).await;
    create_project(&real, "te-team").await;
    let asked = scene.projects.ensure("te-team").await;
    assert_eq!(reason(&asked), "NamespaceTerminating");

    let freed = json!({"metadata": {"finalizers": null}});
    let path = "/api/v1/namespaces/te-team/configmaps/holds";
    assert_eq!(cluster.request("PATCH", path, Some(&freed)).0, 200);

    wait_furnished(cluster, "te-team");
    let again = cluster.get(&namespace_path("te-team")).unwrap();
    let annotations = &again["metadata"]["annotations"];
    assert_eq!(
        annotations["ambient-code.io/created-by"],
        "ambient-control-plane"
    );
    scene.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_secret_of_somebody_else_is_neither_written_nor_deleted() {
    let cluster = cluster();
    let source = SecretRef {
        namespace: "se-own".to_owned(),
        name: "regcred".to_owned(),
    };
    cluster.create_namespace(&source.namespace);
    cluster.apply(&may_read(&source));
    cluster.apply(
        "\
apiVersion: v1
kind: Secret
metadata: {name: regcred, namespace: se-own}
stringData: {key: ours}
---
apiVersion: v1
kind: Namespace
metadata: {name: se-team, labels: {ambient-code.io/managed: 'true'}}
---
apiVersion: v1
kind: Secret
metadata: {name: regcred, namespace: se-team}
stringData: {key: theirs}
",
    );
    let path = "/api/v1/namespaces/se-team/secrets/regcred";
    let before = cluster.get(path).unwrap();
    let mut settings = settings(&source.namespace);
    settings.images.pull_secret = Some(source.name.clone());
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings).await;
    create_project(&real, "se-team").await;

    let until_taken = async || {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let asked = scene.projects.ensure("se-team").await;
            if let Err(BackendError::Refused {
                reason: "SecretNameTaken",
                message,
            }) = asked
            {
                return message;
            }
            assert!(Instant::now() < deadline, "{asked:?}");
            sleep(POLL).await;
        }
    };
    let message = until_taken().await;
    assert!(message.contains("regcred"), "{message}");
    assert!(message.contains("IMAGE_PULL_SECRET"), "{message}");
    assert_eq!(cluster.get(path).unwrap(), before);

    // Handed over, it is ours.
    let label = json!({"metadata": {"labels": {
        "ambient-code.io/managed-by": "ambient-control-plane",
    }}});
    assert_eq!(cluster.request("PATCH", path, Some(&label)).0, 200);
    cluster.wait_for(path, |it| it["data"]["key"] == "b3Vycw==");
    life::until_ready(&scene, "se-team").await;

    // Taken back, it stays.
    let label = json!({
        "metadata": {"labels": {"ambient-code.io/managed-by": null}},
        "stringData": {"key": "theirs"},
    });
    assert_eq!(cluster.request("PATCH", path, Some(&label)).0, 200);
    scene.projects.forget("se-team");
    until_taken().await;
    delete_project(&real, "se-team").await;
    cluster.wait_for(&namespace_path("se-team"), |it| {
        it["metadata"]["labels"]["ambient-code.io/managed"].is_null()
    });
    let left = cluster.get(path).unwrap();
    assert_eq!(left["data"]["key"], "dGhlaXJz");
    scene.stop().await;
    real.stop().await;
}
