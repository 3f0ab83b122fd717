use std::time::Duration;

use super::*;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn session(phase: Phase, generation: u32) -> Session {
    let object = proto::Session {
        metadata: Some(proto::ObjectReference {
            id: "session-0001".to_owned(),
            ..Default::default()
        }),
        phase: Some(phase.as_str().to_owned()),
        sdk_restart_count: Some(i32::try_from(generation).unwrap()),
        ..Default::default()
    };
    object.try_into().unwrap()
}

fn run(generation: u32, status: RunStatus) -> RunState {
    RunState {
        generation,
        status,
        namespace: None,
        keypair: None,
    }
}

fn starting_run() -> RunStatus {
    RunStatus::Starting { waits_for: None }
}

fn waiting_run() -> RunStatus {
    let waits_for = Some(Reason::new("ImagePullBackOff", "no such image"));
    RunStatus::Starting { waits_for }
}

fn doomed_run() -> RunStatus {
    RunStatus::Doomed(Reason::new("InvalidImageName", "no name of an image"))
}

fn unready_run() -> RunStatus {
    RunStatus::Running {
        since: at(100),
        not_ready: Some(Reason::new("NotReady", "a container is not ready")),
    }
}

fn killed_run() -> RunStatus {
    let end = RunEnd::Killed(Reason::new("OOMKilled", "out of memory"));
    RunStatus::Ended { at: at(200), end }
}

fn ending_run() -> RunStatus {
    RunStatus::Ending(Reason::new("PodDeleted", "somebody deletes the pod"))
}

fn running_run() -> RunStatus {
    RunStatus::Running {
        since: at(100),
        not_ready: None,
    }
}

fn ended_run(code: u8) -> RunStatus {
    let end = RunEnd::Exited {
        code,
        message: None,
    };
    RunStatus::Ended { at: at(200), end }
}

fn lost_run() -> RunStatus {
    let message = "the runner was killed".to_owned();
    let end = RunEnd::Lost { message };
    RunStatus::Ended { at: at(200), end }
}

/// What is to be reported, as phase and reason.
fn report(phase: Phase, run: Option<&RunState>) -> Option<(Phase, String)> {
    unreported(&session(phase, 1), run).map(|status| (status.phase, status.condition.reason))
}

#[test]
fn phase_follows_the_run_and_is_never_ahead_of_it() {
    use Phase::{Completed, Creating, Failed, Pending, Running, Stopped, Stopping};
    let own = |status| Some(run(1, status));
    let cases = [
        (Pending, None, None),
        (Pending, own(starting_run()), None),
        (Pending, own(running_run()), Some((Running, "AgentRunning"))),
        (Pending, own(ended_run(0)), None),
        (Creating, None, None),
        (Creating, own(starting_run()), None),
        (
            Creating,
            own(running_run()),
            Some((Running, "AgentRunning")),
        ),
        (Creating, own(ended_run(0)), Some((Completed, "Completed"))),
        (Creating, own(ended_run(3)), Some((Failed, "AgentExit"))),
        (
            Creating,
            own(waiting_run()),
            Some((Creating, "ImagePullBackOff")),
        ),
        (Pending, own(waiting_run()), None),
        (Running, own(waiting_run()), None),
        (
            Pending,
            own(doomed_run()),
            Some((Failed, "InvalidImageName")),
        ),
        (
            Creating,
            own(doomed_run()),
            Some((Failed, "InvalidImageName")),
        ),
        (Stopping, own(doomed_run()), None),
        (Creating, own(unready_run()), Some((Running, "NotReady"))),
        (Running, own(unready_run()), Some((Running, "NotReady"))),
        (Running, own(killed_run()), Some((Failed, "OOMKilled"))),
        (Creating, own(killed_run()), Some((Failed, "OOMKilled"))),
        (Stopping, own(killed_run()), Some((Stopped, "Stopped"))),
        (Running, own(starting_run()), None),
        (Pending, own(ending_run()), None),
        (Creating, own(ending_run()), None),
        (Running, own(ending_run()), Some((Running, "PodDeleted"))),
        (Stopping, own(ending_run()), None),
        (Running, own(ended_run(0)), Some((Completed, "Completed"))),
        (Running, own(ended_run(137)), Some((Failed, "AgentExit"))),
        (Running, own(lost_run()), Some((Failed, "RunnerLost"))),
        (Running, own(RunStatus::Unknown), None),
        (Running, Some(run(0, RunStatus::Unknown)), None),
        (Stopping, Some(run(0, RunStatus::Unknown)), None),
        (Running, None, Some((Failed, "RunnerLost"))),
        (Stopping, own(running_run()), None),
        (Stopping, own(starting_run()), None),
        (Stopping, own(ended_run(0)), Some((Stopped, "Stopped"))),
        (Stopping, own(lost_run()), Some((Stopped, "Stopped"))),
        (Stopping, None, Some((Stopped, "Stopped"))),
    ];
    for (phase, run, expected) in cases {
        let expected = expected.map(|(phase, reason)| (phase, reason.to_owned()));
        assert_eq!(
            report(phase, run.as_ref()),
            expected,
            "{phase} with {run:?}"
        );
    }
}

