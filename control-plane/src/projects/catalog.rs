//! Which projects and settings there may be. What they say is read anew each time.

use std::{
    collections::{HashMap, HashSet},
    fmt::{self, Debug},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tracing::{debug, error, warn};

use crate::{
    queue::{Failed, Group, GroupOf, WorkQueue},
    worker::{WARN_FROM, WorkKey},
};

/// A project's id, which is a name that people gave.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct ProjectId(String);

impl ProjectId {
    pub(super) fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl WorkKey for ProjectId {
    fn log_failure(&self, _: &dyn Debug, failed: Failed, reason: &str) {
        let (failures, retry_in_s) = (failed.failures, failed.wait.as_secs_f32());
        if failures >= WARN_FROM {
            warn!(project = %self, failures, retry_in_s, reason, "work on a project failed");
        } else {
            debug!(project = %self, failures, retry_in_s, reason, "work on a project failed");
        }
    }

    fn log_panic(&self, _: &dyn Debug) {
        error!(project = %self, "work on a project panicked");
    }
}

/// Each project is a group.
pub(super) fn each_for_itself() -> GroupOf<ProjectId> {
    Arc::new(|id| Group::of(id.as_str()))
}

/// What the feeds have told of. As large as the API server's own lists.
pub(super) struct Catalog {
    queue: WorkQueue<(), ProjectId>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Projects that were there when last heard of.
    projects: HashSet<ProjectId>,
    /// Settings by id, with their project.
    settings: HashMap<String, ProjectId>,
    /// Whether all settings were listed once.
    knows_settings: bool,
    /// Whether the last list of settings can have missed none.
    is_certain: bool,
}

impl Catalog {
    /// Knows nothing; marks what there is news of in `queue`.
    pub(super) fn new(queue: WorkQueue<(), ProjectId>) -> Self {
        Self {
            queue,
            state: Mutex::default(),
        }
    }

    /// There may be news about a project.
    pub(super) fn mark(&self, id: &ProjectId) {
        self.queue.mark((), id);
    }

    /// A feed has shown a project.
    pub(super) fn project_seen(&self, id: &str) {
        let id = ProjectId::new(id);
        self.exists(&id);
        self.mark(&id);
    }

    /// A feed says that a project is gone.
    pub(super) fn project_doubted(&self, id: &str) {
        self.mark(&ProjectId::new(id));
    }

    /// All projects were listed; these were there.
    pub(super) fn projects_listed(&self, seen: &HashSet<String>) {
        let known: Vec<_> = self.state().projects.iter().cloned().collect();
        for id in known.iter().filter(|id| !seen.contains(id.as_str())) {
            self.mark(id);
        }
    }

    /// The API server has the project.
    pub(super) fn exists(&self, id: &ProjectId) {
        self.state().projects.insert(id.clone());
    }

    /// Whether the API server was ever seen to have the project.
    pub(super) fn existed(&self, id: &ProjectId) -> bool {
        self.state().projects.contains(id)
    }

    /// Nothing of the project is left to be done.
    pub(super) fn removed(&self, id: &ProjectId) {
        self.state().projects.remove(id);
    }

    /// There are settings of a project.
    pub(super) fn settings_seen(&self, settings: &str, project: &str) {
        let project = ProjectId::new(project);
        let before = self
            .state()
            .settings
            .insert(settings.to_owned(), project.clone());
        if let Some(before) = before.filter(|before| *before != project) {
            self.mark(&before);
        }
        self.mark(&project);
    }

    /// A feed says that settings are gone.
    pub(super) fn settings_doubted(&self, settings: &str) {
        let project = self.state().settings.get(settings).cloned();
        if let Some(project) = project {
            self.mark(&project);
        }
    }

    /// The API server does not have these settings.
    pub(super) fn settings_gone(&self, settings: &str) {
        self.state().settings.remove(settings);
    }

    /// All settings were listed; these were there. `certain` when none can have been missed.
    pub(super) fn settings_listed(&self, seen: &HashSet<String>, certain: bool) {
        let doubted: Vec<_> = {
            let mut state = self.state();
            state.is_certain = certain;
            let first = !std::mem::replace(&mut state.knows_settings, true);
            if first {
                state.projects.iter().cloned().collect()
            } else {
                let missing = state.settings.iter().filter(|(id, _)| !seen.contains(*id));
                missing.map(|(_, project)| project.clone()).collect()
            }
        };
        for project in &doubted {
            self.mark(project);
        }
    }

    /// The ids of a project's settings: one, unless the API server allows more.
    pub(super) fn settings_of(&self, project: &ProjectId) -> Vec<String> {
        let state = self.state();
        let of = state.settings.iter().filter(|(_, of)| *of == project);
        of.map(|(id, _)| id.clone()).collect()
    }

    pub(super) fn knows_settings(&self) -> bool {
        self.state().knows_settings
    }

    pub(super) fn is_certain_of_settings(&self) -> bool {
        self.state().is_certain
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use ambient_shared::retry::Policy;

    use super::*;

    fn catalog() -> Catalog {
        Catalog::new(WorkQueue::new(Policy::default(), each_for_itself()))
    }

    async fn due(catalog: &Catalog) -> Vec<String> {
        let mut due = Vec::new();
        while catalog.queue.depth(()) > 0 {
            let lease = catalog.queue.next((), 1).await;
            due.push(lease.key().to_string());
            lease.succeed();
        }
        due
    }

    #[tokio::test]
    async fn what_a_list_lacks_is_asked_about_and_not_forgotten() {
        let catalog = catalog();
        catalog.project_seen("a");
        catalog.project_seen("b");
        assert_eq!(due(&catalog).await, ["a", "b"]);

        catalog.projects_listed(&HashSet::from(["a".to_owned()]));

        assert_eq!(due(&catalog).await, ["b"]);
        assert!(catalog.existed(&ProjectId::new("b")));
    }

    #[tokio::test]
    async fn projects_wait_for_the_first_list_of_settings() {
        let catalog = catalog();
        catalog.project_seen("a");
        catalog.settings_seen("s", "b");
        due(&catalog).await;
        assert!(!catalog.knows_settings());

        catalog.settings_listed(&HashSet::from(["s".to_owned()]), true);

        assert!(catalog.knows_settings());
        assert_eq!(due(&catalog).await, ["a"]);
        catalog.settings_listed(&HashSet::new(), false);
        assert_eq!(due(&catalog).await, ["b"]);
        assert!(!catalog.is_certain_of_settings());
        assert_eq!(catalog.settings_of(&ProjectId::new("b")), ["s"]);
    }

    #[tokio::test]
    async fn settings_that_move_concern_both_projects() {
        let catalog = catalog();
        catalog.settings_seen("s", "a");
        due(&catalog).await;
        catalog.settings_seen("s", "b");
        assert_eq!(due(&catalog).await, ["a", "b"]);
        catalog.settings_doubted("s");
        assert_eq!(due(&catalog).await, ["b"]);
    }
}
