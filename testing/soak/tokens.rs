//! What tokens each running session has, pulled and mounted: whether any is ever without, and whether
//! they are its own.
//!
//! The mounted one is read from its Secret as the administrator; as on a node, the last one that
//! could be read stays. Time without a token counts in looks that Kubernetes has answered.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use ambient_shared::{clock::Clock, session::SessionHash, token::Token};
use ambient_testing::{cluster::Direct, table::Table};
use reqwest::Method;
use serde_json::Value;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::findings::Findings;

mod secret;

/// Time between two looks at the Secrets, and at what sessions hold.
const PAUSE: Duration = Duration::from_secs(1);

const SECRETS: &str =
    "/api/v1/secrets?labelSelector=ambient-code.io%2Fmanaged-by%3Dambient-control-plane";

/// Looks in a row at a session without any token before that is a finding. Its Secret is there
/// before its pod, so these are for one that is lost at once.
const NO_TOKEN: u32 = 20;

/// The same without a mounted one: nobody writes it while nobody leads.
const NO_MOUNTED: u32 = 60;

/// The same for a mounted one that is another run's, which was read as it was replaced.
const NOT_ITS_OWN: u32 = 5;

/// The tokens of all sessions that run.
pub struct Tokens {
    state: Mutex<State>,
    findings: Findings,
    clock: Clock,
}

#[derive(Default)]
struct State {
    held: HashMap<String, Held>,
    pulled: u64,
    mounted: u64,
    /// How often a mounted one was tried and taken.
    taken: u64,
    /// Fetches that came to nothing, by their kind.
    failures: BTreeMap<&'static str, u64>,
    least: Leasts,
}

/// What one session has.
#[derive(Default)]
struct Held {
    /// That of the run.
    generation: u32,
    pulled: Option<SystemTime>,
    mounted: Option<Token>,
    /// Looks in a row at which it had no token, no mounted one, and one that is not its own.
    without: u32,
    unmounted: u32,
    not_its_own: u32,
    is_found: bool,
}

/// The least life that was left.
#[derive(Default)]
struct Leasts {
    pulled: Option<Least>,
    mounted: Option<Least>,
    either: Option<Least>,
}

#[derive(Clone, Copy)]
struct Least {
    left: Duration,
    session: SessionHash,
    at: SystemTime,
}

impl Tokens {
    /// Looks until `quit`.
    pub fn open(
        direct: Direct,
        findings: &Findings,
        quit: CancellationToken,
        tasks: &mut JoinSet<()>,
    ) -> Arc<Self> {
        let tokens = Arc::new(Self {
            state: Mutex::default(),
            findings: findings.clone(),
            clock: Clock::system(),
        });
        let (watched, stop) = (Arc::clone(&tokens), quit.clone());
        tasks.spawn(async move {
            let looking = async {
                loop {
                    if let Ok((200, list)) = direct.ask(Method::GET, SECRETS, None).await {
                        watched.mounted(&list);
                    }
                    sleep(PAUSE).await;
                }
            };
            stop.run_until_cancelled(looking).await;
        });
        let watched = Arc::clone(&tokens);
        tasks.spawn(async move {
            let looking = async {
                loop {
                    watched.look(watched.clock.now());
                    sleep(PAUSE).await;
                }
            };
            quit.run_until_cancelled(looking).await;
        });
        tokens
    }

    /// From now on this session must have one, of the run of this generation.
    pub fn expect(&self, session: &str, generation: u32) {
        let held = Held {
            generation,
            ..Held::default()
        };
        self.lock().held.insert(session.to_owned(), held);
    }

    /// This session ends.
    pub fn forget(&self, session: &str) {
        self.lock().held.remove(session);
    }

    /// A session has fetched a token.
    pub fn pulled(&self, session: &str, token: &Token) {
        let mut state = self.lock();
        state.pulled += 1;
        if let Some(held) = state.held.get_mut(session) {
            held.pulled = token.expires_at();
        }
        if token.expires_at().is_none() {
            self.findings.add("a token without an expiry", session);
        }
        if token.is_expired(self.clock.now()) {
            self.findings
                .add("a token is expired when it is fetched", session);
        }
    }

    /// A fetch came to nothing, in this way.
    pub fn failed(&self, kind: &'static str) {
        *self.lock().failures.entry(kind).or_default() += 1;
    }

    /// The session's mounted token.
    pub fn mounted_of(&self, session: &str) -> Option<Token> {
        self.lock().held.get(session)?.mounted.clone()
    }

