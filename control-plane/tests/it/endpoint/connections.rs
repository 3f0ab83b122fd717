//! Connections: many requests on one, slow ones, the end of the program.

use std::time::Duration;

use ambient_control_plane::endpoint::{
    ConnectionLimits, Endpoint, EndpointError, EndpointSettings,
};
use ambient_testing::DEADLINE;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};

use super::scene::{ACTIVE, Setup};

/// Reads one answer off a connection that stays open.
async fn answer(stream: &mut BufReader<TcpStream>) -> u16 {
    let mut status = 0;
    let mut length = 0;
    loop {
        let mut line = String::new();
        timeout(DEADLINE, stream.read_line(&mut line))
            .await
            .expect("a line in time")
            .expect("a line");
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(rest) = line.strip_prefix("http/1.1 ") {
            status = rest[..3].parse().unwrap();
        } else if let Some(rest) = line.strip_prefix("content-length: ") {
            length = rest.parse().unwrap();
        } else if line.is_empty() {
            break;
        }
    }
    stream.read_exact(&mut vec![0; length]).await.unwrap();
    status
}

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    let good = format!("GET /token HTTP/1.1\r\nHost: cp\r\n{headers}\r\n");
    let bad = "GET /token HTTP/1.1\r\nHost: cp\r\n\r\n";
    let mut stream = BufReader::new(TcpStream::connect(scene.address).await.unwrap());
    for _ in 0..20 {
        for (request, status) in [(good.as_str(), 200), (bad, 401)] {
            stream.write_all(request.as_bytes()).await.unwrap();
            assert_eq!(answer(&mut stream).await, status);
        }
    }
    // All at once.
    stream.write_all(good.repeat(10).as_bytes()).await.unwrap();
    for _ in 0..10 {
        assert_eq!(answer(&mut stream).await, 200);
    }
}

#[tokio::test]
async fn a_head_that_does_not_come_ends_the_connection() {
    let scene = Setup::default().start().await;
    let mut idle = TcpStream::connect(scene.address).await.unwrap();
    let mut slow = TcpStream::connect(scene.address).await.unwrap();
    slow.write_all(b"GET /token HTTP/1.1\r\nAuthor")
        .await
        .unwrap();
    for stream in [&mut idle, &mut slow] {
        let mut rest = Vec::new();
        timeout(DEADLINE, stream.read_to_end(&mut rest))
            .await
            .expect("the server closes it")
            .unwrap();
        let rest = String::from_utf8_lossy(&rest);
        assert!(
            rest.is_empty() || rest.starts_with("HTTP/1.1 408"),
            "{rest}"
        );
    }
}

#[tokio::test]
async fn a_body_is_not_waited_for() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    let request =
        format!("GET /token HTTP/1.1\r\nHost: cp\r\nContent-Length: 1000000\r\n{headers}\r\nx");
    let mut stream = BufReader::new(TcpStream::connect(scene.address).await.unwrap());
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(answer(&mut stream).await, 200);
}

#[tokio::test]
async fn the_end_does_not_wait_for_idle_connections() {
    let mut scene = Setup::default().start().await;
    let mut idle = TcpStream::connect(scene.address).await.unwrap();
    assert_eq!(scene.ask(ACTIVE).await.status, 200);
    scene.shutdown.cancel();
    // Those that do not end are cut off after 10 s.
    timeout(Duration::from_secs(9), scene.running.join_next())
        .await
        .expect("the endpoint ends")
        .unwrap()
        .unwrap();
    let closed = timeout(DEADLINE, idle.read(&mut [0; 8])).await.unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
    assert!(TcpStream::connect(scene.address).await.is_err());
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let scene = Setup::default().start().await;
    let settings = EndpointSettings {
        listen: scene.address,
        allow_unproven: false,
        rate_limits: true,
        connections: ConnectionLimits::default(),
        tls: None,
    };
    let parts = ambient_control_plane::endpoint::Parts {
        keys: scene.keys.clone(),
        issuer: std::sync::Arc::new(super::scene::NoIssuer),
        standing: std::sync::Arc::new(|_| {
            Box::pin(std::future::ready(
                ambient_control_plane::endpoint::Standing::Unknown,
            ))
        }),
        clock: scene.clock.clone(),
    };
    let Err(EndpointError::Listen { address, .. }) = Endpoint::bind(settings, parts).await else {
        panic!("bound twice");
    };
    assert_eq!(address, scene.address);
}
