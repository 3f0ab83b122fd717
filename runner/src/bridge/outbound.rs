//! Agent to spool: what the agent says, as messages that wait on disk to be pushed.
//!
//! In: the agent's stdout. Out: the [`Spool`], which [`Pusher`](push::Pusher) empties. A full spool
//! stops the reading, so the agent's pipe fills and the agent waits: nothing is dropped.

use std::sync::Arc;

use tokio::io::AsyncRead;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    OUTPUT_LIMIT, after,
    format::{self, Event},
    spool::{Outgoing, Spool},
};
use crate::agent::{AgentIo, mask::Masker};

mod lines;
pub(super) mod push;

/// Reads the agent's stdout to its end.
pub(super) struct Listener<R> {
    pub(super) stdout: R,
    /// Cancelled when the agent has ended: somebody else may still hold its stdout open.
    pub(super) agent_over: CancellationToken,
    pub(super) io: AgentIo,
    pub(super) masker: Masker,
    pub(super) spool: Arc<Spool>,
    /// After how many turns `turns_over` is cancelled; 0: never.
    pub(super) turns: u32,
    pub(super) turns_over: CancellationToken,
}

impl<R: AsyncRead + Unpin> Listener<R> {
    /// Until the end of the output. A read error counts as the end: a pipe has none that passes.
    pub(super) async fn run(self) {
        let mut lines = lines::Lines::new(self.stdout, self.masker.clone(), lines::LONGEST);
        let mut turns = 0;
        loop {
            let read = tokio::select! {
                biased;
                read = lines.next() => read,
                () = after(&self.agent_over, OUTPUT_LIMIT) => {
                    warn!("the agent has ended, but its output stays open; leaving it");
                    return;
                }
            };
            let piece = match read {
                Ok(Some(piece)) => piece,
                Ok(None) => return,
                Err(error) => {
                    warn!(%error, "cannot read the agent's output any more");
                    return;
                }
            };
            let said = format::from_agent(self.io, &piece);
            for (kind, payload) in said.events {
                // Again: JSON may have hidden a secret behind its escapes.
                let payload = self.masker.mask(&payload).into_owned();
                self.spool.append(Outgoing::new((kind, payload))).await;
            }
            if said.ends_turn {
                turns += 1;
                if turns == self.turns {
                    self.turns_over.cancel();
                }
            }
        }
    }
}

impl Outgoing {
    /// A message with an id of its own.
    pub(super) fn new((kind, payload): Event) -> Self {
        Self {
            id: uuid::Uuid::now_v7(),
            kind,
            payload,
        }
    }
}
