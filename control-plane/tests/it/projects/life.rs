//! A project's life: made, changed, spoilt by hand, deleted.

use std::fmt::Write as _;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_project_gets_a_namespace_with_all_that_sessions_need() {
    let cluster = cluster();
    let own = "lf-own".to_owned();
    cluster.create_namespace(&own);
    let read = SecretRef {
        namespace: own.clone(),
        name: "pull".to_owned(),
    };
    cluster.apply(&format!(
        "\
apiVersion: v1
kind: Secret
metadata: {{name: pull, namespace: {own}}}
type: kubernetes.io/dockerconfigjson
stringData: {{.dockerconfigjson: '{{}}'}}
---
{}",
        may_read(&read)
    ));
    let mut settings = settings(&own);
    settings.images.pull_secret = Some(read.name.clone());
    settings.model_access.anthropic_api_key = Some("sk-1".to_owned().into());
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings).await;
    let name = "lf-all".to_owned();

    create_project(&real, &name).await;

    let secrets = format!("/api/v1/namespaces/{name}/secrets");
    let access = cluster.wait_for(&format!("{secrets}/ambient-model-access"), |_| true);
    assert_eq!(access["data"], json!({"ANTHROPIC_API_KEY": "c2stMQ=="}));
    let namespace = cluster.wait_for(&namespace_path(&name), |it| {
        it["metadata"]["annotations"]["ambient-code.io/follows-project"] == "true"
    });
    let metadata = &namespace["metadata"];
    for (label, value) in [
        ("ambient-code.io/managed", "true"),
        ("ambient-code.io/managed-by", "ambient-control-plane"),
        ("ambient-code.io/project-id", name.as_str()),
        ("ambient-code.io/installation", own.as_str()),
        ("pod-security.kubernetes.io/enforce", "restricted"),
    ] {
        assert_eq!(metadata["labels"][label], value, "{metadata:#}");
    }
    let made_by = &metadata["annotations"]["ambient-code.io/created-by"];
    assert_eq!(made_by, "ambient-control-plane");
    let copy = cluster.wait_for(&format!("{secrets}/pull"), |_| true);
    assert_eq!(copy["type"], "kubernetes.io/dockerconfigjson");
    let policy = cluster.wait_for(&policy_path(&name), |_| true);
    let from = &policy["spec"]["ingress"][0]["from"][0]["namespaceSelector"]["matchLabels"];
    assert_eq!(from["kubernetes.io/metadata.name"], own.as_str());
    until_access(cluster, &name, &[]).await;

    // What sessions ask for then is known without a call.
    assert_eq!(scene.projects.ensure(&name).await.unwrap(), name);

    // The copy is kept in step, and what people change is put right.
    let change = json!({"stringData": {".dockerconfigjson": "{\"auths\":{}}"}});
    let changed = cluster.request(
        "PATCH",
        &format!("/api/v1/namespaces/{own}/secrets/pull"),
        Some(&change),
    );
    assert_eq!(changed.0, 200, "{changed:?}");
    cluster.request("DELETE", &policy_path(&name), None);
    let unlabelled = json!({"metadata": {"labels": {
        "pod-security.kubernetes.io/enforce": "privileged", "ambient-code.io/managed": null,
    }}});
    cluster.request("PATCH", &namespace_path(&name), Some(&unlabelled));
    cluster.wait_for(&format!("{secrets}/pull"), |it| {
        it["data"][".dockerconfigjson"] == changed.1["data"][".dockerconfigjson"]
    });
    cluster.wait_for(&policy_path(&name), |_| true);
    cluster.wait_for(&namespace_path(&name), |it| {
        let labels = &it["metadata"]["labels"];
        labels["pod-security.kubernetes.io/enforce"] == "restricted"
            && labels["ambient-code.io/managed"] == "true"
    });
    scene.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn access_of_groups_follows_the_settings() {
    let cluster = cluster();
    let (_folder, real) = api().await;
    let scene = Scene::start(&real, cluster, settings("ac-own")).await;
    create_project(&real, "ac-team").await;
    let access = json!([
        {"groupName": "devs", "role": "edit"},
        {"groupName": "the boss", "role": "admin"},
    ]);
    let path = create_settings(&real, "ac-team", &access).await;
    until("both groups have access", || {
        matches!(bindings(cluster, "ac-team").len(), 3)
    })
    .await;
    let now = bindings(cluster, "ac-team");
    assert_eq!(now["devs-edit"], "ambient-project-edit");
    let boss = now
        .iter()
        .find(|(_, role)| *role == "ambient-project-admin");
    let boss = boss.unwrap().0.clone();
    let bound = cluster.get(&format!("{}/{boss}", bindings_path("ac-team")));
    assert_eq!(bound.unwrap()["subjects"][0]["name"], "the boss");

    // Somebody else's binding stays, whatever happens.
    cluster.apply(
        "\
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: guests-view, namespace: ac-team}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: guest}]
",
    );
    let change = |access: &str| {
        let body = json!({"group_access": access});
        real.call(Method::PATCH, &path, Some(body))
    };
    let guests = ("guests-view", "view");
    change(r#"[{"groupName":"devs","role":"view"},{"groupName":"guests","role":"view"}]"#).await;
    let devs = ("devs-view", "ambient-project-view");
    until_access(cluster, "ac-team", &[devs, guests]).await;

    // What is not understood changes nothing; a binding that was spoilt is no more put right.
    change(r#"[{"groupName":"devs","role":"owner"}]"#).await;
    create_project(&real, "ac-later").await;
    wait_furnished(cluster, "ac-later");
    until_access(cluster, "ac-team", &[devs, guests]).await;

    // Spoilt by hand.
    change(r#"[{"groupName":"devs","role":"view"},{"groupName":"ops","role":"admin"}]"#).await;
    let ops = ("ops-admin", "ambient-project-admin");
    until_access(cluster, "ac-team", &[devs, guests, ops]).await;
    let ops_path = format!("{}/ops-admin", bindings_path("ac-team"));
    let stolen = json!({"subjects": [{
        "apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "thieves",
    }]});
    assert_eq!(cluster.request("PATCH", &ops_path, Some(&stolen)).0, 200);
    let devs_path = format!("{}/devs-view", bindings_path("ac-team"));
    assert_eq!(cluster.request("DELETE", &devs_path, None).0, 200);
    until_access(cluster, "ac-team", &[devs, guests, ops]).await;
    cluster.wait_for(&ops_path, |it| it["subjects"][0]["name"] == "ops");

    real.call(Method::DELETE, &path, None).await;
    until_access(cluster, "ac-team", &[guests]).await;
    scene.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_namespace_goes_with_its_project_and_only_then() {
    let cluster = cluster();
    let (_folder, real) = api().await;
    // A slow resync: events alone must do.
    let slow = Duration::from_secs(3600);
    let scene = Scene::with_resync(&real, cluster, settings("go-own"), slow).await;
    create_project(&real, "go-team").await;
    create_project(&real, "go-other").await;
    // Sessions may be of projects that the API server never had.
    until_ready(&scene, "go-never").await;
    wait_furnished(cluster, "go-team");
    wait_furnished(cluster, "go-other");

    // Deleted by hand: it comes back.
    let uid = |name: &str| {
        let found = cluster.get(&namespace_path(name)).unwrap_or_default();
        found["metadata"]["uid"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let before = uid("go-team");
    cluster.request("DELETE", &namespace_path("go-team"), None);
    cluster.wait_for(&namespace_path("go-team"), |it| {
        it["metadata"]["uid"] != before.as_str() && it["metadata"]["deletionTimestamp"].is_null()
    });
    wait_furnished(cluster, "go-team");
    until_ready(&scene, "go-team").await;

    // Deleted with its project, and a hundred sessions in it.
    cluster.apply(&sessions("go-team", 100));
    cluster.wait_for(&namespace_path("go-team"), |it| {
        it["metadata"]["annotations"]["ambient-code.io/follows-project"] == "true"
    });
    delete_project(&real, "go-team").await;
    cluster.wait_gone(&namespace_path("go-team"));
    let asked = scene.projects.ensure("go-team").await;
    assert_eq!(reason(&asked), "ProjectDeleted");
    for kept in ["go-other", "go-never"] {
        let kept = cluster.get(&namespace_path(kept)).unwrap();
        assert!(kept["metadata"]["deletionTimestamp"].is_null(), "{kept:#}");
    }

    // The same name again is a new project.
    create_project(&real, "go-team").await;
    wait_furnished(cluster, "go-team");
    until_ready(&scene, "go-team").await;

    // Deleted while nobody looks.
    scene.stop().await;
    delete_project(&real, "go-team").await;
    let scene = Scene::with_resync(&real, cluster, settings("go-own"), slow).await;
    cluster.wait_gone(&namespace_path("go-team"));
    assert!(cluster.get(&namespace_path("go-never")).is_some());
    scene.stop().await;
    real.stop().await;
}

pub(super) async fn until_ready(scene: &Scene, project: &str) {
    let deadline = Instant::now() + DEADLINE;
    while let Err(error) = scene.projects.ensure(project).await {
        assert!(Instant::now() < deadline, "{error:?}");
        sleep(POLL).await;
    }
}

/// Manifests of what sessions have in a namespace.
fn sessions(namespace: &str, count: usize) -> String {
    (0..count).fold(String::new(), |mut manifests, number| {
        let _ = write!(
            manifests,
            "\
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: session-{number}-sa
  namespace: {namespace}
  labels: {{ambient-code.io/session-id: session-{number}}}
---
apiVersion: v1
kind: Secret
metadata:
  name: session-{number}-creds
  namespace: {namespace}
  labels: {{ambient-code.io/session-id: session-{number}}}
"
        );
        manifests
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_controllers_at_once_make_everything_once() {
    let cluster = cluster();
    let (_folder, real) = api().await;
    let names: Vec<_> = (0..5).map(|number| format!("tw-{number}")).collect();
    for name in &names {
        create_project(&real, name).await;
        let access = json!([{"groupName": "devs", "role": "edit"}]);
        create_settings(&real, name, &access).await;
    }
    let slow = Duration::from_secs(3600);
    let one = Scene::with_resync(&real, cluster, settings("tw-own"), slow).await;
    let two = Scene::with_resync(&real, cluster, settings("tw-own"), slow).await;
    // And sessions, which cannot wait.
    let mut asking = JoinSet::new();
    for scene in [&one, &two] {
        for name in names.iter().cycle().take(50) {
            let (projects, name) = (Arc::clone(&scene.projects), name.clone());
            asking.spawn(async move { projects.ensure(&name).await.map(|got| (name, got)) });
        }
    }
    while let Some(asked) = asking.join_next().await {
        // A RoleBinding that both make at once may lose to the other.
        if let Ok((name, got)) = asked.unwrap() {
            assert_eq!(name, got);
        }
    }
    for name in &names {
        until_access(cluster, name, &[("devs-edit", "ambient-project-edit")]).await;
        wait_furnished(cluster, name);
        until_ready(&one, name).await;
        until_ready(&two, name).await;
    }
    one.stop().await;
    two.stop().await;
    let requests = permissions::requests_so_far(cluster);
    let made = |resource: &str, code: u16| {
        let requests = requests.iter();
        requests
            .filter(|it| it.verb == "create" && it.resource == resource && it.code == code)
            .filter(|it| names.contains(&it.namespace) || names.contains(&it.name))
            .count()
    };
    assert_eq!(made("namespaces", 201), names.len());
    assert_eq!(made("rolebindings", 201), names.len());
    real.stop().await;
}
