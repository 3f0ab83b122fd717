//! Lists: pages, `search`, `orderBy`, projects.

use std::collections::HashSet;

use ambient_shared::proto::ListSessionsRequest;
use reqwest::Method;
use serde_json::{Value, json};
use url::form_urlencoded;

use crate::server::{OPERATOR, SERVICE, Server, answer, user};

async fn query(server: &Server, parameters: &[(&str, &str)]) -> (u16, Value) {
    let query = form_urlencoded::Serializer::new(String::new())
        .extend_pairs(parameters)
        .finish();
    server.get(OPERATOR, &format!("/sessions?{query}")).await
}

fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().unwrap();
    items
        .iter()
        .map(|item| item["name"].as_str().unwrap())
        .collect()
}

/// Five sessions: a to e, with timeouts 1 to 5, in two projects; c and d run, e has failed.
async fn five_sessions() -> Server {
    let server = Server::start().await;
    for (number, name) in (1..).zip(["a", "b", "c", "d", "e"]) {
        let project = if number % 2 == 0 { "even" } else { "odd" };
        let id = server
            .create_session(
                OPERATOR,
                json!({"name": name, "timeout": number, "project_id": project,
                    "llm_temperature": f64::from(number) / 10.0}),
            )
            .await;
        let phase = match name {
            "c" | "d" => "Running",
            "e" => "Failed",
            _ => continue,
        };
        let path = format!("/sessions/{id}/status");
        let (status, _) = server.patch(SERVICE, &path, json!({"phase": phase})).await;
        assert_eq!(status, 200);
    }
    server
}

#[tokio::test]
async fn search_and_order_show_what_they_say() {
    let server = five_sessions().await;
    for (search, order, expected) in [
        ("", "", "abcde"),
        ("phase = 'Running'", "", "cd"),
        ("phase='Running' and timeout > 3", "", "d"),
        ("PHASE In ('Running', 'Failed') AND name <> 'c'", "", "de"),
        ("phase is null", "name desc", "ba"),
        ("phase is not null", "phase, name desc", "edc"),
        ("name like 'A'", "", "a"),
        ("name not like '%a%' and project_id = 'odd'", "", "ce"),
        ("llm_temperature <= 0.2", "", "ab"),
        ("timeout not in (1, 2, 3)", "timeout desc", "ed"),
        (
            "created_at > '2020-01-01T00:00:00Z'",
            "created_at desc",
            "edcba",
        ),
        ("created_at < '2020-01-01T00:00:00Z'", "", ""),
        ("name = 'x'' or 1=1 --'", "", ""),
        (
            "created_by_user_id = 'operator'",
            "project_id desc, timeout desc",
            "ecadb",
        ),
    ] {
        let (status, list) = query(&server, &[("search", search), ("orderBy", order)]).await;
        assert_eq!(status, 200, "{search}: {list}");
        assert_eq!(names(&list).concat(), expected, "{search} by {order}");
        assert_eq!(list["total"], expected.len());
        assert_eq!(list["size"], expected.len());
        assert_eq!(list["kind"], "SessionList");
    }
}

#[tokio::test]
async fn bad_queries_are_400_with_the_reason() {
    let server = Server::start().await;
    for (name, value, reason) in [
        ("page", "0", "page must be a number from 1, not \"0\""),
        ("page", "-1", "page must be a number from 1"),
        ("page", "two", "page must be a number from 1"),
        ("size", "0", "size must be a number from 1"),
        ("size", "many", "size must be a number from 1"),
        ("search", "colour = 'red'", "unknown column \"colour\""),
        ("search", "phase ~ 'x'", "unknown operator \"~\""),
        ("search", "phase = 'a' or phase = 'b'", "not by \"or\""),
        (
            "search",
            "phase = 'a'; drop table sessions",
            "cannot read ';'",
        ),
        ("search", "timeout = 'soon'", "a whole number"),
        ("orderBy", "colour", "unknown column \"colour\""),
        ("orderBy", "name sideways", "asc or desc"),
        ("orderBy", "(select 1)", "expected a column"),
    ] {
        let (status, error) = query(&server, &[(name, value)]).await;
        assert_eq!(status, 400, "{name}={value}: {error}");
        let said = error["reason"].as_str().unwrap();
        assert!(said.contains(reason), "{name}={value}: {said}");
        assert_eq!(
            (&error["kind"], &error["id"]),
            (&json!("Error"), &json!("400"))
        );
        assert_eq!(error["code"], "ambient-400");
        assert!(
            error["operation_id"]
                .as_str()
                .is_some_and(|id| id.len() == 36)
        );
        assert!(error["href"].is_string());
    }
}

