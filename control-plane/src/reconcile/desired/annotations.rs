//! What a session's annotations say about its agent (contract section 5).

use std::{borrow::Cow, collections::BTreeMap};

use serde_json::{Map, Value};

use super::{AgentIo, CannotRun, DesiredSettings, PodLimits, owned, place::Place};
use crate::{backend::Agent, sessions::Session};

/// The agent's command, a JSON array of strings.
const AGENT_COMMAND: &str = "ambient-code.io/agent-command";
/// How the runner talks with the agent.
const AGENT_IO: &str = "ambient-code.io/agent-io";
/// After how many turns the agent's stdin is closed.
const AGENT_TURNS: &str = "ambient-code.io/agent-turns";
/// The image of the agent's container.
const AGENT_IMAGE: &str = "ambient-code.io/agent-image";

/// Longest name of an image. Registries take 255 characters before the tag or digest.
const MAX_IMAGE: usize = 512;

/// Most bytes of a command: one argument can be this long (`MAX_ARG_STRLEN`), and nobody needs more
/// in all.
const MAX_COMMAND: usize = 127 * 1024;

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

/// What is started.
pub(super) fn agent(
    annotations: &Map<String, Value>,
    settings: &DesiredSettings,
) -> Result<Agent, CannotRun> {
    let image = annotation(annotations, AGENT_IMAGE)?;
    let image = image.map(|image| allowed(&image, settings)).transpose()?;
    let command = match annotation(annotations, AGENT_COMMAND)? {
        Some(text) => serde_json::from_str(&text)
            .map_err(|_| malformed(AGENT_COMMAND, "a JSON array of strings"))?,
        None => settings.default_agent_command.clone().unwrap_or_default(),
    };
    let wanted = "the agent's command: at least one string, the first not empty";
    match command.first() {
        None if annotation(annotations, AGENT_COMMAND)?.is_some() => {
            Err(malformed(AGENT_COMMAND, wanted))
        }
        None => without_command(image.is_some(), settings),
        Some(program) if program.is_empty() => Err(malformed(AGENT_COMMAND, wanted)),
        Some(_) if command.iter().any(|part| part.contains('\0')) => {
            Err(malformed(AGENT_COMMAND, "free of NUL characters"))
        }
        Some(_) if command.iter().map(String::len).sum::<usize>() > MAX_COMMAND => {
            let wanted = "a command that fits: it has more than 127 KiB";
            Err(malformed(AGENT_COMMAND, wanted))
        }
        Some(_) => Ok(Agent::Command { command, image }),
    }
}

/// An image that the session may name.
fn allowed(image: &str, settings: &DesiredSettings) -> Result<String, CannotRun> {
    let Place::Pods(limits) = &settings.place else {
        let message = format!("{AGENT_IMAGE} asks for an image, but sessions are processes here");
        return Err(CannotRun::new("AgentImageUnsupported", message));
    };
    let is_printable = |it: char| it.is_ascii_graphic();
    if image.len() > MAX_IMAGE || !image.chars().all(is_printable) {
        return Err(malformed(AGENT_IMAGE, "the name of an image"));
    }
    if !limits.allows(image) {
        let message = format!(
            "{AGENT_IMAGE} asks for {image}, which is not among the images that the operator allows \
             (AGENT_IMAGE_ALLOW)"
        );
        return Err(CannotRun::new("AgentImageNotAllowed", message));
    }
    Ok(image.to_owned())
}

/// What is started where nobody names a command.
fn without_command(has_image: bool, settings: &DesiredSettings) -> Result<Agent, CannotRun> {
    let missing = |message: String| Err(CannotRun::new("AgentCommandMissing", message));
    let none = format!("neither the annotation {AGENT_COMMAND} nor AGENT_COMMAND names a command");
    if has_image {
        return missing(format!(
            "{none}, which an image needs: its own cannot be seen"
        ));
    }
    match &settings.place {
        Place::Pods(PodLimits {
            default_image: Some(_),
            ..
        }) => Ok(Agent::RunnerImage),
        Place::Pods(_) => missing(format!("{none}, and no RUNNER_IMAGE is set")),
        Place::Processes => missing(none),
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
