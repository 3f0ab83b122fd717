//! What the server tells of itself.

use std::sync::Arc;

use ambient_shared::proto::GetSessionRequest;
use ambient_testing::{
    collector::{Collector, Span},
    metrics::{is_in_table, values_are_in_table},
};
use serde_json::json;
use tempfile::TempDir;

use crate::server::{OPERATOR, Server};

async fn server(environment: &[(&str, &str)]) -> Server {
    let folder = Arc::new(TempDir::new().unwrap());
    let database = folder.path().join("ambient.db");
    Server::start_with(folder, &database, environment).await
}

#[tokio::test]
async fn calls_are_spans_of_the_callers_trace() {
    let collector = Collector::start().await;
    let server = server(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint()),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("OTEL_SERVICE_NAME", "sessions-of-tests"),
    ])
    .await;
    let id = server
        .create_session(OPERATOR, json!({"name": "a session"}))
        .await;
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let path = format!("/sessions/{id}");
    let asked = server.request(reqwest::Method::GET, OPERATOR, &path);
    let asked = asked.header("traceparent", format!("00-{trace}-{parent}-01"));
    assert_eq!(asked.send().await.unwrap().status(), 200);
    let missing = GetSessionRequest {
        id: "there-is-none".to_owned(),
    };
    let status = server.api(OPERATOR).sessions().get_session(missing).await;
    assert_eq!(status.unwrap_err().code(), tonic::Code::NotFound);

    let rest = collector.span("of REST", |it| it.trace == trace).await;
    assert_eq!(rest.service, "sessions-of-tests");
    assert_eq!(
        (rest.name.as_str(), rest.parent.as_str()),
        ("REST call", parent)
    );
    assert_eq!(rest.attribute("path"), "/api/ambient/v1/sessions/{id}");
    let grpc = collector.span("of gRPC", |it| it.name == "gRPC call").await;
    assert_eq!(grpc.attribute("call"), "GetSession");
    assert_eq!(grpc.attribute("code"), "NotFound");
    assert!(collector.was_told("GetSession"), "what is told is found");
    for secret in [&id, OPERATOR, "there-is-none"] {
        assert!(!collector.was_told(secret), "{secret}");
    }

    let page = reqwest::get(format!("{}/metrics", server.rest))
        .await
        .unwrap();
    let page = page.text().await.unwrap();
    is_in_table(&page);
    values_are_in_table(&page, "ambient_api_server_");
    let line = "ambient_api_server_requests_total{face=\"grpc\",status=\"NotFound\"} 1";
    assert!(page.contains(line), "{page}");
}

#[tokio::test]
async fn only_who_is_signed_in_decides_whether_a_call_is_exported() {
    let collector = Collector::start().await;
    let server = server(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &collector.endpoint()),
        ("OTEL_BSP_SCHEDULE_DELAY", "50"),
        ("OTEL_TRACES_SAMPLER", "parentbased_always_off"),
    ])
    .await;
    let trace = |number: usize| format!("{number:032x}");
    let parent = |number| format!("00-{}-00f067aa0ba902b7-01", trace(number));
    for (number, token, status) in [(1, "somebody else's", 401), (2, OPERATOR, 200)] {
        let asked = server.request(reqwest::Method::GET, token, "/sessions");
        let asked = asked.header("traceparent", parent(number)).send();
        assert_eq!(asked.await.unwrap().status(), status);
    }
    let code = tonic::Code::Unauthenticated;
    for (number, token, code) in [
        (3, "another-token", code),
        (4, OPERATOR, tonic::Code::NotFound),
    ] {
        let mut missing = tonic::Request::new(GetSessionRequest {
            id: "there-is-none".to_owned(),
        });
        let of_caller = parent(number).parse().unwrap();
        missing.metadata_mut().insert("traceparent", of_caller);
        let asked = server.api(token).sessions().get_session(missing).await;
        assert_eq!(asked.unwrap_err().code(), code);
    }

    // What ends first is exported first.
    for number in [2, 4] {
        let is_it = |it: &Span| it.trace == trace(number);
        collector.span("of who is signed in", is_it).await;
    }
    let spans = collector.spans();
    for number in [1, 3] {
        let of_stranger = spans.iter().find(|it| it.trace == trace(number));
        assert!(of_stranger.is_none(), "{of_stranger:?}");
    }
}

#[tokio::test]
async fn what_traces_cannot_be_is_said_and_stops_nothing() {
    let mut server = server(&[
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "http://collector.example:4317",
        ),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
    ])
    .await;
    let line = server
        .running
        .log_line("that they are off", |it| it["message"] == "traces are off")
        .await;
    let reason = line["reason"].as_str().unwrap();
    assert!(
        reason.starts_with("OTEL_EXPORTER_OTLP_PROTOCOL "),
        "{reason}"
    );
    assert_eq!(server.get(OPERATOR, "/sessions").await.0, 200);
}
