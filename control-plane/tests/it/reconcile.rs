//! Handlers: what is done about a session, and how failures are borne.

use std::time::Duration;

use ambient_control_plane::backend::{RunEnd, RunStatus};
use ambient_shared::clock::Clock;

use crate::scene::{Call, Plan, Scene, id};

async fn scene(prepare: impl FnOnce(&crate::scene::FakeApi, &crate::scene::Recording)) -> Scene {
    Scene::start(Plan::default(), prepare).await
}

#[tokio::test]
async fn a_session_runs_and_completes() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    assert_eq!(scene.api.reason("session-a"), "AgentRunning");
    assert!(scene.api.get("session-a").unwrap().start_time.is_some());

    scene.backend.ends("session-a", 0);

    scene.until_phase("session-a", "Completed").await;
    assert!(
        scene
            .api
            .get("session-a")
            .unwrap()
            .completion_time
            .is_some()
    );
    let written = scene.api.ask(|api| api.written.clone());
    let phases: Vec<_> = written.into_iter().map(|(_, phase)| phase).collect();
    assert_eq!(phases, ["Creating", "Running", "Completed"]);
    scene.stop().await;
}

#[tokio::test]
async fn a_session_fails_with_its_exit_code_or_with_its_runner() {
    let scene = scene(|api, _| {
        api.create("session-code", |_| {});
        api.create("session-lost", |_| {});
        api.create("session-vanished", |_| {});
    })
    .await;
    for name in ["session-code", "session-lost", "session-vanished"] {
        scene.until_phase(name, "Running").await;
    }

    scene.backend.ends("session-code", 3);
    let end = RunEnd::Lost {
        message: "the runner was killed".to_owned(),
    };
    let at = Clock::system().now();
    scene
        .backend
        .set("session-lost", 0, RunStatus::Ended { at, end });
    scene.backend.forget("session-vanished");

    for (name, reason) in [
        ("session-code", "AgentExit"),
        ("session-lost", "RunnerLost"),
        ("session-vanished", "RunnerLost"),
    ] {
        scene.until_phase(name, "Failed").await;
        assert_eq!(scene.api.reason(name), reason);
    }
    scene.stop().await;
}

#[tokio::test]
async fn a_run_that_another_replica_started_is_not_lost_before_it_is_seen() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    scene.backend.ends("session-a", 0);
    scene.until_phase("session-a", "Completed").await;

    // Another one led meanwhile; here the run before is still the last that was seen.
    scene.backend.sees_late("session-a", 1);
    scene.api.change("session-a", |it| {
        it.phase = Some("Running".to_owned());
        it.sdk_restart_count = Some(1);
    });
    scene.settle("session-sentinel").await;
    assert_eq!(scene.api.phase("session-a").as_deref(), Some("Running"));
    assert_eq!(scene.backend.count(&Call::Stop(id("session-a"))), 0);

    // Nothing of it is there any more, and the run before is history.
    scene.backend.sees_late("session-a", 2);
    scene.until_phase("session-a", "Failed").await;
    assert_eq!(scene.api.reason("session-a"), "RunnerLost");
    scene.stop().await;
}

#[tokio::test]
async fn a_session_is_stopped_and_only_then_called_stopped() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    scene
        .api
        .change("session-a", |it| it.phase = Some("Stopping".to_owned()));
    let stop = Call::Stop(id("session-a"));
    scene
        .until("asked to stop", |scene| scene.backend.count(&stop) == 1)
        .await;
    scene.settle("session-sentinel").await;
    assert_eq!(scene.api.phase("session-a").as_deref(), Some("Stopping"));

    scene.backend.ends("session-a", 143);
    scene.until_phase("session-a", "Stopped").await;
    scene.stop().await;
}

#[tokio::test]
async fn what_was_ended_by_others_does_not_run_on() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    scene
        .api
        .change("session-a", |it| it.phase = Some("Failed".to_owned()));
    let stop = Call::Stop(id("session-a"));
    scene
        .until("asked to stop", |scene| scene.backend.count(&stop) >= 1)
        .await;
    scene.backend.ends("session-a", 0);
    scene.settle("session-sentinel").await;
    assert_eq!(scene.api.phase("session-a").as_deref(), Some("Failed"));
    scene.stop().await;
}

