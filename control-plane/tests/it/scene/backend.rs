//! A backend that runs nothing: it records what it was asked, and its runs are what a test says.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use ambient_control_plane::{
    backend::{
        Backend, BackendError, Credentials, DesiredRun, Observer, RunEnd, RunState, RunStatus,
        TokenTimes,
    },
    keypair::id::KeyId,
};
use ambient_shared::{clock::Clock, proof::SessionRoot, session::SessionId};
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use super::{Changes, ROOT, id};

/// What the backend did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// Started a run of this generation.
    Start(SessionId, u32),
    /// Asked a run to end.
    Stop(SessionId),
    /// Removed everything.
    Remove(SessionId),
    /// Wrote a token.
    Write(SessionId),
}

/// See the module.
pub struct Recording {
    state: Mutex<State>,
    observer: Observer,
    changes: Changes,
    lag: Duration,
    /// Starts wait while there is one; it is closed when they may go on.
    gate: Mutex<Option<Arc<Semaphore>>>,
}

#[derive(Default)]
struct State {
    runs: HashMap<SessionId, RunState>,
    tokens: HashMap<SessionId, TokenTimes>,
    calls: Vec<Call>,
    tries: Vec<Call>,
    failed_starts: usize,
    /// How many more starts of a session fail.
    failing_starts: HashMap<SessionId, usize>,
    failing_writes: HashMap<SessionId, usize>,
    hanging_writes: HashSet<SessionId>,
    impossible: HashSet<SessionId>,
    runs_begin_later: bool,
    /// Runs that another replica has made, by their generation, and that do not show yet.
    unseen: HashMap<SessionId, u32>,
}

impl Recording {
    /// Nothing runs.
    pub fn new(observer: Observer, lag: Duration, changes: Changes) -> Self {
        Self {
            state: Mutex::default(),
            observer,
            changes,
            lag,
            gate: Mutex::default(),
        }
    }

    /// Starts hang from now on.
    pub fn close_gate(&self) {
        *self.gate.lock().unwrap() = Some(Arc::new(Semaphore::new(0)));
    }

    /// Starts that hang go on.
    pub fn open_gate(&self) {
        if let Some(gate) = self.gate.lock().unwrap().take() {
            gate.close();
        }
    }

    /// Whether nothing of any session is left.
    pub fn is_empty(&self) -> bool {
        self.sessions().is_empty()
    }

