//! The API server as the bridge sees it: push one message, watch from a `seq`, and what to do when
//! that fails.

use std::{error::Error, time::Duration};

use ::metrics::counter;
use ambient_shared::{
    api::{Api, MAX_MESSAGE, MESSAGE_ID},
    exit::report,
    proto::{PushSessionMessageRequest, SessionMessage, WatchSessionMessagesRequest},
    retry::{Backoff, Policy, Retry},
    session::SessionId,
    token::Token,
};
use tokio::time::{sleep, timeout};
use tonic::{Code, ConnectError, Request, Status, Streaming, metadata::MetadataValue};
use tracing::{info, warn};

use super::{BridgeError, spool::Outgoing};
use crate::{metrics, token::refresher::TokenHandle};

/// Time for one push (contract section 4: what existing clients give it).
const PUSH_DEADLINE: Duration = Duration::from_secs(5);

/// A message is watched with more around it than it was pushed with: id and times.
const MAX_WATCHED: usize = MAX_MESSAGE + 64 * 1024;

/// How long the server may say that this session does not exist, or is not ours, before that is
/// believed: it may be starting, or its database may be.
const REFUSED_FOR: Duration = Duration::from_mins(1);

/// Waits between tries: a session is interactive, so shorter than elsewhere.
const POLICY: Policy = Policy {
    initial: Duration::from_millis(100),
    max: Duration::from_secs(10),
    brief: REFUSED_FOR,
    longest_asked: Duration::from_mins(5),
};

/// One session on one API server.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    pub(super) api: Api,
    pub(super) session: SessionId,
    pub(super) tokens: TokenHandle,
}

/// Where a message was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) seq: i64,
    /// Whether the server knows message ids, so that a repeat is stored once.
    pub(super) knows_ids: bool,
}

/// Why a call failed, by what follows from it.
#[derive(Debug)]
pub(super) enum Failure {
    /// The token is not valid (any more).
    Unauthenticated(Option<Token>, Box<Status>),
    /// This session is unknown, or not for us.
    Denied(Box<Status>),
    /// This message cannot be stored; the next may be.
    Unacceptable(Box<Status>),
    /// The server did nothing.
    NotDone(Box<Status>),
    /// The server may have done it.
    Unclear(Box<Status>),
}

impl Failure {
    /// No `_` arm: each code must be decided on.
    fn of(status: Status, token: Option<Token>) -> Self {
        let status = Box::new(status);
        match status.code() {
            Code::Unauthenticated => Self::Unauthenticated(token, status),
            Code::PermissionDenied
            | Code::NotFound
            | Code::FailedPrecondition
            | Code::Unimplemented => Self::Denied(status),
            Code::InvalidArgument | Code::OutOfRange | Code::AlreadyExists => {
                Self::Unacceptable(status)
            }
            // What existing (Go) servers say of a message beyond their limit.
            Code::ResourceExhausted if status.message().contains("larger than max") => {
                Self::Unacceptable(status)
            }
            Code::ResourceExhausted => Self::NotDone(status),
            Code::Unavailable if was_never_sent(&status) => Self::NotDone(status),
            Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal
            | Code::Unknown
            | Code::Cancelled
            | Code::DataLoss
            | Code::Ok => Self::Unclear(status),
        }
    }

    /// For a metric's label.
    fn name(&self) -> &'static str {
        match self {
            Self::Unauthenticated(..) => "unauthenticated",
            Self::Denied(_) => "denied",
            Self::Unacceptable(_) => "unacceptable",
            Self::NotDone(_) => "not_done",
            Self::Unclear(_) => "unclear",
        }
    }

    pub(super) fn status(&self) -> &Status {
        match self {
            Self::Unauthenticated(_, status)
            | Self::Denied(status)
            | Self::Unacceptable(status)
            | Self::NotDone(status)
            | Self::Unclear(status) => status,
        }
    }
}