#[tokio::test]
async fn a_phase_is_not_written_before_it_is_true() {
    let scene = scene(|api, backend| {
        backend.begin_runs_later();
        api.create("session-a", |_| {});
    })
    .await;
    let start = Call::Start(id("session-a"), 0);
    scene
        .until("started", |scene| scene.backend.count(&start) == 1)
        .await;
    scene.api.create("session-b", |_| {});
    let other = Call::Start(id("session-b"), 0);
    scene
        .until("the other started", |scene| {
            scene.backend.count(&other) == 1
        })
        .await;
    assert_eq!(scene.api.phase("session-a").as_deref(), Some("Creating"));

    scene.backend.runs("session-a", 0);
    scene.until_phase("session-a", "Running").await;
    scene.stop().await;
}

#[tokio::test]
async fn a_phase_that_cannot_be_written_is_not_forgotten() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    scene.api.set(|api| api.failing_writes = 6);

    scene.backend.ends("session-a", 0);

    scene.until_phase("session-a", "Completed").await;
    assert_eq!(scene.api.ask(|api| api.failing_writes), 0);
    // What failed is the write: nothing else was done again for it.
    assert_eq!(scene.backend.calls(), [Call::Start(id("session-a"), 0)]);
    scene.stop().await;
}

#[tokio::test]
async fn a_phase_that_somebody_overwrites_is_written_again() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    scene
        .api
        .change("session-a", |it| it.phase = Some("Creating".to_owned()));
    scene.until_phase("session-a", "Running").await;
    assert_eq!(scene.backend.calls().len(), 1);
    scene.stop().await;
}

#[tokio::test]
async fn one_session_that_fails_holds_up_no_other_and_is_tried_until_it_succeeds() {
    let scene = scene(|api, backend| {
        backend.fail_starts("session-a", 7);
        api.create("session-a", |_| {});
        for number in 0..20 {
            api.create(&format!("session-{number:05}"), |_| {});
        }
    })
    .await;
    for number in 0..20 {
        scene
            .until_phase(&format!("session-{number:05}"), "Running")
            .await;
    }
    scene
        .until("people see why", |scene| {
            scene.api.reason("session-a") == "StartFailed"
        })
        .await;
    scene.until_phase("session-a", "Running").await;
    assert_eq!(scene.backend.tries(&Call::Start(id("session-a"), 0)), 8);
    assert_eq!(scene.api.reason("session-a"), "AgentRunning");
    scene.stop().await;
}

#[tokio::test]
async fn a_session_that_cannot_run_fails_at_once_and_is_left_alone() {
    let scene = scene(|api, backend| {
        backend.refuse("session-refused");
        api.create("session-refused", |_| {});
        api.create("session-malformed", |session| {
            session.annotations =
                Some(r#"{"ambient-code.io/agent-command":"sh -c true"}"#.to_owned());
        });
    })
    .await;
    scene.until_phase("session-refused", "Failed").await;
    scene.until_phase("session-malformed", "Failed").await;
    assert_eq!(scene.api.reason("session-refused"), "NoRoom");
    assert_eq!(scene.api.reason("session-malformed"), "AnnotationMalformed");

    scene.settle("session-sentinel").await;
    assert_eq!(
        scene.backend.tries(&Call::Start(id("session-refused"), 0)),
        1
    );
    assert_eq!(
        scene
            .backend
            .tries(&Call::Start(id("session-malformed"), 0)),
        0
    );
    scene.stop().await;
}

#[tokio::test]
async fn a_restarted_session_waits_for_its_old_run_and_is_not_judged_by_it() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;

    // Stopped and started again while the old run still ends.
    scene.api.change("session-a", |session| {
        session.phase = Some("Pending".to_owned());
        session.sdk_restart_count = Some(1);
    });
    let again = Call::Start(id("session-a"), 1);
    scene
        .until("it is tried", |scene| scene.backend.tries(&again) >= 2)
        .await;
    assert_eq!(scene.api.phase("session-a").as_deref(), Some("Creating"));
    scene.backend.ends("session-a", 1);

    scene
        .until("it runs again", |scene| scene.backend.count(&again) == 1)
        .await;
    scene.until_phase("session-a", "Running").await;
    let written = scene.api.ask(|api| api.written.clone());
    assert!(
        written.iter().all(|(_, phase)| phase != "Failed"),
        "{written:?}"
    );
    let generations: Vec<_> = scene
        .issuer
        .subjects()
        .iter()
        .map(|it| it.generation)
        .collect();
    assert_eq!(generations.first(), Some(&0));
    assert_eq!(generations.last(), Some(&1));
    scene.stop().await;
}