    /// What was done, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.state().calls.clone()
    }

    /// How often this was done.
    pub fn count(&self, call: &Call) -> usize {
        self.state().calls.iter().filter(|it| *it == call).count()
    }

    /// How often this was tried, failures included.
    pub fn tries(&self, call: &Call) -> usize {
        self.state().tries.iter().filter(|it| *it == call).count()
    }

    /// How many starts have failed.
    pub fn failed_starts(&self) -> usize {
        self.state().failed_starts
    }

    /// Sessions whose token was written by the refresh, one for each write.
    pub fn writes(&self) -> Vec<SessionId> {
        let calls = self.calls().into_iter();
        let write = |call| match call {
            Call::Write(id) => Some(id),
            _ => None,
        };
        calls.filter_map(write).collect()
    }

    /// The next starts of this session fail.
    pub fn fail_starts(&self, session: &str, times: usize) {
        self.state().failing_starts.insert(id(session), times);
    }

    /// The next writes of this session's token fail.
    pub fn fail_writes(&self, session: &str, times: usize) {
        self.state().failing_writes.insert(id(session), times);
    }

    /// Writes of this session's token hang.
    pub fn hang_writes(&self, session: &str) {
        self.state().hanging_writes.insert(id(session));
    }

    /// This session can never be started.
    pub fn refuse(&self, session: &str) {
        self.state().impossible.insert(id(session));
    }

    /// Runs stay in `Starting` until [`Recording::set`] says more.
    pub fn begin_runs_later(&self) {
        self.state().runs_begin_later = true;
    }

    /// The session's run is this, from now on.
    pub fn set(&self, session: &str, generation: u32, status: RunStatus) {
        let run = RunState {
            generation,
            status,
            namespace: None,
            keypair: None,
        };
        self.state().runs.insert(id(session), run);
        self.tell(&id(session));
    }

    /// The session's run runs, and was found so.
    pub fn runs(&self, session: &str, generation: u32) {
        let since = Clock::system().now();
        self.set(
            session,
            generation,
            RunStatus::Running {
                since,
                not_ready: None,
            },
        );
    }

    /// The session's run ends with this code.
    pub fn ends(&self, session: &str, code: u8) {
        let generation = self.state().runs[&id(session)].generation;
        let end = RunEnd::Exited {
            code,
            message: None,
        };
        let at = Clock::system().now();
        self.set(session, generation, RunStatus::Ended { at, end });
    }

    /// There is a run of this generation, which another replica has made and which is not seen yet.
    pub fn sees_late(&self, session: &str, generation: u32) {
        self.state().unseen.insert(id(session), generation);
    }

    /// The session has no run, and never had one.
    pub fn forget(&self, session: &str) {
        self.state().runs.remove(&id(session));
        self.tell(&id(session));
    }

    /// The session's Secret holds a token of this age and this life left.
    pub fn has_token(&self, session: &str, age: Duration, left: Duration) {
        let now = Clock::system().now();
        let times = TokenTimes {
            issued_at: now - age,
            expires_at: Some(now + left),
            root: Some(KeyId::from_bytes(SessionRoot::new(ROOT).id())),
        };
        self.state().tokens.insert(id(session), times);
    }

    /// The session has a token of this age that never expires.
    pub fn has_endless_token(&self, session: &str, age: Duration) {
        self.has_token(session, age, Duration::ZERO);
        let mut state = self.state();
        let times = state.tokens.get_mut(&id(session)).unwrap();
        times.expires_at = None;
    }

    /// Somebody deletes the session's Secret.
    pub fn lose_token(&self, session: &str) {
        self.state().tokens.remove(&id(session));
        self.tell(&id(session));
    }

    /// When the session's token expires.
    pub fn token(&self, session: &str) -> Option<TokenTimes> {
        self.token_times(&id(session))
    }

    fn tell(&self, id: &SessionId) {
        (self.observer)(id);
        self.changes.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn failed(action: &'static str) -> BackendError {
    BackendError::Failed {
        action,
        source: "as the test said".into(),
    }
}

/// Whether it is to fail this time.
fn fails(failures: &mut HashMap<SessionId, usize>, id: &SessionId) -> bool {
    match failures.get_mut(id) {
        Some(left) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    }
}

impl Recording {
    fn try_start(&self, run: &DesiredRun, credentials: &Credentials) -> Result<(), BackendError> {
        let mut state = self.state();
        let call = Call::Start(run.id.clone(), run.generation);
        state.tries.push(call.clone());
        if state.impossible.contains(&run.id) {
            return Err(BackendError::Impossible {
                reason: "NoRoom",
                message: "there is no room".to_owned(),
            });
        }
        if fails(&mut state.failing_starts, &run.id) {
            state.failed_starts += 1;
            return Err(failed("start a session"));
        }
        if let Some(old) = state.runs.get(&run.id)
            && !matches!(old.status, RunStatus::Ended { .. })
        {
            return if old.generation == run.generation {
                Ok(())
            } else {
                Err(BackendError::StillEnding)
            };
        }
        let status = if state.runs_begin_later {
            RunStatus::Starting { waits_for: None }
        } else {
            RunStatus::Running {
                not_ready: None,
                since: Clock::system().now(),
            }
        };
        let generation = run.generation;
        state.runs.insert(
            run.id.clone(),
            RunState {
                generation,
                status,
                namespace: None,
                keypair: Some(run.keypair),
            },
        );
        state.tokens.insert(run.id.clone(), times(credentials));
        state.calls.push(call);
        Ok(())
    }
}

fn times(credentials: &Credentials) -> TokenTimes {
    TokenTimes {
        issued_at: Clock::system().now(),
        expires_at: credentials.token.expires_at(),
        root: Some(credentials.root),
    }
}

impl Backend for Recording {
    fn is_gone<'a>(
        &'a self,
        id: &'a SessionId,
        generation: u32,
    ) -> BoxFuture<'a, Result<bool, BackendError>> {
        let state = self.state();
        let seen = state.runs.get(id).map(|run| run.generation);
        let is_there = seen == Some(generation) || state.unseen.get(id) == Some(&generation);
        Box::pin(std::future::ready(Ok(!is_there)))
    }

    fn lag(&self) -> Duration {
        self.lag
    }

    fn start<'a>(
        &'a self,
        run: &'a DesiredRun,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        Box::pin(async move {
            let gate = self.gate.lock().unwrap().clone();
            if let Some(gate) = gate {
                let _ = gate.acquire().await;
            }
            let started = self.try_start(run, credentials);
            self.tell(&run.id);
            started
        })
    }

    fn stop<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        self.state().calls.push(Call::Stop(id.clone()));
        self.changes.notify_waiters();
        Box::pin(std::future::ready(Ok(())))
    }

    fn remove<'a>(&'a self, id: &'a SessionId) -> BoxFuture<'a, Result<(), BackendError>> {
        let mut state = self.state();
        state.tries.push(Call::Remove(id.clone()));
        let mut removed = Ok(());
        if let Some(run) = state.runs.get_mut(id)
            && !matches!(run.status, RunStatus::Ended { .. })
        {
            // It ends, but not at once: who asks again finds it ended.
            let end = RunEnd::Lost {
                message: "removed".to_owned(),
            };
            let at = Clock::system().now();
            run.status = RunStatus::Ended { at, end };
            removed = Err(BackendError::StillEnding);
        } else {
            state.runs.remove(id);
            state.tokens.remove(id);
            state.calls.push(Call::Remove(id.clone()));
        }
        drop(state);
        self.tell(id);
        Box::pin(std::future::ready(removed))
    }

    fn run_state(&self, id: &SessionId) -> Option<RunState> {
        self.state().runs.get(id).cloned()
    }

    fn token_times(&self, id: &SessionId) -> Option<TokenTimes> {
        self.state().tokens.get(id).copied()
    }

    fn write_token<'a>(
        &'a self,
        id: &'a SessionId,
        credentials: &'a Credentials,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        let mut state = self.state();
        state.tries.push(Call::Write(id.clone()));
        if state.hanging_writes.contains(id) {
            return Box::pin(std::future::pending());
        }
        let written = if fails(&mut state.failing_writes, id) {
            Err(failed("write the token of a session"))
        } else {
            state.tokens.insert(id.clone(), times(credentials));
            state.calls.push(Call::Write(id.clone()));
            Ok(())
        };
        drop(state);
        self.tell(id);
        Box::pin(std::future::ready(written))
    }

    fn sees_all(&self) -> bool {
        true
    }

    fn sessions(&self) -> Vec<SessionId> {
        let state = self.state();
        let all: HashSet<_> = state.runs.keys().chain(state.tokens.keys()).collect();
        all.into_iter().cloned().collect()
    }
}
