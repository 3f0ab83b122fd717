//! A bridge between an agent that the test plays and a server with the existing one's habits.

use std::{path::Path, time::Duration};

use ambient_shared::token::Token;
use ambient_testing::{
    DEADLINE,
    faults::{Mode, Relay},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream},
    task::JoinHandle,
    time::timeout,
};
use tonic::Code;

use self::fake::{Fake, Fate, channel};
use super::*;

mod fake;

fn token(number: u32) -> Token {
    Token::new(&format!("token-{number}-of-the-tests"), None).unwrap()
}

fn settings(io: AgentIo, spool: &Path) -> BridgeSettings {
    BridgeSettings {
        session: SessionId::parse("session-of-bridge-tests").unwrap(),
        io,
        turns: 0,
        spool_dir: spool.to_owned(),
        initial_prompt: None,
        preamble: None,
        is_resume: false,
        runner_start: Arc::default(),
    }
}

/// The agent's side of a running bridge.
struct Agent {
    stdin: BufReader<DuplexStream>,
    stdout: Option<DuplexStream>,
    tokens: watch::Sender<Option<Token>>,
    rejected: watch::Receiver<Option<Token>>,
    masker: Masker,
    over: CancellationToken,
    hurry: CancellationToken,
    ended: JoinHandle<Result<(), BridgeError>>,
    spool: std::path::PathBuf,
}

impl Agent {
    fn start(settings: BridgeSettings, server: std::net::SocketAddr) -> Self {
        let spool = settings.spool_dir.clone();
        let (tokens, sender, rejected) = TokenHandle::for_tests(Some(token(1)));
        let clock = Clock::system();
        let masker = Masker::new(clock.clone());
        let api = Api::new(channel(server), tokens.latest());
        let bridge = Bridge::new(settings, api, tokens, masker.clone(), clock).unwrap();
        let (stdin, to_agent) = tokio::io::duplex(4096);
        let (stdout, from_agent) = tokio::io::duplex(4096);
        let over = CancellationToken::new();
        let hurry = CancellationToken::new();
        let carried = bridge.carry(to_agent, from_agent, over.clone(), hurry.clone());
        #[expect(clippy::disallowed_methods, reason = "its end is awaited, or aborted")]
        let ended = tokio::spawn(carried);
        Self {
            stdin: BufReader::new(stdin),
            stdout: Some(stdout),
            tokens: sender,
            rejected,
            masker,
            over,
            hurry,
            ended,
            spool,
        }
    }

    async fn reads(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = timeout(DEADLINE, self.stdin.read_line(&mut line)).await;
        let read = read.expect("a line in time").unwrap();
        (read > 0).then(|| line.trim_end().to_owned())
    }

    async fn says(&mut self, line: &str) {
        let stdout = self.stdout.as_mut().unwrap();
        let line = format!("{line}\n");
        let written = timeout(DEADLINE, stdout.write_all(line.as_bytes())).await;
        written.expect("said in time").unwrap();
    }

    async fn ends(mut self) -> Result<(), BridgeError> {
        self.stdout = None;
        let ended = timeout(DEADLINE, &mut self.ended).await;
        ended.expect("the bridge ends in time").unwrap()
    }

    /// As by `kill -9`: at most what is on disk survives.
    async fn killed(self) {
        self.ended.abort();
        let _ = self.ended.await;
        // What wrote to the disk at that moment still does, unlike that of a killed process.
        let session = settings(AgentIo::None, &self.spool).session;
        let free = async {
            while check_spool(&self.spool, &session).is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, free).await.expect("the spool is free");
    }
}

fn delivered_records(server: &Fake) -> Vec<i64> {
    let payloads = server.payloads("system");
    let controls = payloads.iter().filter_map(|text| format::control(text));
    controls
        .filter_map(|control| match control {
            format::Control::Delivered(seq) => Some(seq),
            format::Control::InputClosed => None,
        })
        .collect()
}

async fn records(server: &Fake, wanted: &[i64]) {
    server
        .until("delivery records", |server| {
            (delivered_records(server) == wanted).then_some(())
        })
        .await;
}

