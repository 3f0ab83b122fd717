//! What was last seen of the sessions' objects.
//!
//! In: lists and events of each namespace's watches, and the answers to our own writes, which come
//! before their events. Out: each session's run and token, without a question to the API server; the
//! observer is told of each change, and the repairs of each damage.
//!
//! What cannot be seen is not taken for gone: a session whose namespace has not been listed is
//! [`RunStatus::Unknown`], and whoever was told so is told again once it has.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use ambient_shared::{clock::Clock, session::SessionId};
use tokio::{sync::watch, time::timeout};

use super::repair::{Repair, Share};
use crate::{
    backend::{Observer, RunState, RunStatus, TokenTimes},
    queue::{Work as _, WorkQueue},
};
pub(crate) use state::Found;
use state::{State, Touched};

mod entry;
pub(super) mod facts;
mod state;

pub(super) use entry::Entry;
use facts::{Kind, Sighting};

/// Gives the project of a session, when it is known.
pub type ProjectOf = Arc<dyn Fn(&SessionId) -> Option<String> + Send + Sync>;

/// Gives the namespace of a project.
pub(super) type NamespaceOf = Arc<dyn Fn(&str) -> String + Send + Sync>;

/// This replica mends what is damaged, until this is dropped.
#[must_use]
pub(super) struct Mending<'a>(&'a Seen);

/// Everything seen.
pub(super) struct Seen {
    state: Mutex<State>,
    project_of: ProjectOf,
    namespace_of: NamespaceOf,
    observer: Observer,
    repairs: WorkQueue<Repair, SessionId>,
    /// Whether this replica mends what it finds damaged.
    mends: AtomicBool,
    clock: Clock,
    /// Raised with each change of which namespaces there are, and of what has been listed.
    progress: watch::Sender<u64>,
}

impl Seen {
    pub(super) fn new(
        project_of: ProjectOf,
        namespace_of: NamespaceOf,
        observer: Observer,
        repairs: WorkQueue<Repair, SessionId>,
        clock: Clock,
    ) -> Self {
        Self {
            state: Mutex::default(),
            project_of,
            namespace_of,
            observer,
            repairs,
            mends: AtomicBool::new(false),
            clock,
            progress: watch::Sender::new(0),
        }
    }

    /// The session's run.
    pub(super) fn run_state(&self, id: &SessionId) -> Option<RunState> {
        let home = self.home(id);
        let now = self.clock.now();
        let mut state = self.lock();
        let Some(home) = home else {
            // Deleted, or not of this API server: wherever it is.
            let homes = state.homes.get(id)?;
            let mut runs = homes
                .iter()
                .filter_map(|home| state.entry(home, id)?.run(home, now));
            return runs.next();
        };
        if let Some(run) = state.entry(&home, id).and_then(|it| it.run(&home, now)) {
            return Some(run);
        }
        let (is_listed, is_absent) = (state.listed, state.absent.contains(&home));
        match state.namespaces.get_mut(&home) {
            Some(namespace) if namespace.present && !namespace.has_listed(Kind::Pod) => {
                namespace.told_unknown.insert(id.clone());
            }
            None if !is_listed => {
                state.told_unknown.insert(id.clone());
            }
            // It may have lost our labels, and not our sessions.
            None if !is_absent => {
                state.told_unknown.insert(id.clone());
                if state.unfound.insert(home.clone()) {
                    self.raise();
                }
            }
            Some(_) | None => return None,
        }
        Some(RunState {
            generation: 0,
            status: RunStatus::Unknown,
            namespace: Some(home),
            keypair: None,
        })
    }

    /// The token in the session's Secret; none when there is none, or somebody else's.
    pub(super) fn token_times(&self, id: &SessionId) -> Option<TokenTimes> {
        let home = self.namespace(id)?;
        self.lock().entry(&home, id)?.token_times()
    }

    /// All sessions that there is anything of.
    pub(super) fn sessions(&self) -> Vec<SessionId> {
        self.lock().homes.keys().cloned().collect()
    }

    /// What there is of the session, in each namespace.
    pub(super) fn everywhere(&self, id: &SessionId) -> Vec<(String, Entry)> {
        let state = self.lock();
        let homes = state.homes.get(id).into_iter().flatten();
        homes
            .filter_map(|home| Some((home.clone(), state.entry(home, id)?.clone())))
            .collect()
    }

