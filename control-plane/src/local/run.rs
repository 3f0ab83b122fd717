//! `local run`: one session on the terminal.
//!
//! In: lines on stdin. Out: the agent's messages on stdout, one a line; everything else on stderr;
//! the agent's exit code. Ctrl-C once stops the session, twice ends it at once. Nothing of it is
//! left when this returns.

use std::{io::Write as _, path::PathBuf, sync::Arc};

use ambient_shared::{exit, proto::SessionMessage, tasks::Tasks, telemetry::MetricsPage};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    sync::mpsc,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

use super::{
    Local, LocalError, Operator,
    conversation::{Conversation, Event, NewSession},
    ending::{End, Interrupts, LOOK, Made, end_at_once, exit_code, with_servers},
    follow,
};
use crate::{
    backend::process::ProcessBackend, reconcile::desired::AgentIo, settings::LocalSettings,
};

/// Longest line of input: the largest message that the API takes (contract section 5).
const LONGEST_LINE: usize = 1024 * 1024;

/// Log lines that may wait for the terminal.
const LOG_LINES: usize = 64;

/// What is shown of an event that is no answer of the agent, in characters.
const BRIEF: usize = 200;

/// Runs one session and gives its agent's exit code.
///
/// # Errors
/// When it cannot be run, or what carries it breaks.
pub(super) async fn run(
    settings: &LocalSettings,
    metrics: MetricsPage,
    command: Vec<String>,
    io: AgentIo,
    turns: u32,
) -> Result<u8, LocalError> {
    // First of all: a folder that was made must be removed even after an early Ctrl-C.
    let interrupts = Interrupts::new()?;
    let local = Local::bind(settings, metrics).await?;
    let backend = local.backend.clone();
    let operator = local.operator.clone();
    let new = NewSession {
        name: "local run",
        command: Some(command),
        io,
        turns,
        environment: Vec::new(),
    };
    let made = Made::default();
    let talk = converse(operator, backend, &new, &made, interrupts);
    Box::pin(with_servers(local, &made, talk)).await
}

async fn converse(
    operator: Operator,
    backend: Arc<ProcessBackend>,
    new: &NewSession,
    made: &Made,
    mut interrupts: Interrupts,
) -> Result<u8, LocalError> {
    let (conversation, events) = Conversation::begin(operator, new).await?;
    // Set once, here.
    let _ = made.set(conversation.id().clone());
    let ended = CancellationToken::new();
    let mut tasks = Tasks::new(ended.clone());
    let (follow_events, mut events) = events.follow();
    tasks.spawn("events", follow_events);
    let (log_lines, mut logs) = mpsc::channel(LOG_LINES);
    let folder = backend.session_folder(conversation.id());
    let log = folder.join("runner.log");
    tasks.spawn("runner log", follow_log(log, ended.clone(), log_lines));
    let (agent_lines, mut said) = mpsc::channel(LOG_LINES);
    if new.io == AgentIo::None {
        let log = folder.join("agent.log");
        tasks.spawn("agent log", follow_log(log, ended.clone(), agent_lines));
    } else {
        drop(agent_lines);
        let conversation = conversation.clone();
        tasks.spawn("input", async move { type_in(&conversation).await });
    }

    let mut terminal = Terminal::new();
    let mut end = End::default();
    let mut stop_asked = false;
    loop {
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
                Event::Session(session) => end.session(&session),
                Event::Message(message) => {
                    if end.is_mark(&message) {
                        break;
                    }
                    if !terminal.show(&message).await && !stop_asked {
                        // Nobody reads what the agent says any more.
                        stop_asked = true;
                        conversation.stop().await?;
                    }
                }
            },
            Some(line) = said.recv() => {
                terminal.say(&line).await;
            }
            Some(line) = logs.recv() => show_log(&line),
            () = sleep(LOOK) => {}
        }
        if end.mark.is_none() && end.has_come(&conversation, &backend) {
            end.mark = Some(conversation.mark_end().await?);
        }
    }
    // The files are complete: nobody of the session runs any more.
    ended.cancel();
    while let Some(line) = said.recv().await {
        terminal.say(&line).await;
    }
    while let Some(line) = logs.recv().await {
        show_log(&line);
    }
    terminal.flush().await;
    Ok(exit_code(
        &conversation,
        &backend,
        end.last_session.as_ref(),
    ))
}

