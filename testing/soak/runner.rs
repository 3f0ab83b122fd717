//! Plays the runner of one session: fetches tokens from the replicas in turns, as through a Service,
//! with what its pod was given.

use std::{sync::Arc, time::Duration};

use ambient_shared::{
    bearer::PublicKey,
    clock::Clock,
    exchange::{Exchange, ExchangeError},
    proof::SessionKey,
    session::SessionId,
    token::{Token, refresh_in},
};
use ambient_testing::{cluster::Direct, operator::Operator};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::Method;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{findings::Findings, plan::Fault, tokens::Tokens, weather::Weather};

/// Pause after a failure, as a runner has it at first.
const AGAIN: Duration = Duration::from_secs(1);

/// Pause between two tries of the mounted token.
const TRY: Duration = Duration::from_secs(15);

/// Refusals in a row, by the token endpoint or by the API server, before they are a finding: a
/// control plane that has just started, or was cut off, does not know a session or a run that is as
/// new. As many failures of other kinds, without those that a fault explains.
const PATIENCE: usize = 20;

/// One session's runner.
pub struct Runner {
    pub session: String,
    /// That of the run.
    pub generation: u32,
    pub namespace: String,
    pub direct: Direct,
    pub tokens: Arc<Tokens>,
    pub findings: Findings,
    pub weather: Weather,
    pub endpoints: Vec<Url>,
    pub api: Operator,
    /// Which replica it asks first.
    pub first: u64,
}

impl Runner {
    /// Runs until `quit`.
    pub async fn run(self, quit: CancellationToken) {
        self.tokens.expect(&self.session, self.generation);
        let running = async { tokio::join!(self.fetch_on_and_on(), self.try_mounted()) };
        quit.run_until_cancelled(running).await;
        self.tokens.forget(&self.session);
    }

    async fn fetch_on_and_on(&self) {
        let (key, proof) = self.given().await;
        let id = SessionId::parse(self.session.clone()).expect("an id");
        let key = PublicKey::from_pem(&key).expect("the pod has the public key");
        let bearer = key.encrypt(&id).expect("an id can be encrypted");
        let exchange = |url: &Url| {
            let (client, proof) = (self.api.client().clone(), Some(proof.clone()));
            Exchange::new(client, url.clone(), bearer.clone(), proof, Clock::system())
        };
        let exchanges: Vec<_> = self.endpoints.iter().map(exchange).collect();
        let mut turns = exchanges
            .iter()
            .enumerate()
            .cycle()
            .skip(usize::try_from(self.first).unwrap_or(0) % 64);
        let (mut refusals, mut failures) = (Row::default(), Row::default());
        loop {
            let (replica, exchange) = turns.next().expect("a cycle has no end");
            let began = Instant::now();
            match exchange.fetch().await {
                Ok(token) => {
                    failures.ends();
                    self.tokens.pulled(&self.session, &token);
                    let verdict = self.try_out(&token).await;
                    if let Verdict::Refused(reason) = verdict {
                        self.refused(&mut refusals, &reason);
                    } else {
                        if let Verdict::Taken = verdict {
                            refusals.ends();
                        }
                        sleep(refresh_in(&token, Clock::system().now(), rand::random())).await;
                        continue;
                    }
                }
                Err(error) => {
                    self.tokens.failed(kind(&error));
                    let reason = ambient_shared::exit::report(&error);
                    if let ExchangeError::Refused { .. } = error {
                        self.refused(&mut refusals, &reason);
                    } else {
                        let explains = |it: Fault| it.excuses_no_token(replica);
                        let is_explained = self.weather.explains(began, explains);
                        self.failed(&mut failures, &error, is_explained, &reason);
                    }
                }
            }
            sleep(AGAIN).await;
        }
    }

    fn refused(&self, refusals: &mut Row, reason: &str) {
        if refusals.grows(false) {
            let what = format!("{}: {reason}", self.session);
            self.findings
                .add("a running session has no token that is taken", what);
        }
    }

    fn failed(&self, failures: &mut Row, error: &ExchangeError, is_explained: bool, reason: &str) {
        let what = || format!("{}: {reason}", self.session);
        if is_nonsense(error) && !is_explained {
            self.findings
                .add("a token endpoint does not answer like one", what());
        }
        if failures.grows(is_explained) {
            self.findings
                .add("a running session cannot fetch a token", what());
        }
    }

    /// Tries the mounted token again and again.
    async fn try_mounted(&self) {
        let mut refusals = Row::default();
        loop {
            let Some(token) = self.tokens.mounted_of(&self.session) else {
                sleep(AGAIN).await;
                continue;
            };
            match self.try_out(&token).await {
                Verdict::Taken => {
                    refusals.ends();
                    self.tokens.taken();
                    sleep(TRY).await;
                }
                Verdict::Refused(reason) => {
                    if refusals.grows(false) {
                        let what = format!("{}: {reason}", self.session);
                        self.findings
                            .add("a running session's mounted token is not taken", what);
                    }
                    sleep(AGAIN).await;
                }
                Verdict::Unknown => sleep(AGAIN).await,
            }
        }
    }

