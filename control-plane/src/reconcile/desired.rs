//! What a session's run should be. Pure.
//!
//! In: the session's object and the settings. Out: the runner's command and environment (contract
//! section 3), or why there can be none. Paths are the backend's: it adds them, and what it adds
//! wins.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr};

use serde_json::{Value, json};

use crate::{
    backend::{DesiredRun, ResourceOverrides},
    keypair::PublicHalf,
    sessions::Session,
};

mod annotations;
mod place;
pub(crate) mod quantity;
mod requested;
mod resources;

use annotations::{agent, agent_io, annotations};
pub use place::{Place, PodLimits};
use requested::requested;
pub(crate) use resources::parse_quantities;

/// Most bytes of one variable. Linux takes 128 KiB with the name (`MAX_ARG_STRLEN`), and what it
/// does not take fails every start.
const MAX_VALUE: usize = 127 * 1024;

/// Most bytes of all variables. Linux takes 2 MiB with the arguments at the usual stack limit, and
/// Kubernetes an object of 1.5 MiB, in which some characters take more room than one.
const MAX_ENVIRONMENT: usize = 512 * 1024;

/// How the runner talks with the agent (contract section 3, I/O modes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentIo {
    /// Stdio is passed through.
    None,
    /// A message is a line.
    Lines,
    /// JSON objects, one a line.
    StreamJson,
}

/// What the environment of all sessions has in common.
#[derive(Debug, Clone, Default)]
pub struct DesiredSettings {
    /// URL of the token endpoint, as sessions reach it.
    pub token_url: String,
    /// More CA certificates that runners trust for it, PEM.
    pub token_ca: Option<String>,
    /// Base URL of the API server's REST, as sessions reach it.
    pub api_rest_url: String,
    /// `host:port` of the API server's gRPC, as sessions reach it.
    pub api_grpc_url: String,
    /// Whether that speaks TLS.
    pub grpc_tls: bool,
    /// CA certificates for it, as a path in the session.
    pub grpc_ca_file: Option<PathBuf>,
    /// Whether runners exchange messages with the API server.
    pub messages: bool,
    /// The agent of sessions that name none.
    pub default_agent_command: Option<Vec<String>>,
    /// I/O mode of sessions that name none. None: `stream-json` with messages, `none` without.
    pub default_agent_io: Option<AgentIo>,
    /// `LOG_LEVEL` of runners.
    pub runner_log_level: Option<String>,
    /// More variables for all sessions, such as `HTTP_PROXY` and those of existing runner images.
    pub passed_on: BTreeMap<String, String>,
    /// Where sessions run, and what they may ask for there.
    pub place: Place,
}

/// A text that names no I/O mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no I/O mode; it must be none, lines or stream-json")]
pub struct UnknownAgentIo(String);

impl AgentIo {
    /// The name in annotations and environment.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lines => "lines",
            Self::StreamJson => "stream-json",
        }
    }
}

impl FromStr for AgentIo {
    type Err = UnknownAgentIo;

    fn from_str(name: &str) -> Result<Self, UnknownAgentIo> {
        match name {
            "none" => Ok(Self::None),
            "lines" => Ok(Self::Lines),
            "stream-json" => Ok(Self::StreamJson),
            _ => Err(UnknownAgentIo(name.to_owned())),
        }
    }
}

/// Why a session cannot run, however often it is tried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct CannotRun {
    /// Condition reason.
    pub reason: &'static str,
    /// For people: what is wrong, and with what.
    pub message: String,
}

