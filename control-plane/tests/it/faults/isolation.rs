//! Nobody waits for somebody else's trouble: calls that hang for one project, a refresh that hangs,
//! starts that hang, a project whose sessions all fail.

use std::time::Duration;

use ambient_testing::{
    DEADLINE,
    kube_proxy::{Asked, asked},
    proxy::{Call, Fault, Injected},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::site::{KEYS, Session, Site};
use crate::scene::{Plan, Scene};

/// Within this, others are served. A call that hangs is given up after a minute, so who waits
/// behind one waits longer.
const SOON: Duration = Duration::from_secs(10);

/// More sessions than any kind of work has places for one project.
const MANY: usize = 10;

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not seen: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// So many sessions of a project.
async fn many<'a>(site: &'a Site, project: &str, count: usize) -> Vec<Session<'a>> {
    let mut sessions = Vec::new();
    for _ in 0..count {
        sessions.push(site.create_in(project).await);
    }
    sessions
}

async fn have_pods(sessions: &[Session<'_>]) {
    for session in sessions {
        session.site.wait_for(&session.pod(), |_| true).await;
    }
}

fn hang(site: &Site, which: impl Fn(&Asked) -> bool + Send + Sync + 'static) -> Injected {
    let hang = move |call: &_| which(&asked(call));
    site.kube.inject(usize::MAX, hang, Fault::Hang)
}

/// Whether a token is written that replaces one. Of starts, the Secret has another manager.
fn is_refresh(call: &Call) -> bool {
    let of = asked(call);
    (of.verb, of.resource.as_str()) == ("patch", "secrets")
        && call.query.contains("ambient-control-plane-refresh")
}

/// When the token in a session's Secret was issued.
async fn issued_at(session: &Session<'_>) -> Value {
    let secret = session.site.get(&session.secret()).await.unwrap();
    secret["metadata"]["annotations"]["ambient-code.io/token-issued-at"].clone()
}

/// A session of this project is started and ended without delay.
async fn lives_quickly(site: &Site, project: &str) {
    let began = Instant::now();
    let session = site.create_in(project).await;
    session.runs(0).await;
    assert!(
        began.elapsed() < SOON,
        "started after {:?}",
        began.elapsed()
    );
    session.until_phase("Running").await;
    assert!(began.elapsed() < SOON, "runs after {:?}", began.elapsed());

    let began = Instant::now();
    session.post("stop").await;
    session.finishes().await;
    session.until_phase("Stopped").await;
    session.delete().await;
    session.is_gone().await;
    assert!(began.elapsed() < SOON, "gone after {:?}", began.elapsed());
}

/// The session's token is replaced without delay.
async fn is_refreshed_quickly(session: &Session<'_>) {
    let (before, began) = (issued_at(session).await, Instant::now());
    while issued_at(session).await == before {
        assert!(began.elapsed() < SOON, "no new token");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_that_hang_for_one_project_delay_no_other() {
    let site = Site::new("fault-hang").await;
    // Each token is replaced every three seconds.
    let _program = site.program().env("CP_TOKEN_TTL", "9s").start();
    site.create_project().await;
    let other = "fault-hang-other";
    site.create_project_of(other).await;
    let deleted = many(&site, &site.project, MANY).await;
    let kept = many(&site, &site.project, MANY).await;
    let stays = site.create_in(other).await;
    stays.runs(0).await;
    have_pods(&deleted).await;
    have_pods(&kept).await;

    let project = site.project.clone();
    let hanging = hang(&site, move |asked| {
        asked.namespace == project && asked.verb != "watch"
    });
    for session in &deleted {
        session.delete().await;
    }
    let _new = many(&site, &site.project, MANY).await;
    let hung = |verb, resource| {
        let calls = site.asked().into_iter();
        let is_meant = move |(asked, answered): &(Asked, Option<u16>)| {
            answered.is_none() && (asked.verb, asked.resource.as_str()) == (verb, resource)
        };
        calls.filter(is_meant).count()
    };
    // Half of the places of each kind of work.
    until("starts hang", || hung("create", "serviceaccounts") >= 8).await;
    until("ends hang", || hung("delete", "pods") >= 4).await;
    until("the refresh hangs", || hung("patch", "secrets") >= 8).await;

    for _ in 0..3 {
        lives_quickly(&site, other).await;
        is_refreshed_quickly(&stays).await;
    }

    assert!(hanging.hits() <= 8 + 4 + 8 + 8, "{hanging:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_refresh_that_hangs_delays_no_start_and_no_end() {
    let site = Site::new("fault-refresh").await;
    let _program = site.program().env("CP_TOKEN_TTL", "9s").start();
    let projects = ["fault-refresh-a", "fault-refresh-b", "fault-refresh-c"];
    let mut sessions = Vec::new();
    for project in projects {
        site.create_project_of(project).await;
        sessions.extend(many(&site, project, MANY).await);
    }
    have_pods(&sessions).await;

    let refresh = site.kube.inject(usize::MAX, is_refresh, Fault::Hang);
    until("the refresh hangs", || refresh.hits() >= 16).await;

    for project in projects {
        lives_quickly(&site, project).await;
    }
    assert_eq!(refresh.hits(), 16);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn starts_that_hang_delay_no_refresh_and_no_end() {
    let site = Site::new("fault-starts").await;
    let _program = site.program().env("CP_TOKEN_TTL", "9s").start();
    let projects = ["fault-starts-a", "fault-starts-b", "fault-starts-c"];
    let mut running = Vec::new();
    for project in projects {
        site.create_project_of(project).await;
        let session = site.create_in(project).await;
        session.runs(0).await;
        session.until_phase("Running").await;
        running.push(session);
    }

    let starts = hang(&site, |asked| {
        (asked.verb, asked.resource.as_str()) == ("create", "serviceaccounts")
    });
    for project in projects {
        many(&site, project, MANY).await;
    }
    until("starts hang", || starts.hits() >= 16).await;

    for session in &running {
        is_refreshed_quickly(session).await;
        let began = Instant::now();
        session.post("stop").await;
        session.finishes().await;
        session.until_phase("Stopped").await;
        assert!(began.elapsed() < SOON, "ended after {:?}", began.elapsed());
    }
    assert_eq!(starts.hits(), 16);
    // Sessions that wait can be deleted, too.
    let path = format!("/sessions/{}", running[0].id);
    site.rest(Method::DELETE, &path, None).await;
    running[0].is_gone().await;
}

/// Sessions whose tokens are all due at once.
const CROWD: usize = 200;

/// How long each of their writes takes: of all, with 16 at a time, several seconds.
const WRITE: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_refresh_of_very_many_tokens_delays_no_start() {
    let site = Site::new("fault-crowd").await;
    let _program = site.program().env("CP_REFRESH_INTERVAL", "1s").start();
    let projects = ["fault-crowd-a", "fault-crowd-b", "fault-crowd-c"];
    for project in projects {
        site.create_project_of(project).await;
    }
    let crowd = projects.iter().cycle().take(CROWD);
    let crowd = stream::iter(crowd).map(|project| site.create_in(project));
    let start = async |session: Session<'_>| drop(session.runs(0).await);
    crowd
        .buffer_unordered(8)
        .for_each_concurrent(8, start)
        .await;

    let late = site.kube.inject(usize::MAX, is_refresh, Fault::Late(WRITE));
    // Each session's key is of a root that is old now.
    let path = format!("/api/v1/namespaces/{}/secrets/{}", site.name, KEYS[1]);
    let before = site.get(&path).await.unwrap();
    let roots = json!({"data": {
        "previous-root": before["data"]["root"], "root": STANDARD.encode([8; 32]),
    }});
    let rotated = site.ask(Method::PATCH, &path, Some(&roots)).await;
    assert_eq!(rotated.0, 200, "{}", rotated.1);
    until("the refresh has begun", || late.hits() > 0).await;
    for project in projects {
        let began = Instant::now();
        let session = site.create_in(project).await;
        site.wait_for(&session.pod(), |_| true).await;
        let took = began.elapsed();
        assert!(took < SOON, "its pod was made after {took:?}");
    }

    let begun = late.hits();
    assert!(begun < CROWD, "{begun} of {CROWD} are written");
    until("all are written", || late.hits() >= CROWD).await;
}

/// One project with ten thousand sessions that all fail to start, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_project_whose_sessions_all_fail_delays_no_other() {
    const FAILING: usize = 10_000;
    let name = |number: usize| format!("failing-{number:05}");
    let scene = Scene::start(Plan::default(), |api, backend| {
        for number in 0..FAILING {
            api.create(&name(number), |it| {
                it.project_id = Some("failing".to_owned());
            });
            backend.fail_starts(&name(number), usize::MAX);
        }
    })
    .await;
    scene
        .until("sessions fail", |scene| scene.backend.failed_starts() > 100)
        .await;

    for number in 0..10 {
        let session = format!("good-{number:05}");
        let began = Instant::now();
        scene
            .api
            .create(&session, |it| it.project_id = Some("good".to_owned()));
        scene.until_phase(&session, "Running").await;
        let took = began.elapsed();
        assert!(took < SOON, "runs after {took:?}");
    }
    scene.stop().await;
}