    /// What the API server says to the session's token. None of its refusals counts for one that has
    /// expired.
    async fn try_out(&self, token: &Token) -> Verdict {
        let answer = self.api.with_token(token.expose());
        let path = format!("/sessions/{}", self.session);
        let Ok((status, _)) = answer.try_request(Method::GET, &path, None).await else {
            return Verdict::Unknown;
        };
        match status.as_u16() {
            200 => Verdict::Taken,
            401 | 403 | 404 if !token.is_expired(Clock::system().now()) => {
                Verdict::Refused(format!("the API server says {status}"))
            }
            _ => Verdict::Unknown,
        }
    }

    /// Public key and session key, as its pod has them.
    async fn given(&self) -> (String, SessionKey) {
        let base = format!("/api/v1/namespaces/{}", self.namespace);
        let pod = format!("{base}/pods/session-{}-runner", self.session);
        let secret = format!("{base}/secrets/session-{}-creds", self.session);
        loop {
            let (pod, secret) = (self.read(&pod).await, self.read(&secret).await);
            let (public, session) = (public_key(&pod), session_key(&secret));
            if let (Some(public), Some(session)) = (public, session) {
                return (public, session);
            }
            sleep(AGAIN).await;
        }
    }

    async fn read(&self, path: &str) -> Value {
        let read = self.direct.ask(Method::GET, path, None).await;
        read.map_or(Value::Null, |(_, object)| object)
    }
}

/// What the API server says to a token.
enum Verdict {
    Taken,
    Refused(String),
    /// It cannot say.
    Unknown,
}

/// How many in a row came to nothing.
#[derive(Default)]
struct Row(usize);

impl Row {
    /// One more, which counts unless a fault explains it; whether that is now a finding.
    fn grows(&mut self, is_explained: bool) -> bool {
        self.0 += usize::from(!is_explained);
        self.0 == PATIENCE && !is_explained
    }

    fn ends(&mut self) {
        self.0 = 0;
    }
}

/// For the account.
fn kind(error: &ExchangeError) -> &'static str {
    match error {
        ExchangeError::Connect { .. } => "no answer",
        ExchangeError::Busy { .. } => "busy",
        ExchangeError::Refused { .. } => "refused",
        ExchangeError::Server { .. } => "failed",
        ExchangeError::NotAnEndpoint { .. } => "not an endpoint",
        ExchangeError::Malformed { .. } => "malformed",
    }
}

/// Whether nobody may answer so, not even now and then.
fn is_nonsense(error: &ExchangeError) -> bool {
    match error {
        ExchangeError::NotAnEndpoint { .. } | ExchangeError::Malformed { .. } => true,
        ExchangeError::Connect { .. }
        | ExchangeError::Busy { .. }
        | ExchangeError::Refused { .. }
        | ExchangeError::Server { .. } => false,
    }
}

fn public_key(pod: &Value) -> Option<String> {
    let containers = pod["spec"]["containers"].as_array()?;
    let mut variables = containers
        .iter()
        .filter_map(|it| it["env"].as_array())
        .flatten();
    let key = variables.find(|it| it["name"] == "AMBIENT_CP_TOKEN_PUBLIC_KEY")?;
    key["value"].as_str().map(ToOwned::to_owned)
}

fn session_key(secret: &Value) -> Option<SessionKey> {
    let key = STANDARD
        .decode(secret["data"]["session-key"].as_str()?)
        .ok()?;
    SessionKey::from_text(&String::from_utf8(key).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many findings there are in a row of failures, explained or not.
    fn found(row: &mut Row, explained: &[bool]) -> usize {
        let grows = explained.iter().filter(|it| row.grows(**it));
        grows.count()
    }

    #[test]
    fn failures_in_a_row_that_no_fault_explains_are_found_once() {
        let mut row = Row::default();
        assert_eq!(found(&mut row, &[true; 3 * PATIENCE]), 0);
        assert_eq!(found(&mut row, &[false; PATIENCE - 1]), 0);
        assert_eq!(found(&mut row, &[true; PATIENCE]), 0);
        assert_eq!(found(&mut row, &[false, true, false, true]), 1);

        let mut row = Row::default();
        assert_eq!(found(&mut row, &[false; PATIENCE - 1]), 0);
        row.ends();
        assert_eq!(found(&mut row, &[false; PATIENCE - 1]), 0);
        assert_eq!(found(&mut row, &[false; PATIENCE]), 1);
    }
}
