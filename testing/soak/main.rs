#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a soak that cannot go on is a failure that shows the scene"
)]
//! Sessions that come and go while everything around the control plane fails, one thing after the
//! other: does each reach its right phase, does any ever hold an expired token, is anything left?
//!
//! Real etcd, kube-apiserver and kube-controller-manager, our API server and several replicas of the
//! control plane, an identity provider; kwok plays the node, and a task for each session its runner.
//! Which faults come when follows from the seed alone.

use std::{process::ExitCode, sync::Arc, time::Duration};

use ambient_shared::client::install_crypto_provider;
use ambient_testing::table::machine;
use clap::Parser;
use tokio::{task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    book::Book, faults::Faults, findings::Findings, leaders::Leaders, levels::Levels,
    sessions::Sessions, system::System, tokens::Tokens, weather::Weather,
};

mod book;
mod checks;
mod faults;
mod findings;
mod kubelet;
mod leaders;
mod levels;
mod lives;
mod plan;
mod runner;
mod sessions;
mod system;
mod tokens;
mod weather;

/// Runs sessions under faults.
#[derive(Debug, Clone, Parser)]
struct Settings {
    /// How long faults come, in minutes.
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// What decides which faults come when; printed, so that a run can be had again [default: drawn].
    #[arg(long)]
    seed: Option<u64>,
    /// Sessions at a time.
    #[arg(long, default_value_t = 200)]
    sessions: usize,
    /// Replicas of the control plane.
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// Without faults.
    #[arg(long)]
    calm: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    install_crypto_provider();
    let settings = Settings::parse();
    let seed = settings.seed.unwrap_or_else(rand::random);
    println!("machine: {}", machine());
    println!(
        "again: --minutes {} --seed {seed} --sessions {} --replicas {}\n",
        settings.minutes, settings.sessions, settings.replicas
    );
    let length = Duration::from_mins(settings.minutes);
    let planned = if settings.calm {
        Vec::new()
    } else {
        plan::plan(seed, length, settings.replicas)
    };

    let findings = Findings::new();
    let system = System::start(settings.replicas).await;
    let (operator, direct) = (system.operator(), system.direct());
    let quit = CancellationToken::new();
    let mut watching = JoinSet::new();
    watching.spawn(kubelet::end_pods(direct.clone(), quit.clone()));
    let book = Book::open(operator.clone(), quit.clone(), &mut watching);
    let tokens = Tokens::open(direct.clone(), &findings, quit.clone(), &mut watching);
    let levels = Levels::open(system.pids(), quit.clone(), &mut watching);
    let weather = Weather::new();
    let leaders = Leaders::open(
        &system,
        weather.clone(),
        findings.clone(),
        quit.clone(),
        &mut watching,
    );
    let sessions = Sessions {
        operator: operator.clone(),
        direct: direct.clone(),
        book: book.clone(),
        tokens: Arc::clone(&tokens),
        findings: findings.clone(),
        weather: weather.clone(),
        endpoints: system.token_urls(),
        seed,
    };
    sessions.make_projects().await;

    let begin = Instant::now();
    let mut faults = Faults::new(
        system,
        findings.clone(),
        weather,
        Arc::clone(&leaders),
        begin,
    );
    let end = begin + length;
    let (account, ()) = tokio::join!(
        sessions.come_and_go(settings.sessions, end),
        faults.cause(planned, end)
    );
    checks::nothing_is_left(&operator, &direct, &findings).await;
    quit.cancel();
    watching.join_all().await;
    faults.last_look().await;
    levels.judge(&findings, settings.replicas, length >= plan::FULL);
    tokens.judge();

    println!(
        "\n{account}\n{}\n{}\n{levels}\n{}",
        faults.account(),
        leaders.account(),
        tokens.account()
    );
    println!("{findings}");
    if !findings.is_empty() {
        println!("kept: {}", faults.keep().display());
    }
    faults.end().await;
    if findings.is_empty() {
        println!("all is well; seed {seed}");
        ExitCode::SUCCESS
    } else {
        println!("failed; seed {seed}");
        ExitCode::FAILURE
    }
}
