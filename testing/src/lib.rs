#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "this crate only runs below tests, where a failure is a panic that shows the scene"
)]
//! What tests and benchmarks of all programs share: real binaries, an identity provider, a broken
//! network, load, a Kubernetes control plane.
//!
//! Everything listens on loopback at a port that the system chose, ends when it is dropped, and
//! gives up waiting after [`DEADLINE`].

use std::time::Duration;

pub mod cluster;
pub mod collector;
pub mod disk;
pub mod faults;
pub mod helm;
pub mod idp;
pub mod images;
pub mod installation;
pub mod keypair;
pub mod kube_proxy;
pub mod kwok;
pub mod load;
pub mod local;
pub mod metrics;
pub mod node;
pub mod operator;
pub mod ports;
pub mod processes;
pub mod programs;
pub mod proxy;
pub mod siege;
pub mod table;

/// Longest wait for anything in a test. Long, since a shared machine can be slow; a test that
/// passes never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(120);
