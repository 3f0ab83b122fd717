#![forbid(unsafe_code)]
//! The sidecar as its users see it: the real binary, real files, real servers.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure in a test is a panic that shows the scene"
)]

mod endpoint;
mod fetch;
mod grpc;
mod life;
mod mounts;
mod proxy;
mod scene;
mod streams;
mod tls;
mod tokens;
mod upstream;
