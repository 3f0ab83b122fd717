//! Server to agent: follows the session's messages and hands each user message over, once.
//!
//! In: the message stream, from the beginning at first. Out: lines on the agent's stdin, and a
//! record on the server of each that was handed over, so that a later runner does not do it again.
//! The feed and the hand-over run beside each other: the feed reads on while the agent is slow.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use ::metrics::counter;
use ambient_shared::exit::report;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::inbox::{Inbox, Next};
use super::{
    BridgeError, format,
    outbound::push::Started,
    remote::{Failure, Patience, Remote},
    spool::{Outgoing, Spool},
};
use crate::{agent::AgentIo, metrics};

pub(super) use self::inbox::Beginning;

mod inbox;

/// How often the stream of a server that drops messages for slow readers is begun anew, to get
/// what it may have dropped.
const RESYNC: Duration = Duration::from_mins(5);

/// A stream that lived this long was good: the next failure starts with the shortest wait.
const GOOD_STREAM: Duration = Duration::from_secs(10);

/// Hands messages to the agent through `W`, its stdin.
pub(super) struct Inbound<W> {
    pub(super) stdin: W,
    pub(super) io: AgentIo,
    pub(super) beginning: Beginning,
    pub(super) remote: Remote,
    pub(super) spool: Arc<Spool>,
    pub(super) started: watch::Receiver<Option<Started>>,
    /// The `seq` of the runner's first start message, once it is known.
    pub(super) runner_start: Arc<OnceLock<i64>>,
    /// Cancelled when the agent has taken enough turns: its stdin is closed.
    pub(super) turns_over: CancellationToken,
    /// Cancelled when nothing is to be handed over any more: stdin stays open.
    pub(super) stop: CancellationToken,
}

impl<W: AsyncWrite + Unpin> Inbound<W> {
    /// Until the agent's stdin is closed, or `stop`: then gives it back, still open.
    ///
    /// # Errors
    /// When the server does not let this session watch its messages.
    pub(super) async fn run(self) -> Result<Option<W>, BridgeError> {
        let shared = Shared {
            inbox: Mutex::new(Inbox::new(self.beginning)),
            changed: Notify::new(),
        };
        let feed = Feed {
            remote: self.remote,
            shared: &shared,
        };
        let mut handover = Handover {
            stdin: self.stdin,
            io: self.io,
            spool: self.spool,
            recording: JoinSet::new(),
            shared: &shared,
        };
        let followed = async {
            let mut started = self.started;
            let runner_start = self.runner_start;
            let start = started.wait_for(Option::is_some).await.map(|start| *start);
            match start {
                Ok(Some(start)) => {
                    let runner_start = *runner_start.get_or_init(|| start.seq);
                    feed.run(start, runner_start).await
                }
                // The pusher has ended, and so will the bridge.
                _ => std::future::pending().await,
            }
        };
        let keep_open = tokio::select! {
            () = handover.run() => false,
            () = self.turns_over.cancelled() => {
                info!("the agent took its turns; closing its stdin");
                false
            }
            () = self.stop.cancelled() => true,
            failed = followed => match failed {
                Ok(never) => match never {},
                Err(error) => return Err(error),
            },
        };
        handover.recorded().await;
        Ok(keep_open.then_some(handover.stdin))
    }
}

/// What feed and hand-over share.
struct Shared {
    inbox: Mutex<Inbox>,
    changed: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `pick` finds something in the inbox.
    async fn wait_for<T>(&self, pick: impl Fn(&Inbox) -> Option<T>) -> T {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(found) = pick(&self.lock()) {
                return found;
            }
            changed.await;
        }
    }
}

struct Feed<'a> {
    remote: Remote,
    shared: &'a Shared,
}

/// Why a stream is followed no longer.
enum StreamEnd {
    Failed(Failure),
    /// The server ended it in order.
    Ended,
    /// To read again what was forgotten, or may have been dropped.
    Reread,
}

impl Feed<'_> {
    async fn run(&self, start: Started, runner_start: i64) -> Result<Infallible, BridgeError> {
        self.shared.lock().start(start, runner_start);
        let resync = (!start.knows_ids).then_some(RESYNC);
        let mut patience = Patience::new();
        loop {
            let after = self.shared.lock().resume_from();
            debug!(after, "watching messages");
            let opened = Instant::now();
            let mut any_new = false;
            let end = tokio::select! {
                end = self.follow(after, &mut any_new) => end,
                () = self.shared.wait_for(|inbox| inbox.wants_to_reread().then_some(())) => {
                    StreamEnd::Reread
                }
                () = wait(resync) => StreamEnd::Reread,
            };
            if any_new || opened.elapsed() >= GOOD_STREAM {
                patience.reset();
            }
            let failure = match end {
                StreamEnd::Reread => continue,
                StreamEnd::Ended => {
                    let ended = tonic::Status::unavailable("the server ended the stream");
                    Failure::NotDone(Box::new(ended))
                }
                StreamEnd::Failed(failure) => failure,
            };
            self.remote
                .before_retry("watch", failure, &mut patience)
                .await?;
        }
    }

    async fn follow(&self, after: i64, any_new: &mut bool) -> StreamEnd {
        let mut stream = match self.remote.watch(after).await {
            Ok(stream) => stream,
            Err(failure) => return StreamEnd::Failed(failure),
        };
        loop {
            match stream.next().await {
                Ok(Some(message)) => {
                    *any_new |= self.shared.lock().receive(&message);
                    self.shared.changed.notify_waiters();
                }
                Ok(None) => return StreamEnd::Ended,
                Err(failure) => return StreamEnd::Failed(failure),
            }
        }
    }
}

