//! What may be done to a session: its writable fields, its status, its phases. Pure.
//!
//! A terminal phase is left only by a start, and a session that was asked to stop only by ending:
//! a late write of somebody who has not seen that yet must not undo it.

use ambient_shared::{
    phase::Phase,
    rest::{BASE, Session},
};
use prost_types::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use crate::{
    error::Error,
    projects::check_label,
    time::{from_micros, to_micros},
};

/// Most bytes of all texts of a session together: watchers keep many sessions in memory.
pub(crate) const MAX_SIZE: usize = 256 * 1024;

/// Most characters of a session's name.
const MAX_NAME: usize = 255;

/// The fields of a session that users write. What is absent stays as it is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SessionChange {
    pub(crate) name: Option<String>,
    pub(crate) repo_url: Option<String>,
    pub(crate) prompt: Option<String>,
    pub(crate) assigned_user_id: Option<String>,
    pub(crate) workflow_id: Option<String>,
    pub(crate) repos: Option<String>,
    pub(crate) timeout: Option<i32>,
    pub(crate) llm_model: Option<String>,
    pub(crate) llm_temperature: Option<f64>,
    pub(crate) llm_max_tokens: Option<i32>,
    pub(crate) parent_session_id: Option<String>,
    pub(crate) bot_account_name: Option<String>,
    pub(crate) resource_overrides: Option<String>,
    pub(crate) environment_variables: Option<String>,
    pub(crate) labels: Option<String>,
    pub(crate) annotations: Option<String>,
    pub(crate) project_id: Option<String>,
    /// Only at creation, and only from callers that may act for others.
    pub(crate) created_by_user_id: Option<String>,
}

/// The fields of a session that controllers write. What is absent stays as it is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StatusChange {
    pub(crate) phase: Option<String>,
    #[serde(deserialize_with = "rfc3339")]
    pub(crate) start_time: Option<Timestamp>,
    #[serde(deserialize_with = "rfc3339")]
    pub(crate) completion_time: Option<Timestamp>,
    pub(crate) sdk_session_id: Option<String>,
    pub(crate) sdk_restart_count: Option<i32>,
    pub(crate) conditions: Option<String>,
    pub(crate) reconciled_repos: Option<String>,
    pub(crate) reconciled_workflow: Option<String>,
    pub(crate) kube_cr_uid: Option<String>,
    pub(crate) kube_namespace: Option<String>,
}

/// One kind of change.
#[derive(Debug, Clone)]
pub(crate) enum Edit {
    /// A user's fields.
    Fields(SessionChange),
    /// A controller's fields.
    Status(StatusChange),
    /// Run (again).
    Start,
    /// Stop running.
    Stop,
}

/// Copies each field that is there.
macro_rules! merge {
    ($from:ident => $to:ident: $($field:ident),+ $(,)?) => {
        $(if let Some(value) = $from.$field {
            $to.$field = Some(value);
        })+
    };
}

/// A new session, with no phase yet.
///
/// # Errors
/// When a field is missing or malformed.
pub(crate) fn create(change: SessionChange, now: i64) -> Result<Session, Error> {
    let id = Uuid::now_v7().to_string();
    let mut session = Session {
        href: format!("{BASE}/sessions/{id}"),
        id,
        kind: "Session".to_owned(),
        created_at: Some(from_micros(now)),
        updated_at: Some(from_micros(now)),
        created_by_user_id: change.created_by_user_id.clone(),
        sdk_restart_count: Some(0),
        ..Session::default()
    };
    set_fields(&mut session, change)?;
    if session.name.is_empty() {
        return Err(Error::Invalid("name is missing".to_owned()));
    }
    Ok(session)
}

