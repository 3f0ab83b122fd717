//! A project that is deleted while many of its sessions are there.

use super::*;

/// Sessions of the project.
const SESSIONS: usize = 30;

const PROJECT: &str = "serve-deleted-team";

/// What one session costs in its life: some ten calls, of which some are made again while the
/// namespace ends. Sessions that were tried again and again would cost hundreds.
const MAX_CALLS: usize = 40;

fn namespace() -> String {
    format!("/api/v1/namespaces/{PROJECT}")
}

/// How often the control plane has asked something about the project's namespace.
fn calls() -> usize {
    let requests = permissions::requests_so_far(Cluster::shared());
    let about = requests.iter().filter(|it| {
        it.namespace == PROJECT || (it.resource == "namespaces" && it.name == PROJECT)
    });
    about.filter(|it| it.user == CONTROL_PLANE.name).count()
}

/// Waits until the session has ended, or is told that its project was deleted. Gives its phase.
async fn until_over(api: &RealApi, id: &str) -> Value {
    let path = format!("/sessions/{id}");
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        let session = api.call(Method::GET, &path, None).await;
        let conditions = session["conditions"].as_str().unwrap_or_default();
        if session["phase"] == "Failed" || conditions.contains("ProjectDeleted") {
            return session["phase"].clone();
        }
        assert!(tokio::time::Instant::now() < deadline, "{session:#}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_a_deleted_project_come_to_rest_and_leave_nothing() {
    let (api, _folder) = api().await;
    let cluster = Cluster::shared();
    let mut control_plane = program(&api, "serve-deleted").start();
    let admin = control_plane.listening("admin").await;
    ready(admin).await;
    let body = json!({"name": PROJECT});
    api.call(Method::POST, "/projects", Some(body)).await;
    let mut sessions = Vec::new();
    for _ in 0..SESSIONS {
        let body = json!({"name": "a session", "project_id": PROJECT});
        let session = api.call(Method::POST, "/sessions", Some(body)).await;
        sessions.push(session["id"].as_str().unwrap().to_owned());
    }
    for id in &sessions {
        let pod = format!("{}/pods/session-{id}-runner", namespace());
        cluster.wait_for(&pod, |_| true);
    }
    // It goes with its project once it is known that it has one.
    cluster.wait_for(&namespace(), |it| {
        it["metadata"]["annotations"]["ambient-code.io/follows-project"] == "true"
    });

    let path = format!("/projects/{PROJECT}");
    api.call(Method::DELETE, &path, None).await;

    cluster.wait_gone(&namespace());
    for id in &sessions {
        until_over(&api, id).await;
    }
    let before = calls();
    assert!(before < SESSIONS * MAX_CALLS, "{before} calls");

    // Its sessions are still in the API server; deleted and asked for once more, they cost nothing.
    for (number, id) in sessions.iter().enumerate() {
        let path = format!("/sessions/{id}");
        if number % 2 == 0 {
            api.call(Method::DELETE, &path, None).await;
        } else if until_over(&api, id).await == "Failed" {
            let start = format!("{path}/start");
            let started = api.call(Method::POST, &start, None).await;
            assert_eq!(started["id"], *id);
        }
    }
    for id in sessions.iter().skip(1).step_by(2) {
        let told = async {
            loop {
                let path = format!("/sessions/{id}");
                let session = api.call(Method::GET, &path, None).await;
                let conditions = session["conditions"].as_str().unwrap_or_default();
                if conditions.contains("ProjectDeleted") {
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(DEADLINE, told).await.expect("it is told why");
    }

    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    let after = calls();
    assert!(after - before < SESSIONS, "{} calls more", after - before);
    assert_eq!(cluster.get(&namespace()), None);
    for id in &sessions {
        log_is_clean(&control_plane, id);
    }
}
