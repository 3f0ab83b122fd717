#![forbid(unsafe_code)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failure in a test is a panic that shows the scene"
)]
//! The whole system: real binaries, real sockets, real processes, as a person meets it.

mod agent;
mod cluster;
mod demo;
mod endpoint;
mod faults;
mod kube_proxy;
mod rest;
mod run;
mod secrets;
mod tokens;
