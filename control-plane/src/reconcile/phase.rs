//! From what runs to what is reported. Pure.
//!
//! In: a session as the API server has it, and its run as the backend sees it. Out: the status that
//! is true now and not reported yet. A phase is never ahead of the truth, a terminal phase is never
//! left, and a run of another generation says nothing about this one.

use std::time::SystemTime;

use ambient_shared::{phase::Phase, proto, session::SessionId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    backend::{Reason, RunEnd, RunState, RunStatus},
    sessions::Session,
};

/// The type of our condition. Others' conditions are left as they are.
const READY: &str = "Ready";

/// Longest message in a condition, in characters.
const MAX_MESSAGE: usize = 1024;

/// Agent's exit codes with a meaning of their own (POSIX shell).
const SIGNAL_BASE: u8 = ambient_shared::exit::SIGNAL_BASE;

/// What is to be reported about a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Status {
    /// The phase it is in.
    pub(crate) phase: Phase,
    /// When the agent was started.
    pub(crate) start_time: Option<SystemTime>,
    /// When the run ended.
    pub(crate) completion_time: Option<SystemTime>,
    /// The namespace that it runs in.
    pub(crate) namespace: Option<String>,
    /// Why, as condition `Ready`.
    pub(crate) condition: Condition,
}

/// The condition `Ready` of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Condition {
    /// Whether the agent runs.
    pub(crate) ready: bool,
    /// One word in CamelCase.
    pub(crate) reason: String,
    /// For people.
    pub(crate) message: String,
}

impl Condition {
    /// The agent does not run, because.
    pub(crate) fn not_ready(reason: &str, message: impl Into<String>) -> Self {
        Self {
            ready: false,
            reason: reason.to_owned(),
            message: message.into(),
        }
    }

    fn because(reason: &Reason) -> Self {
        Self::not_ready(&reason.reason, reason.message.clone())
    }
}

/// One condition on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WireCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
    reason: String,
    message: String,
    last_transition_time: String,
}

/// What is true of a session and not reported yet.
///
/// `run` is the run as last seen, of whatever generation.
pub(crate) fn unreported(session: &Session, run: Option<&RunState>) -> Option<Status> {
    if run.is_some_and(|run| run.status == RunStatus::Unknown) {
        // It may run well.
        return None;
    }
    let own = run.filter(|run| run.generation == session.generation);
    let own = own.map(|run| &run.status);
    let namespace = run.and_then(|run| run.namespace.clone());
    let status = match (session.phase, own) {
        (
            Phase::Pending | Phase::Creating | Phase::Running,
            Some(RunStatus::Running { since, not_ready }),
        ) => running(*since, not_ready.as_ref()),
        (Phase::Creating, Some(RunStatus::Starting { waits_for }))
            if waits_for.is_some() || namespace.is_some() =>
        {
            let made = creating();
            Status {
                condition: waits_for
                    .as_ref()
                    .map_or(made.condition, Condition::because),
                ..made
            }
        }
        (Phase::Pending | Phase::Creating | Phase::Running, Some(RunStatus::Doomed(reason))) => {
            failed(reason, None)
        }
        (Phase::Running, Some(RunStatus::Ending(reason))) => ending(reason),
        (Phase::Creating | Phase::Running, Some(RunStatus::Ended { at, end })) => ended(*at, end),
        (Phase::Running, None) => lost(),
        (Phase::Stopping, Some(RunStatus::Ended { at, end })) => stopped(Some(*at), Some(end)),
        // Nothing of this generation runs, but it is not stopped while something else does.
        (Phase::Stopping, None) if run.is_none_or(has_ended) => stopped(None, None),
        // It has ended, or there is nothing new: it is being started, or being stopped, or (Pending
        // with an ended run) was started again without being counted, which is Provision's work.
        (_, Some(RunStatus::Unknown))
        | (Phase::Stopped | Phase::Completed | Phase::Failed | Phase::Stopping, _)
        | (
            Phase::Pending,
            None
            | Some(RunStatus::Starting { .. } | RunStatus::Ending(_) | RunStatus::Ended { .. }),
        )
        | (Phase::Creating, None | Some(RunStatus::Starting { .. } | RunStatus::Ending(_)))
        | (Phase::Running, Some(RunStatus::Starting { .. })) => return None,
    };
    let status = Status {
        namespace,
        ..status
    };
    (!is_reported(session, &status)).then_some(status)
}

