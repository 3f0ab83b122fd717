use proptest::prelude::*;

use super::*;
use crate::keypair::{Ids, id::KeyId};

const LIFE: Duration = Duration::from_mins(15);
const LAG: Duration = Duration::from_mins(2);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn progress() -> Progress {
    Progress::new(Waits::default(), LIFE, LAG)
}

fn id(number: u8) -> KeyId {
    KeyId::from_bytes([number; 8])
}

/// Only current keys, and nobody.
fn settled() -> Sight {
    let ids = Ids {
        current: id(1),
        previous: None,
        next: None,
    };
    Sight {
        keys: KeyIds {
            keypair: ids.clone(),
            root: ids,
            signing: Ids {
                current: "first".to_owned(),
                previous: None,
                next: None,
            },
        },
        runs: Runs::default(),
        longer_tokens: false,
        behind: Behind::default(),
    }
}

fn sight(change: impl FnOnce(&mut Sight)) -> Sight {
    let mut sight = settled();
    change(&mut sight);
    sight
}

fn dropped(kind: KeyKind, previous: &impl ToString) -> Vec<Step> {
    let previous = previous.to_string();
    vec![Step::Drop { kind, previous }]
}

#[test]
fn where_nothing_is_rotated_nothing_is_done() {
    let (mut progress, start) = (progress(), Instant::now());
    for hours in 0..10 {
        assert_eq!(progress.decide(&settled(), start + secs(hours * 3600)), []);
    }
}

#[test]
fn the_next_signing_key_is_used_once_it_was_published_for_a_while() {
    let (mut progress, start) = (progress(), Instant::now());
    let published = sight(|it| it.keys.signing.next = Some("second".to_owned()));
    assert_eq!(progress.decide(&published, start), []);
    assert_eq!(progress.decide(&published, start + secs(119)), []);
    let (next, life) = ("second".to_owned(), LIFE);
    let promote = vec![Step::Promote { next, life }];
    assert_eq!(progress.decide(&published, start + secs(120)), promote);
    // What could not be done is tried again.
    assert_eq!(progress.decide(&published, start + secs(123)), promote);
}

#[test]
fn the_next_signing_key_waits_for_each_replica_to_know_it() {
    let (mut progress, start) = (progress(), Instant::now());
    let published = |unaware| {
        sight(|it| {
            it.keys.signing.next = Some("second".to_owned());
            it.behind.of_next = unaware;
        })
    };
    assert_eq!(progress.decide(&published(1), start), []);
    assert_eq!(progress.decide(&published(1), start + secs(600)), []);
    let read = start + secs(601);
    assert_eq!(progress.decide(&published(0), read), []);
    assert_eq!(progress.decide(&published(0), read + secs(119)), []);
    assert_eq!(progress.decide(&published(0), read + secs(120)).len(), 1);
}

#[test]
fn a_replica_that_does_not_follow_for_an_hour_is_taken_for_gone() {
    let (mut progress, start) = (progress(), Instant::now());
    let hour = secs(3600);
    let published = sight(|it| {
        it.keys.signing.next = Some("second".to_owned());
        it.behind.of_next = 1;
    });
    assert_eq!(progress.decide(&published, start), []);
    assert_eq!(progress.decide(&published, start + hour), []);
    assert_eq!(
        progress.decide(&published, start + hour + secs(120)).len(),
        1
    );

    let old = sight(|it| {
        it.keys.signing.current = "second".to_owned();
        it.keys.signing.previous = Some("first".to_owned());
        it.behind.of_current = 1;
    });
    let start = start + hour * 2;
    assert_eq!(progress.decide(&old, start), []);
    assert_eq!(progress.decide(&old, start + hour), []);
    let end = start + hour + LIFE + secs(60);
    let first = dropped(KeyKind::SigningKey, &"first");
    assert_eq!(progress.decide(&old, end), first);
}

#[test]
fn the_old_signing_key_stays_until_no_replica_signs_with_it() {
    let (mut progress, start) = (progress(), Instant::now());
    let old = |signing_with_it| {
        sight(|it| {
            it.keys.signing.current = "second".to_owned();
            it.keys.signing.previous = Some("first".to_owned());
            it.behind.of_current = signing_with_it;
        })
    };
    assert_eq!(progress.decide(&old(1), start), []);
    let read = start + secs(3000);
    assert_eq!(progress.decide(&old(1), read), []);
    // Its last token was issued just before.
    assert_eq!(progress.decide(&old(0), read + secs(1)), []);
    assert_eq!(progress.decide(&old(0), read + LIFE + secs(60)), []);
    let first = dropped(KeyKind::SigningKey, &"first");
    assert_eq!(progress.decide(&old(0), read + LIFE + secs(61)), first);
}

#[test]
fn another_next_key_is_published_anew() {
    let (mut progress, start) = (progress(), Instant::now());
    let published = |kid: &str| sight(|it| it.keys.signing.next = Some(kid.to_owned()));
    assert_eq!(progress.decide(&published("second"), start), []);
    let other = start + secs(100);
    assert_eq!(progress.decide(&published("third"), other), []);
    assert_eq!(progress.decide(&published("third"), other + secs(119)), []);
    assert_eq!(
        progress
            .decide(&published("third"), other + secs(120))
            .len(),
        1
    );
}