async fn said(server: &Fake, wanted: &[&str]) {
    server
        .until("assistant messages", |server| {
            (server.payloads("assistant").len() >= wanted.len()).then_some(())
        })
        .await;
    assert_eq!(server.payloads("assistant"), wanted);
}

#[tokio::test]
async fn a_conversation_both_ways() {
    for knows_ids in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let server = Fake::start(knows_ids, 512).await;
        let before = server.push("user", "before\nthe start");
        let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
        assert_eq!(agent.reads().await.unwrap(), "before the start");
        agent.says("one").await;
        said(&server, &["one"]).await;
        let after = server.push("user", "after");
        assert_eq!(agent.reads().await.unwrap(), "after");
        agent.says("two").await;
        agent.ends().await.unwrap();
        assert_eq!(server.payloads("assistant"), ["one", "two"]);
        assert_eq!(delivered_records(&server), [before, after]);
    }
}

#[tokio::test]
async fn a_restarted_runner_hands_over_only_what_is_new() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 512).await;
    let first = server.push("user", "first");
    let with_prompt = || BridgeSettings {
        initial_prompt: Some("prompt".to_owned()),
        preamble: Some("preamble".to_owned()),
        ..settings(AgentIo::StreamJson, dir.path())
    };
    let mut agent = Agent::start(with_prompt(), server.address());
    let line: serde_json::Value = serde_json::from_str(&agent.reads().await.unwrap()).unwrap();
    assert_eq!(line["message"]["content"][0]["text"], "preamble\n\nfirst");
    records(&server, &[first]).await;
    agent.killed().await;

    let second = server.push("user", "second");
    let mut agent = Agent::start(with_prompt(), server.address());
    let line = agent.reads().await.unwrap();
    assert!(line.contains(r#""text":"second""#), "{line}");
    records(&server, &[first, second]).await;
    agent.ends().await.unwrap();
}

#[tokio::test]
async fn a_record_that_could_not_be_pushed_survives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    server
        .until("the start message", |server| server.messages().pop())
        .await;
    server
        .until("a watch", |server| server.watches().pop())
        .await;
    // What is pushed fails from now on; the stream that is open goes on.
    server.take_no_pushes(true);
    let first = server.push("user", "first");
    assert_eq!(agent.reads().await.unwrap(), "first");
    agent.says("answer").await;
    server
        .until("a failed push", |server| {
            (server.pushes() > 1).then_some(())
        })
        .await;
    wait_for_spooled(dir.path(), &["answer", "ambient.delivered"]).await;
    agent.killed().await;

    let second = server.push("user", "second");
    server.take_no_pushes(false);
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    assert_eq!(agent.reads().await.unwrap(), "second");
    records(&server, &[first, second]).await;
    agent.ends().await.unwrap();
    assert_eq!(server.payloads("assistant"), ["answer"]);
}

#[tokio::test]
async fn messages_stored_out_of_order_are_handed_over() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    server
        .until("a watch", |server| server.watches().pop())
        .await;
    let late = server.number("user", "late");
    server.push("user", "early");
    assert_eq!(agent.reads().await.unwrap(), "early");
    server.end_streams();
    server
        .until("another watch", |server| server.watches().get(1).copied())
        .await;
    server.pass(Duration::from_secs(30));
    server.store(late);
    assert_eq!(agent.reads().await.unwrap(), "late");
    server.push("user", "last");
    assert_eq!(agent.reads().await.unwrap(), "last");
    agent.ends().await.unwrap();
}

#[tokio::test]
async fn a_burst_that_the_server_drops_for_a_slow_reader_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 2).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    server
        .until("a watch", |server| server.watches().pop())
        .await;
    // No await between: the watcher's buffer overflows.
    for n in 0..50 {
        server.push("user", &format!("message {n}"));
    }
    server.pass(Duration::from_secs(100));
    server.push("assistant", "much later");
    server.end_streams();
    for n in 0..50 {
        assert_eq!(agent.reads().await.unwrap(), format!("message {n}"));
    }
    agent.ends().await.unwrap();
}