/// Whether there was no connection to send it on.
fn was_never_sent(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.is::<ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Remote {
    /// Pushes one message with its id.
    pub(super) async fn push(&self, message: &Outgoing) -> Result<Stored, Failure> {
        let token = self.tokens.latest().borrow().clone();
        let mut request = Request::new(PushSessionMessageRequest {
            session_id: self.session.as_str().to_owned(),
            event_type: message.kind.as_str().to_owned(),
            payload: message.payload.clone(),
        });
        let id = message.id.to_string();
        if let Ok(value) = MetadataValue::try_from(&id) {
            request.metadata_mut().insert(MESSAGE_ID, value);
        }
        request.set_timeout(PUSH_DEADLINE);
        let mut client = self.api.sessions();
        // The server may not honour the deadline that it was sent.
        let answer = timeout(PUSH_DEADLINE, client.push_session_message(request)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        let answer = answer.map_err(|status| Failure::of(status, token))?;
        let echoed = answer.metadata().get(MESSAGE_ID);
        Ok(Stored {
            knows_ids: echoed.is_some_and(|echo| echo.as_bytes() == id.as_bytes()),
            seq: answer.get_ref().seq,
        })
    }

    /// Follows the session's messages after `after_seq`. An existing server sends nothing, not
    /// even headers, before the first message: so this may take for ever.
    pub(super) async fn watch(&self, after_seq: i64) -> Result<Watch, Failure> {
        let token = self.tokens.latest().borrow().clone();
        let request = WatchSessionMessagesRequest {
            session_id: self.session.as_str().to_owned(),
            after_seq,
        };
        let mut client = self.api.sessions().max_decoding_message_size(MAX_WATCHED);
        match client.watch_session_messages(request).await {
            Ok(stream) => Ok(Watch {
                stream: stream.into_inner(),
                token,
            }),
            Err(status) => Err(Failure::of(status, token)),
        }
    }

    /// What must happen before the next try: another token, or a wait.
    ///
    /// # Errors
    /// When there is to be no next try.
    pub(super) async fn before_retry(
        &self,
        call: &'static str,
        failure: Failure,
        patience: &mut Patience,
    ) -> Result<(), BridgeError> {
        counter!(metrics::MESSAGE_FAILURES, "call" => call, "failure" => failure.name())
            .increment(1);
        let retry = match &failure {
            Failure::Denied(_) | Failure::Unacceptable(_) => Retry::Briefly,
            Failure::Unauthenticated(..) | Failure::NotDone(_) | Failure::Unclear(_) => {
                Retry::Backoff
            }
        };
        let Some(wait) = patience.backoff.after(retry) else {
            let (Failure::Unauthenticated(_, source)
            | Failure::Denied(source)
            | Failure::Unacceptable(source)
            | Failure::NotDone(source)
            | Failure::Unclear(source)) = failure;
            return Err(BridgeError::Denied { call, source });
        };
        if let Failure::Unauthenticated(Some(rejected), _) = &failure {
            match self.tokens.renew(rejected).await {
                Ok(_) => {
                    info!(
                        call,
                        "token renewed, as the API server rejected the last one"
                    );
                    // At once the first time; a server that rejects every token must not be asked
                    // in a busy loop.
                    if std::mem::replace(&mut patience.renewed, true) {
                        sleep(wait).await;
                    }
                    return Ok(());
                }
                Err(error) => warn!(call, error = %report(&error), "cannot renew the token"),
            }
        }
        let status = failure.status();
        warn!(
            call,
            code = ?status.code(),
            reason = status.message(),
            wait_ms = wait.as_millis(),
            "call failed, trying again"
        );
        sleep(wait).await;
        Ok(())
    }
}

/// An open watch.
pub(super) struct Watch {
    stream: Streaming<SessionMessage>,
    token: Option<Token>,
}

impl Watch {
    /// The next message; none when the server ended the stream in order.
    ///
    /// Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<SessionMessage>, Failure> {
        let next = self.stream.message().await;
        next.map_err(|status| Failure::of(status, self.token.clone()))
    }
}

/// How often and how long a row of failures was borne.
#[derive(Debug)]
pub(super) struct Patience {
    backoff: Backoff,
    renewed: bool,
}

impl Patience {
    pub(super) fn new() -> Self {
        Self {
            backoff: Backoff::new(POLICY),
            renewed: false,
        }
    }

    /// After a success.
    pub(super) fn reset(&mut self) {
        self.backoff.reset();
        self.renewed = false;
    }
}

#[cfg(test)]
mod tests {
    use ambient_shared::client::{GrpcAddress, grpc_channel, install_crypto_provider};
    use ambient_shared::resolve::Resolver;
    use tokio::time::Instant;

    use super::*;

    fn remote() -> (Remote, tokio::sync::watch::Sender<Option<Token>>) {
        install_crypto_provider();
        let to = GrpcAddress {
            address: "127.0.0.1:9".to_owned(),
            tls: false,
            ca: None,
        };
        let channel = grpc_channel(&Resolver::system(), &to).unwrap();
        let first = Token::new("token-1-of-the-tests", None).unwrap();
        let (tokens, sender, _) = TokenHandle::for_tests(Some(first));
        let remote = Remote {
            api: Api::new(channel, tokens.latest()),
            session: SessionId::parse("session-of-remote-tests").unwrap(),
            tokens,
        };
        (remote, sender)
    }

    fn failure(code: Code) -> Failure {
        Failure::of(Status::new(code, "why"), None)
    }

    /// How long failures with this code are borne, at most an hour.
    async fn borne(code: Code) -> (Duration, Option<BridgeError>) {
        let (remote, _tokens) = remote();
        let mut patience = Patience::new();
        let started = Instant::now();
        while started.elapsed() < Duration::from_hours(1) {
            let next = remote.before_retry("push", failure(code), &mut patience);
            if let Err(error) = next.await {
                return (started.elapsed(), Some(error));
            }
        }
        (started.elapsed(), None)
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_away_is_waited_for() {
        for code in [Code::Unavailable, Code::Unauthenticated, Code::Internal] {
            assert!(borne(code).await.1.is_none(), "{code:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_refused_for_long_is_an_error() {
        for code in [Code::NotFound, Code::PermissionDenied] {
            let (after, error) = borne(code).await;
            assert!(after >= REFUSED_FOR && after < 2 * REFUSED_FOR, "{after:?}");
            let shown = report(&error.unwrap());
            assert!(shown.contains("refuses to push"), "{shown}");
            assert!(shown.contains("why"), "{shown}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_rejects_every_token_is_not_asked_in_a_busy_loop() {
        let (remote, tokens) = remote();
        let mut patience = Patience::new();
        let started = Instant::now();
        for number in 2..100 {
            let rejected = tokens.borrow().clone();
            let next = Token::new(&format!("token-{number}-of-the-tests"), None).unwrap();
            tokens.send_replace(Some(next));
            let status = Box::new(Status::unauthenticated("no"));
            let failure = Failure::Unauthenticated(rejected, status);
            let waited = remote.before_retry("push", failure, &mut patience).await;
            waited.unwrap();
            assert!(
                number > 2 || started.elapsed().is_zero(),
                "at once at first"
            );
        }
        assert!(started.elapsed() > Duration::from_mins(2));
    }

    #[tokio::test]
    async fn a_message_that_was_never_sent_is_known_as_such() {
        let (remote, _tokens) = remote();
        let message = Outgoing::new(crate::bridge::format::runner_started(false));
        let failure = remote.push(&message).await.unwrap_err();
        assert!(matches!(failure, Failure::NotDone(_)), "{failure:?}");
        assert!(matches!(
            failure_of_watch(&remote).await,
            Failure::NotDone(_)
        ));
    }

    async fn failure_of_watch(remote: &Remote) -> Failure {
        match remote.watch(0).await {
            Ok(_) => panic!("nothing listens there"),
            Err(failure) => failure,
        }
    }
}
