//! An OpenID Connect issuer: discovery, JWKS, and a token endpoint for client credentials.
//!
//! A test sets how the token endpoint answers, and signs tokens for whomever it likes. Its clock is
//! the machine's.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ambient_shared::clock::Clock;
use aws_lc_rs::rsa::KeySize;
use axum::{
    Form, Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::keypair::RsaKey;

/// The one client that the issuer knows.
pub const CLIENT_ID: &str = "ambient-control-plane";

/// That client's secret.
pub const CLIENT_SECRET: &str = "a secret of tests only";

/// The audience of all its tokens.
pub const AUDIENCE: &str = "ambient-api";

/// How the token endpoint answers a client with the right credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Answer {
    /// A token that lives as long as [`Idp::set_life`] says.
    #[default]
    Token,
    /// A token, and no word of its life in the answer (its own `exp` is there).
    NoExpiry,
    /// A token that is not a JWT, with a life in the answer.
    Opaque,
    /// This, and no word of its life: a token that never expires.
    Plain(String),
    /// A token that expired a minute ago.
    Expired,
    /// This status, with an OAuth error as the body.
    Status(u16),
    /// 200 and a login page.
    Html,
    /// Nothing, for an hour.
    Hang,
    /// A token, after this time.
    Slow(Duration),
}

/// A running issuer; ends when dropped.
#[derive(Debug)]
pub struct Idp {
    address: SocketAddr,
    shared: Arc<Shared>,
    _server: JoinSet<()>,
}

#[derive(Debug)]
struct Shared {
    issuer: String,
    clock: Clock,
    state: Mutex<IdpState>,
}

#[derive(Debug)]
struct IdpState {
    answer: Answer,
    life: Duration,
    requests: usize,
    kid: usize,
    key: RsaKey,
}

