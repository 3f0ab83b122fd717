//! Who may do what, over both faces.

use std::sync::Arc;

use ambient_shared::proto::{
    GetSessionRequest, ListProjectsRequest, ListSessionsRequest, UpdateSessionStatusRequest,
    WatchSessionMessagesRequest, WatchSessionsRequest,
    session_service_client::SessionServiceClient,
};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Request};

use crate::server::{
    AUDIENCE, ISSUER, OPERATOR, SERVICE, SESSION_ISSUER, Server, claims, minted, next, now,
    session_claims, sessions_key, take, user, users_key,
};

const INPUT_CLOSED: &str = r#"{"custom_event":"ambient.input-closed"}"#;

fn code<T>(result: &Result<T, tonic::Status>) -> Code {
    result.as_ref().err().map_or(Code::Ok, tonic::Status::code)
}

/// For each caller: get, watch messages, status, push `assistant`, push `user`, end of input, and
/// the list of sessions.
#[tokio::test]
async fn rights_over_grpc() {
    use Code::{InvalidArgument as Invalid, Ok, PermissionDenied as No, Unauthenticated as Who};
    let server = Server::start().await;
    let id = server
        .create_session(&user("ann"), json!({"name": "n"}))
        .await;
    let other = server
        .create_session(&user("bob"), json!({"name": "o"}))
        .await;
    for (what, token, expected) in [
        (
            "static service",
            SERVICE.to_owned(),
            [Ok, Ok, Ok, Ok, No, No, Ok],
        ),
        (
            "service account",
            user("ambient-cp"),
            [Ok, Ok, Ok, Ok, No, No, Ok],
        ),
        (
            "service account of an IdP client",
            user("service-account-ambient-cp"),
            [Ok, Ok, Ok, Ok, No, No, Ok],
        ),
        ("operator", OPERATOR.to_owned(), [Ok; 7]),
        ("administrator", user("root"), [Ok; 7]),
        ("creator", user("ann"), [Ok; 7]),
        ("stranger", user("bob"), [No, No, No, No, No, No, Ok]),
        ("own token", minted(&id, 0), [Ok, Ok, No, Ok, No, No, No]),
        (
            "token of another start",
            minted(&id, 1),
            [Who, Who, Who, Who, Who, Who, No],
        ),
        ("token of another session", minted(&other, 0), [No; 7]),
        ("nobody", "nonsense".to_owned(), [Who; 7]),
    ] {
        let mut sessions = server.api(&token).sessions();
        let get = sessions
            .get_session(GetSessionRequest { id: id.clone() })
            .await;
        let watch = server.watch_messages(&token, &id, 0).await;
        let status = UpdateSessionStatusRequest {
            id: id.clone(),
            kube_namespace: Some("n".to_owned()),
            ..UpdateSessionStatusRequest::default()
        };
        let status = sessions.update_session_status(status).await;
        let assistant = server.push(&token, &id, "assistant", "a").await;
        let as_user = server.push(&token, &id, "user", "u").await;
        let closed = server.push(&token, &id, "system", INPUT_CLOSED).await;
        let list = sessions.list_sessions(ListSessionsRequest::default()).await;
        let codes = [
            code(&get),
            code(&watch),
            code(&status),
            code(&assistant),
            code(&as_user),
            code(&closed),
            code(&list),
        ];
        assert_eq!(codes, expected, "{what}");
        if let Err(status) = watch
            && status.code() == No
        {
            assert_eq!(
                status.message(),
                "not authorized to watch this session",
                "{what}"
            );
        }
    }
    // A service caller's empty event type is `user` too.
    assert_eq!(code(&server.push(SERVICE, &id, "", "u").await), No);
    assert_eq!(
        code(&server.push(OPERATOR, &id, "no word", "u").await),
        Invalid
    );
    assert_eq!(
        code(&server.push(OPERATOR, "unknown-id", "user", "u").await),
        Code::NotFound
    );
    let unknown = server.watch_messages(SERVICE, "unknown-id", 0).await;
    assert_eq!(code(&unknown), Code::NotFound);
}

