//! Where sessions run: what the controller asks of Kubernetes or of local processes.
//!
//! The controller knows sessions, phases and tokens; a backend knows pods or processes. Nothing
//! here blocks: what must be looked at often ([`Backend::run_state`], [`Backend::token_times`]) is
//! answered from what the backend has already seen, and every change of it is told to the
//! [`Observer`].

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ambient_shared::{proof::SessionKey, session::SessionId, token::Token};
use futures_util::future::BoxFuture;

use crate::keypair::id::KeyId;

pub mod kubernetes;
pub mod process;

/// Variables that decide what our own programs load, whom they trust and through whom they speak:
/// only the values of the machine or image count, and where it has none there is none.
pub(crate) fn is_machine_owned(name: &str) -> bool {
    matches!(name, "PATH" | "HOME" | "SSL_CERT_FILE" | "SSL_CERT_DIR")
        || name.starts_with("LD_")
        || ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"]
            .iter()
            .any(|proxy| name.eq_ignore_ascii_case(proxy))
}

/// Told each session whose run state or token Secret changed. Must not block.
pub type Observer = Arc<dyn Fn(&SessionId) + Send + Sync>;

/// How a session's run is started: everything that follows from the session and the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredRun {
    /// The session.
    pub id: SessionId,
    /// How often it was started before: 0 for its first run.
    pub generation: u32,
    /// The session's name, for people.
    pub name: String,
    /// The project's id as the API server has it; empty when the session is of none.
    pub project: String,
    /// What is started.
    pub agent: Agent,
    /// The key that the runner is given to encrypt for.
    pub keypair: KeyId,
    /// Environment of the runner (contract section 3). Holds no secret.
    pub environment: BTreeMap<String, String>,
    /// What the session asks for in place of the usual resources.
    pub resources: ResourceOverrides,
}

/// What a run starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    /// Our runner starts this.
    Command {
        /// The command and its arguments; never empty.
        command: Vec<String>,
        /// The image that has it; none: the operator's `RUNNER_IMAGE`.
        image: Option<String>,
    },
    /// `RUNNER_IMAGE` as it is: an existing runner image, which brings runner and agent.
    RunnerImage,
}

/// A session's `resource_overrides`: Kubernetes quantities, checked, within the operator's limits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResourceOverrides {
    /// Requests and limits of the agent's container, by resource (`cpu`, `memory`).
    pub requests: BTreeMap<String, String>,
    /// As `requests`.
    pub limits: BTreeMap<String, String>,
}

/// What a session's token Secret holds.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Data key `api-token`, mounted as `bot-token`.
    pub token: Token,
    /// Data key and file `session-key`.
    pub session_key: SessionKey,
    /// The root that this key was made from.
    pub root: KeyId,
    /// The generation of the run that they are for.
    pub generation: u32,
}

/// A session's run as the backend last saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunState {
    /// The generation it was started with. A run of an older generation than the session's is
    /// never taken for the session's run.
    pub generation: u32,
    /// How far it is.
    pub status: RunStatus,
    /// The namespace that it is in; none where there are no namespaces.
    pub namespace: Option<String>,
    /// The key that its runner was given to encrypt for; none when that is not known.
    pub keypair: Option<KeyId>,
}