/// Lines of stdin become messages, one after the other; its end ends the agent's input.
async fn type_in(conversation: &Conversation) {
    let mut stdin = BufReader::new(tokio::io::stdin());
    let mut line = Vec::new();
    loop {
        line.clear();
        // One byte more than allowed tells a line that is too long from one that just fits.
        let read = (&mut stdin)
            .take(LONGEST_LINE as u64 + 1)
            .read_until(b'\n', &mut line)
            .await;
        match read {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                error!(%error, "stdin cannot be read");
                break;
            }
        }
        if line.len() > LONGEST_LINE && !line.ends_with(b"\n") {
            error!(
                longest = LONGEST_LINE,
                "a line of input is too long for a message; the input ends here"
            );
            break;
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.strip_suffix('\n').unwrap_or(&text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        if let Err(error) = conversation.say(text.to_owned()).await {
            error!(error = %exit::report(&error), "a line of input is lost; the input ends here");
            break;
        }
    }
    if let Err(error) = conversation.end_input().await {
        warn!(error = %exit::report(&error), "the agent was not told that the input has ended");
    }
}

pub(super) async fn follow_log(
    path: PathBuf,
    ended: CancellationToken,
    lines: mpsc::Sender<Vec<u8>>,
) {
    if let Err(error) = follow::lines(path, ended, lines).await {
        warn!(%error, "a log of the session cannot be read");
    }
}

/// The agent's own stderr comes as it is; the runner's log by its warnings.
fn show_log(line: &[u8]) {
    let log: Option<Value> = serde_json::from_slice(line).ok();
    let level = log
        .as_ref()
        .filter(|log| log.get("message").is_some())
        .and_then(|log| log.get("level")?.as_str());
    let show = match level {
        Some(level) => matches!(level, "WARN" | "ERROR"),
        None => true,
    };
    if show {
        let mut stderr = std::io::stderr().lock();
        // Nobody may be reading it.
        let _ = stderr
            .write_all(line)
            .and_then(|()| stderr.write_all(b"\n"));
    }
}

/// Where messages are shown.
struct Terminal {
    stdout: tokio::io::BufWriter<tokio::io::Stdout>,
    open: bool,
}

impl Terminal {
    fn new() -> Self {
        Self {
            stdout: tokio::io::BufWriter::new(tokio::io::stdout()),
            open: true,
        }
    }

    /// Shows a message; false when nobody reads any more.
    async fn show(&mut self, message: &SessionMessage) -> bool {
        match message.event_type.as_str() {
            "assistant" => {
                // One message is one line.
                let text = message
                    .payload
                    .replace("\r\n", " ")
                    .replace(['\n', '\r'], " ");
                self.say(text.as_bytes()).await;
                self.flush().await;
            }
            // Typed here, so it is on the screen already.
            "user" => {}
            "system" if message.payload.contains("\"ambient.") => {}
            other => {
                let text: String = message.payload.chars().take(BRIEF).collect();
                let text = text.replace(['\n', '\r'], " ");
                let mut stderr = std::io::stderr().lock();
                // Nobody may be reading it.
                let _ = writeln!(stderr, "[{other}] {text}");
            }
        }
        self.open
    }

    async fn say(&mut self, line: &[u8]) {
        let written = async {
            self.stdout.write_all(line).await?;
            self.stdout.write_all(b"\n").await
        };
        self.open &= written.await.is_ok();
    }

    async fn flush(&mut self) {
        self.open &= self.stdout.flush().await.is_ok();
    }
}
