//! Pure: what the agent says and hears, as messages of the session API (contract sections 3 and 4).
//!
//! Nothing that the agent writes is lost or makes this fail: what is not understood becomes an
//! `assistant` message (no JSON object) or a `system` message (a type nobody knows), and what is
//! too long for one message becomes several, each marked.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::agent::AgentIo;

/// Most bytes of a payload: what the API takes from people (contract section 5), so that whatever
/// reads messages can rely on it.
pub(crate) const MAX_PAYLOAD: usize = 1024 * 1024;

/// Stands where a line was cut, at the end of one part and the start of the next.
pub(crate) const CUT: &str = "[line goes on]";

/// Bytes of text in one part of a long JSON line. Escaped for JSON it may grow sixfold.
const LONG_LINE_PART: usize = 128 * 1024;

/// Prefix of the custom events that runner and people push. An agent cannot push one by writing
/// a line of that type: it could pretend that messages were delivered.
const RESERVED: &str = "ambient.";

const DELIVERED: &str = "ambient.delivered";
const INPUT_CLOSED: &str = "ambient.input-closed";
const RUNNER_STARTED: &str = "ambient.runner-started";
const MAY_REPEAT: &str = "ambient.may-repeat";
const LONG_LINE: &str = "ambient.long-line";

/// The event types that a runner pushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventType {
    /// What the agent says, as plain text.
    Assistant,
    /// A call of a tool.
    ToolUse,
    /// Its result.
    ToolResult,
    /// The start or end of a run.
    Lifecycle,
    /// A failure.
    Error,
    /// All else.
    System,
}

impl EventType {
    /// Every type; the index is its code in the spool.
    pub(crate) const ALL: [Self; 6] = [
        Self::Assistant,
        Self::ToolUse,
        Self::ToolResult,
        Self::Lifecycle,
        Self::Error,
        Self::System,
    ];

    /// Its name on the wire.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Assistant => "assistant",
            Self::ToolUse => "tool_use",
            Self::ToolResult => "tool_result",
            Self::Lifecycle => "lifecycle",
            Self::Error => "error",
            Self::System => "system",
        }
    }
}

/// What will become one message.
pub(crate) type Event = (EventType, String);

/// A line that the agent wrote, or a part of one that was too long.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Piece {
    /// The text, without the line break.
    pub(crate) text: String,
    /// Whether it goes on the line of the piece before.
    pub(crate) continued: bool,
    /// Whether the next piece goes on this line.
    pub(crate) continues: bool,
}

impl Piece {
    /// A whole line.
    #[cfg(test)]
    pub(crate) fn line(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            continued: false,
            continues: false,
        }
    }

    fn is_part(&self) -> bool {
        self.continued || self.continues
    }
}

/// What a piece of the agent's output says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Said {
    /// The messages to push, in order.
    pub(crate) events: Vec<Event>,
    /// Whether it ends a turn: a `result` of stream-json.
    pub(crate) ends_turn: bool,
}

/// Maps a piece of the agent's output to messages.
pub(crate) fn from_agent(io: AgentIo, piece: &Piece) -> Said {
    match io {
        AgentIo::None => Said::default(),
        AgentIo::Lines => Said {
            events: text_events(piece),
            ends_turn: false,
        },
        AgentIo::StreamJson => from_stream_json(piece),
    }
}

/// A user message as the agent reads it: one line, with its line break.
pub(crate) fn to_agent(io: AgentIo, text: &str) -> String {
    match io {
        AgentIo::StreamJson => {
            let content = json!([{"type": "text", "text": text}]);
            let message = json!({"role": "user", "content": content});
            format!("{}\n", json!({"type": "user", "message": message}))
        }
        AgentIo::None | AgentIo::Lines => {
            format!("{}\n", text.replace("\r\n", " ").replace(['\n', '\r'], " "))
        }
    }
}

/// The text of a `user` payload: the payload itself, or the last user message of an object with
/// `messages` (contract section 4).
pub(crate) fn user_text(payload: &str) -> Cow<'_, str> {
    last_user_message(payload).map_or(Cow::Borrowed(payload), Cow::Owned)
}

fn last_user_message(payload: &str) -> Option<String> {
    if !payload.trim_start().starts_with('{') {
        return None;
    }
    let run: Value = serde_json::from_str(payload).ok()?;
    let messages = run.get("messages")?.as_array()?;
    let last = messages
        .iter()
        .rfind(|message| message["role"] == "user")?
        .get("content")?;
    text_of(last)
}

