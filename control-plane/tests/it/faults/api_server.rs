//! The API server of the sessions goes away, fails, hangs, and shifts its pages while they are read.

use std::{net::SocketAddr, time::Duration};

use ambient_testing::{
    DEADLINE,
    faults::{Mode, Relay},
    kube_proxy::{asked, refusal},
    programs::Running,
    proxy::{Answer, Call, Fault, Proxy, Upstream},
};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    fresh::{pushed, running, stay_fresh},
    site::{Session, Site},
};

/// Life of tokens, short enough that several pass while a server is away.
const LIFE: Duration = Duration::from_secs(4);

/// How long a server is away: three lives of a token.
const AWAY: Duration = Duration::from_secs(12);

/// How often is looked for what nothing announces.
const LOOK: Duration = Duration::from_millis(100);

/// What is between the program and the API server.
struct Relays([Relay; 2]);

impl Relays {
    async fn start(site: &Site) -> Self {
        Self([
            Relay::start(site.api.rest).await,
            Relay::start(site.api.grpc).await,
        ])
    }

    /// The program, with an API server that it reaches through here.
    fn start_program(&self, site: &Site) -> Running {
        let [rest, grpc] = self.0.each_ref().map(Relay::address);
        let program = site.program();
        program
            .env("AMBIENT_API_SERVER_URL", format!("http://{rest}"))
            .env("AMBIENT_GRPC_SERVER_ADDR", grpc.to_string())
            .env("CP_TOKEN_TTL", format!("{}s", LIFE.as_secs()))
            .env("CP_RATE_LIMITS", "off")
            .start()
    }

    /// Nothing listens there any more.
    async fn take_away(&self) {
        for relay in &self.0 {
            relay.set(Mode::Refuse).await;
            relay.reset();
        }
    }

    async fn bring_back(&self) {
        for relay in &self.0 {
            relay.set(Mode::Pass).await;
        }
    }
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not seen: {what}");
        sleep(LOOK).await;
    }
}

