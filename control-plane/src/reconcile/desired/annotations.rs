//! What a session's annotations say about its agent (contract section 5).

use std::{borrow::Cow, collections::BTreeMap};

use serde_json::{Map, Value};

use super::{AgentIo, CannotRun, DesiredSettings, owned};
use crate::sessions::Session;

/// The agent's command, a JSON array of strings.
const AGENT_COMMAND: &str = "ambient-code.io/agent-command";
/// How the runner talks with the agent.
const AGENT_IO: &str = "ambient-code.io/agent-io";
/// After how many turns the agent's stdin is closed.
const AGENT_TURNS: &str = "ambient-code.io/agent-turns";
/// The image of the agent's container.
const AGENT_IMAGE: &str = "ambient-code.io/agent-image";

/// The session's annotations, parsed.
pub(super) fn annotations(session: &Session) -> Result<Map<String, Value>, CannotRun> {
    let text = session.object.annotations.as_deref().unwrap_or_default();
    if text.trim().is_empty() {
        return Ok(Map::new());
    }
    let parsed: Result<Option<Map<String, Value>>, _> = serde_json::from_str(text);
    parsed.map(Option::unwrap_or_default).map_err(|_| {
        CannotRun::new(
            "AnnotationsMalformed",
            "the session's `annotations` is no JSON object",
        )
    })
}

/// The annotation as text, as Kubernetes has it; a number counts as its digits.
fn annotation<'a>(
    annotations: &'a Map<String, Value>,
    name: &'static str,
) -> Result<Option<Cow<'a, str>>, CannotRun> {
    match annotations.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.trim().into())),
        Some(Value::Number(number)) => Ok(Some(number.to_string().into())),
        Some(_) => Err(malformed(name, "a string")),
    }
}

fn malformed(name: &'static str, wanted: &str) -> CannotRun {
    CannotRun::new(
        "AnnotationMalformed",
        format!("the annotation {name} is not {wanted}"),
    )
}

/// The agent's command.
pub(super) fn command(
    annotations: &Map<String, Value>,
    settings: &DesiredSettings,
) -> Result<Vec<String>, CannotRun> {
    if annotation(annotations, AGENT_IMAGE)?.is_some() {
        let message = format!("{AGENT_IMAGE} asks for an image, but sessions are processes here");
        return Err(CannotRun::new("AgentImageUnsupported", message));
    }
    let command = match annotation(annotations, AGENT_COMMAND)? {
        Some(text) => serde_json::from_str(&text)
            .map_err(|_| malformed(AGENT_COMMAND, "a JSON array of strings"))?,
        None => settings.default_agent_command.clone().unwrap_or_default(),
    };
    let wanted = "the agent's command: at least one string, the first not empty";
    match command.first() {
        None if annotations.contains_key(AGENT_COMMAND) => Err(malformed(AGENT_COMMAND, wanted)),
        None => Err(CannotRun::new(
            "AgentCommandMissing",
            format!("neither the annotation {AGENT_COMMAND} nor AGENT_COMMAND names a command"),
        )),
        Some(program) if program.is_empty() => Err(malformed(AGENT_COMMAND, wanted)),
        Some(_) if command.iter().any(|part| part.contains('\0')) => {
            Err(malformed(AGENT_COMMAND, "free of NUL characters"))
        }
        Some(_) => Ok(command),
    }
}

/// How the runner talks with the agent, as variables.
pub(super) fn agent_io(
    annotations: &Map<String, Value>,
    settings: &DesiredSettings,
) -> Result<BTreeMap<String, String>, CannotRun> {
    let io = match annotation(annotations, AGENT_IO)? {
        Some(name) => name
            .parse()
            .map_err(|_| malformed(AGENT_IO, "one of none, lines and stream-json"))?,
        None => settings.default_agent_io.unwrap_or(if settings.messages {
            AgentIo::StreamJson
        } else {
            AgentIo::None
        }),
    };
    let turns: u32 = match annotation(annotations, AGENT_TURNS)? {
        Some(number) => number
            .parse()
            .map_err(|_| malformed(AGENT_TURNS, "a whole number from 0"))?,
        None => 0,
    };
    Ok(owned(vec![
        ("AMBIENT_AGENT_IO", io.as_str().to_owned()),
        ("AMBIENT_AGENT_TURNS", turns.to_string()),
    ]))
}