    /// The API server has taken a mounted token.
    pub fn taken(&self) {
        self.lock().taken += 1;
    }

    /// One look at all Secrets.
    fn mounted(&self, secrets: &Value) {
        let mut state = self.lock();
        let State { held, mounted, .. } = &mut *state;
        for secret in secrets["items"].as_array().into_iter().flatten() {
            let session = secret["metadata"]["labels"]["ambient-code.io/session-id"].as_str();
            let Some((session, held)) = session.and_then(|it| Some((it, held.get_mut(it)?))) else {
                continue;
            };
            match secret::token_of(secret, session, held.generation) {
                Ok(token) => {
                    held.not_its_own = 0;
                    let known = held.mounted.replace(token.clone());
                    *mounted += u64::from(!known.is_some_and(|it| it.same_secret(&token)));
                }
                Err(reason) => {
                    held.not_its_own += 1;
                    if held.not_its_own == NOT_ITS_OWN {
                        let what = format!("{session}: {reason}");
                        self.findings.add("a mounted token is not the run's", what);
                    }
                }
            }
        }
        for (session, held) in held {
            let (has_mounted, has_any) = (
                held.mounted.is_some(),
                held.mounted.is_some() || held.pulled.is_some(),
            );
            held.without = if has_any { 0 } else { held.without + 1 };
            held.unmounted = if has_mounted { 0 } else { held.unmounted + 1 };
            if held.without == NO_TOKEN {
                self.findings
                    .add("a running session never had a token", self.name(session));
            }
            if held.unmounted == NO_MOUNTED {
                self.findings.add(
                    "a running session never had a mounted token",
                    self.name(session),
                );
            }
        }
    }

    fn look(&self, now: SystemTime) {
        let mut state = self.lock();
        let State { held, least, .. } = &mut *state;
        for (session, held) in held {
            let hash = SessionHash::of(session);
            let left = |until: Option<SystemTime>| {
                until.map(|it| Least {
                    left: it.duration_since(now).unwrap_or_default(),
                    session: hash,
                    at: now,
                })
            };
            let mounted = held.mounted.as_ref().and_then(Token::expires_at);
            let either = left(held.pulled.max(mounted));
            lower(&mut least.pulled, left(held.pulled));
            lower(&mut least.mounted, left(mounted));
            lower(&mut least.either, either);
            if either.is_some_and(|it| it.left.is_zero()) && !held.is_found {
                held.is_found = true;
                self.findings.add(
                    "a running session held only expired tokens",
                    self.name(session),
                );
            }
        }
    }

    /// Whether there was always life left, and whether anything was there to be judged.
    pub fn judge(&self) {
        let state = self.lock();
        match state.least.either {
            Some(least) if least.left.is_zero() => {
                let at = humantime::format_rfc3339_seconds(least.at);
                let what = format!("{} at {at}", least.session);
                self.findings
                    .add("a session's better token had no life left", what);
            }
            Some(_) => {}
            None => self
                .findings
                .add("nothing was judged", "no session had a token"),
        }
        if state.taken == 0 {
            self.findings
                .add("nothing was judged", "no mounted token was taken");
        }
    }

    /// What there was of tokens.
    pub fn account(&self) -> Table {
        let state = self.lock();
        let mut table = Table::new(&["tokens", "count", "least life left"]);
        let mut row = |what: &str, count: Option<u64>, least: Option<Least>| {
            let count = count.map(|it| it.to_string()).unwrap_or_default();
            let least = least.map(|it| {
                let at = humantime::format_rfc3339_seconds(it.at);
                format!("{:.0} s ({} at {at})", it.left.as_secs_f32(), it.session)
            });
            table.row(&[what.to_owned(), count, least.unwrap_or_default()]);
        };
        row("fetched", Some(state.pulled), state.least.pulled);
        row("mounted", Some(state.mounted), state.least.mounted);
        row("the better of both", None, state.least.either);
        row("mounted, tried and taken", Some(state.taken), None);
        for (kind, count) in &state.failures {
            row(&format!("not fetched: {kind}"), Some(*count), None);
        }
        table
    }

    /// A session by its id, by the hash that logs have, and the time.
    fn name(&self, session: &str) -> String {
        let now = humantime::format_rfc3339_seconds(self.clock.now());
        format!("{session} ({}) at {now}", SessionHash::of(session))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lower(least: &mut Option<Least>, left: Option<Least>) {
    if let Some(left) = left {
        *least = Some(least.filter(|it| it.left <= left.left).unwrap_or(left));
    }
}

#[cfg(test)]
mod tests;
