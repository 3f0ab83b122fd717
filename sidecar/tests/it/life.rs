//! Start, end, restart, settings.

use std::{fs, time::Duration};

use ambient_testing::{DEADLINE, processes::memory, programs::Program};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::time::{Instant, timeout};

use crate::{
    scene::{NOWHERE, Scene, mount, program, read},
    upstream::Upstream,
};

#[tokio::test]
async fn a_request_under_way_is_finished_before_the_end() {
    let upstream = Upstream::start().await;
    let mut scene = Scene::with_token("one", &upstream.url()).await;
    let slow = scene.get("/slow").send();
    let end = async {
        upstream.shared.waiting.notified().await;
        scene.sidecar.signal(Signal::SIGTERM);
        // Who is in the middle of work may still need the ports.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let fresh = crate::scene::client();
        let url = format!("http://{}/x", scene.proxy);
        assert_eq!(fresh.get(url).send().await.unwrap().status(), 200);
        upstream.shared.gate.notify_one();
    };
    let (answer, ()) = timeout(DEADLINE, async { tokio::join!(slow, end) })
        .await
        .unwrap();
    assert_eq!(read(answer.unwrap()).await, (200, "done".to_owned()));
    let status = scene.sidecar.wait().await;
    assert_eq!(status.code(), Some(0));
}

#[tokio::test]
async fn idle_connections_and_waits_do_not_hold_up_the_end() {
    let upstream = Upstream::start().await;
    let mut scene = Scene::with_token("one", &upstream.url()).await;
    scene.get("/x").send().await.unwrap();
    let hash = scene.token("").send().await.unwrap().headers()["etag"]
        .to_str()
        .unwrap()
        .to_owned();
    let query = format!("?after={hash}&wait=60s");
    let silent = tokio::net::TcpStream::connect(scene.proxy).await.unwrap();
    let waiting = scene.token(&query).send();
    let started = Instant::now();
    let end = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        scene.sidecar.signal(Signal::SIGTERM);
    };
    let (answer, ()) = tokio::join!(waiting, end);
    assert_eq!(answer.unwrap().status(), 304);
    assert_eq!(scene.sidecar.wait().await.code(), Some(0));
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    drop(silent);
}

#[tokio::test]
async fn addresses_are_the_same_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let file = dir.path().join("addresses.json");
    let start = |dir: &tempfile::TempDir| program(dir, NOWHERE).arg("--address-file").arg(&file);
    let mut first = Scene::start(start(&dir), dir).await;
    let written: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(
        written,
        serde_json::json!({
            "endpoint": first.endpoint.to_string(),
            "proxy": first.proxy.to_string(),
            "admin": first.admin.to_string(),
        })
    );
    first.ready().await;
    first.sidecar.kill().await;
    let (endpoint, proxy, admin) = (first.endpoint, first.proxy, first.admin);
    let second = Scene::start(start(&first.dir), first.dir).await;
    assert_eq!(
        (second.endpoint, second.proxy, second.admin),
        (endpoint, proxy, admin)
    );
    second.serves("one").await;
}

#[tokio::test]
async fn bad_settings_are_one_line_and_nothing_is_started() {
    for (arguments, named) in [
        (&[][..], "AMBIENT_UPSTREAM_URL"),
        (&["--upstream", "api"], "AMBIENT_UPSTREAM_URL"),
        (
            &["--upstream", "http://u:hunter2@api"],
            "AMBIENT_UPSTREAM_URL",
        ),
        (
            &["--upstream", NOWHERE, "--proxy-listen", "0.0.0.0:0"],
            "AMBIENT_PROXY_LISTEN",
        ),
        (
            &["--upstream", NOWHERE, "--require-header=perhaps"],
            "AMBIENT_REQUIRE_HEADER",
        ),
        (&["--upstream", NOWHERE, "--log-level", "loud"], "LOG_LEVEL"),
        (&["--upstream", NOWHERE, "--nonsense"], "--nonsense"),
    ] {
        let mut sidecar = Program::new("ambient-sidecar").args(arguments).start();
        let status = sidecar.wait().await;
        assert_eq!(status.code(), Some(78), "{arguments:?}");
        let said = sidecar.log();
        assert_eq!(said.len(), 1, "{said:?}");
        assert!(said[0].contains(named), "{said:?}");
        assert!(!said[0].contains("hunter2"), "{said:?}");
    }
}

#[tokio::test]
async fn a_ca_file_that_is_none_and_a_port_that_is_taken_end_it() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    fs::write(
        &ca,
        "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let mut sidecar = program(&dir, "https://localhost")
        .arg("--ca-file")
        .arg(&ca)
        .start();
    assert_eq!(sidecar.wait().await.code(), Some(78));

    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut sidecar = program(&dir, NOWHERE)
        .args(["--proxy-listen", &address])
        .start();
    assert_eq!(sidecar.wait().await.code(), Some(69));
    assert!(sidecar.log().last().unwrap().contains(&address));
}

#[tokio::test]
async fn help_and_version_go_to_stdout() {
    for flag in ["--help", "--version"] {
        let mut sidecar = Program::new("ambient-sidecar").arg(flag).start();
        assert_eq!(sidecar.wait().await.code(), Some(0));
        assert!(sidecar.output().join("\n").contains("ambient-sidecar"));
    }
}

/// Beside every agent there is one: it must be small. What is mapped from the binary is left out,
/// as that of a debug build is ten times that of a release.
#[tokio::test]
async fn idle_memory_is_small_also_after_work() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    for _ in 0..200 {
        scene
            .post("/x")
            .body(vec![b'x'; 20_000])
            .send()
            .await
            .unwrap();
        scene.token("").send().await.unwrap();
    }
    let anonymous = memory(scene.sidecar.pid(), "RssAnon").unwrap();
    assert!(anonymous < 6 * 1024 * 1024, "{anonymous} bytes");
}

#[tokio::test]
async fn no_secret_is_ever_logged() {
    let upstream = Upstream::start().await;
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "hunter2-token");
    let program = program(&dir, &upstream.url()).env("LOG_LEVEL", "trace");
    let mut scene = Scene::start(program, dir).await;
    scene.ready().await;
    scene
        .get("/x")
        .header("authorization", "Bearer hunter2-mine")
        .send()
        .await
        .unwrap();
    scene.token("").send().await.unwrap();
    scene.sidecar.signal(Signal::SIGTERM);
    scene.sidecar.wait().await;
    let log = scene.sidecar.log();
    assert!(log.len() > 10);
    let leaks: Vec<_> = log.iter().filter(|line| line.contains("hunter2")).collect();
    assert!(leaks.is_empty(), "{leaks:?}");
}