    /// What there is of the session in this namespace.
    pub(super) fn entry(&self, namespace: &str, id: &SessionId) -> Entry {
        self.lock()
            .entry(namespace, id)
            .cloned()
            .unwrap_or_default()
    }

    /// The namespace that the session is to be in; where it is, when its project is not known.
    pub(super) fn namespace(&self, id: &SessionId) -> Option<String> {
        self.home(id)
            .or_else(|| self.lock().homes.get(id)?.first().cloned())
    }

    /// The session's project, when it is known.
    pub(super) fn project_of(&self) -> ProjectOf {
        Arc::clone(&self.project_of)
    }

    fn home(&self, id: &SessionId) -> Option<String> {
        let project = (self.project_of)(id)?;
        Some((self.namespace_of)(&project))
    }

    /// The namespaces that are to be watched, each with its epoch: another one of the same name has
    /// another.
    pub(super) fn namespaces(&self) -> Vec<(String, u64)> {
        let state = self.lock();
        let present = state.namespaces.iter().filter(|(_, it)| it.present);
        present.map(|(name, it)| (name.clone(), it.epoch)).collect()
    }

    /// Namespaces of sessions of which is to be found out whether they are there.
    pub(super) fn unfound(&self) -> Vec<String> {
        self.lock().unfound.iter().cloned().collect()
    }

    /// A namespace is not there, or none of ours.
    pub(super) fn namespace_absent(&self, name: &str) {
        self.change(|state| {
            state.unfound.remove(name);
            state.absent.insert(name.to_owned());
            state.told_unknown.drain().collect()
        });
    }

    /// Raised with each change of that, and of what has been listed.
    pub(super) fn progress(&self) -> watch::Receiver<u64> {
        self.progress.subscribe()
    }

    /// A complete list of namespaces. Gives those that are watched but are not in it.
    pub(super) fn namespaces_listed(&self, all: &[Found]) -> Vec<String> {
        let now = self.clock.now();
        self.change(|state| {
            state.absent.clear();
            state.listed = true;
            let news = all.iter().filter_map(|found| state.arrive(found, now));
            let mut touched: Touched = news.flatten().collect();
            touched.extend(state.told_unknown.drain());
            touched
        });
        self.raise();
        let watched = self.namespaces().into_iter().map(|(name, _)| name);
        watched
            .filter(|name| all.iter().all(|found| found.name != *name))
            .collect()
    }

    /// There is such a namespace.
    pub(super) fn namespace_seen(&self, found: &Found) {
        let now = self.clock.now();
        let mut is_news = false;
        self.change(|state| {
            let news = state.arrive(found, now);
            is_news = news.is_some();
            news.unwrap_or_default()
        });
        if is_news {
            self.raise();
        }
    }

    /// A namespace is gone, with all that was in it by its version.
    pub(super) fn namespace_gone(&self, gone: &Found) {
        let now = self.clock.now();
        self.change(|state| state.leave(gone, now));
        self.raise();
    }

    /// A watch cannot be had now.
    pub(super) fn failed(&self, namespace: &str, kind: Kind) {
        self.lock().fail(namespace, kind);
        self.raise();
    }

    /// Whether pods of this namespace can be seen.
    pub(super) fn is_listed(&self, namespace: &str) -> bool {
        let state = self.lock();
        let namespace = state.namespaces.get(namespace);
        namespace.is_some_and(|it| it.present && it.has_listed(Kind::Pod))
    }

    /// Whether nothing is being waited for: what there is has been listed, or cannot be.
    pub(super) fn is_settled(&self) -> bool {
        let state = self.lock();
        let mut present = state.namespaces.values().filter(|it| it.present);
        state.listed && present.all(|it| Kind::ALL.iter().all(|kind| it.is_settled(*kind)))
    }

    /// Whether all pods and Secrets that there are have been seen.
    pub(super) fn sees_all(&self) -> bool {
        let state = self.lock();
        let mut present = state.namespaces.values().filter(|it| it.present);
        let kinds = [Kind::Pod, Kind::Secret];
        state.listed
            && state.unfound.is_empty()
            && present.all(|it| kinds.iter().all(|kind| it.has_listed(*kind)))
    }

