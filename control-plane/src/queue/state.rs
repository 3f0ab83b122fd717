//! What the queue knows: entries, when each is due, and which keys are worked on.
//!
//! Each step costs as much as a look-up in a sorted map, however many entries there are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    time::Duration,
};

use ambient_shared::retry::{Backoff, Policy};
use tokio::time::Instant;

use super::{
    Failed, Work,
    groups::{Group, Groups},
};

/// Shortest time from a first failure to the next try when a fresh mark asks for one; doubles with
/// each failure in a row. A handler that fails may cause the very event that marks it again.
const MARKED_PAUSE: Duration = Duration::from_millis(250);

/// What that grows to: how long news about an entry that keeps failing may have to wait.
pub(super) const MAX_MARKED_PAUSE: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct State<H: Work, K> {
    pub(super) entries: HashMap<(H, K), Entry>,
    shares: HashMap<H::Share, Share<H, K>>,
    processing: HashMap<K, Processing<H>>,
    /// When each entry that does not run is due.
    turns: HashMap<H, BTreeSet<Turn>>,
    last_turn: u64,
    pub(super) policy: Policy,
}

/// What one share of the workers is to do.
#[derive(Debug)]
struct Share<H, K> {
    /// What was not due yet when it was last looked at.
    later: BTreeMap<Turn, (H, K)>,
    due: Groups<(H, K)>,
}

impl<H, K> Default for Share<H, K> {
    fn default() -> Self {
        Self {
            later: BTreeMap::new(),
            due: Groups::default(),
        }
    }
}

/// A key that a handler runs for.
#[derive(Debug)]
struct Processing<H> {
    by: H,
    /// The key's due entries of other handlers.
    parked: Vec<H>,
}

/// When an entry is due; those due in the same moment keep the order in which they were marked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    pub(super) at: Instant,
    number: u64,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stage: Stage,
    group: Group,
    failures: Option<Failures>,
}

#[derive(Debug)]
pub(super) enum Stage {
    /// In its share.
    Waiting(Turn),
    /// Due, but its key is being processed; in `processing`.
    Parked(Turn),
    Running {
        /// Whether it was marked since it started, or was forgotten.
        marked: bool,
        /// Whether it is to be tried again when it fails.
        wanted: bool,
    },
}

#[derive(Debug)]
struct Failures {
    backoff: Backoff,
    count: u32,
    last: Instant,
}

impl Failures {
    /// From the last failure to the earliest next try that a mark can ask for.
    fn marked_pause(&self) -> Duration {
        let doublings = self.count.saturating_sub(1).min(8);
        (MARKED_PAUSE * 2_u32.pow(doublings)).min(MAX_MARKED_PAUSE)
    }
}

