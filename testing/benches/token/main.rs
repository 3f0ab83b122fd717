#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a measurement that cannot be made is a failure that shows the scene"
)]
//! The token endpoint of the real control plane: exchanges a second and their latency, and what good
//! clients wait while others send garbage.
//!
//! In the same run, on the same cores: the machine's bare RSA-4096 decryptions, and the same HTTP
//! library with the same settings that answers a constant.

use std::{net::SocketAddr, time::Duration};

use ambient_testing::table::machine;
use clap::Parser;

mod bare;
mod clients;
mod constant;
mod exchanges;
mod garbage;

/// Measures the token endpoint.
#[derive(Debug, Parser)]
struct Settings {
    /// How long each load runs; below a minute, as proofs are made before it.
    #[arg(long, default_value = "10s", value_parser = ambient_shared::settings::parse_duration)]
    duration: Duration,
    /// Sessions that exchange.
    #[arg(long, default_value_t = 16)]
    sessions: usize,
    /// Slow senders among the garbage.
    #[arg(long, default_value_t = 10_000)]
    slow: usize,
    /// Only one part: exchanges or garbage.
    #[arg(long)]
    only: Option<Part>,
    /// Only serve the constant answer; how this program starts itself.
    #[arg(long, hide = true)]
    constant: bool,
    /// Only send garbage of this kind to `--to`; how this program starts itself.
    #[arg(long, hide = true, requires = "to")]
    garbage: Option<garbage::Kind>,
    #[arg(long, hide = true)]
    to: Option<SocketAddr>,
    #[arg(long, hide = true)]
    from: Option<std::net::IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Exchanges,
    Garbage,
}

#[tokio::main]
async fn main() {
    let settings = Settings::parse();
    if settings.constant {
        constant::serve().await;
    } else if let (Some(kind), Some(to)) = (settings.garbage, settings.to) {
        garbage::send(&settings, kind, to).await;
    } else {
        println!("machine: {}\n", machine());
        if settings.only != Some(Part::Garbage) {
            exchanges::measure(&settings).await;
        }
        if settings.only != Some(Part::Exchanges) {
            garbage::measure(&settings).await;
        }
    }
}
