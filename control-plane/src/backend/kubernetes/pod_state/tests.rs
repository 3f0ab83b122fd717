use serde_json::{Value, json};

use super::*;

/// 2026-01-01T00:00:00Z and so many seconds.
fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600 + seconds)
}

fn text(seconds: u64) -> String {
    humantime::format_rfc3339_seconds(at(seconds)).to_string()
}

fn pod(metadata: &Value, status: &Value) -> Pod {
    let mut pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "session-a-runner", "creationTimestamp": text(0)},
        "status": status,
    });
    for (key, value) in metadata.as_object().unwrap() {
        pod["metadata"][key] = value.clone();
    }
    serde_json::from_value(pod).unwrap()
}

fn alive(status: &Value) -> Pod {
    pod(&json!({}), status)
}

/// Whose deletion was asked for after 60 s, with a grace period of 60 s.
fn deleted_pod(status: &Value) -> Pod {
    let metadata = json!({
        "deletionTimestamp": text(120),
        "deletionGracePeriodSeconds": 60,
    });
    pod(&metadata, status)
}

/// The agent's container in this state.
fn agent(state: &Value) -> Value {
    json!([{
        "name": AGENT, "state": state, "ready": state.get("running").is_some(),
        "image": "agent", "imageID": "", "restartCount": 0,
    }])
}

fn waiting(reason: &str) -> Value {
    let state = json!({"waiting": {"reason": reason, "message": "why"}});
    json!({
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": agent(&state),
    })
}

fn running() -> Value {
    let state = json!({"running": {"startedAt": text(10)}});
    json!({
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": "True"}],
        "containerStatuses": agent(&state),
    })
}

fn terminated(code: i32, reason: &str, message: &str) -> Value {
    let state = json!({"terminated": {
        "exitCode": code, "reason": reason, "message": message, "finishedAt": text(90),
    }});
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    json!({"phase": phase, "containerStatuses": agent(&state)})
}

fn with(mut status: Value, key: &str, value: Value) -> Value {
    status[key] = value;
    status
}

/// How an end is told: exit code, or reason.
fn end_of(pod: &Pod) -> String {
    match Stage::of(pod) {
        Stage::Ended { end, .. } => match end {
            RunEnd::Exited { code, .. } => code.to_string(),
            RunEnd::Killed(reason) => reason.reason,
            RunEnd::Lost { .. } => "lost".to_owned(),
        },
        other => panic!("not ended: {other:?}"),
    }
}

fn waits_for(pod: &Pod) -> Option<String> {
    match Stage::of(pod) {
        Stage::Starting { waits_for, .. } => waits_for.map(|reason| reason.reason),
        other => panic!("not starting: {other:?}"),
    }
}

#[test]
fn a_pod_that_starts_says_what_it_waits_for() {
    let unschedulable = json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/3 nodes are available",
    }]});
    let scheduled = json!({
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
    });
    let init = json!({
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "initContainerStatuses": [{
            "name": "install", "ready": false, "image": "", "imageID": "", "restartCount": 0,
            "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}},
        }],
        "containerStatuses": agent(&json!({"waiting": {"reason": "PodInitializing"}})),
    });
    let cases = [
        (json!({}), None),
        (json!({"phase": "Pending"}), None),
        (unschedulable, Some("Unschedulable")),
        (scheduled, Some("Scheduled")),
        (waiting("ContainerCreating"), Some("ContainerCreating")),
        (waiting("PodInitializing"), Some("ContainerCreating")),
        (waiting("ErrImagePull"), Some("ErrImagePull")),
        (waiting("SomethingNew"), Some("SomethingNew")),
        (init, Some("ErrImagePull")),
    ];
    for (status, expected) in cases {
        let found = waits_for(&alive(&status));
        assert_eq!(found.as_deref(), expected, "{status:#}");
    }
}

