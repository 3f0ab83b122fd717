//! A whole system on this machine: `ambient-control-plane local` and its REST API as an operator
//! uses it.
//!
//! In: the flags beside `--data-dir` and the listeners. Out: sessions that can be created, watched
//! and stopped. All ports are free ones, and stay the same when it is killed and started again.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use ambient_shared::{
    phase::Phase,
    rest::{BASE, List, Session, SessionMessage},
    swap::{SECRET_DIR, SECRET_FILE, write_atomic},
};
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::{
    DEADLINE,
    disk::{Ballast, SmallDisk},
    keypair::RsaKey,
    ports::Port,
    processes::{self, Process},
    programs::{Program, Running, binary},
};

/// How often a state is asked for that nothing announces.
const POLL: Duration = Duration::from_millis(50);

/// A running `local`. Its sessions are ended when it is dropped.
#[derive(Debug)]
pub struct Local {
    data: TempDir,
    /// The data folder as it sees it.
    seen: PathBuf,
    setup: Setup,
    binary: PathBuf,
    _binaries: TempDir,
    addresses: Addresses,
    /// While it is down, nobody else gets them.
    _ports: [Port; 3],
    client: reqwest::Client,
    /// The program.
    pub program: Running,
}

/// A `local` that is to be started.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    flags: Vec<String>,
    env: Vec<(String, String)>,
    runner_env: Vec<(String, String)>,
    disk: Option<String>,
}

impl Setup {
    /// One with these flags beside `--data-dir` and those of the listeners.
    pub fn new(flags: &[&str]) -> Self {
        Self {
            flags: flags.iter().map(ToString::to_string).collect(),
            ..Self::default()
        }
    }

    /// With this variable in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With this variable in the environment of all its runners, whatever it would give them
    /// itself.
    #[must_use]
    pub fn runner_env(mut self, name: &str, value: &str) -> Self {
        self.runner_env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With its data folder on a disk of this size, such as `4m`, that it alone has.
    #[must_use]
    pub fn disk(mut self, size: &str) -> Self {
        self.disk = Some(size.to_owned());
        self
    }

    /// Starts it on a new folder.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start(self) -> Local {
        let data = tempfile::tempdir().expect("a folder");
        put_keypair(data.path());
        let binaries = tempfile::tempdir().expect("a folder");
        let binary = self.binaries(binaries.path());
        let ports = [Port::free(), Port::free(), Port::free()];
        let [rest, grpc, token] = ports.each_ref().map(Port::address);
        let addresses = Addresses { rest, grpc, token };
        let program = self.launch(&binary, data.path(), addresses).await;
        Local {
            seen: self.seen(data.path(), &program),
            data,
            binary,
            addresses,
            _ports: ports,
            client: reqwest::Client::builder()
                .no_proxy()
                .build()
                .expect("a client"),
            program,
            setup: self,
            _binaries: binaries,
        }
    }

    /// The control plane's binary; where runners get more variables, a copy of it beside a runner
    /// that sets them, since it takes the programs that lie beside its own binary.
    fn binaries(&self, folder: &Path) -> PathBuf {
        if self.runner_env.is_empty() {
            return binary("ambient-control-plane");
        }
        for name in ["ambient-control-plane", "ambient-sidecar"] {
            // Not a symlink, which the program would look through.
            let copy = folder.join(name);
            if fs::hard_link(binary(name), &copy).is_err() {
                fs::copy(binary(name), &copy).expect("a copy");
            }
        }
        let mut script = "#!/bin/sh\n".to_owned();
        for (name, value) in &self.runner_env {
            let value = value.replace('\'', "'\\''");
            let _ = writeln!(script, "export {name}='{value}'");
        }
        let _ = writeln!(
            script,
            "exec '{}' \"$@\"",
            binary("ambient-runner").display()
        );
        let runner = folder.join("ambient-runner");
        write_atomic(&runner, script.as_bytes(), 0o755).expect("a script");
        folder.join("ambient-control-plane")
    }

