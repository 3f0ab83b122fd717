//! Cache and pool on their own.

use ambient_shared::{bearer::PublicKey, proof::SessionRoot};
use ambient_testing::keypair::RsaKey;
use futures_util::FutureExt as _;
use proptest::prelude::*;

use super::*;
use crate::keypair::{
    decrypting::DecryptingKey,
    signing::{SigningKey, SigningKeys},
};

fn keys() -> Arc<Keys> {
    static SIGNING: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let signing = SIGNING.get_or_init(|| SigningKey::generate().unwrap().to_string());
    Arc::new(Keys::new(
        DecryptingKey::from_pem(&RsaKey::shared().private_pkcs1_pem()).unwrap(),
        SessionRoot::new([1; 32]),
        SigningKeys::new(SigningKey::from_pem(signing).unwrap(), None, None),
    ))
}

fn id() -> SessionId {
    SessionId::parse("session-0001").unwrap()
}

fn bearer(keys: &Keys) -> String {
    let key = PublicKey::from_pem(keys.public_pem()).unwrap();
    key.encrypt(&id()).unwrap().as_str().to_owned()
}

#[tokio::test]
async fn a_ciphertext_is_known_only_once_it_was_remembered() {
    let (keys, decryptor) = (keys(), Decryptor::new());
    let bearer = bearer(&keys);
    let ciphertext = Decryptor::parse(&keys, &bearer).unwrap();
    assert!(decryptor.known(&ciphertext).await.is_none());
    let opened = decryptor.open(&ciphertext).await.unwrap();
    assert_eq!(opened.as_slice(), b"session-0001");
    assert!(decryptor.known(&ciphertext).await.is_none());

    let token = |secret| Token::new(secret, None).unwrap();
    decryptor.remember(&ciphertext, id(), token("first")).await;
    let known = decryptor.known(&ciphertext).await.unwrap();
    assert_eq!(known.id, id());
    assert!(!known.is_news(&token("first")));
    assert!(known.is_news(&token("second")) && !known.is_news(&token("second")));
}

#[tokio::test]
async fn a_full_line_is_told_so_at_once_and_who_leaves_it_makes_room() {
    let (keys, decryptor) = (keys(), Decryptor::with_pool(1, 1));
    let bearer = bearer(&keys);
    let ciphertext = Decryptor::parse(&keys, &bearer).unwrap();
    // Somebody works for as long as this test likes.
    let place = Arc::clone(&decryptor.line).acquire_owned().await.unwrap();
    let core = Arc::clone(&decryptor.cores).acquire_owned().await.unwrap();
    let mut waits = Box::pin(decryptor.open(&ciphertext));
    assert!(waits.as_mut().now_or_never().is_none());

    let third = decryptor.open(&ciphertext).now_or_never();
    let third = third.expect("an answer at once");
    assert_eq!(third.unwrap_err(), OpenError::Overloaded);

    drop(waits);
    let mut waits = Box::pin(decryptor.open(&ciphertext));
    assert!(waits.as_mut().now_or_never().is_none());
    drop((place, core));
    assert!(waits.await.is_ok());
    assert_eq!(decryptor.line.available_permits(), 2);
    assert_eq!(decryptor.cores.available_permits(), 1);
}

#[tokio::test]
async fn what_the_keys_before_opened_is_not_known_under_others() {
    let (keys, decryptor) = (keys(), Decryptor::new());
    let bearer = bearer(&keys);
    let before = Decryptor::parse(&keys, &bearer).unwrap();
    let token = Token::new("token", None).unwrap();
    decryptor.remember(&before, id(), token.clone()).await;
    assert!(decryptor.known(&before).await.is_some());

    let other = RsaKey::generate(aws_lc_rs::rsa::KeySize::Rsa4096).private_pkcs1_pem();
    let signing = SigningKey::from_pem(&SigningKey::generate().unwrap()).unwrap();
    let others = Arc::new(Keys::new(
        DecryptingKey::from_pem(&other).unwrap(),
        SessionRoot::new([1; 32]),
        SigningKeys::new(signing, None, None),
    ));

    let after = Decryptor::parse(&others, &bearer).unwrap();
    assert!(decryptor.known(&after).await.is_none());
    assert_eq!(
        decryptor.open(&after).await.unwrap_err(),
        OpenError::Undecryptable
    );
    // What had begun before is done with the keys of then, and not remembered for later.
    assert!(decryptor.open(&before).await.is_ok());
    decryptor.remember(&before, id(), token).await;
    let again = Decryptor::parse(&others, &bearer).unwrap();
    assert!(decryptor.known(&again).await.is_none());
}

#[test]
fn only_strict_base64_of_the_right_length_is_a_ciphertext() {
    let keys = keys();
    let good = STANDARD.encode([0xfb; 512]);
    assert!(Decryptor::parse(&keys, &good).is_ok());
    let parse = |text: &str| Decryptor::parse(&keys, text).map(drop);
    for bad in [
        String::new(),
        "====".to_owned(),
        "=".repeat(684),
        STANDARD.encode([0xfb; 255]),
        STANDARD.encode([0xfb; 1025]),
        good.replace('+', "-").replace('/', "_"),
        format!(" {}", &good[1..]),
        format!("{}\n{}", &good[..100], &good[101..]),
        // Bits that are not part of the last byte.
        format!("{}x=", &good[..682]),
    ] {
        assert_eq!(parse(&bad), Err(ParseError::Malformed), "{bad}");
    }
    for other in [
        STANDARD.encode([0xfb; 511]),
        STANDARD.encode([0xfb; 513]),
        good.trim_end_matches('=').to_owned(),
    ] {
        assert_eq!(parse(&other), Err(ParseError::OtherKey), "{other}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_text_breaks_the_parser_and_no_two_are_taken_for_one(
        text in "[A-Za-z0-9+/=\\x20-\\x7eéß]{680,690}",
        at in 0_usize..680,
    ) {
        static KEYS: std::sync::OnceLock<Arc<Keys>> = std::sync::OnceLock::new();
        let keys = KEYS.get_or_init(keys);
        if let Ok(ciphertext) = Decryptor::parse(keys, &text) {
            prop_assert_eq!(STANDARD.encode(&ciphertext.bytes), text);
        }
        let good = STANDARD.encode([1; 512]);
        let mut other = good.clone().into_bytes();
        other[at] = if other[at] == b'B' { b'C' } else { b'B' };
        let other = String::from_utf8(other).unwrap();
        let parse = |text: &str| Decryptor::parse(keys, text).unwrap();
        let (good, other) = (parse(&good), parse(&other));
        prop_assert_ne!(good.digest, other.digest);
    }
}
