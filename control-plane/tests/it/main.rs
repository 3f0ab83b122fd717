//! The control plane from outside, over real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failure in a test is a panic that shows the scene"
)]

mod endpoint;
mod issuers;
