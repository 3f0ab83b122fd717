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
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{findings::Findings, tokens::Tokens};

/// Pause after a failure, as a runner has it at first.
const AGAIN: Duration = Duration::from_secs(1);

/// Refusals in a row, by the token endpoint or by the API server, before they are a finding: a
/// control plane that has just started, or was cut off, does not know a session or a run that is as
/// new.
const PATIENCE: usize = 20;

/// One session's runner.
pub struct Runner {
    pub session: String,
    pub namespace: String,
    pub direct: Direct,
    pub tokens: Arc<Tokens>,
    pub findings: Findings,
    pub endpoints: Vec<Url>,
    pub api: Operator,
    /// Which replica it asks first.
    pub first: u64,
}

impl Runner {
    /// Runs until `quit`.
    pub async fn run(self, quit: CancellationToken) {
        quit.run_until_cancelled(self.fetch_on_and_on()).await;
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
        self.tokens.expect(&self.session);
        let mut turns = exchanges
            .iter()
            .cycle()
            .skip(usize::try_from(self.first).unwrap_or(0) % 64);
        let mut refusals = 0;
        loop {
            let exchange = turns.next().expect("a cycle has no end");
            let refused = match exchange.fetch().await {
                Ok(token) => {
                    self.tokens.pulled(&self.session, &token);
                    let Some(refused) = self.try_out(&token).await else {
                        refusals = 0;
                        sleep(refresh_in(&token, Clock::system().now(), rand::random())).await;
                        continue;
                    };
                    Some(refused)
                }
                Err(error) => matches!(error, ExchangeError::Refused { .. })
                    .then(|| ambient_shared::exit::report(&error)),
            };
            if let Some(reason) = refused {
                refusals += 1;
                if refusals == PATIENCE {
                    let what = format!("{}: {reason}", self.session);
                    self.findings
                        .add("a running session has no token that is taken", what);
                }
            }
            sleep(AGAIN).await;
        }
    }

    /// How the API server refuses it, if it does so before its expiry. An API server that cannot say
    /// does not count.
    async fn try_out(&self, token: &Token) -> Option<String> {
        let answer = self.api.with_token(token.expose());
        let path = format!("/sessions/{}", self.session);
        let (status, _) = answer.try_request(Method::GET, &path, None).await.ok()?;
        let is_refused = matches!(status.as_u16(), 401 | 403);
        let is_valid = !token.is_expired(Clock::system().now());
        (is_refused && is_valid).then(|| format!("the API server says {status}"))
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
