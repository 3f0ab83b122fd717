#![forbid(unsafe_code)]
//! The control plane: token endpoint, session controller and token refresh.
//!
//! ```text
//! sessions/feed → queue → worker → reconcile → backend
//! issuer → endpoint (pull); issuer → refresh → backend (push)
//! ```

pub mod authority;
pub mod backend;
pub mod check;
pub mod cluster;
pub mod controller;
pub mod endpoint;
pub mod issuer;
pub mod keypair;
pub mod keys;
pub mod leader;
pub mod local;
pub mod metrics;
pub mod projects;
pub mod queue;
pub mod reconcile;
pub mod refresh;
pub mod rules;
pub mod serve;
pub mod sessions;
pub mod settings;
pub mod trial;
mod watching;
pub mod worker;