    fn small_disk(&self, data: &Path) -> Option<SmallDisk> {
        let size = self.disk.as_ref()?;
        Some(SmallDisk::new(data, size))
    }

    /// The data folder as the program sees it.
    fn seen(&self, data: &Path, program: &Running) -> PathBuf {
        let disk = self.small_disk(data);
        disk.map_or_else(|| data.to_owned(), |disk| disk.seen_by(program.pid()))
    }

    async fn launch(&self, binary: &Path, data: &Path, ports: Addresses) -> Running {
        let disk = self.small_disk(data);
        let program = disk.map_or_else(|| Program::at(binary), |disk| disk.program(binary));
        let mut program = program
            .env("AMBIENT_LOG_FORMAT", "json")
            .arg("local")
            .arg("--data-dir")
            .arg(data)
            .args(["--api-listen".to_owned(), ports.rest.to_string()])
            .args(["--grpc-listen".to_owned(), ports.grpc.to_string()])
            .args(["--token-listen".to_owned(), ports.token.to_string()])
            .args(&self.flags);
        for (name, value) in &self.env {
            program = program.env(name, value);
        }
        let mut running = program.start();
        for port_of in ["rest", "grpc", "endpoint"] {
            running.listening(port_of).await;
        }
        running
    }
}

/// Where a `local` listens.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// REST of the API server.
    pub rest: SocketAddr,
    /// gRPC of the API server.
    pub grpc: SocketAddr,
    /// The token endpoint.
    pub token: SocketAddr,
}

/// A session that is to be created.
#[derive(Debug, Clone, Default)]
pub struct NewSession {
    body: serde_json::Map<String, Value>,
    annotations: serde_json::Map<String, Value>,
}

impl NewSession {
    /// A session with the bundled demo agent.
    pub fn demo() -> Self {
        Self::default()
    }

    /// A session with this command as its agent.
    pub fn command(command: &[&str]) -> Self {
        Self::demo().annotation("agent-command", &json!(command).to_string())
    }

    /// A session with this shell script as its agent.
    pub fn script(script: &str) -> Self {
        Self::command(&["sh", "-c", script])
    }

    /// One of the annotations of contract section 5, without `ambient-code.io/`.
    #[must_use]
    pub fn annotation(mut self, name: &str, value: &str) -> Self {
        self.annotations
            .insert(format!("ambient-code.io/{name}"), json!(value));
        self
    }

    /// How messages reach the agent: `none`, `lines` or `stream-json`.
    #[must_use]
    pub fn io(self, mode: &str) -> Self {
        self.annotation("agent-io", mode)
    }

    /// Any field of a session.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.body.insert(name.to_owned(), value.into());
        self
    }

    /// The body of its POST.
    pub fn into_json(mut self) -> Value {
        self.body.entry("name").or_insert_with(|| json!("test"));
        if !self.annotations.is_empty() {
            let text = Value::Object(self.annotations).to_string();
            self.body.insert("annotations".to_owned(), json!(text));
        }
        Value::Object(self.body)
    }
}

