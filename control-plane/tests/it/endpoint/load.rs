//! Limits, floods and requests that nobody should send.

use std::collections::BTreeMap;

use ambient_control_plane::metrics::{DECRYPTIONS, EXCHANGES};
use ambient_shared::telemetry::MetricsPage;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::task::JoinSet;

use super::scene::{ACTIVE, Setup, raw};

fn limited() -> Setup {
    Setup {
        rate_limits: true,
        ..Setup::default()
    }
}

#[tokio::test]
async fn a_ciphertext_is_decrypted_once() {
    let page = MetricsPage::default();
    // All tasks of this test run on its own thread, so this sees only them.
    let _recording = metrics::set_default_local_recorder(&page);
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    for _ in 0..5 {
        let headers = scene.headers(ACTIVE, &bearer);
        assert_eq!(scene.get(&headers).await.status, 200);
    }
    // What did not pass every check is not kept.
    let unproven = format!("Authorization: Bearer {}\r\n", scene.bearer(ACTIVE));
    for _ in 0..3 {
        assert_eq!(scene.get(&unproven).await.status, 403);
    }
    let page = page.render();
    for line in [
        format!("{DECRYPTIONS}{{result=\"ok\"}} 4"),
        format!("{EXCHANGES}{{result=\"ok\"}} 5"),
        format!("{EXCHANGES}{{result=\"unproven\"}} 3"),
    ] {
        assert!(page.contains(&line), "no {line} in\n{page}");
    }
}

#[tokio::test]
async fn an_address_that_fails_too_often_waits_but_known_sessions_do_not() {
    let scene = limited().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    assert_eq!(scene.get(&headers).await.status, 200);

    let mut statuses = BTreeMap::new();
    let refused = loop {
        let answer = scene.get("Authorization: Bearer x\r\n").await;
        *statuses.entry(answer.status).or_insert(0) += 1;
        if answer.status == 429 {
            break answer;
        }
        assert!(statuses[&401] < 5000, "never limited");
    };
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(statuses[&401] >= 200, "{statuses:?}");
    // The share may have been refilled a little meanwhile: use it up again before each look.
    for _ in 0..3 {
        while scene.get("").await.status != 429 {}
        let headers = scene.headers(ACTIVE, &bearer);
        assert_eq!(scene.get(&headers).await.status, 200);
    }
}

#[tokio::test]
async fn a_session_that_asks_too_often_waits_and_others_do_not() {
    let scene = limited().start().await;
    let other = "0198c7a2-another";
    let standing = ambient_control_plane::endpoint::Standing::Active { generation: 0 };
    scene
        .sessions
        .lock()
        .unwrap()
        .insert(other.to_owned(), standing);
    let bearer = scene.bearer(ACTIVE);
    let mut granted = 0;
    let refused = loop {
        let answer = scene.get(scene.headers(ACTIVE, &bearer)).await;
        if answer.status != 200 {
            break answer;
        }
        granted += 1;
        assert!(granted < 1000, "never limited");
    };
    assert!(granted >= 20, "{granted}");
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(scene.ask(other).await.status, 200);
}

