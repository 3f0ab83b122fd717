//! Limits of a connection: each over a real socket, and counted by its cause.

use std::time::Duration;

use ambient_control_plane::{endpoint::ConnectionLimits, metrics::CONNECTIONS_CLOSED};
use ambient_shared::telemetry::MetricsPage;
use ambient_testing::DEADLINE;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::scene::{ACTIVE, Client, Scene, Setup, raw};

/// Far longer than any test takes.
const NEVER: Duration = Duration::from_secs(3600);

/// So short that a test may wait for it.
const SHORT: Duration = Duration::from_millis(300);

const OPEN: ConnectionLimits = ConnectionLimits {
    places: 64,
    head: NEVER,
    idle: NEVER,
    life: NEVER,
};

async fn limited(connections: ConnectionLimits) -> Scene {
    let setup = Setup {
        connections,
        ..Setup::default()
    };
    setup.start().await
}

/// Waits until so many connections have ended for this cause.
async fn closed(page: &MetricsPage, cause: &str, count: u32) {
    let line = format!("{CONNECTIONS_CLOSED}{{cause=\"{cause}\"}} {count}");
    let deadline = Instant::now() + DEADLINE;
    while !page.render().contains(&line) {
        assert!(Instant::now() < deadline, "no {line} in\n{}", page.render());
        sleep(Duration::from_millis(5)).await;
    }
}

/// Recording of all tasks of a test, which run on its own thread.
macro_rules! recorded {
    ($page:ident) => {
        let $page = MetricsPage::default();
        let _recording = metrics::set_default_local_recorder(&$page);
    };
}

#[tokio::test]
async fn a_head_that_does_not_come_in_time_ends_the_connection() {
    recorded!(page);
    let scene = limited(ConnectionLimits {
        head: SHORT,
        ..OPEN
    })
    .await;
    let begin = Instant::now();
    let mut silent = Client::connect(scene.address).await;
    let mut stuck = Client::connect(scene.address).await;
    stuck.send("GET /token HTTP/1.1\r\nAuthor").await;
    silent.closed().await;
    stuck.closed().await;
    assert!(begin.elapsed() >= SHORT);
    closed(&page, "head_late", 2).await;
}

