//! Carries messages between the session and the agent: order, exactly once, back-pressure.
//!
//! ```text
//! server ═stream═▶ feed ─inbox─▶ hand-over ─▶ agent's stdin
//! server ◀─push── pusher ◀─spool─ listener ◀─ agent's stdout
//! ```
//!
//! The first thing in the spool is a start message. The `seq` that the server gives it says how far
//! the stream must be replayed to know everything that earlier runners handed over, for the stream
//! itself does not mark where the replay ends.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};

use ambient_shared::{api::Api, clock::Clock, session::SessionId};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

use self::{
    inbound::{Beginning, Inbound},
    outbound::{Listener, push::Pusher},
    remote::Remote,
    spool::{Outgoing, Spool},
};
use crate::{
    agent::{AgentIo, AgentPipes, mask::Masker},
    token::refresher::TokenHandle,
};

pub(crate) mod format;
mod inbound;
mod outbound;
mod remote;
mod spool;

pub(crate) use self::spool::SpoolError;

/// How long the agent's output may stay open once the agent has ended, without anything coming.
const OUTPUT_LIMIT: Duration = Duration::from_secs(28);

/// After the agent's end, messages are pushed for as long as one gets through in this time: an API
/// server that restarts, even on another machine, is back by then.
const STALLED_AFTER: Duration = Duration::from_mins(5);

/// How long they are pushed when there is hurry: 60 s are what a pod has from SIGTERM to SIGKILL,
/// and the agent's grace period comes first.
const HURRY_LIMIT: Duration = Duration::from_secs(28);

/// Whose messages are carried, and how.
#[derive(Debug, Clone)]
pub(crate) struct BridgeSettings {
    /// The session.
    pub(crate) session: SessionId,
    /// What the agent's lines look like.
    pub(crate) io: AgentIo,
    /// After how many turns the agent's stdin is closed; 0: never.
    pub(crate) turns: u32,
    /// Where messages wait for the server.
    pub(crate) spool_dir: PathBuf,
    /// Handed over when the session has no user message.
    pub(crate) initial_prompt: Option<String>,
    /// Put before the first user message.
    pub(crate) preamble: Option<String>,
    /// Whether the session was started before: then neither of the two is used.
    pub(crate) is_resume: bool,
    /// Where this runner began: the `seq` of its first start message, once there is one. Shared by
    /// the bridges of all its agents.
    pub(crate) runner_start: Arc<OnceLock<i64>>,
}

/// Why messages are carried no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BridgeError {
    /// Messages cannot be kept.
    #[error("messages cannot be kept until they are pushed")]
    Spool(#[from] SpoolError),
    /// The server refuses this session, and did so for a while.
    #[error(
        "the API server refuses to {call} messages of this session; does it exist, and may its \
         token do so?"
    )]
    Denied {
        /// `push` or `watch`.
        call: &'static str,
        /// The server's answer.
        source: Box<tonic::Status>,
    },
    /// The agent has ended, and so has the time to push what it said.
    #[error("{messages} messages ({bytes} bytes) could not be pushed and stay in the spool")]
    Unsent {
        /// How many.
        messages: u64,
        /// How long they are together.
        bytes: u64,
    },
}

/// Carries the messages of one agent.
pub(crate) struct Bridge {
    settings: BridgeSettings,
    remote: Remote,
    masker: Masker,
    clock: Clock,
    spool: Arc<Spool>,
}

/// Whether a spool can be kept in this folder.
///
/// # Errors
/// When it cannot be used.
pub(crate) fn check_spool(folder: &Path, session: &SessionId) -> Result<(), BridgeError> {
    Ok(Spool::check(folder, session)?)
}

impl Bridge {
    /// Opens the spool; nothing is sent yet.
    ///
    /// # Errors
    /// When the spool's folder cannot be used.
    pub(crate) fn new(
        settings: BridgeSettings,
        api: Api,
        tokens: TokenHandle,
        masker: Masker,
        clock: Clock,
    ) -> Result<Self, BridgeError> {
        let session = settings.session.clone();
        let spool = Spool::open(&settings.spool_dir, &session, spool::CAPACITY)?;
        Ok(Self {
            remote: Remote {
                api,
                session,
                tokens,
            },
            spool: Arc::new(spool),
            settings,
            masker,
            clock,
        })
    }