impl RunState {
    /// Whether its agent runs, or may yet.
    pub fn is_live(&self) -> bool {
        match self.status {
            RunStatus::Starting { .. } | RunStatus::Running { .. } => true,
            RunStatus::Unknown
            | RunStatus::Doomed(_)
            | RunStatus::Ending(_)
            | RunStatus::Ended { .. } => false,
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunStatus {
    /// There is, or was, something of it that cannot be read now; the generation is not known
    /// either. Says nothing: neither that it lives nor that it ended.
    Unknown,
    /// Being made; the agent does not run yet.
    Starting {
        /// What it waits for, when that is known.
        waits_for: Option<Reason>,
    },
    /// It will never start, and is to be ended.
    Doomed(Reason),
    /// The agent runs.
    Running {
        /// When it was started.
        since: SystemTime,
        /// Why it is not ready, if it is not.
        not_ready: Option<Reason>,
    },
    /// It was told to end, by whomever; the agent may run until it has. Is never taken for a run
    /// that was just asked for.
    Ending(Reason),
    /// It has ended, and nothing of it runs any more.
    Ended {
        /// When.
        at: SystemTime,
        /// How.
        end: RunEnd,
    },
}

/// Why something is as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// One word in CamelCase, such as `ImagePullBackOff`: the reason of the session's condition.
    pub reason: String,
    /// For people.
    pub message: String,
}

impl Reason {
    /// A reason with its message.
    pub fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            message: message.into(),
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunEnd {
    /// The runner ended with this exit code, which is the agent's own.
    Exited {
        /// 0 is success.
        code: u8,
        /// The runner's last words, when it left any.
        message: Option<String>,
    },
    /// It was ended from outside: `OOMKilled`, `Evicted`, `DeadlineExceeded`, `NodeLost`,
    /// `PodDeleted`.
    Killed(Reason),
    /// The runner itself was killed, or vanished without a trace (condition `RunnerLost`).
    Lost {
        /// What is known of it, for people.
        message: String,
    },
}

/// What is known of a session's Secret without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenTimes {
    /// When it was issued, or else written.
    pub issued_at: SystemTime,
    /// When it expires; none when nobody said.
    pub expires_at: Option<SystemTime>,
    /// The root of the session's key beside it; none when that is not known.
    pub root: Option<KeyId>,
}

impl TokenTimes {
    /// How much of its life it has used, from 0 to 1; none when it does not expire.
    pub fn life_used(&self, now: SystemTime) -> Option<f64> {
        let age = now.duration_since(self.issued_at).unwrap_or_default();
        let life = self.expires_at?.duration_since(self.issued_at);
        let life = life.unwrap_or_default();
        Some(if age < life {
            age.as_secs_f64() / life.as_secs_f64()
        } else {
            1.0
        })
    }
}

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A run of an older generation has not ended yet; ask again.
    #[error("the session's previous run is still ending")]
    StillEnding,
    /// The session cannot run as described; trying again cannot help.
    #[error("the session cannot run: {message}")]
    Impossible {
        /// Condition reason in CamelCase, such as `AgentCommandMissing`.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Refused for now, for a reason that people can mend, such as a quota; ask again later.
    #[error("{message}")]
    Refused {
        /// Condition reason in CamelCase, such as `QuotaExceeded`.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The backend has nothing of this session.
    #[error("nothing of this session is here")]
    NotFound,
    /// Something below failed; trying again may help.
    #[error("cannot {action}")]
    Failed {
        /// What was tried, such as `write the token of a session`.
        action: &'static str,
        /// What went wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A place where sessions run. All methods may be called again after a failure or a restart:
/// what is done already is left as it is.
pub trait Backend: Send + Sync + 'static {
    /// Longest time from [`Backend::write_token`] to the token being seen in the session.
    fn lag(&self) -> Duration;

    /// Makes the session's Secret and starts its run, or finds it started. Returns when the run
    /// is recorded so that a restart would find it, not when the agent runs.
    ///
    /// Errors: `StillEnding` while an older generation's run ends (which this call asks for).
    fn start<'a>(
        &'a self,
        run: &'a DesiredRun,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>>;

    /// Asks the session's run to end, if there is one. Its end shows in [`Backend::run_state`].
    fn stop<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>>;

    /// Ends what runs and removes all that the backend has of the session.
    ///
    /// Errors: `StillEnding` until what runs has ended.
    fn remove<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>>;

    /// Nobody needs to know any more how the run of a deleted session ended. For a backend that
    /// remembers that when nothing else is left of the session.
    fn forget_end(&self, _: &SessionId) {}

    /// The session's run, as last seen.
    fn run_state(&self, id: &SessionId) -> Option<RunState>;

    /// Whether there is certainly no run of this generation of the session, of which
    /// [`Backend::run_state`] says nothing: what has not been seen may have been made by another
    /// replica just now.
    fn is_gone<'a>(
        &'a self,
        id: &'a SessionId,
        generation: u32,
    ) -> BoxFuture<'a, Result<bool, BackendError>> {
        let run = self.run_state(id);
        let is_gone = run.is_none_or(|run| run.generation != generation);
        Box::pin(std::future::ready(Ok(is_gone)))
    }

    /// The token in the session's Secret, without reading the Secret. None when there is no
    /// Secret.
    fn token_times(&self, id: &SessionId) -> Option<TokenTimes>;

    /// Replaces the token in the session's Secret, with one write.
    fn write_token<'a>(
        &'a self,
        id: &'a SessionId,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>>;

    /// Whether all that there is has been seen, so that what is not in [`Backend::sessions`] is not
    /// there.
    fn sees_all(&self) -> bool;

    /// All sessions that the backend has anything of; what the API server does not know of these
    /// is an orphan.
    fn sessions(&self) -> Vec<SessionId>;
}
