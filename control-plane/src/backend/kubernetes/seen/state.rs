//! The state behind [`Seen`](super::Seen). Pure: it is told the time, and says whom a change is
//! about.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::SystemTime,
};

use ambient_shared::session::SessionId;

use super::{
    entry::Entry,
    facts::{Kind, Sighting},
};
use crate::backend::kubernetes::repair::Repair;

/// Whom a change is about.
pub(super) type Touched = HashSet<SessionId>;

#[derive(Default)]
pub(super) struct State {
    pub(super) namespaces: BTreeMap<String, Namespace>,
    /// The namespaces of each session that there is anything of; mostly one.
    pub(super) homes: HashMap<SessionId, Vec<String>>,
    /// Whether it is known which namespaces have our labels.
    pub(super) listed: bool,
    /// Told "unknown" for want of that, or while their namespace is looked for.
    pub(super) told_unknown: HashSet<SessionId>,
    /// Namespaces of sessions that are not among these: whether they are there is to be found out.
    pub(super) unfound: HashSet<String>,
    /// Namespaces of which it was found out that they are not there, or none of ours. Forgotten with
    /// each complete list.
    pub(super) absent: HashSet<String>,
    epochs: u64,
}

/// A namespace that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) name: String,
    /// Which of that name it is, when that is known.
    pub(crate) uid: Option<String>,
    /// Its version.
    pub(crate) version: u64,
}

#[derive(Default)]
pub(super) struct Namespace {
    /// Whether it is watched. One that is gone stays for how its runs ended.
    pub(super) present: bool,
    /// Rises each time that it comes: another one of the same name is watched anew.
    pub(super) epoch: u64,
    uid: Option<String>,
    pub(super) members: HashMap<SessionId, Entry>,
    /// Told "unknown" before its pods were listed.
    pub(super) told_unknown: HashSet<SessionId>,
    kinds: HashMap<Kind, Progress>,
    names: HashMap<(Kind, String), SessionId>,
}

/// How far a watch is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// Up to which version it has told everything.
    reached: u64,
    listed: bool,
    failed: bool,
}

impl Namespace {
    pub(super) fn has_listed(&self, kind: Kind) -> bool {
        self.kinds.get(&kind).is_some_and(|it| it.listed)
    }

    /// Whether it has been listed, or cannot be.
    pub(super) fn is_settled(&self, kind: Kind) -> bool {
        let progress = self.kinds.get(&kind);
        progress.is_some_and(|it| it.listed || it.failed)
    }
}

impl State {
    /// There is such a namespace. Gives whom that is about when it is news.
    pub(super) fn arrive(&mut self, found: &Found, now: SystemTime) -> Option<Touched> {
        self.absent.remove(&found.name);
        self.unfound.remove(&found.name);
        let mut touched = Touched::new();
        if let Some(known) = self.namespaces.get_mut(&found.name)
            && known.present
        {
            if known.uid.is_none() || found.uid.is_none() || known.uid == found.uid {
                known.uid = known.uid.take().or_else(|| found.uid.clone());
                return None;
            }
            // Another one of the same name, and nobody told of the end of the first.
            known.uid = None;
            touched.extend(self.leave(found, now));
        }
        self.epochs += 1;
        let namespace = self.namespaces.entry(found.name.clone()).or_default();
        namespace.present = true;
        namespace.epoch = self.epochs;
        namespace.uid.clone_from(&found.uid);
        namespace.kinds.clear();
        touched.extend(self.told_unknown.drain());
        Some(touched)
    }

    /// A namespace is gone, with all that was in it by that version; what was made since is in
    /// another one of the same name.
    pub(super) fn leave(&mut self, gone: &Found, now: SystemTime) -> Touched {
        let name = gone.name.as_str();
        let Some(namespace) = self.namespaces.get_mut(name) else {
            return Touched::new();
        };
        if namespace.uid.is_some() && gone.uid.is_some() && namespace.uid != gone.uid {
            // Late news of an earlier one.
            return Touched::new();
        }
        namespace.present = false;
        namespace.uid = None;
        namespace.kinds.clear();
        for entry in namespace.members.values_mut() {
            for kind in Kind::ALL {
                let held = entry.held(kind);
                if held.is_some_and(|held| held.facts.version <= gone.version) {
                    entry.vanish(kind, name, now);
                }
            }
        }
        let members = &namespace.members;
        namespace.names.retain(|(kind, _), id| {
            let entry = members.get(id);
            entry.is_some_and(|entry| entry.held(*kind).is_some())
        });
        let told = namespace.told_unknown.drain();
        let touched: Touched = told.chain(namespace.members.keys().cloned()).collect();
        if namespace.members.is_empty() {
            self.namespaces.remove(name);
        }
        touched
    }

