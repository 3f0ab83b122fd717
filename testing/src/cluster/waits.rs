//! Waits for what the cluster does in its own time. Each has a deadline.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Cluster, Request};

/// Longest wait for anything here; a cluster starts in some 5 s where nothing else runs.
const LONGEST: Duration = Duration::from_secs(180);

/// How often is looked whether a program is ready; nothing announces it.
const POLL: Duration = Duration::from_millis(50);

impl Cluster {
    /// Makes a namespace in which pods can be made at once.
    ///
    /// # Panics
    /// When the API server refuses, or at the deadline.
    pub fn create_namespace(&self, name: &str) {
        let body = json!({"metadata": {"name": name}});
        let made = self.request("POST", "/api/v1/namespaces", Some(&body));
        assert_eq!(made.0, 201, "namespace {name}: {}", made.1);
        let account = format!("/api/v1/namespaces/{name}/serviceaccounts/default");
        self.wait_for(&account, |_| true);
    }

    /// Waits until an object is there and as wanted, and gives it. By path, such as
    /// `/api/v1/namespaces/default`.
    ///
    /// # Panics
    /// At the deadline, with the object's last state.
    pub fn wait_for(&self, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + LONGEST;
        loop {
            let (status, object) = self.request("GET", path, None);
            if status == 200 && wanted(&object) {
                return object;
            }
            assert!(
                Instant::now() < deadline,
                "{path} is not as wanted: {status} {object:#}"
            );
            pause();
        }
    }

    /// Waits until an object is gone. By path, such as `/api/v1/namespaces/default`.
    ///
    /// # Panics
    /// At the deadline, with the object's last state.
    pub fn wait_gone(&self, path: &str) {
        let deadline = Instant::now() + LONGEST;
        loop {
            let (status, object) = self.request("GET", path, None);
            if status == 404 {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{path} is still there: {status} {object:#}"
            );
            pause();
        }
    }

    /// Waits for such a request, and gives the first one. The log may be a moment behind the answer.
    ///
    /// # Panics
    /// At the deadline, with the last requests.
    pub fn wait_for_request(&self, wanted: impl Fn(&Request) -> bool) -> Request {
        let deadline = Instant::now() + LONGEST;
        loop {
            let mut requests = self.requests();
            if let Some(place) = requests.iter().position(&wanted) {
                return requests.swap_remove(place);
            }
            let last = &requests[requests.len().saturating_sub(50)..];
            assert!(Instant::now() < deadline, "no such request: {last:#?}");
            pause();
        }
    }

    pub(super) fn wait_until(&mut self, program: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LONGEST;
        while !holds(self) {
            self.programs.check();
            assert!(
                Instant::now() < deadline,
                "{program} is not ready after {LONGEST:?}: {}",
                self.programs.last_words(program)
            );
            pause();
        }
    }
}

/// Between two looks at what nothing announces.
#[expect(
    clippy::disallowed_methods,
    reason = "for callers without a runtime; each loop around it has a deadline"
)]
fn pause() {
    thread::sleep(POLL);
}
