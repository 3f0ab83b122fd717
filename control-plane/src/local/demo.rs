//! `local --demo`: one session with the bundled agent, and what happens in it as a time line.
//!
//! In: nothing. Out: on stdout phases, renewals of the token by pull and by push (each by the
//! token's hash, as runner and sidecar logged it), messages both ways; exit 0 when the session
//! completed and each way renewed the token at least twice.

use std::{
    io::{self, Write as _},
    sync::Arc,
    time::Duration,
};

use ambient_shared::{
    exit, phase::Phase, proto, proto::SessionMessage, tasks::Tasks, telemetry::MetricsPage,
};
use serde_json::Value;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    Local, LocalError, Operator,
    conversation::{Conversation, Event, NewSession},
    ending::{End, Interrupts, LOOK, Made, end_at_once, exit_code, with_servers},
    run::follow_log,
};
use crate::{
    backend::process::ProcessBackend,
    reconcile::desired::AgentIo,
    settings::{IssuerSettings, LocalSettings},
};

/// Life of the demo's tokens: short, so that two pass while one looks on.
pub const TOKEN_TTL: Duration = Duration::from_secs(6);

/// How many steps the agent works, a second apart: longer than two lives of a token.
const STEPS: u32 = 15;

/// What a person says meanwhile, and when, in seconds after the agent's first words.
const SAID: [(u64, &str); 3] = [
    (1, "Hello! Do you hear me?"),
    (6, "How is your token?"),
    (11, "Thank you, that is all."),
];

/// Renewals that each way must show.
const ENOUGH: u32 = 2;

/// Longest text on the time line, in characters.
const WIDTH: usize = 96;

/// Log lines that may wait for the terminal.
const LOG_LINES: usize = 64;

/// Runs the demo.
///
/// # Errors
/// When it cannot be run, or what carries it breaks.
pub(super) async fn run(settings: &LocalSettings, metrics: MetricsPage) -> Result<u8, LocalError> {
    let mut line = TimeLine::new();
    // First of all: a folder that was made must be removed even after an early Ctrl-C.
    let interrupts = Interrupts::new()?;
    let local = Local::bind(settings, metrics).await?;
    let life = match settings.issuer {
        IssuerSettings::Minted { life } => life,
        IssuerSettings::Static { .. } | IssuerSettings::Oidc { .. } => TOKEN_TTL,
    };
    TimeLine::head(&local, life);
    let agent = local.data().demo_agent()?;
    let backend = local.backend.clone();
    let operator = local.operator.clone();
    let made = Made::default();
    let talk = watch(&mut line, agent, operator, backend, &made, interrupts);
    Box::pin(with_servers(local, &made, talk)).await
}

async fn watch(
    line: &mut TimeLine,
    agent: Vec<String>,
    operator: Operator,
    backend: Arc<ProcessBackend>,
    made: &Made,
    mut interrupts: Interrupts,
) -> Result<u8, LocalError> {
    let new = NewSession {
        name: "demo",
        command: Some(agent),
        io: AgentIo::StreamJson,
        turns: 0,
        environment: vec![
            ("DEMO_STEPS", STEPS.to_string()),
            ("DEMO_PAUSE", "1".to_owned()),
        ],
    };
    let (conversation, events) = Conversation::begin(operator, &new).await?;
    // Set once, here.
    let _ = made.set(conversation.id().clone());
    let ended = CancellationToken::new();
    let mut tasks = Tasks::new(ended.clone());
    let (follow_events, mut events) = events.follow();
    tasks.spawn("events", follow_events);
    let folder = backend.session_folder(conversation.id());
    let log = |name: &str, tasks: &mut Tasks| {
        let (sender, receiver) = mpsc::channel(LOG_LINES);
        tasks.spawn("log", follow_log(folder.join(name), ended.clone(), sender));
        receiver
    };
    let mut runner = log("runner.log", &mut tasks);
    let mut sidecar = log("sidecar.log", &mut tasks);

    let mut end = End::default();
    let mut stop_asked = false;
    let mut said = SAID.iter();
    let mut next = said.next();
    let mut heard_at: Option<Instant> = None;
    loop {
        let speak_at = heard_at
            .zip(next)
            .map(|(heard, (after, _))| heard + Duration::from_secs(*after));
        tokio::select! {
            biased;
            () = interrupts.next() => {
                if stop_asked {
                    return Ok(end_at_once(made, &backend).await);
                }
                stop_asked = true;
                conversation.stop().await?;
            }
            Some(event) = events.recv() => match event {
                Event::Session(session) => {
                    line.session(&session);
                    end.session(&session);
                }
                Event::Message(message) => {
                    if end.is_mark(&message) {
                        break;
                    }
                    if message.event_type == "assistant" {
                        heard_at.get_or_insert_with(Instant::now);
                    }
                    line.message(&message);
                }
            },
            Some(log) = runner.recv() => line.pulled(&log),
            Some(log) = sidecar.recv() => line.pushed(&log),
            () = sleep_until(speak_at.unwrap_or_else(Instant::now)), if speak_at.is_some() => {
                if let Some((_, text)) = next
                    && let Err(error) = conversation.say((*text).to_owned()).await
                {
                    warn!(error = %exit::report(&error), "a message could not be sent");
                }
                next = said.next();
            }
            () = sleep(LOOK) => {}
        }
        if end.mark.is_none() && end.has_come(&conversation, &backend) {
            end.mark = Some(conversation.mark_end().await?);
        }
    }
    ended.cancel();
    while let Some(log) = runner.recv().await {
        line.pulled(&log);
    }
    while let Some(log) = sidecar.recv().await {
        line.pushed(&log);
    }
    let code = exit_code(&conversation, &backend, end.last_session.as_ref());
    Ok(line.sum_up(code))
}

