//! A session's life over REST and gRPC, and what bad calls get.

use ambient_shared::proto::{
    CreateSessionRequest, DeleteSessionRequest, GetSessionRequest, UpdateSessionRequest,
    UpdateSessionStatusRequest,
};
use reqwest::Method;
use serde_json::json;
use tonic::Code;

use crate::server::{OPERATOR, SERVICE, Server, answer, user};

#[tokio::test]
async fn a_life_over_rest() {
    let server = Server::start().await;
    let ann = user("ann");
    let fields = json!({
        "name": "n", "prompt": "do it", "timeout": 60, "llm_model": "m", "llm_temperature": 0.5,
        "annotations": r#"{"ambient-code.io/agent-command":"[\"true\"]"}"#, "phase": "Running",
    });
    let (status, made) = server.post(&ann, "/sessions", fields).await;
    assert_eq!(status, 201);
    let id = made["id"].as_str().unwrap();
    assert_eq!(made["kind"], "Session");
    assert_eq!(made["href"], format!("/api/ambient/v1/sessions/{id}"));
    assert_eq!(made["created_by_user_id"], "ann");
    assert_eq!(
        (&made["sdk_restart_count"], &made["timeout"]),
        (&json!(0), &json!(60))
    );
    assert!(
        made.get("phase").is_none(),
        "a new session waits to be provisioned"
    );
    let path = format!("/sessions/{id}");
    assert_eq!(server.get(&ann, &path).await, (200, made.clone()));
    let (_, messages) = server.get(&ann, &format!("{path}/messages")).await;
    assert_eq!(
        (&messages[0]["event_type"], &messages[0]["payload"]),
        (&json!("user"), &json!("do it"))
    );

    let (status, changed) = server
        .patch(&ann, &path, json!({"name": "m", "prompt": null}))
        .await;
    assert_eq!((status, &changed["name"]), (200, &json!("m")));
    assert_eq!(changed["prompt"], "do it");
    assert!(changed["updated_at"].as_str() > made["updated_at"].as_str());

    let act = |what: &'static str| {
        let (server, ann, path) = (&server, &ann, format!("{path}/{what}"));
        async move { server.post(ann, &path, json!({})).await }
    };
    let report = |body: serde_json::Value| {
        let (server, path) = (&server, format!("{path}/status"));
        async move { server.patch(SERVICE, &path, body).await }
    };
    assert_eq!(act("stop").await.0, 409, "it does not run");
    assert_eq!(act("start").await.1["phase"], "Pending");
    let running = json!({"phase": "Running", "start_time": "2026-01-02T03:04:05.5Z",
        "kube_namespace": "team", "conditions": r#"[{"type":"Ready","status":"True"}]"#});
    let (status, running) = report(running).await;
    assert_eq!(
        (status, &running["start_time"]),
        (200, &json!("2026-01-02T03:04:05.500Z"))
    );
    assert_eq!(act("start").await.0, 409);
    assert_eq!(act("stop").await.1["phase"], "Stopping");
    assert_eq!(act("stop").await.0, 409);
    assert_eq!(
        report(json!({"phase": "Running"})).await.0,
        409,
        "a stop is not undone"
    );
    let (_, ended) = report(json!({"phase": "Stopped"})).await;
    assert!(ended["completion_time"].is_string());
    let (status, error) = report(json!({"phase": "Running"})).await;
    assert_eq!(status, 409);
    assert!(
        error["reason"].as_str().unwrap().contains("Stopped"),
        "{error}"
    );
    // Facts about a session that has ended may still come in.
    assert_eq!(
        report(json!({"phase": "Stopped", "kube_namespace": "x"}))
            .await
            .0,
        200
    );
    let (_, again) = act("start").await;
    assert_eq!(
        (&again["phase"], &again["sdk_restart_count"]),
        (&json!("Pending"), &json!(1))
    );
    let late = json!({"phase": "Completed", "sdk_restart_count": 0});
    assert_eq!(report(late).await.0, 409, "late news of the run before");
    assert!(again.get("completion_time").is_none() && again.get("conditions").is_none());

    assert_eq!(server.call(Method::DELETE, &ann, &path, None).await.0, 204);
    assert_eq!(server.get(&ann, &path).await.0, 404);
    assert_eq!(server.get(&ann, &format!("{path}/messages")).await.0, 404);
    assert_eq!(server.call(Method::DELETE, &ann, &path, None).await.0, 404);
}

#[tokio::test]
async fn a_life_over_grpc() {
    let server = Server::start().await;
    let mut sessions = server.api(SERVICE).sessions();
    let create = CreateSessionRequest {
        name: "n".to_owned(),
        prompt: Some("do it".to_owned()),
        project_id: Some("team".to_owned()),
        created_by_user_id: Some("ann".to_owned()),
        ..CreateSessionRequest::default()
    };
    let made = sessions.create_session(create).await.unwrap().into_inner();
    let id = made.metadata.as_ref().unwrap().id.clone();
    assert_eq!((made.created_by_user_id(), made.prompt()), ("ann", "do it"));
    let path = format!("/sessions/{id}/messages");
    let (_, messages) = server.get(OPERATOR, &path).await;
    assert_eq!(messages, json!([]), "over gRPC the prompt is no message");

    let update = UpdateSessionRequest {
        id: id.clone(),
        labels: Some(r#"{"a":"b"}"#.to_owned()),
        ..UpdateSessionRequest::default()
    };
    let changed = sessions.update_session(update).await.unwrap().into_inner();
    assert_eq!(
        (changed.name.as_str(), changed.labels()),
        ("n", r#"{"a":"b"}"#)
    );
    let mut report = async |phase: &str| {
        let report = UpdateSessionStatusRequest {
            id: id.clone(),
            phase: Some(phase.to_owned()),
            ..UpdateSessionStatusRequest::default()
        };
        sessions.update_session_status(report).await
    };
    assert_eq!(
        report("Completed").await.unwrap().into_inner().phase(),
        "Completed"
    );
    assert_eq!(
        report("Running").await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    assert_eq!(
        report("Sleeping").await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let get = || GetSessionRequest { id: id.clone() };
    let ended = sessions.get_session(get()).await.unwrap().into_inner();
    assert_eq!(ended.phase(), "Completed");
    let delete = DeleteSessionRequest { id: id.clone() };
    sessions.delete_session(delete.clone()).await.unwrap();
    assert_eq!(
        sessions.get_session(get()).await.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(
        sessions.delete_session(delete).await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn bad_calls_are_told_why_in_one_form() {
    let server = Server::start().await;
    let id = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let session = format!("/sessions/{id}");
    let messages = format!("{session}/messages");
    let status = format!("{session}/status");
    let long = json!({"payload": "x".repeat(1024 * 1024 + 1)}).to_string();
    let huge = json!({"payload": "x".repeat(5 * 1024 * 1024)}).to_string();
    for (method, path, body, expected, reason) in [
        ("POST", "/sessions", "", 400, "not JSON"),
        ("POST", "/sessions", "{", 400, "not JSON"),
        ("POST", "/sessions", "name=n", 400, "not JSON"),
        ("POST", "/sessions", "[]", 400, "not a JSON object"),
        ("POST", "/sessions", "{}", 400, "name is missing"),
        (
            "POST",
            "/sessions",
            r#"{"name":7}"#,
            400,
            "name: invalid type",
        ),
        (
            "POST",
            "/sessions",
            r#"{"name":"n","labels":{}}"#,
            400,
            "labels: invalid type",
        ),
        (
            "POST",
            "/sessions",
            r#"{"name":"n","labels":"x"}"#,
            400,
            "labels must hold",
        ),
        ("PATCH", &session, r#"{"name":""}"#, 400, "name must have"),
        (
            "PATCH",
            &status,
            r#"{"phase":"Sleeping"}"#,
            400,
            "\"Sleeping\" is not a session phase",
        ),
        (
            "PATCH",
            &status,
            r#"{"start_time":"soon"}"#,
            400,
            "start_time: \"soon\" is not",
        ),
        ("POST", &messages, "{}", 400, "payload is missing"),
        (
            "POST",
            &messages,
            r#"{"payload":7}"#,
            400,
            "payload: invalid type",
        ),
        ("POST", &messages, &long, 413, "at most 1048576"),
        ("POST", &messages, &huge, 413, "the body has more than"),
        (
            "GET",
            "/sessions/unknown",
            "",
            404,
            "session \"unknown\" not found",
        ),
        ("POST", "/sessions/unknown/stop", "", 404, "not found"),
        (
            "POST",
            "/sessions/unknown/messages",
            r#"{"payload":"x"}"#,
            404,
            "not found",
        ),
        (
            "GET",
            &format!("{messages}?after_seq=x"),
            "",
            400,
            "after_seq must be",
        ),
        ("GET", "/sessions/%FF", "", 400, "Bad Request"),
        ("PUT", &session, "", 405, "method not allowed"),
        ("DELETE", "/sessions", "", 405, "method not allowed"),
        ("GET", "/agents", "", 404, "no such path"),
    ] {
        let request = server
            .request(method.parse().unwrap(), OPERATOR, path)
            .body(body.to_owned());
        let (code, error) = answer(request).await;
        assert_eq!(code, expected, "{method} {path}: {error}");
        let said = error["reason"].as_str().unwrap();
        assert!(said.contains(reason), "{method} {path}: {said}");
        assert_eq!(error["kind"], "Error");
        assert_eq!(error["id"], expected.to_string());
    }
    let wrong = server
        .request(Method::PUT, OPERATOR, &session)
        .send()
        .await
        .unwrap();
    let allowed = wrong.headers()["allow"].to_str().unwrap();
    assert!(
        allowed.contains("GET") && allowed.contains("PATCH"),
        "{allowed}"
    );
    assert!(wrong.headers().contains_key("x-operation-id"));
    // A message of the largest size is taken, escapes and all.
    let largest = json!({"payload": "\n".repeat(1024 * 1024)});
    assert_eq!(server.post(OPERATOR, &messages, largest).await.0, 201);
}

#[tokio::test]
async fn messages_are_read_from_where_one_left_off() {
    let server = Server::start().await;
    let id = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let path = format!("/sessions/{id}/messages");
    for number in 0..600 {
        let (status, _) = server
            .post(OPERATOR, &path, json!({"payload": number.to_string()}))
            .await;
        assert_eq!(status, 201);
    }
    let (_, all) = server.get(OPERATOR, &path).await;
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 600, "more than one page");
    assert!(
        all.iter()
            .enumerate()
            .all(|(at, it)| it["payload"].as_str() == Some(&at.to_string()))
    );
    let after = all[597]["seq"].as_i64().unwrap();
    let (_, rest) = server
        .get(OPERATOR, &format!("{path}?after_seq={after}"))
        .await;
    assert_eq!(rest.as_array().unwrap(), &all[598..]);
    let after = all[599]["seq"].as_i64().unwrap();
    let (_, rest) = server
        .get(OPERATOR, &format!("{path}?after_seq={after}"))
        .await;
    assert_eq!(rest, json!([]));
}
