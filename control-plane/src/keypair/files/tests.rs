//! In real folders.

use ambient_testing::keypair::RsaKey;
use aws_lc_rs::rsa::KeySize;

use super::*;

fn store(folder: &Path) -> FileKeypairStore {
    FileKeypairStore {
        folder: folder.to_owned(),
    }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn put(folder: &Path, file: &str, content: impl AsRef<[u8]>) -> PathBuf {
    fs::create_dir_all(folder.join(FOLDER)).unwrap();
    let path = folder.join(FOLDER).join(file);
    fs::write(&path, content).unwrap();
    path
}

/// Loads from a folder where this file is as given; the error must name it and leave it alone.
async fn refusal(file: &str, content: &[u8], before: &[(&str, &str)]) -> String {
    let dir = tempfile::tempdir().unwrap();
    for (other, content) in before {
        put(dir.path(), other, content);
    }
    let path = put(dir.path(), file, content);
    let error = store(dir.path()).load_or_create().await.unwrap_err();
    let line = ambient_shared::exit::report(&error);
    assert!(line.contains(&path.display().to_string()), "{line}");
    assert_eq!(fs::read(&path).unwrap(), content, "{file} was overwritten");
    line
}

#[tokio::test]
async fn ten_that_start_at_once_get_the_same_keys() {
    let dir = tempfile::tempdir().unwrap();
    let starters = (0..10).map(|_| {
        let store = store(dir.path());
        async move { store.load_or_create().await.unwrap() }
    });
    let all = futures_util::future::join_all(starters).await;

    let id = ambient_shared::session::SessionId::parse("session-0001").unwrap();
    let first = &all[0];
    for keys in &all {
        assert_eq!(keys.public_pem(), first.public_pem());
        assert_eq!(
            keys.session_key(&id).expose(),
            first.session_key(&id).expose()
        );
        assert_eq!(keys.signing().jwks(), first.signing().jwks());
    }
    let keypair = dir.path().join(FOLDER);
    let public = fs::read_to_string(keypair.join("public.pem")).unwrap();
    assert_eq!(public, first.public_pem());
    let private = fs::read_to_string(keypair.join("private.pem")).unwrap();
    assert!(private.starts_with("-----BEGIN RSA PRIVATE KEY-----\n"));
    let jwks = fs::read_to_string(keypair.join(JWKS)).unwrap();
    assert_eq!(jwks.as_bytes(), first.signing().jwks());

    assert_eq!(mode(&keypair), 0o700);
    for secret in ["private.pem", "signing.pem", "session-root"] {
        assert_eq!(mode(&keypair.join(secret)), 0o600, "{secret}");
    }
    let names = fs::read_dir(&keypair).unwrap();
    let left: Vec<_> = names
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.to_string_lossy().starts_with(".tmp"))
        .collect();
    assert!(left.is_empty(), "{left:?}");

    // And so after a restart.
    let again = store(dir.path()).load_or_create().await.unwrap();
    assert_eq!(again.public_pem(), first.public_pem());
    assert_eq!(again.signing().jwks(), first.signing().jwks());
}

#[tokio::test]
async fn a_keypair_that_is_there_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let private = put(
        dir.path(),
        "private.pem",
        RsaKey::shared().private_pkcs8_pem(),
    );
    let before = fs::read(&private).unwrap();
    let keys = store(dir.path()).load_or_create().await.unwrap();
    assert_eq!(keys.public_pem(), RsaKey::shared().public_pem());
    assert_eq!(fs::read(&private).unwrap(), before);
    let public = dir.path().join(FOLDER).join("public.pem");
    assert_eq!(fs::read_to_string(public).unwrap(), keys.public_pem());
}

#[tokio::test]
async fn a_previous_keypair_is_accepted_beside_the_current() {
    let dir = tempfile::tempdir().unwrap();
    let old = RsaKey::generate(KeySize::Rsa2048);
    put(
        dir.path(),
        "private.pem",
        RsaKey::shared().private_pkcs1_pem(),
    );
    put(dir.path(), "previous-private.pem", old.private_pkcs1_pem());
    put(dir.path(), "previous-session-root", [3; 32]);
    let retired = RsaKey::generate(KeySize::Rsa2048);
    put(
        dir.path(),
        "previous-signing.pem",
        retired.private_pkcs1_pem(),
    );
    let keys = store(dir.path()).load_or_create().await.unwrap();
    assert!(keys.fits(512) && keys.fits(256));
    let jwks: serde_json::Value = serde_json::from_slice(&keys.signing().jwks()).unwrap();
    assert_eq!(jwks["keys"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn malformed_keys_are_refused_by_name_and_kept() {
    let private = RsaKey::shared().private_pkcs1_pem();
    let public = RsaKey::shared().public_pem();
    let whole = [("private.pem", private.as_str())];
    assert!(refusal("private.pem", b"", &[]).await.contains("not PEM"));
    assert!(
        refusal("private.pem", b"\xff\xfe", &[])
            .await
            .contains("not text")
    );
    assert!(
        refusal("private.pem", &private.as_bytes()[..900], &[])
            .await
            .contains("not PEM")
    );
    assert!(
        refusal("private.pem", public.as_bytes(), &[])
            .await
            .contains("PUBLIC KEY")
    );
    assert!(
        refusal("public.pem", b"junk", &whole)
            .await
            .contains("BEGIN PUBLIC KEY")
    );
    assert!(
        refusal("session-root", &[1; 31], &whole)
            .await
            .contains("31 bytes")
    );
    assert!(
        refusal("signing.pem", b"junk", &whole)
            .await
            .contains("not PEM")
    );
    assert!(
        refusal("previous-private.pem", b"junk", &whole)
            .await
            .contains("not PEM")
    );
    assert!(
        refusal("private.pem", "x".repeat(100_000).as_bytes(), &[])
            .await
            .contains("too large")
    );
}

#[tokio::test]
async fn halves_that_do_not_belong_together_are_refused() {
    let private = RsaKey::shared().private_pkcs1_pem();
    let other = RsaKey::generate(KeySize::Rsa2048).public_pem();
    let line = refusal("public.pem", other.as_bytes(), &[("private.pem", &private)]).await;
    assert!(line.contains("does not belong"), "{line}");
    let line = refusal("public.pem", other.as_bytes(), &[]).await;
    assert!(line.contains("private.pem is not"), "{line}");
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let error = store(&dir.path().join("file"))
        .load_or_create()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("file/keypair"), "{error}");
}
