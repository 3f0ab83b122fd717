//! Keys that come, go and cannot be had.

use std::{sync::Arc, time::Duration};

use ambient_shared::proto::GetSessionRequest;
use ambient_testing::{DEADLINE, idp::Idp, keypair::RsaKey};
use aws_lc_rs::rsa::KeySize;
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use crate::server::{AUDIENCE, SERVICE, Server, claims, now, user, users_key, write_jwks};

/// Waits until this token is accepted: the server reads keys again after a pause.
async fn accepted(server: &Server, token: &str) {
    let tries = async {
        while server.get(token, "/projects").await.0 != 200 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, tries)
        .await
        .expect("the token is accepted");
}

#[tokio::test]
async fn a_new_key_is_read_when_a_token_names_it() {
    let server = Server::start().await;
    let key = RsaKey::generate(KeySize::Rsa2048);
    let token = key.sign_jwt("users-2", &claims("ann", 600));
    assert_eq!(server.get(&token, "/projects").await.0, 401);

    let keys = [key.jwk("users-2"), users_key().jwk("users-1")];
    write_jwks(server.folder.path(), "users.json", &keys);

    accepted(&server, &token).await;
    // A file that is broken later changes nothing.
    std::fs::write(server.folder.path().join("users.json"), "{").unwrap();
    let unknown = key.sign_jwt("users-3", &claims("ann", 600));
    sleep(Duration::from_millis(1100)).await; // past the pause between two reads
    assert_eq!(server.get(&unknown, "/projects").await.0, 401);
    assert_eq!(server.get(&token, "/projects").await.0, 200);
}

#[tokio::test]
async fn keys_come_from_a_url_and_outlive_it() {
    let idp = Idp::start().await;
    let folder = Arc::new(TempDir::new().unwrap());
    let database = folder.path().join("ambient.db");
    let environment = [
        ("AMBIENT_JWKS", idp.jwks_url()),
        ("AMBIENT_JWT_ISSUER", idp.issuer()),
        ("AMBIENT_JWT_AUDIENCE", AUDIENCE.to_owned()),
    ];
    let environment = environment
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let server = Server::start_with(folder, &database, &environment).await;
    let token = idp.token_of("ann");
    accepted(&server, &token).await;

    drop(idp);

    assert_eq!(server.get(&token, "/projects").await.0, 200);
    // Tokens of keys that nobody knows are refused, not waited for.
    let started = now();
    assert_eq!(server.get(&user("ann"), "/projects").await.0, 401);
    assert!(now() - started < 30);
    // Callers without JWTs never depend on the issuer.
    let get = GetSessionRequest {
        id: "none".to_owned(),
    };
    let answer = server.api(SERVICE).sessions().get_session(get).await;
    assert_eq!(answer.unwrap_err().code(), tonic::Code::NotFound);
}

#[tokio::test]
async fn an_elliptic_curve_key_works_and_a_shared_secret_does_not() {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
    use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, jwk::Jwk};

    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let key = EncodingKey::from_ec_der(pair.to_pkcs8v1().unwrap().as_ref());
    let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
    jwk.common.key_id = Some("ec".to_owned());
    let secret = json!({"kty": "oct", "kid": "oct", "k": "c2VjcmV0", "alg": "HS256"});
    let folder = Arc::new(TempDir::new().unwrap());
    let keys = [serde_json::to_value(&jwk).unwrap(), secret];
    let path = write_jwks(folder.path(), "ec.json", &keys);
    let database = folder.path().join("ambient.db");
    let environment = [("AMBIENT_JWKS", path.to_str().unwrap())];
    let server = Server::start_with(folder, &database, &environment).await;
    let sign = |algorithm, kid: &str, key: &EncodingKey| {
        let mut header = Header::new(algorithm);
        header.kid = Some(kid.to_owned());
        encode(&header, &claims("ann", 600), key).unwrap()
    };
    accepted(&server, &sign(Algorithm::ES256, "ec", &key)).await;
    let shared = EncodingKey::from_secret(b"secret");
    let forged = sign(Algorithm::HS256, "oct", &shared);
    assert_eq!(server.get(&forged, "/projects").await.0, 401);
}
