//! Making, ending and removing what a session has.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_has_the_objects_of_the_contract_and_they_go_with_it() {
    let scene = Scene::start("life").await;
    let session = run("01991F2E-0000-7000-8000-00000000000A", "life-team");
    scene.started(&session).await;

    // What was made is known at once.
    let state = scene.state(&session).expect("a run");
    assert!(matches!(state.status, RunStatus::Starting { .. }));
    assert_eq!(state.namespace.as_deref(), Some("life-team"));
    assert_eq!(scene.backend.sessions(), vec![session.id.clone()]);
    let times = scene.backend.token_times(&session.id).expect("a token");
    let left = times.expires_at.unwrap().duration_since(now()).unwrap();
    assert!(left <= Duration::from_secs(900), "{left:?}");

    let [account, secret, service, pod] = paths(&session).map(|it| scene.cluster.get(&it).unwrap());
    for object in [&account, &secret, &service, &pod] {
        let labels = &object["metadata"]["labels"];
        assert_eq!(
            labels["ambient-code.io/session-id"],
            session.id.as_str(),
            "{object:#}"
        );
        assert_eq!(labels["ambient-code.io/project-id"], "life-team");
        assert_eq!(labels["ambient-code.io/managed"], "true");
        assert_eq!(
            labels["ambient-code.io/managed-by"],
            "ambient-control-plane"
        );
    }
    for owned in [&secret, &service, &pod] {
        let owners = &owned["metadata"]["ownerReferences"];
        assert_eq!(owners[0]["uid"], account["metadata"]["uid"], "{owned:#}");
    }
    let annotations = &pod["metadata"]["annotations"];
    assert_eq!(annotations["ambient-code.io/generation"], "0");
    assert_eq!(
        annotations["ambient-code.io/session-id"],
        session.id.as_str()
    );
    let data: Vec<&String> = secret["data"].as_object().unwrap().keys().collect();
    assert_eq!(data, ["api-token", "session-key"]);
    scene.until_event(&session, "SessionStarted").await;

    // One that has only this run's id needs no more.
    scene.removed(&session.id).await;
    for path in paths(&session) {
        assert_eq!(scene.cluster.get(&path), None);
    }
    assert!(scene.backend.sessions().is_empty());
    assert!(scene.cluster.get("/api/v1/namespaces/life-team").is_some());
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_upgrade_touches_no_session_that_runs() {
    let scene = Scene::start("upgrade").await;
    let session = run("upgraded-session", "upgrade-team");
    scene.started(&session).await;
    scene.runs(&session);
    scene.until_run(&session, "it runs", is_running).await;
    let sessions = Arc::clone(&scene.sessions);
    scene.stop().await;
    let before = [&session].map(|it| paths(it).map(|path| shared().get(&path).unwrap()));

    let mut newer = settings("upgrade");
    newer.images.agent = Some("agent:2".to_owned());
    newer.images.runner = Some("runner:2".to_owned());
    let scene = Scene::with(newer, &sessions).await;
    let state = scene.state(&session).expect("it is known");
    assert!(is_running(&state.status), "{state:?}");
    assert!(scene.backend.token_times(&session.id).is_some());
    scene.started(&session).await;
    scene.started(&session).await;

    let after = [&session].map(|it| paths(it).map(|path| shared().get(&path).unwrap()));
    assert_eq!(before, after);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_run_that_is_stopped_and_started_again_waits_for_its_old_pod() {
    let scene = Scene::start("again").await;
    let first = run("again-session", "again-team");
    scene.started(&first).await;
    scene.runs(&first);
    scene.until_run(&first, "it runs", is_running).await;
    let old = scene.pod(&first).unwrap()["metadata"]["uid"].clone();

    scene.backend.stop(&first.id).await.unwrap();
    let is_ending = |status: &RunStatus| matches!(status, RunStatus::Ending(_));
    scene.until_run(&first, "it is ending", is_ending).await;
    scene.until_event(&first, "SessionStopping").await;

    let second = again(&first, 1);
    for _ in 0..3 {
        let started = scene.try_start(&second).await;
        assert!(
            matches!(started, Err(BackendError::StillEnding)),
            "{started:?}"
        );
    }
    assert_eq!(scene.state(&second).unwrap().generation, 0);
    scene.finish(&first);
    scene.started(&second).await;

    let pod = scene.pod(&second).unwrap();
    assert_ne!(pod["metadata"]["uid"], old);
    assert_eq!(
        pod["metadata"]["annotations"]["ambient-code.io/generation"],
        "1"
    );
    assert_eq!(scene.state(&second).unwrap().generation, 1);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_finished_run_makes_room_for_the_next() {
    let scene = Scene::start("finished").await;
    let first = run("finished-session", "finished-team");
    scene.started(&first).await;
    scene.bind(&first);
    scene.set_status(&first, ended(3, "Error", "last words"));
    let has_ended = |status: &RunStatus| matches!(status, RunStatus::Ended { .. });
    scene.until_run(&first, "it has ended", has_ended).await;
    // Nothing is left to stop, and its pod stays for its logs.
    scene.backend.stop(&first.id).await.unwrap();
    assert!(scene.pod(&first).unwrap()["metadata"]["deletionTimestamp"].is_null());

    let second = again(&first, 1);
    let started = scene.try_start(&second).await;
    assert!(matches!(started, Err(BackendError::StillEnding)));
    scene.finish(&first);
    scene.started(&second).await;
    let state = scene.state(&second).unwrap();
    assert_eq!(state.generation, 1);
    assert!(matches!(state.status, RunStatus::Starting { .. }));
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_deleted_session_ends_in_its_grace_period_before_all_of_it_goes() {
    let scene = Scene::start("grace").await;
    let session = run("graceful-session", "grace-team");
    scene.started(&session).await;
    scene.runs(&session);
    scene.until_run(&session, "it runs", is_running).await;

    let removed = scene.backend.remove(&session.id).await;
    assert!(matches!(removed, Err(BackendError::StillEnding)));
    let pod = scene.pod(&session).unwrap();
    assert_eq!(pod["metadata"]["deletionGracePeriodSeconds"], 60);
    let removed = scene.backend.remove(&session.id).await;
    assert!(matches!(removed, Err(BackendError::StillEnding)));
    // Until then it has its token.
    assert!(scene.secret(&session).is_some());

    scene.finish(&session);
    scene.removed(&session.id).await;
    for path in paths(&session) {
        assert_eq!(scene.cluster.get(&path), None);
    }
    let nothing = scene.backend.stop(&session.id).await;
    assert!(matches!(nothing, Err(BackendError::NotFound)));
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_that_is_removed_takes_along_what_was_disowned() {
    let scene = Scene::start("disowned").await;
    let session = run("disowned-session", "disowned-team");
    scene.started(&session).await;
    let nobodys = json!({"metadata": {"ownerReferences": null}});
    for (resource, ending) in [("secrets", "-creds"), ("services", "")] {
        let path = path(&session, resource, ending);
        // The pod goes first: while it runs, its Service is repaired.
        scene
            .cluster
            .finish_pod(&session.project, &name(&session, "-runner"));
        scene
            .until_run(&session, "its pod is gone", |status| {
                matches!(status, RunStatus::Ended { .. })
            })
            .await;
        let (status, answer) = scene.cluster.request("PATCH", &path, Some(&nobodys));
        assert_eq!(status, 200, "{answer}");
    }
    let is_disowned = || scene.backend.token_times(&session.id).is_none();
    scene.until("the Secret is nobody's", is_disowned).await;

    scene.removed(&session.id).await;

    for path in paths(&session) {
        assert_eq!(scene.cluster.get(&path), None);
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_whose_account_does_not_show_is_removed_whole() {
    let scene = Scene::start("unlabelled").await;
    let session = run("unlabelled-session", "unlabelled-team");
    scene.started(&session).await;
    scene
        .cluster
        .finish_pod(&session.project, &name(&session, "-runner"));
    scene
        .until_run(&session, "its pod is gone", |status| {
            matches!(status, RunStatus::Ended { .. })
        })
        .await;
    let sessions = Arc::clone(&scene.sessions);
    scene.stop().await;
    let unlabelled = json!({"metadata": {"labels": null, "annotations": null}});
    let account = path(&session, "serviceaccounts", "-sa");
    let patched = shared().request("PATCH", &account, Some(&unlabelled));
    assert_eq!(patched.0, 200, "{}", patched.1);

    let scene = Scene::with(settings("unlabelled"), &sessions).await;
    scene.removed(&session.id).await;

    for path in paths(&session) {
        assert_eq!(scene.cluster.get(&path), None);
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_hundred_sessions_are_known_at_start() {
    let scene = Scene::start("many").await;
    let sessions: Vec<DesiredRun> = (0..300)
        .map(|number| run(&format!("one-of-many-{number:03}"), "many-team"))
        .collect();
    // Makes the namespace; the others find it.
    scene.started(&sessions[0]).await;
    let scene = Arc::new(scene);
    let mut starts = JoinSet::new();
    // One after the other in each of some rows, as workers do.
    for row in sessions[1..].chunks(20) {
        let (scene, row) = (Arc::clone(&scene), row.to_vec());
        starts.spawn(async move {
            for session in row {
                scene.started(&session).await;
            }
        });
    }
    while let Some(ended) = timeout(DEADLINE * 5, starts.join_next()).await.unwrap() {
        ended.unwrap();
    }
    let scene = Arc::into_inner(scene).unwrap();
    let known = Arc::clone(&scene.sessions);
    scene.stop().await;

    let scene = Scene::with(settings("many"), &known).await;
    assert_eq!(scene.backend.sessions().len(), 300);
    for session in &sessions {
        let state = scene.state(session).expect("a run");
        assert!(
            matches!(state.status, RunStatus::Starting { .. }),
            "{state:?}"
        );
        assert!(scene.backend.token_times(&session.id).is_some());
    }
    scene.stop().await;
    shared().request("DELETE", "/api/v1/namespaces/many-team", None);
}
