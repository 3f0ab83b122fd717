//! What is to be handed to the agent: pure state between the feed and the hand-over.
//!
//! The feed tells it every message of the stream, as often as it comes. Out come user messages
//! that nobody handed over yet, in order of `seq`, each once. It holds a bounded part of them: what
//! comes beyond is forgotten and read again ([`Inbox::resume_from`]) once that part is handed over,
//! so a slow agent never makes the feed stop reading, which an existing server answers by dropping
//! messages.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use ambient_shared::proto::SessionMessage;

use crate::bridge::{
    format::{self, Control},
    outbound::push::Started,
};

/// An existing server gives a message its number before it commits it, so numbers may appear out of
/// order. It takes less than this from one to the other: a message this much older than the newest
/// has none before it that is still to come.
const SETTLED_SECONDS: i64 = 60;

/// How much is held.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// User messages that wait for the agent, and ends of input.
    messages: usize,
    /// Of the messages that wait.
    bytes: usize,
    /// Ids that are remembered to know a message that comes again. They are of user messages since
    /// the last reconnect; beyond this the oldest are forgotten, and not read again.
    seen: usize,
}

impl Default for Limits {
    /// More than a person types ahead, four of the longest messages, and ids for a minute in which
    /// eight hundred a second come.
    fn default() -> Self {
        Self {
            messages: 1000,
            bytes: 4 * 1024 * 1024,
            seen: 50_000,
        }
    }
}

/// What an agent is told at its start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::bridge) struct Beginning {
    /// Handed over when there is no user message.
    pub(in crate::bridge) prompt: Option<String>,
    /// Put before the first user message.
    pub(in crate::bridge) preamble: Option<String>,
    /// Whether the session was started before: then neither is.
    pub(in crate::bridge) is_resume: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Next {
    /// Hand this text over; `seq` 0 is the initial prompt.
    Message { seq: i64, text: String },
    /// Close the agent's stdin, as the message with this `seq` says.
    Close { seq: i64 },
}

#[derive(Debug, Default)]
pub(super) struct Inbox {
    beginning: Beginning,
    limits: Limits,
    /// Set once the stream is followed.
    start: Option<Started>,
    /// What comes before this `seq` is of earlier runners.
    runner_start: i64,
    /// Whether all that earlier runners recorded was seen.
    replayed: bool,
    /// Whether there was a user message when this agent was started.
    any_user: bool,
    any_delivered: bool,

    waiting: BTreeMap<i64, String>,
    waiting_bytes: usize,
    /// Seqs of requests to close the agent's stdin.
    closing: BTreeSet<i64>,
    /// Everything after this must be read again.
    horizon: Option<i64>,

    seen: BTreeMap<i64, String>,
    seen_ids: HashSet<String>,

    settled: Settled,
    /// Up to here nothing is missing, even if the server dropped messages since.
    complete: i64,
    /// The newest `seq` at the last reconnect: once it is reached, the replay is over.
    target: Option<i64>,
    /// How far that replay has come.
    reached: i64,
    /// Ids up to here are forgotten, so it is never watched from before.
    forgotten: i64,
}

impl Inbox {
    pub(super) fn new(beginning: Beginning) -> Self {
        Self {
            beginning,
            ..Self::default()
        }
    }

    /// The stream is about to be followed.
    pub(super) fn start(&mut self, start: Started, runner_start: i64) {
        self.start = Some(start);
        self.runner_start = runner_start;
    }

    /// The `seq` after which to watch from now on.
    ///
    /// A little back, and with a server that drops messages for slow readers: from where the replay
    /// before is known to have given all.
    pub(super) fn resume_from(&mut self) -> i64 {
        let start = self.start.map_or(0, |start| start.seq);
        let mut from = if self.start.is_some_and(|start| !start.knows_ids) {
            self.complete
        } else {
            self.settled.seq
        };
        if self.target.is_some() {
            // The replay broke off: what it did not reach may have been passed by before.
            from = from.min(self.reached);
        }
        if let Some(horizon) = self.horizon.take() {
            from = from.min(horizon);
            // Records of what earlier runners handed over were passed by too.
            self.replayed &= horizon >= start;
        }
        self.forget_seen(from);
        from = from.max(self.forgotten);
        self.target = Some(self.settled.newest.max(start));
        self.reached = from;
        from
    }

    /// Whether to reconnect now, as there is room for what was forgotten.
    pub(super) fn wants_to_reread(&self) -> bool {
        self.replayed && self.horizon.is_some() && self.waiting.is_empty()
    }

    /// A message of the stream. Gives whether it is newer than all before.
    pub(super) fn receive(&mut self, message: &SessionMessage) -> bool {
        if self.target.is_some_and(|target| message.seq >= target) {
            // The stream so far was the replay, in which nothing is missing.
            self.complete = self.complete.max(self.settled.seq);
            self.target = None;
        }
        if self.target.is_some() {
            self.reached = self.reached.max(message.seq);
        }
        if self.start.is_some_and(|start| message.seq >= start.seq) {
            self.replayed = true;
        }
        let is_new = message.seq > self.settled.newest;
        match message.event_type.as_str() {
            "user" => self.receive_user(message),
            "system" => match format::control(&message.payload) {
                Some(Control::Delivered(seq)) => {
                    self.was_delivered(seq);
                    // An end of input that an earlier start of the session had ended that start
                    // alone; one that an agent of this runner had holds for its next agent too.
                    if self.beginning.is_resume && message.seq < self.runner_start {
                        self.closing.remove(&seq);
                    }
                }
                Some(Control::InputClosed) => self.receive_close(message),
                None => {}
            },
            _ => {}
        }
        let created = message.created_at.as_ref().map(|at| at.seconds);
        self.settled.add(message.seq, created);
        is_new
    }