/// A text, or the texts of a list of blocks.
fn text_of(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(blocks) => {
            let texts: Option<Vec<&str>> = blocks.iter().map(|b| b.get("text")?.as_str()).collect();
            texts.map(|texts| texts.join("\n"))
        }
        _ => None,
    }
}

/// What a `system` message tells the runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Control {
    /// The message with this `seq` was handed to the agent; 0 is the initial prompt.
    Delivered(i64),
    /// No input follows.
    InputClosed,
}

/// Reads a `system` payload; none when it is not for the runner.
pub(crate) fn control(payload: &str) -> Option<Control> {
    // Most system messages are somebody else's: no need to parse them.
    if !payload.contains(RESERVED) {
        return None;
    }
    let payload: Value = serde_json::from_str(payload).ok()?;
    match payload.get("custom_event")?.as_str()? {
        DELIVERED => payload["value"]["seq"].as_i64().map(Control::Delivered),
        INPUT_CLOSED => Some(Control::InputClosed),
        _ => None,
    }
}

/// The record that the message with this `seq` was handed to the agent.
pub(crate) fn delivered(seq: i64) -> Event {
    custom(DELIVERED, &json!({ "seq": seq }))
}

/// Tells that a runner started; what earlier ones recorded lies before it.
pub(crate) fn runner_started(is_resume: bool) -> Event {
    custom(RUNNER_STARTED, &json!({ "resume": is_resume }))
}

/// Tells that the message that follows may be a repeat of the one before. A server that knows
/// message ids gets it only before it has answered this runner's first push.
pub(crate) fn may_repeat(id: uuid::Uuid) -> Event {
    custom(MAY_REPEAT, &json!({"id": id.to_string()}))
}

/// Stands for a message that cannot be pushed.
pub(crate) fn lost_message(code: &str, what: &str) -> Event {
    let payload = json!({"error": what, "code": code});
    (EventType::Error, payload.to_string())
}

fn custom(event: &str, value: &Value) -> Event {
    let payload = json!({"custom_event": event, "value": value});
    (EventType::System, payload.to_string())
}

/// A custom event named by the agent.
fn agents_custom(event: &str, value: &Value) -> Event {
    if event.starts_with(RESERVED) {
        custom(&format!("agent:{event}"), value)
    } else {
        custom(event, value)
    }
}

/// One `assistant` message; several when it is longer than a payload may be.
fn text_events(piece: &Piece) -> Vec<Event> {
    if !piece.is_part() && piece.text.len() <= MAX_PAYLOAD {
        return vec![(EventType::Assistant, piece.text.clone())];
    }
    let parts = parts(&piece.text, MAX_PAYLOAD - 2 * CUT.len());
    let last = parts.len() - 1;
    let mark = |cut: bool| if cut { CUT } else { "" };
    parts
        .into_iter()
        .enumerate()
        .map(|(number, part)| {
            let before = mark(piece.continued || number > 0);
            let after = mark(piece.continues || number < last);
            (EventType::Assistant, format!("{before}{part}{after}"))
        })
        .collect()
}

