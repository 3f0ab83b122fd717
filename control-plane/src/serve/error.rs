//! Why the control plane does not start, or ends, and the exit code that says so.

use std::{io, net::SocketAddr};

use ambient_shared::{client::ClientError, exit, tasks::TaskFailure, token::InvalidToken};

use crate::{cluster::ClusterError, endpoint::EndpointError, keypair::KeypairError};

/// Why the control plane does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The Kubernetes API.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The keys.
    #[error(transparent)]
    Keys(#[from] KeypairError),
    /// The token endpoint.
    #[error("the token endpoint cannot start")]
    Endpoint(#[from] EndpointError),
    /// The admin port.
    #[error(
        "cannot serve metrics on {address}; is the port taken? choose another with \
         --ambient-admin-listen"
    )]
    Admin {
        /// As asked for.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Clients of the API server.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The static token.
    #[error("AMBIENT_API_TOKEN cannot be used")]
    Token(#[from] InvalidToken),
    /// A task of the program failed.
    #[error(transparent)]
    Task(#[from] TaskFailure),
}

impl ServeError {
    /// The exit code that says whose fault it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Cluster(_) | Self::Token(_) => exit::CONFIG,
            Self::Keys(error) => error.exit_code(),
            Self::Endpoint(_) | Self::Admin { .. } => exit::UNAVAILABLE,
            Self::Client(_) | Self::Task(_) => exit::SOFTWARE,
        }
    }
}