#[tokio::test]
async fn a_slow_agent_gets_everything_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 512).await;
    let text = |n: usize| format!("{n} {}", "x".repeat(200_000));
    // 12 MB wait; at most 4 of them in memory.
    for n in 0..60 {
        server.push("user", &text(n));
    }
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    for n in 0..60 {
        assert_eq!(agent.reads().await.unwrap(), text(n));
    }
    let records = server
        .until("all records", |server| {
            let records = delivered_records(server);
            (records.len() >= 60).then_some(records)
        })
        .await;
    assert!(records.is_sorted(), "{records:?}");
    agent.ends().await.unwrap();
}

#[tokio::test]
async fn a_push_of_unknown_outcome_is_looked_up_before_it_is_repeated() {
    for fate in [
        Fate::StoredButFails(Code::Unavailable),
        Fate::StoredButFails(Code::Internal),
        Fate::StoredButSilent,
        Fate::Refused(Code::Unavailable, "not stored"),
        Fate::Refused(Code::ResourceExhausted, "slow down"),
    ] {
        for knows_ids in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let server = Fake::start(knows_ids, 512).await;
            let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
            agent.says("same").await;
            said(&server, &["same"]).await;
            server.next_pushes([fate.clone()]);
            agent.says("same").await;
            agent.says("other").await;
            agent.ends().await.unwrap();
            let scene = format!("{fate:?}, server knows ids: {knows_ids}");
            let all = server.payloads("assistant");
            assert_eq!(all, ["same", "same", "other"], "{scene}");
        }
    }
}

#[tokio::test]
async fn a_message_that_was_on_its_way_when_the_runner_was_killed_is_not_doubled() {
    for knows_ids in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let server = Fake::start(knows_ids, 512).await;
        let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
        agent.says("first").await;
        said(&server, &["first"]).await;
        server.next_pushes([Fate::StoredButSilent]);
        agent.says("on its way").await;
        said(&server, &["first", "on its way"]).await;
        agent.says("waits").await;
        agent.says("waits too").await;
        wait_for_spooled(dir.path(), &["waits", "waits too"]).await;
        agent.killed().await;

        let agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
        agent.ends().await.unwrap();
        let all = server.payloads("assistant");
        assert_eq!(all, ["first", "on its way", "waits", "waits too"]);
    }
}

/// Waits until all these texts are in the files of the spool, acknowledged or not.
async fn wait_for_spooled(folder: &Path, texts: &[&str]) {
    let all_there = async {
        loop {
            let files = spool_files(folder).into_iter();
            let content: Vec<u8> = files
                .flat_map(|file| std::fs::read(file).unwrap_or_default())
                .collect();
            let content = String::from_utf8_lossy(&content);
            if texts.iter().all(|text| content.contains(text)) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, all_there)
        .await
        .expect("in the spool in time");
}

#[tokio::test]
async fn an_expired_token_is_renewed_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    agent.says("before").await;
    said(&server, &["before"]).await;
    server.set_token("token-2-of-the-tests");
    agent.says("after").await;
    server.push("user", "hello");
    let mut rejected = agent.rejected.clone();
    let rejection = rejected.wait_for(Option::is_some);
    timeout(DEADLINE, rejection).await.unwrap().unwrap();
    agent.tokens.send_replace(Some(token(2)));
    assert_eq!(agent.reads().await.unwrap(), "hello");
    said(&server, &["before", "after"]).await;
    agent.ends().await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_away_for_a_while_costs_nothing() {
    for knows_ids in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let server = Fake::start(knows_ids, 512).await;
        let relay = Relay::start(server.address()).await;
        let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), relay.address());
        let mut expected = Vec::new();
        for round in 0..5 {
            if round % 2 == 1 {
                relay.set(Mode::Refuse).await;
                relay.reset();
            }
            for n in 0..40 {
                let line = format!("round {round} line {n}");
                agent.says(&line).await;
                expected.push(line);
                if n == 20 {
                    relay.reset();
                }
            }
            let asked = format!("round {round}");
            server.push("user", &asked);
            relay.set(Mode::Pass).await;
            assert_eq!(agent.reads().await.unwrap(), asked);
        }
        agent.ends().await.unwrap();
        assert_eq!(server.payloads("assistant"), expected, "ids: {knows_ids}");
    }
}

