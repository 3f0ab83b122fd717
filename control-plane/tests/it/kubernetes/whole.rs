//! The controller between a real API server and a real Kubernetes.

use ambient_control_plane::refresh::Interval;
use reqwest::Method;
use tempfile::TempDir;

use super::*;
use crate::{
    real_api::{RealApi, SERVICE},
    scene::{FakeIssuer, Plan, controller},
};

/// An API server with its database.
struct Sessions {
    api: RealApi,
    _folder: TempDir,
}

/// A control plane at work.
struct ControlPlane {
    work: Work,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

impl Sessions {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let api = RealApi::start(&folder.path().join("db"), any, any).await;
        Self {
            api,
            _folder: folder,
        }
    }

    async fn create(&self, project: &str) -> DesiredRun {
        let body = json!({"name": "a session", "project_id": project, "prompt": "hello"});
        let session = self.api.call(Method::POST, "/sessions", Some(body)).await;
        run(session["id"].as_str().unwrap(), project)
    }

    async fn ask(&self, method: Method, session: &DesiredRun, what: &str) -> Value {
        let path = format!("/sessions/{}{what}", session.id.as_str());
        self.api.call(method, &path, None).await
    }

    /// Waits until the session is in this phase, with a condition of this reason.
    async fn until(&self, session: &DesiredRun, phase: &str, reason: &str) -> Value {
        let last = Mutex::new(Value::Null);
        let seen = async {
            loop {
                let now = self.ask(Method::GET, session, "").await;
                let conditions = now["conditions"].as_str().unwrap_or("[]");
                let conditions: Value = serde_json::from_str(conditions).unwrap();
                if now["phase"] == phase && conditions[0]["reason"] == reason {
                    return now;
                }
                *last.lock().unwrap() = now;
                sleep(AGAIN).await;
            }
        };
        let seen = timeout(DEADLINE, seen).await;
        seen.unwrap_or_else(|_| panic!("not {phase} for {reason}, but {:#}", last.lock().unwrap()))
    }
}

impl ControlPlane {
    /// Of an installation of its own: it takes sessions that its API server does not know for
    /// orphans.
    async fn start(sessions: &Sessions, installation: &str) -> Self {
        // A token that is due 5 s after its issue: 120 s for the kubelet, a tenth of its life, 1 s
        // to the next tick.
        let plan = Plan {
            refresh: Interval::Every(Duration::from_secs(1)),
            token_life: Duration::from_secs(140),
            ..Plan::default()
        };
        let issuer = Arc::new(FakeIssuer::new(plan.token_life));
        let rest = format!("http://{}", sessions.api.rest);
        let grpc = sessions.api.grpc.to_string();
        let (controller, _) = controller(&plan, &rest, &grpc, SERVICE, &issuer);
        let cache = controller.cache();
        let project_of: ProjectOf = Arc::new(move |id| cache.get(id)?.object.project_id.clone());
        let work = Work::open(
            shared(),
            settings(installation),
            project_of,
            controller.observer(),
        );
        let work = work.await;
        let shutdown = CancellationToken::new();
        let mut running = JoinSet::new();
        let run = controller.run(Arc::clone(&work.backend) as _, shutdown.clone());
        running.spawn(async move { run.await.unwrap() });
        Self {
            work,
            shutdown,
            running,
        }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = timeout(DEADLINE, self.running.join_next()).await;
        ended.unwrap().unwrap().unwrap();
        self.work.stop().await;
    }
}

/// Waits for the pod of this generation, and lets its agent run.
fn runs(session: &DesiredRun, generation: &str) {
    let cluster = shared();
    cluster.wait_for(&path(session, "pods", "-runner"), |pod| {
        pod["metadata"]["annotations"]["ambient-code.io/generation"] == generation
    });
    bind(cluster, session);
    set_status(cluster, session, running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_lives_its_life_as_pods() {
    let sessions = Sessions::start().await;
    let plane = ControlPlane::start(&sessions, "whole").await;
    let cluster = shared();
    let session = sessions.create("whole-team").await;
    runs(&session, "0");
    let now = sessions.until(&session, "Running", "AgentRunning").await;
    assert_eq!(now["kube_namespace"], "whole-team");
    assert!(now["start_time"].is_string(), "{now:#}");

    // Its token is replaced while it runs, and a lost one too.
    let secret = path(&session, "secrets", "-creds");
    let first = cluster.get(&secret).unwrap()["data"]["api-token"].clone();
    cluster.wait_for(&secret, |it| it["data"]["api-token"] != first);
    assert_eq!(cluster.request("DELETE", &secret, None).0, 200);
    cluster.wait_for(&secret, |it| it["data"]["api-token"].is_string());

    set_status(cluster, &session, ended(137, "OOMKilled", ""));
    sessions.until(&session, "Failed", "OOMKilled").await;

    // Started again, and ended while nobody looks.
    sessions.ask(Method::POST, &session, "/start").await;
    runs(&session, "1");
    sessions.until(&session, "Running", "AgentRunning").await;
    plane.stop().await;
    set_status(cluster, &session, ended(0, "Completed", ""));
    let plane = ControlPlane::start(&sessions, "whole").await;
    sessions.until(&session, "Completed", "Completed").await;

    sessions.ask(Method::DELETE, &session, "").await;
    for path in paths(&session) {
        cluster.wait_gone(&path);
    }
    plane.stop().await;
    sessions.api.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_is_stopped_deleted_by_hand_or_impossible() {
    const PROJECT: &str = "ends-all-team";
    let sessions = Sessions::start().await;
    let plane = ControlPlane::start(&sessions, "ends-all").await;
    let cluster = shared();
    let stopped = sessions.create(PROJECT).await;
    let deleted = sessions.create(PROJECT).await;
    let impossible = sessions.create("kube-system").await;
    sessions
        .until(&impossible, "Failed", "NamespaceReserved")
        .await;
    for session in [&stopped, &deleted] {
        runs(session, "0");
        sessions.until(session, "Running", "AgentRunning").await;
    }

    sessions.ask(Method::POST, &stopped, "/stop").await;
    let pod = path(&stopped, "pods", "-runner");
    cluster.wait_for(&pod, |it| it["metadata"]["deletionTimestamp"].is_string());
    cluster.finish_pod(PROJECT, &name(&stopped, "-runner"));
    sessions.until(&stopped, "Stopped", "Stopped").await;

    let pod = path(&deleted, "pods", "-runner");
    assert_eq!(cluster.request("DELETE", &pod, None).0, 200);
    sessions.until(&deleted, "Running", "PodDeleted").await;
    cluster.finish_pod(PROJECT, &name(&deleted, "-runner"));
    sessions.until(&deleted, "Failed", "PodDeleted").await;

    for session in [&stopped, &deleted] {
        sessions.ask(Method::DELETE, session, "").await;
    }
    for path in [paths(&stopped), paths(&deleted)].as_flattened() {
        cluster.wait_gone(path);
    }
    plane.stop().await;
    sessions.api.stop().await;
}
