//! What there is of one session in one namespace. Pure.

use std::time::SystemTime;

use super::facts::{Facts, Kind, PodFacts, What};
use crate::backend::{RunState, RunStatus, TokenTimes, kubernetes::repair::Repair};

/// The objects of a session, and how its run ended if its pod is gone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Entry {
    pod: Option<Held>,
    secret: Option<Held>,
    account: Option<Held>,
    service: Option<Held>,
    /// How the run ended whose pod is gone; until the next one, or until all is removed.
    ended: Option<RunState>,
    /// What the observer was last told.
    told: Option<Face>,
}

/// An object that is there.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) facts: Facts,
    /// Since when it has been in the trouble that it is in.
    since: SystemTime,
    /// We asked for its deletion.
    asked: bool,
    /// It may be gone: what we watch does not show it, but nobody was seen to delete it.
    doubted: bool,
}

/// What others can see of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Face {
    run: Option<RunState>,
    token: Option<TokenTimes>,
    objects: usize,
}

/// What changed with an entry.
#[derive(Debug, Default)]
pub(super) struct Settled {
    pub(super) changed: bool,
    pub(super) repairs: Vec<Repair>,
}

impl Entry {
    /// The object of this kind.
    pub(crate) fn held(&self, kind: Kind) -> Option<&Held> {
        match kind {
            Kind::Pod => self.pod.as_ref(),
            Kind::Secret => self.secret.as_ref(),
            Kind::Account => self.account.as_ref(),
            Kind::Service => self.service.as_ref(),
        }
    }

    fn place(&mut self, kind: Kind) -> &mut Option<Held> {
        match kind {
            Kind::Pod => &mut self.pod,
            Kind::Secret => &mut self.secret,
            Kind::Account => &mut self.account,
            Kind::Service => &mut self.service,
        }
    }

    /// The pod.
    pub(crate) fn pod(&self) -> Option<(&Held, &PodFacts)> {
        let held = self.pod.as_ref()?;
        match &held.facts.what {
            What::Pod(pod) => Some((held, pod)),
            _ => None,
        }
    }

    /// Whether there is no object, and no memory of a run.
    pub(super) fn is_empty(&self) -> bool {
        self.ended.is_none() && self.is_gone()
    }

    /// Whether there is no object.
    pub(crate) fn is_gone(&self) -> bool {
        self.objects() == 0
    }

    fn objects(&self) -> usize {
        let there = Kind::ALL.iter().filter(|kind| self.held(**kind).is_some());
        there.count()
    }

    /// The session's run.
    pub(super) fn run(&self, namespace: &str, now: SystemTime) -> Option<RunState> {
        let Some((held, pod)) = self.pod() else {
            return self.ended.clone();
        };
        Some(RunState {
            generation: pod.generation,
            status: pod.stage.status(held.since, now),
            namespace: Some(namespace.to_owned()),
            keypair: pod.keypair,
        })
    }

    /// The run that ended and whose pod is gone.
    pub(crate) fn ended(&self) -> Option<&RunState> {
        self.ended.as_ref()
    }

    /// The project that its objects say it is of.
    pub(crate) fn project(&self) -> Option<String> {
        let all = Kind::ALL.iter().filter_map(|kind| self.held(*kind));
        let projects = all.map(|held| &held.facts.project);
        projects.into_iter().find(|it| !it.is_empty()).cloned()
    }

    /// UID of the `ServiceAccount` that owns the rest.
    pub(crate) fn owner(&self) -> Option<&str> {
        if let Some(account) = &self.account {
            return Some(&account.facts.uid);
        }
        let owned = [&self.pod, &self.secret, &self.service];
        let owners = owned.into_iter().flatten().map(|held| &held.facts.owners);
        owners.flatten().next().map(String::as_str)
    }

    /// The token in the Secret, when all of the Secret is ours, and for the run that there is: a
    /// write for the run before may come late.
    pub(super) fn token_times(&self) -> Option<TokenTimes> {
        let secret = self.secret.as_ref()?;
        let What::Secret(Some(token)) = &secret.facts.what else {
            return None;
        };
        let is_of_this_run = match (self.pod(), token.generation) {
            (Some((_, pod)), Some(generation)) => pod.generation == generation,
            _ => true,
        };
        let is_ours = self.is_owned(secret) && secret.facts.labelled;
        (is_ours && is_of_this_run).then_some(token.times)
    }

    /// Whether the session's `ServiceAccount` owns it, as far as that is known.
    fn is_owned(&self, held: &Held) -> bool {
        let account = self.account.as_ref();
        account.is_none_or(|account| held.facts.owners.contains(&account.facts.uid))
    }

