//! One session from the operator's side: made, talked with, followed, ended.
//!
//! In: the embedded API server. Out: [`Event`]s in order over a bounded channel, so that a slow
//! terminal slows the stream instead of filling memory.

use std::time::Duration;

use ambient_shared::{
    api::{MESSAGE_ID, retry_of},
    phase::Phase,
    proto::{
        self, CreateSessionRequest, GetSessionRequest, PushSessionMessageRequest,
        WatchSessionsRequest,
    },
    retry::{GaveUp, Policy, Retry, Retryable, retry},
    session::{InvalidSessionId, SessionId},
};
use serde_json::json;
use tokio::time::timeout;
use tonic::{Request, Status};
use tracing::debug;

mod events;

pub(crate) use events::{Event, Events};

use super::Operator;
use crate::reconcile::desired::AgentIo;

/// How long a call to our own API server is tried.
const PATIENCE: Duration = Duration::from_secs(60);

/// Longest single call.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Waits between tries; the server is in this process, so failures are short.
const POLICY: Policy = Policy {
    initial: Duration::from_millis(50),
    max: Duration::from_secs(1),
    brief: Duration::from_secs(5),
    longest_asked: Duration::from_secs(5),
};

/// Pushed after a session ended: once it comes back, all messages before it have.
const END_MARK: &str = r#"{"custom_event":"ambient.conversation-ended"}"#;

/// Closes the agent's stdin (contract section 4).
const INPUT_CLOSED: &str = r#"{"custom_event":"ambient.input-closed"}"#;

/// The event type of both.
const SYSTEM: &str = "system";

/// Why the conversation cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ConversationError {
    /// The API server refuses.
    #[error("cannot {action}")]
    Call {
        /// Such as `create the session`.
        action: &'static str,
        /// What it answered.
        source: GaveUp<CallError>,
    },
    /// REST refuses.
    #[error("cannot {action}: the API server answered {answer}")]
    Rest {
        /// Such as `stop the session`.
        action: &'static str,
        /// Status and reason.
        answer: String,
    },
    /// The API server made a session whose id is none.
    #[error("the API server made a session that cannot be used")]
    Id(#[from] InvalidSessionId),
}

/// Why one call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// An answer.
    #[error("the API server answered {}: {}", .0.code(), .0.message())]
    Status(Status),
    /// None in time.
    #[error("the API server did not answer within {} s", CALL_LIMIT.as_secs())]
    Slow,
}

impl Retryable for CallError {
    fn retry(&self) -> Retry {
        match self {
            Self::Status(status) => retry_of(status),
            Self::Slow => Retry::Backoff,
        }
    }
}

/// What the session is to run.
#[derive(Debug)]
pub(crate) struct NewSession {
    pub(crate) name: &'static str,
    /// None: the control plane's default agent.
    pub(crate) command: Option<Vec<String>>,
    pub(crate) io: AgentIo,
    pub(crate) turns: u32,
    pub(crate) environment: Vec<(&'static str, String)>,
}

/// One session, as the operator sees it.
#[derive(Clone)]
pub(crate) struct Conversation {
    operator: Operator,
    id: SessionId,
}

impl Conversation {
    /// Makes the session. Its events come from the very first on.
    pub(crate) async fn begin(
        operator: Operator,
        new: &NewSession,
    ) -> Result<(Self, Events), ConversationError> {
        let watch = call("watch sessions", || {
            let mut sessions = operator.api.sessions();
            async move { sessions.watch_sessions(WatchSessionsRequest {}).await }
        })
        .await?;
        // Not repeated: without an id of ours a repeat would make a second session.
        let made = limited(operator.api.sessions().create_session(request(new)))
            .await
            .map_err(|error| ConversationError::Call {
                action: "create the session",
                source: GaveUp::Final(error),
            })?;
        let id = SessionId::parse(made.metadata.clone().unwrap_or_default().id)?;
        let conversation = Self { operator, id };
        let events = Events {
            conversation: conversation.clone(),
            watch: Some(watch),
            made,
        };
        Ok((conversation, events))
    }

    pub(crate) fn id(&self) -> &SessionId {
        &self.id
    }

    /// Writes to the session as a person; done once it is stored.
    pub(crate) async fn say(&self, text: String) -> Result<(), ConversationError> {
        self.push("user", text, "send a line").await.map(|_| ())
    }

