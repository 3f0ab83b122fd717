//! From what a kubelet reports to the run's status.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_follows_its_pod() {
    let scene = Scene::start("phases").await;
    let session = run("phases-session", "phases-team");
    scene.started(&session).await;
    let waits = |wanted: &'static str| {
        move |status: &RunStatus| match status {
            RunStatus::Starting { waits_for } => {
                waits_for.as_ref().is_some_and(|it| it.reason == wanted)
            }
            _ => false,
        }
    };
    let waiting = |reason: &str| agent("Pending", &json!({"waiting": {"reason": reason}}));

    scene.set_status(
        &session,
        json!({"phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node",
        }]}),
    );
    scene
        .until_run(&session, "it has no node", waits("Unschedulable"))
        .await;
    scene.bind(&session);
    scene.set_status(&session, waiting("ContainerCreating"));
    scene
        .until_run(&session, "its image is pulled", waits("ContainerCreating"))
        .await;
    scene.set_status(&session, waiting("ImagePullBackOff"));
    scene
        .until_run(&session, "there is no image", waits("ImagePullBackOff"))
        .await;
    scene.set_status(&session, running());
    scene.until_run(&session, "it runs", is_running).await;

    let mut unready = running();
    unready["conditions"][1] = json!({
        "type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "not yet",
    });
    scene.set_status(&session, unready);
    scene
        .until_run(&session, "it is not ready", |status| {
            matches!(
                status,
                RunStatus::Running { not_ready: Some(it), .. } if it.reason == "ContainersNotReady"
            )
        })
        .await;
    scene.set_status(&session, ended(137, "OOMKilled", ""));
    scene
        .until_run(&session, "it was killed", |it| was_killed(it, "OOMKilled"))
        .await;
    assert!(!scene.state(&session).unwrap().is_live());
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_end_is_told_with_its_cause() {
    type IsSo = fn(&RunStatus) -> bool;
    let scene = Scene::start("ends").await;
    let evicted = json!({"phase": "Failed", "reason": "Evicted", "message": "disk pressure"});
    let deadline = json!({"phase": "Failed", "reason": "DeadlineExceeded", "message": "too long"});
    let cases: [(&str, Value, IsSo); 4] = [
        ("evicted-session", evicted, |it| was_killed(it, "Evicted")),
        ("overdue-session", deadline, |it| {
            was_killed(it, "DeadlineExceeded")
        }),
        ("failing-session", ended(3, "Error", "last words"), |it| {
            let RunStatus::Ended {
                end: RunEnd::Exited { code, message },
                ..
            } = it
            else {
                return false;
            };
            *code == 3 && message.as_deref() == Some("last words")
        }),
        ("succeeding-session", ended(0, "Completed", ""), |it| {
            matches!(
                it,
                RunStatus::Ended {
                    end: RunEnd::Exited { code: 0, .. },
                    ..
                }
            )
        }),
    ];
    for (name, status, is_so) in cases {
        let session = run(name, "ends-team");
        scene.started(&session).await;
        scene.bind(&session);
        scene.set_status(&session, status);
        scene.until_run(&session, name, is_so).await;
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pod_that_somebody_deletes_is_told_from_a_lost_one() {
    let scene = Scene::start("deleted").await;
    // One that runs, and one that does not yet: that one is gone at once.
    for name in ["deleted-running", "deleted-waiting"] {
        let session = run(name, "deleted-team");
        scene.started(&session).await;
        let is_bound = name.ends_with("running");
        if is_bound {
            scene.runs(&session);
            scene.until_run(&session, "it runs", is_running).await;
        }
        let path = path(&session, "pods", "-runner");
        assert_eq!(scene.cluster.request("DELETE", &path, None).0, 200);
        if is_bound {
            scene
                .until_run(
                    &session,
                    "it is ending",
                    |status| matches!(status, RunStatus::Ending(it) if it.reason == "PodDeleted"),
                )
                .await;
            scene.finish(&session);
        }
        scene
            .until_run(&session, name, |it| was_killed(it, "PodDeleted"))
            .await;
        // Until the session is started again, or goes.
        scene.removed(&session.id).await;
        assert_eq!(scene.state(&session), None);
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_that_can_never_start_is_doomed_and_ended() {
    let scene = Scene::start("doomed").await;
    let session = run("doomed-session", "doomed-team");
    scene.started(&session).await;
    scene.bind(&session);
    let state = json!({"waiting": {"reason": "InvalidImageName", "message": "no image: A:B:C"}});
    scene.set_status(&session, agent("Pending", &state));
    scene
        .until_run(
            &session,
            "it is doomed",
            |status| matches!(status, RunStatus::Doomed(it) if it.message.contains("A:B:C")),
        )
        .await;

    scene.backend.stop(&session.id).await.unwrap();

    scene.until_event(&session, "SessionDoomed").await;
    let is_ending = |status: &RunStatus| matches!(status, RunStatus::Ending(_));
    scene.until_run(&session, "it is ending", is_ending).await;
    scene.finish(&session);
    scene
        .until_run(&session, "it has ended", |it| was_killed(it, "Stopped"))
        .await;
    scene.stop().await;
}