/// Changes a session at the time `now` (microseconds since the epoch).
///
/// # Errors
/// When a field is malformed or the phase does not permit it; the session is then to be dropped.
pub(crate) fn edit(session: &mut Session, edit: Edit, now: i64) -> Result<(), Error> {
    match edit {
        Edit::Fields(change) => set_fields(session, change),
        Edit::Status(change) => set_status(session, change, now),
        Edit::Start => start(session),
        Edit::Stop => stop(session),
    }
}

fn set_fields(session: &mut Session, change: SessionChange) -> Result<(), Error> {
    if let Some(name) = change.name {
        if name.trim().is_empty() || name.chars().count() > MAX_NAME {
            return Err(Error::Invalid(format!(
                "name must have from 1 to {MAX_NAME} characters"
            )));
        }
        session.name = name;
    }
    if let Some(project) = change.project_id.as_deref().filter(|id| !id.is_empty()) {
        check_label("project_id", project)?;
    }
    for (field, number) in [
        ("timeout", change.timeout),
        ("llm_max_tokens", change.llm_max_tokens),
    ] {
        if number.is_some_and(|number| number < 0) {
            return Err(Error::Invalid(format!("{field} must not be negative")));
        }
    }
    if change
        .llm_temperature
        .is_some_and(|number| !number.is_finite())
    {
        return Err(Error::Invalid("llm_temperature must be finite".to_owned()));
    }
    for (field, text) in [
        ("labels", &change.labels),
        ("annotations", &change.annotations),
    ] {
        check_json(field, text.as_deref(), "object", Value::is_object)?;
    }
    for (field, text) in [
        ("repos", &change.repos),
        ("environment_variables", &change.environment_variables),
        ("resource_overrides", &change.resource_overrides),
    ] {
        check_json(field, text.as_deref(), "value", |_| true)?;
    }
    merge!(change => session: repo_url, prompt, assigned_user_id, workflow_id, repos, timeout,
        llm_model, llm_temperature, llm_max_tokens, parent_session_id, bot_account_name,
        resource_overrides, environment_variables, labels, annotations, project_id);
    check_size(session)
}

fn set_status(session: &mut Session, mut change: StatusChange, now: i64) -> Result<(), Error> {
    if let Some(name) = change.phase.as_deref().filter(|name| !name.is_empty()) {
        let to: Phase = name.parse().map_err(|error| {
            let known = Phase::ALL.map(Phase::as_str).join(", ");
            Error::Invalid(format!("phase: {error}; known are {known}"))
        })?;
        let from = phase_of(session);
        let undoes_a_stop = from == Phase::Stopping && to < Phase::Stopping;
        if from != to && (from.is_terminal() || undoes_a_stop) {
            return Err(Error::WrongPhase(format!(
                "session is {from}; it cannot become {to}{}",
                if from.is_terminal() {
                    " unless it is started again"
                } else {
                    ""
                }
            )));
        }
        session.phase = Some(to.to_string());
        if to == Phase::Running && session.start_time.is_none() {
            session.start_time = Some(from_micros(now));
        }
        if to.is_terminal() && session.completion_time.is_none() {
            session.completion_time = Some(from_micros(now));
        }
    }
    let starts = session.sdk_restart_count.unwrap_or_default();
    // A status that names an older start is late news of a run that is over.
    if change.sdk_restart_count.is_some_and(|count| count < starts) {
        return Err(Error::WrongPhase(format!(
            "session was started again: sdk_restart_count is {starts} and cannot fall"
        )));
    }
    check_json(
        "conditions",
        change.conditions.as_deref(),
        "array",
        Value::is_array,
    )?;
    change.start_time = stored_time("start_time", change.start_time)?;
    change.completion_time = stored_time("completion_time", change.completion_time)?;
    merge!(change => session: start_time, completion_time, sdk_session_id, sdk_restart_count,
        conditions, reconciled_repos, reconciled_workflow, kube_cr_uid, kube_namespace);
    check_size(session)
}

