use super::*;

fn session(phase: Option<&str>) -> Session {
    Session {
        phase: phase.map(str::to_owned),
        sdk_restart_count: Some(0),
        ..Session::default()
    }
}

fn status(phase: &str) -> Edit {
    Edit::Status(StatusChange {
        phase: Some(phase.to_owned()),
        ..StatusChange::default()
    })
}

/// Each change from each phase: the phase after it, or a refusal.
#[test]
fn phases_change_as_the_contract_says() {
    const ANY: [Option<&str>; 8] = [
        None,
        Some("Pending"),
        Some("Creating"),
        Some("Running"),
        Some("Stopping"),
        Some("Stopped"),
        Some("Completed"),
        Some("Failed"),
    ];
    for from in ANY {
        let after = |change: Edit| {
            let mut session = session(from);
            edit(&mut session, change, 0).ok().map(|()| session.phase)
        };
        let starts = matches!(from, None | Some("Stopped" | "Completed" | "Failed"));
        let started = starts.then(|| Some("Pending".to_owned()));
        assert_eq!(after(Edit::Start), started, "start from {from:?}");
        let stops = matches!(from, Some("Pending" | "Creating" | "Running"));
        let stopped = stops.then(|| Some("Stopping".to_owned()));
        assert_eq!(after(Edit::Stop), stopped, "stop from {from:?}");
        for to in ANY.into_iter().flatten() {
            let is_terminal = matches!(from, Some("Stopped" | "Completed" | "Failed"));
            let undoes =
                from == Some("Stopping") && matches!(to, "Pending" | "Creating" | "Running");
            let allowed = from == Some(to) || !(is_terminal || undoes);
            let expected = allowed.then(|| Some(to.to_owned()));
            assert_eq!(after(status(to)), expected, "{from:?} to {to}");
        }
    }
}

#[test]
fn a_restart_forgets_how_the_last_run_ended_and_counts() {
    let mut ended = session(Some("Failed"));
    ended.conditions = Some("[]".to_owned());
    ended.completion_time = Some(from_micros(5));
    edit(&mut ended, Edit::Start, 9).unwrap();
    assert_eq!(ended.sdk_restart_count, Some(1));
    assert_eq!((ended.conditions, ended.completion_time), (None, None));

    let mut fresh = session(None);
    edit(&mut fresh, Edit::Start, 9).unwrap();
    assert_eq!(fresh.sdk_restart_count, Some(0), "it never ran");
}

#[test]
fn malformed_fields_are_refused_with_their_name() {
    let named = |change: SessionChange| SessionChange {
        name: Some("n".to_owned()),
        ..change
    };
    for (change, field) in [
        (SessionChange::default(), "name"),
        (
            SessionChange {
                name: Some(" ".to_owned()),
                ..SessionChange::default()
            },
            "name",
        ),
        (
            named(SessionChange {
                labels: Some("[]".to_owned()),
                ..SessionChange::default()
            }),
            "labels",
        ),
        (
            named(SessionChange {
                annotations: Some("{".to_owned()),
                ..SessionChange::default()
            }),
            "annotations",
        ),
        (
            named(SessionChange {
                project_id: Some("Not A Label".to_owned()),
                ..SessionChange::default()
            }),
            "project_id",
        ),
        (
            named(SessionChange {
                timeout: Some(-1),
                ..SessionChange::default()
            }),
            "timeout",
        ),
        (
            named(SessionChange {
                prompt: Some("x".repeat(MAX_SIZE)),
                ..SessionChange::default()
            }),
            "bytes",
        ),
    ] {
        let error = create(change, 0).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    for (change, field) in [
        (
            StatusChange {
                phase: Some("Sleeping".to_owned()),
                ..StatusChange::default()
            },
            "Sleeping",
        ),
        (
            StatusChange {
                conditions: Some("{}".to_owned()),
                ..StatusChange::default()
            },
            "conditions",
        ),
        (
            StatusChange {
                start_time: Some(Timestamp {
                    seconds: i64::MAX,
                    nanos: 0,
                }),
                ..StatusChange::default()
            },
            "start_time",
        ),
        (
            StatusChange {
                sdk_restart_count: Some(-1),
                ..StatusChange::default()
            },
            "sdk_restart_count",
        ),
    ] {
        let error = edit(&mut session(None), Edit::Status(change), 0).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
}