/// For ever when there is no limit.
async fn wait(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

struct Handover<'a, W> {
    stdin: W,
    io: AgentIo,
    spool: Arc<Spool>,
    /// Puts into the spool what was handed over: a task, so that being cut off neither loses a
    /// record nor makes a second one. At most one at a time.
    recording: JoinSet<()>,
    shared: &'a Shared,
}

impl<W: AsyncWrite + Unpin> Handover<'_, W> {
    /// Until stdin is to be closed, or the agent has closed it.
    async fn run(&mut self) {
        loop {
            let next = self.shared.wait_for(Inbox::next).await;
            let (seq, closes) = match next {
                Next::Message { seq, text } => {
                    let line = format::to_agent(self.io, &text);
                    if let Err(error) = self.write(line.as_bytes()).await {
                        // What it did not take waits for the next agent.
                        warn!(error = %report(&error), "the agent reads no more messages");
                        return;
                    }
                    counter!(metrics::MESSAGES_IN).increment(1);
                    debug!(seq, bytes = line.len(), "message handed over");
                    (seq, false)
                }
                Next::Close { seq } => (seq, true),
            };
            let (spool, record) = (Arc::clone(&self.spool), format::delivered(seq));
            self.recording
                .spawn(async move { spool.append(Outgoing::new(record)).await });
            self.shared.lock().done(seq);
            self.shared.changed.notify_waiters();
            self.recorded().await;
            if closes {
                info!("end of input; closing the agent's stdin");
                return;
            }
        }
    }

    /// Waits until the record of the last hand-over is kept. May be cut off and called again.
    async fn recorded(&mut self) {
        while self.recording.join_next().await.is_some() {}
    }

    async fn write(&mut self, line: &[u8]) -> std::io::Result<()> {
        self.stdin.write_all(line).await?;
        self.stdin.flush().await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ambient_shared::{proto::SessionMessage, session::SessionId};
    use futures_util::poll;
    use tokio::{io::AsyncReadExt as _, time::timeout};

    use super::*;
    use crate::bridge::spool::{CAPACITY, tests::with_a_slow_disk};

    /// Shares an inbox with one message, whose `seq` is 5.
    fn one_message() -> Shared {
        let mut inbox = Inbox::new(Beginning::default());
        let (seq, knows_ids) = (1, true);
        inbox.start(Started { seq, knows_ids }, seq);
        inbox.receive(&SessionMessage {
            id: "the only one".to_owned(),
            seq: 5,
            event_type: "user".to_owned(),
            payload: "hello".to_owned(),
            ..SessionMessage::default()
        });
        Shared {
            inbox: Mutex::new(inbox),
            changed: Notify::new(),
        }
    }

    #[test]
    fn cut_off_while_its_record_is_kept_a_hand_over_is_recorded_once() {
        with_a_slow_disk(|disk| async move {
            let dir = tempfile::tempdir().unwrap();
            let session = SessionId::parse("session-of-inbound-tests").unwrap();
            let spool = Arc::new(Spool::open(dir.path(), &session, CAPACITY).unwrap());
            let shared = one_message();
            let (stdin, mut agent) = tokio::io::duplex(64);
            let mut handover = Handover {
                stdin,
                io: AgentIo::Lines,
                spool: Arc::clone(&spool),
                recording: JoinSet::new(),
                shared: &shared,
            };
            // Long enough for the record to be on its way to the disk, which takes none yet.
            let cut_off = timeout(Duration::from_millis(50), handover.run()).await;
            assert!(cut_off.is_err());
            let mut line = [0; 6];
            agent.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"hello\n");
            {
                let recorded = handover.recorded();
                tokio::pin!(recorded);
                assert!(poll!(&mut recorded).is_pending());
                drop(disk);
                recorded.await;
            }
            let record = spool.head().await.unwrap();
            assert_eq!(record.message.payload, format::delivered(5).1);
            assert_eq!(spool.waiting().await.0, 1, "recorded more than once");
        });
    }
}
