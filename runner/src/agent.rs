//! The agent: its command, environment and stdio.

use std::{
    ffi::{OsStr, OsString},
    io,
    path::PathBuf,
    process::{Command, Stdio},
};

use ambient_shared::exit;
use tokio::{
    process::{ChildStderr, ChildStdin, ChildStdout},
    sync::oneshot,
};

use self::{reaper::Reaper, sys::Ended};
use crate::settings;

pub(crate) mod addresses;
pub(crate) mod hook;
pub(crate) mod leftovers;
pub(crate) mod lives;
pub(crate) mod mask;
pub(crate) mod passthrough;
pub(crate) mod reaper;
pub(crate) mod signals;
pub(crate) mod supervisor;
pub(crate) mod sys;

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

/// How the agent is started, each time.
#[derive(Debug)]
pub(crate) struct Agent {
    /// Program and arguments.
    pub(crate) command: Vec<OsString>,
    /// All its variables.
    pub(crate) environment: AgentEnvironment,
    /// Whether there are pipes.
    pub(crate) io: AgentIo,
    /// Whether it gets the terminal that the runner has.
    pub(crate) foreground: bool,
}

/// An agent that runs.
#[derive(Debug)]
pub(crate) struct RunningAgent {
    /// Its process id, and that of its group.
    pub(crate) pid: i32,
    /// Tells how it ended.
    pub(crate) ended: oneshot::Receiver<Ended>,
    /// Its stdio, unless passed through.
    pub(crate) pipes: Option<(AgentPipes, ChildStderr)>,
}

/// Why the agent cannot be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// There is no such program.
    #[error("agent program {} not found (or the interpreter that its first line names)", program.display())]
    NotFound {
        /// As given.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is one, but it does not start.
    #[error("agent program {} cannot be executed", program.display())]
    NotExecutable {
        /// As given.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl StartError {
    fn of(program: PathBuf, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                Self::NotFound { program, source }
            }
            _ => Self::NotExecutable { program, source },
        }
    }

    /// As a shell would end.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => exit::NOT_FOUND,
            Self::NotExecutable { .. } => exit::NOT_EXECUTABLE,
        }
    }
}

impl Agent {
    /// Starts it, in a process group of its own.
    ///
    /// # Errors
    /// [`StartError`] when there is no such program, or it cannot be executed.
    pub(crate) fn start(&self, reaper: &Reaper) -> Result<RunningAgent, StartError> {
        let program = self.command.first().cloned().unwrap_or_default();
        let broken = |source| StartError::of(PathBuf::from(&program), source);
        let mut command = Command::new(&program);
        command.args(self.command.iter().skip(1));
        self.environment.apply(&mut command);
        if self.io != AgentIo::None {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        sys::own_group(&mut command, self.foreground);
        let mut started = reaper.spawn(&mut command).map_err(broken)?;
        let child = &mut started.child;
        let pipes = match (child.stdin.take(), child.stdout.take(), child.stderr.take()) {
            (Some(stdin), Some(stdout), Some(stderr)) => {
                let stdin = ChildStdin::from_std(stdin).map_err(broken)?;
                let stdout = ChildStdout::from_std(stdout).map_err(broken)?;
                let stderr = ChildStderr::from_std(stderr).map_err(broken)?;
                Some((AgentPipes { stdin, stdout }, stderr))
            }
            _ => None,
        };
        Ok(RunningAgent {
            pid: started.pid,
            ended: started.ended,
            pipes,
        })
    }
}

/// Every variable that the agent gets. `Debug` shows names only: keys of model providers are
/// among the values.
#[derive(Clone)]
pub(crate) struct AgentEnvironment(Vec<(OsString, OsString)>);

impl AgentEnvironment {
    /// The runner's own, without its credentials, the `held_back` names, and the prompt: that is
    /// handed over once, however it goes.
    pub(crate) fn new(
        own: impl Iterator<Item = (OsString, OsString)>,
        held_back: &[String],
    ) -> Self {
        let passed_on = own.filter(|(name, _)| {
            !settings::is_own_credential(name)
                && name != "INITIAL_PROMPT"
                && !held_back.iter().any(|held| OsStr::new(held) == name)
        });
        Self(passed_on.collect())
    }

    /// Adds a variable, or replaces it.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.remove(name);
        self.0.push((name.into(), value.into()));
    }

    /// Takes a variable away.
    pub(crate) fn remove(&mut self, name: &str) {
        self.0.retain(|(known, _)| known != name);
    }

    /// Gives a command these variables and no others.
    pub(crate) fn apply(&self, command: &mut Command) {
        command
            .env_clear()
            .envs(self.0.iter().map(|(name, value)| (name, value)));
    }
}

impl std::fmt::Debug for AgentEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_gets_all_but_credentials_and_what_is_held_back() {
        let own = [
            ("PATH", "/bin"),
            ("BOT_TOKEN", "secret"),
            ("AMBIENT_CP_TOKEN_URL", "http://cp"),
            ("AMBIENT_CP_TOKEN_PUBLIC_KEY", "pem"),
            ("AMBIENT_BOT_TOKEN_FILE", "/file"),
            ("INITIAL_PROMPT", "hello"),
            ("MINE", "held back"),
            ("ANTHROPIC_API_KEY", "the agent's own"),
        ];
        let own = own.map(|(name, value)| (name.into(), value.into()));
        let mut environment = AgentEnvironment::new(own.into_iter(), &["MINE".to_owned()]);
        environment.set("AMBIENT_TOKEN_FILE", "/run/token");
        environment.set("PATH", "/usr/bin");

        let shown = format!("{environment:?}");
        assert_eq!(
            shown,
            r#"["ANTHROPIC_API_KEY", "AMBIENT_TOKEN_FILE", "PATH"]"#
        );
    }

    #[test]
    fn a_program_that_does_not_start_gives_the_shells_codes() {
        let code = |source: io::Error| StartError::of("agent".into(), source).exit_code();
        assert_eq!(code(io::ErrorKind::NotFound.into()), 127);
        assert_eq!(code(io::ErrorKind::NotADirectory.into()), 127);
        assert_eq!(code(io::ErrorKind::PermissionDenied.into()), 126);
        assert_eq!(code(io::Error::from_raw_os_error(nix::libc::ENOEXEC)), 126);
    }
}
