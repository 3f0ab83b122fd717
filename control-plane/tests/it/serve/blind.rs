//! A replica that cannot read its keys while they are rotated. The runner is played.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use ambient_shared::{exchange::ExchangeError, token::Token};
use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
    kube_proxy::{KubeProxy, asked, refusal},
    programs::Running,
    proxy::{Call, Fault},
};
use jsonwebtoken::{decode_header, jwk::JwkSet};
use nix::sys::signal::Signal;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::rotation::verify;
use crate::{
    faults::site::{KEYS, Session, Site},
    permissions,
};

/// Life of tokens.
const LIFE: Duration = Duration::from_secs(4);

/// Three of them: longer than a rotation takes that waits for nobody.
const A_WHILE: Duration = Duration::from_secs(12);

const LOOK: Duration = Duration::from_millis(100);

/// Where one leads and one stands by, whose calls to Kubernetes can be made to fail.
struct Scene {
    site: Site,
    leads_at: SocketAddr,
    kube: KubeProxy,
    other_at: SocketAddr,
}

impl Scene {
    /// With who leads, and the other.
    async fn start(name: &str) -> (Self, [Running; 2]) {
        let cluster = Cluster::shared();
        permissions::grant(cluster);
        let site = Site::bare(cluster, name).await;
        let kube = KubeProxy::start(cluster).await;
        let program = |replica: &str| {
            let program = site.program().env("HOSTNAME", replica);
            program
                .env("CP_KEY_ROTATION_WAIT", "1s")
                .env("CP_TOKEN_TTL", format!("{}s", LIFE.as_secs()))
                .env("CP_RATE_LIMITS", "off")
        };
        let mut leader = program("leader").start();
        let leads_at = leader.listening("endpoint").await;
        leader
            .log_line("it leads", |it| it["message"] == "leading")
            .await;
        let kubeconfig = kube.kubeconfig(cluster, CONTROL_PLANE);
        let mut other = program("other").env("KUBECONFIG", kubeconfig).start();
        let other_at = other.listening("endpoint").await;
        site.create_project().await;
        let scene = Self {
            site,
            leads_at,
            kube,
            other_at,
        };
        (scene, [leader, other])
    }

    async fn running(&self) -> Session<'_> {
        let session = self.site.create().await;
        session.runs(0).await;
        session.until_phase("Running").await;
        session
    }

    fn secret(&self, kind: &str) -> String {
        format!("/api/v1/namespaces/{}/secrets/{kind}", self.site.name)
    }

    /// Waits until the Secret of the signing keys has this annotation of a replica, or none.
    async fn until_said(&self, replica: &str, said: impl Fn(Option<&str>) -> bool) -> Value {
        let name = format!("replica.ambient-code.io/{replica}");
        let is_said = |it: &Value| said(it["metadata"]["annotations"][&name].as_str());
        self.site.wait_for(&self.secret(KEYS[2]), is_said).await
    }

    async fn rotate(&self, kind: &str) {
        let mut running = self.site.program().args(["keys", "rotate", kind]).start();
        let code = running.wait().await.code();
        assert_eq!(code, Some(0), "{:#?}", running.log());
    }

    async fn jwks(&self) -> JwkSet {
        let url = format!("http://{}/.well-known/jwks.json", self.leads_at);
        reqwest::get(url).await.unwrap().json().await.unwrap()
    }
}

fn reads(secret: &'static str) -> impl Fn(&Call) -> bool {
    move |call| {
        let asked = asked(call);
        (asked.verb, asked.name.as_str()) == ("get", secret)
    }
}

fn forbidden() -> Fault {
    Fault::Answer(refusal(403, "Forbidden", "secrets is forbidden"))
}

