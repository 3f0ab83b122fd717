//! What a session's run should be (being written).

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

/// How the runner talks with the agent (contract section 3, I/O modes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentIo {
    /// Stdio is passed through.
    None,
    /// A message is a line.
    Lines,
    /// JSON objects, one a line.
    StreamJson,
}

/// What the environment of all sessions has in common.
#[derive(Debug, Clone, Default)]
pub struct DesiredSettings {
    /// URL of the token endpoint, as sessions reach it.
    pub token_url: String,
    /// Public key of the token endpoint, PEM.
    pub public_key_pem: String,
    /// Base URL of the API server's REST, as sessions reach it.
    pub api_rest_url: String,
    /// `host:port` of the API server's gRPC, as sessions reach it.
    pub api_grpc_url: String,
    /// Whether that speaks TLS.
    pub grpc_tls: bool,
    /// CA certificates for it, as a path in the session.
    pub grpc_ca_file: Option<PathBuf>,
    /// Whether runners exchange messages with the API server.
    pub messages: bool,
    /// The agent of sessions that name none.
    pub default_agent_command: Option<Vec<String>>,
    /// I/O mode of sessions that name none. None: `stream-json` with messages, `none` without.
    pub default_agent_io: Option<AgentIo>,
    /// `LOG_LEVEL` of runners.
    pub runner_log_level: Option<String>,
    /// More variables for all sessions, such as `HTTP_PROXY` and those of existing runner images.
    pub passed_on: BTreeMap<String, String>,
}

/// A text that names no I/O mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no I/O mode; it must be none, lines or stream-json")]
pub struct UnknownAgentIo(String);

impl AgentIo {
    /// The name in annotations and environment.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lines => "lines",
            Self::StreamJson => "stream-json",
        }
    }
}

impl FromStr for AgentIo {
    type Err = UnknownAgentIo;

    fn from_str(name: &str) -> Result<Self, UnknownAgentIo> {
        match name {
            "none" => Ok(Self::None),
            "lines" => Ok(Self::Lines),
            "stream-json" => Ok(Self::StreamJson),
            _ => Err(UnknownAgentIo(name.to_owned())),
        }
    }
}
