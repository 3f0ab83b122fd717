//! Connections: many requests on one, the end of the program.

use std::time::Duration;

use ambient_control_plane::endpoint::{
    ConnectionLimits, Endpoint, EndpointError, EndpointSettings,
};
use ambient_testing::DEADLINE;
use tokio::{io::AsyncReadExt as _, net::TcpStream, time::timeout};

use super::scene::{ACTIVE, Client, Setup};

#[tokio::test]
async fn one_connection_carries_many_requests() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    let good = format!("GET /token HTTP/1.1\r\nHost: cp\r\n{headers}\r\n");
    let bad = "GET /token HTTP/1.1\r\nHost: cp\r\n\r\n";
    let mut client = Client::connect(scene.address).await;
    for _ in 0..20 {
        for (request, status) in [(good.as_str(), 200), (bad, 401)] {
            client.send(request).await;
            assert_eq!(client.answer().await, Some(status));
        }
    }
    // All at once.
    client.send(&good.repeat(10)).await;
    for _ in 0..10 {
        assert_eq!(client.answer().await, Some(200));
    }
}

#[tokio::test]
async fn a_body_is_not_waited_for() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    let request =
        format!("GET /token HTTP/1.1\r\nHost: cp\r\nContent-Length: 1000000\r\n{headers}\r\nx");
    let mut client = Client::connect(scene.address).await;
    client.send(&request).await;
    assert_eq!(client.answer().await, Some(200));
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
        keys: scene.keyring.clone(),
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
