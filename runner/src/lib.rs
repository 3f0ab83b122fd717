//! Container entrypoint: keeps the API token fresh, supervises the agent, carries its messages.
//!
//! settings → token → refresher =watch=> handover, bridge. The agent is the container's one
//! purpose: the runner starts when it can, and ends with its exit code.
#![deny(unsafe_code)]

mod agent;
mod bridge;
mod token;
