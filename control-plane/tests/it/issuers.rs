//! Issuers against real HTTP servers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use ambient_control_plane::{
    issuer::{IssueError, Issuer as _, Subject, oidc::OidcIssuer},
    metrics::OIDC_SECONDS,
};
use ambient_shared::{
    client, clock::Clock, resolve::Resolver, session::SessionId, telemetry::MetricsPage,
    token::Token,
};
use ambient_testing::{
    DEADLINE,
    faults::{Mode, Relay},
    idp::{Answer, CLIENT_ID, CLIENT_SECRET, Idp},
};
use futures_util::{FutureExt as _, future::join_all};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

/// An issuer whose task runs.
struct Scene {
    idp: Idp,
    relay: Relay,
    issuer: Arc<OidcIssuer>,
    _running: JoinSet<()>,
}

async fn scene(life: Duration, answer: Answer) -> Scene {
    let idp = Idp::start().await;
    idp.set_life(life);
    idp.answer(answer);
    let relay = Relay::start(idp.address()).await;
    let url = format!("http://{}/token", relay.address());
    let issuer = issuer(&url, CLIENT_SECRET);
    let mut running = JoinSet::new();
    let task = Arc::clone(&issuer);
    running.spawn(async move { task.run(CancellationToken::new()).await });
    Scene {
        idp,
        relay,
        issuer,
        _running: running,
    }
}

fn issuer(url: &str, secret: &str) -> Arc<OidcIssuer> {
    let client = client::http_client_to(
        &url.parse().unwrap(),
        &Resolver::system(),
        client::trust_roots(None).unwrap(),
        Duration::from_secs(30),
    );
    Arc::new(OidcIssuer::new(
        client.unwrap(),
        url.parse().unwrap(),
        CLIENT_ID.to_owned(),
        secret.into(),
        Clock::system(),
    ))
}

fn subject() -> Subject {
    Subject {
        session: SessionId::parse("session-0001").unwrap(),
        generation: 0,
    }
}

impl Scene {
    async fn issue(&self, min_life: Duration) -> Result<Token, IssueError> {
        let subject = subject();
        timeout(DEADLINE, self.issuer.issue(&subject, min_life))
            .await
            .expect("an answer in time")
    }

