//! The command that is run when the agent's token has changed.

use std::{
    io,
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use ambient_shared::exit::SIGNAL_BASE;
use tokio::time::timeout;

use super::{AgentEnvironment, reaper::Reaper, sys, sys::Ended};

/// Longest run: the next token's command waits for this one.
const LIMIT: Duration = Duration::from_secs(30);

/// A program of the operator, run with the agent's environment. Its output goes to the runner's
/// stderr, so that it never gets among the agent's.
#[derive(Debug)]
pub(crate) struct Hook {
    program: PathBuf,
    environment: AgentEnvironment,
    reaper: Reaper,
}

/// Why a hook did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    /// It could not be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It ended with a code other than 0, or by a signal (128 and the signal's number).
    #[error("{} ended with {code}", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// As a shell would say.
        code: i32,
    },
    /// It ran too long and was killed.
    #[error("{} was killed after {}", program.display(), humantime::format_duration(LIMIT))]
    TooLong {
        /// The program.
        program: PathBuf,
    },
}

impl Hook {
    /// Nothing is run yet.
    pub(crate) fn new(program: PathBuf, environment: AgentEnvironment, reaper: Reaper) -> Self {
        Self {
            program,
            environment,
            reaper,
        }
    }

    /// Runs the program and waits for its end, at most [`LIMIT`].
    ///
    /// # Errors
    /// When it cannot be started, fails, or takes too long.
    pub(crate) async fn run(&self) -> Result<(), HookError> {
        let program = self.program.clone();
        let started = stderr().and_then(|stderr| {
            let mut command = Command::new(&program);
            self.environment.apply(&mut command);
            sys::own_group(&mut command, false);
            command.stdin(Stdio::null()).stdout(stderr);
            self.reaper.spawn(&mut command)
        });
        let mut started = match started {
            Ok(started) => started,
            Err(source) => return Err(HookError::Start { program, source }),
        };
        match timeout(LIMIT, &mut started.ended).await {
            Ok(Ok(Ended::Exited(0))) => Ok(()),
            Ok(Ok(Ended::Exited(code))) => Err(HookError::Failed {
                program,
                code: code.into(),
            }),
            Ok(Ok(Ended::Signalled(signal))) => Err(HookError::Failed {
                program,
                code: i32::from(SIGNAL_BASE) + signal,
            }),
            Ok(Err(_)) | Err(_) => {
                let _ = sys::signal_group(started.pid, nix::libc::SIGKILL);
                Err(HookError::TooLong { program })
            }
        }
    }
}

/// The runner's stderr once more, for a child's stdout.
fn stderr() -> io::Result<Stdio> {
    let stderr = io::stderr().as_fd().try_clone_to_owned()?;
    Ok(Stdio::from(stderr))
}
