//! Starting: bad settings, health, reflection, metrics.

use std::{path::Path, sync::Arc};

use ambient_testing::programs::Program;
use serde_json::json;
use tempfile::TempDir;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::server::{OPERATOR, Server};

#[tokio::test]
async fn every_fault_is_one_line_and_nothing_starts() {
    let folder = TempDir::new().unwrap();
    let database = folder.path().join("ambient.db");
    let good = [
        ("AMBIENT_DATABASE", database.to_str().unwrap()),
        ("AMBIENT_API_TOKEN", "t"),
        ("AMBIENT_REST_LISTEN", "127.0.0.1:0"),
        ("AMBIENT_GRPC_LISTEN", "127.0.0.1:0"),
    ];
    for (changes, lines) in [
        (vec![("AMBIENT_DATABASE", "")], vec!["--database"]),
        (
            vec![("AMBIENT_REST_LISTEN", "8000")],
            vec!["AMBIENT_REST_LISTEN"],
        ),
        (
            vec![("AMBIENT_ADMIN_LISTEN", ":9090")],
            vec!["AMBIENT_ADMIN_LISTEN"],
        ),
        (vec![("AMBIENT_JWKS", "ftp://x/y")], vec!["AMBIENT_JWKS"]),
        (vec![("LOG_LEVEL", "loud")], vec!["LOG_LEVEL"]),
        (
            vec![
                ("AMBIENT_DATABASE", "/no/such/folder/x.db"),
                ("AMBIENT_JWKS", "/no/such/jwks.json"),
                ("AMBIENT_OPERATOR_TOKEN", "se cret"),
            ],
            vec!["AMBIENT_DATABASE", "AMBIENT_JWKS", "AMBIENT_OPERATOR_TOKEN"],
        ),
        (vec![("AMBIENT_API_TOKEN", "")], vec!["AMBIENT_JWKS"]),
    ] {
        let mut program = Program::at(env!("CARGO_BIN_EXE_ambient-api-server"));
        for (name, value) in good.iter().chain(&changes) {
            program = program.env(name, value);
        }
        let mut program = program.start();
        assert_eq!(program.wait().await.code(), Some(78), "{changes:?}");
        let log = program.log();
        assert_eq!(log.len(), lines.len(), "{changes:?}: {log:?}");
        for (line, variable) in log.iter().zip(&lines) {
            assert!(line.contains(variable), "{changes:?}: {line}");
            assert!(!line.contains("cret"), "{line}");
        }
    }
    assert!(!database.exists());
}

#[tokio::test]
async fn a_file_that_is_no_database_is_not_touched() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("precious.txt");
    std::fs::write(&path, "precious".repeat(1000)).unwrap();
    let mut program = Program::at(env!("CARGO_BIN_EXE_ambient-api-server"))
        .args([
            "--rest-listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
        ])
        .arg("--database")
        .arg(&path)
        .env("AMBIENT_API_TOKEN", "t")
        .start();
    assert_eq!(program.wait().await.code(), Some(69));
    assert!(program.log().concat().contains("cannot open database"));
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        "precious".repeat(1000)
    );
}

/// Status and text of a page.
async fn page(base: &str, path: &str) -> (u16, String) {
    let answer = reqwest::get(format!("{base}{path}")).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn server_with(environment: &[(&str, &str)]) -> Server {
    let folder = Arc::new(TempDir::new().unwrap());
    Server::start_with(folder, Path::new(":memory:"), environment).await
}

#[tokio::test]
async fn metrics_are_on_the_admin_port_alone_when_there_is_one() {
    let mut server = server_with(&[("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")]).await;
    let admin = format!("http://{}", server.running.listening("admin").await);

    let (status, metrics) = page(&admin, "/metrics").await;
    assert_eq!(status, 200);
    assert!(metrics.contains("ambient_api_server_"), "{metrics}");
    let (status, answer) = page(&server.rest, "/metrics").await;
    assert_eq!(status, 404);
    assert!(!answer.contains("ambient_api_server_"), "{answer}");
    for base in [&admin, &server.rest] {
        for path in ["/healthz", "/readyz"] {
            let ok = (200, "ok\n".to_owned());
            assert_eq!(page(base, path).await, ok, "{base}{path}");
        }
    }
    assert_eq!(page(&admin, "/api/ambient/v1/sessions").await.0, 404);
    server.running.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(server.running.wait().await.success());
}

#[tokio::test]
async fn failures_are_counted_from_the_start() {
    let server = Server::start_in_memory().await;
    let (_, metrics) = page(&server.rest, "/metrics").await;
    for line in [
        "ambient_api_server_commits_total{result=\"error\"} 0",
        "ambient_api_server_jwks_fetches_total{result=\"error\"} 0",
        "ambient_api_server_sign_ins_refused_total 0",
        "ambient_api_server_slow_watchers_ended_total 0",
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line} in {metrics}");
    }
}

#[tokio::test]
async fn keys_that_were_never_fetched_are_stale() {
    // Nobody listens at port 1.
    let nowhere = "http://127.0.0.1:1/keys";
    let server = server_with(&[("AMBIENT_JWKS", nowhere), ("AMBIENT_SESSION_JWKS", nowhere)]).await;
    let (_, metrics) = page(&server.rest, "/metrics").await;
    let line = "ambient_api_server_jwks_last_success_timestamp_seconds 0";
    assert!(metrics.lines().any(|it| it == line), "{metrics}");
}

#[tokio::test]
async fn health_metrics_and_reflection_answer_without_a_token() {
    let server = Server::start().await;
    server
        .create_session(OPERATOR, json!({"name": "n", "prompt": "p"}))
        .await;
    assert_eq!(
        page(&server.rest, "/healthz").await,
        (200, "ok\n".to_owned())
    );
    assert_eq!(page(&server.rest, "/readyz").await.0, 200);
    let (status, metrics) = page(&server.rest, "/metrics").await;
    assert_eq!(status, 200);
    for name in [
        "ambient_api_server_messages_stored_total 1",
        "ambient_api_server_commits_total",
        "ambient_api_server_requests_total",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
    for service in ["", "ambient.v1.SessionService", "ambient.v1.ProjectService"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = HealthClient::new(server.channel()).check(request).await;
        assert_eq!(
            answer.unwrap().into_inner().status(),
            ServingStatus::Serving
        );
    }
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(server.channel())
        .server_reflection_info(futures_util::stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = answer else {
        panic!("{answer:?}");
    };
    let names: Vec<_> = services.service.into_iter().map(|it| it.name).collect();
    assert!(
        names.contains(&"ambient.v1.SessionService".to_owned()),
        "{names:?}"
    );
}
