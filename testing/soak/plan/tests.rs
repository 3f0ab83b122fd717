use std::collections::BTreeSet;

use super::*;

const REPLICAS: usize = 2;

fn plans(length: Duration) -> impl Iterator<Item = Vec<Planned>> {
    (0..100).map(move |seed| plan(seed, length, REPLICAS))
}

#[test]
fn the_seed_alone_decides() {
    let words = |seed| format!("{:?}", plan(seed, FULL, REPLICAS));
    assert_eq!(words(1), words(1));
    assert_ne!(words(1), words(2));
}

#[test]
fn replicas_live_on_at_the_end_while_other_things_fail() {
    for minutes in [3, 10, 30, 60] {
        let length = Duration::from_mins(minutes);
        let quiet = length.saturating_sub(QUIET.min(length / 5));
        let mut faults = 0;
        for plan in plans(length) {
            assert!(plan.iter().all(|it| it.until() <= length));
            let at_end: Vec<_> = plan.iter().filter(|it| it.until() > quiet).collect();
            assert!(
                !at_end.iter().any(|it| it.fault.ends_replica()),
                "{at_end:?}"
            );
            faults += at_end.len();
        }
        assert!(faults > 100, "{minutes}: {faults}");
    }
}

#[test]
fn each_kind_of_fault_comes() {
    let mut all = BTreeSet::from(
        [
            Fault::KillReplica(0),
            Fault::StopReplica(0),
            Fault::FreezeReplica(0),
            Fault::KillKubernetes,
            Fault::FreezeKubernetes,
            Fault::KillApiServer,
            Fault::FreezeApiServer,
            Fault::LoseApiServer,
        ]
        .map(Fault::kind),
    );
    all.extend(SICK.map(|it| Fault::IdentityProvider(it).kind()));
    all.extend(REFUSALS.map(|it| Fault::Kubernetes(0, it).kind()));
    all.extend(PAGES.map(|it| Fault::ApiServer(0, it).kind()));
    for link in LINKS {
        all.extend(BROKEN.map(|it| Fault::Link(0, link, it).kind()));
    }
    let drawn: Vec<_> = plans(FULL).flatten().collect();
    let kinds: BTreeSet<_> = drawn.iter().map(|it| it.fault.kind()).collect();
    assert_eq!(kinds, all);
    for replica in 0..REPLICAS {
        assert!(drawn.iter().any(|it| it.fault.replica() == Some(replica)));
    }
}

#[test]
fn the_api_server_is_gone_once_in_a_full_run_and_tokens_can_be_had() {
    for plan in plans(FULL) {
        let lost = |it: &&Planned| it.fault == Fault::LoseApiServer;
        let [gone] = plan.iter().filter(lost).collect::<Vec<_>>()[..] else {
            panic!("{plan:?}");
        };
        assert_eq!(gone.lasts, GONE);
        let is_meanwhile = |it: &&Planned| it.until() > gone.at && it.at < gone.until();
        let meanwhile: Vec<_> = plan.iter().filter(is_meanwhile).collect();
        assert!(meanwhile.len() > 1, "{plan:?}");
        let takes_more = |it: &Planned| it.fault.ends_replica() || it.fault.is_kubernetes();
        assert!(!meanwhile.iter().any(|it| takes_more(it)), "{meanwhile:?}");
    }
    for plan in plans(FULL / 2) {
        assert!(!plan.iter().any(|it| it.fault == Fault::LoseApiServer));
    }
}

#[test]
fn nothing_is_broken_twice_at_once() {
    for plan in plans(FULL) {
        for (number, one) in plan.iter().enumerate() {
            for other in &plan[number + 1..] {
                assert!(!one.is_in_the_way_of(other), "{one:?} {other:?}");
            }
        }
    }
}