    fn receive_user(&mut self, message: &SessionMessage) {
        // One that came later, though it may be read in one go, does not stand for the prompt.
        self.any_user |= self.start.is_some_and(|start| message.seq < start.seq);
        if !self.is_first_time(message) {
            return;
        }
        let text = format::user_text(&message.payload).into_owned();
        self.waiting_bytes += text.len();
        self.waiting.insert(message.seq, text);
        while self.waiting.len() > self.limits.messages
            || (self.waiting_bytes > self.limits.bytes && self.waiting.len() > 1)
        {
            let Some((seq, text)) = self.waiting.pop_last() else {
                return;
            };
            self.waiting_bytes -= text.len();
            self.forget_waiting_from(seq);
        }
    }

    fn receive_close(&mut self, message: &SessionMessage) {
        if !self.is_first_time(message) {
            return;
        }
        self.closing.insert(message.seq);
        if self.closing.len() > self.limits.messages
            && let Some(&last) = self.closing.last()
        {
            self.forget_waiting_from(last);
        }
    }

    /// False for what was seen before, and for what is beyond the horizon.
    fn is_first_time(&mut self, message: &SessionMessage) -> bool {
        let beyond = self.horizon.is_some_and(|horizon| message.seq > horizon);
        if beyond || !self.seen_ids.insert(message.id.clone()) {
            return false;
        }
        self.seen.insert(message.seq, message.id.clone());
        self.forget_seen(0);
        true
    }

    /// As if nothing that waits from this `seq` on had been received. What was handed over
    /// already, out of order, stays known.
    fn forget_waiting_from(&mut self, seq: i64) {
        self.horizon = Some(seq - 1);
        let mut forgotten = self.closing.split_off(&seq);
        forgotten.insert(seq);
        for (seq, text) in self.waiting.split_off(&seq) {
            self.waiting_bytes -= text.len();
            forgotten.insert(seq);
        }
        for seq in forgotten {
            if let Some(id) = self.seen.remove(&seq) {
                self.seen_ids.remove(&id);
            }
        }
    }

    fn was_delivered(&mut self, seq: i64) {
        self.any_delivered = true;
        if let Some(text) = self.waiting.remove(&seq) {
            self.waiting_bytes -= text.len();
        }
    }

    /// What to do next, if there is something to do. The same until [`Inbox::done`].
    pub(super) fn next(&self) -> Option<Next> {
        if !self.replayed {
            return None;
        }
        let is_fresh = !self.beginning.is_resume && !self.any_delivered;
        if let (true, false, Some(prompt)) = (is_fresh, self.any_user, &self.beginning.prompt) {
            let text = prompt.clone();
            return Some(Next::Message { seq: 0, text });
        }
        let close = self.closing.first().copied();
        let message = self.waiting.first_key_value();
        if let Some((&seq, text)) = message.filter(|(seq, _)| close.is_none_or(|at| **seq < at)) {
            let preamble = self.beginning.preamble.as_ref().filter(|_| is_fresh);
            let text = match preamble {
                Some(preamble) => format!("{preamble}\n\n{text}"),
                None => text.clone(),
            };
            return Some(Next::Message { seq, text });
        }
        close.map(|seq| Next::Close { seq })
    }

    /// The message with this `seq` was handed over.
    pub(super) fn done(&mut self, seq: i64) {
        self.was_delivered(seq);
    }

    /// Forgets ids that no later replay brings again: none starts before this one, or before the
    /// oldest of those that there is room for.
    fn forget_seen(&mut self, from: i64) {
        while let Some((&seq, _)) = self.seen.first_key_value()
            && (seq <= from || self.seen.len() > self.limits.seen)
        {
            self.forgotten = self.forgotten.max(seq);
            if let Some(id) = self.seen.remove(&seq) {
                self.seen_ids.remove(&id);
            }
        }
    }
}

/// The newest `seq` that is old enough, by the server's clock alone: ours may differ.
#[derive(Debug, Default)]
struct Settled {
    seq: i64,
    newest: i64,
    /// The newest `seq` of each second that is not old enough yet: at most [`SETTLED_SECONDS`].
    by_second: BTreeMap<i64, i64>,
}

impl Settled {
    fn add(&mut self, seq: i64, created_second: Option<i64>) {
        self.newest = self.newest.max(seq);
        let Some(second) = created_second else { return };
        let newest = self.by_second.entry(second).or_insert(seq);
        *newest = seq.max(*newest);
        let Some((&latest, _)) = self.by_second.last_key_value() else {
            return;
        };
        while let Some(first) = self.by_second.first_entry()
            && *first.key() <= latest - SETTLED_SECONDS
        {
            self.seq = self.seq.max(first.remove());
        }
    }
}

#[cfg(test)]
mod tests;
