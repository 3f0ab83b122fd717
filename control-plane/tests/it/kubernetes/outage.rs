//! The API server of Kubernetes goes away and comes back, or seems to be there and says nothing.

use ambient_testing::{
    cluster::ClusterOptions,
    kube_proxy::{KubeProxy, asked, expired},
    proxy::{Call, Fault},
};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_happens_after_kubernetes_was_away_is_seen() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    permissions::grant_for(&cluster, &permissions::usual());
    let work = Work::start(&cluster, settings("outage"), &Sessions::default()).await;
    let session = run("outage-session", "outage-team");
    work.started(&session).await;
    bind(&cluster, &session);
    set_status(&cluster, &session, running());
    work.until_run(&session, "it runs", is_running).await;
    let times = work.backend.token_times(&session.id);

    cluster.stop_api_server();

    // What was seen last counts.
    let next = credentials(&session.id, 1800);
    let written = work.backend.write_token(&session.id, &next).await;
    assert!(
        matches!(written, Err(BackendError::Failed { .. })),
        "{written:?}"
    );
    assert!(is_running(&work.state(&session).unwrap().status));
    assert_eq!(work.backend.token_times(&session.id), times);

    cluster.start_api_server();

    let writing = async {
        while work.backend.write_token(&session.id, &next).await.is_err() {
            sleep(AGAIN).await;
        }
    };
    timeout(DEADLINE, writing).await.expect("it is written");
    set_status(&cluster, &session, ended(3, "Error", ""));
    let has_ended = |status: &RunStatus| matches!(status, RunStatus::Ended { .. });
    work.until_run(&session, "it has ended", has_ended).await;
    work.started(&run("outage-next", "outage-team")).await;
    work.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_happens_while_a_watch_is_open_and_dead_is_seen_when_it_should_have_ended() {
    let cluster = shared();
    let proxy = KubeProxy::start(cluster).await;
    let access = Access {
        kubeconfig: proxy.kubeconfig(cluster, CONTROL_PLANE),
        times: WatchTimes {
            asked: 2,
            margin: Duration::from_secs(1),
        },
    };
    let work = Work::start(access, settings("dead"), &Sessions::default()).await;
    let session = run("dead-session", "dead-team");
    work.started(&session).await;
    bind(cluster, &session);
    set_status(cluster, &session, running());
    work.until_run(&session, "it runs", is_running).await;

    // The streams that are open now never say a word again, nor do they end.
    let is_watch = |call: &Call| {
        let asked = asked(call);
        asked.verb == "watch" && asked.namespace == "dead-team"
    };
    let dead = proxy.streams(is_watch);
    assert!(dead >= 1, "{dead} watches");
    drop(proxy.inject(usize::MAX, is_watch, Fault::Silent));
    let began = tokio::time::Instant::now();
    set_status(cluster, &session, ended(3, "Error", ""));
    let secret = path(&session, "secrets", "-creds");
    assert_eq!(cluster.request("DELETE", &secret, None).0, 200);

    let has_ended = |status: &RunStatus| matches!(status, RunStatus::Ended { .. });
    work.until_run(&session, "it has ended", has_ended).await;
    let is_lost = || work.backend.token_times(&session.id).is_none();
    work.until("the Secret is gone", is_lost).await;
    // Long before its usual time, with room for a slow machine.
    let took = began.elapsed();
    assert!(took < Duration::from_secs(60), "{took:?}");
    work.stop().await;
}

#[tokio::test]
async fn a_write_of_a_token_that_hangs_is_given_up_in_time_and_told() {
    let cluster = shared();
    let proxy = KubeProxy::start(cluster).await;
    let access = Access {
        kubeconfig: proxy.kubeconfig(cluster, CONTROL_PLANE),
        times: WatchTimes::default(),
    };
    let work = Work::start(access, settings("hanging"), &Sessions::default()).await;
    let session = run("hanging-session", "hanging-team");
    work.started(&session).await;
    let is_write = |call: &Call| {
        let asked = asked(call);
        (asked.verb, asked.resource.as_str()) == ("patch", "secrets")
    };
    let _hang = proxy.inject(usize::MAX, is_write, Fault::Hang);

    // What hangs takes no part in the time that passes.
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    let next = credentials(&session.id, 1800);
    let written = work.backend.write_token(&session.id, &next).await;
    let took = began.elapsed();
    tokio::time::resume();

    assert!(
        matches!(written, Err(BackendError::Failed { .. })),
        "{written:?}"
    );
    // The refresh would have cut it off by then, and nobody would be told.
    assert!(took < Duration::from_secs(22), "{took:?}");
    let events = "/apis/events.k8s.io/v1/namespaces/hanging-team/events";
    let is_told = || {
        let events = cluster.get(events).unwrap();
        let events = events["items"].as_array().unwrap().iter();
        events
            .into_iter()
            .any(|it| it["reason"] == "TokenRefreshFailed")
    };
    work.until("it is told", is_told).await;
    work.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_pod_that_goes_while_nobody_watches_is_gone_for_replicas_that_do_not_lead_too() {
    let cluster = shared();
    let proxy = KubeProxy::start(cluster).await;
    let access = Access {
        kubeconfig: proxy.kubeconfig(cluster, CONTROL_PLANE),
        times: WatchTimes::default(),
    };
    let work = Work::start(access, settings("unwatched"), &Sessions::default()).await;
    let session = run("unwatched-session", "unwatched-team");
    work.started(&session).await;
    bind(cluster, &session);
    set_status(cluster, &session, running());
    work.until_run(&session, "it runs", is_running).await;
    work.leading.cancel();

    // From now on there are lists only.
    let is_watch = |call: &Call| {
        let asked = asked(call);
        asked.verb == "watch" && asked.resource == "pods" && asked.namespace == "unwatched-team"
    };
    let _unwatched = proxy.inject(usize::MAX, is_watch, Fault::Answer(expired()));
    assert_eq!(proxy.end_streams(is_watch, ""), 1);
    cluster.finish_pod(&session.project, &name(&session, "-runner"));

    let is_gone = |status: &RunStatus| was_killed(status, "PodDeleted");
    work.until_run(&session, "it is gone", is_gone).await;
    work.stop().await;
}
