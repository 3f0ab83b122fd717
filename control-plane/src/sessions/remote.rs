//! Single calls to the API server, each with a deadline.

use std::{future::Future, time::Duration};

use ambient_shared::{
    api::{Api, retry_of},
    proto,
    retry::{Retry, Retryable},
    session::SessionId,
};
use tonic::{Code, Request, Response, Status};

use crate::cluster::Fence;

/// Longest wait for the answer to one call.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Reads and writes single sessions. Clones share the connection.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    api: Api,
    fence: Fence,
}

/// Why a call to the API server failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: the API server says {:?} ({})", status.code(), status.message())]
pub(crate) struct RemoteError {
    /// What was tried.
    pub(crate) action: &'static str,
    /// The answer, or what stands for it. Its message is the server's, and may name a session.
    pub(crate) status: Status,
}

impl RemoteError {
    /// The session is not there, or not for us to see.
    pub(crate) fn is_not_found(&self) -> bool {
        self.status.code() == Code::NotFound
    }
}

impl Retryable for RemoteError {
    fn retry(&self) -> Retry {
        retry_of(&self.status)
    }
}

impl Remote {
    /// Calls over `api`; writes nothing while `fence` is closed.
    pub(crate) fn new(api: Api, fence: Fence) -> Self {
        Self { api, fence }
    }

    /// The session as it is now; none when the API server has none of this id.
    pub(crate) async fn get(&self, id: &SessionId) -> Result<Option<proto::Session>, RemoteError> {
        let request = proto::GetSessionRequest {
            id: id.as_str().to_owned(),
        };
        let mut client = self.api.sessions();
        match call("read a session", client.get_session(Request::new(request))).await {
            Ok(session) => Ok(Some(session)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes status fields and gives the session as it is then.
    pub(crate) async fn update_status(
        &self,
        request: proto::UpdateSessionStatusRequest,
    ) -> Result<proto::Session, RemoteError> {
        let action = "write a session's status";
        if !self.fence.is_open() {
            let status = Status::cancelled("not the leader any more: nothing was written");
            return Err(RemoteError { action, status });
        }
        let mut client = self.api.sessions();
        let answer = client.update_session_status(Request::new(request));
        call(action, answer).await
    }
}

/// Waits for an answer, at most [`CALL_LIMIT`].
pub(crate) async fn call<T>(
    action: &'static str,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, RemoteError> {
    let status = match tokio::time::timeout(CALL_LIMIT, answer).await {
        Ok(Ok(response)) => return Ok(response.into_inner()),
        Ok(Err(status)) => status,
        Err(_) => Status::deadline_exceeded("no answer in time"),
    };
    Err(RemoteError { action, status })
}
