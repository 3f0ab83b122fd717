//! Against a real HTTP server on loopback.

use std::sync::{Arc, Mutex};

use axum::{Router, http::HeaderMap, response::IntoResponse, routing::get};
use rsa::{PrivateKey, pkcs8::EncodePublicKey as _};

use super::*;
use crate::{bearer::PublicKey, client, proof::SessionRoot, resolve::Resolver, session::SessionId};

async fn serve<F, R>(answer: F) -> Url
where
    F: Fn(HeaderMap) -> R + Clone + Send + Sync + 'static,
    R: IntoResponse + Send + 'static,
{
    let app = Router::new().route(
        "/token",
        get(move |headers: HeaderMap| {
            let answer = answer.clone();
            async move { answer(headers).into_response() }
        }),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/token", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

fn exchange(url: Url, clock: Clock) -> Exchange {
    let id = SessionId::parse("session-0001").unwrap();
    let key = PrivateKey::new(&mut rand::rng(), 2048).unwrap();
    let pem = key
        .to_public_key()
        .to_public_key_pem(rsa::pkcs8::LineEnding::LF)
        .unwrap();
    let bearer = PublicKey::from_pem(&pem).unwrap().encrypt(&id).unwrap();
    let client = client::http_client_to(
        &url,
        &Resolver::system(),
        client::trust_roots(None).unwrap(),
        TIMEOUT,
    )
    .unwrap();
    Exchange::new(
        client,
        url,
        bearer,
        Some(SessionRoot::new([7; 32]).session_key(&id)),
        clock,
    )
}

#[tokio::test]
async fn answers_become_tokens_or_errors_that_know_whether_to_retry() {
    let cases: [(u16, &str, Option<Retry>); 10] = [
        (
            200,
            r#"{"token":"abc","expires_at":"2030-01-01T00:00:00Z","more":1}"#,
            None,
        ),
        (200, r#"{"token":""}"#, Some(Retry::Backoff)),
        (200, "<html>", Some(Retry::Backoff)),
        (
            200,
            r#"{"token":"abc","expires_at":"soon"}"#,
            Some(Retry::Backoff),
        ),
        (401, "no", Some(Retry::Briefly)),
        (403, "no", Some(Retry::Briefly)),
        (404, "no", Some(Retry::Never)),
        (302, "", Some(Retry::Never)),
        (429, "slow down", Some(Retry::After(Duration::from_secs(3)))),
        (500, "boom", Some(Retry::Backoff)),
    ];
    for (status, body, retry) in cases {
        let url = serve(move |_| {
            (
                StatusCode::from_u16(status).unwrap(),
                [("retry-after", "3")],
                body,
            )
        })
        .await;
        let fetched = exchange(url, Clock::system()).fetch().await;
        assert_eq!(
            fetched.as_ref().err().map(Retryable::retry),
            retry,
            "{status} {body}"
        );
        if let Ok(token) = fetched {
            assert_eq!(token.expose(), "abc");
            assert!(token.expires_at().is_some());
        }
    }
}

#[tokio::test]
async fn stale_proof_is_signed_again_with_the_servers_time() {
    let server_time = clock_at(2_000_000_000);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let url = serve({
        let seen = Arc::clone(&seen);
        move |headers: HeaderMap| {
            let proof = headers[proof::HEADER].to_str().unwrap().to_owned();
            let fresh = proof.contains(" 2000000000 ");
            seen.lock().unwrap().push(proof);
            if fresh {
                (StatusCode::OK, HeaderMap::new(), r#"{"token":"abc"}"#)
            } else {
                let date = httpdate::fmt_http_date(server_time).parse().unwrap();
                let headers = HeaderMap::from_iter([(header::DATE, date)]);
                (StatusCode::UNAUTHORIZED, headers, "proof stale\n")
            }
        }
    })
    .await;
    let token = exchange(url, Clock::manual(clock_at(1_000_000_000)))
        .fetch()
        .await
        .unwrap();
    assert_eq!(token.expose(), "abc");
    assert_eq!(seen.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn expiry_is_by_our_clock_whatever_the_servers_says() {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    const OURS: u64 = 1_800_000_000;
    let jwt = |exp: u64| {
        format!(
            "h.{}.s",
            URL_SAFE_NO_PAD.encode(format!(r#"{{"exp":{exp}}}"#))
        )
    };
    let opaque = "abc".to_owned();
    // The server's time, the token, the expiry that it says, and how long the token lives.
    let cases = [
        (OURS, opaque.clone(), OURS + 900, 900),
        (OURS + 3, opaque.clone(), OURS + 900, 900),
        (OURS + 3600, opaque.clone(), OURS + 4500, 900),
        (OURS - 3600, opaque.clone(), OURS - 2700, 900),
        (OURS - 3600, opaque, OURS - 3601, 0),
        // The token's own says it as well: the issuer's clock is like ours.
        (OURS + 3600, jwt(OURS + 900), OURS + 4500, 900),
        (OURS, jwt(OURS + 60), OURS + 900, 60),
    ];
    for (theirs, token, says, lives) in cases {
        let says = humantime::format_rfc3339_seconds(clock_at(says));
        let body = format!(r#"{{"token":"{token}","expires_at":"{says}"}}"#);
        let date = httpdate::fmt_http_date(clock_at(theirs));
        let url = serve(move |_| ([(header::DATE, date.clone())], body.clone())).await;
        let clock = Clock::manual(clock_at(OURS));

        let token = exchange(url, clock).fetch().await.unwrap();

        let left = token.life_left(clock_at(OURS)).unwrap();
        assert_eq!(left.as_secs(), lives, "{theirs} {says}");
    }
}

#[tokio::test]
async fn a_replaced_key_proves_from_then_on() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let url = serve({
        let seen = Arc::clone(&seen);
        move |headers: HeaderMap| {
            let text = |name: &str| headers[name].to_str().unwrap().to_owned();
            let both = (text("authorization"), text(proof::HEADER));
            seen.lock().unwrap().push(both);
            (StatusCode::OK, r#"{"token":"abc"}"#)
        }
    })
    .await;
    let id = SessionId::parse("session-0001").unwrap();
    let now = clock_at(1_000_000_000);
    let exchange = exchange(url, Clock::manual(now));
    exchange.fetch().await.unwrap();
    exchange.use_key(SessionRoot::new([8; 32]).session_key(&id));
    exchange.fetch().await.unwrap();

    let seen = seen.lock().unwrap();
    for ((authorization, proof), root) in seen.iter().zip([7, 8]) {
        let bearer = authorization.strip_prefix("Bearer ").unwrap();
        let key = SessionRoot::new([root; 32]).session_key(&id);
        assert_eq!(key.verify(proof, bearer, now), Ok(()));
    }
    assert_eq!(seen.len(), 2);
}

#[tokio::test]
async fn unreachable_endpoint_is_retried_and_named() {
    // Bound, so that nobody else gets the port, but not listening.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url: Url = format!("http://{}/token", socket.local_addr().unwrap())
        .parse()
        .unwrap();
    let error = exchange(url.clone(), Clock::system())
        .fetch()
        .await
        .unwrap_err();
    assert_eq!(error.retry(), Retry::Backoff);
    assert!(error.to_string().contains(url.as_str()), "{error}");
}

#[test]
fn endpoint_urls_follow_the_contract() {
    assert!(parse_endpoint("https://cp.example:8080/token").is_ok());
    assert_eq!(
        parse_endpoint("ftp://cp/token"),
        Err(InvalidEndpoint::Scheme)
    );
    assert_eq!(parse_endpoint("http://"), Err(InvalidEndpoint::NoHost));
    assert_eq!(parse_endpoint("cp:8080"), Err(InvalidEndpoint::Scheme));
    assert_eq!(parse_endpoint("not a url"), Err(InvalidEndpoint::NotAUrl));
    assert_eq!(
        parse_endpoint("http://me:secret@cp/token"),
        Err(InvalidEndpoint::UserInfo)
    );
}

fn clock_at(seconds: u64) -> SystemTime {
    crate::clock::from_unix_seconds(seconds).unwrap()
}
