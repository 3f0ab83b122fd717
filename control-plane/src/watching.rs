//! Watches of the API server: opened before what they are about is listed, and again when they end.
//!
//! In: the call that opens a watch, and one that probes its connection. Out: events of which none
//! falls between the watch and a list that follows, and how long to wait when they have ended.

use std::{future::Future, time::Duration};

use ambient_shared::{
    api::retry_of,
    retry::{Backoff, Policy, Retryable as _},
};
use futures_util::{StreamExt as _, stream, stream::BoxStream};
use tokio::time::{Instant, timeout};
use tonic::Status;

use crate::sessions::remote::RemoteError;

/// Waits between connections, and between lists that failed.
pub(crate) const RECONNECTS: Policy = Policy {
    initial: Duration::from_millis(250),
    max: Duration::from_secs(30),
    brief: Duration::from_secs(30),
    longest_asked: Duration::from_mins(1),
};

/// How soon to list again when it was not certain that the watch had begun before the first list,
/// or that nothing slipped through pages that shifted.
pub(crate) const DOUBTFUL_RESYNC: Duration = Duration::from_secs(30);

/// How long a connection must have been good before the next failure starts with the shortest wait
/// again: a server that ends each watch at once must not be asked for lists without a pause.
const GOOD_AFTER: Duration = Duration::from_secs(5);

/// How long to wait for the watch to begin once the server has answered another call on the same
/// connection. Existing servers send nothing at all before the first event.
const SETTLE: Duration = Duration::from_secs(1);

/// The events of a watch, as they come.
pub(crate) type Events<T> = BoxStream<'static, Result<T, Status>>;

/// Why a watch cannot be opened, or has ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WatchError {
    /// The server refuses, or broke off.
    #[error("the API server says {:?} ({}) to the watch", .0.code(), .0.message())]
    Refused(Status),
    /// The server does not answer.
    #[error("the API server does not answer")]
    Silent(#[source] RemoteError),
    /// The server ended the stream.
    #[error("the API server ended the watch")]
    Ended,
    /// A list has shown changes that no event had told of.
    #[error("the watch has missed {0} changes")]
    Deaf(usize),
}

impl WatchError {
    /// For metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::Silent(_) => "silent",
            Self::Ended => "ended",
            Self::Deaf(_) => "deaf",
        }
    }
}

/// A watch that was asked for.
pub(crate) struct Opened<T> {
    /// Its events.
    pub(crate) events: Events<T>,
    /// Whether it has certainly begun.
    pub(crate) certain: bool,
}

/// Opens a watch. `probe` is any other call on the same connection: once it is answered, the server
/// has received the watch too, though it may send nothing before the first event.
///
/// # Errors
/// When the server refuses the watch, or leaves the probe without an answer.
pub(crate) async fn open<T: Send + 'static>(
    opening: impl Future<Output = Result<Events<T>, Status>> + Send + 'static,
    probe: impl Future<Output = Result<(), RemoteError>>,
) -> Result<Opened<T>, WatchError> {
    let mut opening = Box::pin(opening);
    let opened = tokio::select! {
        biased;
        opened = &mut opening => Some(opened),
        answered = probe => {
            answered.map_err(WatchError::Silent)?;
            timeout(SETTLE, &mut opening).await.ok()
        }
    };
    let certain = opened.is_some();
    let events = match opened {
        Some(opened) => opened.map_err(WatchError::Refused)?,
        None => stream::once(opening)
            .flat_map(|opened| opened.unwrap_or_else(|status| stream::iter([Err(status)]).boxed()))
            .boxed(),
    };
    Ok(Opened { events, certain })
}

/// When to open a watch again.
pub(crate) struct Reconnects {
    backoff: Backoff,
    good_since: Option<Instant>,
}

impl Reconnects {
    /// Before the first connection.
    pub(crate) fn new() -> Self {
        Self {
            backoff: Backoff::new(RECONNECTS),
            good_since: None,
        }
    }

    /// Whether this connection was good once.
    pub(crate) fn was_good(&self) -> bool {
        self.good_since.is_some()
    }

    /// This connection is good: a list is complete.
    pub(crate) fn is_good(&mut self) {
        self.good_since.get_or_insert_with(Instant::now);
    }

    /// How long to wait after this end of the connection. Never for good: what is refused today may
    /// be allowed tomorrow.
    pub(crate) fn wait_after(&mut self, error: &WatchError) -> Duration {
        let good_since = self.good_since.take();
        if good_since.is_some_and(|since| since.elapsed() >= GOOD_AFTER) {
            self.backoff.reset();
        }
        let wait = match error {
            WatchError::Refused(status) => self.backoff.after(retry_of(status)),
            WatchError::Silent(error) => self.backoff.after(error.retry()),
            WatchError::Ended | WatchError::Deaf(_) => None,
        };
        wait.unwrap_or_else(|| self.backoff.next_wait())
    }
}
