use std::{
    collections::{HashMap, HashSet},
    sync::Mutex,
    time::Duration,
};

use ambient_shared::proto;
use futures_util::future::BoxFuture;

use super::*;
use crate::{
    backend::{BackendError, Credentials, DesiredRun, RunState, TokenTimes},
    sessions::Session,
};

/// Has what a test says; is never asked to do anything.
#[derive(Default)]
struct Seen(Mutex<HashMap<SessionId, RunState>>);

impl Seen {
    fn set(&self, id: &SessionId, generation: Option<u32>) {
        let mut runs = self.0.lock().unwrap();
        match generation {
            Some(generation) => {
                let status = RunStatus::Starting { waits_for: None };
                let run = RunState {
                    generation,
                    status,
                    namespace: None,
                    keypair: None,
                };
                runs.insert(id.clone(), run);
            }
            None => drop(runs.remove(id)),
        }
    }
}

type Done<'a> = BoxFuture<'a, Result<(), BackendError>>;

impl Backend for Seen {
    fn lag(&self) -> Duration {
        Duration::ZERO
    }

    fn start<'a>(&'a self, _: &'a DesiredRun, _: &'a Credentials) -> Done<'a> {
        unreachable!("only marks are made")
    }

    fn stop<'a>(&'a self, _: &'a SessionId) -> Done<'a> {
        unreachable!("only marks are made")
    }

    fn remove<'a>(&'a self, _: &'a SessionId) -> Done<'a> {
        unreachable!("only marks are made")
    }

    fn run_state(&self, id: &SessionId) -> Option<RunState> {
        self.0.lock().unwrap().get(id).cloned()
    }

    fn token_times(&self, _: &SessionId) -> Option<TokenTimes> {
        None
    }

    fn write_token<'a>(&'a self, _: &'a SessionId, _: &'a Credentials) -> Done<'a> {
        unreachable!("only marks are made")
    }

    fn sees_all(&self) -> bool {
        true
    }

    fn sessions(&self) -> Vec<SessionId> {
        self.0.lock().unwrap().keys().cloned().collect()
    }
}

fn id(number: u32) -> SessionId {
    SessionId::parse(format!("session-{number:04}")).unwrap()
}

fn pending(id: &SessionId) -> Session {
    let session = ambient_shared::rest::Session {
        id: id.as_str().to_owned(),
        phase: Some("Pending".to_owned()),
        ..Default::default()
    };
    proto::Session::from(session).try_into().unwrap()
}

struct Scene {
    due: Due,
    cache: SessionCache,
    seen: Arc<Seen>,
}

fn scene() -> Scene {
    let cache = SessionCache::new();
    let due = Due::new(cache.clone(), None);
    let seen = Arc::new(Seen::default());
    due.set_backend(Arc::clone(&seen) as _);
    Scene { due, cache, seen }
}

impl Scene {
    fn list(&self, ids: &[SessionId]) {
        let since = self.cache.revision();
        let ids: HashSet<SessionId> = ids.iter().cloned().collect();
        let missing = self.cache.complete_list(&ids, since);
        self.due.listed(&missing);
    }

    fn depths(&self) -> Vec<(Handler, usize)> {
        let depth = |handler| (handler, self.due.queue.depth(handler));
        let all = Handler::ALL.into_iter().map(depth);
        all.filter(|(_, depth)| *depth > 0).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_only_asks() {
    let scene = scene();
    let (known, orphan, vanished) = (id(1), id(2), id(3));
    for id in [&known, &vanished] {
        scene.cache.apply_event(pending(id));
        scene.due.touch(id);
    }
    scene.seen.set(&orphan, Some(0));
    assert_eq!(scene.depths(), []);

    // Whoever serves tokens must know what is gone.
    scene.list(std::slice::from_ref(&known));
    scene.due.touch(&orphan);
    assert_eq!(scene.depths(), [(Handler::Confirm, 2)]);

    let leading = scene.due.lead();
    let depths = scene.depths();
    assert!(depths.contains(&(Handler::Provision, 2)), "{depths:?}");
    // In whatever way the term ends.
    drop(leading);
    scene.due.touch(&known);
    assert_eq!(scene.depths(), [(Handler::Confirm, 2)]);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_forgets_what_the_leader_has_cleaned_up() {
    let scene = scene();
    let session = id(1);
    scene.cache.apply_event(pending(&session));
    scene.seen.set(&session, Some(0));
    scene.cache.delete(&session);
    scene.due.touch(&session);
    assert_eq!(scene.cache.uncleaned(), std::slice::from_ref(&session));

    scene.seen.set(&session, None);
    scene.due.touch(&session);
    assert_eq!(scene.cache.uncleaned(), []);

    // A leader who did not know has made it once more.
    scene.seen.set(&session, Some(0));
    scene.cache.watch_opened();
    let _leading = scene.due.lead();
    assert_eq!(scene.depths(), []);
    scene.list(std::slice::from_ref(&session));
    assert_eq!(scene.depths(), [(Handler::CleanUp, 1)]);
}
