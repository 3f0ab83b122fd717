//! Watchers: messages are never lost, sessions never silently.

use ambient_shared::{
    api::MESSAGE_ID,
    proto::{
        EventType, PushSessionMessageRequest, SessionWatchEvent, UpdateSessionRequest,
        WatchSessionsRequest,
    },
    rest::SessionMessage,
};
use ambient_testing::DEADLINE;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Request};

use crate::server::{OPERATOR, SERVICE, Server, minted, next, push, take, user, user_for};

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_of_messages_gets_everything_late() {
    const COUNT: usize = 4000;
    let server = Server::start().await;
    let session = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let mut slow = server.watch_messages(SERVICE, &session, 0).await.unwrap();
    // More than all windows and buffers between the two can hold.
    let filler = "x".repeat(4096);
    let api = server.api(SERVICE);
    for start in (0..COUNT).step_by(100) {
        let pushes = (start..start + 100).map(|number| {
            let (api, session) = (&api, &session);
            let payload = format!("{number} {filler}");
            async move { push(api, session, "assistant", &payload).await.unwrap() }
        });
        join_all(pushes).await;
    }

    let read = take(&mut slow, COUNT).await;

    assert!(read.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    let mut numbers: Vec<usize> = read
        .iter()
        .map(|message| message.payload.split(' ').next().unwrap().parse().unwrap())
        .collect();
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..COUNT));
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_hands_over_to_live_without_a_gap_or_a_double() {
    const PUSHERS: usize = 6;
    const EACH: usize = 150;
    let server = Server::start().await;
    let session = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let noise = server
        .create_session(OPERATOR, json!({"name": "noise"}))
        .await;
    let mut pushers = JoinSet::new();
    for pusher in 0..PUSHERS {
        let api = server.api(SERVICE);
        let (session, noise) = (session.clone(), noise.clone());
        pushers.spawn(async move {
            for number in 0..EACH {
                let payload = format!("{pusher}-{number}");
                push(&api, &session, "assistant", &payload).await.unwrap();
                push(&api, &noise, "assistant", "noise").await.unwrap();
            }
        });
    }
    // Each watcher begins at another moment: the next one when the last has seen a few more.
    let mut watchers = Vec::new();
    for seen_before in [0, 1, 50, 100, 200, 400] {
        let mut watch = server.watch_messages(SERVICE, &session, 0).await.unwrap();
        let seen = take(&mut watch, seen_before).await;
        watchers.push((watch, seen));
    }

    for (mut watch, mut seen) in watchers {
        let rest = PUSHERS * EACH - seen.len();
        seen.extend(take(&mut watch, rest).await);
        assert!(seen.windows(2).all(|pair| pair[0].seq < pair[1].seq));
        assert!(seen.iter().all(|message| message.session_id == session));
        // In the order of each pusher, and so complete.
        for pusher in 0..PUSHERS {
            let prefix = format!("{pusher}-");
            let of_pusher = seen
                .iter()
                .filter_map(|message| message.payload.strip_prefix(&prefix));
            assert!(of_pusher.eq((0..EACH).map(|number| number.to_string())));
        }
    }
    pushers.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_id_is_stored_once_and_echoed() {
    let server = Server::start().await;
    let session = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let other = server.create_session(OPERATOR, json!({"name": "o"})).await;
    let id = "0197a1f4-3a5b-7c6d-8e9f-0a1b2c3d4e5f";
    let push = |session: &str, id: &str, payload: &str| {
        let mut request = Request::new(PushSessionMessageRequest {
            session_id: session.to_owned(),
            event_type: "assistant".to_owned(),
            payload: payload.to_owned(),
        });
        request
            .metadata_mut()
            .insert(MESSAGE_ID, id.parse().unwrap());
        let mut sessions = server.api(SERVICE).sessions();
        async move { sessions.push_session_message(request).await }
    };
    let answers = join_all((0..16).map(|number| push(&session, id, &number.to_string()))).await;

    let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
    for answer in &answers {
        assert_eq!(answer.metadata().get(MESSAGE_ID).unwrap(), id);
        assert_eq!(answer.get_ref(), answers[0].get_ref());
    }
    let path = format!("/sessions/{session}/messages");
    let (_, stored) = server.get(OPERATOR, &path).await;
    assert_eq!(stored.as_array().unwrap().len(), 1, "{stored}");
    let elsewhere = push(&other, id, "other").await.unwrap().into_inner();
    assert_eq!(elsewhere.payload, "other", "ids are one session's own");
    assert_eq!(
        push(&session, "7", "x").await.unwrap_err().code(),
        Code::InvalidArgument
    );
    // Over REST likewise; and without an id there is no echo.
    let post = |id: Option<&str>| {
        let mut request = server
            .request(Method::POST, OPERATOR, &path)
            .body(json!({"payload": "typed"}).to_string());
        if let Some(id) = id {
            request = request.header(MESSAGE_ID, id);
        }
        async { request.send().await.unwrap() }
    };
    let id = "0197a1f4-0000-7000-8000-000000000000";
    let first = post(Some(id)).await;
    assert_eq!(first.headers()[MESSAGE_ID], id);
    let first: SessionMessage = first.json().await.unwrap();
    let second: SessionMessage = post(Some(id)).await.json().await.unwrap();
    assert_eq!(first, second);
    assert!(!post(None).await.headers().contains_key(MESSAGE_ID));
}

#[tokio::test]
async fn session_events_come_in_commit_order_with_rising_times() {
    let server = Server::start().await;
    let mut all = server.api(SERVICE).sessions();
    let mut all = all
        .watch_sessions(WatchSessionsRequest {})
        .await
        .unwrap()
        .into_inner();
    let mut anns = server.api(&user("ann")).sessions();
    let mut anns = anns
        .watch_sessions(WatchSessionsRequest {})
        .await
        .unwrap()
        .into_inner();

    let bobs = server
        .create_session(&user("bob"), json!({"name": "b"}))
        .await;
    let id = server
        .create_session(&user("ann"), json!({"name": "n"}))
        .await;
    let path = format!("/sessions/{id}");
    server.patch(OPERATOR, &path, json!({"name": "m"})).await;
    server.patch(OPERATOR, &path, json!({"name": "m"})).await; // changes nothing: no event
    server
        .patch(
            SERVICE,
            &format!("{path}/status"),
            json!({"phase": "Running"}),
        )
        .await;
    server.call(Method::DELETE, OPERATOR, &path, None).await;

    let expected = [
        EventType::Created,
        EventType::Updated,
        EventType::Updated,
        EventType::Deleted,
    ];
    let seen = take(&mut anns, expected.len()).await;
    assert_eq!(
        seen.iter()
            .map(SessionWatchEvent::r#type)
            .collect::<Vec<_>>(),
        expected
    );
    assert!(seen.iter().all(|event| event.resource_id == id));
    let times: Vec<_> = seen
        .iter()
        .map(|event| event.session.as_ref().unwrap().metadata.as_ref().unwrap())
        .map(|metadata| metadata.updated_at.unwrap())
        .map(|time| (time.seconds, time.nanos))
        .collect();
    assert!(times.windows(2).all(|pair| pair[0] < pair[1]), "{times:?}");
    assert_eq!(seen[2].session.as_ref().unwrap().phase(), "Running");
    let seen = take(&mut all, expected.len() + 1).await;
    assert_eq!(seen[0].resource_id, bobs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_watcher_of_sessions_is_told_to_list_again() {
    let server = Server::start().await;
    let id = server
        .create_session(
            OPERATOR,
            json!({"name": "n", "prompt": "x".repeat(32 * 1024)}),
        )
        .await;
    let api = server.api(SERVICE);
    let watch = api.sessions().watch_sessions(WatchSessionsRequest {}).await;
    let mut watch = watch.unwrap().into_inner();

    for start in (0..1600).step_by(100) {
        let updates = (start..start + 100).map(|number: usize| {
            let (mut sessions, id) = (server.api(SERVICE).sessions(), id.clone());
            async move {
                let name = Some(number.to_string());
                let update = UpdateSessionRequest {
                    id,
                    name,
                    ..UpdateSessionRequest::default()
                };
                sessions.update_session(update).await.unwrap();
            }
        });
        join_all(updates).await;
    }

    let mut seen = 0;
    let end = loop {
        match next(&mut watch).await {
            Ok(Some(_)) => seen += 1,
            Ok(None) => panic!("the stream ended without saying why"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Aborted, "{end}");
    assert!(seen < 1600);
}

#[tokio::test]
async fn a_stream_ends_when_its_token_expires_and_goes_on_with_a_fresh_one() {
    let server = Server::start().await;
    let session = server
        .create_session(&user("ann"), json!({"name": "n"}))
        .await;
    // Time to open both streams, also on a slow machine.
    let short = user_for("ann", 15);
    let mut watch = server.watch_messages(&short, &session, 0).await.unwrap();
    let mut events = server
        .request(
            Method::GET,
            &short,
            &format!("/sessions/{session}/messages"),
        )
        .header("accept", "text/event-stream")
        .send()
        .await
        .unwrap();
    server
        .push(&user("ann"), &session, "user", "1")
        .await
        .unwrap();
    let seen = take(&mut watch, 1).await;

    let end = next(&mut watch).await.unwrap_err();

    assert_eq!(end.code(), Code::Unauthenticated, "{end}");
    let refused = server
        .watch_messages(&short, &session, 0)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    server
        .push(&user("ann"), &session, "user", "2")
        .await
        .unwrap();
    let fresh = user_for("ann", 600);
    let mut again = server
        .watch_messages(&fresh, &session, seen[0].seq)
        .await
        .unwrap();
    assert_eq!(take(&mut again, 1).await[0].payload, "2");
    let sse_ended = async { while events.chunk().await.unwrap().is_some() {} };
    timeout(DEADLINE, sse_ended).await.unwrap();
}

#[tokio::test]
async fn messages_come_as_server_sent_events_from_the_last_id() {
    let server = Server::start().await;
    let ann = user("ann");
    let session = server
        .create_session(&ann, json!({"name": "n", "prompt": "first"}))
        .await;
    let path = format!("/sessions/{session}/messages");
    let (_, first) = server.get(&ann, &path).await;
    let first = first[0]["seq"].as_i64().unwrap();
    server
        .post(&ann, &path, json!({"payload": "line 1\nline 2"}))
        .await;
    let mut stream = server
        .request(Method::GET, &ann, &path)
        .header("accept", "text/event-stream")
        .header("last-event-id", first.to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(stream.status(), 200);
    assert_eq!(stream.headers()["content-type"], "text/event-stream");
    server.post(&ann, &path, json!({"payload": "live"})).await;

    let mut text = String::new();
    while text.matches("\n\n").count() < 2 {
        let chunk = timeout(DEADLINE, stream.chunk()).await.unwrap().unwrap();
        text.push_str(std::str::from_utf8(&chunk.expect("no end")).unwrap());
    }

    let messages: Vec<(i64, SessionMessage)> = text
        .split_terminator("\n\n")
        .map(|event| {
            let field = |name: &str| {
                event
                    .lines()
                    .find_map(|line| line.strip_prefix(name))
                    .unwrap_or_else(|| panic!("{name} in {event}"))
            };
            (
                field("id: ").parse().unwrap(),
                serde_json::from_str(field("data: ")).unwrap(),
            )
        })
        .collect();
    assert_eq!(messages[0].1.payload, "line 1\nline 2");
    assert_eq!(messages[1].1.payload, "live");
    assert!(
        messages
            .iter()
            .all(|(id, message)| *id == message.seq && *id > first)
    );

    // A deleted session ends the stream.
    server
        .call(Method::DELETE, &ann, &format!("/sessions/{session}"), None)
        .await;
    let ended = async { while stream.chunk().await.unwrap().is_some() {} };
    timeout(DEADLINE, ended).await.unwrap();
}

#[tokio::test]
async fn a_stream_of_a_session_token_ends_with_the_run_that_it_is_for() {
    let server = Server::start().await;
    for (what, changes, expected) in [
        (
            "stopped",
            json!({"phase": "Stopped"}),
            Code::PermissionDenied,
        ),
        ("failed", json!({"phase": "Failed"}), Code::PermissionDenied),
        (
            "started again",
            json!({"sdk_restart_count": 1}),
            Code::Unauthenticated,
        ),
    ] {
        let session = server
            .create_session(&user("ann"), json!({"name": "n"}))
            .await;
        let path = format!("/sessions/{session}");
        let status = async |changes| {
            let (status, answer) = server
                .patch(SERVICE, &format!("{path}/status"), changes)
                .await;
            assert_eq!(status, 200, "{what}: {answer}");
        };
        status(json!({"phase": "Running"})).await;
        let own = minted(&session, 0);
        let mut watch = server.watch_messages(&own, &session, 0).await.unwrap();
        let mut creators = server
            .watch_messages(&user("ann"), &session, 0)
            .await
            .unwrap();
        let mut events = server
            .request(Method::GET, &own, &format!("{path}/messages"))
            .header("accept", "text/event-stream")
            .send()
            .await
            .unwrap();
        // Whatever else changes ends nothing, and what is pushed until the end arrives.
        status(json!({"phase": "Stopping"})).await;
        server
            .push(&own, &session, "assistant", "last words")
            .await
            .unwrap();
        assert_eq!(take(&mut watch, 1).await[0].payload, "last words");
        let chunk = timeout(DEADLINE, events.chunk()).await.unwrap().unwrap();
        let chunk = String::from_utf8(chunk.expect("no end").to_vec()).unwrap();
        assert!(chunk.contains("last words"), "{what}: {chunk}");

        status(changes).await;

        let end = next(&mut watch).await.unwrap_err();
        assert_eq!(end.code(), expected, "{what}: {end}");
        let again = server.watch_messages(&own, &session, 0).await;
        let again = again.unwrap_err();
        assert_eq!(
            (end.code(), end.message()),
            (again.code(), again.message()),
            "{what}: as a new call"
        );
        let ended = async { while events.chunk().await.unwrap().is_some() {} };
        timeout(DEADLINE, ended).await.expect(what);
        // People's streams go on.
        server
            .push(&user("ann"), &session, "user", "after")
            .await
            .unwrap();
        assert_eq!(take(&mut creators, 2).await[1].payload, "after", "{what}");
    }
}
