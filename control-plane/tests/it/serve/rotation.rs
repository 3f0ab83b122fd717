//! Keys that are rotated while the program and its sessions run. The runner is played.

use std::{net::SocketAddr, time::Duration};

use ambient_shared::{clock::Clock, exchange::Exchange, token::Token};
use ambient_testing::{DEADLINE, cluster::Cluster, programs::Running};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header, errors::ErrorKind, jwk::JwkSet,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::{
    faults::site::{Session, Site},
    permissions,
};

/// An installation whose program makes its own keys.
struct Scene {
    site: Site,
    endpoint: SocketAddr,
}

impl Scene {
    async fn start(name: &str, life: &str) -> (Self, Running) {
        let cluster = Cluster::shared();
        permissions::grant(cluster);
        let site = Site::bare(cluster, name).await;
        let mut program = start(&site, life);
        let endpoint = program.listening("endpoint").await;
        site.create_project().await;
        (Self { site, endpoint }, program)
    }

    async fn rotate(&self, kind: &str) -> (Option<i32>, String) {
        let mut running = self.site.program().args(["keys", "rotate", kind]).start();
        let code = running.wait().await.code();
        (code, running.log().join("\n"))
    }

    /// Whether a key Secret has this key in its data.
    async fn has(&self, secret: &str, key: &str) -> bool {
        let path = format!("/api/v1/namespaces/{}/secrets/{secret}", self.site.name);
        let secret = self.site.get(&path).await.unwrap();
        secret["data"][key].is_string()
    }

    async fn running(&self) -> Session<'_> {
        let session = self.site.create().await;
        session.runs(0).await;
        session.until_phase("Running").await;
        session
    }

    async fn jwks(&self) -> JwkSet {
        let url = format!("http://{}/.well-known/jwks.json", self.endpoint);
        reqwest::get(url).await.unwrap().json().await.unwrap()
    }
}

fn start(site: &Site, life: &str) -> Running {
    site.program()
        .env("CP_KEY_ROTATION_WAIT", "1s")
        .env("CP_REFRESH_INTERVAL", "1s")
        .env("CP_TOKEN_TTL", life)
        .env("CP_RATE_LIMITS", "off")
        .start()
}

async fn until<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn works(exchange: &Exchange) -> Token {
    exchange.fetch().await.expect("a token")
}

