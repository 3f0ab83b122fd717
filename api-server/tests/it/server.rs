//! A server under test, and people who call it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use ambient_shared::{
    api::Api,
    client::{GrpcAddress, grpc_channel, install_crypto_provider},
    clock::Clock,
    proto::{PushSessionMessageRequest, SessionMessage, WatchSessionMessagesRequest},
    resolve::Resolver,
    token::Token,
};
use ambient_testing::{
    DEADLINE,
    disk::SmallDisk,
    keypair::RsaKey,
    programs::{Program, Running},
};
use aws_lc_rs::rsa::KeySize;
use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::watch, time::timeout};
use tonic::{Status, Streaming, transport::Channel};

pub const SERVICE: &str = "service-token-of-tests";
pub const OPERATOR: &str = "operator-token-of-tests";
pub const ISSUER: &str = "https://idp.test";
pub const SESSION_ISSUER: &str = "https://control-plane.test";
pub const AUDIENCE: &str = "ambient-api";
const BASE: &str = "/api/ambient/v1";
const BINARY: &str = env!("CARGO_BIN_EXE_ambient-api-server");

/// The key that signs users' tokens.
pub fn users_key() -> &'static RsaKey {
    static KEY: OnceLock<RsaKey> = OnceLock::new();
    KEY.get_or_init(|| RsaKey::generate(KeySize::Rsa2048))
}

/// The key that signs sessions' tokens.
pub fn sessions_key() -> &'static RsaKey {
    static KEY: OnceLock<RsaKey> = OnceLock::new();
    KEY.get_or_init(|| RsaKey::generate(KeySize::Rsa2048))
}

pub fn now() -> u64 {
    Clock::system().unix_seconds()
}

/// What a login gives a user.
pub fn claims(user: &str, life_s: u64) -> Value {
    json!({
        "iss": ISSUER, "aud": AUDIENCE, "typ": "Bearer", "sub": format!("id-of-{user}"),
        "preferred_username": user, "iat": now(), "exp": now() + life_s,
    })
}

pub fn user(name: &str) -> String {
    user_for(name, 600)
}

pub fn user_for(name: &str, life_s: u64) -> String {
    users_key().sign_jwt("users-1", &claims(name, life_s))
}

/// What the control plane mints for a session.
pub fn session_claims(id: &str, generation: i64) -> Value {
    json!({
        "iss": SESSION_ISSUER, "aud": AUDIENCE, "typ": "Bearer", "sub": format!("session:{id}"),
        "iat": now(), "exp": now() + 600, "gen": generation,
    })
}

pub fn minted(id: &str, generation: i64) -> String {
    sessions_key().sign_jwt("sessions-1", &session_claims(id, generation))
}

pub struct Server {
    pub running: Running,
    pub rest: String,
    pub grpc: String,
    pub folder: Arc<TempDir>,
    client: Client,
}

impl Server {
    /// A server on a new database file.
    pub async fn start() -> Self {
        let folder = TempDir::new().unwrap();
        Self::start_in(Arc::new(folder)).await
    }

    /// A server on the database of a folder, maybe of a server that was killed.
    pub async fn start_in(folder: Arc<TempDir>) -> Self {
        let database = folder.path().join("ambient.db");
        Self::start_with(folder, &database, &[]).await
    }

    pub async fn start_in_memory() -> Self {
        let folder = Arc::new(TempDir::new().unwrap());
        Self::start_with(folder, Path::new(":memory:"), &[]).await
    }

    /// A server whose database is on a disk that it alone has.
    pub async fn start_on(disk: &SmallDisk, folder: &Path) -> Self {
        let program = disk.program(Path::new(BINARY));
        let database = folder.join("ambient.db");
        Self::launch(program, Arc::new(TempDir::new().unwrap()), &database, &[]).await
    }

    pub async fn start_with(
        folder: Arc<TempDir>,
        database: &Path,
        environment: &[(&str, &str)],
    ) -> Self {
        Self::launch(Program::at(BINARY), folder, database, environment).await
    }

