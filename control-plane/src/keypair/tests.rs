//! Keys together: what one accepts, and what the other makes.

use ambient_shared::{
    bearer::PublicKey,
    clock,
    proof::{self, ProofError},
};
use ambient_testing::keypair::RsaKey;
use aws_lc_rs::rsa::KeySize;
use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{signing::SigningKey, *};

fn signing() -> SigningKeys {
    let key = RsaKey::generate(KeySize::Rsa2048).private_pkcs1_pem();
    SigningKeys::new(SigningKey::from_pem(&key).unwrap(), None, None)
}

fn keys(pem: &str, root: u8) -> Keys {
    let decrypting = DecryptingKey::from_pem(pem).unwrap();
    Keys::new(decrypting, SessionRoot::new([root; 32]), signing())
}

fn id() -> SessionId {
    SessionId::parse("0198c7a2-7a6c-7d11-b1a3-000000000001").unwrap()
}

fn ciphertext(public_pem: &str) -> Vec<u8> {
    let bearer = PublicKey::from_pem(public_pem)
        .unwrap()
        .encrypt(&id())
        .unwrap();
    STANDARD.decode(bearer.as_str()).unwrap()
}

#[test]
fn what_runners_encrypt_is_opened() {
    let keys = keys(&RsaKey::shared().private_pkcs1_pem(), 1);
    let sealed = ciphertext(keys.public_pem());
    assert!(keys.fits(sealed.len()) && !keys.fits(sealed.len() - 1));
    assert_eq!(
        keys.open(&sealed).unwrap().as_slice(),
        id().as_str().as_bytes()
    );
    let mut broken = sealed;
    broken[100] ^= 1;
    assert!(keys.open(&broken).is_none());
    assert!(keys.open(&[]).is_none());
    assert!(keys.open(&[0xff; 512]).is_none());
}

#[test]
fn both_forms_of_a_private_key_are_the_same_key() {
    let key = RsaKey::shared();
    let pkcs1 = DecryptingKey::from_pem(&key.private_pkcs1_pem()).unwrap();
    let pkcs8 = DecryptingKey::from_pem(&format!("\n{}\n", key.private_pkcs8_pem())).unwrap();
    assert_eq!(pkcs1.public_pem(), pkcs8.public_pem());
    assert_eq!(pkcs1.public_pem(), key.public_pem());
    assert!(
        pkcs1
            .is_pair_of(&key.public_pem().replace('\n', "\r\n"))
            .unwrap()
    );
}

#[test]
fn a_written_key_is_pkcs1_and_reads_back() {
    let pem = SigningKey::generate().unwrap();
    assert!(pem.starts_with("-----BEGIN RSA PRIVATE KEY-----\n"));
    let (first, second) = (
        SigningKey::from_pem(&pem).unwrap(),
        SigningKey::from_pem(&pem).unwrap(),
    );
    assert_eq!(first.kid(), second.kid());
}

#[test]
fn what_is_no_key_is_told_from_what_is_the_wrong_one() {
    let refused = |pem: &str| DecryptingKey::from_pem(pem).unwrap_err().to_string();
    assert!(refused("").contains("not PEM"));
    assert!(refused("hello").contains("not PEM"));
    let public = RsaKey::shared().public_pem();
    assert!(
        refused(&public).contains("`PUBLIC KEY`"),
        "{}",
        refused(&public)
    );
    let cut = RsaKey::shared().private_pkcs1_pem();
    let cut: String = cut.lines().take(20).collect::<Vec<_>>().join("\n");
    assert!(refused(&cut).contains("not PEM"));
    let not_rsa = "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
    assert!(refused(not_rsa).contains("RSA"), "{}", refused(not_rsa));
}

#[test]
fn the_previous_key_and_root_are_accepted_during_a_rotation() {
    let old_pem = RsaKey::generate(KeySize::Rsa2048).private_pkcs8_pem();
    let old = keys(&old_pem, 1);
    let now = clock::from_unix_seconds(1_000_000).unwrap();
    let proof = old.session_key(&id()).sign("Zm9v", now);
    let sealed = ciphertext(old.public_pem());

    let new = keys(&RsaKey::shared().private_pkcs1_pem(), 2);
    let verify = |keys: &Keys, now| proof::verify(&keys.session_keys(&id()), &proof, "Zm9v", now);
    assert_eq!(verify(&new, now), Err(ProofError::Wrong));
    assert!(new.open(&sealed).is_none() && !new.fits(sealed.len()));
    let before = *new.fingerprint();

    let current = |pem: &str| DecryptingKey::from_pem(pem).unwrap();
    let rotating = new
        .clone()
        .with_keypair(Rotating {
            current: current(&RsaKey::shared().private_pkcs1_pem()),
            previous: Some(current(&old_pem)),
        })
        .with_root(Rotating {
            current: SessionRoot::new([2; 32]),
            previous: Some(SessionRoot::new([1; 32])),
        });
    let ids = rotating.ids();
    assert_eq!(ids.keypair.current, new.ids().keypair.current);
    assert_eq!(ids.keypair.previous, Some(old.ids().keypair.current));
    assert_eq!(ids.root.current, new.ids().root.current);
    assert_eq!(ids.root.previous, Some(old.ids().root.current));
    assert_ne!(ids.root.current, old.ids().root.current);
    assert_ne!(*rotating.fingerprint(), before);
    assert_eq!(verify(&rotating, now), Ok(()));
    assert!(rotating.open(&sealed).is_some() && rotating.fits(sealed.len()));
    // What is given out is made with the current ones.
    assert_eq!(rotating.public_pem(), RsaKey::shared().public_pem());
    let root = SessionRoot::new([2; 32]);
    assert_eq!(
        rotating.session_key(&id()).expose(),
        root.session_key(&id()).expose()
    );
    let much_later = clock::from_unix_seconds(1_000_061).unwrap();
    assert_eq!(verify(&rotating, much_later), Err(ProofError::Stale));
}

#[test]
fn debug_output_shows_no_key() {
    let shown = format!("{:?}", keys(&RsaKey::shared().private_pkcs1_pem(), 7));
    assert!(
        !shown.contains("BEGIN") && !shown.contains("7, 7"),
        "{shown}"
    );
}
