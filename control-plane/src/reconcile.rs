//! What is done about a session: one handler for each thing that can be due.
//!
//! In: a handler and an id. Each run reads the *current* session and the *current* run, does the
//! next step that follows from both, and says whether it is done; running it again changes nothing.
//! Nothing that a handler decides outlives its run.

use std::{borrow::Cow, sync::Arc, time::Duration};

use ambient_shared::{clock::Clock, exit, phase::Phase, session::SessionId};
use metrics::{counter, histogram};
use tokio::time::Instant;
use tracing::{Instrument as _, Span, debug, field::Empty, info, info_span, warn};

use crate::{
    authority::Authority,
    backend::{Backend, BackendError, Credentials, RunStatus},
    issuer::{IssueError, Issuer, Subject},
    keypair::Keyring,
    metrics::{HANDLER_RUNS, HANDLER_SECONDS, START_DELAY},
    sessions::{Applied, Confirmed, Session, SessionCache, remote::Remote, remote::RemoteError},
};

pub mod desired;
pub(crate) mod due;
pub(crate) mod phase;

use desired::{DesiredSettings, desired_run};
use due::{Due, Handler};
use phase::Status;

/// Does what is due for sessions.
pub(crate) struct Reconciler {
    pub(crate) cache: SessionCache,
    pub(crate) remote: Remote,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) issuer: Arc<dyn Issuer>,
    pub(crate) keys: Keyring,
    pub(crate) desired: DesiredSettings,
    pub(crate) authority: Option<Arc<Authority>>,
    pub(crate) due: Arc<Due>,
    /// How much life a new session's token must have.
    pub(crate) min_life: Arc<dyn Fn() -> Duration + Send + Sync>,
    pub(crate) clock: Clock,
}

/// Counts a run of a handler when it ends, in whatever way: also by being dropped at its limit, or
/// by a panic.
struct Counted {
    handler: Handler,
    span: Span,
    began: Instant,
    result: &'static str,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let (handler, result) = (self.handler.as_str(), self.result);
        self.span.record("result", result);
        if result != "ok" {
            self.span.record("otel.status_code", "ERROR");
        }
        counter!(HANDLER_RUNS, "handler" => handler, "result" => result).increment(1);
        histogram!(HANDLER_SECONDS, "handler" => handler).record(self.began.elapsed());
    }
}

/// Why a handler is not done. All of these are tried again.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReconcileError {
    /// The API server could not be asked or told.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// There is no token for the session.
    #[error("cannot get a token for the session")]
    Issue(#[from] IssueError),
    /// The backend could not do it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The API server took a status, but still says something else.
    #[error("the session's status was written, but has not been taken")]
    NotTaken,
    /// The session changed while the API server was asked about it.
    #[error("the session changed meanwhile")]
    Overtaken,
}

impl Reconciler {
    /// Does what `handler` stands for.
    ///
    /// # Errors
    /// When it is to be tried again.
    pub(crate) async fn run(&self, handler: Handler, id: &SessionId) -> Result<(), ReconcileError> {
        let span = info_span!(
            "reconcile",
            session = %id.hash(),
            handler = handler.as_str(),
            result = Empty,
            otel.status_code = Empty
        );
        let mut counted = Counted {
            handler,
            span: span.clone(),
            began: Instant::now(),
            result: "failed",
        };
        let done = async {
            match handler {
                Handler::Provision => self.provision(id).await,
                Handler::Stop => self.stop(id).await,
                Handler::WriteBack => self.write_back(id).await,
                Handler::Confirm => self.confirm(id).await,
                Handler::CleanUp => self.clean_up(id).await,
            }
        };
        let done = done.instrument(span).await;
        if done.is_ok() {
            counted.result = "ok";
        }
        done
    }