#[tokio::test]
async fn a_session_pays_with_its_address_for_decryptions_that_are_refused() {
    let page = MetricsPage::default();
    let _recording = metrics::set_default_local_recorder(&page);
    let scene = limited().start().await;
    let bearer = scene.bearer(ACTIVE);
    let known = scene.headers(ACTIVE, &bearer);
    assert_eq!(scene.get(&known).await.status, 200);

    let is_charged =
        |page: &str| page.contains(&format!("{EXCHANGES}{{result=\"source_limited\"}}"));
    let mut asked = 0;
    while !is_charged(&page.render()) {
        // A new ciphertext each time.
        scene.ask(ACTIVE).await;
        asked += 1;
        assert!(asked < 1000, "never limited:\n{}", page.render());
    }
    // The session's own share came before.
    let page = page.render();
    assert!(
        page.contains(&format!("{EXCHANGES}{{result=\"session_limited\"}}")),
        "{page}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_is_told_at_once_and_health_does_not_wait() {
    let scene = Setup::default().start().await;
    let address = scene.address;
    let cores = std::thread::available_parallelism().unwrap().get();
    let mut flood = JoinSet::new();
    for n in 0..cores * 400 {
        let mut ciphertext = [0_u8; 512];
        ciphertext[400..408].copy_from_slice(&n.to_be_bytes());
        let bearer = STANDARD.encode(ciphertext);
        let request = format!(
            "GET /token HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n\
             Authorization: Bearer {bearer}\r\n\r\n"
        );
        flood.spawn(async move { raw(address, request.as_bytes()).await });
    }
    let mut healthy = 0;
    let mut statuses = BTreeMap::new();
    let mut refused = None;
    loop {
        assert_eq!(scene.send("GET /healthz", "").await.status, 200);
        healthy += 1;
        while let Some(ended) = flood.try_join_next() {
            let answer = ended.unwrap().expect("an answer");
            *statuses.entry(answer.status).or_insert(0) += 1;
            if answer.status == 503 {
                refused = Some(answer);
            }
        }
        if flood.is_empty() {
            break;
        }
    }
    let refused = refused.unwrap_or_else(|| panic!("nobody was refused: {statuses:?}"));
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(refused.body, "overloaded\n");
    assert!(statuses[&401] > 0, "{statuses:?}");
    assert_eq!(statuses.len(), 2, "{statuses:?}");
    // Behind the line, each would have waited for as long as the flood.
    assert!(healthy >= 5, "{healthy} answers during the flood");
    assert_eq!(scene.ask(ACTIVE).await.status, 200);
}

/// A request that may be anything from valid to noise.
fn odd(random: &mut StdRng, valid: &str) -> Vec<u8> {
    let mut request = match random.random_range(0..5) {
        0 => {
            return (0..random.random_range(1..400))
                .map(|_| random.random())
                .collect();
        }
        1 => {
            let length = random.random_range(0..3000);
            let noise: Vec<u8> = (0..length)
                .map(|_| random.random_range(0x20..=0xff))
                .collect();
            let mut request = b"GET /token HTTP/1.1\r\nAuthorization: Bearer ".to_vec();
            request.extend(noise);
            request.extend(b"\r\nConnection: close\r\n\r\n");
            return request;
        }
        2 => {
            let ciphertext: Vec<u8> = (0..512).map(|_| random.random()).collect();
            let bearer = STANDARD.encode(ciphertext);
            format!("GET /token HTTP/1.1\r\nAuthorization: Bearer {bearer}\r\n\r\n").into_bytes()
        }
        _ => valid.as_bytes().to_vec(),
    };
    for _ in 0..random.random_range(0..4) {
        let at = random.random_range(0..request.len());
        match random.random_range(0..4) {
            0 => request[at] = random.random(),
            1 => drop(request.drain(at..(at + random.random_range(1..9)).min(request.len()))),
            2 => request.insert(at, random.random()),
            _ => {
                let piece = request[at..(at + 40).min(request.len())].to_vec();
                request.splice(at..at, piece);
            }
        }
        if request.is_empty() {
            request.push(b'\n');
        }
    }
    // So that the server answers what it has.
    request.extend(b"\r\n\r\n");
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_odd_requests_break_nothing() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    let valid = format!("GET /token HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n{headers}\r\n");
    let address = scene.address;
    let mut clients = JoinSet::new();
    for client in 0..16 {
        let valid = valid.clone();
        clients.spawn(async move {
            // Always the same requests, so that a failure comes again.
            let mut random = StdRng::seed_from_u64(client);
            let mut statuses = BTreeMap::new();
            for _ in 0..625 {
                let request = odd(&mut random, &valid);
                let status = half_closed(address, &request).await;
                *statuses.entry(status).or_insert(0_u32) += 1;
                assert!(
                    [0, 200, 400, 401, 403, 404, 405, 414, 431].contains(&status),
                    "{status} for {:?}",
                    String::from_utf8_lossy(&request)
                );
            }
            statuses
        });
    }
    let mut statuses = BTreeMap::new();
    while let Some(ended) = clients.join_next().await {
        for (status, count) in ended.unwrap() {
            *statuses.entry(status).or_insert(0) += count;
        }
    }
    assert_eq!(statuses.values().sum::<u32>(), 10_000, "{statuses:?}");
    for expected in [200, 400, 401, 403] {
        assert!(statuses.contains_key(&expected), "{statuses:?}");
    }
    // 0 is a connection that was closed without a word: for what is not HTTP at all.
    assert!(
        statuses.get(&0).copied().unwrap_or(0) < 3_000,
        "{statuses:?}"
    );
    let headers = scene.headers(ACTIVE, &bearer);
    assert_eq!(scene.get(&headers).await.status, 200);
}

/// Sends, says that nothing follows, and gives the status of the first answer.
async fn half_closed(address: std::net::SocketAddr, request: &[u8]) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let exchange = async {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let _ = stream.write_all(request).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let answer = tokio::time::timeout(ambient_testing::DEADLINE, exchange)
        .await
        .expect("an end in time");
    let text = String::from_utf8_lossy(&answer);
    text.split(' ')
        .nth(1)
        .map_or(0, |status| status.parse().unwrap_or(0))
}
