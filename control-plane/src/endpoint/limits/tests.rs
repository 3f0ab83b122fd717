//! On a clock that only tests move.

use governor::clock::FakeRelativeClock;

use super::*;

fn limits() -> (Limits<FakeRelativeClock>, FakeRelativeClock) {
    let clock = FakeRelativeClock::default();
    (Limits::new(clock.clone()), clock)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn failures_until_limited(limits: &Limits<FakeRelativeClock>, source: &str) -> usize {
    for failures in 0..10_000 {
        if limits.charge_source(ip(source)).await.is_err() {
            return failures;
        }
    }
    panic!("never limited");
}

#[tokio::test]
async fn an_address_has_its_burst_and_then_its_rate() {
    let (limits, clock) = limits();
    assert_eq!(failures_until_limited(&limits, "192.0.2.1").await, 200);
    let wait = limits.charge_source(ip("192.0.2.1")).await.unwrap_err();
    assert!(wait <= Duration::from_millis(50), "{wait:?}");
    clock.advance(Duration::from_secs(1));
    assert_eq!(failures_until_limited(&limits, "192.0.2.1").await, 20);
    clock.advance(Duration::from_secs(60));
    assert_eq!(failures_until_limited(&limits, "192.0.2.1").await, 200);
}

#[tokio::test]
async fn work_is_refused_only_while_the_share_is_used_up() {
    let (limits, clock) = limits();
    let source = ip("192.0.2.1");
    assert_eq!(limits.admit(source).await, Ok(()));
    failures_until_limited(&limits, "192.0.2.1").await;
    assert!(limits.admit(source).await.is_err());
    // Asking charges nothing.
    for _ in 0..1000 {
        assert!(limits.admit(source).await.is_err());
    }
    clock.advance(Duration::from_millis(51));
    assert_eq!(limits.admit(source).await, Ok(()));
    assert_eq!(limits.charge_source(source).await, Ok(()));
}

#[tokio::test]
async fn others_are_not_charged() {
    let (limits, _) = limits();
    failures_until_limited(&limits, "192.0.2.1").await;
    assert_eq!(limits.charge_source(ip("192.0.2.2")).await, Ok(()));
}

#[tokio::test]
async fn addresses_of_one_ipv6_network_share() {
    let (limits, _) = limits();
    failures_until_limited(&limits, "2001:db8:1:2::1").await;
    assert!(
        limits
            .charge_source(ip("2001:db8:1:2:ffff::9"))
            .await
            .is_err()
    );
    assert_eq!(limits.charge_source(ip("2001:db8:1:3::1")).await, Ok(()));
    // An IPv4 address is the same however the socket shows it.
    failures_until_limited(&limits, "::ffff:192.0.2.7").await;
    assert!(limits.charge_source(ip("192.0.2.7")).await.is_err());
}

#[tokio::test]
async fn a_session_has_its_burst_and_then_its_rate() {
    let (limits, clock) = limits();
    let id = SessionId::parse("session-0001").unwrap();
    let mut granted = 0;
    while limits.charge_session(&id).await.is_ok() {
        granted += 1;
    }
    assert_eq!(granted, 20);
    let wait = limits.charge_session(&id).await.unwrap_err();
    assert!(wait <= Duration::from_millis(500), "{wait:?}");
    clock.advance(Duration::from_secs(1));
    assert_eq!(limits.charge_session(&id).await, Ok(()));
    assert_eq!(limits.charge_session(&id).await, Ok(()));
    assert!(limits.charge_session(&id).await.is_err());
    let other = SessionId::parse("session-0002").unwrap();
    assert_eq!(limits.charge_session(&other).await, Ok(()));
}

#[tokio::test]
async fn the_counts_are_bounded() {
    let (limits, _) = limits();
    for n in 0..30_000_u32 {
        let source = IpAddr::V4(std::net::Ipv4Addr::from_bits(n));
        limits.charge_source(source).await.unwrap();
    }
    limits.sources.run_pending_tasks().await;
    assert!(limits.sources.entry_count() <= COUNTED);
}

#[test]
fn lines_about_refusals_are_few_however_many_there_are() {
    let clock = FakeRelativeClock::default();
    let lines = Lines::new(&clock);
    let written = |count: usize| (0..count).filter(|_| lines.has_room()).count();
    assert_eq!(written(10_000), 500);
    clock.advance(Duration::from_secs(1));
    assert_eq!(written(10_000), 50);
}