    /// Starts the run of a session that waits for one.
    async fn provision(&self, id: &SessionId) -> Result<(), ReconcileError> {
        let Some(session) = self.waiting(id) else {
            return Ok(());
        };
        let run = self.backend.run_state(id);
        // Of one that cannot be read, the backend says what is in the way of a start.
        if let Some(run) = run.filter(|run| run.status != RunStatus::Unknown) {
            let ended = matches!(run.status, RunStatus::Ended { .. });
            let ending = matches!(run.status, RunStatus::Ending(_));
            if run.generation > session.generation {
                // Another control plane has seen more than we have; or the API server's database
                // is an older one, to which this run means nothing.
                self.confirm(id).await?;
                match self.waiting(id) {
                    Some(now) if now.generation == session.generation => {
                        self.backend.remove(id).await?;
                    }
                    _ => return Ok(()),
                }
            }
            if run.generation == session.generation {
                if ending && session.phase == Phase::Pending {
                    // Started again, too, but the run before has not ended yet.
                    return Err(BackendError::StillEnding.into());
                }
                if !(ended && session.phase == Phase::Pending) {
                    // It is started; what it became is written back.
                    self.due.touch_status(id);
                    return Ok(());
                }
                // Started again by an API server that does not count starts.
                self.backend.remove(id).await?;
            }
        }
        let desired = self.desired_settings().await;
        let keys = self.keys.current();
        let run = match desired_run(&session, &[], &desired, keys.public()) {
            Ok(run) => run,
            Err(reason) => {
                return self.fail(&session, reason.reason, &reason.message).await;
            }
        };
        if session.phase != Phase::Creating {
            self.write(&session, &phase::creating()).await?;
            info!(generation = run.generation, "session is being started");
        }
        // The answer may have said otherwise: stopped, or deleted.
        let Some(session) = self.waiting(id) else {
            return Ok(());
        };
        if session.generation != run.generation {
            return Err(ReconcileError::Overtaken);
        }
        let subject = Subject {
            session: id.clone(),
            generation: run.generation,
        };
        let started = async {
            let token = self.issuer.issue(&subject, (self.min_life)()).await?;
            // Issuing may take long. One who stopped it meanwhile is heard.
            if self.waiting(id).is_none() {
                return Ok(());
            }
            let keys = self.keys.current();
            let credentials = Credentials {
                token,
                session_key: keys.session_key(id),
                root: keys.root_id(),
                generation: run.generation,
            };
            self.backend.start(&run, &credentials).await?;
            if let Some(since) = self.cache.waiting_since(id) {
                histogram!(START_DELAY).record(since.elapsed());
            }
            info!(generation = run.generation, "session started");
            Ok(())
        };
        match started.await {
            Ok(()) => {
                self.due.touch(id);
                Ok(())
            }
            Err(ReconcileError::Backend(BackendError::Impossible { reason, message })) => {
                self.fail(&session, reason, &message).await
            }
            Err(error) => {
                self.tell_why_not_started(&session, &error).await;
                Err(error)
            }
        }
    }