#[tokio::test]
async fn a_finished_run_is_not_taken_for_that_of_a_session_started_again() {
    let scene = scene(|api, _| api.create("session-a", |_| {})).await;
    scene.until_phase("session-a", "Running").await;
    scene.backend.ends("session-a", 0);
    scene.until_phase("session-a", "Completed").await;

    // As an API server does it that does not count starts.
    scene
        .api
        .change("session-a", |it| it.phase = Some("Pending".to_owned()));

    scene.until_phase("session-a", "Running").await;
    assert_eq!(scene.backend.count(&Call::Start(id("session-a"), 0)), 2);
    scene.stop().await;
}

#[tokio::test]
async fn a_run_that_the_api_server_knows_nothing_of_gives_way() {
    // The API server's database is an older one: to it, the session waits for its first start.
    let scene = scene(|api, backend| {
        api.create("session-a", |_| {});
        backend.runs("session-a", 3);
    })
    .await;
    scene.until_phase("session-a", "Running").await;
    let calls = [
        Call::Remove(id("session-a")),
        Call::Start(id("session-a"), 0),
    ];
    assert_eq!(scene.backend.calls(), calls);
    assert!(scene.api.ask(|api| api.gets) < 10);
    scene.stop().await;
}

#[tokio::test]
async fn phases_are_written_while_every_start_hangs() {
    let scene = scene(|api, backend| {
        api.create_in("session-running", "Running");
        backend.runs("session-running", 0);
        backend.close_gate();
        for number in 0..20 {
            api.create(&format!("session-{number:05}"), |_| {});
        }
    })
    .await;
    scene.until_phase("session-00007", "Creating").await;
    scene.backend.ends("session-running", 0);
    scene.until_phase("session-running", "Completed").await;
    scene.backend.open_gate();
    scene.stop().await;
}

#[tokio::test]
async fn a_write_that_is_refused_for_good_causes_no_storm() {
    let scene = scene(|api, _| {
        api.create("session-a", |_| {});
        api.set(|api| api.refuses_writes_of = Some("session-a"));
    })
    .await;
    scene
        .until("some tries", |scene| scene.api.ask(|api| api.refused) >= 3)
        .await;
    // In the time in which many others are started, one after the other, a storm is hundreds.
    for number in 0..50 {
        scene.settle(&format!("session-{number:05}")).await;
    }
    let (refused, gets) = scene.api.ask(|api| (api.refused, api.gets));
    assert!(refused < 15 && gets < 15, "{refused} writes, {gets} reads");
    scene.api.set(|api| api.refuses_writes_of = None);
    scene.until_phase("session-a", "Running").await;
    scene.stop().await;
}

#[tokio::test]
async fn after_a_restart_the_controller_goes_on_where_it_was() {
    let scene = scene(|api, backend| {
        // Died between the write and the start; ran on; ended meanwhile; vanished.
        api.create_in("session-creating", "Creating");
        api.create_in("session-running", "Running");
        backend.runs("session-running", 0);
        api.create_in("session-ended", "Running");
        backend.runs("session-ended", 0);
        backend.ends("session-ended", 0);
        api.create_in("session-vanished", "Running");
        api.create_in("session-stopping", "Stopping");
        backend.runs("session-stopping", 0);
    })
    .await;
    scene.until_phase("session-creating", "Running").await;
    scene.until_phase("session-ended", "Completed").await;
    scene.until_phase("session-vanished", "Failed").await;
    let stop = Call::Stop(id("session-stopping"));
    scene
        .until("it is stopped", |scene| scene.backend.count(&stop) == 1)
        .await;
    assert_eq!(
        scene.api.phase("session-running").as_deref(),
        Some("Running")
    );
    assert_eq!(
        scene.backend.count(&Call::Start(id("session-running"), 0)),
        0
    );
    scene.stop().await;
}

#[tokio::test]
async fn a_shutdown_lets_a_start_end_and_begins_no_other() {
    let scene = scene(|api, backend| {
        backend.close_gate();
        for number in 0..20 {
            api.create(&format!("session-{number:05}"), |_| {});
        }
    })
    .await;
    scene
        .until("starts under way", |scene| {
            let creating = |number| {
                let phase = scene.api.phase(&format!("session-{number:05}"));
                usize::from(phase.as_deref() == Some("Creating"))
            };
            (0..20).map(creating).sum::<usize>() == 8
        })
        .await;
    scene.shutdown.cancel();
    tokio::time::sleep(Duration::from_millis(200)).await;
    scene.backend.open_gate();
    let backend = std::sync::Arc::clone(&scene.backend);
    scene.stop().await;
    assert_eq!(backend.calls().len(), 8);
}