/// For each caller: get, status, post `user`, post `assistant`, read messages, list, projects.
#[tokio::test]
async fn rights_over_rest() {
    let server = Server::start().await;
    let id = server
        .create_session(&user("ann"), json!({"name": "n"}))
        .await;
    for (what, token, expected) in [
        (
            "service",
            SERVICE.to_owned(),
            [200, 200, 403, 201, 200, 200, 200],
        ),
        (
            "operator",
            OPERATOR.to_owned(),
            [200, 200, 201, 403, 200, 200, 200],
        ),
        ("creator", user("ann"), [200, 200, 201, 403, 200, 200, 200]),
        ("stranger", user("bob"), [404, 404, 404, 403, 404, 200, 200]),
        (
            "own token",
            minted(&id, 0),
            [200, 403, 403, 201, 200, 403, 403],
        ),
        (
            "old token",
            minted(&id, 7),
            [401, 401, 401, 401, 401, 403, 403],
        ),
        (
            "other token",
            minted("another-session", 0),
            [404, 404, 404, 404, 404, 403, 403],
        ),
        ("nobody", "nonsense".to_owned(), [401; 7]),
    ] {
        let path = format!("/sessions/{id}");
        let messages = format!("{path}/messages");
        let statuses = [
            server.get(&token, &path).await.0,
            server
                .patch(
                    &token,
                    &format!("{path}/status"),
                    json!({"kube_namespace": "x"}),
                )
                .await
                .0,
            server
                .post(&token, &messages, json!({"payload": "p"}))
                .await
                .0,
            server
                .post(
                    &token,
                    &messages,
                    json!({"event_type": "assistant", "payload": "p"}),
                )
                .await
                .0,
            server.get(&token, &messages).await.0,
            server.get(&token, "/sessions").await.0,
            server.get(&token, "/projects").await.0,
        ];
        assert_eq!(statuses, expected, "{what}");
    }
    let (_, error) = server.get("nonsense", "/sessions").await;
    assert_eq!(
        (&error["kind"], &error["code"]),
        (&json!("Error"), &json!("ambient-401"))
    );
}

#[tokio::test]
async fn people_see_their_own_sessions_in_lists_and_watches() {
    let server = Server::start().await;
    let mine = server
        .create_session(&user("ann"), json!({"name": "mine"}))
        .await;
    server
        .create_session(&user("bob"), json!({"name": "theirs"}))
        .await;
    let for_ann = json!({"name": "for her", "created_by_user_id": "ann"});
    server.create_session(SERVICE, for_ann.clone()).await;
    // Nobody makes others the creators of what they make.
    let (_, bobs) = server.post(&user("bob"), "/sessions", for_ann).await;
    assert_eq!(bobs["created_by_user_id"], "bob");

    let (_, list) = server.get(&user("ann"), "/sessions").await;
    assert_eq!(
        (&list["total"], &list["items"][0]["id"]),
        (&json!(2), &json!(mine))
    );
    let search = "/sessions?search=created_by_user_id = 'bob'";
    assert_eq!(server.get(&user("ann"), search).await.1["total"], 0);
    assert_eq!(server.get(SERVICE, "/sessions").await.1["total"], 4);
}

#[tokio::test]
async fn a_session_token_ends_with_the_session_and_with_a_restart() {
    let server = Server::start().await;
    let id = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let path = format!("/sessions/{id}");
    let token = minted(&id, 0);
    let status = |phase: &'static str| {
        let (server, path) = (&server, format!("{path}/status"));
        async move {
            server
                .patch(SERVICE, &path, json!({"phase": phase}))
                .await
                .0
        }
    };
    for phase in ["Pending", "Creating", "Running", "Stopping"] {
        assert_eq!(status(phase).await, 200);
        assert_eq!(server.get(&token, &path).await.0, 200, "{phase}");
    }
    assert_eq!(status("Stopped").await, 200);
    assert_eq!(server.get(&token, &path).await.0, 403);
    assert_eq!(
        code(&server.push(&token, &id, "assistant", "a").await),
        Code::PermissionDenied
    );

    let (_, started) = server
        .post(OPERATOR, &format!("{path}/start"), json!({}))
        .await;

    assert_eq!(started["sdk_restart_count"], 1);
    assert_eq!(server.get(&token, &path).await.0, 401, "of the last start");
    assert_eq!(server.get(&minted(&id, 1), &path).await.0, 200);
    server.call(Method::DELETE, OPERATOR, &path, None).await;
    assert_eq!(server.get(&minted(&id, 1), &path).await.0, 404);
}