    /// A watch cannot be had now.
    pub(super) fn fail(&mut self, namespace: &str, kind: Kind) {
        if let Some(namespace) = self.namespaces.get_mut(namespace) {
            namespace.kinds.entry(kind).or_default().failed = true;
        }
    }

    /// A watch told of everything up to this version.
    pub(super) fn reach(&mut self, namespace: &str, kind: Kind, version: u64) {
        if let Some(namespace) = self.namespaces.get_mut(namespace) {
            let progress = namespace.kinds.entry(kind).or_default();
            progress.reached = progress.reached.max(version);
        }
    }

    /// A complete list as of this version.
    pub(super) fn list(
        &mut self,
        name: &str,
        kind: Kind,
        sightings: Vec<Sighting>,
        version: u64,
        now: SystemTime,
    ) -> Touched {
        let there: HashSet<String> = sightings.iter().map(|it| it.name.clone()).collect();
        let mut touched = Touched::new();
        for sighting in sightings {
            touched.extend(self.see(name, kind, sighting, now));
        }
        let Some(namespace) = self.namespaces.get_mut(name) else {
            return touched;
        };
        let progress = namespace.kinds.entry(kind).or_default();
        progress.reached = progress.reached.max(version);
        progress.listed = true;
        if kind == Kind::Pod {
            touched.extend(namespace.told_unknown.drain());
        }
        let missing = namespace.names.iter().filter(|((of, object), id)| {
            // What we made after the list was taken is not in it.
            let held = namespace.members.get(*id).and_then(|it| it.held(kind));
            *of == kind
                && !there.contains(object)
                && held.is_none_or(|held| held.facts.version <= version)
        });
        let missing: Vec<String> = missing.map(|((_, object), _)| object.clone()).collect();
        for object in missing {
            touched.extend(self.unsee(name, kind, &object, now));
        }
        touched
    }

    /// An event: an object is there.
    pub(super) fn apply(
        &mut self,
        name: &str,
        kind: Kind,
        sighting: Sighting,
        now: SystemTime,
    ) -> Touched {
        self.reach(name, kind, sighting.version);
        self.see(name, kind, sighting, now)
    }

    /// An event: an object is there no more, or does not show any more.
    pub(super) fn delete(
        &mut self,
        name: &str,
        kind: Kind,
        sighting: &Sighting,
        now: SystemTime,
    ) -> Touched {
        self.reach(name, kind, sighting.version);
        let Some(id) = self.whose(name, kind, &sighting.name) else {
            return Touched::new();
        };
        let entry = self.entry(name, &id);
        let held = entry.and_then(|entry| entry.held(kind));
        if held.is_some_and(|held| held.facts.version > sighting.version) {
            // Made anew meanwhile.
            return Touched::new();
        }
        if sighting.deleting {
            return self.vanish(name, kind, &sighting.name, now);
        }
        self.unsee(name, kind, &sighting.name, now)
    }

    /// The answer to a write of ours, which says nothing when the watch is further already.
    pub(super) fn wrote(
        &mut self,
        name: &str,
        kind: Kind,
        sighting: Sighting,
        now: SystemTime,
    ) -> Touched {
        let namespace = self.namespaces.get(name).filter(|it| it.present);
        let Some(namespace) = namespace else {
            return Touched::new();
        };
        let reached = namespace.kinds.get(&kind).map_or(0, |it| it.reached);
        if sighting.version <= reached {
            return Touched::new();
        }
        self.see(name, kind, sighting, now)
    }

    /// An object is gone for certain.
    pub(super) fn vanish(
        &mut self,
        name: &str,
        kind: Kind,
        object: &str,
        now: SystemTime,
    ) -> Touched {
        let Some(namespace) = self.namespaces.get_mut(name) else {
            return Touched::new();
        };
        let Some(id) = namespace.names.remove(&(kind, object.to_owned())) else {
            return Touched::new();
        };
        if let Some(entry) = namespace.members.get_mut(&id) {
            entry.vanish(kind, name, now);
        }
        [id].into()
    }

    /// A pod that did not show any more was looked for.
    pub(super) fn looked_for(
        &mut self,
        name: &str,
        pod: &str,
        uid: &str,
        is_there: bool,
        now: SystemTime,
    ) -> Touched {
        let Some(id) = self.whose(name, Kind::Pod, pod) else {
            return Touched::new();
        };
        let entry = self.entry_mut(name, &id);
        let Some(entry) = entry.filter(|entry| entry.is_doubted(uid)) else {
            // Something else was seen of it meanwhile.
            return Touched::new();
        };
        if is_there {
            entry.hide();
            return [id].into();
        }
        self.vanish(name, Kind::Pod, pod, now)
    }