fn annotation<'a>(object: &'a Value, name: &str) -> &'a str {
    object["metadata"]["annotations"][format!("ambient-code.io/{name}")]
        .as_str()
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_outlive_a_rotation_of_the_keypair() {
    let (scene, mut program) = Scene::start("serve-rotate-pair", "15m").await;
    let old = scene.running().await;
    let with_old = old.exchange(scene.endpoint).await;
    works(&with_old).await;
    let keypair =
        annotation(&scene.site.get(&old.pod()).await.unwrap(), "token-keypair").to_owned();

    let (code, log) = scene.rotate("keypair").await;
    assert_eq!(code, Some(0), "{log}");
    program
        .log_line("other keys", |it| it["message"] == "other keys from now on")
        .await;

    // A ciphertext that was known, and a new one of the old key, as after a restart of the runner.
    works(&with_old).await;
    works(&old.exchange(scene.endpoint).await).await;
    let new = scene.running().await;
    let pod = scene.site.get(&new.pod()).await.unwrap();
    assert!(!annotation(&pod, "token-keypair").is_empty());
    assert_ne!(annotation(&pod, "token-keypair"), keypair);
    works(&new.exchange(scene.endpoint).await).await;
    let secret = "ambient-cp-token-keypair";
    let (code, log) = scene.rotate("keypair").await;
    assert_eq!(code, Some(69), "{log}");
    assert!(
        log.contains("were started with the key before run on"),
        "{log}"
    );
    assert!(scene.has(secret, "previous-private.pem").await);

    // By a program that did not see the rotation begin.
    program.signal(Signal::SIGTERM);
    assert_eq!(program.wait().await.code(), Some(0));
    let mut program = start(&scene.site, "15m");
    let endpoint = program.listening("endpoint").await;
    old.ends(0).await;
    until("the old key is gone", || async {
        !scene.has(secret, "previous-private.pem").await
    })
    .await;

    let with_old = old.exchange(endpoint).await;
    until("the old key opens nothing", || async {
        let refused = with_old.fetch().await.expect_err("it has ended");
        refused.to_string().contains("401")
    })
    .await;
    works(&new.exchange(endpoint).await).await;
    let (code, log) = scene.rotate("keypair").await;
    assert_eq!(code, Some(0), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_outlive_a_rotation_of_the_root() {
    let (scene, _program) = Scene::start("serve-rotate-root", "15m").await;
    let session = scene.running().await;
    let with_old = session.exchange(scene.endpoint).await;
    works(&with_old).await;
    let before = scene.site.get(&session.secret()).await.unwrap();

    let (code, log) = scene.rotate("session-root").await;
    assert_eq!(code, Some(0), "{log}");

    // The old key is good until the new one has come to the session, and after.
    works(&with_old).await;
    let after = scene
        .site
        .wait_for(&session.secret(), |it| {
            let root = annotation(it, "session-root");
            !root.is_empty() && root != annotation(&before, "session-root")
        })
        .await;
    assert_ne!(after["data"]["session-key"], before["data"]["session-key"]);
    works(&with_old).await;
    let with_new = session.exchange(scene.endpoint).await;
    works(&with_new).await;
    let secret = "ambient-cp-session-root";
    assert!(scene.has(secret, "previous-root").await);
    // It is written once, not with each tick.
    let version = &after["metadata"]["resourceVersion"];
    let other = scene.running().await;
    works(&other.exchange(scene.endpoint).await).await;
    let now = scene.site.get(&session.secret()).await.unwrap();
    assert_eq!(&now["metadata"]["resourceVersion"], version);
    let (code, log) = scene.rotate("session-root").await;
    assert_eq!(code, Some(69), "{log}");

    session.ends(0).await;
    other.ends(0).await;
    until("the old root is gone", || async {
        !scene.has(secret, "previous-root").await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_outlive_a_rotation_of_the_signing_key() {
    let (scene, _program) = Scene::start("serve-rotate-sign", "8s").await;
    let session = scene.running().await;
    let runner = session.exchange(scene.endpoint).await;
    let first = kid(&works(&runner).await);
    assert_eq!(scene.jwks().await.keys.len(), 1);

    let (code, log) = scene.rotate("signing-key").await;
    assert_eq!(code, Some(0), "{log}");

    // From the old key to the new one, and until the old one is gone: each token that was handed out
    // verifies by what is published until it expires.
    let secret = "ambient-cp-signing-key";
    let mut handed_out: Vec<Token> = Vec::new();
    let mut published_before_use = false;
    let deadline = Instant::now() + DEADLINE;
    loop {
        let jwks = scene.jwks().await;
        let token = works(&runner).await;
        if kid(&token) == first {
            published_before_use |= jwks.keys.len() == 2;
        }
        handed_out.push(token);
        // Read after all tokens.
        let jwks = scene.jwks().await;
        for token in &handed_out {
            verify(token, &jwks);
        }
        let is_over = !scene.has(secret, "next-private.pem").await
            && !scene.has(secret, "previous-private.pem").await;
        if is_over && jwks.keys.len() == 1 {
            break;
        }
        assert!(Instant::now() < deadline, "not complete: {jwks:?}");
        sleep(Duration::from_millis(200)).await;
    }
    assert!(published_before_use);
    let last = kid(handed_out.last().unwrap());
    assert_ne!(last, first);
    assert!(scene.jwks().await.find(&last).is_some());
    assert!(scene.jwks().await.find(&first).is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_lived_longer_before_a_restart_outlive_a_rotation_too() {
    let (scene, mut program) = Scene::start("serve-rotate-shorter", "25s").await;
    let session = scene.running().await;
    let before = works(&session.exchange(scene.endpoint).await).await;
    program.signal(Signal::SIGTERM);
    assert_eq!(program.wait().await.code(), Some(0));
    let mut program = start(&scene.site, "2s");
    let endpoint = program.listening("endpoint").await;
    let now = works(&session.exchange(endpoint).await).await;
    assert_eq!(kid(&now), kid(&before));

    let (code, log) = scene.rotate("signing-key").await;
    assert_eq!(code, Some(0), "{log}");

    let secret = "ambient-cp-signing-key";
    until("the next key is in use", || async {
        scene.has(secret, "previous-private.pem").await
    })
    .await;
    until("the old key is gone", || async {
        !scene.has(secret, "previous-private.pem").await
    })
    .await;
    assert!(before.is_expired(Clock::system().now()));
    assert!(!scene.has(secret, "previous-until").await);
}

fn kid(token: &Token) -> String {
    decode_header(token.expose()).unwrap().kid.unwrap()
}

/// Checks what has not expired.
pub(super) fn verify(token: &Token, jwks: &JwkSet) {
    let claims = token.expose().split('.').nth(1).unwrap();
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    let left = claims["exp"].as_u64().unwrap();
    if left <= Clock::system().unix_seconds() {
        return;
    }
    let kid = kid(token);
    let jwk = jwks
        .find(&kid)
        .unwrap_or_else(|| panic!("{kid} is in {jwks:?}"));
    let mut rules = Validation::new(Algorithm::RS256);
    rules.validate_aud = false;
    rules.leeway = 0;
    let verified = decode::<Value>(token.expose(), &DecodingKey::from_jwk(jwk).unwrap(), &rules);
    match verified {
        Ok(_) => {}
        // While this was looked at.
        Err(error) => assert_eq!(*error.kind(), ErrorKind::ExpiredSignature),
    }
}