impl Local {
    /// Starts one on a new folder, with these flags beside those of the listeners.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start(flags: &[&str]) -> Self {
        Setup::new(flags).start().await
    }

    /// Kills it with SIGKILL; sessions go on.
    pub async fn kill(&mut self) {
        self.program.kill().await;
    }

    /// Starts it again on the same folder and ports, after [`Local::kill`].
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start_again(&mut self) {
        let again = self
            .setup
            .launch(&self.binary, self.data.path(), self.addresses);
        self.program = again.await;
        self.seen = self.setup.seen(self.data.path(), &self.program);
    }

    /// Takes all the room that is left on its disk, which [`Setup::disk`] gave it.
    ///
    /// # Panics
    /// When it has no disk of its own.
    pub fn fill_disk(&self) -> Ballast {
        let disk = self.setup.small_disk(self.data.path());
        disk.expect("a disk of its own").fill(self.program.pid())
    }

    /// Processes of its sessions: all that have its data folder in their arguments or environment,
    /// apart from itself.
    pub fn processes(&self) -> Vec<Process> {
        let mut all = processes::with(&self.data.path().display().to_string());
        all.retain(|process| process.pid != self.program.pid());
        all
    }

    /// The one process of a session that runs this program, such as `ambient-sidecar`.
    ///
    /// # Panics
    /// When there is none, or more than one.
    pub fn process(&self, id: &str, program: &str) -> Process {
        let mut found = self.processes();
        found.retain(|process| process.program() == program && process.mentions(id));
        assert_eq!(found.len(), 1, "one {program} of {id}: {found:#?}");
        found.remove(0)
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Its data folder.
    pub fn data(&self) -> &Path {
        &self.seen
    }

    /// The operator's API token.
    ///
    /// # Panics
    /// When its file cannot be read.
    pub fn operator_token(&self) -> String {
        fs::read_to_string(self.data().join("operator-token"))
            .expect("local writes an operator token")
            .trim()
            .to_owned()
    }

    /// PEM of the token endpoint's public key.
    ///
    /// # Panics
    /// When its file cannot be read.
    pub fn public_key(&self) -> String {
        fs::read_to_string(self.data().join("keypair/public.pem"))
            .expect("local writes its public key")
    }

    /// One request to the REST API with the operator's token; `path` follows the base path.
    ///
    /// # Panics
    /// When there is no answer.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        let url = format!("http://{}{BASE}{path}", self.addresses.rest);
        let mut request = self
            .client
            .request(method, url)
            .timeout(DEADLINE)
            .bearer_auth(self.operator_token());
        if let Some(body) = body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_string());
        }
        let answer = request.send().await.expect("the API server answers");
        let status = answer.status();
        let body = answer.text().await.expect("the answer is whole");
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// Creates a session.
    ///
    /// # Panics
    /// When the API server refuses it.
    pub async fn create(&self, session: NewSession) -> String {
        let body = Some(session.into_json());
        let (status, session) = self.request(Method::POST, "/sessions", body).await;
        assert_eq!(status, StatusCode::CREATED, "{session}");
        session["id"].as_str().expect("a session has an id").into()
    }

    /// A session as it is now.
    ///
    /// # Panics
    /// When it is not there.
    pub async fn session(&self, id: &str) -> Session {
        let (status, session) = self
            .request(Method::GET, &format!("/sessions/{id}"), None)
            .await;
        assert_eq!(status, StatusCode::OK, "{session}");
        serde_json::from_value(session).expect("a session")
    }

    /// All sessions that a search finds.
    ///
    /// # Panics
    /// When the API server refuses the search.
    pub async fn search(&self, search: &str) -> Vec<Session> {
        let query: String = url::form_urlencoded::byte_serialize(search.as_bytes()).collect();
        let path = format!("/sessions?size=1000&search={query}");
        let (status, list) = self.request(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{list}");
        let list: List<Session> = serde_json::from_value(list).expect("a list");
        list.items
    }

    /// Starts a session again, or stops it.
    ///
    /// # Panics
    /// When the API server refuses.
    pub async fn act(&self, id: &str, action: &str) {
        let path = format!("/sessions/{id}/{action}");
        let (status, answer) = self.request(Method::POST, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{action}: {answer}");
    }

    /// Waits until a session is in this phase.
    ///
    /// # Panics
    /// When it ends otherwise, or at the deadline.
    pub async fn phase(&self, id: &str, wanted: Phase) -> Session {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let session = self.session(id).await;
            let phase = Phase::of(session.phase.as_deref()).expect("a known phase");
            if phase == wanted {
                return session;
            }
            assert!(
                !phase.is_terminal() && Instant::now() < deadline,
                "session is {phase}, not {wanted}: {session:?}; {}",
                self.scene(id)
            );
            sleep(POLL).await;
        }
    }

    /// Writes to a session as a person does.
    ///
    /// # Panics
    /// When the API server refuses it.
    pub async fn say(&self, id: &str, text: &str) {
        let path = format!("/sessions/{id}/messages");
        let body = json!({"event_type": "user", "payload": text});
        let (status, answer) = self.request(Method::POST, &path, Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
    }

    /// All messages of a session.
    ///
    /// # Panics
    /// When the API server refuses.
    pub async fn messages(&self, id: &str) -> Vec<SessionMessage> {
        let path = format!("/sessions/{id}/messages?after_seq=0");
        let (status, messages) = self.request(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{messages}");
        serde_json::from_value(messages).expect("a list of messages")
    }

    /// Waits for a message of this type with this text in it.
    ///
    /// # Panics
    /// At the deadline.
    pub async fn message(&self, id: &str, event_type: &str, part: &str) -> SessionMessage {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let messages = self.messages(id).await;
            let found = messages
                .iter()
                .find(|it| it.event_type == event_type && it.payload.contains(part));
            if let Some(message) = found {
                return message.clone();
            }
            assert!(
                Instant::now() < deadline,
                "no {event_type} message with {part:?} among {messages:#?}; {}",
                self.scene(id)
            );
            sleep(POLL).await;
        }
    }

    /// The texts of all messages of a type, in order.
    pub async fn texts(&self, id: &str, event_type: &str) -> Vec<String> {
        let messages = self.messages(id).await;
        messages
            .into_iter()
            .filter(|message| message.event_type == event_type)
            .map(|message| message.payload)
            .collect()
    }

    /// A session's folder.
    ///
    /// # Panics
    /// When it has none.
    pub fn folder(&self, id: &str) -> PathBuf {
        let mut folders = vec![self.data().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    if entry.file_name() == *id {
                        return entry.path();
                    }
                    folders.push(entry.path());
                }
            }
        }
        panic!("no folder of session {id} in {}", self.data().display());
    }

    /// A file of this name in a session's folder or below it.
    ///
    /// # Panics
    /// When it is not there.
    pub fn file(&self, id: &str, name: &str) -> PathBuf {
        find(&self.folder(id), name)
            .unwrap_or_else(|| panic!("no {name} in {}", self.folder(id).display()))
    }

    /// What a session's processes wrote, for a failed test.
    fn scene(&self, id: &str) -> String {
        let mut scene = String::new();
        let mut folders = vec![self.data().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.display().to_string().contains(id)
                    && path.extension().is_some_and(|it| it == "log")
                {
                    let log = fs::read_to_string(&path).unwrap_or_default();
                    let _ = write!(scene, "\n--- {}\n{log}", path.display());
                }
            }
        }
        scene
    }
}

/// Puts a keypair into a data folder, to be used as it is: making one takes an unoptimised build
/// seconds.
///
/// # Panics
/// When it cannot be written.
pub fn put_keypair(data: &Path) {
    let folder = data.join("keypair");
    fs::DirBuilder::new()
        .mode(SECRET_DIR)
        .create(&folder)
        .expect("a folder");
    let key = RsaKey::shared();
    for (name, pem) in [
        ("private.pem", key.private_pkcs1_pem()),
        ("public.pem", key.public_pem()),
    ] {
        write_atomic(&folder.join(name), pem.as_bytes(), SECRET_FILE).expect("a file");
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // Before its folder goes, so that nothing is written into it again.
        self.program.kill_now();
        processes::kill_all(&self.data.path().display().to_string());
    }
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let direct = folder.join(name);
    if direct.exists() {
        return Some(direct);
    }
    fs::read_dir(folder)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .find_map(|entry| find(&entry.path(), name))
}
