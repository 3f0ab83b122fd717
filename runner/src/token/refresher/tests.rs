//! The rules of the refresher without a server, on a paused clock.

use std::{path::PathBuf, time::SystemTime};

use ambient_shared::{
    bearer::PublicKey,
    client::http_client_to,
    exchange::{TIMEOUT, parse_endpoint},
    resolve::Resolver,
};
use ambient_testing::keypair::RsaKey;
use proptest::prelude::*;
use rustls::RootCertStore;

use super::*;
use crate::token::handle::{RENEW_TIMEOUT, RenewError};

struct Scene {
    refresher: Refresher,
    handle: TokenHandle,
    clock: Clock,
    folder: tempfile::TempDir,
}

fn start() -> SystemTime {
    clock::from_unix_seconds(1_000_000).unwrap()
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn token(text: &str, life: Option<u64>) -> Token {
    Token::new(text, life.map(|life| start() + secs(life))).unwrap()
}

/// An endpoint that is never asked.
fn endpoint(clock: &Clock) -> Exchange {
    let session = SessionId::parse("session-0001").unwrap();
    let key = PublicKey::from_pem(&RsaKey::shared().public_pem()).unwrap();
    let url = parse_endpoint("http://127.0.0.1:9/token").unwrap();
    let roots = RootCertStore::empty();
    let client = http_client_to(&url, &Resolver::system(), roots, TIMEOUT).unwrap();
    let bearer = key.encrypt(&session).unwrap();
    Exchange::new(client, url, bearer, None, clock.clone())
}

fn scene(with_endpoint: bool, fixed: Option<&str>) -> Scene {
    let clock = Clock::manual(start());
    let folder = tempfile::tempdir().unwrap();
    let sources = Sources {
        endpoint: with_endpoint.then(|| endpoint(&clock)),
        key_file: folder.path().join("session-key"),
        file: folder.path().join("bot-token"),
        fixed: fixed.map(|text| token(text, None)),
    };
    let masker = Masker::new(clock.clone());
    let (refresher, handle) = Refresher::new(sources, None, masker, clock.clone());
    Scene {
        refresher,
        handle,
        clock,
        folder,
    }
}

impl Scene {
    fn mount(&self, text: &str) {
        let path: PathBuf = self.folder.path().join("bot-token");
        std::fs::write(path, text).unwrap();
    }

    /// What would take the place of the current token, which it then does.
    async fn beside(&self) -> Option<(String, Source)> {
        let (token, source) = self.refresher.beside_endpoint().await.ok()?;
        let text = token.expose().to_owned();
        self.refresher.publish(token, source);
        Some((text, source))
    }

    fn reject_current(&self) {
        let current = self.handle.latest.borrow().clone();
        self.handle.rejected.send_replace(current);
    }
}

fn found(text: &str, source: Source) -> (String, Source) {
    (text.to_owned(), source)
}

#[tokio::test(start_paused = true)]
async fn without_an_endpoint_the_file_goes_before_the_fixed_token() {
    let scene = scene(false, Some("fixed-token"));
    assert_eq!(
        scene.beside().await,
        Some(found("fixed-token", Source::Fixed))
    );
    assert_eq!(scene.beside().await, None);
    scene.mount("mounted-token");
    assert_eq!(
        scene.beside().await,
        Some(found("mounted-token", Source::File))
    );
    assert_eq!(scene.beside().await, None);
    scene.mount("another-mounted-token");
    let another = found("another-mounted-token", Source::File);
    assert_eq!(scene.beside().await, Some(another));
    // Broken, or gone: what was good is kept.
    scene.mount("no token");
    assert_eq!(scene.beside().await, None);
}

#[tokio::test(start_paused = true)]
async fn the_file_replaces_the_endpoints_token_only_when_it_is_fresher() {
    // {"exp":1000100}
    let mounted = "e30.eyJleHAiOjEwMDAxMDB9.s";
    for (life, taken) in [(50, true), (100, false), (200, false)] {
        let scene = scene(true, Some("fixed-token"));
        scene
            .refresher
            .publish(token("pulled-token", Some(life)), Source::Endpoint);
        scene.mount(mounted);
        assert_eq!(scene.beside().await.is_some(), taken, "{life}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_expired_token_is_replaced_by_whatever_is_valid() {
    let scene = scene(true, Some("fixed-token"));
    let pulled = token("pulled-token", Some(60));
    scene.refresher.publish(pulled, Source::Endpoint);
    assert_eq!(scene.beside().await, None);
    scene.clock.set(start() + secs(60));
    assert_eq!(
        scene.beside().await,
        Some(found("fixed-token", Source::Fixed))
    );
}

#[tokio::test(start_paused = true)]
async fn tokens_that_do_not_say_when_they_expire_follow_the_file() {
    let scene = scene(true, None);
    scene.mount("mounted-one");
    assert_eq!(
        scene.beside().await,
        Some(found("mounted-one", Source::File))
    );
    scene.mount("mounted-two");
    assert_eq!(
        scene.beside().await,
        Some(found("mounted-two", Source::File))
    );

    let pulled = token("pulled-token", None);
    scene.refresher.publish(pulled, Source::Endpoint);
    assert_eq!(scene.beside().await, None, "the endpoint's is still young");
    tokio::time::advance(ASSUMED_LIFE).await;
    assert_eq!(
        scene.beside().await,
        Some(found("mounted-two", Source::File))
    );
}

#[tokio::test(start_paused = true)]
async fn a_rejected_token_is_replaced_and_does_not_come_back() {
    let scene = scene(true, None);
    scene.mount("mounted-one");
    let pulled = token("pulled-token", Some(600));
    scene.refresher.publish(pulled.clone(), Source::Endpoint);
    scene.reject_current();
    assert!(scene.refresher.is_rejected());
    assert!(!scene.refresher.is_useful(&pulled));
    assert!(scene.refresher.is_useful(&token("other-token", Some(5))));
    assert_eq!(
        scene.beside().await,
        Some(found("mounted-one", Source::File))
    );
    assert!(!scene.refresher.is_rejected());
}

#[tokio::test(start_paused = true)]
async fn the_endpoint_is_believed_unless_what_it_gives_is_of_less_use() {
    let scene = scene(true, None);
    let refresher = &scene.refresher;
    // Expired by our clock, which may be wrong: better than nothing.
    assert!(refresher.is_useful(&token("stale-token", Some(0))));
    refresher.publish(token("pulled-token", Some(60)), Source::Endpoint);
    assert!(!refresher.is_useful(&token("stale-token", Some(0))));
    assert!(!refresher.is_useful(&token("pulled-token", Some(60))));
    assert!(refresher.is_useful(&token("pulled-token", Some(90))));
    assert!(refresher.is_useful(&token("short-token", Some(30))));
}

#[tokio::test(start_paused = true)]
async fn renewal_waits_for_another_token_at_most_half_a_minute() {
    let scene = scene(false, None);
    scene.mount("mounted-one");
    scene.beside().await;
    let rejected = scene.handle.latest.borrow().clone().unwrap();
    let before = Instant::now();
    assert_eq!(
        scene.handle.renew(&rejected).await.unwrap_err(),
        RenewError::Deadline
    );
    assert_eq!(before.elapsed(), RENEW_TIMEOUT);

    scene.mount("mounted-two");
    scene.beside().await;
    // It came meanwhile: no wait.
    let other = scene.handle.renew(&rejected).await.unwrap();
    assert_eq!(other.expose(), "mounted-two");

    drop(scene.refresher);
    assert_eq!(
        scene.handle.renew(&other).await.unwrap_err(),
        RenewError::Ended
    );
}

#[tokio::test(start_paused = true)]
async fn without_an_endpoint_a_rejection_makes_the_file_read_at_once() {
    let scene = scene(false, None);
    scene.mount("mounted-one");
    scene.refresher.first(secs(5)).await.unwrap();
    let rejected = scene.handle.latest.borrow().clone().unwrap();
    scene.mount("mounted-two");
    let shutdown = CancellationToken::new();
    let renewed = async {
        let renewed = scene.handle.renew(&rejected).await;
        shutdown.cancel();
        renewed
    };
    let ((), renewed) = tokio::join!(scene.refresher.run(shutdown.clone()), renewed);
    assert_eq!(renewed.unwrap().expose(), "mounted-two");
}

#[tokio::test(start_paused = true)]
async fn a_mounted_token_is_masked_while_the_endpoints_is_used() {
    let scene = scene(true, None);
    let pulled = token("pulled-token", Some(600));
    scene.refresher.publish(pulled, Source::Endpoint);
    let masker = scene.refresher.masker.clone();
    let folder = scene.folder;
    let shutdown = CancellationToken::new();
    let masked = async {
        for text in ["mounted-one", "mounted-two"] {
            std::fs::write(folder.path().join("bot-token"), text).unwrap();
            let masked = async {
                while masker.mask(text) == text {
                    sleep(secs(1)).await;
                }
            };
            timeout(secs(10), masked).await.unwrap();
        }
        shutdown.cancel();
    };
    tokio::join!(scene.refresher.run(shutdown.clone()), masked);
    let current = scene.handle.latest.borrow().clone().unwrap();
    assert_eq!(current.expose(), "pulled-token");
}

#[test]
fn a_retry_comes_before_the_expiry_unless_the_server_asked_for_time() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _entered = runtime.enter();
    proptest!(|(left in 0_u64..2000, failures in 0_usize..20, asked in 0_u64..400)| {
        let scene = scene(true, None);
        scene.refresher.publish(token("pulled-token", Some(left)), Source::Endpoint);
        let mut backoff = Backoff::new(POLICY);
        for _ in 0..failures {
            backoff.next_wait();
        }
        let wait = scene.refresher.retry_in(&mut backoff, Retry::Backoff);
        prop_assert!(wait >= LEAST_RETRY && wait <= POLICY.max);
        if left > 1 {
            prop_assert!(wait <= secs(left) / 4, "{wait:?} of {left} s");
        }
        let wait = scene.refresher.retry_in(&mut backoff, Retry::After(secs(asked)));
        prop_assert!(wait >= secs(asked).min(POLICY.longest_asked));
        // Refused for good or for long: there is always a next try.
        let wait = scene.refresher.retry_in(&mut backoff, Retry::Never);
        prop_assert!(wait <= POLICY.max);
    });
}
