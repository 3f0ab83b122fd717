//! Two replicas, of which one leads.

use std::{future::ready, time::Duration};

use ambient_shared::{
    bearer::PublicKey, clock::Clock, exchange::Exchange, proof::SessionKey, session::SessionId,
};
use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
    kube_proxy::{KubeProxy, asked},
    programs::Running,
    proxy::{Call, Fault, Proxy, Upstream},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::StatusCode;
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep, timeout};

use super::site::{Session, Site};

/// A lease that tests can wait for.
const LEASE: Duration = Duration::from_secs(4);

/// One replica, and proxies of its own, which know what it alone has asked.
struct Replica {
    program: Running,
    kube: KubeProxy,
    grpc: Proxy,
    admin: String,
    endpoint: String,
}

impl Replica {
    async fn start(site: &Site, lease: &str) -> Self {
        let kube = KubeProxy::start(Cluster::shared()).await;
        let grpc = Proxy::start(&Upstream::Grpc(site.api.grpc)).await;
        let kubeconfig = kube.kubeconfig(Cluster::shared(), CONTROL_PLANE);
        let mut program = site
            .program()
            .env("KUBECONFIG", kubeconfig)
            .env("AMBIENT_GRPC_SERVER_ADDR", grpc.address().to_string())
            .env("CP_LEASE_DURATION", lease)
            .start();
        let admin = format!("http://{}", program.listening("admin").await);
        let endpoint = format!("http://{}/token", program.listening("endpoint").await);
        let replica = Self {
            program,
            kube,
            grpc,
            admin,
            endpoint,
        };
        until("ready", || replica.is_ready()).await;
        replica
    }

