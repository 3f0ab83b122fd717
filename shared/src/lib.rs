#![forbid(unsafe_code)]
//! What two or more of the Ambient programs must agree on.
//!
//! Wire formats follow `docs/contract.md`. Nothing here knows which program uses it, and nothing
//! here reads the environment: settings arrive as arguments.

pub mod admin;
pub mod api;
pub mod bearer;
pub mod client;
pub mod clock;
pub mod exchange;
pub mod exit;
pub mod harden;
pub mod phase;
pub mod proof;
pub mod proto;
pub mod resolve;
pub mod rest;
pub mod retry;
pub mod session;
pub mod settings;
pub mod swap;
pub mod tasks;
pub mod telemetry;
pub mod token;