impl<H, K> State<H, K>
where
    H: Work,
    K: Clone + Eq + Hash,
{
    pub(super) fn new(policy: Policy) -> Self {
        Self {
            entries: HashMap::new(),
            shares: HashMap::new(),
            processing: HashMap::new(),
            turns: HashMap::new(),
            last_turn: 0,
            policy,
        }
    }

    pub(super) fn mark(&mut self, handler: H, key: &K, group: Group, now: Instant) {
        let Some(entry) = self.entries.get_mut(&(handler, key.clone())) else {
            self.wait(handler, key, now, group, None);
            return;
        };
        match &mut entry.stage {
            Stage::Running { marked, wanted } => (*marked, *wanted) = (true, true),
            // It is due already.
            Stage::Parked(_) => {}
            Stage::Waiting(turn) => {
                let turn = *turn;
                let Some(failures) = &entry.failures else {
                    return;
                };
                let earliest = now.max(failures.last + failures.marked_pause());
                if earliest < turn.at {
                    let failures = entry.failures.take();
                    // It is not due, so there.
                    self.share(handler).later.remove(&turn);
                    self.turns_of(handler).remove(&turn);
                    self.wait(handler, key, earliest, group, failures);
                }
            }
        }
    }

    /// The next entry of a share, unless its group has `most` runs; else when to look again.
    pub(super) fn take(
        &mut self,
        share: H::Share,
        most: usize,
        now: Instant,
    ) -> Result<(H, K), Option<Instant>> {
        self.ripen(share, now);
        let Some(its) = self.shares.get_mut(&share) else {
            return Err(None);
        };
        while let Some((group, turn, (handler, key))) = its.due.pop(most) {
            let Some(entry) = self.entries.get_mut(&(handler, key.clone())) else {
                continue;
            };
            if let Some(busy) = self.processing.get_mut(&key) {
                entry.stage = Stage::Parked(turn);
                busy.parked.push(handler);
                continue;
            }
            entry.stage = Stage::Running {
                marked: false,
                wanted: true,
            };
            let processing = Processing {
                by: handler,
                parked: Vec::new(),
            };
            self.processing.insert(key.clone(), processing);
            its.due.begin(&group);
            self.turns_of(handler).remove(&turn);
            return Ok((handler, key));
        }
        Err(its.later.first_key_value().map(|(turn, _)| turn.at))
    }

    /// Sorts what has become due into its groups.
    fn ripen(&mut self, share: H::Share, now: Instant) {
        let Some(its) = self.shares.get_mut(&share) else {
            return;
        };
        while let Some(first) = its.later.first_entry()
            && first.key().at <= now
        {
            let (turn, work) = first.remove_entry();
            if let Some(entry) = self.entries.get(&work) {
                its.due.add(&entry.group, turn, work);
            }
        }
    }

    pub(super) fn settle(
        &mut self,
        handler: H,
        key: &K,
        group: Group,
        success: bool,
        now: Instant,
    ) -> Option<Failed> {
        let processed = self.processing.remove(key);
        for parked in processed.into_iter().flat_map(|it| it.parked) {
            let work = (parked, key.clone());
            if let Some(entry) = self.entries.get_mut(&work)
                && let Stage::Parked(turn) = entry.stage
            {
                entry.stage = Stage::Waiting(turn);
                let group = entry.group.clone();
                self.share(parked).due.add(&group, turn, work);
            }
        }
        let entry = self.entries.remove(&(handler, key.clone()))?;
        self.share(handler).due.end(&entry.group);
        let Stage::Running { marked, wanted } = entry.stage else {
            return None;
        };
        if success || !wanted {
            if marked {
                self.wait(handler, key, now, group, None);
            }
            return None;
        }
        let mut failures = entry.failures.unwrap_or_else(|| Failures {
            backoff: Backoff::new(self.policy),
            count: 0,
            last: now,
        });
        failures.count += 1;
        failures.last = now;
        let mut wait = failures.backoff.next_wait();
        if marked {
            wait = wait.min(failures.marked_pause());
        }
        let failed = Failed {
            failures: failures.count,
            wait,
        };
        self.wait(handler, key, now + wait, group, Some(failures));
        Some(failed)
    }

    /// Forgets what waits in a share, and that what runs may have to run again.
    pub(super) fn clear(&mut self, share: H::Share) {
        let its = self.share_named(share);
        its.later.clear();
        its.due.clear();
        for processing in self.processing.values_mut() {
            processing.parked.retain(|it| it.share() != share);
        }
        self.turns.retain(|handler, _| handler.share() != share);
        self.entries.retain(|(handler, _), entry| {
            if handler.share() != share {
                return true;
            }
            entry.failures = None;
            match &mut entry.stage {
                Stage::Waiting(_) | Stage::Parked(_) => false,
                Stage::Running { marked, wanted } => {
                    (*marked, *wanted) = (false, false);
                    true
                }
            }
        });
    }

    /// Number of entries of a handler.
    pub(super) fn depth(&self, handler: H) -> usize {
        let running = self.processing.values().filter(|it| it.by == handler);
        running.count() + self.turns.get(&handler).map_or(0, BTreeSet::len)
    }

    /// Since when the oldest due entry of a handler is due.
    pub(super) fn oldest_due(&self, handler: H, now: Instant) -> Option<Instant> {
        let first = self.turns.get(&handler)?.first()?.at;
        (first <= now).then_some(first)
    }

    /// Makes an entry that is due at `at`.
    fn wait(&mut self, handler: H, key: &K, at: Instant, group: Group, failures: Option<Failures>) {
        self.last_turn += 1;
        let turn = Turn {
            at,
            number: self.last_turn,
        };
        let work = (handler, key.clone());
        let entry = Entry {
            stage: Stage::Waiting(turn),
            group,
            failures,
        };
        self.turns_of(handler).insert(turn);
        self.share(handler).later.insert(turn, work.clone());
        self.entries.insert(work, entry);
    }

    fn share(&mut self, handler: H) -> &mut Share<H, K> {
        self.share_named(handler.share())
    }

    fn share_named(&mut self, share: H::Share) -> &mut Share<H, K> {
        self.shares.entry(share).or_default()
    }

    fn turns_of(&mut self, handler: H) -> &mut BTreeSet<Turn> {
        self.turns.entry(handler).or_default()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        let is_empty = |share: &Share<H, K>| share.later.is_empty() && share.due.is_empty();
        self.entries.is_empty()
            && self.processing.is_empty()
            && self.turns.values().all(BTreeSet::is_empty)
            && self.shares.values().all(is_empty)
    }
}
