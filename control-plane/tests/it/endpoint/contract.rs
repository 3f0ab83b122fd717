//! The table of contract section 1.

use std::sync::Arc;

use ambient_control_plane::issuer::fixed::FixedIssuer;
use ambient_shared::clock;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use serde_json::Value;

use super::scene::{ACTIVE, ENDED, NoIssuer, Scene, Setup, UNKNOWN, UNSYNCED, raw};

fn is_plain_text(answer: &super::scene::Answer) -> bool {
    answer
        .header("content-type")
        .is_some_and(|kind| kind.starts_with("text/plain"))
}

#[tokio::test]
async fn a_session_gets_a_token_that_the_published_keys_verify() {
    let scene = Setup::default().start().await;
    let answer = scene.ask(ACTIVE).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let body = answer.json();

    let jwks = scene.send("GET /.well-known/jwks.json", "").await;
    assert_eq!(jwks.status, 200);
    assert!(jwks.header("cache-control").unwrap().contains("max-age="));
    let keys: JwkSet = serde_json::from_value(jwks.json()).unwrap();
    let token = body["token"].as_str().unwrap();
    let kid = decode_header(token).unwrap().kid.unwrap();
    let mut rules = Validation::new(Algorithm::RS256);
    rules.set_audience(&["ambient-api"]);
    let key = DecodingKey::from_jwk(keys.find(&kid).unwrap()).unwrap();
    let claims = decode::<Value>(token, &key, &rules).unwrap().claims;
    assert_eq!(claims["sub"], format!("session:{ACTIVE}"));
    assert_eq!(claims["gen"], 3);
    let expires_at = humantime::parse_rfc3339(body["expires_at"].as_str().unwrap()).unwrap();
    assert_eq!(claims["exp"], clock::unix_seconds(expires_at));
}

#[tokio::test]
async fn the_scheme_is_taken_in_any_case() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    for scheme in ["Bearer ", "bearer ", "BEARER ", "bEaReR "] {
        let headers = scene.headers(ACTIVE, &bearer).replace("Bearer ", scheme);
        assert_eq!(scene.get(headers).await.status, 200, "{scheme}");
    }
}

#[tokio::test]
async fn what_is_no_ciphertext_is_401() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let cases = [
        String::new(),
        "Authorization:\r\n".to_owned(),
        "Authorization: Bearer\r\n".to_owned(),
        "Authorization: Bearer \r\n".to_owned(),
        format!("Authorization: Basic {bearer}\r\n"),
        format!("Authorization: Bearer{bearer}\r\n"),
        format!("Authorization: {bearer}\r\n"),
        format!("Authorization: Bearer  {bearer}\r\n"),
        format!("Authorization: Bearer {}\r\n", &bearer[1..]),
        format!("Authorization: Bearer {bearer}{bearer}\r\n"),
        format!("Authorization: Bearer {}\r\n", bearer.trim_end_matches('=')),
        format!("Authorization: Bearer {}\r\n", "!".repeat(684)),
        // The right length, but not made with the key.
        format!("Authorization: Bearer {}\r\n", STANDARD.encode([0_u8; 512])),
        format!(
            "Authorization: Bearer {}\r\n",
            STANDARD.encode([0xff_u8; 512])
        ),
    ];
    for headers in cases {
        let answer = scene.get(&headers).await;
        assert_eq!(answer.status, 401, "{headers:?}: {answer:?}");
        assert!(
            is_plain_text(&answer) && !answer.body.is_empty(),
            "{answer:?}"
        );
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
}

#[tokio::test]
async fn headers_of_any_length_and_bytes_are_401() {
    let scene = Setup::default().start().await;
    for length in [0, 1, 2, 3, 4, 683, 684, 685, 1000, 10_000, 15_000] {
        for byte in [b'A', b'=', b' ', b'\t', b'~', 0x80, 0xff] {
            let mut headers = b"Authorization: Bearer ".to_vec();
            headers.extend(vec![byte; length]);
            headers.extend(b"\r\n");
            let answer = scene.get(&headers).await;
            assert_eq!(answer.status, 401, "{length} x {byte:#x}: {answer:?}");
        }
    }
    for byte in [0x00, 0x01, 0x0b, 0x7f] {
        let mut headers = b"Authorization: Bearer ".to_vec();
        headers.extend([byte; 684]);
        headers.extend(b"\r\n");
        // No HTTP at all.
        assert_eq!(scene.get(&headers).await.status, 400, "{byte:#x}");
    }
    // Beyond the limit of a head; the server may close before it has read all of it.
    let bearer = "A".repeat(1_000_000);
    let request =
        format!("GET /token HTTP/1.1\r\nHost: cp\r\nAuthorization: Bearer {bearer}\r\n\r\n");
    if let Some(answer) = raw(scene.address, request.as_bytes()).await {
        assert_eq!(answer.status, 431, "{answer:?}");
    }
}