fn has_ended(run: &RunState) -> bool {
    matches!(run.status, RunStatus::Ended { .. })
}

/// The status of a session whose run is being made.
pub(crate) fn creating() -> Status {
    Status {
        phase: Phase::Creating,
        start_time: None,
        completion_time: None,
        namespace: None,
        condition: Condition::not_ready("Creating", "the session's run is being made"),
    }
}

/// The status of a session that cannot run.
pub(crate) fn cannot_run(reason: &str, message: &str, now: SystemTime) -> Status {
    Status {
        phase: Phase::Failed,
        start_time: None,
        completion_time: Some(now),
        namespace: None,
        condition: Condition::not_ready(reason, message),
    }
}

/// The status of a session whose start failed and is tried again.
pub(crate) fn start_failed(reason: &str, message: &str) -> Status {
    Status {
        condition: Condition::not_ready(reason, message),
        ..creating()
    }
}

fn running(since: SystemTime, not_ready: Option<&Reason>) -> Status {
    let ready = || Condition {
        ready: true,
        reason: "AgentRunning".to_owned(),
        message: "the agent runs".to_owned(),
    };
    Status {
        phase: Phase::Running,
        start_time: Some(since),
        completion_time: None,
        namespace: None,
        condition: not_ready.map_or_else(ready, Condition::because),
    }
}

/// Running until it has ended, and how, is known.
fn ending(reason: &Reason) -> Status {
    Status {
        phase: Phase::Running,
        start_time: None,
        completion_time: None,
        namespace: None,
        condition: Condition::because(reason),
    }
}

fn failed(reason: &Reason, at: Option<SystemTime>) -> Status {
    Status {
        phase: Phase::Failed,
        start_time: None,
        completion_time: at,
        namespace: None,
        condition: Condition::because(reason),
    }
}

fn ended(at: SystemTime, end: &RunEnd) -> Status {
    let (phase, reason, message) = match end {
        RunEnd::Exited { code: 0, .. } => (
            Phase::Completed,
            "Completed",
            "the agent succeeded".to_owned(),
        ),
        RunEnd::Exited { code, message } => {
            let mut text = describe_exit(*code);
            if let Some(last_words) = message {
                text = format!("{text}: {last_words}");
            }
            (Phase::Failed, "AgentExit", text)
        }
        RunEnd::Killed(reason) => return failed(reason, Some(at)),
        RunEnd::Lost { message } => (Phase::Failed, "RunnerLost", message.clone()),
    };
    Status {
        phase,
        start_time: None,
        completion_time: Some(at),
        namespace: None,
        condition: Condition::not_ready(reason, message),
    }
}

fn lost() -> Status {
    Status {
        phase: Phase::Failed,
        start_time: None,
        completion_time: None,
        namespace: None,
        condition: Condition::not_ready("RunnerLost", "nothing of the session's run is left"),
    }
}

fn stopped(at: Option<SystemTime>, end: Option<&RunEnd>) -> Status {
    let message = match end {
        Some(RunEnd::Exited { code, .. }) => format!("stopped as asked; {}", describe_exit(*code)),
        Some(RunEnd::Lost { message } | RunEnd::Killed(Reason { message, .. })) => {
            format!("stopped as asked; {message}")
        }
        None => "stopped as asked; nothing was running".to_owned(),
    };
    Status {
        phase: Phase::Stopped,
        start_time: None,
        completion_time: at,
        namespace: None,
        condition: Condition::not_ready("Stopped", message),
    }
}