/// Cuts a text into parts of at most `longest` bytes, between characters. At least one part.
fn parts(text: &str, longest: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while rest.len() > longest {
        let (part, after) = rest.split_at(rest.floor_char_boundary(longest));
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    parts
}

fn from_stream_json(piece: &Piece) -> Said {
    if piece.is_part() {
        return Said {
            events: long_line(piece),
            ends_turn: false,
        };
    }
    if piece.text.trim().is_empty() {
        return Said::default();
    }
    // A command that does not speak JSON is still heard.
    let Ok(Value::Object(line)) = serde_json::from_str(&piece.text) else {
        return Said {
            events: text_events(piece),
            ends_turn: false,
        };
    };
    let kind = line.get("type").and_then(Value::as_str).unwrap_or_default();
    let events = match kind {
        "system" => system_events(line.clone()),
        "assistant" => message_events(&line, "assistant", assistant_block),
        "user" => message_events(&line, "user", user_block),
        "result" => result_events(&line),
        "error" => vec![error_event(&line)],
        _ => vec![unknown_event(kind, line.clone())],
    };
    let ends_turn = kind == "result";
    if events.iter().any(|(_, text)| text.len() > MAX_PAYLOAD) {
        let events = long_line(piece);
        return Said { events, ends_turn };
    }
    Said { events, ends_turn }
}

fn long_line(piece: &Piece) -> Vec<Event> {
    let parts = parts(&piece.text, LONG_LINE_PART);
    let last = parts.len() - 1;
    parts
        .into_iter()
        .enumerate()
        .map(|(number, text)| {
            let continues = piece.continues || number < last;
            custom(LONG_LINE, &json!({"text": text, "continues": continues}))
        })
        .collect()
}

fn system_events(line: Map<String, Value>) -> Vec<Event> {
    match line.get("subtype").and_then(Value::as_str) {
        Some("init") => vec![lifecycle("run_started")],
        Some(subtype) => {
            let event = format!("system.{subtype}");
            vec![agents_custom(&event, &Value::Object(line))]
        }
        None => vec![unknown_event("system", line)],
    }
}

fn lifecycle(event: &str) -> Event {
    let payload = json!({ "event": event });
    (EventType::Lifecycle, payload.to_string())
}

fn unknown_event(kind: &str, line: Map<String, Value>) -> Event {
    let event = if kind.is_empty() { "stdout" } else { kind };
    agents_custom(event, &Value::Object(line))
}

/// The events of a message's content: a text, or a list of blocks.
fn message_events(
    line: &Map<String, Value>,
    kind: &str,
    of_block: fn(&Map<String, Value>) -> Option<Event>,
) -> Vec<Event> {
    let content = line
        .get("message")
        .and_then(|message| message.get("content"));
    match content {
        Some(Value::String(text)) if kind == "assistant" => {
            vec![(EventType::Assistant, text.clone())]
        }
        Some(Value::Array(blocks)) => blocks
            .iter()
            .map(|block| {
                let known = block.as_object().and_then(of_block);
                known.unwrap_or_else(|| {
                    let event = block["type"].as_str().unwrap_or(kind);
                    agents_custom(event, block)
                })
            })
            .collect(),
        _ => vec![unknown_event(kind, line.clone())],
    }
}

fn assistant_block(block: &Map<String, Value>) -> Option<Event> {
    match block.get("type")?.as_str()? {
        "text" => {
            let text = block.get("text")?.as_str()?;
            Some((EventType::Assistant, text.to_owned()))
        }
        "tool_use" => {
            let payload = json!({
                "tool": block.get("name")?,
                "tool_call_id": block.get("id")?,
                "input": block.get("input").unwrap_or(&Value::Null),
            });
            Some((EventType::ToolUse, payload.to_string()))
        }
        _ => None,
    }
}

fn user_block(block: &Map<String, Value>) -> Option<Event> {
    if block.get("type")? != "tool_result" {
        return None;
    }
    let content = block.get("content").unwrap_or(&Value::Null);
    let result = text_of(content).map_or_else(|| content.clone(), Value::String);
    let mut payload = json!({"tool_call_id": block.get("tool_use_id")?, "result": result});
    if block.get("is_error") == Some(&Value::Bool(true)) {
        payload["is_error"] = Value::Bool(true);
    }
    Some((EventType::ToolResult, payload.to_string()))
}

/// The text of a successful result repeats the last `assistant` message, so it is left out.
fn result_events(line: &Map<String, Value>) -> Vec<Event> {
    let finished = lifecycle("run_finished");
    if line.get("is_error") != Some(&Value::Bool(true)) {
        return vec![finished];
    }
    let text = |key: &str| line.get(key).and_then(Value::as_str);
    let code = text("subtype").unwrap_or("error");
    let what = text("result").filter(|result| !result.is_empty());
    let error = lost_message(code, what.unwrap_or(code));
    vec![error, finished]
}

fn error_event(line: &Map<String, Value>) -> Event {
    let error = line.get("error").unwrap_or(&Value::Null);
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let what = text(Some(error))
        .or_else(|| text(error.get("message")))
        .or_else(|| text(line.get("message")))
        .unwrap_or_else(|| Value::Object(line.clone()).to_string());
    let code = text(error.get("type"))
        .or_else(|| text(line.get("code")))
        .unwrap_or_else(|| "error".to_owned());
    lost_message(&code, &what)
}

#[cfg(test)]
mod tests;
