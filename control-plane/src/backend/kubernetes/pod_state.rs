//! From a pod to the run that it is. Pure.
//!
//! In: a pod as its kubelet, the scheduler and whoever deletes it report it. Out: its [`Stage`],
//! which holds until the pod changes; with the time it becomes the run's status. The agent's
//! container decides: what runs beside it neither lets a run live nor end.

use std::time::{Duration, SystemTime};

use k8s_openapi::{
    api::core::v1::{
        ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodStatus,
    },
    apimachinery::pkg::apis::meta::v1::Time,
};

use crate::backend::{Reason, RunEnd, RunStatus};

/// The agent's container (contract section 3).
pub(super) const AGENT: &str = "ambient-code-runner";

/// How long a container may be unable to start before its run is doomed: what is in the way may
/// pass (a registry that is away, an image that is only just being pushed), and by now the kubelet
/// tries again only every 5 minutes.
const PATIENCE: Duration = Duration::from_mins(5);

/// How long after the end of its grace period a pod that terminates may go unconfirmed. Then its
/// node is taken for lost: a kubelet that lives needs seconds.
const OVERDUE: Duration = Duration::from_mins(1);

/// How far a pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// The agent does not run yet.
    Starting {
        /// What it waits for, when that is known.
        waits_for: Option<Reason>,
        /// How long it may wait for that. None: for ever.
        patience: Option<Duration>,
    },
    /// The agent runs.
    Running {
        /// When it was started.
        since: SystemTime,
        /// Why it is not ready, if it is not.
        not_ready: Option<Reason>,
    },
    /// It is being deleted; the agent may run still.
    Ending {
        /// Why.
        reason: Reason,
        /// From when on its node counts as lost.
        overdue_at: SystemTime,
    },
    /// The agent has ended.
    Ended {
        /// When.
        at: SystemTime,
        /// How.
        end: RunEnd,
    },
}

impl Stage {
    /// How far this pod is.
    pub(super) fn of(pod: &Pod) -> Self {
        let nothing = PodStatus::default();
        let status = pod.status.as_ref().unwrap_or(&nothing);
        let agent = status
            .container_statuses
            .iter()
            .flatten()
            .find(|container| container.name == AGENT);
        let state = agent.and_then(|agent| agent.state.as_ref());
        let phase = status.phase.as_deref().unwrap_or_default();
        if let Some(terminated) = state.and_then(|state| state.terminated.as_ref()) {
            let at = time(terminated.finished_at.as_ref()).unwrap_or_else(|| some_time(pod));
            let end = end_of_agent(pod, status, terminated, at);
            return Self::Ended { at, end };
        }
        if phase == "Succeeded" || phase == "Failed" {
            return end_without_agent(pod, status, phase == "Succeeded");
        }
        if let Some(deadline) = time(pod.metadata.deletion_timestamp.as_ref()) {
            return Self::Ending {
                reason: disruption(status).unwrap_or_else(deleted),
                overdue_at: deadline + OVERDUE,
            };
        }
        if let (Some(agent), Some(state)) = (agent, state)
            && let Some(running) = &state.running
        {
            return Self::Running {
                since: time(running.started_at.as_ref()).unwrap_or_else(|| some_time(pod)),
                not_ready: not_ready(status, agent),
            };
        }
        starting(status)
    }

    /// The run's status at `now`, when it has been in trouble since `since`.
    pub(super) fn status(&self, since: SystemTime, now: SystemTime) -> RunStatus {
        let is_over = self.changes_at(since).is_some_and(|at| at <= now);
        match self {
            Self::Starting {
                waits_for: Some(reason),
                ..
            } if is_over => RunStatus::Doomed(reason.clone()),
            Self::Starting { waits_for, .. } => RunStatus::Starting {
                waits_for: waits_for.clone(),
            },
            Self::Running { since, not_ready } => RunStatus::Running {
                since: *since,
                not_ready: not_ready.clone(),
            },
            Self::Ending { overdue_at, .. } if is_over => RunStatus::Ended {
                at: *overdue_at,
                end: RunEnd::Killed(node_lost()),
            },
            Self::Ending { reason, .. } => RunStatus::Ending(reason.clone()),
            Self::Ended { at, end } => RunStatus::Ended {
                at: *at,
                end: end.clone(),
            },
        }
    }

    /// When time alone changes the status, if it has been in trouble since `since`.
    pub(super) fn changes_at(&self, since: SystemTime) -> Option<SystemTime> {
        match self {
            Self::Starting {
                waits_for: Some(_),
                patience: Some(patience),
            } => Some(since + *patience),
            Self::Ending { overdue_at, .. } => Some(*overdue_at),
            Self::Starting { .. } | Self::Running { .. } | Self::Ended { .. } => None,
        }
    }