#[tokio::test]
async fn who_is_no_active_session_is_403_whatever_the_reason() {
    let scene = Setup::default().start().await;
    let mut bodies = Vec::new();
    for id in [ENDED, UNKNOWN] {
        let answer = scene.ask(id).await;
        assert_eq!(answer.status, 403, "{answer:?}");
        assert!(is_plain_text(&answer));
        bodies.push((answer.body, answer.headers.len()));
    }
    // Without proof, of sessions that are and that are not.
    for id in [ACTIVE, ENDED, UNKNOWN, UNSYNCED] {
        let bearer = scene.bearer(id);
        let headers = format!("Authorization: Bearer {bearer}\r\n");
        let answer = scene.get(&headers).await;
        assert_eq!(answer.status, 403, "{answer:?}");
        bodies.push((answer.body, answer.headers.len()));
    }
    assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
}

#[tokio::test]
async fn a_plaintext_that_is_no_session_id_is_403() {
    let scene = Setup {
        allow_unproven: true,
        ..Setup::default()
    }
    .start()
    .await;
    let key = aws_lc_rs::rsa::OaepPublicEncryptingKey::new(
        aws_lc_rs::rsa::PublicEncryptingKey::from_der(&der(&scene)).unwrap(),
    )
    .unwrap();
    for plaintext in [
        &b"short"[..],
        b"with a space",
        b"tab\tinside",
        b"\xff\xfe\xfd 12345",
        b"",
    ] {
        let mut sealed = vec![0; key.ciphertext_size()];
        let algorithm = &aws_lc_rs::rsa::OAEP_SHA256_MGF1SHA256;
        key.encrypt(algorithm, plaintext, &mut sealed, None)
            .unwrap();
        let headers = format!("Authorization: Bearer {}\r\n", STANDARD.encode(sealed));
        assert_eq!(scene.get(&headers).await.status, 403, "{plaintext:?}");
    }
}

fn der(scene: &Scene) -> Vec<u8> {
    let pem = scene.keys.public_pem();
    let lines = pem.lines().filter(|line| !line.starts_with("-----"));
    STANDARD.decode(lines.collect::<String>()).unwrap()
}

#[tokio::test]
async fn a_session_that_is_not_known_yet_is_503_for_itself_only() {
    let scene = Setup::default().start().await;
    let answer = scene.ask(UNSYNCED).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(
        answer
            .header("retry-after")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            > 0
    );
}

#[tokio::test]
async fn no_token_from_the_issuer_is_500() {
    let scene = Setup {
        issuer: Some(Arc::new(NoIssuer)),
        ..Setup::default()
    }
    .start()
    .await;
    let answer = scene.ask(ACTIVE).await;
    assert_eq!(answer.status, 500, "{answer:?}");
    assert!(is_plain_text(&answer) && !answer.body.contains("idp"));
}

#[tokio::test]
async fn a_fixed_token_is_handed_out_as_it_is_and_has_no_jwks() {
    let fixed = FixedIssuer::new(&r#"fixed"\token"#.into()).unwrap();
    let scene = Setup {
        issuer: Some(Arc::new(fixed)),
        ..Setup::default()
    }
    .start()
    .await;
    let body = scene.ask(ACTIVE).await.json();
    assert_eq!(body, serde_json::json!({"token": r#"fixed"\token"#}));
    let jwks = scene.send("GET /.well-known/jwks.json", "").await;
    assert_eq!(jwks.status, 404);
}

#[tokio::test]
async fn an_expiry_beyond_all_calendars_is_left_out() {
    let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .encode(format!(r#"{{"exp":{}}}"#, u64::from(u32::MAX) * 1000));
    let fixed = FixedIssuer::new(&format!("e30.{payload}.sig").into()).unwrap();
    assert!(fixed.token().expires_at() > clock::from_unix_seconds(253_402_300_799));
    let scene = Setup {
        issuer: Some(Arc::new(fixed)),
        ..Setup::default()
    }
    .start()
    .await;
    let answer = scene.ask(ACTIVE).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.json().get("expires_at").is_none());
}

#[tokio::test]
async fn other_methods_and_paths_are_told_so() {
    let scene = Setup::default().start().await;
    let bearer = scene.bearer(ACTIVE);
    let headers = scene.headers(ACTIVE, &bearer);
    for method in [
        "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get", "X",
    ] {
        for path in ["/token", "/healthz", "/.well-known/jwks.json"] {
            let answer = scene.send(&format!("{method} {path}"), &headers).await;
            assert_eq!(answer.status, 405, "{method} {path}: {answer:?}");
            assert_eq!(answer.header("allow"), Some("GET"));
            assert!(is_plain_text(&answer));
        }
    }
    for path in ["/", "/token/", "/tokens", "/metrics", "/%74oken"] {
        let answer = scene.send(&format!("GET {path}"), &headers).await;
        assert_eq!(answer.status, 404, "{path}");
    }
    assert_eq!(scene.send("GET /token?x=1", &headers).await.status, 200);
}

#[tokio::test]
async fn health_says_ok() {
    let scene = Setup::default().start().await;
    let answer = scene.send("GET /healthz", "").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "ok"));
}
