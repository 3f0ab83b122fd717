#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test a failure is a panic that shows the scene"
)]
//! The API server as its callers meet it: the real binary over real sockets.

mod access;
mod durability;
mod keys;
mod listing;
mod projects;
mod server;
mod sessions;
mod settings;
mod telemetry;
mod watching;
