//! What sessions ask for: one project's namespace, by many at once and over and over.

use super::*;

/// Asks as many sessions do that are started at once.
async fn ask(projects: &Arc<Projects>, project: &str, times: usize) -> Vec<Asked> {
    let mut asking = JoinSet::new();
    for _ in 0..times {
        let (projects, project) = (Arc::clone(projects), project.to_owned());
        asking.spawn(async move { projects.ensure(&project).await });
    }
    asking.join_all().await
}

/// How often something was done in a namespace.
fn count(cluster: &Cluster, namespace: &str, verb: &str, resource: &str) -> usize {
    let requests = permissions::requests_so_far(cluster).into_iter();
    requests
        .filter(|it| it.namespace == namespace && it.verb == verb && it.resource == resource)
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_sessions_share_the_work_its_failure_and_its_result() {
    let cluster = cluster();
    cluster.create_namespace("as-own");
    let missing = SecretRef {
        namespace: "as-own".to_owned(),
        name: "pull".to_owned(),
    };
    cluster.apply(&may_read(&missing));
    let mut settings = settings("as-own");
    settings.images.pull_secret = Some(missing.name.clone());
    let projects = projects(cluster, settings).await;
    let deadline = Instant::now() + DEADLINE;
    let asked = loop {
        let asked = ask(&projects, "as-team", 100).await;
        // The Role, and our RoleBinding, may not be in force at once.
        if asked.iter().all(|it| reason(it) == "SecretMissing") {
            break asked;
        }
        assert!(Instant::now() < deadline, "{asked:?}");
        sleep(POLL).await;
    };

    let message = asked[0].as_ref().unwrap_err().to_string();
    assert!(message.contains("IMAGE_PULL_SECRET"), "{message}");
    let tries = count(cluster, "as-own", "get", "secrets");
    assert!(tries < 50, "{tries} tries for a hundred sessions");

    let secret = json!({"metadata": {"name": "pull"}, "stringData": {"key": "value"}});
    let path = "/api/v1/namespaces/as-own/secrets";
    assert_eq!(cluster.request("POST", path, Some(&secret)).0, 201);
    // Who asks at once is told of the failure that was.
    let deadline = Instant::now() + DEADLINE;
    loop {
        let asked = ask(&projects, "as-team", 100).await;
        if asked.iter().all(Result::is_ok) {
            break;
        }
        assert!(Instant::now() < deadline, "{asked:?}");
        sleep(POLL).await;
    }

    // From here on nothing is asked of the API server.
    let total = || {
        let requests = permissions::requests_so_far(cluster).into_iter();
        let about = requests.filter(|it| it.namespace == "as-team" || it.name == "as-team");
        about.filter(|it| it.user == CONTROL_PLANE.name).count()
    };
    let before = total();
    for asked in ask(&projects, "as-team", 100).await {
        assert_eq!(asked.unwrap(), "as-team");
    }
    assert_eq!(total(), before);
    // Until somebody says that something is wrong with it.
    cluster.request("DELETE", &policy_path("as-team"), None);
    projects.forget("as-team");
    assert_eq!(projects.ensure("as-team").await.unwrap(), "as-team");
    assert!(cluster.get(&policy_path("as-team")).is_some());
}
