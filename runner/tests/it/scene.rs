//! What a runner finds around it: folders, a mounted token, an agent, and a token endpoint.

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use ambient_shared::{
    clock::Clock,
    proof::{HEADER, SessionKey, SessionRoot},
    session::SessionId,
    swap::SecretVolume,
};
use ambient_testing::{DEADLINE, keypair::RsaKey, programs::Program};
use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
    routing::get,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tempfile::TempDir;
use tokio::{task::AbortHandle, time::Instant};

/// The session of all tests.
pub(crate) const SESSION: &str = "session-0001-of-the-tests";

/// What such a runner has as its `BOT_TOKEN`.
pub(crate) const FIXED: &str = "fixed-token-of-the-tests";

/// A folder in which a runner finds all that it needs. Gone when dropped.
pub(crate) struct Scene(TempDir);

impl Scene {
    pub(crate) fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(scene.path("mount")).unwrap();
        scene
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn token_file(&self) -> PathBuf {
        self.path("run/token")
    }

    /// What the runner wrote into its termination log.
    pub(crate) fn last_words(&self) -> String {
        std::fs::read_to_string(self.path("termination-log")).unwrap_or_default()
    }

    /// Replaces the mounted files as the kubelet does.
    pub(crate) fn mount(&self, token: &str) {
        let key = session_key();
        SecretVolume::new(self.path("mount"))
            .write(&[
                ("bot-token", token.as_bytes()),
                ("session-key", key.expose().as_bytes()),
            ])
            .unwrap();
    }

    /// A runner whose files are all in this folder, without any source of tokens but the mount.
    pub(crate) fn runner(&self) -> Program {
        self.dress(Program::new("ambient-runner"))
    }

    /// Gives a program the environment of such a runner.
    pub(crate) fn dress(&self, program: Program) -> Program {
        program
            .env("LOG_LEVEL", "info,ambient_runner=debug")
            .env("SESSION_ID", SESSION)
            .env("AMBIENT_BOT_TOKEN_FILE", self.path("mount/bot-token"))
            .env("AMBIENT_SESSION_KEY_FILE", self.path("mount/session-key"))
            .env("AMBIENT_TOKEN_FILE", self.token_file())
            .env("AMBIENT_SPOOL_DIR", self.path("spool"))
            .env("AMBIENT_TERMINATION_LOG", self.path("termination-log"))
    }

    /// A runner that has a token from the start and never needs another.
    pub(crate) fn runner_with_token(&self) -> Program {
        self.runner().env("BOT_TOKEN", FIXED)
    }

    /// A runner that pulls.
    pub(crate) fn runner_of(&self, endpoint: &Endpoint) -> Program {
        self.pulling(Program::new("ambient-runner"), endpoint)
    }

    /// Gives a program the environment of a runner that pulls.
    pub(crate) fn pulling(&self, program: Program, endpoint: &Endpoint) -> Program {
        if !self.path("mount/session-key").exists() {
            let key = session_key();
            SecretVolume::new(self.path("mount"))
                .write(&[("session-key", key.expose().as_bytes())])
                .unwrap();
        }
        self.dress(program)
            .env("AMBIENT_CP_TOKEN_URL", &endpoint.url)
            .env("AMBIENT_CP_TOKEN_PUBLIC_KEY", RsaKey::shared().public_pem())
    }
}

/// Gives a runner a shell script as its agent.
pub(crate) trait Agent {
    fn agent(self, script: &str) -> Self;
}

impl Agent for Program {
    fn agent(self, script: &str) -> Self {
        self.args(["--", "sh", "-c", script])
    }
}

pub(crate) fn session_key() -> SessionKey {
    SessionRoot::new([7; 32]).session_key(&SessionId::parse(SESSION).unwrap())
}

/// A token like a JWT, whose signature says who made it, and when it expires to the millisecond:
/// `tok-<name>-<milliseconds since the epoch>`. Its `exp` is in whole seconds, so a little before.
pub(crate) fn token(name: &str, life: Duration) -> String {
    let expiry = millis(Clock::system().now() + life);
    let claims = serde_json::json!({"exp": expiry / 1000}).to_string();
    format!("e30.{}.tok-{name}-{expiry}", URL_SAFE_NO_PAD.encode(claims))
}