    /// Asks until there is an answer of this kind.
    async fn until<T>(
        &self,
        what: &str,
        pick: impl Fn(Result<Token, IssueError>) -> Option<T>,
    ) -> T {
        let asking = async {
            loop {
                if let Some(picked) = pick(self.issue(Duration::ZERO).await) {
                    return picked;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(DEADLINE, asking)
            .await
            .unwrap_or_else(|_| panic!("never {what}"))
    }
}

#[tokio::test]
async fn a_hundred_askers_make_one_request() {
    let slow = Answer::Slow(Duration::from_millis(300));
    let scene = scene(Duration::from_secs(900), slow).await;
    let all = join_all((0..100).map(|_| scene.issue(Duration::from_secs(60)))).await;
    let first = all[0].as_ref().unwrap();
    for token in &all {
        assert!(token.as_ref().unwrap().same_secret(first));
    }
    assert_eq!(scene.idp.requests(), 1);
    assert_eq!(scene.issuer.life(), Some(Duration::from_secs(900)));
    let own = scene.issuer.subscribe();
    assert!(own.borrow().as_ref().unwrap().same_secret(first));

    // More life than any token has: one more request at most, then what there is.
    let all = join_all((0..100).map(|_| scene.issue(Duration::from_secs(5000)))).await;
    assert!(all.iter().all(Result::is_ok));
    assert!(scene.idp.requests() <= 2, "{}", scene.idp.requests());
}

#[tokio::test]
async fn an_asker_that_goes_away_cuts_off_nobody() {
    let slow = Answer::Slow(Duration::from_secs(4));
    let scene = scene(Duration::from_secs(900), slow).await;
    for _ in 0..10 {
        let impatient = timeout(Duration::from_millis(20), scene.issue(Duration::ZERO)).await;
        assert!(impatient.is_err());
    }
    scene.issue(Duration::ZERO).await.unwrap();
    assert_eq!(scene.idp.requests(), 1);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_is_needed() {
    let scene = scene(Duration::from_secs(4), Answer::Token).await;
    let began = Instant::now();
    let mut tokens = vec![scene.issue(Duration::ZERO).await.unwrap()];
    // Nobody asks for more than is there, and none is given that has expired.
    while tokens.len() < 3 {
        let now = Clock::system().now();
        let token = scene.issue(Duration::ZERO).await.unwrap();
        assert!(!token.is_expired(now));
        if !token.same_secret(&tokens[tokens.len() - 1]) {
            tokens.push(token);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Each was used for about half of its life.
    assert!(began.elapsed() > Duration::from_millis(2500), "{tokens:?}");
}

#[tokio::test]
async fn the_last_token_serves_while_the_provider_is_down_and_a_new_one_when_it_is_back() {
    let scene = scene(Duration::from_secs(4), Answer::Token).await;
    let first = scene.issue(Duration::ZERO).await.unwrap();
    scene.relay.set(Mode::Refuse).await;
    scene.relay.reset();
    // Down for longer than the token lives: it serves to its end, then there is none.
    let error = scene
        .until("an error", |answer| match answer {
            Ok(token) => {
                assert!(!token.is_expired(Clock::system().now()));
                None
            }
            Err(error) => Some(error),
        })
        .await;
    assert!(first.is_expired(Clock::system().now()));
    assert!(matches!(error, IssueError::Unreachable { .. }), "{error}");
    // Told at once, not after a wait.
    let told = scene.issue(Duration::ZERO).now_or_never();
    told.expect("an answer at once").unwrap_err();

    scene.relay.set(Mode::Pass).await;
    let back = scene.until("a token again", Result::ok).await;
    assert!(!back.same_secret(&first));
}

#[tokio::test]
async fn answers_without_a_usable_token_are_told_apart() {
    type Expected = fn(&IssueError) -> bool;
    let cases: [(Answer, Expected); 6] = [
        (
            Answer::Html,
            |error| matches!(error, IssueError::Malformed { reason, .. } if reason.contains("text/html")),
        ),
        (
            Answer::Expired,
            |error| matches!(error, IssueError::Malformed { reason, .. } if reason.contains("expired")),
        ),
        (
            Answer::Status(404),
            |error| matches!(error, IssueError::Malformed { reason, .. } if reason.contains("OIDC_TOKEN_URL")),
        ),
        (Answer::Status(302), |error| {
            matches!(error, IssueError::Malformed { .. })
        }),
        (Answer::Status(503), |error| {
            matches!(error, IssueError::Unreachable { .. })
        }),
        (
            Answer::Status(403),
            |error| matches!(error, IssueError::Refused { reason, .. } if reason.contains("403")),
        ),
    ];
    for (answer, expected) in cases {
        let scene = scene(Duration::from_secs(900), answer.clone()).await;
        let error = scene.issue(Duration::ZERO).await.unwrap_err();
        assert!(expected(&error), "{answer:?}: {error}");
        // And it goes on asking.
        scene.idp.answer(Answer::Token);
        scene.until("a token", Result::ok).await;
    }
}

#[tokio::test]
async fn a_wrong_secret_is_refused_by_name_and_shown_nowhere() {
    let idp = Idp::start().await;
    let issuer = issuer(&idp.token_url(), "wrong-secret");
    let mut running = JoinSet::new();
    let task = Arc::clone(&issuer);
    running.spawn(async move { task.run(CancellationToken::new()).await });
    let error = issuer.issue(&subject(), Duration::ZERO).await.unwrap_err();
    let shown = format!("{error} {error:?} {issuer:?}");
    assert!(
        shown.contains("401") && shown.contains("invalid_client"),
        "{shown}"
    );
    assert!(shown.contains("OIDC_CLIENT_SECRET"), "{shown}");
    assert!(!shown.contains("wrong-secret"), "{shown}");
    // By Basic, then by the form.
    assert!(idp.requests() >= 2);
}

#[tokio::test]
async fn expiry_is_what_the_provider_says_else_the_tokens_own() {
    for (answer, life) in [
        (Answer::NoExpiry, Duration::from_secs(900)),
        (Answer::Opaque, Duration::from_secs(900)),
    ] {
        let scene = scene(Duration::from_secs(900), answer).await;
        let token = scene.issue(Duration::from_secs(600)).await.unwrap();
        let left = token.life_left(Clock::system().now()).unwrap();
        assert!(left <= life && left > life / 2, "{left:?}");
        // A JWT's own times are whole seconds.
        let known = scene.issuer.life().unwrap();
        assert!(
            known <= life && known + Duration::from_secs(1) >= life,
            "{known:?}"
        );
        assert_eq!(scene.idp.requests(), 1);
    }
}

#[tokio::test]
async fn a_provider_that_hangs_is_given_up() {
    let scene = scene(Duration::from_secs(900), Answer::Hang).await;
    // What hangs takes no part in the time that passes.
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    let error = scene.issue(Duration::ZERO).await.unwrap_err();
    assert!(matches!(error, IssueError::Unreachable { .. }), "{error}");
    // Before clients of the token endpoint give up on us, after 10 s.
    assert!(began.elapsed() < Duration::from_secs(10));
    tokio::time::resume();
    scene.idp.answer(Answer::Token);
    scene.until("a token", Result::ok).await;
}

#[tokio::test]
async fn while_a_provider_hangs_a_token_that_is_valid_is_given_soon() {
    let scene = scene(Duration::from_secs(900), Answer::Token).await;
    let first = scene.issue(Duration::ZERO).await.unwrap();
    scene.idp.answer(Answer::Hang);
    tokio::time::pause();
    // It is not young any more, and is not due to be renewed yet.
    tokio::time::advance(Duration::from_secs(120)).await;
    let more = Duration::from_secs(5000);
    let began = tokio::time::Instant::now();
    let given = scene.issue(more).await.unwrap();
    assert!(given.same_secret(&first));
    assert!(began.elapsed() < Duration::from_secs(2));

    // Once it was given up, and is asked again, nobody waits at all.
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let given = scene.issue(more).now_or_never();
        let is_over = began.elapsed() > Duration::from_secs(11);
        assert!(given.is_some() || !is_over, "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn the_providers_time_is_measured_by_result() {
    let page = MetricsPage::default();
    let _recorder = metrics::set_default_local_recorder(&page);
    let scene = scene(Duration::from_secs(900), Answer::Token).await;
    scene.issue(Duration::ZERO).await.unwrap();
    let line = format!("{OIDC_SECONDS}_count{{result=\"ok\"}} 1");
    assert!(page.render().contains(&line), "{}", page.render());
}