fn describe_exit(code: u8) -> String {
    let meaning = match code {
        126 => " (its command cannot be executed)".to_owned(),
        127 => " (its command was not found)".to_owned(),
        code if code > SIGNAL_BASE => format!(" (signal {})", code - SIGNAL_BASE),
        _ => String::new(),
    };
    format!("the agent ended with exit code {code}{meaning}")
}

/// Whether the session's object says all of this already.
fn is_reported(session: &Session, status: &Status) -> bool {
    session.phase == status.phase
        && (status.start_time.is_none() || session.object.start_time.is_some())
        && (status.completion_time.is_none() || session.object.completion_time.is_some())
        && (status.namespace.is_none() || session.object.kube_namespace == status.namespace)
        && has_condition(session, &status.condition)
}

/// Whether the session's object has this condition already.
pub(crate) fn has_condition(session: &Session, wanted: &Condition) -> bool {
    let conditions = parse_conditions(session);
    let known = conditions.iter().find_map(our_condition);
    known.is_some_and(|known| {
        known.status == status_text(wanted.ready)
            && known.reason == wanted.reason
            && known.message == cut(&wanted.message)
    })
}

/// The request that reports this.
pub(crate) fn request(
    session: &Session,
    status: &Status,
    now: SystemTime,
) -> proto::UpdateSessionStatusRequest {
    proto::UpdateSessionStatusRequest {
        id: session.id.as_str().to_owned(),
        phase: Some(status.phase.as_str().to_owned()),
        start_time: status.start_time.map(Into::into),
        // A session that ended unseen ended at some time before now.
        completion_time: status
            .completion_time
            .or_else(|| status.phase.is_terminal().then_some(now))
            .map(Into::into),
        kube_namespace: status.namespace.clone(),
        conditions: Some(with_condition(session, &status.condition, now)),
        // Names the start that this is news of: our server refuses it once there was another, so
        // that a write whose answer was lost, sent again, ends no session that runs anew.
        sdk_restart_count: session.object.sdk_restart_count,
        ..Default::default()
    }
}

/// The session's conditions, with ours as it is now.
fn with_condition(session: &Session, ours: &Condition, now: SystemTime) -> String {
    let mut conditions = parse_conditions(session);
    let position = conditions
        .iter()
        .position(|value| our_condition(value).is_some());
    let before = position.and_then(|at| our_condition(&conditions[at]));
    let status = status_text(ours.ready);
    // As Kubernetes has it: the time of the last change of the status, not of the words.
    let last_transition_time = before.filter(|before| before.status == status).map_or_else(
        || humantime::format_rfc3339_seconds(now).to_string(),
        |before| before.last_transition_time,
    );
    let wire = WireCondition {
        kind: READY.to_owned(),
        status: status.to_owned(),
        reason: ours.reason.clone(),
        message: cut(&ours.message),
        last_transition_time,
    };
    let value = serde_json::to_value(wire).unwrap_or(Value::Object(Map::new()));
    match position {
        Some(at) => conditions[at] = value,
        None => conditions.push(value),
    }
    Value::Array(conditions).to_string()
}

/// Empty for whatever is no array: we would be the first to write one.
fn parse_conditions(session: &Session) -> Vec<Value> {
    let text = session.object.conditions.as_deref().unwrap_or_default();
    serde_json::from_str(text).unwrap_or_default()
}

fn our_condition(value: &Value) -> Option<WireCondition> {
    let condition: WireCondition = serde_json::from_value(value.clone()).ok()?;
    (condition.kind == READY).then_some(condition)
}

fn status_text(ready: bool) -> &'static str {
    if ready { "True" } else { "False" }
}

fn cut(message: &str) -> String {
    message.chars().take(MAX_MESSAGE).collect()
}

/// The text of an error, without the session's id.
pub(crate) fn without_id(text: &str, id: &SessionId) -> String {
    id.masked_in(text)
}

#[cfg(test)]
mod tests;
