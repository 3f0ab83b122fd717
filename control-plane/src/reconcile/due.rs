//! Which handlers a session's state calls for.
//!
//! Whoever saw a change (feed, backend, a handler's own write) names the session alone; what is due
//! follows from what is known now.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use ambient_shared::{phase::Phase, retry::Policy, session::SessionId};

use crate::{
    backend::{Backend, RunStatus},
    queue::{Group, GroupOf, Work, WorkQueue},
    sessions::SessionCache,
};

/// What can be due for a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Handler {
    /// Start its run.
    Provision,
    /// Ask its run to end.
    Stop,
    /// Report what became of its run.
    WriteBack,
    /// Ask the API server what is true.
    Confirm,
    /// Remove what is left of a deleted session.
    CleanUp,
}

/// Shares of the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Share {
    /// What starts sessions.
    Starting,
    /// What reports: a share of its own, as starts wait for tokens and for the backend.
    Reporting,
    /// What ends and clears away.
    Ending,
    /// What only asks: on every replica, as each serves tokens from what it knows.
    Asking,
}

impl Share {
    /// The work of the replica that leads.
    pub(crate) const LEADING: [Self; 3] = [Self::Starting, Self::Reporting, Self::Ending];
}

impl Work for Handler {
    type Share = Share;

    fn share(self) -> Share {
        match self {
            Self::Provision => Share::Starting,
            Self::WriteBack => Share::Reporting,
            Self::Stop | Self::CleanUp => Share::Ending,
            Self::Confirm => Share::Asking,
        }
    }
}

/// Work on sessions is fair by project. Deleted ones are still of theirs; those that nobody knows
/// are a group of their own.
pub(crate) fn by_project(cache: &SessionCache) -> GroupOf<SessionId> {
    let cache = cache.clone();
    Arc::new(move |id| {
        cache
            .project(id)
            .map_or_else(Group::none, |project| Group::of(&project))
    })
}

impl Handler {
    /// All of them, for metrics.
    pub(crate) const ALL: [Self; 5] = [
        Self::Provision,
        Self::Stop,
        Self::WriteBack,
        Self::Confirm,
        Self::CleanUp,
    ];

    /// The label in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Provision => "provision",
            Self::Stop => "stop",
            Self::WriteBack => "write_back",
            Self::Confirm => "confirm",
            Self::CleanUp => "clean_up",
        }
    }
}

/// This replica does the work, until this is dropped.
#[must_use]
pub(crate) struct Leading<'a>(&'a Due);

/// Marks what is due. Never blocks.
pub(crate) struct Due {
    cache: SessionCache,
    /// Work on sessions.
    pub(crate) queue: WorkQueue<Handler, SessionId>,
    /// Tokens to be written: a queue of its own, as an API server that hangs must not keep a
    /// session from its next token. None when the refresh is off.
    pub(crate) tokens: Option<WorkQueue<(), SessionId>>,
    backend: OnceLock<Arc<dyn Backend>>,
    /// Whether this replica does the work. Else nothing is marked but questions.
    leads: AtomicBool,
}

impl Due {
    /// Nothing is due.
    pub(crate) fn new(cache: SessionCache, tokens: Option<WorkQueue<(), SessionId>>) -> Self {
        Self {
            queue: WorkQueue::new(Policy::default(), by_project(&cache)),
            cache,
            tokens,
            backend: OnceLock::new(),
            leads: AtomicBool::new(false),
        }
    }

    /// From now on the backend's word counts. Before, nothing is marked.
    pub(crate) fn set_backend(&self, backend: Arc<dyn Backend>) {
        // Set once, by the one `run` that consumes the controller.
        let _ = self.backend.set(backend);
    }

    /// From now on this replica does the work: all that there is is looked at.
    pub(crate) fn lead(&self) -> Leading<'_> {
        self.leads.store(true, Ordering::SeqCst);
        self.listed(&[]);
        Leading(self)
    }

    /// Something about this session changed.
    pub(crate) fn touch(&self, id: &SessionId) {
        let Some(backend) = self.backend.get() else {
            return;
        };
        if !self.leads.load(Ordering::SeqCst) {
            self.touch_while_others_lead(backend.as_ref(), id);
            return;
        }
        if let Some(session) = self.cache.get(id) {
            let run = backend.run_state(id);
            let runs = run.is_some_and(|run| !matches!(run.status, RunStatus::Ended { .. }));
            match session.phase {
                Phase::Pending | Phase::Creating => self.queue.mark(Handler::Provision, id),
                Phase::Running => {}
                Phase::Stopping => self.queue.mark(Handler::Stop, id),
                Phase::Stopped | Phase::Completed | Phase::Failed if runs => {
                    self.queue.mark(Handler::Stop, id);
                }
                Phase::Stopped | Phase::Completed | Phase::Failed => return,
            }
            self.queue.mark(Handler::WriteBack, id);
            if let Some(tokens) = &self.tokens
                && session.phase.is_active()
                && runs
                && backend.token_times(id).is_none()
            {
                tokens.mark((), id);
            }
        } else if self.cache.is_deleted(id) {
            if !self.cache.is_cleaned(id) || has_anything(backend.as_ref(), id) {
                self.queue.mark(Handler::CleanUp, id);
            }
        } else if self.cache.is_synced() {
            self.queue.mark(Handler::Confirm, id);
        }
    }

    /// Nothing is due, but what the leader has cleaned up need not be remembered.
    fn touch_while_others_lead(&self, backend: &dyn Backend, id: &SessionId) {
        if self.cache.is_deleted(id) {
            backend.forget_end(id);
            if !has_anything(backend, id) {
                self.cache.set_cleaned(id);
            }
        } else if !self.cache.knows(id) && self.cache.is_synced() {
            self.doubt(id);
        }
    }

    /// Its phase may have to be written.
    pub(crate) fn touch_status(&self, id: &SessionId) {
        self.queue.mark(Handler::WriteBack, id);
    }

    /// What is known about this session is in doubt.
    pub(crate) fn doubt(&self, id: &SessionId) {
        self.queue.mark(Handler::Confirm, id);
    }

    /// A list is complete. Whatever may have been missed since the last one, of the API server or
    /// of the backend, is looked at again.
    pub(crate) fn listed(&self, missing: &[SessionId]) {
        for id in missing {
            self.doubt(id);
        }
        for session in self.cache.sessions() {
            self.touch(&session.id);
        }
        for id in self.cache.uncleaned() {
            self.touch(&id);
        }
        if !self.cache.is_synced() {
            return;
        }
        let here = self.backend.get().map(|backend| backend.sessions());
        for id in here.unwrap_or_default() {
            if !self.cache.knows(&id) {
                // Unknown to a complete list: an orphan, if the API server confirms it.
                self.doubt(&id);
            } else if self.cache.is_cleaned(&id) {
                // Made after it was cleaned up, by a leader who did not know.
                self.touch(&id);
            }
        }
    }
}

impl Drop for Leading<'_> {
    /// What was marked is forgotten; what runs, ends.
    fn drop(&mut self) {
        let due = self.0;
        due.leads.store(false, Ordering::SeqCst);
        for share in Share::LEADING {
            due.queue.clear(share);
        }
        if let Some(tokens) = &due.tokens {
            tokens.clear(());
        }
    }
}

/// Whether the backend has anything of a session.
pub(crate) fn has_anything(backend: &dyn Backend, id: &SessionId) -> bool {
    backend.run_state(id).is_some() || backend.token_times(id).is_some()
}

#[cfg(test)]
mod tests;