    /// Whether these kinds have been listed in a namespace, or cannot be.
    pub(super) fn are_settled(&self, namespace: &str, kinds: &[Kind]) -> bool {
        let state = self.lock();
        let namespace = state.namespaces.get(namespace);
        namespace.is_none_or(|it| kinds.iter().all(|kind| it.is_settled(*kind)))
    }

    /// Waits until it is so, at most so long. Says whether it is.
    pub(super) async fn until(&self, limit: Duration, is_so: impl Fn(&Self) -> bool) -> bool {
        let mut progress = self.progress();
        // Fails only when the sender is gone, which lives in self.
        let waiting = progress.wait_for(|_| is_so(self));
        timeout(limit, waiting).await.is_ok()
    }

    /// A complete list, as of this version.
    pub(super) fn listed(&self, namespace: &str, kind: Kind, all: Vec<Sighting>, version: u64) {
        let now = self.clock.now();
        self.change(|state| state.list(namespace, kind, all, version, now));
        self.raise();
    }

    /// An event: an object is there.
    pub(super) fn applied(&self, namespace: &str, kind: Kind, sighting: Sighting) {
        let now = self.clock.now();
        self.change(|state| state.apply(namespace, kind, sighting, now));
    }

    /// An event: an object is there no more.
    pub(super) fn deleted(&self, namespace: &str, kind: Kind, sighting: &Sighting) {
        let now = self.clock.now();
        self.change(|state| state.delete(namespace, kind, sighting, now));
    }

    /// A watch told of everything up to this version.
    pub(super) fn reached(&self, namespace: &str, kind: Kind, version: u64) {
        self.lock().reach(namespace, kind, version);
    }

    /// We made or changed an object, and this was the answer.
    pub(super) fn wrote(&self, namespace: &str, kind: Kind, sighting: Sighting) {
        let now = self.clock.now();
        self.change(|state| state.wrote(namespace, kind, sighting, now));
    }

    /// The pod of this UID, which did not show any more, was looked for.
    pub(super) fn looked_for(&self, namespace: &str, pod: &str, uid: &str, is_there: bool) {
        let now = self.clock.now();
        self.change(|state| state.looked_for(namespace, pod, uid, is_there, now));
    }

    /// An object is gone for certain.
    pub(super) fn gone(&self, namespace: &str, kind: Kind, object: &str) {
        let now = self.clock.now();
        self.change(|state| state.vanish(namespace, kind, object, now));
    }

    /// We are about to delete a pod.
    pub(super) fn asked(&self, namespace: &str, id: &SessionId, uid: &str) {
        if let Some(entry) = self.lock().entry_mut(namespace, id) {
            entry.ask(uid);
        }
    }

    /// Nobody needs to know any more how the session's last run ended.
    pub(super) fn forget_end(&self, id: &SessionId) {
        self.change(|state| {
            let homes = state.homes.get(id).cloned().unwrap_or_default();
            for home in &homes {
                if let Some(entry) = state.entry_mut(home, id) {
                    entry.forget_end();
                }
            }
            homes.into_iter().map(|_| id.clone()).collect()
        });
    }

    /// Time has passed: it changes runs that wait too long.
    pub(super) fn tick(&self) {
        let now = self.clock.now();
        self.change(|state| state.overdue(now));
    }

    /// From now on this replica mends what is damaged: all that there is is looked at.
    pub(super) fn mend(&self) -> Mending<'_> {
        self.mends.store(true, Ordering::SeqCst);
        self.change(|state| state.homes.keys().cloned().collect());
        Mending(self)
    }

    /// Changes the state, and then tells whom it is about.
    fn change(&self, change: impl FnOnce(&mut State) -> Touched) {
        let now = self.clock.now();
        let (tell, repair) = {
            let mut state = self.lock();
            let touched = change(&mut state);
            state.settle(&touched, now)
        };
        let mends = self.mends.load(Ordering::SeqCst);
        for (what, id) in &repair {
            if mends || what.share() != Share::Mending {
                self.repairs.mark(*what, id);
            }
        }
        for id in &tell {
            (self.observer)(id);
        }
    }

    fn raise(&self) {
        self.progress.send_modify(|version| *version += 1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Mending<'_> {
    fn drop(&mut self) {
        self.0.mends.store(false, Ordering::SeqCst);
        self.0.repairs.clear(Share::Mending);
    }
}

#[cfg(test)]
mod tests;
