//! The API server of Kubernetes goes away and comes back.

use ambient_testing::cluster::ClusterOptions;

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