#[tokio::test]
async fn a_byte_now_and_then_gives_a_head_no_more_time() {
    recorded!(page);
    let scene = limited(ConnectionLimits {
        head: SHORT,
        ..OPEN
    })
    .await;
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    let begin = Instant::now();
    let sent = async {
        let head = b"GET /token HTTP/1.1\r\nX-Filler: ";
        for byte in head.iter().chain(std::iter::repeat(&b'x')) {
            if stream.write_all(&[*byte]).await.is_err() {
                return;
            }
            sleep(SHORT / 20).await;
        }
    };
    timeout(DEADLINE, sent).await.expect("the server closes it");
    assert!(begin.elapsed() >= SHORT);
    closed(&page, "head_late", 1).await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_later_than_one_that_owes_a_head() {
    recorded!(page);
    let scene = limited(ConnectionLimits {
        head: SHORT,
        idle: SHORT * 4,
        ..OPEN
    })
    .await;
    let mut client = Client::connect(scene.address).await;
    assert_eq!(client.ask("GET /healthz", "").await, 200);
    let begin = Instant::now();
    client.closed().await;
    assert!(begin.elapsed() >= SHORT * 4);
    closed(&page, "idle", 1).await;
}

#[tokio::test]
async fn a_later_head_has_its_own_time_from_its_first_byte() {
    recorded!(page);
    let scene = limited(ConnectionLimits {
        head: SHORT,
        ..OPEN
    })
    .await;
    let mut client = Client::connect(scene.address).await;
    assert_eq!(client.ask("GET /healthz", "").await, 200);
    // Longer than a head may take: it is idle.
    sleep(SHORT * 2).await;
    assert_eq!(client.ask("GET /healthz", "").await, 200);
    let begin = Instant::now();
    client.send("GET /heal").await;
    client.closed().await;
    assert!(begin.elapsed() >= SHORT);
    closed(&page, "head_late", 1).await;
}

#[tokio::test]
async fn a_connection_that_is_used_ends_in_order_when_its_life_is_over() {
    recorded!(page);
    let scene = limited(ConnectionLimits {
        life: SHORT,
        ..OPEN
    })
    .await;
    let begin = Instant::now();
    let mut client = Client::connect(scene.address).await;
    // Every request that was sent before the end is answered.
    while client.try_ask("GET /healthz").await.is_some() {
        assert!(begin.elapsed() < DEADLINE, "it never ends");
    }
    assert!(begin.elapsed() >= SHORT);
    closed(&page, "life", 1).await;
}

#[tokio::test]
async fn answers_that_nobody_reads_hold_a_connection_no_longer_than_silence() {
    recorded!(page);
    let scene = limited(ConnectionLimits {
        idle: SHORT,
        ..OPEN
    })
    .await;
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    // Until neither side has room for more, and the server gives up.
    let requests = "GET /healthz HTTP/1.1\r\nHost: cp\r\n\r\n".repeat(1000);
    let sent = async { while stream.write_all(requests.as_bytes()).await.is_ok() {} };
    timeout(DEADLINE, sent).await.expect("the server closes it");
    closed(&page, "idle", 1).await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_told_so_at_once() {
    recorded!(page);
    let scene = limited(OPEN).await;
    let filler = |count: usize| "X-Filler: x\r\n".repeat(count);
    let fits = scene.send("GET /healthz", filler(90)).await;
    assert_eq!(fits.status, 200);
    for headers in [
        filler(101),
        format!("X-Filler: {}\r\n", "x".repeat(16 * 1024)),
        format!("X-{}: x\r\n", "x".repeat(16 * 1024)),
    ] {
        let answer = scene.send("GET /healthz", headers).await;
        assert_eq!(answer.status, 431, "{answer:?}");
    }
    // One that goes on for ever is not read for ever.
    let endless = format!("GET /token HTTP/1.1\r\nX-Filler: {}", "x".repeat(1 << 20));
    let answer = raw(scene.address, endless.as_bytes()).await;
    assert!(answer.is_none_or(|answer| answer.status == 431));
    closed(&page, "malformed", 4).await;
    let long = format!("GET /{} HTTP/1.1\r\nHost: cp\r\n\r\n", "x".repeat(70_000));
    let answer = raw(scene.address, long.as_bytes()).await;
    assert!(answer.is_none_or(|answer| [414, 431].contains(&answer.status)));
    assert_eq!(scene.ask(ACTIVE).await.status, 200);
}

#[tokio::test]
async fn the_end_does_not_wait_for_half_a_head() {
    let mut scene = limited(OPEN).await;
    let mut stuck = Client::connect(scene.address).await;
    stuck.send("GET /token HTTP/1.1\r\nAuthor").await;
    let mut used = Client::connect(scene.address).await;
    assert_eq!(used.ask("GET /healthz", "").await, 200);
    scene.shutdown.cancel();
    // Requests that are under way may take 10 s.
    timeout(Duration::from_secs(9), scene.running.join_next())
        .await
        .expect("the endpoint ends")
        .unwrap()
        .unwrap();
    stuck.closed().await;
    used.closed().await;
}

#[tokio::test]
async fn a_client_that_resets_is_counted_as_broken() {
    recorded!(page);
    let scene = limited(OPEN).await;
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    stream.write_all(b"GET /tok").await.unwrap();
    stream.set_zero_linger().unwrap();
    drop(stream);
    closed(&page, "broken", 1).await;
    let mut stream = TcpStream::connect(scene.address).await.unwrap();
    stream
        .write_all(b"\x16\x03\x01 no HTTP\r\n\r\n")
        .await
        .unwrap();
    let _ = stream.read_to_end(&mut Vec::new()).await;
    closed(&page, "malformed", 1).await;
}
