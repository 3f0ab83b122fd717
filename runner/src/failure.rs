//! Why the runner ends other than with its agent, and with which exit code.

use std::io;

use ambient_shared::{
    client::ClientError, exit, settings::InvalidSettings, tasks::TaskFailure,
    telemetry::TelemetryError,
};

use crate::{
    agent::{StartError, addresses::NoSidecar},
    bridge::{BridgeError, SpoolError},
    token::refresher::NoToken,
};

/// Why the runner ends without an agent's exit code of its own to end with.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Failure(#[from] Cause);

/// What is behind a [`Failure`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    /// Something that a setting names cannot be used.
    #[error(transparent)]
    Settings(#[from] InvalidSettings),
    /// No token.
    #[error(transparent)]
    Token(#[from] NoToken),
    /// The sidecar is missing.
    #[error(transparent)]
    Sidecar(#[from] NoSidecar),
    /// The agent cannot be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Messages cannot be carried, or were not by the end.
    #[error("the agent's messages cannot be carried")]
    Bridge(#[source] BridgeError),
    /// Messages, or the agent's output, can no longer be carried.
    #[error("the agent's output cannot be carried any further")]
    Stdio(#[source] TaskFailure),
    /// Telemetry cannot be set up.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// A task of the runner broke.
    #[error("a part of the runner failed")]
    Task(#[source] TaskFailure),
}

impl Failure {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match &self.0 {
            Cause::Settings(_) => exit::CONFIG,
            Cause::Token(_) | Cause::Sidecar(_) | Cause::Bridge(_) | Cause::Stdio(_) => {
                exit::UNAVAILABLE
            }
            Cause::Start(error) => error.exit_code(),
            Cause::Telemetry(_) | Cause::Signals(_) | Cause::Task(_) => exit::SOFTWARE,
        }
    }
}

impl Cause {
    /// A file or address that a setting names is at fault, so the setting is.
    pub(crate) fn fault(variable: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        let line = format!("{variable}: {}", exit::report(error));
        Self::Settings(InvalidSettings(line))
    }

    /// Why there is no bridge: a folder that cannot be used is the setting's fault.
    pub(crate) fn of_bridge(error: BridgeError) -> Self {
        match error {
            BridgeError::Spool(error @ SpoolError::Folder { .. }) => {
                Self::fault("AMBIENT_SPOOL_DIR", &error)
            }
            error => Self::Bridge(error),
        }
    }

    /// The setting that a client could not be made with.
    pub(crate) fn of_client(error: &ClientError) -> Self {
        match error {
            ClientError::Certificates { .. } | ClientError::NoCertificate { .. } => {
                Self::fault("AMBIENT_GRPC_CA_CERT_FILE", error)
            }
            ClientError::Address { .. } => Self::fault("AMBIENT_GRPC_URL", error),
            ClientError::Http(_) | ClientError::Tls(_) => Self::fault("TLS", error),
        }
    }
}