#[test]
fn a_terminal_phase_is_never_left() {
    for phase in [Phase::Stopped, Phase::Completed, Phase::Failed] {
        for status in [
            starting_run(),
            waiting_run(),
            doomed_run(),
            running_run(),
            unready_run(),
            ending_run(),
            ended_run(0),
            killed_run(),
            lost_run(),
        ] {
            assert_eq!(report(phase, Some(&run(1, status))), None);
        }
        assert_eq!(report(phase, None), None);
    }
}

#[test]
fn a_run_of_another_generation_says_nothing() {
    for generation in [0, 2] {
        for status in [
            starting_run(),
            waiting_run(),
            doomed_run(),
            running_run(),
            unready_run(),
            ending_run(),
            ended_run(0),
            killed_run(),
            lost_run(),
        ] {
            let other = run(generation, status.clone());
            for phase in [Phase::Pending, Phase::Creating] {
                assert_eq!(report(phase, Some(&other)), None, "{phase} {other:?}");
            }
            let lost = (Phase::Failed, "RunnerLost".to_owned());
            assert_eq!(report(Phase::Running, Some(&other)), Some(lost));
        }
        // Nobody is told "stopped" while something of the session still runs.
        assert_eq!(
            report(Phase::Stopping, Some(&run(generation, running_run()))),
            None
        );
        let ended = run(generation, ended_run(0));
        let stopped = (Phase::Stopped, "Stopped".to_owned());
        assert_eq!(report(Phase::Stopping, Some(&ended)), Some(stopped));
    }
}

#[test]
fn what_was_reported_is_not_reported_again() {
    let own = run(1, running_run());
    let before = session(Phase::Creating, 1);
    let status = unreported(&before, Some(&own)).unwrap();
    let written = request(&before, &status, at(300));
    let mut object = before.object.clone();
    object.phase = written.phase;
    object.start_time = written.start_time;
    object.conditions = written.conditions;
    let after = Session::try_from(object).unwrap();
    assert_eq!(unreported(&after, Some(&own)), None);

    // Somebody else overwrites a part of it: it is written again.
    let mut object = after.object.clone();
    object.conditions = None;
    let overwritten = Session::try_from(object).unwrap();
    assert!(unreported(&overwritten, Some(&own)).is_some());
}

#[test]
fn the_end_is_told_with_code_signal_and_last_words() {
    let end = RunEnd::Exited {
        code: 78,
        message: Some("SESSION_ID is missing".to_owned()),
    };
    let own = run(1, RunStatus::Ended { at: at(200), end });
    let status = unreported(&session(Phase::Running, 1), Some(&own)).unwrap();
    assert_eq!(
        status.condition.message,
        "the agent ended with exit code 78: SESSION_ID is missing"
    );
    assert_eq!(status.completion_time, Some(at(200)));
    assert!(describe_exit(137).ends_with("137 (signal 9)"));
    assert!(describe_exit(127).contains("not found"));
}

#[test]
fn conditions_of_others_are_kept_and_a_transition_has_its_time() {
    let mut object = session(Phase::Creating, 1).object;
    object.conditions = Some(r#"[{"type":"Theirs","x":1}]"#.to_owned());
    let creating = Session::try_from(object.clone()).unwrap();
    let first = with_condition(&creating, &Condition::not_ready("Creating", "m"), at(10));
    object.conditions = Some(first);
    let second = with_condition(
        &Session::try_from(object.clone()).unwrap(),
        &Condition::not_ready("StartFailed", "n"),
        at(20),
    );
    let conditions: Value = serde_json::from_str(&second).unwrap();
    assert_eq!(conditions[0]["x"], 1);
    assert_eq!(conditions[1]["reason"], "StartFailed");
    assert_eq!(
        conditions[1]["last_transition_time"],
        "1970-01-01T00:00:10Z"
    );
    assert_eq!(conditions.as_array().unwrap().len(), 2);

    object.conditions = Some(second);
    let ready = Condition {
        ready: true,
        ..Condition::not_ready("AgentRunning", "o")
    };
    let third = with_condition(&Session::try_from(object).unwrap(), &ready, at(30));
    let conditions: Value = serde_json::from_str(&third).unwrap();
    assert_eq!(conditions[1]["status"], "True");
    assert_eq!(
        conditions[1]["last_transition_time"],
        "1970-01-01T00:00:30Z"
    );
}

#[test]
fn a_report_names_the_start_that_it_is_about() {
    let before = session(Phase::Running, 3);
    let status = unreported(&before, Some(&run(3, ended_run(0)))).unwrap();
    let written = request(&before, &status, at(300));
    assert_eq!(written.sdk_restart_count, Some(3));
}

#[test]
fn the_namespace_is_reported_once() {
    let mut state = run(1, running_run());
    state.namespace = Some("team".to_owned());
    let mut session = session(Phase::Creating, 1);
    let pod_made = RunState {
        status: starting_run(),
        ..state.clone()
    };
    let status = unreported(&session, Some(&pod_made)).unwrap();
    assert_eq!(status.phase, Phase::Creating);
    assert_eq!(status.namespace.as_deref(), Some("team"));

    let status = unreported(&session, Some(&state)).unwrap();
    let request = request(&session, &status, at(300));
    assert_eq!(request.kube_namespace.as_deref(), Some("team"));

    session.phase = Phase::Running;
    session.object.kube_namespace = request.kube_namespace;
    session.object.start_time = request.start_time;
    session.object.conditions = request.conditions;
    assert_eq!(unreported(&session, Some(&state)), None);
}
