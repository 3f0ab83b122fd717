//! What tokens each running session has, pulled and mounted, and whether any is ever without.
//!
//! The mounted one is read from its Secret as the administrator; as on a node, the last one that
//! could be read stays.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use ambient_shared::{clock::Clock, token::Token};
use ambient_testing::{cluster::Direct, table::Table};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::Method;
use serde_json::Value;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::findings::Findings;

/// Time between two looks at the Secrets, and at what sessions hold.
const PAUSE: Duration = Duration::from_secs(1);

const SECRETS: &str =
    "/api/v1/secrets?labelSelector=ambient-code.io%2Fmanaged-by%3Dambient-control-plane";

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
    least: Least,
}

/// What one session has.
#[derive(Default)]
struct Held {
    pulled: Option<SystemTime>,
    mounted: Option<SystemTime>,
    is_found: bool,
}

/// The least life that was left.
#[derive(Default)]
struct Least {
    pulled: Option<Duration>,
    mounted: Option<Duration>,
    either: Option<Duration>,
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
                    watched.look();
                    sleep(PAUSE).await;
                }
            };
            quit.run_until_cancelled(looking).await;
        });
        tokens
    }

    /// From now on this session must have one.
    pub fn expect(&self, session: &str) {
        self.lock().held.entry(session.to_owned()).or_default();
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
        if token.is_expired(self.clock.now()) {
            self.findings
                .add("a token is expired when it is fetched", session);
        }
    }

    fn mounted(&self, secrets: &Value) {
        let mut state = self.lock();
        let mut news = 0;
        for secret in secrets["items"].as_array().into_iter().flatten() {
            let session = secret["metadata"]["labels"]["ambient-code.io/session-id"].as_str();
            let Some(held) = session.and_then(|it| state.held.get_mut(it)) else {
                continue;
            };
            let token = secret["data"]["api-token"].as_str();
            let token = token.and_then(|it| STANDARD.decode(it).ok());
            let token = token.and_then(|it| Token::new(&String::from_utf8(it).ok()?, None).ok());
            let expiry = token.and_then(|it| it.expires_at());
            if expiry.is_some() && held.mounted != expiry {
                held.mounted = expiry;
                news += 1;
            }
        }
        state.mounted += news;
    }

    fn look(&self) {
        let now = self.clock.now();
        let mut state = self.lock();
        let State { held, least, .. } = &mut *state;
        for (session, held) in held {
            let left = |until: Option<SystemTime>| {
                until.map(|it| it.duration_since(now).unwrap_or_default())
            };
            let (pulled, mounted) = (left(held.pulled), left(held.mounted));
            let either = pulled.max(mounted);
            lower(&mut least.pulled, pulled);
            lower(&mut least.mounted, mounted);
            lower(&mut least.either, either);
            if either == Some(Duration::ZERO) && !held.is_found {
                held.is_found = true;
                self.findings.add(
                    "a running session held only expired tokens",
                    format!("{session} at {}", humantime::format_rfc3339_seconds(now)),
                );
            }
        }
    }

    /// What there was of tokens.
    pub fn account(&self) -> Table {
        let state = self.lock();
        let seconds = |it: Option<Duration>| {
            it.map_or_else(String::new, |it| format!("{:.0} s", it.as_secs_f32()))
        };
        let mut table = Table::new(&["tokens", "count", "least life left"]);
        let rows = [
            ("fetched", state.pulled.to_string(), state.least.pulled),
            ("mounted", state.mounted.to_string(), state.least.mounted),
            ("the better of both", String::new(), state.least.either),
        ];
        for (what, count, least) in rows {
            table.row(&[what.to_owned(), count, seconds(least)]);
        }
        table
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn lower(least: &mut Option<Duration>, left: Option<Duration>) {
    if let Some(left) = left {
        *least = Some(least.map_or(left, |least| least.min(left)));
    }
}