#[tokio::test]
async fn a_message_that_the_server_refuses_is_replaced_by_an_error() {
    for (fate, times) in [
        (Fate::Refused(Code::InvalidArgument, "bad text"), 1),
        (
            Fate::Refused(Code::ResourceExhausted, "message larger than max"),
            1,
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = Fake::start(false, 512).await;
        let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
        agent.says("good").await;
        said(&server, &["good"]).await;
        server.next_pushes((0..times).map(|_| fate.clone()));
        agent.says("bad").await;
        agent.says("good again").await;
        agent.ends().await.unwrap();
        assert_eq!(server.payloads("assistant"), ["good", "good again"]);
        let errors = server.payloads("error");
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains("assistant, 3 bytes"), "{errors:?}");
    }
}

#[tokio::test]
async fn end_of_input_closes_stdin_after_all_that_was_said_before() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(false, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    server.push("user", "one");
    server.push("user", "two");
    server.push("system", r#"{"custom_event":"ambient.input-closed"}"#);
    assert_eq!(agent.reads().await.unwrap(), "one");
    assert_eq!(agent.reads().await.unwrap(), "two");
    assert_eq!(agent.reads().await, None);
    agent.says("bye").await;
    agent.ends().await.unwrap();
    assert_eq!(server.payloads("assistant"), ["bye"]);
}

#[tokio::test]
async fn stdin_is_closed_after_the_turns_that_were_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let settings = BridgeSettings {
        turns: 2,
        initial_prompt: Some("do it".to_owned()),
        ..settings(AgentIo::StreamJson, dir.path())
    };
    let mut agent = Agent::start(settings, server.address());
    assert!(agent.reads().await.unwrap().contains("do it"));
    let result = r#"{"type":"result","subtype":"success","is_error":false}"#;
    agent.says(result).await;
    server.push("user", "more");
    assert!(agent.reads().await.unwrap().contains("more"));
    agent.says(result).await;
    assert_eq!(agent.reads().await, None);
    agent.ends().await.unwrap();
    assert_eq!(server.payloads("lifecycle").len(), 2);
    assert_eq!(delivered_records(&server)[0], 0);
}

#[tokio::test]
async fn what_the_agent_says_is_masked_even_behind_escapes() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let mut agent = Agent::start(settings(AgentIo::StreamJson, dir.path()), server.address());
    agent.masker.add_secret("top/secret/thing");
    let escaped = r#"{"type":"assistant","message":{"content":[{"type":"text","text":"it is \u0074op/secret\/thing!"}]}}"#;
    agent.says(escaped).await;
    agent.says("plain top/secret/thing!").await;
    agent.ends().await.unwrap();
    assert_eq!(
        server.payloads("assistant"),
        ["it is [masked]!", "plain [masked]!"]
    );
}

#[tokio::test]
async fn a_line_without_end_comes_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    let line = "0123456789".repeat(300_000);
    agent.says(&line).await;
    agent.says("short").await;
    agent.ends().await.unwrap();
    let said = server.payloads("assistant");
    assert_eq!(said.len(), 4);
    assert!(said.iter().all(|part| part.len() <= format::MAX_PAYLOAD));
    assert_eq!(said[..3].concat().replace(format::CUT, ""), line);
    assert!(said[0].ends_with(format::CUT) && said[1].starts_with(format::CUT));
    assert_eq!(said[3], "short");
}

/// How long a bridge goes on that cannot push what the agent said; then it is pushed.
async fn ends_unpushed_after(is_in_hurry: bool) -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let relay = Relay::start(server.address()).await;
    relay.set(Mode::Refuse).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), relay.address());
    agent.says("kept").await;
    wait_for_spooled(dir.path(), &["kept"]).await;
    agent.stdout = None;
    agent.over.cancel();
    if is_in_hurry {
        agent.hurry.cancel();
    }
    // Nothing but timers is left to wait for: the clock may run ahead.
    tokio::time::pause();
    let started = tokio::time::Instant::now();
    let ended = timeout(Duration::from_mins(60), &mut agent.ended).await;
    let error = ended.unwrap().unwrap().unwrap_err();
    // The start message and what the agent said.
    let unsent = matches!(error, BridgeError::Unsent { messages: 2, .. });
    assert!(unsent, "{error:?}");
    let after = started.elapsed();
    tokio::time::resume();
    assert!(server.messages().is_empty());

    relay.set(Mode::Pass).await;
    let agent = Agent::start(settings(AgentIo::Lines, dir.path()), relay.address());
    agent.ends().await.unwrap();
    assert_eq!(server.payloads("assistant"), ["kept"]);
    after
}

