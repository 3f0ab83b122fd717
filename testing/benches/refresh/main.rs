#![forbid(unsafe_code)]
#![allow(
    clippy::expect_used,
    reason = "a measurement that cannot be made is a failure that shows the scene"
)]
//! The control plane with thousands of running sessions: first sync, refresh of all tokens, memory,
//! and what it asks of the Kubernetes API.
//!
//! Real etcd, kube-apiserver and kube-controller-manager, our API server and control plane; kwok
//! plays the node. Beside it in the same run: the same refresh one session at a time with a read and
//! a write each, and what the Kubernetes API alone can do.

use std::{sync::Arc, time::Duration};

use ambient_shared::client::install_crypto_provider;
use ambient_testing::{
    cluster::{Cluster, ClusterOptions},
    installation::Installation,
    kwok::{Kwok, RUN_AND_END},
    table::machine,
};
use clap::Parser;

use crate::{plane::Plane, report::Report, sessions::Sessions};

mod audit;
mod bare;
mod pages;
mod phases;
mod plane;
mod processors;
mod report;
mod sessions;

/// Measures the control plane with many sessions.
#[derive(Debug, Clone, Parser)]
struct Settings {
    /// Sessions that run.
    #[arg(long, default_value_t = 10_000)]
    sessions: usize,
    /// Projects that they are in, so namespaces.
    #[arg(long, default_value_t = 20)]
    projects: usize,
    /// Sessions on a page of the API server's list.
    #[arg(long, default_value_t = 100)]
    page: u32,
    /// Sessions that arrive each second, where the start of new ones is measured.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// How long they arrive.
    #[arg(long, default_value = "20s", value_parser = ambient_shared::settings::parse_duration)]
    arriving: Duration,
    /// How many tokens the ways of comparison write.
    #[arg(long, default_value_t = 1_000)]
    sample: usize,
    /// Etcd does not wait for the disk.
    #[arg(long)]
    no_fsync: bool,
}

/// Controllers that make and keep up objects which nobody here needs.
const IDLE_CONTROLLERS: &str = "--controllers=-endpoints-controller,-endpointslice-controller,-endpointslice-mirroring-controller";

#[tokio::main]
async fn main() {
    install_crypto_provider();
    let settings = Settings::parse();
    println!("machine: {}", machine());
    println!("{settings:?}\n");
    let cluster = Cluster::start(ClusterOptions {
        etcd: vec![format!("--unsafe-no-fsync={}", settings.no_fsync)],
        controller_manager: vec![IDLE_CONTROLLERS.to_owned()],
        ..ClusterOptions::default()
    });
    let kwok = Kwok::start(&cluster, RUN_AND_END);
    let installation = Arc::new(Installation::start(cluster, 1, &[]).await);
    let mut report = Report::new(&installation, kwok.pid());
    let mut sessions = Sessions::new(Arc::clone(&installation), settings.projects).await;
    let mut plane = Plane::new(Arc::clone(&installation), settings.page).await;

    phases::fill(&settings, &mut plane, &mut sessions, &mut report).await;
    phases::first_sync(&mut plane, &sessions, &mut report).await;
    let rate = phases::refresh(&mut plane, &sessions, &mut report).await;
    plane.stop().await;
    // With as many sessions as in the refresh: writes take longer the more there are.
    phases::compare(&settings, &installation, &sessions, rate, &mut report).await;
    phases::refresh_while_sessions_arrive(&settings, &mut plane, &mut sessions, &mut report).await;
    plane.stop().await;
    println!("{report}");
}
