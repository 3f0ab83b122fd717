//! Places: who gives one up for whom, and what there is when all are busy.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use ambient_control_plane::{
    endpoint::ConnectionLimits,
    issuer::{IssueError, Issuer, Subject},
    metrics::{CONNECTIONS_CLOSED, EXCHANGES},
};
use ambient_shared::{telemetry::MetricsPage, token::Token};
use ambient_testing::DEADLINE;
use futures_util::future::BoxFuture;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::scene::{ACTIVE, Client, Scene, Setup};

const PLACES: usize = 8;

fn limited() -> Setup {
    Setup {
        connections: ConnectionLimits {
            places: PLACES,
            ..ConnectionLimits::default()
        },
        ..Setup::default()
    }
}

/// A client that sends nothing, once its connection is accepted: it asks once before.
async fn silent(scene: &Scene) -> Client {
    let mut client = Client::connect(scene.address).await;
    client.send("GET /tok").await;
    client
}

/// A client whose address is another network's.
async fn elsewhere(scene: &Scene) -> Client {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 2], 0))).unwrap();
    Client::over(socket.connect(scene.address).await.unwrap())
}

#[tokio::test]
async fn who_waits_longest_makes_room_for_whoever_comes() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let scene = limited().start().await;
    let mut idle = Client::connect(scene.address).await;
    assert_eq!(idle.ask("GET /healthz", "").await, 200);
    let mut waiting = Vec::new();
    for _ in 1..PLACES {
        waiting.push(silent(&scene).await);
    }
    // Each takes a place and gives it back, or is itself idle then: newcomers, in order.
    let mut newcomers = Vec::new();
    for number in 0..3 {
        let mut newcomer = Client::connect(scene.address).await;
        assert_eq!(newcomer.ask("GET /healthz", "").await, 200, "{number}");
        newcomers.push(newcomer);
    }
    // The idle one first, then each newcomer, idle by then, for the next.
    idle.closed().await;
    newcomers.remove(0).closed().await;
    newcomers.remove(0).closed().await;
    assert_eq!(newcomers.remove(0).ask("GET /healthz", "").await, 200);

    // Nobody is idle: who has waited longest for a head.
    let _newest = silent(&scene).await;
    let newest = silent(&scene).await;
    waiting.remove(0).closed().await;
    for client in waiting.iter_mut().skip(1) {
        assert!(client.is_open().await, "only the oldest had to leave");
    }
    drop(newest);
    assert_eq!(scene.ask(ACTIVE).await.status, 200);
    let page = page.render();
    assert!(
        page.contains(&format!("{CONNECTIONS_CLOSED}{{cause=\"made_room\"}}")),
        "{page}"
    );
}

#[tokio::test]
async fn a_flood_from_one_network_costs_no_other_its_connections() {
    let scene = limited().start().await;
    let mut good = Vec::new();
    for _ in 0..2 {
        let mut client = Client::connect(scene.address).await;
        assert_eq!(client.ask("GET /healthz", "").await, 200);
        good.push(client);
    }
    let mut flood = Vec::new();
    for _ in 0..PLACES * 4 {
        let mut client = elsewhere(&scene).await;
        client.send("GET /tok").await;
        flood.push(client);
    }
    flood.remove(0).closed().await;
    for client in &mut good {
        assert_eq!(client.ask("GET /healthz", "").await, 200);
    }
    // And newcomers from the good one find room.
    assert_eq!(scene.ask(ACTIVE).await.status, 200);
}

#[tokio::test]
async fn many_behind_one_address_have_all_places_while_nobody_else_comes() {
    let scene = limited().start().await;
    let mut clients = Vec::new();
    for _ in 0..PLACES {
        let mut client = Client::connect(scene.address).await;
        assert_eq!(client.ask("GET /healthz", "").await, 200);
        clients.push(client);
    }
    for client in &mut clients {
        assert_eq!(client.ask("GET /healthz", "").await, 200);
    }
}

/// An issuer that is never done, and counts who waits for it.
#[derive(Default)]
struct Stuck(AtomicUsize);

impl Issuer for Stuck {
    fn issue<'a>(
        &'a self,
        _: &'a Subject,
        _: Duration,
    ) -> BoxFuture<'a, Result<Token, IssueError>> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Box::pin(std::future::pending())
    }

    fn life(&self) -> Option<Duration> {
        None
    }
}

#[tokio::test]
async fn when_all_are_being_answered_overload_is_told_at_once_and_health_is_well() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let stuck = Arc::new(Stuck::default());
    let setup = Setup {
        issuer: Some(stuck.clone()),
        ..limited()
    };
    let scene = setup.start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    let mut busy = Vec::new();
    for _ in 0..PLACES {
        let mut client = Client::connect(scene.address).await;
        client
            .send(&format!("GET /token HTTP/1.1\r\nHost: cp\r\n{headers}\r\n"))
            .await;
        busy.push(client);
    }
    let all_wait = async {
        while stuck.0.load(Ordering::Relaxed) < PLACES {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, all_wait).await.expect("all are busy");
    // Those beyond make room for one another, too.
    for _ in 0..3 {
        for _ in 0..100 {
            busy.push(silent(&scene).await);
        }
        let refused = scene.ask(ACTIVE).await;
        assert_eq!(refused.status, 503, "{refused:?}");
        assert_eq!(refused.header("retry-after"), Some("1"));
        assert_eq!(refused.body, "overloaded\n");
        assert_eq!(refused.header("connection"), Some("close"));
        assert_eq!(scene.send("GET /healthz", "").await.status, 200);
    }
    let page = page.render();
    let line = format!("{EXCHANGES}{{result=\"overloaded\"}} 3");
    assert!(page.contains(&line), "no {line} in\n{page}");
}

#[tokio::test]
async fn a_place_is_free_again_when_its_client_is_gone() {
    let scene = limited().start().await;
    for _ in 0..PLACES * 5 {
        let stream = TcpStream::connect(scene.address).await.unwrap();
        drop(stream);
        assert_eq!(scene.ask(ACTIVE).await.status, 200);
    }
}
