//! Starts the real runner, with real processes as agents and real sockets as servers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed test is a panic that shows the scene"
)]

mod messages;
mod output;
mod scene;
mod settings;
mod supervision;
mod tls;
mod token;
