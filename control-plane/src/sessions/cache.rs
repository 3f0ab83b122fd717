//! Current sessions and tombstones.
//!
//! In: snapshots from events, lists and single reads, in any order. Out: the newest of each. Two
//! things order snapshots: the API server's `updated_at`, and the cache's own [`Revision`], which
//! says whether an entry has changed since a read began. What they leave open is
//! [`Applied::Suspect`]: a single read, begun now, decides.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use ambient_shared::{phase::Phase, session::SessionId};
use tokio::{sync::watch, time::Instant};

use super::Session;

/// The newest known object of each session, one entry for each session that the API server has.
/// Clones share it.
#[derive(Clone)]
pub struct SessionCache(Arc<Shared>);

struct Shared {
    state: RwLock<State>,
    synced: watch::Sender<bool>,
    /// Why sessions could not be listed or watched at last.
    trouble: Mutex<Option<String>>,
}

#[derive(Default)]
struct State {
    entries: HashMap<SessionId, Entry>,
    revision: u64,
    /// When the watch whose events arrive was opened.
    watching_since: Revision,
}

struct Entry {
    /// When it last changed.
    revision: Revision,
    /// Since when it has been seen to wait for a run; none when it does not.
    waiting_since: Option<Instant>,
    what: What,
}

enum What {
    Live(Arc<Session>),
    /// Deleted at the entry's revision.
    Tombstone {
        /// Its project, when that was known.
        project: Option<Arc<str>>,
        /// Whether nothing of it is left in the backend.
        cleaned: bool,
        /// Whether an event told of it: then the watch has no older event of it on the way.
        told: bool,
    },
}

/// A moment in the cache's life: before or after each change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Revision(u64);

/// What became of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    /// It is the current object now.
    Changed,
    /// It says what was known, or less.
    Nothing,
    /// It contradicts what is known, and which is right only the API server can say.
    Suspect,
}

/// What became of the answer to a single read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Confirmed {
    /// The entry says what the answer says.
    Settled {
        /// Whether that changed it.
        changed: bool,
    },
    /// The entry changed while the question was under way: ask again.
    Overtaken,
}

