//! What survives.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use ambient_testing::{disk::SmallDisk, programs::Program};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::Code;

use crate::server::{OPERATOR, SERVICE, Server, push, take};

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_survives_kill_9() {
    let mut server = Server::start().await;
    let session = server
        .create_session(OPERATOR, json!({"name": "survivor", "prompt": "hello"}))
        .await;
    let answered = Arc::new(AtomicUsize::new(0));
    let mut pushers = JoinSet::new();
    for pusher in 0..8 {
        let api = server.api(SERVICE);
        let session = session.clone();
        let answered = Arc::clone(&answered);
        pushers.spawn(async move {
            let mut acknowledged = Vec::new();
            for number in 0.. {
                let payload = format!("{pusher}-{number}");
                match push(&api, &session, "assistant", &payload).await {
                    Ok(message) => acknowledged.push((message.seq, payload)),
                    Err(_) => break,
                }
                answered.fetch_add(1, Ordering::Relaxed);
            }
            acknowledged
        });
    }
    while answered.load(Ordering::Relaxed) < 200 {
        tokio::task::yield_now().await;
    }
    server.running.kill().await;
    let mut acknowledged: Vec<_> = pushers.join_all().await.concat();
    acknowledged.sort();

    let server = Server::start_in(Arc::clone(&server.folder)).await;

    let (status, kept) = server.get(OPERATOR, &format!("/sessions/{session}")).await;
    assert_eq!((status, kept["name"].as_str()), (200, Some("survivor")));
    let path = format!("/sessions/{session}/messages");
    let (_, stored) = server.get(OPERATOR, &path).await;
    let stored: Vec<_> = stored.as_array().unwrap().iter().collect();
    assert_eq!(stored[0]["payload"], "hello");
    let stored: HashSet<_> = stored
        .iter()
        .map(|message| {
            let payload = message["payload"].as_str().unwrap().to_owned();
            (message["seq"].as_i64().unwrap(), payload)
        })
        .collect();
    for message in &acknowledged {
        assert!(
            stored.contains(message),
            "{message:?} was answered and lost"
        );
    }
    // Numbers go on above all that were given.
    let next = server
        .push(SERVICE, &session, "assistant", "next")
        .await
        .unwrap();
    assert!(stored.iter().all(|(seq, _)| *seq < next.seq));
    let (last, _) = acknowledged.last().unwrap();
    let mut watch = server
        .watch_messages(SERVICE, &session, *last)
        .await
        .unwrap();
    assert!(take(&mut watch, 1).await[0].seq > *last);
}

#[tokio::test]
async fn sigterm_ends_streams_and_exits_0() {
    let mut server = Server::start().await;
    let session = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let mut watch = server.watch_messages(SERVICE, &session, 0).await.unwrap();
    server.running.signal(nix::sys::signal::Signal::SIGTERM);
    let status = crate::server::next(&mut watch).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert!(server.running.wait().await.success());
}

#[tokio::test]
async fn a_second_server_on_the_same_database_is_refused() {
    let server = Server::start().await;
    let mut second = Program::at(env!("CARGO_BIN_EXE_ambient-api-server"))
        .args([
            "--rest-listen",
            "127.0.0.1:0",
            "--grpc-listen",
            "127.0.0.1:0",
        ])
        .arg("--database")
        .arg(server.folder.path().join("ambient.db"))
        .env("AMBIENT_API_TOKEN", "t")
        .start();
    assert_eq!(second.wait().await.code(), Some(69));
    let log = second.log().join("\n");
    assert!(log.contains("in use by another process"), "{log}");
}

#[tokio::test]
async fn a_server_in_memory_works_alike() {
    let server = Server::start_in_memory().await;
    let session = server
        .create_session(OPERATOR, json!({"name": "n", "prompt": "p"}))
        .await;
    let mut watch = server.watch_messages(SERVICE, &session, 0).await.unwrap();
    server
        .push(SERVICE, &session, "assistant", "a")
        .await
        .unwrap();
    let seen = take(&mut watch, 2).await;
    assert_eq!(
        (seen[0].payload.as_str(), seen[1].payload.as_str()),
        ("p", "a")
    );
    let (_, list) = server.get(OPERATOR, "/sessions?search=name='n'").await;
    assert_eq!(list["total"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_what_is_new_and_keeps_what_is_there() {
    /// Fits no page that is left somewhere.
    const LARGE: usize = 100 * 1024;
    let folder = TempDir::new().unwrap();
    let disk = SmallDisk::new(folder.path(), "4m");
    let server = Server::start_on(&disk, folder.path()).await;
    let session = server.create_session(OPERATOR, json!({"name": "n"})).await;
    let mut watch = server.watch_messages(SERVICE, &session, 0).await.unwrap();
    let payload = |number: usize| format!("{number} {}", "x".repeat(LARGE));
    let push = async |number| {
        let payload = payload(number);
        server.push(SERVICE, &session, "assistant", &payload).await
    };
    push(0).await.unwrap();

    let ballast = disk.fill(server.running.pid());
    let mut stored = 1;
    let refused = loop {
        match push(stored).await {
            Ok(_) => stored += 1,
            Err(status) => break status,
        }
        assert!(stored < 100, "the disk is never full");
    };

    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("disk is full"), "{refused}");
    let new = json!({"name": "new", "prompt": "x".repeat(LARGE)});
    let (status, answer) = server.post(OPERATOR, "/sessions", new.clone()).await;
    assert_eq!(status, 507, "{answer}");
    assert!(answer.to_string().contains("disk is full"), "{answer}");
    let path = format!("/sessions/{session}/messages");
    let (status, all) = server.get(OPERATOR, &path).await;
    assert_eq!((status, all.as_array().unwrap().len()), (200, stored));
    let log = server.running.log().join("\n");
    assert!(log.contains("database or disk is full"), "{log}");

    drop(ballast);

    push(stored).await.unwrap();
    let (status, answer) = server.post(OPERATOR, "/sessions", new).await;
    assert_eq!(status, 201, "{answer}");
    // The same watch, which has lost nothing and was told nothing twice.
    let seen = take(&mut watch, stored + 1).await;
    for (number, message) in seen.iter().enumerate() {
        assert_eq!(message.payload, payload(number));
    }
}