/// Status and text of a page of the program's.
async fn page(admin: SocketAddr, path: &str) -> (u16, String) {
    let answer = reqwest::get(format!("http://{admin}{path}")).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn until_ready(admin: SocketAddr) {
    let deadline = Instant::now() + DEADLINE;
    while page(admin, "/readyz").await.0 != 200 {
        assert!(Instant::now() < deadline, "not ready");
        sleep(LOOK).await;
    }
}

async fn is_unready(admin: SocketAddr) {
    let (status, why) = page(admin, "/readyz").await;
    assert_eq!(status, 503, "{why}");
    assert!(why.contains("not listed"), "{why}");
}

/// As soon as the program has seen the pod.
async fn gets_token(session: &Session<'_>, endpoint: SocketAddr) {
    let exchange = session.exchange(endpoint).await;
    let deadline = Instant::now() + DEADLINE;
    while exchange.fetch().await.is_err() {
        assert!(Instant::now() < deadline, "no token");
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tokens_stay_fresh_while_the_api_server_is_away_for_several_lives_of_them() {
    let site = Site::new("fault-api-away").await;
    let relays = Relays::start(&site).await;
    let mut program = relays.start_program(&site);
    let endpoint = program.listening("endpoint").await;
    site.create_project().await;
    let (stays, ends) = (running(&site).await, running(&site).await);

    relays.take_away().await;
    ends.ends(3).await;
    stay_fresh(&stays, endpoint, AWAY).await;
    relays.bring_back().await;

    ends.until_phase("Failed").await;
    stays.until_phase("Running").await;
    running(&site).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_that_starts_without_an_api_server_serves_what_runs() {
    let site = Site::new("fault-api-start").await;
    let relays = Relays::start(&site).await;
    let mut first = relays.start_program(&site);
    site.create_project().await;
    let stays = running(&site).await;
    relays.take_away().await;
    site.kill(&mut first).await;

    let mut program = relays.start_program(&site);
    let admin = program.listening("admin").await;
    let endpoint = program.listening("endpoint").await;
    gets_token(&stays, endpoint).await;
    // And leads.
    let deadline = Instant::now() + DEADLINE;
    let before = pushed(&stays).await;
    while pushed(&stays).await.same_secret(&before) {
        assert!(Instant::now() < deadline, "no new token");
        sleep(LOOK).await;
    }
    stay_fresh(&stays, endpoint, LIFE).await;
    // So that it can be reached through a Service.
    until_ready(admin).await;
    // Another one is not: an upgrade with wrong settings would go on to the last replica.
    let mut second = relays.start_program(&site);
    let second_admin = second.listening("admin").await;
    let second_endpoint = second.listening("endpoint").await;
    gets_token(&stays, second_endpoint).await;
    is_unready(second_admin).await;
    relays.bring_back().await;

    until_ready(second_admin).await;
    running(&site).await;
    stays.until_phase("Running").await;
    stays.is_whole().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_replica_without_an_api_server_is_not_ready_while_nothing_runs() {
    let site = Site::new("fault-api-never").await;
    let relays = Relays::start(&site).await;
    relays.take_away().await;

    let mut program = relays.start_program(&site);
    let admin = program.listening("admin").await;
    let deadline = Instant::now() + DEADLINE;
    while !page(admin, "/metrics")
        .await
        .1
        .contains("\nambient_control_plane_leader 1\n")
    {
        assert!(Instant::now() < deadline, "it does not lead");
        sleep(LOOK).await;
    }

    is_unready(admin).await;
    relays.bring_back().await;
    until_ready(admin).await;
}

/// What users and nodes do while the API server answers the program with this; and what becomes of
/// it when that is over.
async fn outlasts(name: &str, fault: &Fault) {
    let site = Site::new(name).await;
    let rest = Proxy::start(&Upstream::Http(site.api.rest)).await;
    let program = site.program();
    let mut program = program
        .env(
            "AMBIENT_API_SERVER_URL",
            format!("http://{}", rest.address()),
        )
        .start();
    let endpoint = program.listening("endpoint").await;
    site.create_project().await;
    let [stays, stopped, deleted, ends] = [
        running(&site).await,
        running(&site).await,
        running(&site).await,
        running(&site).await,
    ];
    let tokens = stays.exchange(endpoint).await;

    let broken = [&rest, &site.grpc].map(|it| it.inject(usize::MAX, |_| true, fault.clone()));
    assert!(site.grpc.end_streams(|_| true, "") > 0);
    let new = site.create().await;
    stopped.post("stop").await;
    deleted.delete().await;
    ends.ends(3).await;
    until("calls fail", || broken[1].hits() >= 3).await;
    tokens.fetch().await.expect("a token");
    drop(broken);

    new.runs(0).await;
    new.until_phase("Running").await;
    stopped.finishes().await;
    stopped.until_phase("Stopped").await;
    deleted.finishes().await;
    deleted.is_gone().await;
    ends.until_phase("Failed").await;
    stays.until_phase("Running").await;
    for session in [&stays, &new] {
        session.is_whole().await;
    }
    tokens.fetch().await.expect("a token");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_api_server_that_answers_500_is_outlasted() {
    outlasts("fault-api-500", &Fault::Answer(Answer::new(500, "sorry"))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_api_server_that_hangs_is_outlasted() {
    outlasts("fault-api-hangs", &Fault::Hang).await;
}

/// Sessions on one page of a list.
const PAGE: usize = 500;

/// Sessions of no interest, which have ended.
async fn fill(site: &Site, count: usize) -> Vec<String> {
    let fill = |_| async {
        let session = site.create_in("filler").await;
        let path = format!("/sessions/{}/status", session.id);
        let ended = json!({"phase": "Completed"});
        site.rest(Method::PATCH, &path, Some(&ended)).await;
        session.id
    };
    join_all((0..count).map(fill)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pages_that_shift_while_they_are_read_miss_nobody() {
    let site = Site::new("fault-pages").await;
    let rest = Proxy::start(&Upstream::Http(site.api.rest)).await;
    let url = format!("http://{}", rest.address());
    let mut program = site.program().env("AMBIENT_API_SERVER_URL", &url).start();
    site.create_project().await;
    let pages = |number: usize| {
        let page = format!("page={number}");
        move |call: &Call| {
            call.path.ends_with("/sessions") && call.query.split('&').any(|it| it == page)
        }
    };
    let firsts = || rest.calls().iter().filter(|it| pages(1)(it)).count();
    let mut first_page = Vec::new();
    for are_events_lost in [false, true] {
        site.kill(&mut program).await;
        first_page.extend(fill(&site, PAGE - first_page.len()).await);
        let mut sessions = Vec::new();
        for _ in 0..3 {
            sessions.push(site.create().await);
        }
        fill(&site, 3).await;

        // Between the first page and the second, what was first on the second becomes last on the
        // first.
        let late = Fault::Late(Duration::from_secs(1));
        let held = rest.inject(1, pages(2), late);
        let is_watch = |call: &Call| call.path.ends_with("/WatchSessions");
        let times = if are_events_lost { usize::MAX } else { 0 };
        let lost = site.grpc.inject(times, is_watch, Fault::Silent);
        let before = firsts();
        program = site.program().env("AMBIENT_API_SERVER_URL", &url).start();
        until("the second page is asked for", || held.hits() == 1).await;
        let deleted: Vec<_> = first_page.drain(..sessions.len()).collect();
        for id in deleted {
            let path = format!("/sessions/{id}");
            site.rest(Method::DELETE, &path, None).await;
        }

        for session in &sessions {
            session.runs(0).await;
            session.until_phase("Running").await;
        }
        assert!(firsts() > before + 1, "nothing was read again");
        drop(lost);
        for session in sessions {
            session.delete().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_made_for_a_session_that_was_deleted_while_its_retry_waited() {
    let site = Site::new("fault-retry").await;
    let mut program = site.program().start();
    let admin = program.listening("admin").await;
    site.create_project().await;
    let is_start = |call: &Call| {
        let asked = asked(call);
        (asked.verb, asked.resource.as_str()) == ("create", "pods")
    };
    let starts = || site.kube.calls().iter().filter(|it| is_start(it)).count();
    let sorry = refusal(500, "InternalError", "etcd is away");
    let failing = site.kube.inject(usize::MAX, is_start, Fault::Answer(sorry));
    let session = site.create().await;
    until("starts fail", || failing.hits() >= 4).await;

    session.delete().await;
    session.is_gone().await;
    let before = starts();
    drop(failing);

    // What waited for its turn is not there any more, and who comes after it is served.
    running(&site).await;
    let nothing_due = |metrics: &str| {
        ["provision", "clean_up"].iter().all(|handler| {
            let line = format!("ambient_control_plane_queue_length{{handler=\"{handler}\"}} 0");
            metrics.lines().any(|it| it == line)
        })
    };
    let deadline = Instant::now() + DEADLINE;
    loop {
        let (_, metrics) = page(admin, "/metrics").await;
        if nothing_due(&metrics) {
            break;
        }
        assert!(Instant::now() < deadline, "{metrics}");
        sleep(LOOK).await;
    }
    assert_eq!(starts(), before + 1);
    session.is_gone().await;
}
