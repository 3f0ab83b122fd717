//! A real runner whose clock and ours are an hour apart still gets its token.

use std::time::Duration;

use ambient_control_plane::metrics::EXCHANGES;
use ambient_shared::{clock::Clock, swap::SecretVolume, telemetry::MetricsPage};
use ambient_testing::programs::Program;

use super::scene::{ACTIVE, Scene, Setup, id};

const HOUR: Duration = Duration::from_secs(3600);

/// A runner of [`ACTIVE`] that has nothing but its key and this endpoint.
pub fn runner(scene: &Scene, folder: &std::path::Path) -> Program {
    let key = scene.keys.session_key(&id(ACTIVE));
    SecretVolume::new(folder.join("mount"))
        .write(&[("session-key", key.expose().as_bytes())])
        .unwrap();
    Program::new("ambient-runner")
        .env("SESSION_ID", ACTIVE)
        .env(
            "AMBIENT_CP_TOKEN_URL",
            format!("http://{}/token", scene.address),
        )
        .env("AMBIENT_CP_TOKEN_PUBLIC_KEY", scene.keys.public_pem())
        .env("AMBIENT_BOT_TOKEN_FILE", folder.join("mount/bot-token"))
        .env("AMBIENT_SESSION_KEY_FILE", folder.join("mount/session-key"))
        .env("AMBIENT_TOKEN_FILE", folder.join("run/token"))
        .env("AMBIENT_SPOOL_DIR", folder.join("spool"))
        .env("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0")
        .args([
            "--",
            "sh",
            "-c",
            r#"test -s "$AMBIENT_TOKEN_FILE" && echo has a token"#,
        ])
}

#[tokio::test]
async fn a_runner_whose_clock_is_off_by_an_hour_gets_its_token_at_the_second_try() {
    let now = Clock::system().now();
    // Ours is the one that is set: to the runner it is all the same.
    for ours in [now + HOUR, now - HOUR] {
        let page = MetricsPage::default();
        // All tasks of this test run on its own thread, so this sees only them.
        let _recording = metrics::set_default_local_recorder(&page);
        let scene = Setup::default().start().await;
        scene.clock.set(ours);
        let folder = tempfile::tempdir().unwrap();
        let mut runner = runner(&scene, folder.path()).start();
        runner.output_line("has a token").await;
        assert!(runner.wait().await.success());

        let page = page.render();
        for line in [
            format!("{EXCHANGES}{{result=\"stale_proof\"}} 1"),
            format!("{EXCHANGES}{{result=\"ok\"}} 1"),
        ] {
            assert!(page.contains(&line), "no {line} in\n{page}");
        }
    }
}
