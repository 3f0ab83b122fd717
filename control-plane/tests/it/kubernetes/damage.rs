//! What somebody else changes or deletes is put right.

use super::*;

fn patch(scene: &Scene, path: &str, body: &Value) {
    let (status, answer) = scene.cluster.request("PATCH", path, Some(body));
    assert_eq!(status, 200, "{answer}");
}

/// The token in a Secret, as base64.
fn token(secret: &Value) -> String {
    secret["data"]["api-token"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_token_is_replaced_with_one_write_and_nothing_is_read() {
    let scene = Scene::start("tokens").await;
    let session = run("tokens-session", "tokens-team");
    scene.started(&session).await;
    let before = scene.secret(&session).unwrap();
    let times = scene.backend.token_times(&session.id).unwrap();

    let next = credentials(&session.id, 1800);
    scene.backend.write_token(&session.id, &next).await.unwrap();

    let after = scene.secret(&session).unwrap();
    assert_ne!(token(&before), token(&after));
    assert_eq!(before["data"]["session-key"], after["data"]["session-key"]);
    let renewed = scene.backend.token_times(&session.id).unwrap();
    assert!(renewed.expires_at > times.expires_at);
    let name = name(&session, "-creds");
    let written = scene.cluster.wait_for_request(|it| {
        it.name == name
            && it
                .uri
                .contains("fieldManager=ambient-control-plane-refresh")
    });
    assert_eq!(
        (written.verb.as_str(), written.code),
        ("patch", 200),
        "{written:?}"
    );
    let all = permissions::requests_so_far(scene.cluster);
    let ours = all.iter().filter(|it| {
        it.user == CONTROL_PLANE.name && it.resource == "secrets" && it.namespace == "tokens-team"
    });
    let verbs: Vec<&str> = ours
        .filter(|it| !matches!(it.verb.as_str(), "list" | "watch"))
        .map(|it| it.verb.as_str())
        .collect();
    assert_eq!(verbs, ["patch", "patch"]);

    // Of a session that is not there, there is nothing to write.
    let unknown = id("nobody-knows-it");
    let nothing = scene.backend.write_token(&unknown, &next).await;
    assert!(matches!(nothing, Err(BackendError::NotFound)));
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_secret_that_somebody_edits_or_deletes_is_due_and_is_put_right() {
    let scene = Scene::start("edited").await;
    let session = run("edited-session", "edited-team");
    scene.started(&session).await;
    let path = path(&session, "secrets", "-creds");
    let whole = scene.secret(&session).unwrap();
    // Both before and after a refresh, as each has a field manager of its own.
    let edits = [
        json!({"data": {"api-token": "bWluZQ=="}}),
        json!({"data": {"session-key": "bWluZQ=="}}),
        json!({"data": {"session-key": null}}),
        json!({"metadata": {"annotations": {"ambient-code.io/token-expires-at": "2099-01-01T00:00:00Z"}}}),
        json!({"metadata": {"labels": {"ambient-code.io/session-id": "somebody-else"}}}),
        json!({"metadata": {"labels": {"ambient-code.io/managed-by": null}}}),
        json!({"metadata": {"ownerReferences": null}}),
        Value::Null,
    ];
    let is_due = || scene.backend.token_times(&session.id).is_none();
    for edit in edits {
        assert!(!is_due(), "before {edit}");
        if edit.is_null() {
            assert_eq!(scene.cluster.request("DELETE", &path, None).0, 200);
        } else {
            patch(&scene, &path, &edit);
        }
        scene
            .until(&format!("it is due after {edit}"), is_due)
            .await;

        let next = credentials(&session.id, 900);
        scene.backend.write_token(&session.id, &next).await.unwrap();

        assert!(!is_due(), "after {edit}");
        let mended = scene.secret(&session).unwrap();
        assert_eq!(mended["data"]["session-key"], whole["data"]["session-key"]);
        assert_eq!(mended["metadata"]["labels"], whole["metadata"]["labels"]);
        assert_eq!(
            mended["metadata"]["ownerReferences"], whole["metadata"]["ownerReferences"],
            "{edit}"
        );
    }
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_somebody_changes_of_a_run_is_repaired() {
    let scene = Scene::start("repairs").await;
    let session = run("repairs-session", "repairs-team");
    scene.started(&session).await;
    scene.runs(&session);
    scene.until_run(&session, "it runs", is_running).await;
    let [account, _, service, pod] = paths(&session);
    let uid = scene.cluster.get(&pod).unwrap()["metadata"]["uid"].clone();
    let label = |name: &str, value: Value| json!({"metadata": {"labels": {format!("ambient-code.io/{name}"): value}}});
    let edits = [
        (&pod, label("project-id", json!("mine"))),
        (&pod, label("session-id", json!("mine"))),
        // It does not even show any more.
        (&pod, label("managed-by", Value::Null)),
        (&pod, json!({"metadata": {"ownerReferences": null}})),
        (&account, label("session-id", Value::Null)),
        (&account, label("managed-by", json!("me"))),
        (&service, json!({"spec": {"selector": {"app": "mine"}}})),
        (&service, label("session-id", Value::Null)),
        (&service, json!({"metadata": {"ownerReferences": null}})),
    ];
    let settled = |object: Value| {
        let part = |object: &Value, name: &str| object["metadata"][name].clone();
        let (labels, owners) = (part(&object, "labels"), part(&object, "ownerReferences"));
        (labels, owners, object["spec"].clone())
    };
    for (path, edit) in edits {
        let before = settled(scene.cluster.get(path).unwrap());
        patch(&scene, path, &edit);
        scene
            .until(&format!("repaired after {edit}"), || {
                scene.cluster.get(path).map(settled).as_ref() == Some(&before)
            })
            .await;
        assert!(is_running(&scene.state(&session).unwrap().status));
    }
    let ports = scene.cluster.get(&service).unwrap()["spec"]["ports"].clone();
    assert_eq!(scene.cluster.request("DELETE", &service, None).0, 200);
    scene
        .until("the Service is there again", || {
            let service = scene.cluster.get(&service);
            service.is_some_and(|it| it["spec"]["ports"] == ports)
        })
        .await;
    scene.until_event(&session, "Repaired").await;
    assert_eq!(scene.pod(&session).unwrap()["metadata"]["uid"], uid);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_whose_account_is_deleted_is_made_anew_when_started_again() {
    let scene = Scene::start("orphaned").await;
    let first = run("orphaned-session", "orphaned-team");
    scene.started(&first).await;
    let account = path(&first, "serviceaccounts", "-sa");
    assert_eq!(scene.cluster.request("DELETE", &account, None).0, 200);
    // All that it owned is collected with it, the pod too.
    scene
        .until_run(&first, "its pod is gone", |it| was_killed(it, "PodDeleted"))
        .await;
    scene
        .until("its Secret is gone", || scene.secret(&first).is_none())
        .await;

    // As often as the controller would: that its account is gone may be seen last.
    let second = again(&first, 1);
    let starting = async {
        while scene.try_start(&second).await.is_err() {
            sleep(AGAIN).await;
        }
    };
    timeout(DEADLINE, starting).await.expect("it is started");

    let owner = scene.cluster.get(&account).unwrap()["metadata"]["uid"].clone();
    let pod = scene.pod(&second).unwrap();
    assert_eq!(pod["metadata"]["ownerReferences"][0]["uid"], owner);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_goes_on_in_a_pod_whose_agent_has_ended() {
    let scene = Scene::start("rest").await;
    let session = run("rest-session", "rest-team");
    scene.started(&session).await;
    scene.bind(&session);
    let mut status = ended(0, "Completed", "");
    status["phase"] = json!("Running");
    let beside = json!({
        "name": "ambient-mcp", "ready": true, "image": "mcp:1", "imageID": "", "restartCount": 0,
        "state": {"running": {}},
    });
    status["containerStatuses"]
        .as_array_mut()
        .unwrap()
        .push(beside);
    scene.set_status(&session, status);

    scene
        .cluster
        .wait_for(&path(&session, "pods", "-runner"), |pod| {
            pod["metadata"]["deletionTimestamp"].is_string()
        });

    let has_succeeded = |status: &RunStatus| {
        matches!(
            status,
            RunStatus::Ended {
                end: RunEnd::Exited { code: 0, .. },
                ..
            }
        )
    };
    scene
        .until_run(&session, "it has succeeded", has_succeeded)
        .await;
    scene.finish(&session);
    let is_gone = || scene.pod(&session).is_none();
    scene.until("its pod is gone", is_gone).await;
    assert!(has_succeeded(&scene.state(&session).unwrap().status));
    scene.stop().await;
}
