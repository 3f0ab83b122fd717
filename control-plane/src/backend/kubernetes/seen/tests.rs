use std::{
    sync::Mutex as StdMutex,
    time::{Duration, SystemTime},
};

use ambient_shared::retry::Policy;
use ambient_testing::DEADLINE;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde_json::{Value, json};

use super::{facts::Reader, *};
use crate::{
    backend::{
        RunEnd,
        kubernetes::{
            names::{
                FIELD_MANAGER, GENERATION, SESSION_ID, SessionRef, TOKEN_EXPIRES_AT,
                TOKEN_ISSUED_AT,
            },
            objects,
            pod_state::AGENT,
        },
    },
    queue::Group,
};

mod standby;

const ID: &str = "01991f2e-0000-7000-8000-000000000001";
const OTHER: &str = "01991f2e-0000-7000-8000-000000000002";
const OWNER: &str = "account-uid";

fn found(name: &str) -> Found {
    Found {
        name: name.to_owned(),
        uid: Some(format!("uid-of-{name}")),
        version: 1,
    }
}

/// It is gone with all that was in it by this version.
fn gone(name: &str, version: u64) -> Found {
    Found {
        version,
        ..found(name)
    }
}

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

struct Scene {
    seen: Seen,
    told: Arc<StdMutex<Vec<SessionId>>>,
    repairs: WorkQueue<Repair, SessionId>,
    clock: Clock,
}

impl Scene {
    /// Sessions are of the project `team`, as far as the API server is concerned.
    fn new() -> Self {
        let told: Arc<StdMutex<Vec<SessionId>>> = Arc::default();
        let repairs = WorkQueue::new(Policy::default(), Arc::new(|_| Group::none()));
        let clock = Clock::manual(start());
        let observer: Observer = {
            let told = Arc::clone(&told);
            Arc::new(move |id| told.lock().unwrap().push(id.clone()))
        };
        let seen = Seen::new(
            Arc::new(|_| Some("team".to_owned())),
            Arc::new(|project: &str| project.to_lowercase()),
            observer,
            repairs.clone(),
            clock.clone(),
        );
        Self {
            seen,
            told,
            repairs,
            clock,
        }
    }

    /// With one namespace in which nothing is.
    fn listed() -> Self {
        let scene = Self::new();
        scene.seen.namespaces_listed(&[found("team")]);
        for kind in Kind::ALL {
            scene.seen.listed("team", kind, Vec::new(), 1);
        }
        scene.took_told();
        scene
    }

    fn took_told(&self) -> Vec<SessionId> {
        std::mem::take(&mut *self.told.lock().unwrap())
    }

    /// The session for which this is due; soon.
    async fn due(&self, repair: Repair) -> SessionId {
        let due = async {
            loop {
                let lease = self.repairs.next(repair.share(), 1).await;
                if lease.handler() == repair {
                    return lease.key().clone();
                }
                lease.succeed();
            }
        };
        tokio::time::timeout(DEADLINE, due).await.unwrap()
    }

    fn reader(&self) -> Reader {
        Reader {
            namespace: "team".to_owned(),
            project_of: self.seen.project_of(),
        }
    }

    fn pod(&self, version: u64, change: impl FnOnce(&mut Value)) -> Sighting {
        self.reader().pod(&pod(ID, version, change))
    }

    fn apply_pod(&self, version: u64, change: impl FnOnce(&mut Value)) {
        let sighting = self.pod(version, change);
        self.seen.applied("team", Kind::Pod, sighting);
    }

    fn run(&self) -> Option<RunStatus> {
        self.seen.run_state(&id(ID)).map(|run| run.status)
    }

    /// How its run ended.
    fn end(&self) -> String {
        match self.run() {
            Some(RunStatus::Ended { end, .. }) => match end {
                RunEnd::Killed(reason) => reason.reason,
                RunEnd::Exited { code, .. } => code.to_string(),
                RunEnd::Lost { .. } => "lost".to_owned(),
            },
            other => panic!("not ended: {other:?}"),
        }
    }
}

fn id(text: &str) -> SessionId {
    SessionId::parse(text).unwrap()
}

fn session(text: &str) -> SessionRef {
    SessionRef::new(&id(text), "team", "team").unwrap()
}

