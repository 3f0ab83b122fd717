//! Cache and pool on their own.

use std::time::SystemTime;

use ambient_shared::{bearer::PublicKey, proof::SessionRoot};
use ambient_testing::keypair::RsaKey;
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

fn answered(secret: &str) -> Answered {
    Answered {
        token: Token::new(secret, None).unwrap(),
        body: format!("body of {secret}").into(),
    }
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

    decryptor
        .remember(&ciphertext, id(), answered("first"))
        .await;
    let known = decryptor.known(&ciphertext).await.unwrap();
    assert_eq!(known.id, id());
    let token = |secret| answered(secret).token;
    assert_eq!(known.answered(&token("first")).unwrap(), "body of first");
    assert!(known.answered(&token("second")).is_none());
    known.answers(answered("second"));
    assert!(known.answered(&token("first")).is_none());
    assert_eq!(known.answered(&token("second")).unwrap(), "body of second");
    // Told to live longer, it is another answer.
    let longer = Token::new("second", Some(SystemTime::UNIX_EPOCH)).unwrap();
    assert!(known.answered(&longer).is_none());
}

#[tokio::test]
async fn session_keys_are_remembered_for_the_keys_of_then() {
    let (keys, decryptor) = (keys(), Decryptor::new());
    let ciphertext = Decryptor::parse(&keys, &bearer(&keys)).unwrap();
    decryptor
        .remember(&ciphertext, id(), answered("token"))
        .await;
    let known = decryptor.known(&ciphertext).await.unwrap();
    let session_keys = known.session_keys(&keys).unwrap();
    assert_eq!(session_keys.len(), 1);
    assert_eq!(session_keys[0].expose(), keys.session_key(&id()).expose());

    let root = SessionRoot::new([2; 32]);
    let others = Arc::new(Keys::clone(&keys).with_root(root.into()));
    assert!(known.session_keys(&others).is_none());
    // It does not keep alive what is replaced.
    let before = Arc::downgrade(&keys);
    drop((keys, ciphertext));
    assert!(before.upgrade().is_none());
}

#[tokio::test]
async fn what_the_keys_before_opened_is_not_known_under_others() {
    let (keys, decryptor) = (keys(), Decryptor::new());
    let bearer = bearer(&keys);
    let before = Decryptor::parse(&keys, &bearer).unwrap();
    decryptor.remember(&before, id(), answered("token")).await;
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
    decryptor.remember(&before, id(), answered("token")).await;
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