impl CannotRun {
    fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

/// The run of a session.
///
/// `preamble` are the prompts that come before the session's own (project, agent, inbox), in this
/// order; empty ones are left out. `public_key` is the token endpoint's.
///
/// # Errors
/// [`CannotRun`] when the session's object contradicts the contract.
pub fn desired_run(
    session: &Session,
    preamble: &[&str],
    settings: &DesiredSettings,
    public_key: PublicHalf<'_>,
) -> Result<DesiredRun, CannotRun> {
    let annotations = annotations(session)?;
    let agent = agent(&annotations, settings)?;
    let resources = match &settings.place {
        Place::Processes => ResourceOverrides::default(),
        Place::Pods(limits) => resources::overrides(session, limits)?,
    };
    let mut environment = settings.passed_on.clone();
    environment.extend(common(session, settings));
    environment.insert(
        "AMBIENT_CP_TOKEN_PUBLIC_KEY".to_owned(),
        public_key.pem.to_owned(),
    );
    environment.extend(agent_io(&annotations, settings)?);
    environment.extend(work(session, preamble)?);
    for (name, value) in requested(session)? {
        // Never in place of ours.
        environment.entry(name).or_insert(value);
    }
    check_environment(&environment)?;
    Ok(DesiredRun {
        id: session.id.clone(),
        generation: session.generation,
        name: session.object.name.clone(),
        project: session.object.project_id.clone().unwrap_or_default(),
        agent,
        keypair: public_key.id,
        environment,
        resources,
    })
}

/// Whether a program can be started with it.
fn check_environment(environment: &BTreeMap<String, String>) -> Result<(), CannotRun> {
    if let Some((name, _)) = environment.iter().find(|(_, value)| value.contains('\0')) {
        let message = format!("{name} would have a NUL character, which no variable can hold");
        return Err(CannotRun::new("EnvironmentMalformed", message));
    }
    let too_large = |message: String| Err(CannotRun::new("EnvironmentTooLarge", message));
    let mut all = 0;
    for (name, value) in environment {
        // `NAME=value` and its end.
        all += name.len() + value.len() + 2;
        if value.len() > MAX_VALUE {
            return too_large(format!(
                "{name} would have {} bytes; at most {MAX_VALUE} fit",
                value.len()
            ));
        }
    }
    if all > MAX_ENVIRONMENT {
        return too_large(format!(
            "the session's environment would have {all} bytes; at most {MAX_ENVIRONMENT} fit"
        ));
    }
    Ok(())
}

/// Who the session is and whom it talks to.
fn common(session: &Session, settings: &DesiredSettings) -> BTreeMap<String, String> {
    let object = &session.object;
    let project = object.project_id.clone().unwrap_or_default();
    let flag = |on: bool| if on { "true" } else { "false" }.to_owned();
    let mut variables = vec![
        ("SESSION_ID", session.id.as_str().to_owned()),
        ("AMBIENT_CP_TOKEN_URL", settings.token_url.clone()),
        ("AMBIENT_GRPC_URL", settings.api_grpc_url.clone()),
        ("AMBIENT_GRPC_ENABLED", flag(settings.messages)),
        ("AMBIENT_GRPC_USE_TLS", flag(settings.grpc_tls)),
        ("BACKEND_API_URL", settings.api_rest_url.clone()),
        ("AMBIENT_API_URL", settings.api_rest_url.clone()),
        ("AGENTIC_SESSION_NAME", object.name.clone()),
        ("AGENTIC_SESSION_NAMESPACE", project.to_lowercase()),
        ("PROJECT_NAME", project),
        ("ARTIFACTS_DIR", "artifacts".to_owned()),
    ];
    if let Some(pem) = &settings.token_ca {
        variables.push(("AMBIENT_CP_TOKEN_CA", pem.clone()));
    }
    if let Some(path) = &settings.grpc_ca_file {
        variables.push(("AMBIENT_GRPC_CA_CERT_FILE", path.display().to_string()));
    }
    if let Some(level) = &settings.runner_log_level {
        variables.push(("LOG_LEVEL", level.clone()));
    }
    if let Some(agent) = object.agent_id.as_ref().filter(|id| !id.is_empty()) {
        variables.push(("AGENT_ID", agent.clone()));
    }
    if session.generation > 0 {
        variables.push(("IS_RESUME", "true".to_owned()));
    }
    owned(variables)
}

/// What the session is to do, and with what.
fn work(session: &Session, preamble: &[&str]) -> Result<BTreeMap<String, String>, CannotRun> {
    let object = &session.object;
    let mut variables = Vec::new();
    let prompt = object.prompt.as_deref().unwrap_or_default();
    let preamble = joined(preamble.iter().copied());
    let initial = joined([preamble.as_str(), prompt]);
    if !initial.is_empty() {
        variables.push(("INITIAL_PROMPT", initial));
    }
    if !preamble.is_empty() {
        variables.push(("AMBIENT_PREAMBLE", preamble));
    }
    if let Some(model) = object.llm_model.as_ref().filter(|model| !model.is_empty()) {
        variables.push(("LLM_MODEL", model.clone()));
    }
    if let Some(temperature) = object.llm_temperature.filter(|value| *value != 0.0) {
        variables.push(("LLM_TEMPERATURE", temperature.to_string()));
    }
    if let Some(tokens) = object.llm_max_tokens.filter(|value| *value != 0) {
        variables.push(("LLM_MAX_TOKENS", tokens.to_string()));
    }
    if let Some(seconds) = object.timeout.filter(|value| *value != 0) {
        variables.push(("TIMEOUT", seconds.to_string()));
    }
    let repos = repos(session)?;
    if !repos.is_empty() {
        variables.push(("REPOS_JSON", Value::Array(repos).to_string()));
    }
    Ok(owned(variables))
}

/// The parts that are not empty, with a blank line between.
fn joined<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let parts = parts.into_iter().filter(|part| !part.trim().is_empty());
    parts.collect::<Vec<_>>().join("\n\n")
}

/// `repo_url`, and what `repos` lists beside it: URLs, or objects with a `url`.
fn repos(session: &Session) -> Result<Vec<Value>, CannotRun> {
    let object = &session.object;
    let mut all = Vec::new();
    if let Some(url) = object.repo_url.as_ref().filter(|url| !url.is_empty()) {
        all.push(json!({ "url": url }));
    }
    let text = object.repos.as_deref().unwrap_or_default();
    if text.trim().is_empty() {
        return Ok(all);
    }
    let malformed = || {
        CannotRun::new(
            "ReposMalformed",
            "the session's `repos` is no JSON array of URLs or of objects with a `url`",
        )
    };
    let listed: Option<Vec<Value>> = serde_json::from_str(text).map_err(|_| malformed())?;
    for entry in listed.unwrap_or_default() {
        let entry = match entry {
            Value::String(url) => json!({ "url": url }),
            Value::Object(entry) => Value::Object(entry),
            _ => return Err(malformed()),
        };
        let url = entry.get("url").and_then(Value::as_str);
        let Some(url) = url.filter(|url| !url.is_empty()) else {
            return Err(malformed());
        };
        if !all.iter().any(|known| known["url"] == url) {
            all.push(entry);
        }
    }
    Ok(all)
}

fn owned(variables: Vec<(&'static str, String)>) -> BTreeMap<String, String> {
    let owned = |(name, value): (&str, String)| (name.to_owned(), value);
    variables.into_iter().map(owned).collect()
}

#[cfg(test)]
mod tests;