fn start(session: &mut Session) -> Result<(), Error> {
    let first = session.phase.is_none();
    if !first && !phase_of(session).is_terminal() {
        return Err(wrong_phase(session, "started"));
    }
    if !first {
        // A session that never ran is not resumed: its agent still has to see the prompt.
        let starts = session.sdk_restart_count.unwrap_or_default();
        session.sdk_restart_count = Some(starts.saturating_add(1));
    }
    session.phase = Some(Phase::Pending.to_string());
    session.start_time = None;
    session.completion_time = None;
    session.conditions = None;
    Ok(())
}

fn stop(session: &mut Session) -> Result<(), Error> {
    let runs = matches!(
        phase_of(session),
        Phase::Pending | Phase::Creating | Phase::Running
    );
    if session.phase.is_none() || !runs {
        return Err(wrong_phase(session, "stopped"));
    }
    session.phase = Some(Phase::Stopping.to_string());
    Ok(())
}

fn wrong_phase(session: &Session, what: &str) -> Error {
    let phase = session.phase.as_deref().unwrap_or("not provisioned yet");
    Error::WrongPhase(format!("session is {phase}; it cannot be {what} now"))
}

/// The phase of a stored session: only known ones are ever stored.
pub(crate) fn phase_of(session: &Session) -> Phase {
    Phase::of(session.phase.as_deref()).unwrap_or(Phase::Pending)
}

fn check_json(
    field: &str,
    text: Option<&str>,
    expected: &str,
    is_right: fn(&Value) -> bool,
) -> Result<(), Error> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(());
    };
    match serde_json::from_str(text) {
        Ok(value) if is_right(&value) => Ok(()),
        Ok(_) => Err(Error::Invalid(format!(
            "{field} must hold a JSON {expected}, as a string"
        ))),
        Err(error) => Err(Error::Invalid(format!(
            "{field} must hold a JSON {expected}, as a string: {error}"
        ))),
    }
}

/// A time as the database keeps it: so that writing the same one again changes nothing.
fn stored_time(field: &str, time: Option<Timestamp>) -> Result<Option<Timestamp>, Error> {
    // The years 1 to 9999, which is what RFC 3339 and protobuf can say.
    const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;
    let Some(time) = time else {
        return Ok(None);
    };
    to_micros(&time)
        .filter(|_| SECONDS.contains(&time.seconds) && (0..1_000_000_000).contains(&time.nanos))
        .map(|micros| Some(from_micros(micros)))
        .ok_or_else(|| Error::Invalid(format!("{field} is not a time")))
}

fn check_size(session: &Session) -> Result<(), Error> {
    let texts = [
        Some(&session.name),
        session.repo_url.as_ref(),
        session.prompt.as_ref(),
        session.created_by_user_id.as_ref(),
        session.assigned_user_id.as_ref(),
        session.workflow_id.as_ref(),
        session.repos.as_ref(),
        session.llm_model.as_ref(),
        session.parent_session_id.as_ref(),
        session.bot_account_name.as_ref(),
        session.resource_overrides.as_ref(),
        session.environment_variables.as_ref(),
        session.labels.as_ref(),
        session.annotations.as_ref(),
        session.project_id.as_ref(),
        session.sdk_session_id.as_ref(),
        session.conditions.as_ref(),
        session.reconciled_repos.as_ref(),
        session.reconciled_workflow.as_ref(),
        session.kube_cr_uid.as_ref(),
        session.kube_namespace.as_ref(),
    ];
    let size: usize = texts.into_iter().flatten().map(String::len).sum();
    if size > MAX_SIZE {
        return Err(Error::TooLarge(format!(
            "the session's texts have {size} bytes; at most {MAX_SIZE} are kept"
        )));
    }
    Ok(())
}

fn rfc3339<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Timestamp>, D::Error> {
    match Option::<String>::deserialize(from)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text
            .parse()
            .map(Some)
            .map_err(|_| serde::de::Error::custom(format!("{text:?} is not an RFC 3339 time"))),
    }
}

#[cfg(test)]
mod tests;