#[tokio::test]
async fn tokens_are_checked_in_every_part() {
    let server = Server::start().await;
    let id = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let with = |changes: Value| {
        let mut claims = claims("ann", 600);
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        users_key().sign_jwt("users-1", &claims)
    };
    let mut tampered = user("ann");
    tampered.replace_range(tampered.len() - 6..tampered.len() - 5, "A");
    let none = {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as B64};
        let part = |json: Value| B64.encode(json.to_string());
        format!(
            "{}.{}.",
            part(json!({"alg": "none"})),
            part(claims("root", 600))
        )
    };
    let session = |changes: Value| {
        let mut claims = session_claims(&id, 0);
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims
    };
    let by_sessions_key = |claims: &Value| sessions_key().sign_jwt("sessions-1", claims);
    for (what, token, expected) in [
        ("good", with(json!({})), 200),
        (
            "several audiences",
            with(json!({"aud": ["x", AUDIENCE]})),
            200,
        ),
        ("expired", with(json!({"exp": now() - 1})), 401),
        ("without expiry", with(json!({"exp": null})), 401),
        ("not yet", with(json!({"nbf": now() + 3600})), 401),
        (
            "another issuer",
            with(json!({"iss": "https://evil.test"})),
            401,
        ),
        ("another audience", with(json!({"aud": "x"})), 401),
        (
            "no user",
            with(json!({"preferred_username": null, "sub": "a:b"})),
            401,
        ),
        (
            "by sub alone",
            with(json!({"preferred_username": "a:b", "sub": "ann"})),
            200,
        ),
        (
            "the operator's name",
            with(json!({"preferred_username": "operator"})),
            401,
        ),
        ("tampered", tampered, 401),
        ("unsigned", none, 401),
        (
            "unknown key",
            users_key().sign_jwt("users-2", &claims("ann", 600)),
            401,
        ),
        (
            "another key",
            sessions_key().sign_jwt("users-1", &claims("ann", 600)),
            401,
        ),
        // Each issuer signs its own kind alone.
        (
            "user by the sessions' key",
            by_sessions_key(&claims("root", 600)),
            401,
        ),
        (
            "session by the users' key",
            users_key().sign_jwt("users-1", &session_claims(&id, 0)),
            401,
        ),
        (
            "session without gen",
            by_sessions_key(&session(json!({"gen": null}))),
            401,
        ),
        (
            "session without typ",
            by_sessions_key(&session(json!({"typ": "ID"}))),
            401,
        ),
        (
            "no session id",
            by_sessions_key(&session(json!({"sub": "session:x"}))),
            401,
        ),
    ] {
        let (status, body) = server.get(&token, "/projects").await;
        assert_eq!(status, expected, "{what}: {body}");
    }
    // Its iss names who it is from, even with the same key.
    assert_eq!(claims("ann", 1)["iss"], ISSUER);
}

#[tokio::test]
async fn authorization_may_be_sent_twice_if_it_is_the_same() {
    let server = Server::start().await;
    let id = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let mut sessions = SessionServiceClient::new(server.channel());
    for (second, expected) in [(SERVICE, Code::Ok), (OPERATOR, Code::Unauthenticated)] {
        let mut request = Request::new(GetSessionRequest { id: id.clone() });
        for token in [SERVICE, second] {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().append("authorization", value);
        }
        assert_eq!(code(&sessions.get_session(request).await), expected);
    }
    let missing = sessions.get_session(GetSessionRequest { id }).await;
    assert_eq!(code(&missing), Code::Unauthenticated);
}

#[tokio::test]
async fn watching_needs_rights_that_session_tokens_lack() {
    let server = Server::start().await;
    let id = server
        .create_session(&user("ann"), json!({"name": "n", "prompt": "p"}))
        .await;
    let mut as_session = server.api(&minted(&id, 0)).sessions();
    let all = as_session.watch_sessions(WatchSessionsRequest {}).await;
    assert_eq!(code(&all), Code::PermissionDenied);
    let mut projects = server.api(&minted(&id, 0)).projects();
    let projects = projects.list_projects(ListProjectsRequest::default()).await;
    assert_eq!(code(&projects), Code::PermissionDenied);
    // Its own messages it gets, and says what it has to say.
    let request = WatchSessionMessagesRequest {
        session_id: id.clone(),
        after_seq: 0,
    };
    let watch = as_session.watch_session_messages(request).await.unwrap();
    let mut watch = watch.into_inner();
    assert_eq!(take(&mut watch, 1).await[0].payload, "p");
    let delivered = r#"{"custom_event":"ambient.delivered","value":{"seq":1}}"#;
    server
        .push(&minted(&id, 0), &id, "system", delivered)
        .await
        .unwrap();
    assert_eq!(take(&mut watch, 1).await[0].payload, delivered);
    server
        .call(Method::DELETE, OPERATOR, &format!("/sessions/{id}"), None)
        .await;
    assert_eq!(next(&mut watch).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn session_tokens_have_an_issuer_and_audience_of_their_own() {
    let folder = Arc::new(TempDir::new().unwrap());
    let database = folder.path().join("ambient.db");
    let environment = [
        ("AMBIENT_JWT_ISSUER", ISSUER),
        ("AMBIENT_SESSION_JWT_ISSUER", SESSION_ISSUER),
        ("AMBIENT_SESSION_JWT_AUDIENCE", "for-sessions"),
    ];
    let server = Server::start_with(folder, &database, &environment).await;
    let id = server
        .create_session(&user("ann"), json!({"name": "n"}))
        .await;
    let path = format!("/sessions/{id}");
    for (issuer, audience, of_user, of_session) in [
        (ISSUER, AUDIENCE, 200, 401),
        (SESSION_ISSUER, AUDIENCE, 401, 401),
        (ISSUER, "for-sessions", 401, 401),
        (SESSION_ISSUER, "for-sessions", 401, 200),
    ] {
        let with = |mut claims: Value| {
            claims["iss"] = issuer.into();
            claims["aud"] = audience.into();
            claims
        };
        let users = users_key().sign_jwt("users-1", &with(claims("ann", 600)));
        let sessions = sessions_key().sign_jwt("sessions-1", &with(session_claims(&id, 0)));
        let statuses = [
            server.get(&users, &path).await.0,
            server.get(&sessions, &path).await.0,
        ];
        assert_eq!(statuses, [of_user, of_session], "{issuer} {audience}");
    }
}
