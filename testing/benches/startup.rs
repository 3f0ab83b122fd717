#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a measurement that cannot be made is a failure that shows the scene"
)]
//! From the start of the runner to the token in the agent's hand: the token file is there.
//!
//! Against the real control plane on loopback, with a proof, as in a session.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ambient_shared::phase::Phase;
use ambient_testing::{
    load::percentile,
    local::{Local, NewSession, Setup},
    programs::{Program, binary},
    table::{Table, machine, milliseconds},
};
use clap::Parser;

/// How exactly the appearance of the file is seen; looking more often would cost the runner its
/// time.
const POLL: Duration = Duration::from_micros(200);

/// Measures runner start to token in hand.
#[derive(Debug, Parser)]
struct Settings {
    /// Starts of each binary.
    #[arg(long, default_value_t = 200)]
    runs: usize,
    /// Folder with a static `ambient-runner`, to measure that too.
    #[arg(long)]
    static_dir: Option<PathBuf>,
}

#[tokio::main]
async fn main() {
    let settings = Settings::parse();
    println!("machine: {}\n", machine());
    let local = Setup::new(&["--token-ttl", "15m"])
        .env("CP_RATE_LIMITS", "off")
        .start()
        .await;
    let session = NewSession::command(&["sleep", "3600"]).io("none");
    let id = local.create(session).await;
    local.phase(&id, Phase::Running).await;

    let mut table = Table::new(&["runner", "runs", "p50", "p90", "p99", "longest"]);
    let mut binaries = vec![("release", binary("ambient-runner"))];
    if let Some(folder) = &settings.static_dir {
        binaries.push(("static, as in images", folder.join("ambient-runner")));
    }
    for (name, path) in binaries {
        let mut times = Vec::new();
        // The first one warms the page cache.
        for run in 0..=settings.runs {
            let time = once(&local, &id, &path).await;
            if run > 0 {
                times.push(time);
            }
        }
        let mut cells = vec![name.to_owned(), settings.runs.to_string()];
        let parts = [0.5, 0.9, 0.99, 1.0];
        cells.extend(parts.map(|part| milliseconds(percentile(&mut times, part))));
        table.row(&cells);
    }
    println!("{table}");
}

async fn once(local: &Local, id: &str, runner: &Path) -> Duration {
    let folder = tempfile::tempdir().expect("a folder");
    let token = folder.path().join("token");
    let program = Program::at(runner)
        .env("SESSION_ID", id)
        .env(
            "AMBIENT_CP_TOKEN_URL",
            format!("http://{}/token", local.addresses().token),
        )
        .env("AMBIENT_CP_TOKEN_PUBLIC_KEY", local.public_key())
        .env("AMBIENT_SESSION_KEY_FILE", local.file(id, "session-key"))
        .env("AMBIENT_BOT_TOKEN_FILE", folder.path().join("none"))
        .env("AMBIENT_TOKEN_FILE", &token)
        .env("AMBIENT_SPOOL_DIR", folder.path().join("spool"))
        .args(["--", "sleep", "600"]);
    let begin = Instant::now();
    let mut running = program.start();
    while !token.exists() {
        assert!(
            begin.elapsed() < Duration::from_secs(10),
            "no token after 10 s: {:#?}",
            running.log()
        );
        pause();
    }
    let time = begin.elapsed();
    running.signal(nix::sys::signal::Signal::SIGTERM);
    running.wait().await;
    time
}

#[expect(
    clippy::disallowed_methods,
    reason = "tokio's timer is coarser than what is measured, and nothing else runs here"
)]
fn pause() {
    std::thread::sleep(POLL);
}
