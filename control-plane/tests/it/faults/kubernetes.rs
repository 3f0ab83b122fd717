//! The API server of Kubernetes goes away, forgets, refuses and falls silent; others write at the
//! same time as we do.

use std::time::Duration;

use ambient_testing::{
    DEADLINE,
    cluster::{Cluster, ClusterOptions},
    kube_proxy::{Asked, asked, conflict, expired, refusal, too_busy},
    programs::Running,
    proxy::{Call, Fault},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::site::{Session, Site};
use crate::permissions;

/// How long kube-apiserver is away: longer than any single call waits, and long enough for the Lease
/// to be lost.
const AWAY: Duration = Duration::from_secs(8);

/// A site with a project, and the program that runs.
async fn started(name: &str) -> (Site, Running) {
    let site = Site::new(name).await;
    let program = site.program().start();
    site.create_project().await;
    (site, program)
}

/// A session that runs.
async fn running(site: &Site) -> Session<'_> {
    let session = site.create().await;
    session.runs(0).await;
    session.until_phase("Running").await;
    session
}

/// Whether a call is such a one, about this kind of object in the site's project.
fn about(
    site: &Site,
    verb: &'static str,
    resource: &'static str,
) -> impl Fn(&Call) -> bool + Send + Sync + 'static {
    let project = site.project.clone();
    move |call| {
        let asked = asked(call);
        (asked.verb, asked.resource.as_str()) == (verb, resource) && asked.namespace == project
    }
}

