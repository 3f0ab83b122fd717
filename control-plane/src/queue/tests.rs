use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;
use tokio::time::{advance, timeout};

use super::*;

const POLICY: Policy = Policy {
    initial: Duration::from_millis(100),
    max: Duration::from_secs(10),
    brief: Duration::from_secs(1),
    longest_asked: Duration::from_secs(1),
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Handler {
    Make,
    Report,
}

use Handler::{Make, Report};

const BOTH: [Handler; 2] = [Make, Report];

type Queue = WorkQueue<Handler, &'static str>;

fn queue() -> Queue {
    WorkQueue::new(POLICY)
}

async fn next(queue: &Queue) -> Lease<Handler, &'static str> {
    let next = timeout(Duration::from_secs(3600), queue.next(&BOTH)).await;
    next.expect("work is due within an hour")
}

fn nothing_due(queue: &Queue) -> bool {
    queue.lock().take(&BOTH, Instant::now()).is_err()
}

#[tokio::test(start_paused = true)]
async fn work_due_first_runs_first() {
    let queue = queue();
    queue.mark(Make, &"a");
    advance(Duration::from_millis(1)).await;
    queue.mark(Report, &"b");
    let first = next(&queue).await;
    assert_eq!((first.handler(), *first.key()), (Make, "a"));
    let second = next(&queue).await;
    assert_eq!((second.handler(), *second.key()), (Report, "b"));
}

#[tokio::test(start_paused = true)]
async fn a_short_retry_does_not_wait_behind_a_longer_one() {
    let queue = queue();
    queue.mark(Make, &"often");
    for _ in 0..12 {
        next(&queue).await.fail();
    }
    // Bounds double: the thirteenth wait of `often` is seconds on average, the first of `once` is
    // below 100 ms. However chance has it, who is due first comes first.
    queue.mark(Make, &"once");
    let lease = next(&queue).await;
    let (key, waits) = match *lease.key() {
        "once" => ("once", lease.fail()),
        other => panic!("{other} was not due"),
    };
    assert!(waits.is_some_and(|failed| failed.wait <= POLICY.initial));
    let due = |key| match queue.lock().entries[&(Make, key)].stage {
        Stage::Waiting(turn) => turn.at,
        _ => panic!("{key} does not wait"),
    };
    let first = if due("once") < due("often") {
        key
    } else {
        "often"
    };
    assert_eq!(*next(&queue).await.key(), first);
}

#[tokio::test(start_paused = true)]
async fn one_handler_failing_runs_no_other_again() {
    let queue = queue();
    queue.mark(Make, &"a");
    queue.mark(Report, &"a");
    let failing = next(&queue).await;
    assert_eq!(failing.handler(), Make);
    failing.fail();
    let mut reports = 0;
    for _ in 0..6 {
        let lease = next(&queue).await;
        match lease.handler() {
            Make => drop(lease.fail()),
            Report => {
                reports += 1;
                lease.succeed();
            }
        }
    }
    assert_eq!(reports, 1);
}

#[tokio::test(start_paused = true)]
async fn work_is_never_dropped_however_often_it_fails() {
    let queue = queue();
    queue.mark(Make, &"a");
    for failures in 1..=500 {
        let failed = next(&queue).await.fail().unwrap();
        assert_eq!(failed.failures, failures);
        assert!(failed.wait <= POLICY.max);
    }
    next(&queue).await.succeed();
    assert_eq!(queue.len(Make), 0);
}

#[tokio::test(start_paused = true)]
async fn one_run_at_a_time_for_a_key_and_many_keys_at_once() {
    let queue = queue();
    queue.mark(Make, &"a");
    queue.mark(Report, &"a");
    queue.mark(Make, &"b");
    let a = next(&queue).await;
    let b = next(&queue).await;
    assert_eq!((*a.key(), *b.key()), ("a", "b"));
    assert!(nothing_due(&queue));
    b.succeed();
    assert!(nothing_due(&queue));
    a.succeed();
    let report = next(&queue).await;
    assert_eq!((report.handler(), *report.key()), (Report, "a"));
}