    /// Whether it is in a trouble that may doom it.
    pub(super) fn is_in_trouble(&self) -> bool {
        matches!(
            self,
            Self::Starting {
                patience: Some(_),
                ..
            }
        )
    }

    /// How the run of a pod ended that is gone, found at `now`; `asked` is whether we deleted it.
    pub(super) fn gone(&self, asked: bool, now: SystemTime) -> RunStatus {
        let end = match self {
            Self::Ended { at, end } => {
                return RunStatus::Ended {
                    at: *at,
                    end: end.clone(),
                };
            }
            _ if asked => RunEnd::Killed(Reason::new("Stopped", "its pod was deleted as asked")),
            Self::Ending { reason, .. } => RunEnd::Killed(reason.clone()),
            Self::Starting { .. } | Self::Running { .. } => RunEnd::Killed(deleted()),
        };
        RunStatus::Ended { at: now, end }
    }
}

/// How the agent's container ended.
fn end_of_agent(
    pod: &Pod,
    status: &PodStatus,
    terminated: &ContainerStateTerminated,
    at: SystemTime,
) -> RunEnd {
    let reason = terminated.reason.as_deref().unwrap_or_default();
    let message = terminated.message.as_deref().map(str::trim);
    let message = message.filter(|message| !message.is_empty());
    let code = u8::try_from(terminated.exit_code).unwrap_or(u8::MAX);
    let told = |text: &str| message.map_or_else(|| text.to_owned(), ToOwned::to_owned);
    // containerd says so too of an agent that lost a child and went on.
    if reason == "OOMKilled" && code != 0 {
        let text = "the agent's container needed more memory than it may have";
        return RunEnd::Killed(Reason::new(reason, text));
    }
    if let Some(reason) = of_pod(status).or_else(|| disruption(status)) {
        return RunEnd::Killed(reason);
    }
    if was_deleted_before(pod, at) {
        let mut reason = deleted();
        reason.message = format!("{}; the agent ended with exit code {code}", reason.message);
        return RunEnd::Killed(reason);
    }
    match reason {
        "ContainerStatusUnknown" => RunEnd::Lost {
            message: told("the agent's container vanished without a trace"),
        },
        "StartError" | "ContainerCannotRun" => RunEnd::Killed(Reason::new(
            reason,
            told("the agent's container could not be started"),
        )),
        _ => RunEnd::Exited {
            code,
            message: message.map(ToOwned::to_owned),
        },
    }
}

/// How a pod ended whose agent was never seen to end.
fn end_without_agent(pod: &Pod, status: &PodStatus, succeeded: bool) -> Stage {
    let failed_init = status
        .init_container_statuses
        .iter()
        .flatten()
        .find_map(|container| {
            let terminated = container.state.as_ref()?.terminated.as_ref()?;
            (terminated.exit_code != 0).then_some((container, terminated))
        });
    let end = if let Some(reason) = of_pod(status).or_else(|| disruption(status)) {
        RunEnd::Killed(reason)
    } else if succeeded {
        RunEnd::Exited {
            code: 0,
            message: None,
        }
    } else if let Some((container, terminated)) = failed_init {
        let message = terminated.message.as_deref().unwrap_or_default();
        RunEnd::Killed(Reason::new(
            "InitContainerFailed",
            format!(
                "init container {} ended with exit code {}: {message}",
                container.name, terminated.exit_code
            ),
        ))
    } else if pod.metadata.deletion_timestamp.is_some() {
        RunEnd::Killed(deleted())
    } else {
        let message = status.message.clone();
        let message = message.unwrap_or_else(|| "the session's pod failed".to_owned());
        RunEnd::Killed(Reason::new("PodFailed", message))
    };
    let at = failed_init.and_then(|(_, terminated)| time(terminated.finished_at.as_ref()));
    Stage::Ended {
        at: at.unwrap_or_else(|| some_time(pod)),
        end,
    }
}

/// What ended the pod as a whole: `Evicted`, `DeadlineExceeded`, `NodeLost`, or why its node did
/// not take it.
fn of_pod(status: &PodStatus) -> Option<Reason> {
    let reason = status
        .reason
        .as_deref()
        .filter(|reason| !reason.is_empty())?;
    let reason = match reason {
        // As kubelets call it when their node is shut down.
        "Terminated" | "Shutdown" => "NodeShutdown",
        other => other,
    };
    let message = status.message.as_deref().filter(|text| !text.is_empty());
    Some(Reason::new(
        reason,
        message.unwrap_or("the session's pod was ended by its node"),
    ))
}

