//! The real program while ten thousand connections send slowly, when it has no descriptor left, and
//! when there is no room for its log: who asks gets its token.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ambient_shared::{
    bearer::PublicKey,
    clock::Clock,
    harden,
    phase::Phase,
    proof::{self, SessionKey},
    session::SessionId,
};
use ambient_testing::{
    DEADLINE,
    load::{self, Plan, percentile},
    local::{Local, NewSession},
    programs::{Program, binary},
    siege::Siege,
};
use nix::sys::signal::Signal;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::scene::raw;

/// Connections that send slowly.
const BESIEGERS: usize = 10_000;

/// Descriptors of this process for all else.
const OTHERS: u64 = 1_000;

/// Sessions that ask, each as often as its share of requests allows.
const SESSIONS: usize = 10;
const ASKS: usize = 18;

/// Longest wait of a good client for its token. Debug builds on a shared machine are slow; a place
/// in the old backlog was had after 10 s.
const GOOD_DEADLINE: Duration = Duration::from_secs(5);

/// A control plane with sessions.
struct Town {
    local: Local,
    public: PublicKey,
    sessions: Vec<(SessionId, SessionKey)>,
}

impl Town {
    async fn with(sessions: usize) -> Self {
        let local = Local::start(&[]).await;
        let public = PublicKey::from_pem(&local.public_key()).unwrap();
        let mut town = Self {
            local,
            public,
            sessions: Vec::new(),
        };
        for _ in 0..sessions {
            town.settle().await;
        }
        town
    }

    /// One more session.
    async fn settle(&mut self) {
        let session = NewSession::command(&["sleep", "600"]).io("none");
        let id = self.local.create(session).await;
        self.local.phase(&id, Phase::Running).await;
        let key = fs::read_to_string(self.local.file(&id, "session-key")).unwrap();
        let key = SessionKey::from_text(&key).unwrap();
        self.sessions.push((SessionId::parse(id).unwrap(), key));
    }

    fn address(&self) -> SocketAddr {
        self.local.addresses().token
    }

    /// How long a session waits for its token, on a connection and with a ciphertext of its own.
    async fn ask(&self, session: usize) -> Duration {
        let (id, key) = &self.sessions[session];
        let bearer = self.public.encrypt(id).unwrap();
        let proof = key.sign(bearer.as_str(), Clock::system().now());
        let request = format!(
            "GET /token HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n\
             Authorization: Bearer {}\r\n{}: {proof}\r\n\r\n",
            bearer.as_str(),
            proof::HEADER
        );
        self.answered(&request).await
    }

    async fn is_healthy(&self) -> Duration {
        self.answered("GET /healthz HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n\r\n")
            .await
    }

    async fn answered(&self, request: &str) -> Duration {
        let begin = Instant::now();
        let answer = timeout(GOOD_DEADLINE, raw(self.address(), request.as_bytes())).await;
        let answer = answer.unwrap_or_else(|_| panic!("no answer within {GOOD_DEADLINE:?}"));
        let answer = answer.expect("an answer in full");
        assert_eq!(answer.status, 200, "{answer:?}");
        begin.elapsed()
    }

    /// Resident memory of the program, in MiB.
    fn memory(&self) -> u64 {
        let path = format!("/proc/{}/status", self.local.program.pid());
        let status = fs::read_to_string(path).unwrap();
        let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() / 1024
    }
}

#[tokio::test]
async fn ten_thousand_slow_senders_keep_no_token_from_who_asks() {
    harden::raise_open_files();
    let room = harden::open_files().saturating_sub(OTHERS);
    let besiegers = BESIEGERS.min(usize::try_from(room).unwrap());
    assert!(besiegers >= 4_000, "too few descriptors here: {room}");
    let town = Town::with(SESSIONS).await;
    let mut calm = Vec::new();
    for session in 0..SESSIONS {
        calm.push(town.ask(session).await);
    }

    // From the good clients' own address, and from another.
    for (from, count) in [([127, 0, 0, 1], besiegers / 2), ([127, 0, 0, 2], besiegers)] {
        let siege = Siege::lay(town.address(), IpAddr::from(from), count);
        let mut healthy = Vec::new();
        siege.until_opened(count).await;
        let mut waits = Vec::new();
        for _ in 0..ASKS / 2 {
            for session in 0..SESSIONS {
                waits.push(town.ask(session).await);
            }
            healthy.push(town.is_healthy().await);
            // So that the flood goes on between them.
            sleep(Duration::from_millis(100)).await;
        }
        println!(
            "{count} from {from:?}, {} opened, {} open, {} MiB: tokens p50 {:?} p99 {:?}, health \
             {:?}; before {:?}",
            siege.opened(),
            siege.open(),
            town.memory(),
            percentile(&mut waits, 0.5),
            percentile(&mut waits, 0.99),
            percentile(&mut healthy, 1.0),
            percentile(&mut calm, 1.0),
        );
        assert!(siege.open() > 1_000, "no siege");
        assert!(town.memory() < 300, "{} MiB", town.memory());
    }
    town.is_healthy().await;
}

