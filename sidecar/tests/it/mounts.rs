//! Machines without inotify, mounts that are never updated, disks that are full. All are made with
//! `unshare`.

use std::path::Path;

use ambient_testing::{
    disk::SmallDisk,
    ports::Port,
    programs::{Program, binary},
};

use crate::scene::{NOWHERE, Scene, mount, program, token_file};

/// Fails with what the machine needs for these tests, rather than with what breaks without it.
fn assert_namespaces() {
    let made = std::process::Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--ipc", "true"])
        .output();
    let why = match made {
        Ok(made) if made.status.success() => None,
        Ok(made) => Some(String::from_utf8_lossy(&made.stderr).trim().to_owned()),
        Err(error) => Some(error.to_string()),
    };
    assert!(
        why.is_none(),
        "this test needs unshare (util-linux) and leave to make user namespaces: sysctl \
         user.max_user_namespaces over 0 and, where there is one, \
         kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; \
         in a container, a seccomp profile that lets unshare and mount through. Now: {why:?}"
    );
}

/// The sidecar below a shell that first runs `setup` in namespaces of its own.
fn unshared(flags: &str, setup: &str, token_file: &Path) -> Program {
    assert_namespaces();
    Program::at("unshare")
        .args(["--user", "--map-root-user", flags, "sh", "-ec"])
        .arg(format!("{setup}\nexec \"$0\" \"$@\""))
        .arg(ambient_testing::programs::binary("ambient-sidecar"))
        .arg("--token-file")
        .arg(token_file)
        .args(["--upstream", NOWHERE])
        .env("AMBIENT_LOG_FORMAT", "json")
}

#[tokio::test]
async fn without_inotify_the_file_is_read_each_second() {
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let program = unshared(
        "--ipc",
        "echo 0 > /proc/sys/user/max_inotify_instances",
        &token_file(&dir),
    );
    let scene = Scene::start(program, dir).await;
    scene.serves("one").await;
    for token in ["two", "three"] {
        scene.mount(token);
        scene.serves(token).await;
    }
    assert_eq!(
        scene.metric("ambient_sidecar_folder_watched").await,
        Some(0.0)
    );
    assert_eq!(scene.logged("folder cannot be watched").len(), 1);
}

#[tokio::test]
async fn a_subpath_mount_is_warned_of_once() {
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    // As the kubelet does it: the file alone, read-only, over an empty file.
    let folder = dir.path().join("container");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("bot-token"), "").unwrap();
    let setup = format!(
        "mount --bind {0}/secret/bot-token {0}/container/bot-token\n\
         mount -o remount,bind,ro {0}/container/bot-token",
        dir.path().display()
    );
    let program = unshared("--mount", &setup, &folder.join("bot-token"));
    let mut scene = Scene::start(program, dir).await;
    let said = |line: &serde_json::Value| {
        line["message"]
            .as_str()
            .is_some_and(|it| it.contains("subPath"))
    };
    scene
        .sidecar
        .log_line("the mount is never updated", said)
        .await;
    scene.serves("one").await;
    scene.reads("ok", 3).await;
    assert_eq!(scene.logged("subPath").len(), 1);
}

#[tokio::test]
async fn a_full_disk_keeps_no_sidecar_from_starting_again() {
    const PAGE: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    mount(&dir, "one");
    let folder = dir.path().join("run");
    std::fs::create_dir(&folder).unwrap();
    let addresses = folder.join("addresses");
    let first = program(&dir, NOWHERE).env("AMBIENT_SIDECAR_ADDRESSES", &addresses);
    let mut first = Scene::start(first, dir).await;
    let ports = [first.endpoint, first.proxy, first.admin];
    first.sidecar.kill().await;
    let _kept = ports.map(Port::keep);

    // With the address file there is room for nothing more; without it, just as little.
    let disk = SmallDisk::new(&folder, "64k");
    let fill = |pages| std::fs::write(folder.join("ballast"), vec![b'x'; pages * PAGE]).unwrap();
    let again = || {
        let sidecar = disk.program(&binary("ambient-sidecar"));
        let sidecar = sidecar.arg("--token-file").arg(token_file(&first.dir));
        let sidecar = sidecar.args(["--upstream", NOWHERE]);
        sidecar.env("AMBIENT_SIDECAR_ADDRESSES", &addresses).start()
    };
    fill(15);
    let mut second = again();
    for (port_of, address) in ["endpoint", "proxy", "admin"].iter().zip(ports) {
        assert_eq!(second.listening(port_of).await, address);
    }
    second.kill().await;

    std::fs::remove_file(&addresses).unwrap();
    fill(16);
    let mut third = again();
    assert_eq!(third.wait().await.code(), Some(78));
    let log = third.log().join("\n");
    assert!(
        log.contains("AMBIENT_SIDECAR_ADDRESSES: cannot write"),
        "{log}"
    );
    assert!(log.contains("No space left"), "{log}");
}
