//! The program itself on a real cluster, as an operator starts it.

use std::time::Duration;

use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
    programs::{Program, Running},
};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::{
    permissions,
    real_api::{RealApi, SERVICE},
};

mod authority;
mod blind;
mod deleted;
mod notices;
mod rotation;
mod telemetry;
mod tls;

async fn api() -> (RealApi, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let api = RealApi::start(&folder.path().join("db"), any, any).await;
    (api, folder)
}

/// The program, with what every installation sets. Each test has an installation of its own, as one
/// takes sessions that its API server does not know for orphans.
fn program(api: &RealApi, installation: &str) -> Program {
    let cluster = Cluster::shared();
    permissions::grant(cluster);
    permissions::grant_own(cluster, installation);
    cluster.add_node("serve-node");
    Program::new("ambient-control-plane")
        .env("KUBECONFIG", cluster.kubeconfig(CONTROL_PLANE))
        .env("CP_RUNTIME_NAMESPACE", installation)
        .env("AMBIENT_API_SERVER_URL", format!("http://{}", api.rest))
        .env("AMBIENT_GRPC_SERVER_ADDR", api.grpc.to_string())
        .env("AMBIENT_API_TOKEN", SERVICE)
        .env("CP_TOKEN_ISSUER", "minted")
        .env("CP_TOKEN_LISTEN_ADDR", "127.0.0.1:0")
        .env("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")
        .env("RUNNER_IMAGE", "local/agent:1")
        .env("AMBIENT_RUNNER_IMAGE", "local/ambient-runner:1")
        .env("AMBIENT_SIDECAR_IMAGE", "local/ambient-sidecar:1")
        .env("AGENT_COMMAND", r#"["sh","-c","echo hello"]"#)
}

async fn create(api: &RealApi, project: &str) -> String {
    api.call(Method::POST, "/projects", Some(json!({"name": project})))
        .await;
    let body = json!({"name": "a session", "project_id": project});
    let session = api.call(Method::POST, "/sessions", Some(body)).await;
    session["id"].as_str().unwrap().to_owned()
}

async fn until_phase(api: &RealApi, id: &str, phase: &str) -> Value {
    let reached = async {
        loop {
            let path = format!("/sessions/{id}");
            let session = api.call(Method::GET, &path, None).await;
            if session["phase"] == phase {
                return session;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, reached)
        .await
        .unwrap_or_else(|_| panic!("not {phase} in time"))
}

fn set_status(project: &str, pod: &str, phase: &str, state: &Value) {
    let status = json!({
        "phase": phase,
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": if phase == "Running" { "True" } else { "False" }},
        ],
        "containerStatuses": [{
            "name": "ambient-code-runner", "image": "", "imageID": "", "restartCount": 0,
            "ready": phase == "Running", "state": state,
        }],
    });
    Cluster::shared().set_pod_status(project, pod, status);
}

async fn ready(admin: std::net::SocketAddr) {
    let url = format!("http://{admin}/readyz");
    let reached = async {
        while !reqwest::get(&url)
            .await
            .is_ok_and(|answer| answer.status().is_success())
        {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, reached).await.expect("ready in time");
}

/// Nothing that is secret, and no session's id, is in the log.
fn log_is_clean(running: &Running, id: &str) {
    for line in running.log() {
        assert!(!line.contains(id), "{line}");
        assert!(!line.contains(SERVICE), "{line}");
        assert!(!line.contains("eyJ"), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_takes_a_session_from_its_creation_to_its_end() {
    let (api, _folder) = api().await;
    let cluster = Cluster::shared();
    let mut control_plane = program(&api, "serve-one").start();
    let admin = control_plane.listening("admin").await;
    let endpoint = control_plane.listening("endpoint").await;
    ready(admin).await;

    let project = "serve-team";
    let id = create(&api, project).await;
    let pod = format!("session-{id}-runner");
    let path = format!("/api/v1/namespaces/{project}/pods/{pod}");
    let made = cluster.wait_for(&path, |pod| pod["metadata"]["uid"].is_string());
    assert_eq!(
        made["metadata"]["annotations"]["ambient-code.io/session-id"],
        *id
    );
    cluster.bind_pod(project, &pod, "serve-node");
    let at = "2026-01-01T00:00:00Z";
    set_status(
        project,
        &pod,
        "Running",
        &json!({"running": {"startedAt": at}}),
    );
    let session = until_phase(&api, &id, "Running").await;
    assert_eq!(session["kube_namespace"], project);

    // What the sessions' tokens are signed with, and what the program counts.
    let jwks = reqwest::get(format!("http://{endpoint}/.well-known/jwks.json"));
    let jwks: Value = jwks.await.unwrap().json().await.unwrap();
    assert_eq!(jwks["keys"][0]["kty"], "RSA");
    let metrics = reqwest::get(format!("http://{admin}/metrics"));
    let metrics = metrics.await.unwrap().text().await.unwrap();
    assert!(metrics.contains("ambient_control_plane_kubernetes_requests_total"));
    assert!(!metrics.contains(&id));

    let ended = json!({"terminated": {"exitCode": 0, "startedAt": at, "finishedAt": at}});
    set_status(project, &pod, "Succeeded", &ended);
    until_phase(&api, &id, "Completed").await;
    api.call(Method::DELETE, &format!("/sessions/{id}"), None)
        .await;
    // The node lets go of its pod.
    cluster.finish_pod(project, &pod);
    for object in [
        format!("pods/{pod}"),
        format!("serviceaccounts/session-{id}-sa"),
        format!("secrets/session-{id}-creds"),
        format!("services/session-{id}"),
    ] {
        cluster.wait_gone(&format!("/api/v1/namespaces/{project}/{object}"));
    }
    assert!(
        cluster
            .get(&format!("/api/v1/namespaces/{project}"))
            .is_some()
    );

    control_plane.signal(Signal::SIGTERM);
    assert_eq!(control_plane.wait().await.code(), Some(0));
    log_is_clean(&control_plane, &id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_program_is_followed_by_one_that_finds_everything() {
    let (api, _folder) = api().await;
    let cluster = Cluster::shared();
    let mut first = program(&api, "serve-two").start();
    let admin = first.listening("admin").await;
    ready(admin).await;
    let project = "serve-again";
    let id = create(&api, project).await;
    let pod = format!("session-{id}-runner");
    let path = format!("/api/v1/namespaces/{project}/pods/{pod}");
    let made = cluster.wait_for(&path, |pod| pod["metadata"]["uid"].is_string());
    cluster.bind_pod(project, &pod, "serve-node");
    first.kill().await;
    // Meanwhile the agent has started and failed.
    let at = "2026-01-01T00:00:00Z";
    let ended = json!({"terminated": {"exitCode": 3, "startedAt": at, "finishedAt": at}});
    set_status(project, &pod, "Failed", &ended);

    let mut second = program(&api, "serve-two").start();
    second.listening("endpoint").await;
    let session = until_phase(&api, &id, "Failed").await;

    let conditions = session["conditions"].as_str().unwrap();
    assert!(conditions.contains("AgentExit"), "{conditions}");
    let now = cluster.get(&path).unwrap();
    assert_eq!(now["metadata"]["uid"], made["metadata"]["uid"]);
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_what_works_and_what_to_do() {
    let (api, _folder) = api().await;
    let mut good = program(&api, "serve-check").arg("check").start();
    assert_eq!(good.wait().await.code(), Some(0), "{:?}", good.output());
    let table = good.output().join("\n");
    for row in [
        "API server REST  ok",
        "API server gRPC  ok",
        "Kubernetes API   ok",
    ] {
        assert!(table.contains(row), "{table}");
    }

    let mut bad = program(&api, "serve-check")
        .env("AMBIENT_API_TOKEN", "somebody-elses")
        .env("KUBECONFIG", "/does/not/exist")
        .arg("check")
        .start();
    assert_eq!(bad.wait().await.code(), Some(69));
    let table = bad.output().join("\n");
    assert!(table.contains("API server gRPC  failed"), "{table}");
    assert!(table.contains("Kubernetes API   failed"), "{table}");
    assert!(!table.contains("somebody-elses"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_settings_end_it_with_a_line_for_each() {
    let (api, _folder) = api().await;
    let mut program = program(&api, "serve-bad")
        .env("PLATFORM_MODE", "cloud")
        .env("CP_TOKEN_LISTEN_ADDR", "nowhere")
        .start();
    assert_eq!(program.wait().await.code(), Some(78));
    let log = program.log().join("\n");
    assert!(log.contains("PLATFORM_MODE: "), "{log}");
    assert!(log.contains("CP_TOKEN_LISTEN_ADDR: "), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn minted_tokens_are_not_for_an_api_server_that_would_open_all_with_them() {
    let (api, _folder) = api().await;
    let routes = axum::Router::new().fallback(|| async { "{}" });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut other = tokio::task::JoinSet::new();
    other.spawn(async move { axum::serve(listener, routes).await.unwrap() });
    let mut program = program(&api, "serve-minted")
        .env("AMBIENT_API_SERVER_URL", url)
        .start();
    let status = timeout(DEADLINE * 2, program.wait()).await.unwrap();
    assert_eq!(status.code(), Some(70));
    let log = program.log().join("\n");
    assert!(log.contains("does not limit minted tokens"), "{log}");
}