/// Life that a [`token`] has left at this time; zero when it has expired.
pub(crate) fn life_of(token: &str, now: SystemTime) -> Duration {
    let expiry: u64 = token.rsplit_once('-').unwrap().1.parse().unwrap();
    Duration::from_millis(expiry.saturating_sub(millis(now)))
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    u64::try_from(since.as_millis()).unwrap()
}

/// What a token endpoint says.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// A new token of this life.
    Token(Duration),
    /// This status, `Retry-After`, and body.
    Status(u16, Option<u64>, &'static str),
    /// Nothing, ever.
    Silence,
}

/// A token endpoint over HTTP. Ends when dropped.
pub(crate) struct Endpoint {
    pub(crate) url: String,
    state: Arc<Mutex<Script>>,
    serving: AbortHandle,
}

struct Script {
    next: VecDeque<Answer>,
    then: Answer,
    requests: Vec<Request>,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) at: Instant,
    pub(crate) bearer: String,
    pub(crate) proof: Option<String>,
}

impl Endpoint {
    /// Answers `next` one after the other, and `then` for ever.
    pub(crate) async fn start(next: impl Into<VecDeque<Answer>>, then: Answer) -> Self {
        let state = Arc::new(Mutex::new(Script {
            next: next.into(),
            then,
            requests: Vec::new(),
        }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/token", listener.local_addr().unwrap());
        let app = Router::new()
            .route("/token", get(answer))
            .with_state(state.clone());
        #[expect(clippy::disallowed_methods, reason = "aborted when dropped")]
        let serving = tokio::spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        Self {
            url,
            state,
            serving: serving.abort_handle(),
        }
    }

    /// What it says from now on.
    pub(crate) fn now_says(&self, then: Answer) {
        let mut state = self.state.lock().unwrap();
        state.next.clear();
        state.then = then;
    }

    /// All requests so far.
    pub(crate) fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn answer(State(state): State<Arc<Mutex<Script>>>, headers: HeaderMap) -> Response {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let bearer = text("authorization").and_then(|value| value.strip_prefix("Bearer "));
    let (answer, number) = {
        let mut state = state.lock().unwrap();
        state.requests.push(Request {
            at: Instant::now(),
            bearer: bearer.unwrap_or_default().to_owned(),
            proof: text(HEADER).map(str::to_owned),
        });
        let next = state.next.pop_front();
        let answer = next.unwrap_or_else(|| state.then.clone());
        (answer, state.requests.len())
    };
    match answer {
        Answer::Token(life) => {
            let token = token(&format!("pulled{number}"), life);
            // To the millisecond, as tokens of 2 s need it.
            let expiry = Clock::system().now() + life;
            let expires_at = prost_types::Timestamp::from(expiry).to_string();
            let body = serde_json::json!({"token": token, "expires_at": expires_at});
            axum::Json(body).into_response()
        }
        Answer::Status(status, retry_after, body) => {
            let status = StatusCode::from_u16(status).unwrap();
            match retry_after {
                Some(seconds) => {
                    (status, [("retry-after", seconds.to_string())], body).into_response()
                }
                None => (status, body).into_response(),
            }
        }
        Answer::Silence => std::future::pending().await,
    }
}

/// Waits until `found` has something, with a look every 10 ms.
///
/// # Panics
/// At the deadline, with what was waited for.
pub(crate) async fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < until, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Time limits for what is to fail at one, the next when the machine was too slow to do before it
/// what the test asks for.
pub(crate) const LIMITS: [&str; 3] = ["1s", "8s", "50s"];

/// What `unshare` needs to make namespaces: as a user without rights, first one of users in which
/// it has them. Where that is forbidden, `unshare` says so, and the test fails.
pub(crate) fn namespaces() -> &'static [&'static str] {
    if nix::unistd::geteuid().is_root() {
        &[]
    } else {
        &["--user", "--map-root-user"]
    }
}

/// Whether a process is there, zombies included.
pub(crate) fn is_there(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

/// Whether a process runs. One that has ended may still be a zombie for a moment when its parent
/// is gone too.
pub(crate) fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    let state = stat.ok().and_then(|stat| {
        let (_, fields) = stat.rsplit_once(") ")?;
        fields.chars().next()
    });
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}
