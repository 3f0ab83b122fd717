use std::{fs, os::unix::fs::symlink};

use ambient_shared::swap::SecretVolume;
use ambient_testing::DEADLINE;
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

use super::*;
use crate::tokens::{self, Tokens};

/// A watcher under test, on a folder that is removed at the end.
struct Scene {
    dir: TempDir,
    tokens: Tokens,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<()>,
}

impl Scene {
    fn start(file: &str) -> Self {
        Self::reading_each(POLL, file)
    }

    #[expect(clippy::disallowed_methods, reason = "the scene owns the task")]
    fn reading_each(poll: Duration, file: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (feed, tokens) = tokens::channel(Clock::system());
        let stop = CancellationToken::new();
        let mut watcher = Watcher::new(dir.path().join(file), feed, Clock::system());
        watcher.poll = poll;
        let running = tokio::spawn(watcher.run(stop.clone()));
        Self {
            dir,
            tokens,
            stop,
            running,
        }
    }

    fn volume(&self, folder: &str) -> SecretVolume {
        SecretVolume::new(self.dir.path().join(folder))
    }

    async fn sees(&self, token: &str) {
        let mut changes = self.tokens.changes();
        let seen =
            changes.wait_for(|seen| seen.as_ref().is_some_and(|seen| seen.expose() == token));
        timeout(DEADLINE, seen)
            .await
            .unwrap_or_else(|_| panic!("{token} not seen; have {:?}", self.tokens.latest()))
            .unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        timeout(DEADLINE, self.running).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn swaps_are_seen_when_they_are_announced() {
    // Long after the test: only announcements are left. The first read is at once.
    let scene = Scene::reading_each(Duration::from_hours(1), "v/bot-token");
    for n in 0..10 {
        let token = n.to_string();
        scene
            .volume("v")
            .write(&[("bot-token", token.as_bytes())])
            .unwrap();
        scene.sees(&token).await;
    }
    scene.end().await;
}

#[tokio::test]
async fn a_folder_that_goes_and_comes_back_is_followed() {
    let scene = Scene::start("v/bot-token");
    for n in 0..3 {
        let token = n.to_string();
        scene
            .volume("v")
            .write(&[("bot-token", token.as_bytes())])
            .unwrap();
        scene.sees(&token).await;
        fs::remove_dir_all(scene.dir.path().join("v")).unwrap();
    }
    // Replaced in one step by another folder, which stays and is updated.
    for n in 3..6 {
        let token = n.to_string();
        let new = scene.volume("new");
        new.write(&[("bot-token", token.as_bytes())]).unwrap();
        let _ = fs::remove_dir_all(scene.dir.path().join("v"));
        fs::rename(new.folder(), scene.dir.path().join("v")).unwrap();
        scene.sees(&token).await;
    }
    scene.volume("v").write(&[("bot-token", b"last")]).unwrap();
    scene.sees("last").await;
    scene.end().await;
}

#[tokio::test]
async fn junk_keeps_the_last_good_token() {
    let scene = Scene::start("v/bot-token");
    let volume = scene.volume("v");
    volume.write(&[("bot-token", b"good")]).unwrap();
    scene.sees("good").await;
    let long = vec![b'x'; 70_000];
    for junk in [&b""[..], b"\n", b"a b", b"\xff\xfe", b"a\0b", &long] {
        volume.write(&[("bot-token", junk)]).unwrap();
        scene.tokens.look_again().await;
        assert_eq!(scene.tokens.latest().unwrap().expose(), "good");
    }
    volume.write(&[("other", b"")]).unwrap();
    scene.tokens.look_again().await;
    assert_eq!(scene.tokens.latest().unwrap().expose(), "good");
    volume.write(&[("bot-token", b"better")]).unwrap();
    scene.sees("better").await;
    scene.end().await;
}

#[tokio::test]
async fn loops_of_symlinks_are_survived() {
    let scene = Scene::start("v/bot-token");
    let folder = scene.dir.path().join("v");
    symlink("v", &folder).unwrap();
    scene.tokens.look_again().await;
    assert!(scene.tokens.latest().is_none());
    fs::remove_file(&folder).unwrap();
    fs::create_dir(&folder).unwrap();
    symlink("bot-token", folder.join("bot-token")).unwrap();
    scene.tokens.look_again().await;
    assert!(scene.tokens.latest().is_none());
    fs::remove_file(folder.join("bot-token")).unwrap();
    scene.volume("v").write(&[("bot-token", b"now")]).unwrap();
    scene.sees("now").await;
    scene.end().await;
}

/// What a symlink points at changes without anything happening in the folder that is watched: as
/// silent as a system without announcements.
#[tokio::test(start_paused = true)]
async fn reading_each_second_finds_what_nobody_announced() {
    let scene = Scene::start("v/bot-token");
    fs::create_dir(scene.dir.path().join("v")).unwrap();
    fs::create_dir(scene.dir.path().join("elsewhere")).unwrap();
    let real = scene.dir.path().join("elsewhere/token");
    let write = |token: &str| {
        let new = real.with_extension("new");
        fs::write(&new, token).unwrap();
        fs::rename(new, &real).unwrap();
    };
    write("one");
    symlink(&real, scene.dir.path().join("v/bot-token")).unwrap();
    scene.sees("one").await;
    for token in ["two", "three"] {
        let started = Instant::now();
        write(token);
        scene.sees(token).await;
        let waited = started.elapsed();
        assert!(waited <= POLL + POLL / 10, "{waited:?}");
    }
    scene.end().await;
}

#[test]
fn our_own_reads_lead_to_no_reads() {
    assert!(!may_change_content(EventKind::Access(AccessKind::Open(
        AccessMode::Any
    ))));
    assert!(!may_change_content(EventKind::Access(AccessKind::Close(
        AccessMode::Read
    ))));
    assert!(may_change_content(EventKind::Access(AccessKind::Close(
        AccessMode::Write
    ))));
    assert!(may_change_content(EventKind::Any));
}
