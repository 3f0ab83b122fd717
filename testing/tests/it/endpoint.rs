//! The token endpoint under requests that nobody should send.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use ambient_shared::{
    bearer::PublicKey,
    clock::Clock,
    phase::Phase,
    proof::{self, SessionKey},
    session::SessionId,
};
use ambient_testing::{
    load::{self, Plan},
    local::{NewSession, Setup},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// Bytes that may stand in a header's value: RFC 9110, section 5.5.
fn header_byte(random: &mut StdRng) -> u8 {
    loop {
        let byte: u8 = random.random();
        if byte >= 0x20 && byte != 0x7f {
            return byte;
        }
    }
}

/// A value with some of its bytes changed, dropped or doubled, or another one altogether.
fn mutated(value: &str, random: &mut StdRng) -> Vec<u8> {
    let mut bytes = value.as_bytes().to_vec();
    match random.random_range(0..6) {
        0 => bytes.clear(),
        1 => bytes.truncate(random.random_range(0..bytes.len())),
        2 => bytes.extend_from_within(..),
        3 => {
            let length = random.random_range(0..2000);
            bytes = (0..length).map(|_| header_byte(random)).collect();
        }
        _ => {
            for _ in 0..random.random_range(1..4) {
                let place = random.random_range(0..bytes.len());
                bytes[place] = header_byte(random);
            }
        }
    }
    bytes
}

#[tokio::test]
async fn ten_thousand_odd_requests_break_nothing() {
    let local = Setup::new(&[]).env("CP_RATE_LIMITS", "off").start().await;
    let session = NewSession::command(&["sleep", "600"]).io("none");
    let id = local.create(session).await;
    local.phase(&id, Phase::Running).await;
    let key = std::fs::read_to_string(local.file(&id, "session-key")).unwrap();
    let key = SessionKey::from_text(&key).unwrap();
    let id = SessionId::parse(id).unwrap();
    let public = PublicKey::from_pem(&local.public_key()).unwrap();
    let clock = Clock::system();
    // Always the same requests, so that a failure comes again.
    let mut random = StdRng::seed_from_u64(3);

    let bearer = public.encrypt(&id).unwrap();
    let valid = format!("Bearer {}", bearer.as_str());
    let mut request = || {
        let method = ["GET", "GET", "GET", "POST", "DELETE"][random.random_range(0..5)];
        let path = ["/token", "/token", "/token?x=1", "/", "/healthz"][random.random_range(0..5)];
        let mut head = String::new();
        let _ = write!(head, "{method} {path} HTTP/1.1\r\nhost: x\r\n");
        let mut bytes = head.into_bytes();
        if random.random_ratio(9, 10) {
            bytes.extend_from_slice(b"authorization: ");
            bytes.extend(mutated(&valid, &mut random));
            bytes.extend_from_slice(b"\r\n");
        }
        if random.random_ratio(1, 2) {
            let proof = key.sign(bearer.as_str(), clock.now());
            bytes.extend_from_slice(format!("{}: ", proof::HEADER).as_bytes());
            bytes.extend(mutated(&proof, &mut random));
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"\r\n");
        bytes
    };
    let requests = (0..10_000).map(|_| request()).collect();

    let plan = |requests: Vec<Vec<u8>>| Plan {
        address: local.addresses().token,
        from: None,
        requests: Arc::new(requests),
        again: false,
        connections: 16,
        rate: None,
        duration: Duration::from_secs(300),
    };
    let outcome = load::run(plan(requests)).await;
    assert_eq!(outcome.broken, 0, "{outcome:?}");
    assert_eq!(outcome.statuses.values().sum::<u64>(), 10_000);
    for status in outcome.statuses.keys() {
        // /healthz is among the paths, so 200 is.
        assert!([200, 401, 403, 404, 405].contains(status), "{outcome:?}");
    }

    let proof = key.sign(bearer.as_str(), clock.now());
    let good = format!(
        "GET /token HTTP/1.1\r\nhost: x\r\nauthorization: {valid}\r\n{}: {proof}\r\n\r\n",
        proof::HEADER
    );
    let outcome = load::run(plan(vec![good.into_bytes(); 20])).await;
    assert!(outcome.all_ok(), "{outcome:?}");
}