    fn whose(&self, namespace: &str, kind: Kind, object: &str) -> Option<SessionId> {
        let names = &self.namespaces.get(namespace)?.names;
        names.get(&(kind, object.to_owned())).cloned()
    }

    pub(super) fn entry(&self, namespace: &str, id: &SessionId) -> Option<&Entry> {
        self.namespaces.get(namespace)?.members.get(id)
    }

    pub(super) fn entry_mut(&mut self, namespace: &str, id: &SessionId) -> Option<&mut Entry> {
        self.namespaces.get_mut(namespace)?.members.get_mut(id)
    }

    fn see(&mut self, name: &str, kind: Kind, sighting: Sighting, now: SystemTime) -> Touched {
        let mut touched = Touched::new();
        if !self.namespaces.get(name).is_some_and(|it| it.present) {
            // Late news of a namespace that is gone.
            return touched;
        }
        let before = self.whose(name, kind, &sighting.name);
        let after = sighting.facts.as_ref().map(|facts| &facts.id);
        if before.is_some() && before.as_ref() != after {
            // It does not say any more whose it is.
            touched.extend(self.unsee(name, kind, &sighting.name, now));
        }
        let Some(facts) = sighting.facts else {
            return touched;
        };
        let id = facts.id.clone();
        let Some(namespace) = self.namespaces.get_mut(name) else {
            return touched;
        };
        namespace.names.insert((kind, sighting.name), id.clone());
        let entry = namespace.members.entry(id.clone()).or_default();
        entry.see(facts, now);
        let homes = self.homes.entry(id.clone()).or_default();
        if !homes.iter().any(|home| home == name) {
            homes.push(name.to_owned());
        }
        touched.insert(id);
        touched
    }

    /// An object does not show any more. A pod that nobody was seen to delete may be there still,
    /// without our label: it runs or not, and only the API server can say.
    fn unsee(&mut self, name: &str, kind: Kind, object: &str, now: SystemTime) -> Touched {
        if kind == Kind::Pod
            && let Some(id) = self.whose(name, kind, object)
            && let Some(entry) = self.entry_mut(name, &id)
            && !entry.was_told_to_end()
        {
            entry.doubt();
            return [id].into();
        }
        self.vanish(name, kind, object, now)
    }

    /// Looks at what was touched: whom to tell, and what to repair. Forgets what is empty.
    pub(super) fn settle(
        &mut self,
        touched: &Touched,
        now: SystemTime,
    ) -> (Vec<SessionId>, Vec<(Repair, SessionId)>) {
        let (mut tell, mut repair) = (Vec::new(), Vec::new());
        for id in touched {
            let homes = self.homes.get(id).cloned().unwrap_or_default();
            // One that has nothing was told "unknown", or has lost its last object.
            let mut changed = homes.is_empty();
            for home in homes {
                let Some(namespace) = self.namespaces.get_mut(&home) else {
                    continue;
                };
                let Some(entry) = namespace.members.get_mut(id) else {
                    continue;
                };
                let settled = entry.settle(&home, now);
                let is_empty = entry.is_empty();
                changed |= settled.changed;
                let damages = settled.repairs.into_iter();
                // What cannot be seen is not known to be damaged.
                let known =
                    damages.filter(|it| it.needs().is_none_or(|it| namespace.has_listed(it)));
                repair.extend(known.map(|it| (it, id.clone())));
                if is_empty {
                    self.forget(&home, id);
                }
            }
            if changed {
                tell.push(id.clone());
            }
        }
        (tell, repair)
    }

    fn forget(&mut self, name: &str, id: &SessionId) {
        if let Some(namespace) = self.namespaces.get_mut(name) {
            namespace.members.remove(id);
            if !namespace.present && namespace.members.is_empty() {
                self.namespaces.remove(name);
            }
        }
        if let Some(homes) = self.homes.get_mut(id) {
            homes.retain(|home| home != name);
            if homes.is_empty() {
                self.homes.remove(id);
            }
        }
    }

    /// Whose status has changed with time alone.
    pub(super) fn overdue(&self, now: SystemTime) -> Touched {
        let members = self.namespaces.values().flat_map(|it| &it.members);
        members
            .filter(|(_, entry)| entry.changes_at().is_some_and(|at| at <= now))
            .map(|(id, _)| id.clone())
            .collect()
    }
}