    async fn desired_settings(&self) -> Cow<'_, DesiredSettings> {
        match &self.authority {
            None => Cow::Borrowed(&self.desired),
            Some(authority) => Cow::Owned(DesiredSettings {
                token_ca: Some(authority.now().await.to_string()),
                ..self.desired.clone()
            }),
        }
    }

    /// The session, if it is (still) to be started.
    fn waiting(&self, id: &SessionId) -> Option<Arc<Session>> {
        let session = self.cache.get(id)?;
        matches!(session.phase, Phase::Pending | Phase::Creating).then_some(session)
    }

    /// Shows people why a session stays in Creating. What fails here is only told later.
    async fn tell_why_not_started(&self, session: &Session, error: &ReconcileError) {
        if matches!(error, ReconcileError::Backend(BackendError::StillEnding)) {
            return;
        }
        let message = phase::without_id(&exit::report(error), &session.id);
        let reason = match error {
            ReconcileError::Backend(BackendError::Refused { reason, .. }) => reason,
            _ => "StartFailed",
        };
        let status = phase::start_failed(reason, &message);
        let Some(current) = self.waiting(&session.id) else {
            return;
        };
        if !phase::has_condition(&current, &status.condition)
            && let Err(error) = self.write(&current, &status).await
        {
            debug!(error = %exit::report(&error), "cannot tell why a session does not start");
        }
    }

    /// Asks the run of a session to end that is to stop, or has ended for the API server.
    async fn stop(&self, id: &SessionId) -> Result<(), ReconcileError> {
        let Some(session) = self.ending(id) else {
            return Ok(());
        };
        let run = self.backend.run_state(id);
        let run = run.filter(|run| !matches!(run.status, RunStatus::Ended { .. }));
        if let Some(run) = run {
            if run.generation > session.generation {
                // It may have been started again, and another replica has heard of it first.
                self.confirm(id).await?;
                if self
                    .ending(id)
                    .is_none_or(|now| now.generation != session.generation)
                {
                    return Ok(());
                }
            }
            match self.backend.stop(id).await {
                Ok(()) if run.status != RunStatus::Unknown => {
                    info!(phase = %session.phase, "session's run asked to end");
                }
                Ok(()) | Err(BackendError::NotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.due.touch_status(id);
        Ok(())
    }

    /// The session, if it is to end or has ended.
    fn ending(&self, id: &SessionId) -> Option<Arc<Session>> {
        let session = self.cache.get(id)?;
        (session.phase == Phase::Stopping || session.phase.is_terminal()).then_some(session)
    }

    /// Reports what became of the run.
    async fn write_back(&self, id: &SessionId) -> Result<(), ReconcileError> {
        let Some(session) = self.cache.get(id) else {
            return Ok(());
        };
        let run = self.backend.run_state(id);
        let Some(status) = phase::unreported(&session, run.as_ref()) else {
            return Ok(());
        };
        // The replica that led before may have made it a moment ago: then nothing of this
        // generation is seen, or still the run before it.
        let generation = session.generation;
        let is_unseen = run.is_none_or(|run| run.generation != generation);
        if is_unseen && !self.backend.is_gone(id, generation).await? {
            return Err(ReconcileError::Overtaken);
        }
        self.write(&session, &status).await?;
        let phase = status.phase;
        info!(%phase, reason = %status.condition.reason, "session's phase written");
        // Until it sticks: somebody else may have written at the same time.
        let run = self.backend.run_state(id);
        let current = self.cache.get(id);
        match current.and_then(|session| phase::unreported(&session, run.as_ref())) {
            Some(left) if left.phase == phase => Err(ReconcileError::NotTaken),
            Some(_) => {
                self.due.touch_status(id);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Reports that the session cannot run at all.
    async fn fail(
        &self,
        session: &Session,
        reason: &'static str,
        message: &str,
    ) -> Result<(), ReconcileError> {
        let message = phase::without_id(message, &session.id);
        warn!(reason, %message, "session cannot run");
        let status = phase::cannot_run(reason, &message, self.clock.now());
        self.write(session, &status).await?;
        match self.waiting(&session.id) {
            Some(current) if current.generation == session.generation => {
                Err(ReconcileError::NotTaken)
            }
            _ => Ok(()),
        }
    }

    /// Writes a status, and takes what the API server then says for the current object.
    async fn write(&self, session: &Session, status: &Status) -> Result<(), ReconcileError> {
        let since = self.cache.revision();
        let request = phase::request(session, status, self.clock.now());
        match self.remote.update_status(request).await {
            Ok(answer) => {
                let Ok(answer) = Session::try_from(answer) else {
                    return Err(ReconcileError::NotTaken);
                };
                match self.cache.apply_read(answer, since) {
                    Applied::Changed => self.due.touch(&session.id),
                    Applied::Nothing => {}
                    Applied::Suspect => self.due.doubt(&session.id),
                }
                Ok(())
            }
            Err(error) => {
                use tonic::Code;
                // It is not as we believe: not there, or in another phase.
                if matches!(
                    error.status.code(),
                    Code::NotFound
                        | Code::FailedPrecondition
                        | Code::Aborted
                        | Code::InvalidArgument
                ) {
                    self.due.doubt(&session.id);
                }
                Err(error.into())
            }
        }
    }

    /// Asks the API server what is true of a session.
    async fn confirm(&self, id: &SessionId) -> Result<(), ReconcileError> {
        let since = self.cache.revision();
        let answer = match self.remote.get(id).await? {
            // One that we cannot work with exists all the same.
            Some(object) => match Session::try_from(object) {
                Ok(session) => Some(session),
                Err(_) => return Ok(()),
            },
            None => None,
        };
        let gone = answer.is_none();
        match self.cache.confirm(id, answer, since) {
            Confirmed::Overtaken => Err(ReconcileError::Overtaken),
            // Nothing new: whoever waits for another try has its own time for it.
            Confirmed::Settled { changed: false } => Ok(()),
            Confirmed::Settled { changed: true } => {
                if gone {
                    info!("session is gone from the API server");
                }
                self.due.touch(id);
                Ok(())
            }
        }
    }

    /// Removes what is left of a deleted session.
    async fn clean_up(&self, id: &SessionId) -> Result<(), ReconcileError> {
        // The removal itself is a change that marks it once more.
        let done = self.cache.is_cleaned(id) && !due::has_anything(self.backend.as_ref(), id);
        if done || !self.cache.is_deleted(id) {
            return Ok(());
        }
        match self.backend.remove(id).await {
            Ok(()) | Err(BackendError::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
        self.cache.set_cleaned(id);
        info!("deleted session cleaned up");
        Ok(())
    }
}