    /// Takes what was seen of an object; an older sight than the last one is none.
    pub(super) fn see(&mut self, facts: Facts, now: SystemTime) {
        let kind = facts.what.kind();
        let before = self.place(kind).take();
        // Versions count up over all objects, so that this holds for another object of the name too.
        if before
            .as_ref()
            .is_some_and(|before| before.facts.version > facts.version)
        {
            *self.place(kind) = before;
            return;
        }
        let same = before.filter(|before| before.facts.uid == facts.uid);
        let in_trouble = |facts: &Facts| match &facts.what {
            What::Pod(pod) => pod.stage.is_in_trouble(),
            _ => false,
        };
        let since = same
            .as_ref()
            .filter(|before| in_trouble(&before.facts) && in_trouble(&facts))
            .map_or(now, |before| before.since);
        if kind == Kind::Pod {
            // The run before is history.
            self.ended = None;
        }
        *self.place(kind) = Some(Held {
            asked: same.as_ref().is_some_and(|before| before.asked),
            doubted: false,
            facts,
            since,
        });
    }

    /// We ask for the deletion of its pod.
    pub(super) fn ask(&mut self, uid: &str) {
        if let Some(pod) = &mut self.pod
            && pod.facts.uid == uid
        {
            pod.asked = true;
        }
    }

    /// An object is gone.
    pub(super) fn vanish(&mut self, kind: Kind, namespace: &str, now: SystemTime) {
        if let Some((held, pod)) = self.pod()
            && kind == Kind::Pod
        {
            self.ended = Some(RunState {
                generation: pod.generation,
                status: pod.stage.gone(held.asked, now),
                namespace: Some(namespace.to_owned()),
                keypair: pod.keypair,
            });
        }
        *self.place(kind) = None;
    }

    /// Whether a pod that is not shown any more is gone: somebody was seen to delete it.
    pub(super) fn was_told_to_end(&self) -> bool {
        self.pod()
            .is_none_or(|(held, pod)| pod.deleting || held.asked)
    }

    /// The pod may be gone.
    pub(super) fn doubt(&mut self) {
        if let Some(pod) = &mut self.pod {
            pod.doubted = true;
        }
    }

    /// Whether this very pod may be gone.
    pub(super) fn is_doubted(&self, uid: &str) -> bool {
        let pod = self.pod.as_ref();
        pod.is_some_and(|pod| pod.doubted && pod.facts.uid == uid)
    }

    /// The pod does not show, and is there: it has lost a label.
    pub(super) fn hide(&mut self) {
        if let Some(pod) = &mut self.pod {
            pod.doubted = false;
            pod.facts.labelled = false;
        }
    }

    /// Forgets how the last run ended.
    pub(super) fn forget_end(&mut self) {
        self.ended = None;
    }

    /// When time alone changes something.
    pub(super) fn changes_at(&self) -> Option<SystemTime> {
        let (held, pod) = self.pod()?;
        pod.stage.changes_at(held.since)
    }

    /// Notes what there is to see, and says whether that is new, and what is to be repaired.
    pub(super) fn settle(&mut self, namespace: &str, now: SystemTime) -> Settled {
        let face = Face {
            run: self.run(namespace, now),
            token: self.token_times(),
            objects: self.objects(),
        };
        let changed = self.told.as_ref() != Some(&face);
        self.told = Some(face);
        Settled {
            changed,
            repairs: self.damages(),
        }
    }

    /// What is not as we made it, while its run is not over.
    pub(crate) fn damages(&self) -> Vec<Repair> {
        let Some((held, pod)) = self.pod() else {
            return Vec::new();
        };
        if held.doubted {
            return vec![Repair::Look];
        }
        if pod.lingers && !pod.deleting {
            return vec![Repair::Rest];
        }
        let is_over = matches!(
            pod.stage.status(held.since, held.since),
            RunStatus::Ended { .. }
        );
        if is_over || pod.deleting {
            return Vec::new();
        }
        let mut damages = Vec::new();
        if !(held.facts.labelled && self.is_owned(held)) {
            damages.push(Repair::Pod);
        }
        if self.account.as_ref().is_none_or(|it| !it.facts.labelled) {
            damages.push(Repair::Account);
        }
        let service = self.service.as_ref();
        let is_whole = service.is_some_and(|it| {
            it.facts.labelled
                && self.is_owned(it)
                && it.facts.what == What::Service { edited: false }
        });
        if !is_whole {
            damages.push(Repair::Service);
        }
        damages
    }
}

impl Held {
    /// Whether nothing owns it that it would be collected with.
    pub(crate) fn is_orphan(&self) -> bool {
        self.facts.owners.is_empty()
    }

    /// Since when it has been in the trouble that it is in.
    pub(crate) fn since(&self) -> SystemTime {
        self.since
    }
}