#[tokio::test]
async fn what_cannot_be_pushed_is_tried_for_long_and_kept() {
    let after = ends_unpushed_after(false).await;
    assert!(
        after >= STALLED_AFTER && after <= 2 * STALLED_AFTER,
        "{after:?}"
    );
}

#[tokio::test]
async fn an_agent_that_goes_on_without_its_output_is_not_ended_by_an_outage() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let relay = Relay::start(server.address()).await;
    relay.set(Mode::Refuse).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), relay.address());
    agent.says("kept").await;
    wait_for_spooled(dir.path(), &["kept"]).await;
    agent.stdout = None;
    tokio::time::pause();
    let ended = timeout(10 * STALLED_AFTER, &mut agent.ended).await;
    assert!(ended.is_err(), "{ended:?}");
    tokio::time::resume();
    relay.set(Mode::Pass).await;
    agent.ends().await.unwrap();
    assert_eq!(server.payloads("assistant"), ["kept"]);
}

#[tokio::test]
async fn the_next_agent_gets_the_end_of_input_that_the_last_one_had() {
    for is_resume in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let server = Fake::start(true, 512).await;
        // An earlier start of the session had one of its own.
        let earlier = server.push("system", r#"{"custom_event":"ambient.input-closed"}"#);
        if is_resume {
            server.push("system", &format::delivered(earlier).1);
        }
        let settings = BridgeSettings {
            is_resume,
            ..settings(AgentIo::Lines, dir.path())
        };
        let mut last = None;
        for _ in 0..2 {
            let mut agent = Agent::start(settings.clone(), server.address());
            if is_resume && last.is_none() {
                server.push("user", "hello");
                assert_eq!(agent.reads().await.unwrap(), "hello");
                server.push("system", r#"{"custom_event":"ambient.input-closed"}"#);
            }
            assert_eq!(agent.reads().await, None, "resume: {is_resume}");
            agent.ends().await.unwrap();
            last = Some(());
        }
    }
}

#[tokio::test]
async fn in_a_hurry_it_is_tried_for_a_short_time_and_kept() {
    let after = ends_unpushed_after(true).await;
    assert!(
        after >= HURRY_LIMIT && after <= 2 * HURRY_LIMIT,
        "{after:?}"
    );
}

#[tokio::test]
async fn output_that_somebody_holds_open_is_left_when_the_agent_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    agent.says("last words").await;
    said(&server, &["last words"]).await;
    agent.over.cancel();
    tokio::time::pause();
    let ended = timeout(2 * OUTPUT_LIMIT, &mut agent.ended).await;
    ended.unwrap().unwrap().unwrap();
}

fn spool_files(folder: &Path) -> Vec<std::path::PathBuf> {
    let sessions = std::fs::read_dir(folder).unwrap().flatten();
    sessions
        .flat_map(|session| std::fs::read_dir(session.path()).unwrap().flatten())
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "log"))
        .collect()
}

#[tokio::test]
async fn nothing_more_is_handed_over_once_the_agent_is_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let server = Fake::start(true, 512).await;
    let mut agent = Agent::start(settings(AgentIo::Lines, dir.path()), server.address());
    server
        .until("a watch", |server| server.watches().pop())
        .await;
    agent.over.cancel();
    agent.says("last words").await;
    said(&server, &["last words"]).await;
    let late = server.push("user", "too late");
    agent.stdout = None;
    timeout(DEADLINE, &mut agent.ended)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    // Stdin was open until then, and nothing came.
    let mut rest = String::new();
    agent.stdin.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "");
    assert!(!delivered_records(&server).contains(&late));
}
