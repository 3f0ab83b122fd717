//! Session phases (contract section 5).

use std::{fmt, str::FromStr};

/// Where a session stands. The order is that of a life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Waits to be provisioned; so does a session without a phase.
    Pending,
    /// Its pod or process is being made.
    Creating,
    /// Its agent runs.
    Running,
    /// Asked to stop; not ended yet.
    Stopping,
    /// Ended because it was asked to.
    Stopped,
    /// Ended by itself with exit code 0.
    Completed,
    /// Ended any other way; the conditions say how.
    Failed,
}

/// A text that names no phase.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a session phase")]
pub struct UnknownPhase(String);

impl Phase {
    /// All phases, for help texts and metrics.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Creating,
        Self::Running,
        Self::Stopping,
        Self::Stopped,
        Self::Completed,
        Self::Failed,
    ];

    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Creating => "Creating",
            Self::Running => "Running",
            Self::Stopping => "Stopping",
            Self::Stopped => "Stopped",
            Self::Completed => "Completed",
            Self::Failed => "Failed",
        }
    }

    /// Left only by a start.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Stopped | Self::Completed | Self::Failed)
    }

    /// May have tokens: whatever has not ended.
    pub fn is_active(self) -> bool {
        !self.is_terminal()
    }

    /// The phase of a session as sent: none and empty both mean that it waits to be provisioned.
    ///
    /// # Errors
    /// When the text names no phase.
    pub fn of(phase: Option<&str>) -> Result<Self, UnknownPhase> {
        match phase {
            None | Some("") => Ok(Self::Pending),
            Some(name) => name.parse(),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|phase| phase.as_str() == name)
            .ok_or_else(|| UnknownPhase(name.to_owned()))
    }
}