#[test]
fn a_new_leader_waits_anew() {
    let start = Instant::now();
    let published = sight(|it| it.keys.signing.next = Some("second".to_owned()));
    let mut first = progress();
    assert_eq!(first.decide(&published, start), []);
    let mut second = progress();
    assert_eq!(second.decide(&published, start + secs(119)), []);
    assert_eq!(second.decide(&published, start + secs(238)), []);
    assert_eq!(second.decide(&published, start + secs(239)).len(), 1);
}

#[test]
fn the_old_signing_key_is_published_until_its_last_token_has_expired() {
    let (mut progress, start) = (progress(), Instant::now());
    let old = sight(|it| {
        it.keys.signing.current = "second".to_owned();
        it.keys.signing.previous = Some("first".to_owned());
        // It is not needed by any run.
        it.runs.unknown = true;
    });
    let last = secs(15 * 60 + 60);
    assert_eq!(progress.decide(&old, start), []);
    assert_eq!(progress.decide(&old, start + last - secs(1)), []);
    assert_eq!(
        progress.decide(&old, start + last),
        dropped(KeyKind::SigningKey, &"first")
    );
}

#[test]
fn the_old_signing_key_stays_while_longer_tokens_of_before_are_valid() {
    let (mut progress, start) = (progress(), Instant::now());
    let old = |longer_tokens| {
        sight(|it| {
            it.keys.signing.previous = Some("zeroth".to_owned());
            it.longer_tokens = longer_tokens;
        })
    };
    assert_eq!(progress.decide(&old(true), start), []);
    assert_eq!(progress.decide(&old(true), start + secs(36_000)), []);
    let gone = dropped(KeyKind::SigningKey, &"zeroth");
    assert_eq!(progress.decide(&old(false), start + secs(36_003)), gone);
    // It does not begin to wait only then, nor does it wait less.
    let mut progress = self::progress();
    assert_eq!(progress.decide(&old(false), start), []);
}

#[test]
fn a_next_signing_key_waits_for_the_old_one_to_go() {
    let (mut progress, start) = (progress(), Instant::now());
    let both = sight(|it| {
        it.keys.signing.previous = Some("zeroth".to_owned());
        it.keys.signing.next = Some("second".to_owned());
    });
    progress.decide(&both, start);
    assert_eq!(
        progress.decide(&both, start + secs(3600)),
        dropped(KeyKind::SigningKey, &"zeroth")
    );
    let gone = sight(|it| it.keys.signing.next = Some("second".to_owned()));
    assert_eq!(progress.decide(&gone, start + secs(3603)), []);
    assert_eq!(progress.decide(&gone, start + secs(3723)).len(), 1);
}

#[test]
fn the_old_keypair_goes_when_nobody_was_started_with_it_for_a_while() {
    let (mut progress, start) = (progress(), Instant::now());
    let needed = |by: usize| {
        sight(|it| {
            it.keys.keypair.previous = Some(id(9));
            it.runs.live = 5;
            it.runs.of_other_keypair = by;
        })
    };
    assert_eq!(progress.decide(&needed(1), start), []);
    assert_eq!(progress.decide(&needed(1), start + secs(36_000)), []);
    let ended = start + secs(36_003);
    assert_eq!(progress.decide(&needed(0), ended), []);
    assert_eq!(progress.decide(&needed(0), ended + secs(179)), []);
    // A start that had begun with it before.
    assert_eq!(progress.decide(&needed(1), ended + secs(180)), []);
    let ended = ended + secs(183);
    assert_eq!(progress.decide(&needed(0), ended), []);
    assert_eq!(progress.decide(&needed(0), ended + secs(179)), []);
    assert_eq!(
        progress.decide(&needed(0), ended + secs(180)),
        dropped(KeyKind::Keypair, &id(9))
    );
}

#[test]
fn nothing_goes_while_there_may_be_runs_that_are_not_seen() {
    let (mut progress, start) = (progress(), Instant::now());
    let look = |unknown: bool| {
        sight(|it| {
            it.keys.keypair.previous = Some(id(9));
            it.keys.root.previous = Some(id(8));
            it.runs.unknown = unknown;
        })
    };
    assert_eq!(progress.decide(&look(true), start), []);
    assert_eq!(progress.decide(&look(true), start + secs(36_000)), []);
    let seen = start + secs(36_003);
    assert_eq!(progress.decide(&look(false), seen), []);
    assert_eq!(progress.decide(&look(false), seen + secs(90)), []);
    // A new namespace is not read yet.
    assert_eq!(progress.decide(&look(true), seen + secs(178)), []);
    assert_eq!(progress.decide(&look(true), seen + secs(181)), []);
    assert_eq!(progress.decide(&look(false), seen + secs(184)).len(), 2);
}