/// What is printed, and counted for the summary.
struct TimeLine {
    start: Instant,
    phase: Option<Phase>,
    pulls: Renewals,
    pushes: Renewals,
    sent: u32,
    received: u32,
    calls: u32,
}

/// The tokens that came one way.
#[derive(Default)]
struct Renewals {
    last: Option<String>,
    renewed: u32,
}

impl TimeLine {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            phase: None,
            pulls: Renewals::default(),
            pushes: Renewals::default(),
            sent: 0,
            received: 0,
            calls: 0,
        }
    }

    fn head(local: &Local, life: Duration) {
        out(&format!(
            "One session on this machine; its tokens live {} s. State is in {}\n",
            life.as_secs(),
            local.data().path().display()
        ));
        out("   time  what      \n");
    }

    fn put(&self, what: &str, text: &str) {
        let seconds = self.start.elapsed().as_secs_f64();
        let text: String = text.chars().take(WIDTH).collect();
        let text = text.replace(['\n', '\r'], " ");
        out(&format!("{seconds:6.1}s  {what:<9} {text}\n"));
    }

    fn session(&mut self, session: &proto::Session) {
        let phase = Phase::of(session.phase.as_deref()).ok();
        if phase.is_none() || phase == self.phase {
            return;
        }
        self.phase = phase;
        if let Some(phase) = phase {
            self.put("phase", phase.as_str());
        }
    }

    /// A line of the runner's log.
    fn pulled(&mut self, line: &[u8]) {
        if let Some(token) = token_of(line, "token refreshed", "endpoint") {
            let text = self.pulls.came(&token);
            self.put("pull", &format!("runner {text}"));
        }
    }

    /// A line of the sidecar's log.
    fn pushed(&mut self, line: &[u8]) {
        if let Some(token) = token_of(line, "token changed", "file") {
            let text = self.pushes.came(&token);
            self.put("push", &format!("sidecar {text}"));
        }
    }

    fn message(&mut self, message: &SessionMessage) {
        let payload: Value = serde_json::from_str(&message.payload).unwrap_or_default();
        match message.event_type.as_str() {
            "user" => {
                self.sent += 1;
                self.put("you", &message.payload);
            }
            "assistant" => {
                self.received += 1;
                self.put("agent", &message.payload);
            }
            "tool_result" => {
                self.calls += 1;
                let text = payload["result"].as_str().unwrap_or(&message.payload);
                self.put("api call", text);
            }
            "error" => self.put("error", &message.payload),
            _ => {}
        }
    }

    /// The last lines, and the exit code.
    fn sum_up(&self, code: u8) -> u8 {
        let phase = self.phase.map_or("without a phase", Phase::as_str);
        out(&format!(
            "\nThe session ended {phase}. Its token was renewed {} times by pull and {} times by \
             push; {} messages went to the agent and {} came back; it called the API {} times \
             without a credential.\n",
            self.pulls.renewed, self.pushes.renewed, self.sent, self.received, self.calls
        ));
        if self.phase != Some(Phase::Completed) {
            return if code == 0 { 1 } else { code };
        }
        if self.pulls.renewed < ENOUGH || self.pushes.renewed < ENOUGH {
            out(&format!(
                "That is not enough: each way should have renewed it {ENOUGH} times.\n"
            ));
            return 1;
        }
        code
    }
}

impl Renewals {
    fn came(&mut self, token: &str) -> String {
        match self.last.replace(token.to_owned()) {
            None => format!("has its first token {token}"),
            Some(before) if before == token => format!("keeps token {token}"),
            Some(before) => {
                self.renewed += 1;
                format!("renewed token {before} -> {token}")
            }
        }
    }
}

/// The hash of the token that a log line tells of.
fn token_of(line: &[u8], message: &str, source: &str) -> Option<String> {
    let log: Value = serde_json::from_slice(line).ok()?;
    if log["message"] != message || log["source"] != source {
        return None;
    }
    log["token"].as_str().map(str::to_owned)
}

fn out(text: &str) {
    let mut stdout = io::stdout().lock();
    // Nobody may be reading it.
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_token_is_a_renewal() {
        let mut pulls = Renewals::default();
        for (token, renewed) in [("a", 0), ("a", 0), ("b", 1), ("c", 2)] {
            pulls.came(token);
            assert_eq!(pulls.renewed, renewed);
        }
    }

    #[test]
    fn tokens_are_read_from_the_programs_logs() {
        let line =
            br#"{"level":"INFO","message":"token refreshed","source":"endpoint","token":"aa"}"#;
        assert_eq!(
            token_of(line, "token refreshed", "endpoint").as_deref(),
            Some("aa")
        );
        assert_eq!(token_of(line, "token refreshed", "file"), None);
        assert_eq!(
            token_of(b"agent's own words", "token refreshed", "endpoint"),
            None
        );
    }
}
