//! Why local mode does not start, or ends, and the exit code that says so.

use std::{io, net::SocketAddr};

use ambient_api_server::StartError;
use ambient_shared::{client::ClientError, exit, tasks::TaskFailure, token::InvalidToken};

use super::{conversation::ConversationError, folder::DataDirError};
use crate::{
    backend::process::{MissingProgram, OpenError},
    endpoint::EndpointError,
    keypair::KeypairError,
};

/// Why local mode does not start, or ends.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The data folder.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A program of ours.
    #[error(transparent)]
    Programs(#[from] MissingProgram),
    /// The keys.
    #[error(transparent)]
    Keys(#[from] KeypairError),
    /// The API server.
    #[error(transparent)]
    Server(#[from] StartError),
    /// The token endpoint.
    #[error("the token endpoint cannot start")]
    Endpoint(#[from] EndpointError),
    /// An address that running sessions know is taken.
    #[error("{address}, which running sessions know, is in use; end what uses it")]
    AddressTaken {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Sessions' folders.
    #[error(transparent)]
    Backend(#[from] OpenError),
    /// Clients of our own API server.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// An address makes no URL.
    #[error("the API server's address makes no URL")]
    Url(#[source] url::ParseError),
    /// The static token.
    #[error("AMBIENT_API_TOKEN cannot be used")]
    Token(#[from] InvalidToken),
    /// A task of the program failed.
    #[error(transparent)]
    Task(#[from] TaskFailure),
    /// The conversation of `local run` broke off.
    #[error(transparent)]
    Conversation(#[from] ConversationError),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
}

impl LocalError {
    /// The exit code that says whose fault it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::DataDir(DataDirError::Malformed { .. })
            | Self::Server(StartError::Settings(_))
            | Self::Token(_)
            | Self::Programs(_) => exit::CONFIG,
            Self::Keys(error) => error.exit_code(),
            Self::DataDir(DataDirError::InUse(_))
            | Self::Server(_)
            | Self::Endpoint(_)
            | Self::AddressTaken { .. } => exit::UNAVAILABLE,
            Self::DataDir(DataDirError::File { .. })
            | Self::Backend(_)
            | Self::Client(_)
            | Self::Url(_)
            | Self::Task(_)
            | Self::Conversation(_)
            | Self::Signals(_) => exit::SOFTWARE,
        }
    }
}
