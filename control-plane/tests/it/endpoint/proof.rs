//! Who asks must hold the session's key (contract section 1).

use std::time::Duration;

use ambient_shared::{clock, proof::SessionRoot};

use super::scene::{ACTIVE, ENDED, Setup, id};

const HEADER: &str = "X-Ambient-Session-Proof";

fn unproven_allowed() -> Setup {
    Setup {
        allow_unproven: true,
        ..Setup::default()
    }
}

#[tokio::test]
async fn without_a_proof_there_is_no_token_unless_settings_allow_it() {
    for (setup, status) in [(Setup::default(), 403), (unproven_allowed(), 200)] {
        let scene = setup.start().await;
        let headers = format!("Authorization: Bearer {}\r\n", scene.bearer(ACTIVE));
        assert_eq!(scene.get(&headers).await.status, status);
    }
}

#[tokio::test]
async fn a_proof_that_is_sent_is_always_checked() {
    for setup in [Setup::default(), unproven_allowed()] {
        let scene = setup.start().await;
        let bearer = scene.bearer(ACTIVE);
        let good = scene
            .keys
            .session_key(&id(ACTIVE))
            .sign(&bearer, scene.clock.now());
        let others_key = scene.keys.session_key(&id(ENDED));
        let other_root = SessionRoot::new([6; 32]).session_key(&id(ACTIVE));
        let proofs = [
            String::new(),
            "v1".to_owned(),
            "nonsense".to_owned(),
            good.replace("v1", "v2"),
            good.replace(" 2", " 3"),
            format!("{good}x"),
            others_key.sign(&bearer, scene.clock.now()),
            other_root.sign(&bearer, scene.clock.now()),
            scene
                .keys
                .session_key(&id(ACTIVE))
                .sign(&scene.bearer(ACTIVE), scene.clock.now()),
            "\u{ff}".repeat(50),
            "v".repeat(14_000),
        ];
        for proof in proofs {
            let headers = format!("Authorization: Bearer {bearer}\r\n{HEADER}: {proof}\r\n");
            let answer = scene.get(&headers).await;
            assert_eq!(answer.status, 403, "{proof}: {answer:?}");
        }
        let headers = format!("Authorization: Bearer {bearer}\r\n{HEADER}: {good}\r\n");
        assert_eq!(scene.get(&headers).await.status, 200);
    }
}

#[tokio::test]
async fn only_who_holds_the_key_is_told_that_its_clock_is_off() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    // The exact edge is a unit test's: here time goes on meanwhile.
    for off in [-61_i64, 200, 100_000] {
        let seconds = (2_000_000_000 + off).cast_unsigned();
        let then = clock::from_unix_seconds(seconds).unwrap();
        let answer = scene.get(scene.headers_at(ACTIVE, &bearer, then)).await;
        assert_eq!(answer.status, 401, "{off}: {answer:?}");
        assert_eq!(answer.body, "proof stale\n");
        // The endpoint's own time, by which the runner signs once more.
        let date = httpdate::parse_http_date(answer.header("date").unwrap()).unwrap();
        let headers = scene.headers_at(ACTIVE, &bearer, date);
        assert_eq!(scene.get(headers).await.status, 200, "{off}");
    }
    let stranger = SessionRoot::new([6; 32]).session_key(&id(ACTIVE));
    let then = scene.clock.now() - Duration::from_secs(100);
    let proof = stranger.sign(&bearer, then);
    let headers = format!("Authorization: Bearer {bearer}\r\n{HEADER}: {proof}\r\n");
    assert_eq!(scene.get(&headers).await.status, 403);
}

#[tokio::test]
async fn a_session_that_ends_gets_no_more_though_its_ciphertext_is_known() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    assert_eq!(scene.get(&headers).await.status, 200);
    scene.sessions.lock().unwrap().remove(ACTIVE);
    assert_eq!(scene.get(&headers).await.status, 403);
    // And a known ciphertext is no proof.
    let headers = format!("Authorization: Bearer {bearer}\r\n");
    assert_eq!(scene.get(&headers).await.status, 403);
}