    async fn is_ready(&self) -> bool {
        let answer = reqwest::get(format!("{}/readyz", self.admin)).await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    async fn leads(&self) -> bool {
        let Ok(answer) = reqwest::get(format!("{}/metrics", self.admin)).await else {
            return false;
        };
        let metrics = answer.text().await.unwrap_or_default();
        metrics
            .lines()
            .any(|line| line == "ambient_control_plane_leader 1")
    }

    /// What it has written for sessions so far: to Kubernetes, and to the API server.
    fn writes(&self) -> usize {
        let of_sessions = |call: &&Call| {
            let asked = asked(call);
            asked.is_write() && asked.resource != "leases"
        };
        let statuses = |call: &&Call| call.path.ends_with("UpdateSessionStatus");
        let (kubernetes, api) = (self.kube.calls(), self.grpc.calls());
        kubernetes.iter().filter(of_sessions).count() + api.iter().filter(statuses).count()
    }
}

fn makes_pod(call: &Call) -> bool {
    let asked = asked(call);
    asked.verb == "create" && asked.resource == "pods" && asked.subresource.is_empty()
}

fn watches_pods(call: &Call) -> bool {
    let asked = asked(call);
    asked.verb == "watch" && asked.resource == "pods"
}

async fn until<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let reached = async {
        while !is_so().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let reached = timeout(DEADLINE, reached).await;
    assert!(reached.is_ok(), "not {what} in time");
}

/// The token that this replica gives the session.
async fn token(session: &Session<'_>, replica: &Replica) -> String {
    let site = session.site;
    let secret = |object: serde_json::Value, key: &str| {
        let data = object["data"][key].as_str().unwrap();
        String::from_utf8(STANDARD.decode(data).unwrap()).unwrap()
    };
    let path = format!(
        "/api/v1/namespaces/{}/secrets/ambient-cp-token-keypair",
        site.name
    );
    let public = secret(site.get(&path).await.unwrap(), "public.pem");
    let key = secret(site.get(&session.secret()).await.unwrap(), "session-key");
    let id = SessionId::parse(session.id.clone()).unwrap();
    let exchange = Exchange::new(
        reqwest::Client::new(),
        replica.endpoint.parse().unwrap(),
        PublicKey::from_pem(&public).unwrap().encrypt(&id).unwrap(),
        SessionKey::from_text(&key),
        Clock::system(),
    );
    exchange.fetch().await.unwrap().expose().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_hands_over_at_once_and_all_replicas_serve_tokens() {
    let site = Site::new("lead-clean").await;
    let mut first = Replica::start(&site, "15s").await;
    until("leading", || first.leads()).await;
    let second = Replica::start(&site, "15s").await;
    site.create_project().await;
    let session = site.create().await;
    session.runs(0).await;
    session.until_phase("Running").await;
    assert!(!second.leads().await);
    assert!(!token(&session, &first).await.is_empty());
    assert!(!token(&session, &second).await.is_empty());
    assert_eq!(second.writes(), 0);

    first.program.signal(Signal::SIGTERM);
    let stopped = Instant::now();
    until("leading", || second.leads()).await;
    let took = stopped.elapsed();
    assert!(took < Duration::from_secs(5), "hand-over took {took:?}");
    assert_eq!(first.program.wait().await.code(), Some(0));
    session.ends(0).await;
    session.until_phase("Completed").await;
    let other = site.create().await;
    other.runs(0).await;
    other.until_phase("Running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_followed_within_the_lease() {
    let site = Site::new("lead-killed").await;
    let mut first = Replica::start(&site, "4s").await;
    until("leading", || first.leads()).await;
    let second = Replica::start(&site, "4s").await;
    site.create_project().await;
    let session = site.create().await;
    session.runs(0).await;
    session.until_phase("Running").await;

    first.program.kill().await;
    let killed = Instant::now();
    until("leading", || second.leads()).await;
    let took = killed.elapsed();
    assert!(took < LEASE + Duration::from_millis(500), "took {took:?}");
    session.delete().await;
    session.finishes().await;
    session.is_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_stopped_as_it_takes_the_lease_gives_it_up() {
    let site = Site::new("lead-unsure").await;
    let mut leader = Replica::start(&site, "4s").await;
    until("leading", || leader.leads()).await;
    let mut other = Replica::start(&site, "4s").await;
    // It takes the Lease, and is not told so.
    let takes = |call: &Call| {
        let asked = asked(call);
        asked.is_write() && asked.resource == "leases"
    };
    let lost = other.kube.inject(1, takes, Fault::Lost);
    leader.program.kill().await;
    until("taken", || ready(lost.hits() == 1)).await;

    other.program.signal(Signal::SIGTERM);
    assert_eq!(other.program.wait().await.code(), Some(0));
    let path = format!(
        "/apis/coordination.k8s.io/v1/namespaces/{}/leases/ambient-control-plane",
        site.name
    );
    let left = site.get(&path).await.unwrap();
    let holder = left["spec"]["holderIdentity"].as_str().unwrap_or_default();
    assert_eq!(holder, "", "{left:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_was_frozen_and_comes_back_does_no_harm() {
    let site = Site::new("lead-frozen").await;
    let first = Replica::start(&site, "4s").await;
    until("leading", || first.leads()).await;
    let second = Replica::start(&site, "4s").await;
    site.create_project().await;
    let running = site.create().await;
    running.runs(0).await;
    running.until_phase("Running").await;

    // Its last write before it freezes arrives only after the other has made the pod.
    let held = first.kube.inject(1, makes_pod, Fault::Late(LEASE * 3 / 2));
    let begun = site.create().await;
    until("held", || ready(held.hits() == 1)).await;
    first.program.signal(Signal::SIGSTOP);
    until("leading", || second.leads()).await;
    let made = begun.runs(0).await;
    begun.until_phase("Running").await;
    until("arrived late", || {
        let calls = first.kube.calls();
        let refused = |call: &Call| makes_pod(call) && call.answered == Some(StatusCode::CONFLICT);
        ready(calls.iter().any(refused))
    })
    .await;

    let before = first.writes();
    first.program.signal(Signal::SIGCONT);
    until("standby", || async { !first.leads().await }).await;
    let later = site.create().await;
    later.runs(0).await;
    later.until_phase("Running").await;
    running.delete().await;
    running.finishes().await;
    running.is_gone().await;

    assert_eq!(first.writes(), before, "{:#?}", first.kube.calls());
    assert!(second.leads().await);
    let pod = site.get(&begun.pod()).await.unwrap();
    assert_eq!(pod["metadata"]["uid"], made["metadata"]["uid"]);
    begun.is_whole().await;
    begun.until_phase("Running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_whose_watch_is_dead_takes_no_session_for_lost() {
    let site = Site::new("lead-blind").await;
    let mut first = Replica::start(&site, "4s").await;
    until("leading", || first.leads()).await;
    site.create_project().await;
    let seen = site.create().await;
    seen.bound(0).await;
    let second = Replica::start(&site, "4s").await;
    // It has listed what there is, and hears of nothing that comes.
    let project = site.project.clone();
    let watches_project = move |call: &Call| watches_pods(call) && call.path.contains(&project);
    until("watching", || {
        ready(second.kube.streams(&watches_project) > 0)
    })
    .await;
    let dead = second.kube.inject(usize::MAX, watches_pods, Fault::Silent);
    let unseen = site.create().await;
    unseen.runs(0).await;
    unseen.until_phase("Running").await;

    first.program.kill().await;
    until("leading", || second.leads()).await;
    // It has asked for the pod that no watch has shown.
    until("asked for", || {
        let asks = |call: &Call| {
            let asked = asked(call);
            asked.verb == "get" && asked.resource == "pods"
        };
        ready(second.kube.calls().iter().any(asks))
    })
    .await;
    drop(dead);
    second.kube.end_streams(watches_pods, "");
    unseen.delete().await;
    unseen.finishes().await;
    unseen.is_gone().await;
    let lost = |line: &String| line.contains("RunnerLost");
    assert!(!second.program.log().iter().any(lost));
}