    /// Ends the agent's input, after all that was said before.
    pub(crate) async fn end_input(&self) -> Result<(), ConversationError> {
        self.push(SYSTEM, INPUT_CLOSED.to_owned(), "end the input")
            .await
            .map(|_| ())
    }

    /// Marks the end of a session that has ended; gives the mark's number.
    pub(crate) async fn mark_end(&self) -> Result<i64, ConversationError> {
        self.push(SYSTEM, END_MARK.to_owned(), "read the last messages")
            .await
    }

    async fn push(
        &self,
        event_type: &str,
        payload: String,
        action: &'static str,
    ) -> Result<i64, ConversationError> {
        let message = PushSessionMessageRequest {
            session_id: self.id.as_str().to_owned(),
            event_type: event_type.to_owned(),
            payload,
        };
        // The same for all tries: a repeat is stored once.
        let message_id = uuid::Uuid::new_v4().to_string();
        let stored = call(action, || {
            let mut request = Request::new(message.clone());
            if let Ok(value) = message_id.parse() {
                request.metadata_mut().insert(MESSAGE_ID, value);
            }
            let mut sessions = self.operator.api.sessions();
            async move { sessions.push_session_message(request).await }
        })
        .await?;
        Ok(stored.seq)
    }

    /// The session as it is now.
    pub(crate) async fn session(&self) -> Result<proto::Session, ConversationError> {
        call("read the session", || {
            let mut sessions = self.operator.api.sessions();
            let id = self.id.as_str().to_owned();
            async move { sessions.get_session(GetSessionRequest { id }).await }
        })
        .await
    }

    /// Asks for the session's end. Fine if it has ended already.
    pub(crate) async fn stop(&self) -> Result<(), ConversationError> {
        let action = "stop the session";
        let url = format!("{}/sessions/{}/stop", self.operator.rest, self.id.as_str());
        let answer = self
            .operator
            .http
            .post(url)
            .header(
                http::header::AUTHORIZATION,
                self.operator.token.authorization(),
            )
            .send()
            .await;
        match answer {
            Ok(answer)
                if answer.status().is_success()
                    || answer.status() == http::StatusCode::CONFLICT =>
            {
                Ok(())
            }
            Ok(answer) => Err(ConversationError::Rest {
                action,
                answer: answer.status().to_string(),
            }),
            Err(error) => Err(ConversationError::Rest {
                action,
                answer: ambient_shared::exit::report(&error.without_url()),
            }),
        }
    }
}

/// Whether a session has ended for good, unless somebody starts it again.
pub(crate) fn has_ended(session: &proto::Session) -> bool {
    Phase::of(session.phase.as_deref()).is_ok_and(Phase::is_terminal)
}

fn request(new: &NewSession) -> CreateSessionRequest {
    let mut annotations = serde_json::Map::new();
    annotations.insert(
        "ambient-code.io/agent-io".to_owned(),
        new.io.as_str().into(),
    );
    if new.turns > 0 {
        annotations.insert(
            "ambient-code.io/agent-turns".to_owned(),
            new.turns.to_string().into(),
        );
    }
    if let Some(command) = &new.command {
        annotations.insert(
            "ambient-code.io/agent-command".to_owned(),
            json!(command).to_string().into(),
        );
    }
    let environment: serde_json::Map<_, _> = new
        .environment
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone().into()))
        .collect();
    CreateSessionRequest {
        name: new.name.to_owned(),
        annotations: Some(serde_json::Value::Object(annotations).to_string()),
        environment_variables: (!environment.is_empty())
            .then(|| serde_json::Value::Object(environment).to_string()),
        ..CreateSessionRequest::default()
    }
}

/// A call that may be repeated, tried until it succeeds or is refused.
async fn call<T, F>(action: &'static str, operation: impl Fn() -> F) -> Result<T, ConversationError>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let result = retry(
        POLICY,
        Some(PATIENCE),
        || limited(operation()),
        |error, _| debug!(%error, action, "call failed; trying again"),
    );
    result
        .await
        .map_err(|source| ConversationError::Call { action, source })
}

async fn limited<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CallError> {
    match timeout(CALL_LIMIT, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(CallError::Status(status)),
        Err(_) => Err(CallError::Slow),
    }
}
