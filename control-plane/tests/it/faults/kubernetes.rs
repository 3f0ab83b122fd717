//! The API server of Kubernetes goes away, hangs and forgets; what happens while nobody looks.

use std::time::Duration;

use ambient_shared::clock::Clock;
use ambient_testing::{
    DEADLINE,
    cluster::{Cluster, ClusterOptions},
    kube_proxy::{Asked, asked, expired},
    programs::Running,
    proxy::{Call, Fault},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    fresh::{LOOK, pushed, stay_fresh},
    site::{Session, Site},
};
use crate::permissions;

/// How long kube-apiserver is away: several times the time of the Lease, and longer than any single
/// call waits.
const AWAY: Duration = Duration::from_secs(30);

/// How long it hangs: long enough for the Lease to be lost.
const HANGS: Duration = Duration::from_secs(8);

/// The life of tokens while it is away: several pass meanwhile.
const LIFE: &str = "9s";

/// A site with a project, and the program that runs.
pub(super) async fn started(name: &str) -> (Site, Running) {
    let site = Site::new(name).await;
    let program = site.program().start();
    site.create_project().await;
    (site, program)
}

/// A session that runs.
pub(super) async fn running(site: &Site) -> Session<'_> {
    let session = site.create().await;
    session.runs(0).await;
    session.until_phase("Running").await;
    session
}

/// Whether a call is such a one, about this kind of object in the site's project.
pub(super) fn about(
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
pub(super) fn count(site: &Site, which: impl Fn(&Asked) -> bool) -> usize {
    site.asked()
        .iter()
        .filter(|(asked, _)| which(asked))
        .count()
}

pub(super) async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not seen: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until a session has all that it should, each owned by its `ServiceAccount`.
pub(super) async fn until_whole(session: &Session<'_>) {
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
async fn sessions_outlast_a_kubernetes_that_is_away_or_hangs() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    permissions::grant_for(&cluster, &permissions::usual());
    let site = Site::on(&cluster, "fault-away").await;
    let program = site.program().env("CP_LEASE_DURATION", "6s");
    let mut program = program.env("CP_TOKEN_TTL", LIFE).start();
    let endpoint = program.listening("endpoint").await;
    site.create_project().await;
    let stays = running(&site).await;
    let pod = site.get(&stays.pod()).await.unwrap();

    for (hangs, time) in [(false, AWAY), (true, HANGS)] {
        let (stopped, deleted) = (running(&site).await, running(&site).await);
        let exchange = stays.exchange(endpoint).await;
        if hangs {
            cluster.freeze_api_server();
        } else {
            cluster.stop_api_server();
        }
        let began = Instant::now();
        let mut new = vec![site.create().await];
        stopped.post("stop").await;
        deleted.delete().await;
        while began.elapsed() < time {
            let asked_at = Clock::system().now();
            let token = exchange.fetch().await.expect("a token");
            assert!(!token.is_expired(asked_at), "{token:?}");
            if new.len() == 1 && began.elapsed() > time / 2 {
                new.push(site.create().await);
            }
            sleep(Duration::from_millis(500)).await;
        }
        stays.until_phase("Running").await;
        if hangs {
            cluster.thaw_api_server();
        } else {
            cluster.start_api_server();
        }

        for session in &new {
            session.runs(0).await;
            session.until_phase("Running").await;
            session.is_whole().await;
        }
        stopped.finishes().await;
        stopped.until_phase("Stopped").await;
        deleted.finishes().await;
        deleted.is_gone().await;
        for session in &new {
            session.ends(0).await;
            session.until_phase("Completed").await;
        }
        let now = site.get(&stays.pod()).await.unwrap();
        assert_eq!(now["metadata"]["uid"], pod["metadata"]["uid"]);
        stays.is_whole().await;
        assert_eq!(site.get(&stopped.pod()).await, None);
        // Those that were pushed could not be renewed meanwhile.
        let deadline = Instant::now() + DEADLINE;
        while pushed(&stays).await.is_expired(Clock::system().now()) {
            assert!(Instant::now() < deadline, "no new token is pushed");
            sleep(LOOK).await;
        }
        stay_fresh(&stays, endpoint, Duration::ZERO).await;
        stays.until_phase("Running").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_namespace_that_no_watch_has_told_of_yet_has_lost_nothing() {
    let site = Site::new("fault-unheard").await;
    let level = "info,ambient_control_plane=debug";
    let mut program = site.program().env("LOG_LEVEL", level).start();
    let watches = |call: &Call| {
        let asked = asked(call);
        (asked.verb, asked.resource.as_str()) == ("watch", "namespaces")
    };
    until("namespaces are watched", || site.kube.streams(watches) > 0).await;
    let gap = site.kube.inject(usize::MAX, watches, Fault::Silent);
    site.create_project().await;

    running(&site).await;

    let found =
        |line: &Value| line["message"] == "a namespace was found before its watch told of it";
    program.log_line("it was found by its name", found).await;
    let path = format!("/api/v1/namespaces/{}", site.project);
    let namespace = site.get(&path).await.unwrap();
    assert_eq!(
        namespace["metadata"]["labels"]["ambient-code.io/managed"],
        "true"
    );
    let log = program.log();
    let lost = |line: &String| line.contains("has lost our labels");
    assert!(!log.iter().any(lost), "{log:#?}");
    drop(gap);
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
