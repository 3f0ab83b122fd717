#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a measurement that cannot be made is a failure that shows the scene"
)]
//! Resident memory of each program at rest, a few seconds after it is ready.
//!
//! Runner and sidecar serve one session of a `local` that has no other.

use std::{path::Path, path::PathBuf, time::Duration};

use ambient_shared::phase::Phase;
use ambient_testing::{
    local::{Local, NewSession},
    processes::memory,
    programs::{Program, Running, binary},
    table::{Table, machine, mebibytes},
};
use clap::Parser;

/// Measures resident memory at rest.
#[derive(Debug, Parser)]
struct Settings {
    /// How long a program rests before it is measured.
    #[arg(long, default_value = "5s", value_parser = ambient_shared::settings::parse_duration)]
    rest: Duration,
    /// Folder with static `ambient-runner` and `ambient-sidecar`, to measure those too.
    #[arg(long)]
    static_dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() {
    let settings = Settings::parse();
    println!("machine: {}\n", machine());
    let local = Local::start(&["--token-ttl", "15m"]).await;
    let session = NewSession::command(&["sleep", "3600"]).io("none");
    let id = local.create(session).await;
    local.phase(&id, Phase::Running).await;

    let folder = tempfile::tempdir().expect("a folder");
    let mut programs = vec![(
        "ambient-api-server".to_owned(),
        Program::new("ambient-api-server")
            .args(["--rest-listen", "127.0.0.1:0"])
            .args(["--grpc-listen", "127.0.0.1:0"])
            .arg("--database")
            .arg(folder.path().join("api.db"))
            .env("AMBIENT_OPERATOR_TOKEN", "of-this-measurement-only")
            .start(),
    )];
    let release = binary("ambient-runner");
    let release = release.parent().expect("a file is in a folder");
    let folders = [
        ("", Some(release)),
        (", static", settings.static_dir.as_deref()),
    ];
    for (suffix, binaries) in folders {
        let Some(binaries) = binaries else { continue };
        programs.push((
            format!("ambient-runner{suffix}"),
            runner(&local, &id, binaries, folder.path()).await,
        ));
        programs.push((
            format!("ambient-sidecar{suffix}"),
            sidecar(&local, &id, binaries).await,
        ));
    }
    tokio::time::sleep(settings.rest).await;

    let mut table = Table::new(&["program", "resident", "of it anonymous"]);
    let mut row = |name: &str, pid| {
        let cell = |field| memory(pid, field).map_or_else(|| "ended".to_owned(), mebibytes);
        table.row(&[name.to_owned(), cell("VmRSS"), cell("RssAnon")]);
    };
    row(
        "ambient-control-plane local (API server included)",
        local.program.pid(),
    );
    for (name, program) in &programs {
        row(name, program.pid());
    }
    println!("{table}");
}

async fn runner(local: &Local, id: &str, binaries: &Path, folder: &Path) -> Running {
    let folder = tempfile::tempdir_in(folder).expect("a folder").keep();
    let mut running = Program::at(binaries.join("ambient-runner"))
        .env("SESSION_ID", id)
        .env(
            "AMBIENT_CP_TOKEN_URL",
            format!("http://{}/token", local.addresses().token),
        )
        .env("AMBIENT_CP_TOKEN_PUBLIC_KEY", local.public_key())
        .env("AMBIENT_SESSION_KEY_FILE", local.file(id, "session-key"))
        .env("AMBIENT_BOT_TOKEN_FILE", local.file(id, "bot-token"))
        .env("AMBIENT_TOKEN_FILE", folder.join("token"))
        .env("AMBIENT_SPOOL_DIR", folder.join("spool"))
        .env("AMBIENT_GRPC_ENABLED", "true")
        .env("AMBIENT_GRPC_URL", local.addresses().grpc.to_string())
        .env("AMBIENT_AGENT_IO", "lines")
        .args(["--", "cat"])
        .start();
    running.listening("admin").await;
    running
}

async fn sidecar(local: &Local, id: &str, binaries: &Path) -> Running {
    let mut running = Program::at(binaries.join("ambient-sidecar"))
        .arg("--token-file")
        .arg(local.file(id, "bot-token"))
        .arg("--upstream")
        .arg(format!("http://{}", local.addresses().rest))
        .start();
    running.listening("proxy").await;
    running
}
