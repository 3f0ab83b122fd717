//! Messages between a real API server and an agent, through a real runner.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ambient_shared::{
    api::Api,
    client::{GrpcAddress, grpc_channel, install_crypto_provider},
    proto::{
        CreateSessionRequest, GetSessionRequest, PushSessionMessageRequest, SessionMessage,
        UpdateSessionStatusRequest, WatchSessionMessagesRequest,
    },
    resolve::Resolver,
    token::Token,
};
use ambient_testing::{
    DEADLINE,
    faults::Relay,
    idp::Idp,
    programs::{BIN_DIR, Program, Running},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tonic::Code;

use crate::scene::{Agent as _, Scene, eventually, namespaces};

/// What the runners of these tests sign in with: a service's static token.
const SERVICE: &str = "service-token-of-the-tests";
/// Who creates sessions and talks in them.
const OPERATOR: &str = "operator-token-of-the-tests";

pub(crate) const ECHO: &str = r#"while read -r line; do echo "you said $line"; done"#;

/// An API server on a database file, with one session, behind a relay whose address stays.
pub(crate) struct ApiServer {
    pub(crate) scene: Scene,
    server: Running,
    pub(crate) relay: Relay,
    session: String,
    people: Api,
    jwks: Option<String>,
}

fn api_server_is_there() {
    let folder = std::env::var_os(BIN_DIR).map_or_else(
        || {
            let exe = std::env::current_exe().unwrap();
            exe.parent().unwrap().parent().unwrap().to_owned()
        },
        PathBuf::from,
    );
    assert!(
        folder.join("ambient-api-server").is_file(),
        "these tests need ambient-api-server in {}; `cargo build --workspace --bins` builds it",
        folder.display()
    );
}

async fn start_server(scene: &Scene, jwks: Option<&str>) -> (Running, SocketAddr) {
    let mut program = Program::new("ambient-api-server")
        .env("AMBIENT_REST_LISTEN", "127.0.0.1:0")
        .env("AMBIENT_GRPC_LISTEN", "127.0.0.1:0")
        .env("AMBIENT_DATABASE", scene.path("api.db"))
        .env("AMBIENT_API_TOKEN", SERVICE)
        .env("AMBIENT_OPERATOR_TOKEN", OPERATOR);
    if let Some(jwks) = jwks {
        program = program
            .env("AMBIENT_JWKS", jwks)
            .env("GRPC_SERVICE_ACCOUNT", "runner");
    }
    let mut server = program.start();
    let address = server.listening("grpc").await;
    (server, address)
}

impl ApiServer {
    pub(crate) async fn start() -> Self {
        Self::with_jwks(None).await
    }

    async fn with_jwks(jwks: Option<String>) -> Self {
        api_server_is_there();
        let scene = Scene::new();
        let (server, address) = start_server(&scene, jwks.as_deref()).await;
        let relay = Relay::start(address).await;
        install_crypto_provider();
        let to = GrpcAddress {
            address: relay.address().to_string(),
            tls: false,
            ca: None,
        };
        let operator = Token::new(OPERATOR, None).unwrap();
        let (_, token) = watch::channel(Some(operator));
        let people = Api::new(grpc_channel(&Resolver::system(), &to).unwrap(), token);
        let created = people
            .sessions()
            .create_session(CreateSessionRequest {
                name: "a session of the tests".to_owned(),
                ..CreateSessionRequest::default()
            })
            .await
            .unwrap()
            .into_inner();
        let session = created.metadata.unwrap().id;
        people
            .sessions()
            .update_session_status(UpdateSessionStatusRequest {
                id: session.clone(),
                phase: Some("Running".to_owned()),
                ..UpdateSessionStatusRequest::default()
            })
            .await
            .unwrap();
        Self {
            scene,
            server,
            relay,
            session,
            people,
            jwks,
        }
    }

    /// As by `kill -9`; nothing listens until [`ApiServer::come_back`].
    async fn die(&mut self) {
        self.server.kill().await;
        self.relay.reset();
    }

    async fn come_back(&mut self) {
        let (server, address) = start_server(&self.scene, self.jwks.as_deref()).await;
        self.server = server;
        self.relay.set_server(address);
        self.relay.reset();
        // The test's own connection may not know yet that it is gone.
        let reached = async {
            let id = self.session.clone();
            let mut client = self.people.sessions();
            while let Err(error) = client
                .get_session(GetSessionRequest { id: id.clone() })
                .await
            {
                assert_eq!(error.code(), Code::Unavailable, "{error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(DEADLINE, reached).await.expect("reached in time");
    }

    /// A runner of the session, with a token for ever.
    fn runner(&self, io: &str) -> Program {
        self.runner_without_token(io).env("BOT_TOKEN", SERVICE)
    }

    fn runner_without_token(&self, io: &str) -> Program {
        self.with_session(self.scene.runner(), io)
    }

    pub(crate) fn with_session(&self, runner: Program, io: &str) -> Program {
        runner
            .env("SESSION_ID", &self.session)
            .env("AMBIENT_GRPC_ENABLED", "true")
            .env("AMBIENT_GRPC_URL", self.relay.address().to_string())
            .env("AMBIENT_AGENT_IO", io)
    }

    async fn push(&self, event_type: &str, payload: &str) -> i64 {
        let pushed = self
            .people
            .sessions()
            .push_session_message(PushSessionMessageRequest {
                session_id: self.session.clone(),
                event_type: event_type.to_owned(),
                payload: payload.to_owned(),
            })
            .await;
        pushed.unwrap().into_inner().seq
    }

    pub(crate) async fn say(&self, text: &str) -> i64 {
        self.push("user", text).await
    }

    pub(crate) async fn close_input(&self) {
        self.push("system", r#"{"custom_event":"ambient.input-closed"}"#)
            .await;
    }

    /// The session's messages, until they are as wanted. Each must come before the deadline, as
    /// all of them may be a lot.
    async fn until(
        &self,
        what: &str,
        wanted: impl Fn(&[SessionMessage]) -> bool,
    ) -> Vec<SessionMessage> {
        let mut messages = Vec::new();
        let request = WatchSessionMessagesRequest {
            session_id: self.session.clone(),
            after_seq: 0,
        };
        let mut client = self.people.sessions();
        let watch = timeout(DEADLINE, client.watch_session_messages(request)).await;
        let mut stream = watch.expect("a watch in time").unwrap().into_inner();
        while !wanted(&messages) {
            let next = timeout(DEADLINE, stream.message()).await;
            assert!(next.is_ok(), "never came: {what}; there is {messages:#?}");
            messages.push(next.unwrap().unwrap().expect("the watch goes on"));
        }
        messages
    }

    /// Waits for that many messages of a type, and gives all there are.
    pub(crate) async fn payloads(&self, event_type: &str, number: usize) -> Vec<String> {
        let of_type = |messages: &[SessionMessage]| -> Vec<String> {
            let of_type = messages.iter().filter(|m| m.event_type == event_type);
            of_type.map(|m| m.payload.clone()).collect()
        };
        let what = format!("{number} {event_type} messages");
        let messages = self.until(&what, |m| of_type(m).len() >= number).await;
        of_type(&messages)
    }

    /// Waits for that many records of deliveries. A runner that is killed before it kept one
    /// delivers the message again.
    async fn records(&self, number: usize) {
        let is_record = |m: &&SessionMessage| m.payload.contains("ambient.delivered");
        self.until(&format!("{number} records"), |m| {
            m.iter().filter(is_record).count() == number
        })
        .await;
    }

    /// Everything of a session in which nothing happens any more.
    async fn all(&self, event_type: &str) -> Vec<String> {
        let end = self
            .push("system", r#"{"custom_event":"end of test"}"#)
            .await;
        let all = self
            .until("the end", |m| m.last().is_some_and(|m| m.seq >= end))
            .await;
        all.into_iter()
            .filter(|m| m.event_type == event_type)
            .map(|m| m.payload)
            .collect()
    }
}

#[tokio::test]
async fn a_conversation_in_lines_that_the_end_of_input_ends() {
    let api = ApiServer::start().await;
    api.say("hello\nthere").await;
    let mut runner = api.runner("lines").agent(ECHO).start();
    assert_eq!(api.payloads("assistant", 1).await, ["you said hello there"]);
    api.say("again").await;
    assert_eq!(api.payloads("assistant", 2).await[1], "you said again");
    for n in 0..20 {
        api.say(&format!("line {n}")).await;
    }
    api.close_input().await;
    assert_eq!(runner.wait().await.code(), Some(0));
    let said = api.all("assistant").await;
    assert_eq!(said.len(), 22);
    assert_eq!(said[21], "you said line 19");
}

#[tokio::test]
async fn a_server_killed_in_the_middle_loses_and_doubles_nothing() {
    let mut api = ApiServer::start().await;
    // Talks by itself and answers, so that both ways are busy when the server goes.
    let script = r#"
        (n=0; while [ $n -lt 300 ]; do n=$((n+1)); echo "tick $n"; sleep 0.01; done) &
        while read -r line; do echo "you said $line"; done
        wait"#;
    let mut runner = api.runner("lines").agent(script).start();
    let mut asked = Vec::new();
    for round in 0..3 {
        api.payloads("assistant", 20 + round * 60).await;
        for n in 0..5 {
            let text = format!("round {round} message {n}");
            api.say(&text).await;
            asked.push(format!("you said {text}"));
        }
        api.die().await;
        api.come_back().await;
    }
    api.close_input().await;
    assert_eq!(runner.wait().await.code(), Some(0));

    let said = api.all("assistant").await;
    let ticks: Vec<_> = said
        .iter()
        .filter(|s| s.starts_with("tick"))
        .cloned()
        .collect();
    let expected: Vec<_> = (1..=300).map(|n| format!("tick {n}")).collect();
    assert_eq!(ticks, expected);
    let answers: Vec<_> = said.into_iter().filter(|s| s.starts_with("you")).collect();
    assert_eq!(answers, asked);
}

#[tokio::test]
async fn what_is_said_while_the_server_is_away_arrives_later() {
    let mut api = ApiServer::start().await;
    let runner = api
        .runner("lines")
        .agent("echo one; read -r go; echo two; echo three");
    let mut runner = runner.start();
    api.payloads("assistant", 1).await;
    api.say("go").await;
    api.die().await;
    api.come_back().await;
    assert_eq!(runner.wait().await.code(), Some(0));
    assert_eq!(api.all("assistant").await, ["one", "two", "three"]);
}

#[tokio::test]
async fn a_token_that_expires_in_the_middle_of_the_stream_is_renewed() {
    let idp = Idp::start().await;
    let api = ApiServer::with_jwks(Some(idp.jwks_url())).await;
    // Time for the first answer, also on a slow machine.
    let life = Duration::from_secs(15);
    idp.set_life(life);
    let minted = Instant::now();
    api.scene.mount(&idp.token_of("runner"));
    let mut runner = api
        .runner_without_token("lines")
        .agent(
            r#"(n=0; while kill -0 $$; do n=$((n+1)); echo "tick $n"; sleep 0.2; done) 2>/dev/null &
               while read -r line; do echo "you said $line"; done
               kill $!; wait; echo end"#,
        )
        .start();
    api.say("one").await;
    api.until("an answer", |m| {
        m.iter().any(|m| m.payload == "you said one")
    })
    .await;
    // Expired, and nobody has another: pushes and the stream are rejected.
    tokio::time::sleep_until(minted + life + Duration::from_secs(1)).await;
    api.say("two").await;
    idp.set_life(Duration::from_secs(600));
    api.scene.mount(&idp.token_of("runner"));
    api.until("an answer", |m| {
        m.iter().any(|m| m.payload == "you said two")
    })
    .await;
    runner
        .log_line("a renewed token", |line| {
            let message = line["message"].as_str().unwrap_or_default();
            message.starts_with("token renewed, as the API server rejected")
        })
        .await;
    api.close_input().await;
    assert_eq!(runner.wait().await.code(), Some(0));
    let said = api.all("assistant").await;
    let (ticks, answers): (Vec<_>, Vec<_>) = said.into_iter().partition(|s| s.starts_with("tick"));
    let expected: Vec<_> = (1..=ticks.len()).map(|n| format!("tick {n}")).collect();
    assert_eq!(ticks, expected);
    assert_eq!(answers, ["you said one", "you said two", "end"]);
}

#[tokio::test]
async fn the_prompt_is_handed_over_exactly_once() {
    // No user message: the prompt itself.
    let api = ApiServer::start().await;
    let with_prompt = |api: &ApiServer| {
        api.runner("lines")
            .env("INITIAL_PROMPT", "preamble\n\ndo it")
            .env("AMBIENT_PREAMBLE", "preamble")
            .agent(ECHO)
    };
    let mut runner = with_prompt(&api).start();
    let said = api.payloads("assistant", 1).await;
    assert_eq!(said, ["you said preamble  do it"]);
    api.say("next").await;
    assert_eq!(api.payloads("assistant", 2).await[1], "you said next");
    api.records(2).await;
    runner.kill().await;
    // Neither after the runner was killed, nor after a restart of the session.
    for resume in ["false", "true"] {
        let mut runner = with_prompt(&api).env("IS_RESUME", resume).start();
        let text = format!("resume {resume}");
        api.say(&text).await;
        let wanted = if resume == "false" { 3 } else { 4 };
        let said = api.payloads("assistant", wanted).await;
        assert_eq!(said[wanted - 1], format!("you said {text}"));
        api.records(wanted).await;
        runner.kill().await;
    }

    // A user message: it gets the preamble.
    let api = ApiServer::start().await;
    api.say("do it").await;
    let mut runner = with_prompt(&api).start();
    api.say("next").await;
    let said = api.payloads("assistant", 2).await;
    assert_eq!(said, ["you said preamble  do it", "you said next"]);
    api.close_input().await;
    assert_eq!(runner.wait().await.code(), Some(0));
    assert_eq!(api.all("assistant").await.len(), 2);
}

#[tokio::test]
async fn a_runner_that_was_killed_delivers_only_what_was_not() {
    let api = ApiServer::start().await;
    let mut runner = api.runner("lines").agent(ECHO).start();
    api.say("one").await;
    api.say("two").await;
    api.payloads("assistant", 2).await;
    api.records(2).await;
    runner.kill().await;
    api.say("three").await;
    let mut runner = api.runner("lines").agent(ECHO).start();
    api.say("four").await;
    api.payloads("assistant", 4).await;
    api.close_input().await;
    assert_eq!(runner.wait().await.code(), Some(0));
    let said = api.all("assistant").await;
    let expected = ["one", "two", "three", "four"].map(|text| format!("you said {text}"));
    assert_eq!(said, expected);
}

#[tokio::test]
async fn stream_json_becomes_events_and_turns_end_the_agent() {
    let api = ApiServer::start().await;
    let agent = r#"
        echo '{"type":"system","subtype":"init"}'
        while read -r line; do
            echo '{"type":"assistant","message":{"content":[{"type":"text","text":"hm"},{"type":"tool_use","id":"t1","name":"Bash","input":{"command":"ls"}}]}}'
            echo '{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1","content":"file"}]}}'
            echo "{\"type\":\"heard\",\"line\":$line}"
            echo '{"type":"result","subtype":"success","is_error":false}'
        done"#;
    let mut runner = api
        .runner("stream-json")
        .env("AMBIENT_AGENT_TURNS", "1")
        .agent(agent)
        .start();
    api.say("do \"it\"").await;
    assert_eq!(runner.wait().await.code(), Some(0));
    let all = api.until("all", |m| {
        m.iter().any(|m| m.payload.contains("run_finished"))
    });
    let all: Vec<(String, Value)> = all
        .await
        .into_iter()
        .filter(|m| m.event_type != "user" && !m.payload.contains("ambient."))
        .map(|m| {
            let payload = serde_json::from_str(&m.payload);
            (m.event_type, payload.unwrap_or(Value::String(m.payload)))
        })
        .collect();
    let heard = json!({"type": "user", "message": {"role": "user",
        "content": [{"type": "text", "text": "do \"it\""}]}});
    let expected = [
        ("lifecycle", json!({"event": "run_started"})),
        ("assistant", json!("hm")),
        (
            "tool_use",
            json!({"tool": "Bash", "tool_call_id": "t1", "input": {"command": "ls"}}),
        ),
        (
            "tool_result",
            json!({"tool_call_id": "t1", "result": "file"}),
        ),
        (
            "system",
            json!({"custom_event": "heard", "value": {"type": "heard", "line": heard}}),
        ),
        ("lifecycle", json!({"event": "run_finished"})),
    ]
    .map(|(kind, payload)| (kind.to_owned(), payload));
    assert_eq!(all, expected);
}

#[tokio::test]
async fn the_agent_cannot_say_its_token() {
    let api = ApiServer::start().await;
    let mut runner = api
        .runner("lines")
        .agent(r#"echo "my token is $(cat "$AMBIENT_TOKEN_FILE")!""#)
        .start();
    assert_eq!(runner.wait().await.code(), Some(0));
    assert_eq!(api.all("assistant").await, ["my token is [masked]!"]);
}

#[tokio::test]
async fn a_server_that_is_away_slows_the_agent_instead_of_filling_memory() {
    let mut api = ApiServer::start().await;
    // 100 lines of 1,000,000 bytes: more than the spool holds. The progress is in a file.
    let progress = api.scene.path("progress");
    let agent = format!(
        r#"read -r go
           line=$(head -c 999990 /dev/zero | tr '\0' x)
           n=0; while [ $n -lt 100 ]; do n=$((n+1)); echo "$n $line"; echo $n > {0}.new; mv {0}.new {0}; done"#,
        progress.display()
    );
    let mut runner = api.runner("lines").agent(&agent).start();
    api.say("go").await;
    api.records(1).await;
    api.die().await;
    let lines = || {
        let text = std::fs::read_to_string(&progress).ok()?;
        text.trim().parse::<u32>().ok()
    };
    for nearly_full in [15, 30, 45, 60] {
        eventually("more lines in the spool", || {
            lines().filter(|n| *n >= nearly_full)
        })
        .await;
    }
    // It must stop by itself; two looks that see the same are not proof, but a spool without a
    // bound would be through in this time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let stopped = lines().unwrap();
    assert!(
        stopped < 75,
        "{stopped} lines of 1 MB went into a spool of 64 MiB"
    );
    let resident = resident_bytes(runner.pid());
    assert!(resident < 64 << 20, "{resident} bytes");

    api.come_back().await;
    api.payloads("assistant", 100).await;
    assert_eq!(runner.wait().await.code(), Some(0));
    let said = api.all("assistant").await;
    let numbers: Vec<_> = said.iter().map(|s| s.split(' ').next().unwrap()).collect();
    let expected: Vec<_> = (1..=100).map(|n| n.to_string()).collect();
    assert_eq!(numbers, expected);
}

fn resident_bytes(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

#[tokio::test]
async fn a_stopped_runner_pushes_the_agents_last_words() {
    let api = ApiServer::start().await;
    let mut runner = api
        .runner("lines")
        .agent(r"trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
        .start();
    api.payloads("assistant", 1).await;
    runner.signal(Signal::SIGTERM);
    assert_eq!(runner.wait().await.code(), Some(3));
    assert_eq!(api.all("assistant").await, ["ready", "bye"]);
}

#[tokio::test]
async fn an_agent_that_is_started_again_goes_on_where_the_last_one_was() {
    for resume in ["false", "true"] {
        let idp = Idp::start().await;
        let api = ApiServer::with_jwks(Some(idp.jwks_url())).await;
        idp.set_life(Duration::from_secs(600));
        api.scene.mount(&idp.token_of("runner"));
        // The first that reads its input to the end waits to be started again.
        let agent = r#"echo start
            while read -r line; do echo "you said $line"; done
            if [ -e ended ]; then exit 0; fi
            touch ended; exec sleep 600"#;
        let mut runner = api
            .runner_without_token("lines")
            .folder(api.scene.path("."))
            .env("AMBIENT_ON_REFRESH", "restart")
            .env("INITIAL_PROMPT", "do it")
            .env("IS_RESUME", resume)
            .agent(agent)
            .start();
        api.payloads("assistant", 1).await;
        api.say("one").await;
        let so_far = if resume == "false" { 3 } else { 2 };
        api.payloads("assistant", so_far).await;

        api.scene.mount(&idp.token_of("runner"));
        api.payloads("assistant", so_far + 1).await;
        api.say("two").await;
        api.payloads("assistant", so_far + 2).await;

        api.close_input().await;
        let ended = api.scene.path("ended");
        eventually("the end of input", || ended.exists().then_some(())).await;
        api.scene.mount(&idp.token_of("runner"));
        assert_eq!(runner.wait().await.code(), Some(0), "resume: {resume}");
        let said = api.all("assistant").await;
        let mut expected = vec!["start", "you said do it", "you said one"];
        expected.extend(["start", "you said two", "start"]);
        if resume == "true" {
            expected.remove(1);
        }
        assert_eq!(said, expected, "resume: {resume}");
    }
}

#[tokio::test]
async fn messages_that_could_not_be_pushed_make_an_end_in_order_a_failure() {
    let mut api = ApiServer::start().await;
    let mut runner = api
        .runner("lines")
        .agent("trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done")
        .start();
    api.payloads("assistant", 1).await;
    api.die().await;
    runner.signal(Signal::SIGTERM);
    // After the 28 s in which it is tried.
    assert_eq!(runner.wait().await.code(), Some(69));
    let words = api.scene.last_words();
    assert!(words.contains("could not be pushed"), "{words}");

    api.come_back().await;
    let mut runner = api.runner("lines").agent("exit 0").start();
    assert_eq!(runner.wait().await.code(), Some(0));
    assert_eq!(api.all("assistant").await, ["ready", "bye"]);
}

#[tokio::test]
async fn a_full_disk_loses_nothing() {
    let api = ApiServer::start().await;
    let spool = api.scene.path("small");
    std::fs::create_dir(&spool).unwrap();
    // A disk of 128 KiB, seen by this runner alone.
    let script = format!(
        "mount -t tmpfs -o size=128k none {0} && exec {1} \"$@\"",
        spool.display(),
        ambient_testing::programs::binary("ambient-runner").display(),
    );
    let agent = r#"n=0; while [ $n -lt 40 ]; do n=$((n+1)); echo "$n $(head -c 20000 /dev/zero | tr '\0' x)"; done"#;
    let mut runner = Program::at("unshare")
        .args(namespaces())
        .args(["-m", "sh", "-c", &script, "runner", "--", "sh", "-c", agent])
        .env("AMBIENT_LOG_FORMAT", "json")
        .env("AMBIENT_BOT_TOKEN_FILE", api.scene.path("mount/bot-token"))
        .env("AMBIENT_TOKEN_FILE", api.scene.token_file())
        .env("AMBIENT_TERMINATION_LOG", api.scene.path("termination-log"))
        .env("AMBIENT_SPOOL_DIR", &spool)
        .env("BOT_TOKEN", SERVICE);
    runner = api.with_session(runner, "lines");
    let mut runner = runner.start();
    assert_eq!(runner.wait().await.code(), Some(0));
    let said = api.all("assistant").await;
    let numbers: Vec<_> = said.iter().map(|s| s.split(' ').next().unwrap()).collect();
    let expected: Vec<_> = (1..=40).map(|n| n.to_string()).collect();
    assert_eq!(numbers, expected);
}