#[tokio::test(start_paused = true)]
async fn a_mark_during_a_run_is_kept() {
    let queue = queue();
    queue.mark(Make, &"a");
    let lease = next(&queue).await;
    queue.mark(Make, &"a");
    queue.mark(Make, &"a");
    lease.succeed();
    next(&queue).await.succeed();
    assert_eq!(queue.len(Make), 0);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_cut_off_is_tried_again() {
    let queue = queue();
    queue.mark(Make, &"a");
    drop(next(&queue).await);
    next(&queue).await.succeed();
}

#[tokio::test(start_paused = true)]
async fn a_mark_brings_a_retry_forward_but_makes_no_storm() {
    let queue = queue();
    queue.mark(Make, &"a");
    // Every run fails, and each failure causes an event.
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed() < Duration::from_secs(10) {
        let lease = next(&queue).await;
        runs += 1;
        lease.fail();
        queue.mark(Make, &"a");
    }
    // Pauses of 0.25, 0.5, 1, 2, 2, ... seconds, which chance shortens. A storm has thousands.
    assert!((4..=60).contains(&runs), "{runs} runs");

    let failed_at = Instant::now();
    queue.mark(Make, &"a");
    next(&queue).await;
    assert!(failed_at.elapsed() <= MAX_MARKED_PAUSE);
}

#[tokio::test(start_paused = true)]
async fn handlers_of_others_are_left_alone() {
    let queue = queue();
    queue.mark(Make, &"a");
    queue.mark(Report, &"b");
    let lease = queue.next(&[Report]).await;
    assert_eq!(*lease.key(), "b");
    let other = timeout(Duration::from_secs(60), queue.next(&[Report])).await;
    assert!(other.is_err());
    assert_eq!(*queue.next(&[Make]).await.key(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_mark_wakes_who_waits() {
    let queue = queue();
    let waiting = queue.next(&BOTH);
    let marking = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        queue.mark(Make, &"a");
    };
    let (lease, ()) = tokio::join!(waiting, marking);
    assert_eq!(*lease.key(), "a");
}

#[derive(Debug, Clone)]
enum Step {
    Mark(Handler, usize),
    Take(bool),
    Finish(usize, bool),
    Pass(u64),
}

const KEYS: [&str; 4] = ["a", "b", "c", "d"];

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let handler = prop_oneof![Just(Make), Just(Report)];
    let step = prop_oneof![
        4 => (handler, 0..KEYS.len()).prop_map(|(handler, key)| Step::Mark(handler, key)),
        4 => any::<bool>().prop_map(Step::Take),
        3 => (0..4_usize, any::<bool>()).prop_map(|(lease, ok)| Step::Finish(lease, ok)),
        1 => (0..5_000_u64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..200)
}

/// What the queue owes, in its simplest form: for each handler and key, whether a run is owed, and
/// which runs are under way.
#[derive(Default)]
struct Model {
    owed: BTreeMap<(Handler, &'static str), bool>,
    running: HashSet<&'static str>,
}

async fn check(steps: Vec<Step>) {
    let queue = queue();
    let mut model = Model::default();
    let mut leases: Vec<Lease<Handler, &'static str>> = Vec::new();
    let begin = |model: &mut Model, lease: &Lease<Handler, &'static str>| {
        let work = (lease.handler(), *lease.key());
        assert_eq!(
            model.owed.insert(work, false),
            Some(true),
            "nobody asked for {work:?}"
        );
        assert!(model.running.insert(lease.key()), "two runs of {work:?}");
    };
    let end = |model: &mut Model, lease: Lease<Handler, &'static str>, success: bool| {
        model.running.remove(lease.key());
        if success {
            lease.succeed();
        } else {
            model.owed.insert((lease.handler(), *lease.key()), true);
            lease.fail();
        }
    };
    for step in steps {
        match step {
            Step::Mark(handler, key) => {
                queue.mark(handler, &KEYS[key]);
                model.owed.insert((handler, KEYS[key]), true);
            }
            Step::Take(only_make) => {
                let handlers: &[Handler] = if only_make { &[Make] } else { &BOTH };
                let before: Vec<_> = {
                    let state = queue.lock();
                    let waits = |(work, entry): (&(Handler, &'static str), &Entry)| {
                        let free = !state.processing.contains_key(work.1);
                        match entry.stage {
                            Stage::Waiting(turn) if free && handlers.contains(&work.0) => {
                                Some((turn, *work))
                            }
                            _ => None,
                        }
                    };
                    state.entries.iter().filter_map(waits).collect()
                };
                let earliest = before.iter().min_by_key(|(turn, _)| *turn);
                let taken = timeout(Duration::ZERO, queue.next(handlers)).await;
                match (taken, earliest) {
                    (Ok(lease), Some((_, work))) => {
                        assert_eq!((lease.handler(), *lease.key()), *work);
                        begin(&mut model, &lease);
                        leases.push(lease);
                    }
                    (Ok(lease), None) => panic!("{:?} cannot be due", lease.key()),
                    (Err(_), Some((turn, work))) => {
                        assert!(
                            turn.at > Instant::now(),
                            "{work:?} is due, but was not given"
                        );
                    }
                    (Err(_), None) => {}
                }
            }
            Step::Finish(number, success) => {
                if number < leases.len() {
                    let lease = leases.remove(number);
                    end(&mut model, lease, success);
                }
            }
            Step::Pass(millis) => advance(Duration::from_millis(millis)).await,
        }
    }
    // In the end everything that was ever asked for has run after it was asked for.
    for lease in leases {
        end(&mut model, lease, true);
    }
    while model.owed.values().any(|owed| *owed) {
        let lease = next(&queue).await;
        begin(&mut model, &lease);
        end(&mut model, lease, true);
    }
    assert!(nothing_due(&queue));
    let state = queue.lock();
    assert!(
        state.entries.is_empty() && state.processing.is_empty(),
        "{state:?}"
    );
    assert!(state.due.values().all(BTreeMap::is_empty), "{state:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn queue_keeps_its_promises_in_any_order_of_events(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(check(steps));
    }
}