/// Such calls so far.
fn count(site: &Site, which: impl Fn(&Asked) -> bool) -> usize {
    site.asked()
        .iter()
        .filter(|(asked, _)| which(asked))
        .count()
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not seen: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sessions_outlast_a_kubernetes_that_is_away_or_hangs() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    permissions::grant_for(&cluster, &permissions::usual());
    let site = Site::on(&cluster, "fault-away").await;
    let mut program = site.program().env("CP_LEASE_DURATION", "6s").start();
    let endpoint = program.listening("endpoint").await;
    site.create_project().await;
    let stays = running(&site).await;
    let tokens = stays.exchange(endpoint).await;
    let pod = site.get(&stays.pod()).await.unwrap();

    for hangs in [false, true] {
        let (stopped, deleted) = (running(&site).await, running(&site).await);
        if hangs {
            cluster.freeze_api_server();
        } else {
            cluster.stop_api_server();
        }
        let began = Instant::now();
        let new = site.create().await;
        stopped.post("stop").await;
        deleted.delete().await;
        while began.elapsed() < AWAY {
            tokens.fetch().await.expect("a token");
            sleep(Duration::from_millis(500)).await;
        }
        stays.until_phase("Running").await;
        if hangs {
            cluster.thaw_api_server();
        } else {
            cluster.start_api_server();
        }

        new.runs(0).await;
        new.until_phase("Running").await;
        stopped.finishes().await;
        stopped.until_phase("Stopped").await;
        deleted.finishes().await;
        deleted.is_gone().await;
        stays.until_phase("Running").await;
        let now = site.get(&stays.pod()).await.unwrap();
        assert_eq!(now["metadata"]["uid"], pod["metadata"]["uid"]);
        for session in [&stays, &new] {
            session.is_whole().await;
        }
        assert_eq!(site.get(&stopped.pod()).await, None);
        tokens.fetch().await.expect("a token");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_changes_while_a_watch_expires_is_not_missed() {
    let (site, _program) = started("fault-expired").await;
    let watches = |resource| about(&site, "watch", resource);
    for (told, code) in [("in the stream", 3), ("by the status", 4)] {
        let session = running(&site).await;
        let is_watched = || site.kube.streams(watches("pods")) == 1;
        until("pods are watched", is_watched).await;
        let lists = |asked: &Asked| {
            (asked.verb, asked.resource.as_str()) == ("list", "pods")
                && asked.namespace == site.project
        };
        let before = count(&site, lists);
        let gap = site.kube.inject(usize::MAX, watches("pods"), Fault::Silent);
        session.ends(code).await;
        drop(gap);

        let refused = site
            .kube
            .inject(1, watches("pods"), Fault::Answer(expired()));
        if told == "in the stream" {
            drop(refused);
            let in_project =
                |asked: &Asked| asked.resource == "pods" && asked.namespace == site.project;
            assert_eq!(site.kube.expire_watches(in_project), 1);
        } else {
            assert_eq!(site.kube.end_streams(watches("pods"), ""), 1);
            until("the watch is refused", || refused.hits() == 1).await;
        }

        let session = session.until_phase("Failed").await;
        let conditions = session["conditions"].as_str().unwrap();
        assert!(
            conditions.contains(&format!("{code}")),
            "{told}: {conditions}"
        );
        // Once, and once for those without their label.
        assert_eq!(count(&site, lists), before + 2, "{told}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_secret_that_is_deleted_while_its_watch_expires_is_made_again() {
    let (site, _program) = started("fault-gap").await;
    let session = running(&site).await;
    let watches = about(&site, "watch", "secrets");
    let is_watched = || site.kube.streams(about(&site, "watch", "secrets")) == 1;
    until("Secrets are watched", is_watched).await;
    let gap = site.kube.inject(usize::MAX, watches, Fault::Silent);
    let old = site.get(&session.secret()).await.unwrap();
    let deleted = site.ask(Method::DELETE, &session.secret(), None).await;
    assert_eq!(deleted.0, 200);
    drop(gap);

    let in_project = |asked: &Asked| asked.resource == "secrets" && asked.namespace == site.project;
    assert_eq!(site.kube.expire_watches(in_project), 1);

    let new = site.wait_for(&session.secret(), |_| true).await;
    assert_ne!(new["metadata"]["uid"], old["metadata"]["uid"]);
    assert_eq!(new["data"]["session-key"], old["data"]["session-key"]);
    session.is_whole().await;
}

/// Writes that a session's life has, by verb and kind.
const WRITES: [(&str, &str); 6] = [
    ("create", "serviceaccounts"),
    ("patch", "secrets"),
    ("patch", "services"),
    ("create", "pods"),
    ("delete", "pods"),
    ("delete", "serviceaccounts"),
];

/// Refusals of each write before it is done.
const REFUSALS: usize = 1;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writes_that_are_refused_for_now_are_made_later_and_cause_no_storm() {
    let (site, _program) = started("fault-refused").await;
    let busy = too_busy("1");
    let broken = refusal(500, "InternalError", "etcd is away");
    for answer in [
        Fault::Answer(conflict()),
        Fault::Answer(busy),
        Fault::Answer(broken),
        Fault::Lost,
    ] {
        let from = site.asked().len();
        let faults = WRITES.map(|(verb, resource)| {
            site.kube
                .inject(REFUSALS, about(&site, verb, resource), answer.clone())
        });

        let session = running(&site).await;
        session.is_whole().await;
        session.delete().await;
        session.finishes().await;
        session.is_gone().await;

        for (fault, write) in faults.iter().zip(WRITES) {
            // What was done, though nobody heard so, may be found done.
            let least = if matches!(answer, Fault::Lost) {
                1
            } else {
                REFUSALS
            };
            assert!(fault.hits() >= least, "{write:?} {answer:?}");
        }
        let calls = site.asked();
        let writes = calls[from..].iter().filter(|(asked, _)| {
            asked.is_write() && asked.namespace == site.project && asked.resource != "events"
        });
        // Each write once, and as often as it was refused; what comes before it in a start, anew.
        let most = WRITES.len() * (1 + 4 * REFUSALS);
        assert!(writes.count() <= most, "{answer:?}: {:#?}", &calls[from..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_that_is_deleted_while_its_next_try_waits_is_removed_and_not_started() {
    let (site, _program) = started("fault-waits").await;
    let creates = about(&site, "create", "pods");
    let broken = Fault::Answer(refusal(500, "InternalError", "etcd is away"));
    let refused = site.kube.inject(usize::MAX, creates, broken);
    let session = site.create().await;
    until("some tries", || refused.hits() >= 4).await;

    session.delete().await;
    session.is_gone().await;

    // Whatever would still be tried is tried by the time another session has lived.
    drop(refused);
    let other = running(&site).await;
    other.delete().await;
    other.finishes().await;
    other.is_gone().await;
    session.is_gone().await;
    let made = site.asked().into_iter().filter(|(asked, code)| {
        (asked.verb, asked.resource.as_str()) == ("create", "pods") && *code == Some(201)
    });
    assert_eq!(made.count(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_others_make_under_a_sessions_names_is_left_alone() {
    let (site, _program) = started("fault-taken").await;
    let creates = about(&site, "create", "pods");
    let held = site.kube.inject(1, creates, Fault::Held);
    let session = site.create().await;
    until("the pod is about to be made", || held.hits() == 1).await;
    let name = format!("session-{}-runner", session.id);
    let theirs = json!({
        "metadata": {"name": name},
        "spec": {
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "theirs", "image": "theirs:1",
                "securityContext": {
                    "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]},
                },
            }],
        },
    });
    let pods = format!("/api/v1/namespaces/{}/pods", site.project);
    let made = site.ask(Method::POST, &pods, Some(&theirs)).await;
    assert_eq!(made.0, 201, "{}", made.1);
    drop(held);

    let failed = session.until_phase("Failed").await;
    let conditions = failed["conditions"].as_str().unwrap();
    assert!(conditions.contains("NameTaken"), "{conditions}");
    session.delete().await;
    for (resource, ending) in [
        ("serviceaccounts", "-sa"),
        ("secrets", "-creds"),
        ("services", ""),
    ] {
        site.wait_gone(&session.path(resource, ending)).await;
    }
    let left = site.get(&session.pod()).await.unwrap();
    assert_eq!(left["metadata"]["uid"], made.1["metadata"]["uid"]);
    assert!(left["metadata"]["deletionTimestamp"].is_null());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_account_that_is_deleted_while_its_session_is_made_is_made_again() {
    let (site, _program) = started("fault-account").await;
    for (verb, resource) in &WRITES[1..4] {
        let write = about(&site, verb, resource);
        let held = site.kube.inject(1, write, Fault::Held);
        let session = site.create().await;
        until("the write is about to be made", || held.hits() == 1).await;
        let account = session.path("serviceaccounts", "-sa");
        let deleted = site.ask(Method::DELETE, &account, None).await;
        assert_eq!(deleted.0, 200, "{}", deleted.1);
        drop(held);

        until_whole(&session).await;
        session.delete().await;
        session.finishes().await;
        session.is_gone().await;
    }
}

/// Waits until a session has all that it should, each owned by its `ServiceAccount`.
async fn until_whole(session: &Session<'_>) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let account = session
            .site
            .get(&session.path("serviceaccounts", "-sa"))
            .await;
        let mut owned = Vec::new();
        for path in [
            session.secret(),
            session.path("services", ""),
            session.pod(),
        ] {
            owned.extend(session.site.get(&path).await);
        }
        let uid = account.as_ref().map(|it| &it["metadata"]["uid"]);
        let is_its = |it: &Value| Some(&it["metadata"]["ownerReferences"][0]["uid"]) == uid;
        if owned.len() == 3 && owned.iter().all(is_its) {
            return;
        }
        assert!(Instant::now() < deadline, "{account:#?} {owned:#?}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn somebody_who_edits_all_at_once_wins_nothing_and_causes_no_storm() {
    let (site, _program) = started("fault-edits").await;
    let session = running(&site).await;
    let pod = site.get(&session.pod()).await.unwrap();
    let from = site.asked().len();
    let label = |name: &str, value: Value| json!({"metadata": {"labels": {format!("ambient-code.io/{name}"): value}}});
    let edits = [
        label("session-id", json!("mine")),
        label("managed-by", Value::Null),
        label("project-id", json!("mine")),
        json!({"metadata": {"ownerReferences": null}}),
        json!({"data": {"api-token": "bWluZQ=="}}),
        json!({"metadata": {"annotations": {"ambient-code.io/session-id": "mine"}}}),
    ];
    let account = session.path("serviceaccounts", "-sa");
    let service = session.path("services", "");
    let mut made = 0;
    for round in 0..5 {
        for edit in &edits {
            for path in [&session.pod(), &session.secret(), &account, &service] {
                site.ask(Method::PATCH, path, Some(edit)).await;
                made += 1;
            }
        }
        for path in [&session.secret(), &service] {
            if round % 2 == 1 {
                site.ask(Method::DELETE, path, None).await;
                made += 1;
            }
        }
    }

    until_whole(&session).await;
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut wrong = Vec::new();
        for path in [
            session.pod(),
            session.secret(),
            account.clone(),
            service.clone(),
        ] {
            let object = site.get(&path).await.unwrap_or_default();
            let labels = &object["metadata"]["labels"];
            let is_right = labels["ambient-code.io/session-id"] == session.id.as_str()
                && labels["ambient-code.io/project-id"] == site.project.as_str()
                && labels["ambient-code.io/managed-by"] == "ambient-control-plane"
                && object["data"]["api-token"] != "bWluZQ==";
            if !is_right {
                wrong.push(object);
            }
        }
        if wrong.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "{wrong:#?}");
        sleep(Duration::from_millis(50)).await;
    }
    session.is_whole().await;
    session.until_phase("Running").await;
    let now = site.get(&session.pod()).await.unwrap();
    assert_eq!(now["metadata"]["uid"], pod["metadata"]["uid"]);
    let calls = site.asked();
    let ours = calls[from..]
        .iter()
        .filter(|(asked, _)| asked.verb != "watch");
    let ours = ours.filter(|(asked, _)| asked.resource != "leases").count();
    assert!(ours < 3 * made, "{ours} calls after {made} edits");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_happened_while_no_program_ran_is_made_good_at_its_start() {
    let (site, mut program) = started("fault-asleep").await;
    let mut sessions = Vec::new();
    for _ in 0..7 {
        sessions.push(running(&site).await);
    }
    let [deleted, gone, stopped, ended, secretless, ownerless, hidden] = sessions.as_slice() else {
        unreachable!("as many as were made");
    };
    let pods = async |session: &Session<'_>| site.get(&session.pod()).await.unwrap();
    let hidden_before = pods(hidden).await;
    site.kill(&mut program).await;

    deleted.delete().await;
    // Its pod is gone too: only the rest is left.
    gone.delete().await;
    let at_once = json!({"gracePeriodSeconds": 0});
    let finished = site.ask(Method::DELETE, &gone.pod(), Some(&at_once)).await;
    assert_eq!(finished.0, 200);
    stopped.post("stop").await;
    ended.ends(0).await;
    site.ask(Method::DELETE, &secretless.secret(), None).await;
    let nobodys = json!({"metadata": {"ownerReferences": null}});
    for path in [ownerless.pod(), ownerless.path("services", "")] {
        site.ask(Method::PATCH, &path, Some(&nobodys)).await;
    }
    let unlabelled = json!({"metadata": {"labels": {"ambient-code.io/managed-by": null}}});
    for path in [hidden.pod(), hidden.path("services", "")] {
        site.ask(Method::PATCH, &path, Some(&unlabelled)).await;
    }
    let new = site.create().await;
    let short = site.create().await;
    short.delete().await;

    let _program = site.program().start();

    for session in [deleted, gone] {
        session.finishes().await;
        session.is_gone().await;
    }
    stopped.finishes().await;
    stopped.until_phase("Stopped").await;
    ended.until_phase("Completed").await;
    new.runs(0).await;
    new.until_phase("Running").await;
    for session in [secretless, ownerless, hidden, &new] {
        until_whole(session).await;
        session.is_whole().await;
        session.until_phase("Running").await;
    }
    let path = hidden.pod();
    let mended = site.wait_for(&path, |it| {
        it["metadata"]["labels"]["ambient-code.io/managed-by"] == "ambient-control-plane"
    });
    let mended = mended.await;
    assert_eq!(mended["metadata"]["uid"], hidden_before["metadata"]["uid"]);
    short.is_gone().await;
}
