//! The agent: its command, environment and stdio.

use tokio::process::{ChildStdin, ChildStdout};

pub(crate) mod mask;

/// What the agent's stdio is for (contract section 3, I/O modes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum AgentIo {
    /// Passed through untouched.
    None,
    /// A line in, a line out.
    Lines,
    /// One JSON object a line, as command-line agents speak it.
    StreamJson,
}

/// The agent's stdio as the bridge uses it. Dropping `stdin` closes it.
#[derive(Debug)]
pub(crate) struct AgentPipes {
    /// What the agent reads.
    pub(crate) stdin: ChildStdin,
    /// What the agent writes. At its end once the agent and all who inherited it have ended.
    pub(crate) stdout: ChildStdout,
}
