//! Verified as a stranger would: by the published keys alone. The clock stands still, as making a
//! key may take seconds.

use ambient_shared::proof::SessionRoot;
use ambient_testing::keypair::RsaKey;
use aws_lc_rs::rsa::KeySize;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use serde::Deserialize;

use super::*;
use crate::keypair::{
    Keys,
    decrypting::DecryptingKey,
    signing::{SigningKey, SigningKeys},
};

const START: u64 = 2_000_000_000;

fn key() -> SigningKey {
    SigningKey::from_pem(&RsaKey::generate(KeySize::Rsa2048).private_pkcs1_pem()).unwrap()
}

fn keyring(signing: SigningKeys) -> Keyring {
    Keyring::new(Keys::new(
        DecryptingKey::from_pem(&RsaKey::shared().private_pkcs1_pem()).unwrap(),
        SessionRoot::new([1; 32]),
        signing,
    ))
}

fn issuer(life_s: u64) -> (MintedIssuer, Clock) {
    let clock = Clock::manual(clock::from_unix_seconds(START).unwrap());
    let issuer = MintedIssuer::new(
        keyring(SigningKeys::new(key(), None, Some(&key()))),
        "https://cp.example".to_owned(),
        "ambient-api".to_owned(),
        Duration::from_secs(life_s),
        clock.clone(),
    );
    (issuer, clock)
}

fn subject(generation: u32) -> Subject {
    Subject {
        session: SessionId::parse("session-0001").unwrap(),
        generation,
    }
}

fn go_to(clock: &Clock, seconds: u64) {
    clock.set(clock::from_unix_seconds(seconds).unwrap());
}

#[derive(Deserialize)]
struct Seen {
    iss: String,
    aud: String,
    sub: String,
    typ: String,
    iat: u64,
    exp: u64,
    #[serde(rename = "gen")]
    generation: u32,
}

#[tokio::test(start_paused = true)]
async fn a_token_verifies_by_the_published_keys_and_says_what_the_contract_says() {
    let (issuer, _) = issuer(900);
    let token = issuer.issue(&subject(3), Duration::ZERO).await.unwrap();

    let keys: JwkSet = serde_json::from_slice(&issuer.jwks().unwrap()).unwrap();
    assert_eq!(keys.keys.len(), 2);
    let header = decode_header(token.expose()).unwrap();
    assert_eq!(header.alg, Algorithm::RS256);
    let jwk = keys.find(&header.kid.unwrap()).unwrap();
    let mut rules = Validation::new(Algorithm::RS256);
    rules.set_issuer(&["https://cp.example"]);
    rules.set_audience(&["ambient-api"]);
    let decoding = DecodingKey::from_jwk(jwk).unwrap();
    let claims = decode::<Seen>(token.expose(), &decoding, &rules)
        .unwrap()
        .claims;
    assert_eq!(
        (claims.iss.as_str(), claims.aud.as_str()),
        ("https://cp.example", "ambient-api")
    );
    assert_eq!(
        (claims.sub.as_str(), claims.typ.as_str()),
        ("session:session-0001", "Bearer")
    );
    assert_eq!((claims.iat, claims.exp), (START, START + 900));
    assert_eq!(claims.generation, 3);
    assert_eq!(token.expires_at(), clock::from_unix_seconds(START + 900));
    assert_eq!(token.issued_at(), clock::from_unix_seconds(START));

    // Another key does not verify it.
    let other = keys.keys.iter().find(|key| *key != jwk).unwrap();
    let other = DecodingKey::from_jwk(other).unwrap();
    assert!(decode::<Seen>(token.expose(), &other, &rules).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_young_token_is_handed_out_again_an_older_one_is_not() {
    let (issuer, clock) = issuer(900);
    let first = issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    go_to(&clock, START + 90);
    let again = issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    assert!(again.same_secret(&first));
    go_to(&clock, START + 91);
    let later = issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    assert!(!later.same_secret(&first));
    assert_eq!(later.expires_at(), clock::from_unix_seconds(START + 991));
}

#[tokio::test(start_paused = true)]
async fn who_needs_more_life_than_a_young_token_has_gets_a_new_one() {
    let (issuer, clock) = issuer(900);
    let first = issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    go_to(&clock, START + 30);
    let longer = issuer
        .issue(&subject(0), Duration::from_secs(890))
        .await
        .unwrap();
    assert!(!longer.same_secret(&first));
    // More than a whole life nobody can have.
    let most = issuer.issue(&subject(0), Duration::MAX).await.unwrap();
    assert_eq!(most.expires_at(), clock::from_unix_seconds(START + 930));
}

#[tokio::test(start_paused = true)]
async fn each_session_and_each_start_of_it_has_its_own_token() {
    let (issuer, _) = issuer(900);
    let first = issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    let restarted = issuer.issue(&subject(1), Duration::ZERO).await.unwrap();
    let other = Subject {
        session: SessionId::parse("session-0002").unwrap(),
        generation: 0,
    };
    let other = issuer.issue(&other, Duration::ZERO).await.unwrap();
    assert!(!restarted.same_secret(&first) && !other.same_secret(&first));
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_back_gets_tokens_of_its_own_time() {
    let (issuer, clock) = issuer(900);
    issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    go_to(&clock, START - 5000);
    let token = issuer.issue(&subject(0), Duration::ZERO).await.unwrap();
    assert_eq!(token.expires_at(), clock::from_unix_seconds(START - 4100));
}

#[tokio::test(start_paused = true)]
async fn the_shortest_lives_are_whole_seconds() {
    let (two, clock) = issuer(2);
    let first = two
        .issue(&subject(0), Duration::from_secs(1))
        .await
        .unwrap();
    let same_second = two
        .issue(&subject(0), Duration::from_secs(2))
        .await
        .unwrap();
    assert!(same_second.same_secret(&first));
    go_to(&clock, START + 1);
    let next = two.issue(&subject(0), Duration::ZERO).await.unwrap();
    assert_eq!(next.expires_at(), clock::from_unix_seconds(START + 3));
    let (none, _) = issuer(0);
    assert_eq!(none.life(), Some(Duration::from_secs(1)));
}