    async fn launch(
        program: Program,
        folder: Arc<TempDir>,
        database: &Path,
        environment: &[(&str, &str)],
    ) -> Self {
        install_crypto_provider();
        let users = write_jwks(folder.path(), "users.json", &[users_key().jwk("users-1")]);
        let sessions = write_jwks(
            folder.path(),
            "sessions.json",
            &[sessions_key().jwk("sessions-1")],
        );
        let mut program = program
            .args(["--rest-listen", "127.0.0.1:0"])
            .args(["--grpc-listen", "127.0.0.1:0"])
            .arg("--database")
            .arg(database)
            .env("AMBIENT_JWKS", users)
            .env("AMBIENT_SESSION_JWKS", sessions)
            .env("AMBIENT_JWT_ISSUER", format!("{ISSUER},{SESSION_ISSUER}"))
            .env("AMBIENT_JWT_AUDIENCE", AUDIENCE)
            .env("AMBIENT_API_TOKEN", SERVICE)
            .env("AMBIENT_OPERATOR_TOKEN", OPERATOR)
            .env("GRPC_SERVICE_ACCOUNT", "ambient-cp")
            .env("AMBIENT_ADMINS", "root");
        for (name, value) in environment {
            program = program.env(name, value);
        }
        let mut running = program.start();
        let rest = running.listening("rest").await;
        let grpc = running.listening("grpc").await;
        Self {
            running,
            rest: format!("http://{rest}"),
            grpc: grpc.to_string(),
            folder,
            client: Client::new(),
        }
    }

    /// A REST call below the base path.
    pub fn request(&self, method: Method, token: &str, path: &str) -> RequestBuilder {
        self.client
            .request(method, format!("{}{BASE}{path}", self.rest))
            .bearer_auth(token)
            .timeout(DEADLINE)
    }

    /// Status and JSON body of a REST call.
    pub async fn call(
        &self,
        method: Method,
        token: &str,
        path: &str,
        body: Option<Value>,
    ) -> (u16, Value) {
        let mut request = self.request(method, token, path);
        if let Some(body) = body {
            request = request.body(body.to_string());
        }
        answer(request).await
    }

    pub async fn get(&self, token: &str, path: &str) -> (u16, Value) {
        self.call(Method::GET, token, path, None).await
    }

    pub async fn post(&self, token: &str, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::POST, token, path, Some(body)).await
    }

    pub async fn patch(&self, token: &str, path: &str, body: Value) -> (u16, Value) {
        self.call(Method::PATCH, token, path, Some(body)).await
    }

    /// The id of a new session.
    pub async fn create_session(&self, token: &str, fields: Value) -> String {
        let (status, session) = self.post(token, "/sessions", fields).await;
        assert_eq!(status, 201, "{session}");
        session["id"].as_str().unwrap().to_owned()
    }

    pub fn channel(&self) -> Channel {
        let address = GrpcAddress {
            address: self.grpc.clone(),
            tls: false,
            ca: None,
        };
        grpc_channel(&Resolver::system(), &address).unwrap()
    }

    /// gRPC clients that call with this token.
    pub fn api(&self, token: &str) -> Api {
        let token = Token::new(token, None).unwrap();
        Api::new(self.channel(), watch::channel(Some(token)).1)
    }

    pub async fn push(
        &self,
        token: &str,
        session: &str,
        event_type: &str,
        payload: &str,
    ) -> Result<SessionMessage, Status> {
        push(&self.api(token), session, event_type, payload).await
    }

    pub async fn watch_messages(
        &self,
        token: &str,
        session: &str,
        after_seq: i64,
    ) -> Result<Streaming<SessionMessage>, Status> {
        let request = WatchSessionMessagesRequest {
            session_id: session.to_owned(),
            after_seq,
        };
        let mut sessions = self.api(token).sessions();
        let answer = timeout(DEADLINE, sessions.watch_session_messages(request));
        Ok(answer.await.expect("an answer in time")?.into_inner())
    }
}

pub async fn push(
    api: &Api,
    session: &str,
    event_type: &str,
    payload: &str,
) -> Result<SessionMessage, Status> {
    let request = PushSessionMessageRequest {
        session_id: session.to_owned(),
        event_type: event_type.to_owned(),
        payload: payload.to_owned(),
    };
    let mut sessions = api.sessions();
    let answer = timeout(DEADLINE, sessions.push_session_message(request));
    Ok(answer.await.expect("an answer in time")?.into_inner())
}

/// Status and JSON body of a request; `Null` without a body.
pub async fn answer(request: RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    let json = if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}, not JSON: {text}"))
    };
    (status, json)
}

/// The next thing of a stream, within the deadline.
pub async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    timeout(DEADLINE, stream.message())
        .await
        .expect("a message in time")
}

/// The next `count` things of a stream.
pub async fn take<T>(stream: &mut Streaming<T>, count: usize) -> Vec<T> {
    let mut taken = Vec::with_capacity(count);
    while taken.len() < count {
        taken.push(next(stream).await.unwrap().expect("no end"));
    }
    taken
}

pub fn write_jwks(folder: &Path, name: &str, keys: &[Value]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, json!({ "keys": keys }).to_string()).unwrap();
    path
}
