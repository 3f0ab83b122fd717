//! Where a session stands, for the token endpoint.
//!
//! The session cache answers almost always. A session that it does not know is asked for at the
//! API server, once at a time for each id, and the answer kept for 5 s. A run of ours that is alive
//! vouches for its session before the first list after a start is complete, and for its generation
//! when the cache is behind: the replica that leads may have learned of a restart earlier.

use std::{sync::Arc, time::Duration};

use ambient_shared::{api::Api, proto::GetSessionRequest, session::SessionId};
use metrics::counter;
use moka::future::Cache;
use tokio::{sync::Semaphore, time::timeout};
use tonic::{Code, Status};
use tracing::warn;

use super::{Standing, StandingOf};
use crate::{
    backend::Backend,
    metrics::SESSION_LOOKUPS,
    sessions::{Session, SessionCache},
};

/// How long an answer counts. Once the cache knows the session, the cache counts.
const KEPT_FOR: Duration = Duration::from_secs(5);

/// Most answers kept: only who holds a session's key can cause one, or with unproven callers a
/// rate-limited stranger.
const KEPT: u64 = 10_000;

/// Most questions to the API server at a time.
const QUESTIONS: usize = 16;

/// Longest wait for an answer, the wait for one's turn included.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Knows where sessions stand.
pub struct Lookup {
    sessions: SessionCache,
    api: Api,
    backend: Arc<dyn Backend>,
    answers: Cache<SessionId, Standing>,
    questions: Semaphore,
}

/// Why the API server gave no answer.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("API server does not answer")]
    Failed(#[from] Status),
    #[error("API server does not answer within {} s", ANSWER_LIMIT.as_secs())]
    Slow,
    #[error("shutting down")]
    Closed,
}

impl Lookup {
    /// Looks into the cache first, then asks the API server or the backend.
    pub fn new(sessions: SessionCache, api: Api, backend: Arc<dyn Backend>) -> Self {
        Self {
            sessions,
            api,
            backend,
            answers: Cache::builder()
                .max_capacity(KEPT)
                .time_to_live(KEPT_FOR)
                .build(),
            questions: Semaphore::new(QUESTIONS),
        }
    }

    /// What the endpoint asks.
    pub fn into_standing_of(self) -> StandingOf {
        let lookup = Arc::new(self);
        Arc::new(move |id| {
            // The usual case needs no more than this.
            if let Some(standing) = lookup.in_cache(&id) {
                return Box::pin(std::future::ready(standing));
            }
            let lookup = Arc::clone(&lookup);
            Box::pin(async move { lookup.beyond_cache(&id).await })
        })
    }

    fn in_cache(&self, id: &SessionId) -> Option<Standing> {
        let Some(session) = self.sessions.get(id) else {
            return self.sessions.is_deleted(id).then_some(Standing::Inactive);
        };
        let newer_run = self
            .backend
            .run_state(id)
            .filter(|run| run.is_live() && run.generation > session.generation);
        match newer_run {
            None => Some(standing(&session)),
            Some(run) if session.phase.is_active() => Some(Standing::Active {
                generation: run.generation,
            }),
            // It has ended, and started anew, as it seems: only the API server can say.
            Some(_) => None,
        }
    }

    async fn beyond_cache(&self, id: &SessionId) -> Standing {
        let is_synced = self.sessions.is_synced();
        if !is_synced
            && let Some(run) = self.backend.run_state(id)
            && run.is_live()
        {
            return Standing::Active {
                generation: run.generation,
            };
        }
        match self.answers.try_get_with_by_ref(id, self.ask(id)).await {
            // Before the first list it may be a server that has just started itself.
            Ok(Standing::Unknown) if !is_synced => Standing::NotSynced,
            Ok(standing) => standing,
            Err(error) => {
                let error = ambient_shared::exit::report(&*error);
                warn!(session = %id.hash(), %error, "cannot look up a session");
                Standing::NotSynced
            }
        }
    }

    async fn ask(&self, id: &SessionId) -> Result<Standing, NoAnswer> {
        let answer = timeout(ANSWER_LIMIT, async {
            let _turn = self
                .questions
                .acquire()
                .await
                .map_err(|_| NoAnswer::Closed)?;
            let request = GetSessionRequest {
                id: id.as_str().to_owned(),
            };
            match self.api.sessions().get_session(request).await {
                Ok(answer) => Ok(found(id, answer.into_inner())),
                Err(status) if status.code() == Code::NotFound => Ok(Standing::Unknown),
                Err(status) => Err(NoAnswer::Failed(status)),
            }
        });
        let answer = answer.await.unwrap_or(Err(NoAnswer::Slow));
        let result = match &answer {
            Ok(Standing::Unknown) => "missing",
            Ok(_) => "found",
            Err(_) => "failed",
        };
        counter!(SESSION_LOOKUPS, "result" => result).increment(1);
        answer
    }
}

fn found(id: &SessionId, object: ambient_shared::proto::Session) -> Standing {
    match Session::try_from(object) {
        // A server that finds sessions by other names too must not give one the token of another.
        Ok(session) if session.id == *id => standing(&session),
        Ok(_) => Standing::Unknown,
        Err(_) => Standing::Inactive,
    }
}

fn standing(session: &Session) -> Standing {
    if session.phase.is_active() {
        Standing::Active {
            generation: session.generation,
        }
    } else {
        Standing::Inactive
    }
}

#[cfg(test)]
mod tests;
