//! Contents and owners; against a real cluster in `tests/it/keys.rs`.

use std::time::Duration;

use ambient_shared::{clock::from_unix_seconds, exit::report};
use ambient_testing::keypair::RsaKey;
use aws_lc_rs::rsa::KeySize;

use super::{change::Step, content::Change, *};
use crate::keypair::{Rotating, signing::SigningKey};

type Data<'a> = &'a [(&'a str, &'a [u8])];

fn content(data: Data<'_>) -> Content {
    let data = data.iter();
    Content::new(
        "Secret here/it".to_owned(),
        data.map(|(key, value)| ((*key).to_owned(), ByteString(value.to_vec())))
            .collect(),
    )
}

fn owner(uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "ConfigMap".to_owned(),
        name: CONFIG_MAP.to_owned(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    }
}

fn metadata(label: Option<&str>, owners: Vec<OwnerReference>) -> ObjectMeta {
    ObjectMeta {
        labels: label.map(|label| [(MANAGED_BY.to_owned(), label.to_owned())].into()),
        owner_references: Some(owners),
        ..ObjectMeta::default()
    }
}

#[test]
fn what_is_made_is_read() {
    let read = |made: Made| Content::new("it".to_owned(), bytes(&made));
    let Rotating { previous, .. } = read(content::new_keypair().unwrap()).keypair().unwrap();
    assert!(previous.is_none());
    read(content::new_root().unwrap()).root().unwrap();
    read(content::new_signing_key().unwrap()).signing().unwrap();
}

#[test]
fn keys_of_a_rotation_are_read_too() {
    let (new, old) = (RsaKey::shared(), RsaKey::generate(KeySize::Rsa2048));
    let old = old.private_pkcs8_pem();
    let secret = content(&[
        ("private.pem", new.private_pkcs1_pem().as_bytes()),
        ("public.pem", new.public_pem().as_bytes()),
        ("previous-private.pem", old.as_bytes()),
    ]);
    let Rotating { current, previous } = secret.keypair().unwrap();
    assert_eq!(current.public_pem(), new.public_pem());
    assert_ne!(previous.unwrap().public_pem(), new.public_pem());

    let roots = content(&[("root", &[1; 32]), ("previous-root", &[2; 32])]);
    assert!(roots.root().unwrap().previous.is_some());

    let next = RsaKey::generate(KeySize::Rsa2048).private_pkcs1_pem();
    let signing = content(&[
        ("private.pem", new.private_pkcs1_pem().as_bytes()),
        ("next-private.pem", next.as_bytes()),
        ("previous-private.pem", old.as_bytes()),
    ]);
    let jwks = signing.signing().unwrap().jwks();
    let jwks: serde_json::Value = serde_json::from_slice(&jwks).unwrap();
    assert_eq!(jwks["keys"].as_array().unwrap().len(), 3);
}

#[test]
fn a_fault_names_the_secret_and_the_key() {
    let key = RsaKey::shared();
    let (private, public) = (key.private_pkcs1_pem(), key.public_pem());
    let other = RsaKey::generate(KeySize::Rsa2048).public_pem();
    let cases: [(Data<'_>, &str, &str); 6] = [
        (&[], "private.pem", "no key"),
        (
            &[("private.pem", private.as_bytes())],
            "public.pem",
            "no key",
        ),
        (&[("private.pem", b"\xff")], "private.pem", "not text"),
        (
            &[("private.pem", public.as_bytes())],
            "private.pem",
            "PUBLIC KEY",
        ),
        (
            &[("private.pem", private.as_bytes()), ("public.pem", b"junk")],
            "public.pem",
            "not an RSA public key",
        ),
        (
            &[
                ("private.pem", private.as_bytes()),
                ("public.pem", other.as_bytes()),
            ],
            "public.pem",
            "does not belong to",
        ),
    ];
    for (data, key, why) in cases {
        let told = report(&content(data).keypair().unwrap_err());
        assert!(told.contains("Secret here/it"), "{told}");
        assert!(told.contains(key) && told.contains(why), "{told}");
        assert!(!told.contains("-----BEGIN"), "{told}");
    }
    let told = report(&content(&[("root", b"short")]).root().unwrap_err());
    assert!(
        told.contains("key root") && told.contains("5 bytes"),
        "{told}"
    );
}

/// What a change sets, as text; none where it takes something out.
fn changed<'a>(change: &'a Change, key: &str) -> Option<&'a str> {
    let (_, value) = change.iter().find(|(it, _)| *it == key).unwrap();
    value.as_ref().map(|it| std::str::from_utf8(it).unwrap())
}

