//! The end of a session that ends with this program: seen, asked for, or made.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use ambient_shared::{
    exit,
    proto::{self, SessionMessage},
    session::SessionId,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::{
    Local, LocalError,
    conversation::{Conversation, has_ended},
};
use crate::backend::{Backend as _, Reason, RunEnd, RunStatus, process::ProcessBackend};

/// From the end of the processes to the phase that says so: the controller has to write it.
const PHASE_LIMIT: Duration = Duration::from_secs(20);

/// Longest wait for a session that is being ended at once.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// How often the end is looked for that no event told.
pub(super) const LOOK: Duration = Duration::from_millis(100);

/// SIGINT, SIGTERM and SIGHUP all mean the same here.
pub(super) struct Interrupts([tokio::signal::unix::Signal; 3]);

impl Interrupts {
    pub(super) fn new() -> Result<Self, LocalError> {
        let catch = |kind| signal(kind).map_err(LocalError::Signals);
        Ok(Self([
            catch(SignalKind::interrupt())?,
            catch(SignalKind::terminate())?,
            catch(SignalKind::hangup())?,
        ]))
    }

    pub(super) async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// What is known of the session's end.
#[derive(Default)]
pub(super) struct End {
    pub(super) last_session: Option<proto::Session>,
    run_ended_at: Option<Instant>,
    /// Number of the mark after the last message.
    pub(super) mark: Option<i64>,
}

impl End {
    pub(super) fn session(&mut self, session: &proto::Session) {
        self.last_session = Some(session.clone());
    }

    pub(super) fn is_mark(&self, message: &SessionMessage) -> bool {
        self.mark.is_some_and(|mark| message.seq >= mark)
    }

    /// Whether the session has ended, and all its processes with it.
    pub(super) fn has_come(
        &mut self,
        conversation: &Conversation,
        backend: &ProcessBackend,
    ) -> bool {
        let run = backend.run_state(conversation.id());
        let phase_says = self.last_session.as_ref().is_some_and(has_ended);
        match run.map(|run| run.status) {
            Some(RunStatus::Ended { .. }) => {
                let since = *self.run_ended_at.get_or_insert_with(Instant::now);
                if !phase_says && since.elapsed() > PHASE_LIMIT {
                    warn!("the session's end was not written to the API server in time");
                    return true;
                }
                phase_says
            }
            Some(
                RunStatus::Unknown
                | RunStatus::Doomed(_)
                | RunStatus::Ending(_)
                | RunStatus::Starting { .. }
                | RunStatus::Running { .. },
            ) => false,
            // It failed, or was stopped, before anything was started.
            None => phase_says,
        }
    }
}

/// The session that a run is about, once it is made.
pub(super) type Made = Arc<OnceLock<SessionId>>;

/// Runs the servers beside `talk` until that ends, however it ends; then nothing of its session
/// runs any more, and a temporary data folder is gone.
///
/// # Errors
/// Those of `talk`, or of the servers: without them there is nothing to talk with.
pub(super) async fn with_servers<T>(local: Local, made: &Made, talk: T) -> Result<u8, LocalError>
where
    T: Future<Output = Result<u8, LocalError>>,
{
    let backend = local.backend.clone();
    let servers = CancellationToken::new();
    let serving = local.run(servers.clone());
    tokio::pin!(serving);
    let (talked, served) = tokio::select! {
        biased;
        talked = talk => {
            if talked.is_err() {
                end_run(&backend, made).await;
            }
            servers.cancel();
            (talked, serving.await)
        }
        served = &mut serving => (Ok(exit::SOFTWARE), served),
    };
    // No controller is left that could start anything; what it was just starting ends too.
    end_run(&backend, made).await;
    served?.close()?;
    talked
}

/// Second Ctrl-C: the exit code of a program that it ended.
pub(super) async fn end_at_once(made: &Made, backend: &ProcessBackend) -> u8 {
    end_run(backend, made).await;
    // 2 is SIGINT's number.
    exit::SIGNAL_BASE + 2
}

/// Ends the session's processes without any grace, and waits for that.
async fn end_run(backend: &ProcessBackend, made: &Made) {
    let Some(id) = made.get() else { return };
    let deadline = Instant::now() + KILL_LIMIT;
    while Instant::now() < deadline {
        let state = backend.run_state(id);
        if state.is_none_or(|state| matches!(state.status, RunStatus::Ended { .. })) {
            return;
        }
        if let Err(error) = backend.kill(id).await {
            warn!(error = %exit::report(&error), "session cannot be killed");
        }
        sleep(LOOK).await;
    }
}

/// The agent's exit code; says on stderr why it is not 0.
pub(super) fn exit_code(
    conversation: &Conversation,
    backend: &ProcessBackend,
    session: Option<&proto::Session>,
) -> u8 {
    let status = backend
        .run_state(conversation.id())
        .map(|state| state.status);
    let Some(RunStatus::Ended { end, .. }) = status else {
        let conditions = session.and_then(|session| session.conditions.as_deref());
        error!(conditions, "the session did not run");
        return exit::SOFTWARE;
    };
    match end {
        // The runner's last words were in its log, and so on the terminal.
        RunEnd::Exited { code, .. } => code,
        RunEnd::Lost { message } | RunEnd::Killed(Reason { message, .. }) => {
            error!("{message}");
            exit::SOFTWARE
        }
    }
}
