//! The control plane from outside, over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failure in a test is a panic that shows the scene"
)]

mod endpoint;
mod feed;
mod issuers;
mod local;
mod process;
mod real_api;
mod reconcile;
mod refresh;
mod scene;