#[test]
fn until_when_an_old_signing_key_is_needed_follows_from_the_longest_life_that_it_signed() {
    const HOUR: Duration = Duration::from_hours(1);
    let (old, next) = (RsaKey::shared(), RsaKey::generate(KeySize::Rsa2048));
    let (old, next) = (old.private_pkcs1_pem(), next.private_pkcs1_pem());
    let keys = [
        ("private.pem", old.as_bytes()),
        ("next-private.pem", next.as_bytes()),
    ];
    let noted = |life: &'static str| content(&[keys[0], keys[1], ("token-life", life.as_bytes())]);
    // A longer one is noted, a shorter one is not.
    assert!(noted("3600").note_life(HOUR).unwrap().is_none());
    let longer = noted("3599").note_life(HOUR).unwrap().unwrap();
    assert_eq!(changed(&longer, "token-life"), Some("3600"));
    let first = content(&keys).note_life(HOUR).unwrap().unwrap();
    assert_eq!(changed(&first, "token-life"), Some("3600"));

    let now = from_unix_seconds(1_000_000).unwrap();
    let promote = Step::Promote {
        next: SigningKey::from_pem(&next).unwrap().kid().to_owned(),
        life: HOUR,
    };
    for (content, until) in [
        (content(&keys), "1003600"),
        (noted("60"), "1003600"),
        (noted("86400"), "1086400"),
    ] {
        let change = content.step(&promote, now).unwrap().unwrap();
        assert_eq!(changed(&change, "previous-until"), Some(until));
        assert_eq!(changed(&change, "token-life"), Some("3600"));
    }

    let rotated = content(&[
        ("private.pem", next.as_bytes()),
        ("previous-private.pem", old.as_bytes()),
        ("previous-until", b"1086400"),
    ]);
    let until = rotated.signing().unwrap().previous_until();
    assert_eq!(until, from_unix_seconds(1_086_400));
    let gone = Step::Drop {
        kind: KeyKind::SigningKey,
        previous: SigningKey::from_pem(&old).unwrap().kid().to_owned(),
    };
    let change = rotated.step(&gone, now).unwrap().unwrap();
    assert_eq!(changed(&change, "previous-private.pem"), None);
    assert_eq!(changed(&change, "previous-until"), None);

    let malformed = content(&[keys[0], ("previous-until", b"soon")]);
    let told = report(&malformed.signing().unwrap_err());
    assert!(
        told.contains("key previous-until of Secret here/it"),
        "{told}"
    );
    assert!(told.contains("number of seconds"), "{told}");
}

#[test]
fn only_secrets_of_ours_get_an_owner() {
    let now = owner("now");
    let set = |label, owners| owners_to_set(&metadata(label, owners), &now);
    assert_eq!(set(None, vec![]), None);
    assert_eq!(set(Some("somebody-else"), vec![]), None);
    assert_eq!(set(Some(CONTROL_PLANE), vec![now.clone()]), None);
    assert_eq!(set(Some(CONTROL_PLANE), vec![]), Some(vec![now.clone()]));

    // One that is gone would have the Secret collected; others stay.
    let other = OwnerReference {
        name: "other".to_owned(),
        ..owner("other")
    };
    let both = vec![owner("gone"), other.clone()];
    assert_eq!(
        set(Some(CONTROL_PLANE), both),
        Some(vec![other, now.clone()])
    );
}
