//! The control plane from outside, over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failure in a test is a panic that shows the scene"
)]

mod chart;
mod check;
mod endpoint;
mod faults;
mod feed;
mod issuers;
mod keys;
mod kubernetes;
mod local;
mod metrics;
mod permissions;
mod process;
mod projects;
mod real_api;
mod reconcile;
mod refresh;
mod rights;
mod rules;
mod scene;
mod serve;