fn kid(token: &Token) -> String {
    decode_header(token.expose()).unwrap().kid.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_of_the_signing_key_waits_for_a_replica_that_cannot_read_it() {
    let (scene, [mut leader, mut other]) = Scene::start("serve-blind-sign").await;
    let session = scene.running().await;
    for replica in ["leader", "other"] {
        scene.until_said(replica, |said| said.is_some()).await;
    }
    let runner = session.exchange(scene.other_at).await;
    let old = kid(&runner.fetch().await.unwrap());
    let blind = scene.kube.inject(usize::MAX, reads(KEYS[2]), forbidden());

    scene.rotate("signing-key").await;
    let waits = |line: &Value| {
        let message = line["message"].as_str().unwrap_or_default();
        message.contains("a rotation waits until") && line.to_string().contains("/other")
    };
    leader.log_line("it waits", waits).await;
    let began = Instant::now();
    let mut handed_out = Vec::new();
    while began.elapsed() < A_WHILE {
        let token = runner.fetch().await.unwrap();
        assert_eq!(kid(&token), old);
        handed_out.push(token);
        let jwks = scene.jwks().await;
        assert_eq!(jwks.keys.len(), 2);
        for token in &handed_out {
            verify(token, &jwks);
        }
        sleep(LOOK * 5).await;
    }

    drop(blind);
    // Tokens from both, and all good until they expire.
    let others = session.exchange(scene.leads_at).await;
    let deadline = Instant::now() + DEADLINE;
    loop {
        for replica in [&runner, &others] {
            handed_out.push(replica.fetch().await.unwrap());
        }
        let jwks = scene.jwks().await;
        for token in &handed_out {
            verify(token, &jwks);
        }
        let is_over = jwks.keys.len() == 1 && jwks.find(&old).is_none();
        if is_over {
            break;
        }
        assert!(Instant::now() < deadline, "not complete: {jwks:?}");
        sleep(LOOK).await;
    }
    assert_ne!(kid(&runner.fetch().await.unwrap()), old);

    // Who ends in order is waited for no more.
    other.signal(Signal::SIGTERM);
    assert_eq!(other.wait().await.code(), Some(0));
    scene.until_said("other", |said| said.is_none()).await;
    scene.until_said("leader", |said| said.is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_taken_for_gone_is_not_waited_for_again() {
    let (scene, [mut leader, mut other]) = Scene::start("serve-blind-gone").await;
    scene.until_said("other", |said| said.is_some()).await;
    other.kill().await;
    scene.rotate("signing-key").await;

    let gone = |line: &Value| {
        let message = line["message"].as_str().unwrap_or_default();
        message.contains("taken for gone") && line.to_string().contains("/other")
    };
    leader.log_line("it is taken for gone", gone).await;
    let done = |it: &Value| {
        let (data, said) = (&it["data"], &it["metadata"]["annotations"]);
        data["next-private.pem"].is_null()
            && data["previous-private.pem"].is_null()
            && said["replica.ambient-code.io/other"].is_null()
    };
    scene.site.wait_for(&scene.secret(KEYS[2]), done).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crowd_of_killed_replicas_has_said_is_forgotten() {
    let (scene, [_leader, mut other]) = Scene::start("serve-blind-crowd").await;
    scene.until_said("other", |said| said.is_some()).await;
    other.kill().await;
    let killed = (0..100).map(|it| format!("replica.ambient-code.io/killed-{it}"));
    let said: BTreeMap<_, _> = killed.map(|it| (it, "some-key")).collect();
    let patch = json!({"metadata": {"annotations": said}});
    let secret = scene.secret(KEYS[2]);
    let (status, _) = Cluster::shared().request("PATCH", &secret, Some(&patch));
    assert_eq!(status, 200);

    let mut third = scene.site.program().env("HOSTNAME", "third").start();
    third.listening("endpoint").await;
    let names = |secret: &Value| -> Vec<String> {
        let all = secret["metadata"]["annotations"].as_object();
        let names = all.into_iter().flatten();
        let of_replicas =
            names.filter_map(|(name, _)| name.strip_prefix("replica.ambient-code.io/"));
        of_replicas.map(ToOwned::to_owned).collect()
    };
    // Who lives says it again.
    let is_rid = |secret: &Value| names(secret) == ["leader", "third"];
    scene.site.wait_for(&secret, is_rid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_cannot_read_its_keys_sends_who_has_newer_ones_elsewhere() {
    let (scene, _programs) = Scene::start("serve-blind-pair").await;
    let old = scene.running().await;
    let with_old = old.exchange(scene.other_at).await;
    let blind = scene.kube.inject(usize::MAX, reads(KEYS[0]), forbidden());
    scene.rotate("keypair").await;
    let annotation = "ambient-code.io/token-keypair";
    let before = scene.site.get(&old.pod()).await.unwrap();
    let deadline = Instant::now() + DEADLINE;
    let new = loop {
        let new = scene.running().await;
        let pod = scene.site.get(&new.pod()).await.unwrap();
        let of = |pod: &Value| pod["metadata"]["annotations"][annotation].clone();
        if of(&pod) != of(&before) {
            break new;
        }
        assert!(Instant::now() < deadline, "nobody has the new key");
    };

    let with_new = new.exchange(scene.other_at).await;
    let mut refused = with_new.fetch().await.unwrap_err();
    // Its last reading was good, until the next.
    while matches!(&refused, ExchangeError::Refused { .. }) {
        assert!(Instant::now() < deadline, "{refused}");
        refused = with_new.fetch().await.unwrap_err();
    }
    let ExchangeError::Busy {
        status,
        retry_after,
        ..
    } = refused
    else {
        panic!("{refused}");
    };
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(retry_after.is_some());
    with_old.fetch().await.expect("a token");
    let elsewhere = new.exchange(scene.leads_at).await;
    elsewhere.fetch().await.expect("a token");

    drop(blind);
    while with_new.fetch().await.is_err() {
        assert!(Instant::now() < deadline, "no token");
        sleep(LOOK).await;
    }
    with_old.fetch().await.expect("a token");
}