/// Who ended the pod, when it was none of its own doing (condition `DisruptionTarget`).
fn disruption(status: &PodStatus) -> Option<Reason> {
    let target = condition(status, "DisruptionTarget")?;
    if target.status != "True" {
        return None;
    }
    let reason = match target.reason.as_deref().unwrap_or_default() {
        "PreemptionByScheduler" => "Preempted",
        "DeletionByPodGC" => "NodeLost",
        // By the eviction API, by a taint, or by a kubelet that runs out of something.
        _ => "Evicted",
    };
    let message = target.message.as_deref().filter(|text| !text.is_empty());
    Some(Reason::new(
        reason,
        message.unwrap_or("the session's pod was evicted"),
    ))
}

/// Whether the pod's deletion was asked for before this.
fn was_deleted_before(pod: &Pod, at: SystemTime) -> bool {
    let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
    let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
    time(pod.metadata.deletion_timestamp.as_ref())
        .and_then(|deadline| deadline.checked_sub(grace))
        .is_some_and(|asked_at| asked_at <= at)
}

fn starting(status: &PodStatus) -> Stage {
    let init = status.init_container_statuses.iter().flatten();
    let agent = status.container_statuses.iter().flatten();
    let agent = agent.filter(|container| container.name == AGENT);
    if let Some((reason, patience)) = init.chain(agent).find_map(trouble) {
        return Stage::Starting {
            waits_for: Some(reason),
            patience,
        };
    }
    let waits_for = match condition(status, "PodScheduled") {
        None => None,
        Some(scheduled) if scheduled.status != "True" => scheduled.reason.as_ref().map(|reason| {
            let message = scheduled.message.clone();
            Reason::new(
                reason,
                message.unwrap_or_else(|| "no node has been chosen yet".to_owned()),
            )
        }),
        Some(_) if status.container_statuses.is_none() => Some(Reason::new(
            "Scheduled",
            "a node has been chosen for the session's pod",
        )),
        Some(_) => Some(Reason::new(
            "ContainerCreating",
            "images are being pulled, and containers made",
        )),
    };
    Stage::Starting {
        waits_for,
        patience: None,
    }
}

/// What keeps a container from starting, and how long it may.
fn trouble(container: &ContainerStatus) -> Option<(Reason, Option<Duration>)> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let patience = match reason {
        "ContainerCreating" | "PodInitializing" => return None,
        // It is never going to be one.
        "InvalidImageName" => Some(Duration::ZERO),
        "ErrImagePull"
        | "ImagePullBackOff"
        | "ErrImageNeverPull"
        | "ImageInspectError"
        | "RegistryUnavailable"
        | "SignatureValidationFailed"
        | "CreateContainerConfigError"
        | "CreateContainerError"
        | "RunContainerError"
        | "CrashLoopBackOff" => Some(PATIENCE),
        _ => None,
    };
    let message = waiting.message.as_deref().unwrap_or("it does not start");
    let message = format!("container {}: {message}", container.name);
    Some((Reason::new(reason, message), patience))
}

fn not_ready(status: &PodStatus, agent: &ContainerStatus) -> Option<Reason> {
    let ready = condition(status, "Ready");
    if status.phase.as_deref() == Some("Unknown") {
        return Some(node_lost());
    }
    let is_ready = agent.ready && ready.is_none_or(|ready| ready.status == "True");
    if is_ready {
        return None;
    }
    let reason = ready.and_then(|ready| ready.reason.clone());
    let message = ready.and_then(|ready| ready.message.clone());
    Some(Reason::new(
        reason.unwrap_or_else(|| "NotReady".to_owned()),
        message.unwrap_or_else(|| "the agent runs, but is not ready".to_owned()),
    ))
}

fn deleted() -> Reason {
    Reason::new("PodDeleted", "the session's pod was deleted")
}

fn node_lost() -> Reason {
    Reason::new("NodeLost", "the node of the session's pod does not answer")
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> Option<&'a PodCondition> {
    let mut conditions = status.conditions.iter().flatten();
    conditions.find(|condition| condition.type_ == kind)
}

fn time(time: Option<&Time>) -> Option<SystemTime> {
    time.map(|time| SystemTime::from(time.0))
}

/// The best that is known where the exact time is not: the last change of its conditions, or when
/// it was made. The same however often it is asked.
fn some_time(pod: &Pod) -> SystemTime {
    let conditions = pod
        .status
        .iter()
        .flat_map(|it| it.conditions.iter().flatten());
    conditions
        .filter_map(|condition| time(condition.last_transition_time.as_ref()))
        .max()
        .or_else(|| time(pod.metadata.creation_timestamp.as_ref()))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Whether any container of the pod runs, as far as is known.
pub(super) fn has_running_container(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    let containers = status.and_then(|status| status.container_statuses.as_ref());
    let is_running = |state: &ContainerState| state.running.is_some();
    containers
        .into_iter()
        .flatten()
        .any(|container| container.state.as_ref().is_some_and(is_running))
}

#[cfg(test)]
mod tests;