#[test]
fn the_old_root_goes_when_all_have_seen_a_key_of_the_new_one() {
    let start = Instant::now();
    let needed = |live: usize, by: usize| {
        sight(|it| {
            it.keys.root.previous = Some(id(9));
            it.runs.live = live;
            it.runs.of_other_root = by;
        })
    };
    let mut here = progress();
    assert_eq!(here.decide(&needed(2, 1), start), []);
    let written = start + secs(600);
    // The last Secret is written: the kubelet takes its time, and clocks do not tick together.
    assert_eq!(here.decide(&needed(2, 0), written), []);
    assert_eq!(here.decide(&needed(2, 0), written + secs(179)), []);
    let gone = dropped(KeyKind::SessionRoot, &id(9));
    assert_eq!(here.decide(&needed(2, 0), written + secs(180)), gone);

    // A slower way to the session takes longer, unless there is none.
    let slow = || Progress::new(Waits::default(), LIFE, secs(600));
    let mut progress = slow();
    progress.decide(&needed(1, 0), start);
    assert_eq!(progress.decide(&needed(1, 0), start + secs(659)), []);
    assert_eq!(progress.decide(&needed(1, 0), start + secs(660)), gone);
    let mut progress = slow();
    progress.decide(&needed(0, 0), start);
    assert_eq!(progress.decide(&needed(0, 0), start + secs(180)), gone);
}

/// What may happen between two looks.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// A session starts, with the keypair and root of this moment or (a start that takes long) of
    /// some time before.
    Start { took: u64 },
    /// The oldest one ends.
    End,
    /// The refresh writes all Secrets anew.
    Refresh,
    /// Somebody asks for a rotation of both.
    Rotate,
    /// Nothing is seen until the next event.
    Blind,
    /// Another leader.
    Lead,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (0_u64..120).prop_map(|took| Event::Start { took }),
        2 => Just(Event::End),
        2 => Just(Event::Refresh),
        2 => Just(Event::Rotate),
        1 => Just(Event::Blind),
        1 => Just(Event::Lead),
    ]
}

/// A key in use, what came before, and since when.
struct World {
    current: u8,
    previous: Option<u8>,
    rotated_at: u64,
    made: u8,
}

proptest! {
    /// Whatever comes and goes: no key that a live run has goes away.
    #[test]
    fn no_key_goes_that_somebody_needs(
        events in proptest::collection::vec((event(), 1_u64..400), 1..60),
    ) {
        let start = Instant::now();
        let mut now = 0_u64;
        let mut progress = progress();
        let mut world = World { current: 1, previous: None, rotated_at: 0, made: 1 };
        // Of each run: its keypair, its root, the root before, and when the root was written.
        let mut runs: Vec<(u8, u8, u8, u64)> = Vec::new();
        // Starts that go on: when they are done, and with what.
        let mut starting: Vec<(u64, u8)> = Vec::new();
        for (event, pause) in events {
            let mut blind = false;
            match event {
                Event::Start { took } => starting.push((now + took, world.current)),
                Event::End => if !runs.is_empty() { runs.remove(0); },
                Event::Refresh => for run in &mut runs {
                    if run.1 != world.current {
                        *run = (run.0, world.current, run.1, now);
                    }
                },
                Event::Rotate => if world.previous.is_none() {
                    world.made += 1;
                    world.previous = Some(world.current);
                    world.current = world.made;
                    world.rotated_at = now;
                },
                Event::Blind => blind = true,
                Event::Lead => progress = self::progress(),
            }
            let until = now + pause;
            while now < until {
                now += 3;
                let done = starting.iter().filter(|(at, _)| *at <= now);
                runs.extend(done.map(|(_, key)| (*key, *key, *key, 0)));
                starting.retain(|(at, _)| *at > now);
                let look = sight(|it| {
                    it.keys.keypair.current = id(world.current);
                    it.keys.keypair.previous = world.previous.map(id);
                    it.keys.root = it.keys.keypair.clone();
                    it.runs.unknown = blind;
                    if !blind {
                        it.runs.live = runs.len();
                        it.runs.of_other_keypair =
                            runs.iter().filter(|run| run.0 != world.current).count();
                        it.runs.of_other_root =
                            runs.iter().filter(|run| run.1 != world.current).count();
                    }
                });
                let mut gone = 0;
                for step in progress.decide(&look, start + secs(now)) {
                    let Step::Drop { kind, previous } = step else { continue };
                    let old = world.previous.unwrap();
                    prop_assert_eq!(previous, id(old).to_string());
                    prop_assert!(starting.iter().all(|(_, key)| *key != old), "one starts");
                    for run in &runs {
                        if kind == KeyKind::Keypair {
                            prop_assert_ne!(run.0, old);
                        } else {
                            prop_assert_ne!(run.1, old);
                            let is_seen = now >= run.3 + LAG.as_secs();
                            prop_assert!(run.2 != old || is_seen, "not seen yet");
                        }
                    }
                    gone += 1;
                }
                // One Secret here stands for both.
                if gone == 2 {
                    world.previous = None;
                }
            }
        }
    }
}