/// A session's pod, whose agent runs.
fn pod(text: &str, version: u64, change: impl FnOnce(&mut Value)) -> Pod {
    let session = session(text);
    let mut pod = json!({
        "metadata": {
            "name": session.pod(),
            "uid": "pod-uid",
            "resourceVersion": version.to_string(),
            "labels": session.labels(),
            "annotations": {SESSION_ID: text, GENERATION: "0"},
            "ownerReferences": [objects::owner(&session, OWNER)],
        },
        "status": {"phase": "Running", "containerStatuses": [{
            "name": AGENT, "ready": true, "image": "", "imageID": "", "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }]},
    });
    change(&mut pod);
    serde_json::from_value(pod).unwrap()
}

fn waits(reason: &str) -> impl FnOnce(&mut Value) + use<> {
    let state = json!({"waiting": {"reason": reason}});
    move |pod| pod["status"]["containerStatuses"][0]["state"] = state
}

fn is_deleted(pod: &mut Value) {
    pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:10:00Z");
    pod["metadata"]["deletionGracePeriodSeconds"] = json!(60);
}

/// A token Secret as it was applied, and then changed.
fn secret(version: u64, change: impl FnOnce(&mut Value)) -> ObjectMeta {
    let session = session(ID);
    let fields = json!({
        "f:data": {"f:api-token": {}, "f:session-key": {}},
        "f:metadata": {
            "f:annotations": {
                format!("f:{TOKEN_ISSUED_AT}"): {}, format!("f:{TOKEN_EXPIRES_AT}"): {},
            },
            "f:labels": session.labels().keys().map(|name| (format!("f:{name}"), json!({})))
                .collect::<serde_json::Map<_, _>>(),
        },
    });
    let mut metadata = json!({
        "name": session.token_secret(),
        "uid": "secret-uid",
        "resourceVersion": version.to_string(),
        "labels": session.labels(),
        "annotations": {
            TOKEN_ISSUED_AT: "2026-01-01T00:00:00Z", TOKEN_EXPIRES_AT: "2026-01-01T00:15:00Z",
        },
        "ownerReferences": [objects::owner(&session, OWNER)],
        "managedFields": [{"manager": FIELD_MANAGER, "fieldsV1": fields}],
    });
    change(&mut metadata);
    serde_json::from_value(metadata).unwrap()
}

fn account(version: u64) -> ObjectMeta {
    let session = session(ID);
    let metadata = json!({
        "name": session.service_account(),
        "uid": OWNER,
        "resourceVersion": version.to_string(),
        "labels": session.labels(),
        "annotations": {SESSION_ID: ID},
    });
    serde_json::from_value(metadata).unwrap()
}

#[test]
fn what_was_not_listed_is_unknown_and_whoever_asked_is_told_later() {
    let scene = Scene::new();
    assert_eq!(scene.run(), Some(RunStatus::Unknown));

    scene.seen.namespaces_listed(&[found("team")]);
    assert_eq!(scene.took_told(), [id(ID)]);
    assert_eq!(scene.run(), Some(RunStatus::Unknown));

    // Another namespace helps nothing.
    scene.seen.listed("elsewhere", Kind::Pod, Vec::new(), 1);
    scene.seen.failed("team", Kind::Secret);
    assert_eq!(scene.run(), Some(RunStatus::Unknown));

    scene.seen.listed("team", Kind::Pod, Vec::new(), 1);
    assert_eq!(scene.took_told(), [id(ID)]);
    assert_eq!(scene.run(), None);
}

#[test]
fn a_namespace_that_is_not_listed_is_looked_for() {
    let scene = Scene::new();
    scene.seen.namespaces_listed(&[]);
    assert!(scene.seen.is_settled());
    assert_eq!(scene.run(), Some(RunStatus::Unknown));
    assert_eq!(scene.seen.unfound(), ["team"]);

    // It is not there: neither is the run, and who asked is told.
    scene.told.lock().unwrap().clear();
    scene.seen.namespace_absent("team");
    assert_eq!(scene.told.lock().unwrap().len(), 1);
    assert_eq!(scene.run(), None);
    assert!(scene.seen.unfound().is_empty());

    // A complete list that does not have it says nothing new, so it is looked for once more.
    scene.seen.namespaces_listed(&[]);
    assert_eq!(scene.run(), Some(RunStatus::Unknown));
    // It is there, without our labels: its runs are seen.
    scene.told.lock().unwrap().clear();
    scene.seen.namespace_seen(&found("team"));
    assert_eq!(scene.told.lock().unwrap().len(), 1);
    assert_eq!(scene.run(), Some(RunStatus::Unknown));
    assert_eq!(scene.seen.namespaces().len(), 1);
}

#[test]
fn late_news_of_a_namespace_is_not_about_the_next_of_its_name() {
    let scene = Scene::listed();
    scene.apply_pod(2, |_| {});
    let epoch = scene.seen.namespaces()[0].1;
    // Made in the next namespace, before anybody told of the end of the first.
    scene.apply_pod(20, |pod| {
        pod["metadata"]["uid"] = "uid-of-the-next".into();
    });
    scene.seen.namespace_gone(&gone("team", 10));
    let next = Found {
        uid: Some("another".to_owned()),
        version: 11,
        ..found("team")
    };
    scene.seen.namespace_seen(&next);

    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
    assert_ne!(scene.seen.namespaces()[0].1, epoch);
    scene.seen.namespace_gone(&gone("team", 30));
    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
}

#[test]
fn all_is_settled_when_each_watch_has_listed_or_failed() {
    let scene = Scene::new();
    let names = [found("team"), found("forbidden")];
    scene.seen.namespaces_listed(&names);
    for kind in Kind::ALL {
        scene.seen.listed("team", kind, Vec::new(), 1);
        assert!(!scene.seen.is_settled());
        scene.seen.failed("forbidden", kind);
    }
    assert!(scene.seen.is_settled());
    assert!(!scene.seen.is_listed("forbidden"));
}

#[test]
fn a_pod_that_somebody_deleted_leaves_how_its_run_ended() {
    let scene = Scene::listed();
    scene.apply_pod(2, |_| {});
    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
    scene.apply_pod(3, is_deleted);
    assert!(matches!(scene.run(), Some(RunStatus::Ending(_))));
    scene.took_told();

    let gone = scene.pod(4, is_deleted);
    scene.seen.deleted("team", Kind::Pod, &gone);

    assert_eq!(scene.end(), "PodDeleted");
    assert_eq!(scene.took_told(), [id(ID)]);
    assert_eq!(scene.seen.sessions(), [id(ID)]);
    scene.seen.forget_end(&id(ID));
    assert_eq!(scene.run(), None);
    assert!(scene.seen.sessions().is_empty());
}

#[tokio::test]
async fn a_pod_that_only_does_not_show_any_more_is_looked_for() {
    let scene = Scene::listed();
    scene.apply_pod(2, |_| {});

    // As when it loses the label that is watched: the object is as it was before.
    let hidden = scene.pod(3, |_| {});
    scene.seen.deleted("team", Kind::Pod, &hidden);

    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
    assert_eq!(scene.due(Repair::Look).await, id(ID));
    let name = session(ID).pod();
    // Another pod than the one that was looked for says nothing of it.
    scene.seen.looked_for("team", &name, "another", false);
    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
    scene.seen.looked_for("team", &name, "pod-uid", false);
    assert_eq!(scene.end(), "PodDeleted");
}

#[tokio::test]
async fn a_pod_that_is_found_has_lost_a_label() {
    let scene = Scene::listed();
    let _mending = scene.seen.mend();
    scene.apply_pod(2, |_| {});
    scene.seen.listed("team", Kind::Pod, Vec::new(), 3);
    assert_eq!(scene.due(Repair::Look).await, id(ID));

    let name = session(ID).pod();
    scene.seen.looked_for("team", &name, "pod-uid", true);

    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
    assert_eq!(scene.due(Repair::Pod).await, id(ID));
    // Nothing waits for it once it shows again.
    scene.apply_pod(4, is_deleted);
    scene
        .seen
        .deleted("team", Kind::Pod, &scene.pod(5, is_deleted));
    scene.seen.looked_for("team", &name, "pod-uid", true);
    assert_eq!(scene.end(), "PodDeleted");
}

#[test]
fn only_who_leads_mends_and_what_was_damaged_before_too() {
    let scene = Scene::listed();
    scene.apply_pod(2, |_| {});
    let due = || scene.repairs.depth(Repair::Service);
    assert_eq!(due(), 0);

    let mending = scene.seen.mend();
    assert_eq!(due(), 1);
    drop(mending);
    assert_eq!(due(), 0);
    scene.apply_pod(3, |_| {});
    assert_eq!(due(), 0);
}

#[test]
fn a_pod_that_we_deleted_needs_no_other_witness() {
    let scene = Scene::listed();
    scene.apply_pod(2, |_| {});
    scene.seen.asked("team", &id(ID), "pod-uid");
    let gone = scene.pod(3, |_| {});
    scene.seen.deleted("team", Kind::Pod, &gone);
    assert_eq!(scene.end(), "Stopped");
    // What is started next is the run.
    scene.apply_pod(4, |pod| pod["metadata"]["uid"] = json!("next"));
    assert!(matches!(scene.run(), Some(RunStatus::Running { .. })));
}

#[test]
fn a_list_shows_what_events_did_not() {
    let scene = Scene::listed();
    scene.seen.applied(
        "team",
        Kind::Secret,
        scene.reader().secret(&secret(2, |_| {})),
    );
    assert!(scene.seen.token_times(&id(ID)).is_some());
    scene.took_told();

    scene.seen.listed("team", Kind::Secret, Vec::new(), 9);

    assert_eq!(scene.seen.token_times(&id(ID)), None);
    assert_eq!(scene.took_told(), [id(ID)]);
}

#[test]
fn our_own_write_counts_until_the_watch_is_further() {
    let scene = Scene::listed();
    let written = scene.reader().secret(&secret(5, |_| {}));
    scene.seen.wrote("team", Kind::Secret, written.clone());
    assert!(scene.seen.token_times(&id(ID)).is_some());
    // A list that was taken before does not have it.
    scene.seen.listed("team", Kind::Secret, Vec::new(), 4);
    assert!(scene.seen.token_times(&id(ID)).is_some());
    // An event from before says nothing of it.
    let older = scene.reader().secret(&secret(3, |it| {
        it["annotations"][TOKEN_ISSUED_AT] = json!("2025-01-01T00:00:00Z");
    }));
    let times = scene.seen.token_times(&id(ID));
    scene.seen.applied("team", Kind::Secret, older);
    assert_eq!(scene.seen.token_times(&id(ID)), times);

    scene.seen.deleted(
        "team",
        Kind::Secret,
        &Sighting {
            version: 6,
            ..written.clone()
        },
    );
    assert_eq!(scene.seen.token_times(&id(ID)), None);
    // The answer to the write comes late.
    scene.seen.wrote("team", Kind::Secret, written);
    assert_eq!(scene.seen.token_times(&id(ID)), None);
}

#[test]
fn a_secret_that_somebody_edited_is_none() {
    let edits: [fn(&mut Value); 5] = [
        |it| it["managedFields"][0]["manager"] = json!("kubectl-edit"),
        |it| {
            let fields = &mut it["managedFields"][0]["fieldsV1"]["f:data"];
            fields.as_object_mut().unwrap().remove("f:session-key");
        },
        |it| it["labels"]["ambient-code.io/managed"] = json!("false"),
        |it| it["ownerReferences"] = json!([]),
        |it| it["annotations"][TOKEN_ISSUED_AT] = json!("yesterday"),
    ];
    for edit in edits {
        let scene = Scene::listed();
        let account = scene.reader().account(&account(2));
        scene.seen.applied("team", Kind::Account, account);
        let good = scene.reader().secret(&secret(3, |_| {}));
        scene.seen.applied("team", Kind::Secret, good);
        assert!(scene.seen.token_times(&id(ID)).is_some());
        scene.took_told();

        let edited = secret(4, edit);
        let sighting = scene.reader().secret(&edited);
        scene.seen.applied("team", Kind::Secret, sighting);

        assert_eq!(scene.seen.token_times(&id(ID)), None, "{edited:?}");
        assert_eq!(scene.took_told(), [id(ID)]);
    }
}

#[test]
fn a_token_that_was_written_late_for_the_run_before_is_none() {
    let scene = Scene::listed();
    scene.apply_pod(3, |pod| {
        pod["metadata"]["annotations"][GENERATION] = json!("1");
    });
    let of_run = |version, generation| {
        let written = secret(version, |it| {
            it["annotations"][GENERATION] = json!(generation);
            it["managedFields"][0]["fieldsV1"]["f:metadata"]["f:annotations"]
                [format!("f:{GENERATION}")] = json!({});
        });
        scene.reader().secret(&written)
    };
    scene.seen.wrote("team", Kind::Secret, of_run(4, "1"));
    assert!(scene.seen.token_times(&id(ID)).is_some());
    scene.took_told();

    scene.seen.applied("team", Kind::Secret, of_run(5, "0"));
    assert_eq!(scene.seen.token_times(&id(ID)), None);
    assert_eq!(scene.took_told(), [id(ID)]);
}

#[test]
fn a_token_without_end_is_told_from_one_whose_end_cannot_be_read() {
    let scene = Scene::listed();
    let times = |change: fn(&mut Value)| {
        let sighting = scene.reader().secret(&secret(2, change));
        match sighting.facts.unwrap().what {
            facts::What::Secret(token) => token.unwrap().times.expires_at,
            other => panic!("{other:?}"),
        }
    };
    let endless = times(|it| {
        it["annotations"]
            .as_object_mut()
            .unwrap()
            .remove(TOKEN_EXPIRES_AT);
    });
    assert_eq!(endless, None);
    let unreadable = times(|it| it["annotations"][TOKEN_EXPIRES_AT] = json!("never"));
    assert_eq!(unreadable, Some(SystemTime::UNIX_EPOCH));
}

#[test]
fn nobody_passes_an_object_off_as_another_sessions() {
    let scene = Scene::listed();
    // The pod of one session says that it is of another.
    scene.apply_pod(2, |pod| {
        pod["metadata"]["name"] = json!(session(OTHER).pod());
    });
    assert_eq!(scene.run(), None);
    // And the same pod in another project's namespace is none of this session's.
    scene
        .seen
        .namespaces_listed(&[found("team"), found("others")]);
    let reader = Reader {
        namespace: "others".to_owned(),
        project_of: scene.seen.project_of(),
    };
    let copy = reader.pod(&pod(ID, 3, |_| {}));
    scene.seen.applied("others", Kind::Pod, copy);
    scene.seen.listed("others", Kind::Pod, Vec::new(), 1);
    assert_eq!(scene.run(), None);
    // It is removed with the session all the same.
    assert_eq!(scene.seen.everywhere(&id(ID)).len(), 1);
}

#[test]
fn a_namespace_that_goes_takes_all_but_how_runs_ended() {
    let scene = Scene::listed();
    scene.apply_pod(2, |_| {});
    let sighting = scene.reader().secret(&secret(3, |_| {}));
    scene.seen.applied("team", Kind::Secret, sighting);
    scene.took_told();

    scene.seen.namespace_gone(&gone("team", u64::MAX));

    assert_eq!(scene.end(), "PodDeleted");
    assert_eq!(scene.seen.token_times(&id(ID)), None);
    assert_eq!(scene.took_told(), [id(ID)]);
    assert!(scene.seen.namespaces().is_empty());
    // There is one of that name again: what is in it is not known yet.
    scene.seen.forget_end(&id(ID));
    scene.seen.namespace_seen(&found("team"));
    assert_eq!(scene.run(), Some(RunStatus::Unknown));
}

#[tokio::test(start_paused = true)]
async fn time_dooms_a_run_whose_image_cannot_be_had() {
    let scene = Scene::listed();
    scene.apply_pod(2, waits("ErrImagePull"));
    tokio::time::advance(Duration::from_secs(200)).await;
    // The kubelet says both in turns.
    scene.apply_pod(3, waits("ImagePullBackOff"));
    scene.took_told();
    tokio::time::advance(Duration::from_secs(99)).await;
    scene.seen.tick();
    assert!(scene.took_told().is_empty());
    assert!(matches!(scene.run(), Some(RunStatus::Starting { .. })));

    tokio::time::advance(Duration::from_secs(1)).await;
    scene.seen.tick();

    assert_eq!(scene.took_told(), [id(ID)]);
    assert!(matches!(scene.run(), Some(RunStatus::Doomed(_))));
    scene.seen.tick();
    assert!(scene.took_told().is_empty());
    assert!(scene.clock.now() > start());
}

#[tokio::test]
async fn what_is_damaged_of_a_run_is_to_be_repaired() {
    type Edit = fn(&mut Value);
    let edits: [(Repair, Edit); 4] = [
        (Repair::Pod, |pod| {
            pod["metadata"]["labels"]["ambient-code.io/project-id"] = json!("mine");
        }),
        (Repair::Pod, |pod| {
            pod["metadata"]["ownerReferences"] = json!([]);
        }),
        (Repair::Service, |_| {}),
        (Repair::Rest, |pod| {
            let statuses = pod["status"]["containerStatuses"].as_array_mut().unwrap();
            let mut beside = statuses[0].clone();
            beside["name"] = json!("mcp");
            statuses[0]["state"] = json!({"terminated": {"exitCode": 0}});
            statuses.push(beside);
        }),
    ];
    for (repair, edit) in edits {
        let scene = Scene::listed();
        let _mending = scene.seen.mend();
        let account = scene.reader().account(&account(2));
        scene.seen.applied("team", Kind::Account, account);
        scene.apply_pod(3, edit);
        assert_eq!(scene.due(repair).await, id(ID), "{repair:?}");
    }
    // A run that is over needs nothing any more.
    let scene = Scene::listed();
    let _mending = scene.seen.mend();
    scene.apply_pod(3, |pod| pod["status"] = json!({"phase": "Failed"}));
    for repair in Repair::ALL {
        assert_eq!(scene.repairs.depth(repair), 0, "{repair:?}");
    }
}