    /// Carries messages until the agent's stdout has ended and everything is pushed.
    ///
    /// `agent_over` says that the agent has ended, or is being ended: nothing more is handed over,
    /// and its output is read for at most 28 s in which nothing comes. After that, messages are
    /// pushed until none gets through for 5 minutes; once there is `hurry`, for 28 s. What was not
    /// pushed by then stays in the spool.
    ///
    /// With the I/O mode `none` nothing is handed over, and the output is read and dropped.
    ///
    /// # Errors
    /// When the server refuses this session. The agent should be ended then: its output goes
    /// nowhere. [`BridgeError::Unsent`] comes only after the agent's end.
    pub(crate) async fn run(
        self,
        pipes: AgentPipes,
        agent_over: CancellationToken,
        hurry: CancellationToken,
    ) -> Result<(), BridgeError> {
        self.carry(pipes.stdin, pipes.stdout, agent_over, hurry)
            .await
    }

    async fn carry<W, R>(
        self,
        stdin: W,
        stdout: R,
        agent_over: CancellationToken,
        hurry: CancellationToken,
    ) -> Result<(), BridgeError>
    where
        W: AsyncWrite + Unpin,
        R: AsyncRead + Unpin,
    {
        let spool = self.spool;
        let settings = self.settings;
        let no_more_input = agent_over.child_token();
        let all_said = CancellationToken::new();
        let turns_over = CancellationToken::new();
        let start = Outgoing::new(format::runner_started(settings.is_resume));
        let (started, start_seen) = watch::channel(None);

        let pusher = Pusher {
            remote: self.remote.clone(),
            spool: Arc::clone(&spool),
            clock: self.clock,
            start: start.id,
            started,
        };
        let listener = Listener {
            stdout,
            agent_over: agent_over.clone(),
            io: settings.io,
            masker: self.masker,
            spool: Arc::clone(&spool),
            turns: settings.turns,
            turns_over: turns_over.clone(),
        };
        let inbound = Inbound {
            stdin,
            io: settings.io,
            beginning: Beginning {
                prompt: settings.initial_prompt,
                preamble: settings.preamble,
                is_resume: settings.is_resume,
            },
            runner_start: settings.runner_start,
            remote: self.remote,
            spool: Arc::clone(&spool),
            started: start_seen,
            turns_over,
            stop: no_more_input.clone(),
        };

        let listen = async {
            spool.append(start).await;
            listener.run().await;
            all_said.cancel();
            no_more_input.cancel();
            Ok(())
        };
        let agent = async {
            // The agent's stdin stays open until its output has ended.
            tokio::try_join!(listen, inbound.run())?;
            spool.finish();
            Ok(())
        };
        let carried = async { tokio::try_join!(agent, pusher.run()).map(drop) };
        let deadline = async {
            tokio::select! {
                () = after(&hurry, HURRY_LIMIT) => {}
                () = stalled(&agent_over, &all_said, &spool) => {}
            }
        };
        let result = tokio::select! {
            result = carried => result,
            () = deadline => Ok(()),
        };
        let waiting = spool.waiting().await;
        spool.close().await;
        match waiting {
            (0, _) => {
                info!("all messages are pushed");
                result
            }
            (messages, bytes) => {
                error!(messages, bytes, "messages stay unsent in the spool");
                result.and(Err(BridgeError::Unsent { messages, bytes }))
            }
        }
    }
}

async fn after(event: &CancellationToken, limit: Duration) {
    event.cancelled().await;
    sleep(limit).await;
}

/// Once the agent has ended and all is said, waits until no message gets through any more.
async fn stalled(agent_over: &CancellationToken, all_said: &CancellationToken, spool: &Spool) {
    agent_over.cancelled().await;
    all_said.cancelled().await;
    let mut before = None;
    loop {
        let (messages, _) = spool.waiting().await;
        if before == Some(messages) {
            return;
        }
        before = Some(messages);
        sleep(STALLED_AFTER).await;
    }
}

#[cfg(test)]
mod tests;
