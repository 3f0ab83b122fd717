//! What good clients wait while others send garbage.
//!
//! The others are a process of their own, so that good clients are measured by one that has nothing
//! else to do; all share the machine's cores. Rate limits are on.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ambient_shared::{harden, telemetry};
use ambient_testing::{
    load::{self, Plan},
    programs::{Program, Running},
    siege::Siege,
    table::{Table, milliseconds},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::ValueEnum as _;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::sleep;

use crate::{
    Settings,
    clients::{self, Town},
};

/// What others send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Ciphertexts of the right length that no key opens.
    RightLength,
    /// Ciphertexts of another length.
    WrongLength,
    /// No `Authorization` header.
    NoHeader,
    /// Heads that never end.
    Slow,
}

impl Kind {
    fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().replace('-', " "))
            .unwrap_or_default()
    }
}

/// Connections that garbage comes over, each as fast as it is answered.
const CONNECTIONS: usize = 16;

/// Requests of good clients a second: each session asks for less than its share.
const RATE: f64 = 24.0;

/// Different requests of garbage; the server keeps none of them.
const DIFFERENT: usize = 2_000;

/// Good clients are at 127.0.0.1.
const ELSEWHERE: [u8; 4] = [127, 0, 0, 2];
const BESIDE: [u8; 4] = [127, 0, 0, 1];

/// How long it takes until an address has its whole share of failures again: 200 at 20 a second.
const SHARE_BACK: Duration = Duration::from_secs(11);

pub(crate) async fn measure(settings: &Settings) {
    let mut table = Table::new(&[
        "others send",
        "from",
        "good clients",
        "p50",
        "p99",
        "longest",
        "not 200",
    ]);
    let town = Town::start(settings.sessions, "on").await;
    let requests = known(&town).await;
    let calm = ["nothing".to_owned(), String::new()];
    good(&mut table, settings, &town, requests, calm).await;
    for kind in [
        Kind::RightLength,
        Kind::WrongLength,
        Kind::NoHeader,
        Kind::Slow,
    ] {
        for (from, name) in [(ELSEWHERE, "another address"), (BESIDE, "the same address")] {
            // What others have used up of an address's share has come back by then.
            sleep(SHARE_BACK).await;
            let requests = known(&town).await;
            let others = start(settings, kind, town.address(), from.into()).await;
            let name = [kind.name(), name.to_owned()];
            good(&mut table, settings, &town, requests, name).await;
            drop(others);
        }
    }
    println!("{table}");
}

/// A request for each session, whose ciphertext the control plane knows.
async fn known(town: &Town) -> Arc<Vec<Vec<u8>>> {
    let requests = Arc::new(town.one_each("connection: close\r\n"));
    let outcome = load::run(Plan {
        address: town.address(),
        from: None,
        requests: Arc::clone(&requests),
        again: false,
        connections: 1,
        rate: None,
        duration: Duration::from_secs(30),
    });
    let outcome = outcome.await;
    assert!(outcome.all_ok(), "{outcome:?}");
    requests
}

/// Good clients, each request over a connection of its own.
async fn good(
    table: &mut Table,
    settings: &Settings,
    town: &Town,
    requests: Arc<Vec<Vec<u8>>>,
    name: [String; 2],
) {
    let mut outcome = load::run(Plan {
        address: town.address(),
        from: None,
        requests,
        again: true,
        connections: 8,
        rate: Some(RATE),
        duration: settings.duration * 2,
    })
    .await;
    let other: u64 = outcome
        .statuses
        .iter()
        .filter(|(status, _)| **status != 200)
        .map(|(_, count)| count)
        .sum();
    let [others, from] = name;
    table.row(&[
        others,
        from,
        format!("{:.0}/s", outcome.rate()),
        milliseconds(outcome.percentile(0.5)),
        milliseconds(outcome.percentile(0.99)),
        milliseconds(outcome.percentile(1.0)),
        (other + outcome.broken).to_string(),
    ]);
}

/// Starts who sends garbage, and waits until it does.
async fn start(settings: &Settings, kind: Kind, to: SocketAddr, from: IpAddr) -> Running {
    let exe = std::env::current_exe().expect("a program knows its own path");
    let kind = kind.to_possible_value().expect("a kind has a name");
    let mut sender = Program::at(exe)
        .args(["--garbage", kind.get_name()])
        .args(["--to".to_owned(), to.to_string()])
        .args(["--from".to_owned(), from.to_string()])
        .args(["--slow".to_owned(), settings.slow.to_string()])
        .start();
    let sends = |line: &serde_json::Value| line["message"] == "sending";
    sender.log_line("that it sends", sends).await;
    sender
}

/// Sends garbage for ever.
pub(crate) async fn send(settings: &Settings, kind: Kind, to: SocketAddr) {
    telemetry::init_logs(telemetry::LogFormat::Json, "info").expect("logs");
    harden::raise_open_files();
    let from = settings.from.unwrap_or(IpAddr::from(BESIDE));
    let mut random = StdRng::seed_from_u64(1);
    let mut bearer = |length| {
        let bytes: Vec<u8> = (0..length).map(|_| random.random()).collect();
        STANDARD.encode(bytes)
    };
    let requests: Vec<_> = match kind {
        Kind::RightLength => (0..DIFFERENT)
            .map(|_| clients::request(&bearer(512), "v1 0 none", ""))
            .collect(),
        Kind::WrongLength => (0..DIFFERENT)
            .map(|_| clients::request(&bearer(256), "v1 0 none", ""))
            .collect(),
        Kind::NoHeader => vec![b"GET /token HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()],
        Kind::Slow => {
            let siege = Siege::lay(to, from, settings.slow);
            siege.until_opened(settings.slow).await;
            tracing::info!("sending");
            return std::future::pending().await;
        }
    };
    tracing::info!("sending");
    load::run(Plan {
        address: to,
        from: Some(from),
        requests: Arc::new(requests),
        again: true,
        connections: CONNECTIONS,
        rate: None,
        duration: Duration::from_hours(1),
    })
    .await;
}