#[tokio::test]
async fn every_answer_says_that_minted_tokens_open_one_session() {
    let server = Server::start().await;
    for (path, status) in [
        ("/sessions", 200),
        ("/sessions/none", 404),
        ("/nothing", 404),
    ] {
        let answer = server.request(Method::GET, SERVICE, path).send().await;
        let answer = answer.unwrap();
        assert_eq!(answer.status(), status, "{path}");
        let header = answer.headers().get("x-ambient-session-tokens");
        assert_eq!(header.unwrap(), "v1", "{path}");
    }
}

#[tokio::test]
async fn pages_show_each_row_once_and_sizes_are_capped() {
    let server = Server::start().await;
    for number in 0..25 {
        let name = format!("n{}", number % 3);
        server.create_session(OPERATOR, json!({"name": name})).await;
    }
    let mut seen = HashSet::new();
    for page in 1..=4 {
        // By a column with many ties: the id decides among them.
        let page = page.to_string();
        let parameters = [("page", page.as_str()), ("size", "7"), ("orderBy", "name")];
        let (_, list) = query(&server, &parameters).await;
        assert_eq!(list["total"], 25);
        assert_eq!(list["page"].to_string(), page);
        for item in list["items"].as_array().unwrap() {
            assert!(seen.insert(item["id"].to_string()), "seen twice");
        }
    }
    assert_eq!(seen.len(), 25);
    for (size, status) in [("1000", 200), ("1001", 200), ("99999999999", 200)] {
        assert_eq!(query(&server, &[("size", size)]).await.0, status, "{size}");
    }
    let (_, beyond) = query(&server, &[("page", "4000000000"), ("size", "1000")]).await;
    assert_eq!((&beyond["size"], &beyond["total"]), (&json!(0), &json!(25)));

    // gRPC: 20 when not given, or above 500.
    let mut sessions = server.api(SERVICE).sessions();
    for (page, size, expected) in [(0, 0, 20), (1, 501, 20), (2, 20, 5), (1, 7, 7)] {
        let request = ListSessionsRequest { page, size };
        let list = sessions.list_sessions(request).await.unwrap().into_inner();
        assert_eq!(list.items.len(), expected, "page {page} of {size}");
        assert_eq!(list.metadata.unwrap().total, 25);
    }
}

#[tokio::test]
async fn a_size_above_1000_is_cut_to_1000() {
    let server = Server::start().await;
    let creations = (0..1001).map(|_| async {
        server.create_session(OPERATOR, json!({"name": "n"})).await;
    });
    futures_util::future::join_all(creations).await;
    let (status, list) = query(&server, &[("size", "1500")]).await;
    assert_eq!(status, 200);
    assert_eq!(
        (&list["size"], &list["total"]),
        (&json!(1000), &json!(1001))
    );
    let (_, list) = query(&server, &[]).await;
    assert_eq!(list["size"], 100, "the default");
}

#[tokio::test]
async fn a_project_restricts_lists_and_names_that_of_new_sessions() {
    let server = five_sessions().await;
    let list = |header: Option<&'static str>, query: &'static str| {
        let mut request = server.request(Method::GET, OPERATOR, &format!("/sessions{query}"));
        if let Some(header) = header {
            request = request.header("X-Ambient-Project", header);
        }
        answer(request)
    };
    assert_eq!(names(&list(Some("even"), "").await.1).concat(), "bd");
    assert_eq!(
        names(&list(None, "?project_id=odd").await.1).concat(),
        "ace"
    );
    assert_eq!(names(&list(Some("none"), "").await.1).concat(), "");
    let both = list(Some("odd"), "?project_id=odd&search=timeout>1").await;
    assert_eq!(names(&both.1).concat(), "ce");
    assert_eq!(list(Some("odd"), "?project_id=even").await.0, 400);

    let create = |body: Value| {
        let request = server
            .request(Method::POST, &user("ann"), "/sessions")
            .header("X-Ambient-Project", "team");
        answer(request.body(body.to_string()))
    };
    let (status, session) = create(json!({"name": "n"})).await;
    assert_eq!((status, &session["project_id"]), (201, &json!("team")));
    let (status, _) = create(json!({"name": "n", "project_id": "other"})).await;
    assert_eq!(status, 400);
    let (status, error) = server
        .post(
            OPERATOR,
            "/sessions",
            json!({"name": "n", "project_id": "No_Label"}),
        )
        .await;
    assert_eq!(status, 400);
    assert!(error["reason"].as_str().unwrap().contains("DNS label"));
}
