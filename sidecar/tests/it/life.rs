//! Start, end, restart, settings.

use std::{fs, time::Duration};

use ambient_testing::{DEADLINE, processes::memory, programs::Program};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, net::TcpSocket, time::timeout};

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
    let end = async {
        scene.in_flight("endpoint", 1).await;
        scene.sidecar.signal(Signal::SIGTERM);
    };
    let (answer, ()) = tokio::join!(waiting, end);
    assert_eq!(answer.unwrap().status(), 304);
    assert_eq!(scene.sidecar.wait().await.code(), Some(0));
    assert!(scene.logged("did not end in time").is_empty());
    drop(silent);
}

#[tokio::test]
async fn addresses_are_the_same_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let file = dir.path().join("addresses.json");
    // Ports of an earlier run. They stay ours while nobody listens, so that no other test gets
    // them meanwhile; sockets that do not listen keep nobody from listening.
    let reserved = [(); 3].map(|()| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        socket
    });
    let [endpoint, proxy, admin] = reserved
        .each_ref()
        .map(|socket| socket.local_addr().unwrap());
    let addresses = serde_json::json!({
        "endpoint": endpoint.to_string(),
        "proxy": proxy.to_string(),
        "admin": admin.to_string(),
    });
    fs::write(&file, addresses.to_string()).unwrap();
    let start = |dir: &tempfile::TempDir| program(dir, NOWHERE).arg("--address-file").arg(&file);
    let mut first = Scene::start(start(&dir), dir).await;
    let written: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(written, addresses);
    assert_eq!(
        (first.endpoint, first.proxy, first.admin),
        (endpoint, proxy, admin)
    );
    first.ready().await;
    first.sidecar.kill().await;
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

/// Starts a sidecar that must refuse this setting; gives its last words.
async fn refuses(arguments: &[&str], variable: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut sidecar = program(&dir, NOWHERE).args(arguments).start();
    assert_eq!(sidecar.wait().await.code(), Some(78), "{arguments:?}");
    let words = sidecar.log().pop().unwrap();
    assert!(words.contains(variable), "{arguments:?}: {words}");
    words
}

#[tokio::test]
async fn a_ca_file_that_is_missing_or_none_is_a_bad_setting() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let missing = dir.path().join("missing.pem").display().to_string();
    let broken = "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n";
    for path in [
        missing,
        file("none.pem", "nothing to see here\n"),
        file("empty.pem", ""),
        file("broken.pem", broken),
    ] {
        let words = refuses(&["--ca-file", &path], "AMBIENT_CA_FILE").await;
        assert!(words.contains(&path), "{words}");
    }
}

#[tokio::test]
async fn an_address_that_cannot_be_had_or_told_is_a_bad_setting() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (flag, variable, value) in [
        ("--endpoint-listen", "AMBIENT_ENDPOINT_LISTEN", &*taken),
        ("--proxy-listen", "AMBIENT_PROXY_LISTEN", &*taken),
        // For documentation, so no machine's (RFC 5737).
        ("--admin-listen", "AMBIENT_ADMIN_LISTEN", "192.0.2.1:0"),
        (
            "--address-file",
            "AMBIENT_SIDECAR_ADDRESSES",
            "/dev/null/addresses.json",
        ),
    ] {
        let words = refuses(&[flag, value], variable).await;
        assert!(words.contains(value), "{words}");
    }
}

#[tokio::test]
async fn half_a_request_to_the_admin_port_does_not_hold_up_the_end() {
    let mut scene = Scene::with_token("one", NOWHERE).await;
    let mut half = tokio::net::TcpStream::connect(scene.admin).await.unwrap();
    half.write_all(b"GET /metrics HTTP/1.1\r\nhost: ")
        .await
        .unwrap();
    // Connections are taken in order: once this one is answered, the other is open.
    scene.ready().await;
    scene.sidecar.signal(Signal::SIGTERM);
    // It would be waited for 25 s.
    let ended = scene.sidecar.ended_within(Duration::from_secs(20)).await;
    assert_eq!(ended.expect("ends at once").code(), Some(0));
    drop(half);
}

#[tokio::test]
async fn no_core_dump_holds_a_token() {
    let scene = Scene::with_token("one", NOWHERE).await;
    let limits = fs::read_to_string(format!("/proc/{}/limits", scene.sidecar.pid())).unwrap();
    let core: Vec<&str> = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max core file size"))
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(core[..2], ["0", "0"]);
}

#[tokio::test]
async fn help_shows_no_value_of_the_environment_that_is_somebodys() {
    let mut sidecar = Program::new("ambient-sidecar")
        .arg("--help")
        .env("SESSION_ID", "hunter2-session")
        .env("AMBIENT_CP_TOKEN_URL", "http://hunter2@cp/token")
        .env("AMBIENT_CP_TOKEN_PUBLIC_KEY", "hunter2-key")
        .env("AMBIENT_UPSTREAM_URL", "http://u:hunter2@api")
        .env("AMBIENT_UPSTREAM_GRPC_URL", "http://u:hunter2@api")
        .start();
    assert_eq!(sidecar.wait().await.code(), Some(0));
    let help = sidecar.output().join("\n");
    for variable in ["SESSION_ID", "AMBIENT_CP_TOKEN_URL", "AMBIENT_UPSTREAM_URL"] {
        assert!(help.contains(variable), "{help}");
    }
    assert!(!help.contains("hunter2"), "{help}");
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
