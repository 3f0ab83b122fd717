//! The identity provider goes away for longer than a token lives, is slow, answers with something
//! else, with a token that has expired, with one that never does.

use std::{mem, time::Duration};

use ambient_api_server::{Database, Settings};
use ambient_shared::clock::Clock;
use ambient_testing::{
    DEADLINE,
    faults::{Mode, Relay},
    idp::{Answer, CLIENT_ID, CLIENT_SECRET, Idp},
    kube_proxy::Asked,
    programs::Program,
    proxy::{Proxy, Upstream},
};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::{
    fresh::{LOOK, pushed, running, stay_fresh},
    site::Site,
};
use crate::real_api::{OPERATOR, RealApi, SERVICE};

/// A site whose API server trusts an identity provider.
pub struct Trusting {
    pub site: Site,
    pub idp: Idp,
    _folder: TempDir,
}

impl Trusting {
    pub async fn new(name: &str, life: Duration) -> Self {
        let idp = Idp::start().await;
        idp.set_life(life);
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            database: Database::File(folder.path().join("db")),
            jwks: vec![idp.jwks_url().parse().unwrap()],
            service_account: Some(CLIENT_ID.to_owned()),
            api_token: Some(SERVICE.to_owned().into()),
            operator_token: Some(OPERATOR.to_owned().into()),
            ..Settings::default()
        };
        let mut site = Site::new(name).await;
        let api = RealApi::serve(settings).await;
        site.grpc = Proxy::start(&Upstream::Grpc(api.grpc)).await;
        mem::replace(&mut site.api, api).stop().await;
        Self {
            site,
            idp,
            _folder: folder,
        }
    }

    /// The program, with tokens of its own and for sessions from a provider at this URL.
    fn program(&self, url: &str) -> Program {
        let program = self.site.program();
        program
            .env("CP_TOKEN_ISSUER", "oidc")
            .env("OIDC_TOKEN_URL", url)
            .env("OIDC_CLIENT_ID", CLIENT_ID)
            .env("OIDC_CLIENT_SECRET", CLIENT_SECRET)
            .env("CP_RATE_LIMITS", "off")
    }

    /// Waits until the provider was asked again.
    async fn asked(&self, times: usize) {
        let (before, deadline) = (self.idp.requests(), Instant::now() + DEADLINE);
        while self.idp.requests() < before + times {
            assert!(Instant::now() < deadline, "not asked");
            sleep(LOOK).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_provider_that_is_away_for_longer_than_tokens_live_is_outlasted() {
    let life = Duration::from_secs(4);
    let it = Trusting::new("fault-idp-away", life).await;
    let relay = Relay::start(it.idp.address()).await;
    let url = format!("http://{}/token", relay.address());
    let mut program = it.program(&url).start();
    let endpoint = program.listening("endpoint").await;
    it.site.create_project().await;
    let (stays, ends) = (running(&it.site).await, running(&it.site).await);
    let exchange = stays.exchange(endpoint).await;
    let clock = Clock::system();

    relay.set(Mode::Refuse).await;
    relay.reset();
    let new = it.site.create().await;
    ends.ends(3).await;
    let (began, mut refused) = (Instant::now(), 0);
    while began.elapsed() < life * 2 {
        let (asked, asked_at) = (Instant::now(), clock.now());
        match exchange.fetch().await {
            Ok(token) => assert!(!token.is_expired(asked_at), "{token:?}"),
            Err(_) => refused += 1,
        }
        // Who asks is told soon, whatever there is to tell.
        assert!(asked.elapsed() < Duration::from_secs(9));
        sleep(LOOK).await;
    }
    assert!(refused > 0, "all tokens have expired by now");
    relay.set(Mode::Pass).await;

    let deadline = Instant::now() + DEADLINE;
    while exchange.fetch().await.is_err() || pushed(&stays).await.is_expired(clock.now()) {
        assert!(Instant::now() < deadline, "no new token");
        sleep(LOOK).await;
    }
    stay_fresh(&stays, endpoint, life).await;
    ends.until_phase("Failed").await;
    new.runs(0).await;
    new.until_phase("Running").await;
    stays.until_phase("Running").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tokens_stay_fresh_with_a_slow_provider() {
    let life = Duration::from_secs(6);
    let it = Trusting::new("fault-idp-slow", life).await;
    it.idp.answer(Answer::Slow(Duration::from_secs(2)));
    let mut program = it.program(&it.idp.token_url()).start();
    let endpoint = program.listening("endpoint").await;
    it.site.create_project().await;
    let session = running(&it.site).await;

    stay_fresh(&session, endpoint, life * 3 / 2).await;

    running(&it.site).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn answers_that_are_no_token_replace_none() {
    let it = Trusting::new("fault-idp-wrong", Duration::from_secs(8)).await;
    it.idp.answer(Answer::Html);
    let mut program = it.program(&it.idp.token_url()).start();
    let endpoint = program.listening("endpoint").await;
    it.asked(2).await;
    it.idp.answer(Answer::Token);
    it.site.create_project().await;
    let session = running(&it.site).await;
    let exchange = session.exchange(endpoint).await;

    for wrong in [Answer::Html, Answer::Expired, Answer::Status(500)] {
        let before = exchange.fetch().await.unwrap();
        it.idp.answer(wrong);
        it.asked(2).await;
        stay_fresh(&session, endpoint, Duration::ZERO).await;
        it.idp.answer(Answer::Token);

        let deadline = Instant::now() + DEADLINE;
        while exchange.fetch().await.unwrap().same_secret(&before) {
            assert!(Instant::now() < deadline, "no new token");
            sleep(LOOK).await;
        }
        stay_fresh(&session, endpoint, Duration::ZERO).await;
    }
    running(&it.site).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_token_says_itself_when_it_expires_if_the_provider_does_not() {
    let life = Duration::from_secs(4);
    let it = Trusting::new("fault-idp-silent", life).await;
    it.idp.answer(Answer::NoExpiry);
    let mut program = it.program(&it.idp.token_url()).start();
    let endpoint = program.listening("endpoint").await;
    it.site.create_project().await;
    let session = running(&it.site).await;

    stay_fresh(&session, endpoint, life * 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_token_that_never_expires_is_asked_for_and_written_once() {
    let it = Trusting::new("fault-idp-endless", Duration::from_secs(4)).await;
    it.idp.answer(Answer::Plain(SERVICE.to_owned()));
    let program = it.program(&it.idp.token_url());
    let mut program = program.env("CP_REFRESH_INTERVAL", "500ms").start();
    let endpoint = program.listening("endpoint").await;
    it.site.create_project().await;
    let session = running(&it.site).await;
    let exchange = session.exchange(endpoint).await;
    let written = || {
        let calls = it.site.asked().into_iter();
        let is_write = |(asked, _): &(Asked, _)| {
            (asked.verb, asked.resource.as_str()) == ("patch", "secrets")
                && asked.namespace == it.site.project
        };
        calls.filter(is_write).count()
    };

    // Some ticks.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        let token = exchange.fetch().await.unwrap();
        assert_eq!((token.expose(), token.expires_at()), (SERVICE, None));
        assert!(pushed(&session).await.same_secret(&token));
        sleep(LOOK).await;
    }

    assert_eq!(it.idp.requests(), 1);
    assert_eq!(written(), 1);
}