#[tokio::test]
async fn without_a_descriptor_left_those_who_wait_make_room() {
    let mut town = Town::with(2).await;
    let pid = town.local.program.pid();
    let folder = format!("/proc/{pid}/fd");
    let used = fs::read_dir(folder).unwrap().count() as u64;
    let process = Pid::from_raw(i32::try_from(pid).unwrap());
    // What it inherited from here.
    let hard = getrlimit(Resource::Nofile).maximum;
    let few = Rlimit {
        current: Some(used + 60),
        maximum: hard,
    };
    let before = prlimit(process, Resource::Nofile, few).unwrap();

    let siege = Siege::lay(town.address(), [127, 0, 0, 1].into(), 300);
    siege.until_opened(300).await;
    let complaint = |line: &serde_json::Value| line["message"] == "cannot accept a connection";
    town.local
        .program
        .log_line("that descriptors are short", complaint)
        .await;
    for _ in 0..ASKS / 2 {
        for session in 0..2 {
            town.ask(session).await;
        }
        town.is_healthy().await;
    }
    // Said once in a while, not once a connection.
    let log = town.local.program.log();
    let said = log
        .iter()
        .filter(|line| line.contains("cannot accept a connection"))
        .count();
    assert!(said < 20, "{said} lines");

    drop(siege);
    prlimit(process, Resource::Nofile, before).unwrap();
    town.settle().await;
    town.ask(2).await;
}

#[tokio::test]
async fn a_flood_of_refusals_writes_few_lines() {
    const FLOOD: usize = 3_000;
    let town = Town::with(1).await;
    let begin = Instant::now();
    // From one address, which has a share of its own, and then from many, which have all one.
    for addresses in [1, 100] {
        let before = refusals(&town).len();
        for number in 0..addresses {
            let plan = Plan {
                address: town.address(),
                from: Some([127, 0, 1, number + 1].into()),
                requests: Arc::new(vec![
                    b"GET /token HTTP/1.1\r\nHost: cp\r\n\r\n".to_vec();
                    FLOOD / usize::from(addresses)
                ]),
                again: false,
                connections: 4,
                rate: None,
                duration: DEADLINE,
            };
            let outcome = load::run(plan).await;
            assert_eq!(outcome.broken, 0, "{outcome:?}");
        }
        let lines = refusals(&town).len() - before;
        let (burst, rate) = if addresses == 1 { (200, 20) } else { (500, 50) };
        let most = burst + rate * (usize::try_from(begin.elapsed().as_secs()).unwrap() + 1);
        assert!(lines >= 1, "none was logged");
        assert!(lines <= most, "{lines} lines, {most} at most");
        assert!(most < FLOOD, "too slow to tell: {most}");
    }
    town.ask(0).await;

    // What one line says, and what none does.
    let line = &refusals(&town)[0];
    assert_eq!(line["result"], "no_header", "{line}");
    assert_eq!(line["source"], "127.0.1.1", "{line}");
    assert!(line["latency_ms"].is_u64(), "{line}");
    let (id, key) = &town.sessions[0];
    let log = town.local.program.log().join("\n");
    assert!(log.contains(&id.hash().to_string()), "by its hash");
    assert!(!log.contains(id.as_str()) && !log.contains(key.expose()));
}

/// The audit lines of exchanges that were refused.
fn refusals(town: &Town) -> Vec<serde_json::Value> {
    let log = town.local.program.log();
    let lines = log
        .iter()
        .filter_map(|line| serde_json::from_str(line).ok());
    lines
        .filter(|line: &serde_json::Value| {
            line["message"] == "token exchange" && line["result"] != "ok"
        })
        .collect()
}

#[tokio::test]
async fn a_log_that_cannot_be_written_costs_no_token() {
    let mut town = Town::with(1).await;
    town.local.kill().await;
    // The same program on the same folder and ports, whose log goes where there is no room.
    let ports = town.local.addresses();
    let mut program = Program::at("sh")
        .args(["-c", r#"exec "$0" "$@" 2>/dev/full"#])
        .arg(binary("ambient-control-plane"))
        .args(["local", "--data-dir"])
        .arg(town.local.data())
        .args(["--api-listen".to_owned(), ports.rest.to_string()])
        .args(["--grpc-listen".to_owned(), ports.grpc.to_string()])
        .args(["--token-listen".to_owned(), ports.token.to_string()])
        .env("LOG_LEVEL", "debug")
        .env("AMBIENT_LOG_FORMAT", "json")
        .start();
    let up = async {
        for port in [ports.token, ports.rest] {
            while TcpStream::connect(port).await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        }
    };
    timeout(DEADLINE, up).await.expect("it comes up");

    // Each is a line that is lost.
    let garbage = "GET /token HTTP/1.1\r\nHost: cp\r\nConnection: close\r\n\r\n";
    for _ in 0..20 {
        let answer = raw(town.address(), garbage.as_bytes()).await.unwrap();
        assert_eq!(answer.status, 401, "{answer:?}");
    }
    for _ in 0..5 {
        town.ask(0).await;
    }
    // And everything else goes on, too.
    town.settle().await;
    town.ask(1).await;
    program.signal(Signal::SIGTERM);
    assert!(program.wait().await.success());
    assert!(program.log().is_empty());
}
