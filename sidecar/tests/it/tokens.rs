//! The mounted file: swaps, loss, junk.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    time::Duration,
};

use ambient_testing::programs::{Program, binary};
use serde_json::Value;

use crate::{
    scene::{NOWHERE, Scene, program, token_file},
    upstream::Upstream,
};

/// A JWT that expires so many seconds from now (maybe negative). Its signature is none.
fn jwt(life: i64) -> String {
    let now = i64::try_from(ambient_shared::clock::Clock::system().unix_seconds()).unwrap();
    let claims = format!(r#"{{"exp":{}}}"#, now + life);
    format!("e30.{}.sig", base64_url(claims.as_bytes()))
}

/// Base64 of the URL alphabet without padding.
fn base64_url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk
            .iter()
            .fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte))
            << (8 * (3 - chunk.len()));
        for index in 0..=chunk.len() {
            let six = bits >> (18 - 6 * index) & 63;
            text.push(char::from(ALPHABET[usize::try_from(six).unwrap()]));
        }
    }
    text
}

#[tokio::test]
async fn a_swap_is_served_and_proxied_in_a_moment() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    assert_eq!(scene.bare_token().await, (200, "one".to_owned()));
    for token in ["two", "three", "four"] {
        scene.mount(token);
        let took = scene.serves(token).await;
        assert!(took < Duration::from_millis(900), "{took:?}");
        scene.get("/x").send().await.unwrap();
        let authorization = upstream.shared.last();
        assert_eq!(
            authorization.header("authorization"),
            Some(format!("Bearer {token}").as_str())
        );
    }
    assert_eq!(
        scene.metric("ambient_sidecar_token_changes_total").await,
        Some(4.0)
    );
    assert_eq!(
        scene.metric("ambient_sidecar_folder_watched").await,
        Some(1.0)
    );
}

#[tokio::test]
async fn junk_keeps_the_last_good_token_and_is_said_once() {
    let mut scene = Scene::with_token("good", NOWHERE).await;
    let long = "x".repeat(65 * 1024);
    let mut said = 0;
    for (junk, reason) in [("", "empty"), ("a b", "header"), (&long, "bytes")] {
        scene.mount(junk);
        let wanted = |line: &Value| {
            let has = |field: &str, part| line[field].as_str().is_some_and(|it| it.contains(part));
            has("message", "cannot be used") && has("reason", reason)
        };
        (said, _) = scene.sidecar.log_line_after(said, reason, wanted).await;
        assert_eq!(
            scene.bare_token().await,
            (200, "good".to_owned()),
            "{reason}"
        );
    }
    // Read again at least twice more: nothing new to say.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(scene.logged("cannot be used").len(), 3);
    fs::remove_dir_all(scene.dir.path().join("secret")).unwrap();
    scene
        .sidecar
        .log_line("the file is gone", |line| {
            line["reason"]
                .as_str()
                .is_some_and(|it| it.contains("not found"))
        })
        .await;
    assert_eq!(scene.readiness().await.0, 200);
    scene.mount("better");
    scene.serves("better").await;
    assert!(
        scene
            .sidecar
            .log()
            .iter()
            .all(|line| !line.contains("better"))
    );
}

#[tokio::test]
async fn a_folder_that_appears_is_replaced_and_loops_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let scene = Scene::start(program(&dir, NOWHERE), dir).await;
    assert_eq!(scene.readiness().await, (503, "no token yet\n".to_owned()));
    let answer = scene.token("").send().await.unwrap();
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["retry-after"], "1");
    assert_eq!(answer.headers()["cache-control"], "no-store");

    scene.mount("one");
    scene.serves("one").await;
    scene.ready().await;
    let folder = scene.dir.path().join("secret");
    fs::rename(&folder, scene.dir.path().join("old")).unwrap();
    scene.mount("two");
    scene.serves("two").await;
    scene.mount("three");
    let took = scene.serves("three").await;
    assert!(took < Duration::from_millis(1500), "{took:?}");

    fs::remove_dir_all(&folder).unwrap();
    symlink(&folder, &folder).unwrap();
    assert_eq!(scene.bare_token().await.1, "three");
    fs::remove_file(&folder).unwrap();
    scene.mount("four");
    scene.serves("four").await;
}

#[tokio::test]
async fn an_expired_token_is_not_served_and_makes_it_unready() {
    let scene = Scene::with_token(&jwt(3), NOWHERE).await;
    assert_eq!(scene.token("").send().await.unwrap().status(), 200);
    let expired = async {
        while scene.readiness().await.0 == 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), expired)
        .await
        .unwrap();
    assert_eq!(scene.readiness().await.1, "token has expired\n");
    assert_eq!(
        scene.bare_token().await,
        (503, "token has expired".to_owned())
    );

    let fresh = jwt(600);
    scene.mount(&fresh);
    // The first question after the swap is answered from the file, not from memory.
    assert_eq!(scene.bare_token().await, (200, fresh));
    scene.ready().await;
    assert!(
        scene
            .metric("ambient_sidecar_token_expiry_timestamp_seconds")
            .await
            .unwrap()
            > 1e9
    );
}

#[tokio::test]
async fn a_pipe_or_a_folder_in_the_place_of_the_file_is_survived() {
    let scene = Scene::with_token("one", NOWHERE).await;
    fs::remove_dir_all(scene.dir.path().join("secret")).unwrap();
    fs::create_dir(scene.dir.path().join("secret")).unwrap();
    let path = token_file(&scene.dir);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(scene.bare_token().await.1, "one");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_eq!(scene.bare_token().await.1, "one");
    fs::remove_dir(&path).unwrap();
    fs::write(&path, "plain\n").unwrap();
    scene.serves("plain").await;
}

#[tokio::test]
async fn a_file_that_may_not_be_read_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    fs::create_dir(dir.path().join("secret")).unwrap();
    let path = token_file(&dir);
    fs::write(&path, "one").unwrap();
    mode(&path, 0);
    for folder in [dir.path(), &dir.path().join("secret")] {
        mode(folder, 0o755);
    }
    // Root may read everything, so it is somebody else then.
    let nobody = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let program = if nix::unistd::geteuid().is_root() {
        Program::at("setpriv")
            .args(nobody)
            .arg(binary("ambient-sidecar"))
    } else {
        Program::new("ambient-sidecar")
    };
    let program = program
        .arg("--token-file")
        .arg(&path)
        .args(["--upstream", NOWHERE])
        .env("AMBIENT_LOG_FORMAT", "json");
    let mut scene = Scene::start(program, dir).await;
    let denied = |line: &Value| line["reason"] == "permission denied";
    scene.sidecar.log_line("permission denied", denied).await;
    assert_eq!(scene.bare_token().await.0, 503);
    mode(&path, 0o644);
    scene.serves("one").await;
}
