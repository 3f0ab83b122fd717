//! The mounted file: swaps, loss, junk.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    time::Duration,
};

use ambient_testing::{
    DEADLINE,
    programs::{Program, binary},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::Value;

use crate::{
    scene::{NOWHERE, Scene, program, token_file},
    upstream::Upstream,
};

/// A JWT that expires so many seconds from now (maybe negative). Its signature is none.
fn jwt(life: i64) -> String {
    let now = i64::try_from(ambient_shared::clock::Clock::system().unix_seconds()).unwrap();
    let claims = format!(r#"{{"exp":{}}}"#, now + life);
    format!("e30.{}.sig", URL_SAFE_NO_PAD.encode(claims))
}

#[tokio::test]
async fn a_swap_is_served_and_proxied() {
    let upstream = Upstream::start().await;
    let scene = Scene::with_token("one", &upstream.url()).await;
    assert_eq!(scene.bare_token().await, (200, "one".to_owned()));
    for number in 2..=10 {
        let token = &format!("token-{number}");
        scene.mount(token);
        scene.serves(token).await;
        scene.get("/x").send().await.unwrap();
        let authorization = upstream.shared.last();
        assert_eq!(
            authorization.header("authorization"),
            Some(format!("Bearer {token}").as_str())
        );
    }
    scene
        .shows("ambient_sidecar_token_changes_total", 10.0)
        .await;
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
    // Read again and again: nothing new to say.
    scene.reads("too_long", 3).await;
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
    scene.serves("three").await;

    fs::remove_dir_all(&folder).unwrap();
    symlink(&folder, &folder).unwrap();
    assert_eq!(scene.bare_token().await.1, "three");
    fs::remove_file(&folder).unwrap();
    scene.mount("four");
    scene.serves("four").await;
}

#[tokio::test]
async fn an_expired_token_is_not_served_and_makes_it_unready() {
    let scene = Scene::with_token(&jwt(600), NOWHERE).await;
    assert_eq!(scene.token("").send().await.unwrap().status(), 200);
    scene.mount(&jwt(3));
    let expired = async {
        while scene.readiness().await.0 == 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, expired).await.unwrap();
    assert_eq!(scene.readiness().await.1, "token has expired\n");
    assert_eq!(
        scene.bare_token().await,
        (503, "token has expired".to_owned())
    );

    let fresh = jwt(600);
    scene.mount(&fresh);
    scene.serves(&fresh).await;
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
