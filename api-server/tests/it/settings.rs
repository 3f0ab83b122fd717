//! Starting: bad settings, health, reflection, metrics.

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

#[tokio::test]
async fn health_metrics_and_reflection_answer_without_a_token() {
    let server = Server::start().await;
    server
        .create_session(OPERATOR, json!({"name": "n", "prompt": "p"}))
        .await;
    let page = async |path: &str| {
        let answer = reqwest::get(format!("{}{path}", server.rest))
            .await
            .unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert_eq!(page("/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(page("/readyz").await.0, 200);
    let (status, metrics) = page("/metrics").await;
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
