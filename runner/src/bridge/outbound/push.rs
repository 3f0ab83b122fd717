//! Spool to server: pushes what waits, in order, each message once.
//!
//! One push at a time: several at once might be stored in another order. A server that echoes
//! message ids stores a repeat once, so a push that failed is repeated at once. Any other server
//! is asked first, after a failure that leaves it open whether the message was stored: a marker is
//! pushed, and the stream is read up to it. What was stored lies before the marker. Should it
//! arrive later still, the marker between the two shows that they are one.

use std::{sync::Arc, time::Duration};

use ::metrics::{counter, gauge};
use ambient_shared::clock::Clock;
use tokio::{sync::watch, time::timeout};
use tonic::Code;
use tracing::{debug, error, warn};
use uuid::Uuid;

use crate::{
    bridge::{
        BridgeError, format,
        remote::{Failure, Patience, Remote, Stored},
        spool::{Head, Outgoing, Spool},
    },
    metrics,
};

/// Longest search for one message in the stream, before it is begun anew.
const SEARCH_DEADLINE: Duration = Duration::from_secs(30);

/// How often a server may fail on one message while it takes others, before the message counts as
/// one that it cannot store.
const FAILURES_OF_ONE: u32 = 5;

/// What the start message told about the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::bridge) struct Started {
    /// All that earlier runners recorded has a smaller `seq`.
    pub(in crate::bridge) seq: i64,
    /// Whether the server is one of ours. If not, it loses messages for slow readers.
    pub(in crate::bridge) knows_ids: bool,
}

/// Pushes one session's messages; owns the sender of [`Started`].
pub(in crate::bridge) struct Pusher {
    pub(in crate::bridge) remote: Remote,
    pub(in crate::bridge) spool: Arc<Spool>,
    pub(in crate::bridge) clock: Clock,
    /// Id of this runner's start message.
    pub(in crate::bridge) start: Uuid,
    pub(in crate::bridge) started: watch::Sender<Option<Started>>,
}

impl Pusher {
    /// Until the spool is empty and finished.
    ///
    /// Cancel-safe: a push that is cut off is repeated after the next start, with the same id.
    ///
    /// # Errors
    /// When the server does not let this session push.
    pub(in crate::bridge) async fn run(self) -> Result<(), BridgeError> {
        let mut knows_ids = false;
        let mut first = true;
        while let Some(head) = self.spool.head().await {
            // Only one message at a time is on its way, so an earlier run may have pushed the
            // first, and no other.
            let unclear = head.leftover && std::mem::replace(&mut first, false);
            let stored = self.deliver(&head, unclear, knows_ids).await?;
            knows_ids = stored.knows_ids;
            self.spool.acknowledge(head.number, stored.seq).await;
            counter!(metrics::MESSAGES_OUT).increment(1);
            #[expect(clippy::cast_precision_loss, reason = "a gauge is a float")]
            gauge!(metrics::LAST_PUSH).set(self.clock.unix_seconds() as f64);
            if head.message.id == self.start {
                self.started.send_replace(Some(Started {
                    seq: stored.seq,
                    knows_ids,
                }));
            }
        }
        Ok(())
    }

    /// Pushes one message until it is stored, or replaced since it cannot be.
    async fn deliver(
        &self,
        head: &Head,
        mut unclear: bool,
        mut knows_ids: bool,
    ) -> Result<Stored, BridgeError> {
        let mut patience = Patience::new();
        let mut message = Arc::clone(&head.message);
        let mut failures = 0;
        loop {
            if unclear && !knows_ids {
                match self.find(&message).await? {
                    Found::Stored(stored) => return Ok(stored),
                    Found::Missing => unclear = false,
                    Found::NoNeed => knows_ids = true,
                }
            }
            let failure = match self.remote.push(&message).await {
                Ok(stored) => return Ok(stored),
                Err(failure) => failure,
            };
            let code = failure.status().code();
            if matches!(failure, Failure::Unclear(_)) {
                unclear = true;
                // A marker went through each time.
                failures += u32::from(matches!(code, Code::Internal | Code::Unknown));
            }
            let hopeless = failures >= FAILURES_OF_ONE && !knows_ids;
            if !hopeless && !matches!(failure, Failure::Unacceptable(_)) {
                self.remote
                    .before_retry("push", failure, &mut patience)
                    .await?;
                continue;
            }
            let reason = failure.status().message();
            let kind = head.message.kind.as_str();
            let bytes = head.message.payload.len();
            if !Arc::ptr_eq(&message, &head.message) || bytes == 0 {
                debug!(kind, ?code, reason, "message refused and left out");
                let seq = self.spool.acknowledged_seq().await;
                return Ok(Stored { seq, knows_ids });
            }
            counter!(metrics::MESSAGES_REFUSED).increment(1);
            error!(
                kind,
                bytes,
                ?code,
                reason,
                "the API server refused a message"
            );
            let what = format!("a message ({kind}, {bytes} bytes) was refused: {reason}");
            let (kind, payload) = format::lost_message("message_refused", &what);
            message = Arc::new(Outgoing {
                id: head.message.id,
                kind,
                payload,
            });
            unclear = false;
            failures = 0;
        }
    }

    /// Looks whether the server stored a message that it gave no answer for.
    async fn find(&self, message: &Outgoing) -> Result<Found, BridgeError> {
        let mut patience = Patience::new();
        let marker = loop {
            let marker = Outgoing::new(format::may_repeat(message.id));
            match self.remote.push(&marker).await {
                Ok(stored) if stored.knows_ids => return Ok(Found::NoNeed),
                Ok(stored) => break stored,
                // Another marker does no harm.
                Err(failure) => {
                    self.remote
                        .before_retry("push", failure, &mut patience)
                        .await?;
                }
            }
        };
        let after = self.spool.acknowledged_seq().await;
        patience.reset();
        loop {
            let search = self.search(message, after, marker.seq);
            match timeout(SEARCH_DEADLINE, search).await {
                Ok(Ok(Some(seq))) => {
                    debug!("message was stored in spite of the failure");
                    let knows_ids = false;
                    return Ok(Found::Stored(Stored { seq, knows_ids }));
                }
                Ok(Ok(None)) => return Ok(Found::Missing),
                Ok(Err(failure)) => {
                    self.remote
                        .before_retry("watch", failure, &mut patience)
                        .await?;
                }
                Err(_) => warn!("the stored messages did not arrive in time, asking again"),
            }
        }
    }

    /// The message's `seq`, if it is among those after `after` and before `end`.
    async fn search(
        &self,
        message: &Outgoing,
        after: i64,
        end: i64,
    ) -> Result<Option<i64>, Failure> {
        let mut watch = self.remote.watch(after).await?;
        while let Some(stored) = watch.next().await? {
            if stored.seq >= end {
                return Ok(None);
            }
            let same_kind = stored.event_type == message.kind.as_str();
            if same_kind && stored.payload == message.payload {
                return Ok(Some(stored.seq));
            }
        }
        let ended = tonic::Status::unavailable("the stream ended early");
        Err(Failure::NotDone(Box::new(ended)))
    }
}

enum Found {
    Stored(Stored),
    Missing,
    /// The server knows ids.
    NoNeed,
}