#[test]
fn an_image_that_cannot_be_had_dooms_the_run_in_the_end() {
    for reason in [
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "CreateContainerConfigError",
        "CrashLoopBackOff",
    ] {
        let stage = Stage::of(&alive(&waiting(reason)));
        assert!(stage.is_in_trouble());
        assert_eq!(stage.changes_at(at(5)), Some(at(305)));
        let before = stage.status(at(5), at(304));
        assert!(matches!(before, RunStatus::Starting { .. }), "{before:?}");
        let after = stage.status(at(5), at(305));
        assert!(
            matches!(&after, RunStatus::Doomed(it) if it.reason == reason && it.message.contains("why")),
            "{after:?}"
        );
    }
    let never = Stage::of(&alive(&waiting("InvalidImageName")));
    assert!(matches!(never.status(at(5), at(5)), RunStatus::Doomed(_)));
    for reason in ["ContainerCreating", "SomethingNew"] {
        let patient = Stage::of(&alive(&waiting(reason)));
        assert_eq!(patient.changes_at(at(0)), None, "{reason}");
    }
}

#[test]
fn a_running_agent_is_ready_or_says_why_not() {
    let since = at(10);
    let ready = Stage::Running {
        since,
        not_ready: None,
    };
    assert_eq!(Stage::of(&alive(&running())), ready);

    let unready = with(
        running(),
        "conditions",
        json!([{
            "type": "Ready", "status": "False", "reason": "ContainersNotReady",
            "message": "containers with unready status: [ambient-code-runner]",
        }]),
    );
    let lost = with(running(), "phase", json!("Unknown"));
    for (status, reason) in [(unready, "ContainersNotReady"), (lost, "NodeLost")] {
        match Stage::of(&alive(&status)) {
            Stage::Running {
                not_ready: Some(why),
                ..
            } => assert_eq!(why.reason, reason),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn another_container_neither_lets_the_run_live_nor_end() {
    let beside = |state: Value| json!({"name": "mcp", "state": state, "ready": false, "image": "", "imageID": "", "restartCount": 0});
    let mut status = running();
    let ended = beside(json!({"terminated": {"exitCode": 1}}));
    status["containerStatuses"]
        .as_array_mut()
        .unwrap()
        .push(ended);
    assert!(matches!(Stage::of(&alive(&status)), Stage::Running { .. }));

    let mut status = with(terminated(0, "Completed", ""), "phase", json!("Running"));
    let goes_on = beside(json!({"running": {}}));
    status["containerStatuses"]
        .as_array_mut()
        .unwrap()
        .push(goes_on);
    let pod = alive(&status);
    assert_eq!(end_of(&pod), "0");
    assert!(has_running_container(&pod));
}

#[test]
fn an_end_has_its_cause() {
    let evicted = json!({
        "phase": "Failed", "reason": "Evicted",
        "message": "The node was low on resource: memory.",
    });
    let init_failed = json!({
        "phase": "Failed",
        "initContainerStatuses": [{
            "name": "install", "ready": false, "image": "", "imageID": "", "restartCount": 0,
            "state": {"terminated": {"exitCode": 70, "message": "disk full"}},
        }],
    });
    let disrupted = |reason: &str| {
        let condition = json!([{
            "type": "DisruptionTarget", "status": "True", "reason": reason, "message": "why",
        }]);
        with(terminated(143, "Error", ""), "conditions", condition)
    };
    let of_pod = |code, reason: &str| with(terminated(code, "Error", ""), "reason", json!(reason));
    let cases = [
        (terminated(0, "Completed", ""), "0"),
        (terminated(3, "Error", "last words"), "3"),
        (terminated(137, "OOMKilled", ""), "OOMKilled"),
        (terminated(0, "OOMKilled", ""), "0"),
        (terminated(137, "Error", ""), "137"),
        (terminated(1000, "Error", ""), "255"),
        (terminated(128, "StartError", "no such file"), "StartError"),
        (terminated(137, "ContainerStatusUnknown", ""), "lost"),
        (of_pod(137, "Evicted"), "Evicted"),
        (of_pod(0, "DeadlineExceeded"), "DeadlineExceeded"),
        (of_pod(143, "Terminated"), "NodeShutdown"),
        (disrupted("EvictionByEvictionAPI"), "Evicted"),
        (disrupted("PreemptionByScheduler"), "Preempted"),
        (disrupted("DeletionByPodGC"), "NodeLost"),
        (evicted, "Evicted"),
        (init_failed, "InitContainerFailed"),
        (json!({"phase": "Failed"}), "PodFailed"),
        (json!({"phase": "Succeeded"}), "0"),
    ];
    for (status, expected) in cases {
        assert_eq!(end_of(&alive(&status)), expected, "{status:#}");
    }
}

#[test]
fn last_words_and_the_time_of_the_end_are_kept() {
    let stage = Stage::of(&alive(&terminated(78, "Error", "SESSION_ID is missing\n")));
    let end = RunEnd::Exited {
        code: 78,
        message: Some("SESSION_ID is missing".to_owned()),
    };
    assert_eq!(stage, Stage::Ended { at: at(90), end });

    let condition = json!([{"type": "Ready", "status": "False", "lastTransitionTime": text(50)}]);
    let status = with(json!({"phase": "Failed"}), "conditions", condition);
    let ended_at = |pod: &Pod| match Stage::of(pod) {
        Stage::Ended { at, .. } => at,
        other => panic!("{other:?}"),
    };
    assert_eq!(ended_at(&alive(&status)), at(50));
    assert_eq!(ended_at(&alive(&json!({"phase": "Failed"}))), at(0));
}

#[test]
fn a_pod_that_is_deleted_is_ending_until_its_agent_has_ended() {
    for status in [running(), waiting("ContainerCreating"), json!({})] {
        let stage = Stage::of(&deleted_pod(&status));
        let before = stage.status(at(60), at(179));
        assert!(
            matches!(&before, RunStatus::Ending(it) if it.reason == "PodDeleted"),
            "{before:?}"
        );
        // Neither its kubelet nor anybody else has confirmed it: the node is lost.
        let after = stage.status(at(60), at(180));
        assert!(
            matches!(&after, RunStatus::Ended { end: RunEnd::Killed(it), .. } if it.reason == "NodeLost"),
            "{after:?}"
        );
    }
    assert_eq!(
        end_of(&deleted_pod(&terminated(143, "Error", ""))),
        "PodDeleted"
    );
    // It had ended by itself before.
    let metadata = json!({"deletionTimestamp": text(200), "deletionGracePeriodSeconds": 60});
    let late = pod(&metadata, &terminated(3, "Error", ""));
    assert_eq!(end_of(&late), "3");
}

#[test]
fn a_pod_that_is_gone_has_ended_as_it_was_seen_to_or_was_deleted() {
    let end = |stage: &Stage, asked| match stage.gone(asked, at(500)) {
        RunStatus::Ended { end, at } => (end, at),
        other => panic!("{other:?}"),
    };
    let seen = Stage::of(&alive(&terminated(3, "Error", "")));
    assert!(matches!(
        end(&seen, true),
        (RunEnd::Exited { code: 3, .. }, time) if time == at(90)
    ));
    let ran = Stage::of(&alive(&running()));
    let (killed, time) = end(&ran, false);
    assert_eq!(time, at(500));
    assert!(matches!(killed, RunEnd::Killed(reason) if reason.reason == "PodDeleted"));
    let (killed, _) = end(&ran, true);
    assert!(matches!(killed, RunEnd::Killed(reason) if reason.reason == "Stopped"));
    let evicted = with(
        running(),
        "conditions",
        json!([{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]),
    );
    let (killed, _) = end(&Stage::of(&deleted_pod(&evicted)), false);
    assert!(matches!(killed, RunEnd::Killed(reason) if reason.reason == "Evicted"));
}
