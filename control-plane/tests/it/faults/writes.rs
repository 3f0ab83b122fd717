//! Writes that Kubernetes refuses, and others who write at the same time as we do.

use ambient_testing::{
    DEADLINE,
    kube_proxy::{conflict, refusal, too_busy},
    proxy::Fault,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant, sleep};

use super::{
    fresh::pushed,
    kubernetes::{about, running, started, until, until_whole},
};

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
async fn a_token_that_is_written_late_for_the_run_before_is_replaced() {
    let (site, _program) = started("fault-late-token").await;
    let session = running(&site).await;
    let held = site
        .kube
        .inject(1, about(&site, "patch", "secrets"), Fault::Held);
    // What somebody else edited is written anew.
    let edit = json!({"metadata": {"annotations": {"ambient-code.io/token-issued-at": "now"}}});
    let secret = session.secret();
    let (status, _) = site.ask(Method::PATCH, &secret, Some(&edit)).await;
    assert_eq!(status, 200);
    until("the token is about to be written", || held.hits() == 1).await;

    session.post("stop").await;
    session.finishes().await;
    session.until_phase("Stopped").await;
    session.post("start").await;
    session.runs(1).await;
    let of_run = |it: &Value| it["metadata"]["annotations"]["ambient-code.io/generation"].clone();
    let secret = site.wait_for(&session.secret(), |_| true).await;
    assert_eq!(of_run(&secret), "1");
    let version = secret["metadata"]["resourceVersion"].clone();
    drop(held);

    let is_written = |it: &Value| it["metadata"]["resourceVersion"] != version;
    site.wait_for(&session.secret(), is_written).await;
    site.wait_for(&session.secret(), |it| of_run(it) == "1")
        .await;
    let token = pushed(&session).await;
    let claims = token.expose().split('.').nth(1).unwrap();
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    assert_eq!(claims["gen"], 1);
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