impl Idp {
    /// Starts an issuer with a new key and tokens that live 15 minutes.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            issuer: format!("http://{address}"),
            clock: Clock::system(),
            state: Mutex::new(IdpState {
                answer: Answer::default(),
                life: Duration::from_mins(15),
                requests: 0,
                kid: 1,
                key: RsaKey::generate(KeySize::Rsa2048),
            }),
        });
        let app = Router::new()
            .route("/.well-known/openid-configuration", get(discovery))
            .route("/jwks", get(jwks))
            .route("/token", post(token))
            .with_state(Arc::clone(&shared));
        let mut server = JoinSet::new();
        server.spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        Self {
            address,
            shared,
            _server: server,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its `iss`.
    pub fn issuer(&self) -> String {
        self.shared.issuer.clone()
    }

    /// For `OIDC_TOKEN_URL`.
    pub fn token_url(&self) -> String {
        format!("{}/token", self.shared.issuer)
    }

    /// For `AMBIENT_JWKS`.
    pub fn jwks_url(&self) -> String {
        format!("{}/jwks", self.shared.issuer)
    }

    /// How the token endpoint answers from now on.
    pub fn answer(&self, answer: Answer) {
        self.shared.lock().answer = answer;
    }

    /// Life of the tokens issued from now on.
    pub fn set_life(&self, life: Duration) {
        self.shared.lock().life = life;
    }

    /// How many token requests it has had, whatever the answer.
    pub fn requests(&self) -> usize {
        self.shared.lock().requests
    }

    /// Signs with a new key from now on, and publishes only that.
    pub fn rotate_key(&self) {
        let mut state = self.shared.lock();
        state.kid += 1;
        state.key = RsaKey::generate(KeySize::Rsa2048);
    }

    /// A valid token of this user, as a login would give it.
    pub fn token_of(&self, user: &str) -> String {
        let life = self.shared.lock().life;
        let claims = self.shared.claims(user, life.as_secs().cast_signed());
        self.sign(&claims)
    }

    /// A token with exactly these claims.
    pub fn sign(&self, claims: &Value) -> String {
        let state = self.shared.lock();
        state.key.sign_jwt(&state.kid.to_string(), claims)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, IdpState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `life` may be negative: a token that has expired.
    fn claims(&self, user: &str, life: i64) -> Value {
        let now = self.clock.unix_seconds().cast_signed();
        json!({
            "iss": self.issuer, "aud": AUDIENCE, "typ": "Bearer",
            "sub": format!("id-of-{user}"), "preferred_username": user,
            "iat": now.min(now + life), "exp": now + life,
            "jti": uuid::Uuid::new_v4().to_string(),
        })
    }
}

async fn discovery(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let issuer = &shared.issuer;
    Json(json!({
        "issuer": issuer,
        "jwks_uri": format!("{issuer}/jwks"),
        "token_endpoint": format!("{issuer}/token"),
        "grant_types_supported": ["client_credentials"],
    }))
}

async fn jwks(State(shared): State<Arc<Shared>>) -> Json<Value> {
    let state = shared.lock();
    Json(json!({"keys": [state.key.jwk(&state.kid.to_string())]}))
}

#[derive(Deserialize)]
struct TokenRequest {
    grant_type: String,
    client_id: Option<String>,
    client_secret: Option<String>,
}

async fn token(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Form(request): Form<TokenRequest>,
) -> Response {
    let (answer, life) = {
        let mut state = shared.lock();
        state.requests += 1;
        (state.answer.clone(), state.life)
    };
    if request.grant_type != "client_credentials" {
        return refuse(StatusCode::BAD_REQUEST, "unsupported_grant_type");
    }
    if !knows(&headers, &request) {
        return refuse(StatusCode::UNAUTHORIZED, "invalid_client");
    }
    let life_s = life.as_secs();
    let issue = |life_s: i64| {
        let claims = shared.claims(&format!("service-account-{CLIENT_ID}"), life_s);
        let state = shared.lock();
        state.key.sign_jwt(&state.kid.to_string(), &claims)
    };
    let grant = |token: String| {
        Json(json!({"access_token": token, "token_type": "Bearer", "expires_in": life_s}))
            .into_response()
    };
    match answer {
        Answer::Token => grant(issue(life_s.cast_signed())),
        Answer::NoExpiry => {
            let token = issue(life_s.cast_signed());
            Json(json!({"access_token": token, "token_type": "Bearer"})).into_response()
        }
        Answer::Opaque => grant(format!("opaque-{}", uuid::Uuid::new_v4().simple())),
        Answer::Plain(token) => {
            Json(json!({"access_token": token, "token_type": "Bearer"})).into_response()
        }
        Answer::Expired => {
            Json(json!({"access_token": issue(-60), "token_type": "Bearer", "expires_in": 0}))
                .into_response()
        }
        Answer::Status(status) => refuse(
            StatusCode::from_u16(status).expect("a status from 100 to 999"),
            "temporarily_unavailable",
        ),
        Answer::Html => Html("<!doctype html><title>Please sign in</title>").into_response(),
        Answer::Hang => {
            tokio::time::sleep(Duration::from_hours(1)).await;
            refuse(StatusCode::SERVICE_UNAVAILABLE, "temporarily_unavailable")
        }
        Answer::Slow(after) => {
            tokio::time::sleep(after).await;
            grant(issue(life_s.cast_signed()))
        }
    }
}

/// RFC 6749, section 2.3.1: credentials by HTTP Basic or in the form.
fn knows(headers: &HeaderMap, request: &TokenRequest) -> bool {
    let basic = || {
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let text = STANDARD.decode(value.strip_prefix("Basic ")?).ok()?;
        let text = String::from_utf8(text).ok()?;
        let (id, secret) = text.split_once(':')?;
        Some((form_decoded(id), form_decoded(secret)))
    };
    let in_form = || Some((request.client_id.clone()?, request.client_secret.clone()?));
    basic()
        .or_else(in_form)
        .is_some_and(|(id, secret)| id == CLIENT_ID && secret == CLIENT_SECRET)
}

/// The section above says that id and secret are form-encoded before they are joined.
fn form_decoded(text: &str) -> String {
    let pair = format!("x={text}");
    url::form_urlencoded::parse(pair.as_bytes())
        .next()
        .map_or_else(String::new, |(_, value)| value.into_owned())
}

fn refuse(status: StatusCode, error: &str) -> Response {
    (status, Json(json!({"error": error}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(idp: &Idp, secret: &str) -> reqwest::Response {
        reqwest::Client::new()
            .post(idp.token_url())
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(format!(
                "grant_type=client_credentials&client_id={CLIENT_ID}&client_secret={secret}"
            ))
            .send()
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn right_secret_gets_a_token_that_says_who_it_is() {
        let idp = Idp::start().await;
        idp.set_life(Duration::from_secs(30));
        let answer: Value = ask(&idp, "a+secret+of+tests+only")
            .await
            .json()
            .await
            .unwrap();
        assert_eq!(answer["expires_in"], 30);
        let token = answer["access_token"].as_str().unwrap();
        assert_eq!(token.split('.').count(), 3);
        assert_eq!(ask(&idp, "wrong").await.status(), 401);
        assert_eq!(idp.requests(), 2);
    }

    #[tokio::test]
    async fn can_be_told_to_fail() {
        let idp = Idp::start().await;
        idp.answer(Answer::Status(503));
        assert_eq!(ask(&idp, "a+secret+of+tests+only").await.status(), 503);
        idp.answer(Answer::Html);
        let page = ask(&idp, "a+secret+of+tests+only").await;
        assert_eq!(page.status(), 200);
        assert!(page.text().await.unwrap().starts_with("<!doctype"));
    }
}