impl SessionCache {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            state: RwLock::default(),
            synced: watch::Sender::new(false),
            trouble: Mutex::default(),
        }))
    }

    /// The session's current object; none when it is unknown or deleted.
    pub fn get(&self, id: &SessionId) -> Option<Arc<Session>> {
        match &self.read().entries.get(id)?.what {
            What::Live(session) => Some(Arc::clone(session)),
            What::Tombstone { .. } => None,
        }
    }

    /// Since when this control plane has seen the session wait for a run.
    pub(crate) fn waiting_since(&self, id: &SessionId) -> Option<Instant> {
        self.read().entries.get(id)?.waiting_since
    }

    /// The project of a session, also of one that was deleted.
    pub(crate) fn project(&self, id: &SessionId) -> Option<Arc<str>> {
        self.read().project(id)
    }

    /// Whether the session is known to be deleted. Not for ever: once it is cleaned up and cannot
    /// come back by a late answer, it is forgotten.
    pub fn is_deleted(&self, id: &SessionId) -> bool {
        let state = self.read();
        let entry = state.entries.get(id);
        entry.is_some_and(|entry| matches!(entry.what, What::Tombstone { .. }))
    }

    /// Whether a complete list has been seen since the start: only then does an unknown session
    /// not exist, as far as the cache can say.
    pub fn is_synced(&self) -> bool {
        *self.0.synced.borrow()
    }

    /// Why sessions could not be listed or watched when that was last tried in vain.
    pub(crate) fn trouble(&self) -> Option<String> {
        let trouble = self.0.trouble.lock();
        trouble.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// That they could not.
    pub(crate) fn troubled(&self, why: String) {
        let mut trouble = self
            .0
            .trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(why);
    }

    /// Waits until [`SessionCache::is_synced`].
    pub async fn synced(&self) {
        // The sender lives in self: this cannot fail.
        let _ = self.0.synced.subscribe().wait_for(|synced| *synced).await;
    }

    /// All sessions that are not deleted.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        let live = |entry: &Entry| match &entry.what {
            What::Live(session) => Some(Arc::clone(session)),
            What::Tombstone { .. } => None,
        };
        self.read().entries.values().filter_map(live).collect()
    }

    /// Whether the cache has an entry, tombstones included.
    pub(crate) fn knows(&self, id: &SessionId) -> bool {
        self.read().entries.contains_key(id)
    }

    /// Whether the session is deleted and nothing of it was left in the backend.
    pub(crate) fn is_cleaned(&self, id: &SessionId) -> bool {
        let state = self.read();
        let entry = state.entries.get(id);
        entry.is_some_and(|entry| matches!(entry.what, What::Tombstone { cleaned: true, .. }))
    }

    /// Deleted sessions that are still to be cleaned up.
    pub(crate) fn uncleaned(&self) -> Vec<SessionId> {
        let state = self.read();
        let uncleaned = |(id, entry): (&SessionId, &Entry)| {
            matches!(entry.what, What::Tombstone { cleaned: false, .. }).then(|| id.clone())
        };
        state.entries.iter().filter_map(uncleaned).collect()
    }

    /// The present moment, to be noted before a question is asked.
    pub(crate) fn revision(&self) -> Revision {
        Revision(self.read().revision)
    }

    /// Takes an event's object. Events come in order, so of two with the same time the later
    /// counts.
    pub(crate) fn apply_event(&self, session: Session) -> Applied {
        self.write().apply(session, None)
    }

    /// Takes an object that was read by a list or came as the answer to a write that began at
    /// `since`: never in place of what has changed after that, unless its own time is later.
    pub(crate) fn apply_read(&self, session: Session, since: Revision) -> Applied {
        self.write().apply(session, Some(since))
    }

    /// Takes the answer to a single read that began at `since`; `None` is "there is none". What
    /// has not changed since is then what the answer says, whatever the times.
    pub(crate) fn confirm(
        &self,
        id: &SessionId,
        answer: Option<Session>,
        since: Revision,
    ) -> Confirmed {
        let mut state = self.write();
        let entry = state.entries.get(id);
        let overtaken = entry.is_some_and(|entry| entry.revision > since);
        let changed = match (answer, entry.map(|entry| &entry.what)) {
            (Some(session), _) if overtaken => match state.apply(session, Some(since)) {
                Applied::Changed => true,
                Applied::Nothing => false,
                Applied::Suspect => return Confirmed::Overtaken,
            },
            (None, Some(What::Live(_))) if overtaken => return Confirmed::Overtaken,
            (None, Some(What::Tombstone { .. })) => false,
            (Some(session), Some(What::Live(known))) if **known == session => false,
            (Some(session), _) => {
                state.set(id.clone(), What::Live(Arc::new(session)));
                true
            }
            (None, _) => {
                state.bury(id, false);
                true
            }
        };
        Confirmed::Settled { changed }
    }

    /// An event says that the session was deleted. Says whether that is news.
    pub(crate) fn delete(&self, id: &SessionId) -> bool {
        let mut state = self.write();
        if let Some(entry) = state.entries.get_mut(id)
            && let What::Tombstone { told, .. } = &mut entry.what
        {
            *told = true;
            return false;
        }
        state.bury(id, true);
        true
    }

    /// From now on events are those of a new watch: none is older than this moment.
    pub(crate) fn watch_opened(&self) {
        let mut state = self.write();
        state.watching_since = Revision(state.revision);
    }

    /// Nothing of a deleted session is left. It is forgotten with a complete list that began after
    /// its deletion, once no older event of it can be on the way.
    pub(crate) fn set_cleaned(&self, id: &SessionId) {
        // The revision stays: it is that of the deletion.
        if let Some(entry) = self.write().entries.get_mut(id)
            && let What::Tombstone { cleaned, .. } = &mut entry.what
        {
            *cleaned = true;
        }
    }

    /// A list that began at `since` is complete and had these sessions. Forgets tombstones that
    /// nothing late can bring back, and gives the sessions that should have been listed but were not:
    /// deleted, or missed by pages that shifted.
    ///
    /// Lists come one at a time: of two at once, the older could bring back what the newer has
    /// made forgotten.
    pub(crate) fn complete_list(
        &self,
        seen: &HashSet<SessionId>,
        since: Revision,
    ) -> Vec<SessionId> {
        let mut state = self.write();
        let mut missing = Vec::new();
        let watching_since = state.watching_since;
        state.entries.retain(|id, entry| match &entry.what {
            What::Live(_) => {
                if entry.revision <= since && !seen.contains(id) {
                    missing.push(id.clone());
                }
                true
            }
            What::Tombstone { cleaned, told, .. } => {
                let a_page_may_come = entry.revision > since;
                let an_event_may_come = !told && entry.revision > watching_since;
                // One that the list had is about to be asked for: keep it for the answer.
                !cleaned || a_page_may_come || an_event_may_come || seen.contains(id)
            }
        });
        drop(state);
        self.0.synced.send_replace(true);
        missing
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for SessionCache {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    fn set(&mut self, id: SessionId, what: What) {
        self.revision += 1;
        let waiting_since = waiting(&what).map(|generation| {
            let before = self.entries.get(&id);
            let before = before.filter(|entry| waiting(&entry.what) == Some(generation));
            before
                .and_then(|entry| entry.waiting_since)
                .unwrap_or_else(Instant::now)
        });
        let entry = Entry {
            revision: Revision(self.revision),
            waiting_since,
            what,
        };
        self.entries.insert(id, entry);
    }

    fn project(&self, id: &SessionId) -> Option<Arc<str>> {
        match &self.entries.get(id)?.what {
            What::Live(session) => session.object.project_id.as_deref().map(Arc::from),
            What::Tombstone { project, .. } => project.clone(),
        }
    }

    /// Notes that a session was deleted.
    fn bury(&mut self, id: &SessionId, told: bool) {
        let what = What::Tombstone {
            project: self.project(id),
            cleaned: false,
            told,
        };
        self.set(id.clone(), what);
    }

    /// `since` is none for events, which are newer than all that was seen before.
    fn apply(&mut self, session: Session, since: Option<Revision>) -> Applied {
        let Some(entry) = self.entries.get(&session.id) else {
            self.set(session.id.clone(), What::Live(Arc::new(session)));
            return Applied::Changed;
        };
        let overtaken = since.is_some_and(|since| entry.revision > since);
        let What::Live(known) = &entry.what else {
            return if overtaken {
                Applied::Nothing
            } else {
                Applied::Suspect
            };
        };
        if **known == session {
            return Applied::Nothing;
        }
        let replaces = match (session.updated_at(), known.updated_at()) {
            (Some(new), Some(old)) if new > old => true,
            (Some(new), Some(old)) if new < old => {
                // Clocks of two API servers may differ: only a read that began later can tell.
                return if overtaken {
                    Applied::Nothing
                } else {
                    Applied::Suspect
                };
            }
            // The same time, or none: what came first was read first.
            _ => !overtaken,
        };
        if !replaces {
            return Applied::Nothing;
        }
        self.set(session.id.clone(), What::Live(Arc::new(session)));
        Applied::Changed
    }
}

/// The generation of a session that waits for a run.
fn waiting(what: &What) -> Option<u32> {
    match what {
        What::Live(session) if matches!(session.phase, Phase::Pending | Phase::Creating) => {
            Some(session.generation)
        }
        What::Live(_) | What::Tombstone { .. } => None,
    }
}

#[cfg(test)]
mod tests;
