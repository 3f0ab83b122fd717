use tokio::time::{advance, timeout};

use super::{
    state::{MAX_MARKED_PAUSE, Stage},
    *,
};

mod fair;
mod model;

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
    Tidy,
}

use Handler::{Make, Report, Tidy};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Share {
    Main,
    Side,
}

impl Work for Handler {
    type Share = Share;

    fn share(self) -> Share {
        match self {
            Make | Report => Share::Main,
            Tidy => Share::Side,
        }
    }
}

/// Enough for all that a test has due at once.
const PLACES: usize = 100;

type Queue = WorkQueue<Handler, &'static str>;

/// A key's group is its first letter.
fn group(key: &str) -> &str {
    &key[..1]
}

fn queue() -> Queue {
    WorkQueue::new(POLICY, Arc::new(|key| Group::of(group(key))))
}

async fn next(queue: &Queue) -> Lease<Handler, &'static str> {
    let next = timeout(Duration::from_secs(3600), queue.next(Share::Main, PLACES)).await;
    next.expect("work is due within an hour")
}

fn nothing_due(queue: &Queue) -> bool {
    let taken = queue.lock().take(Share::Main, PLACES, Instant::now());
    taken.is_err()
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
        if lease.handler() == Make {
            lease.fail();
        } else {
            reports += 1;
            lease.succeed();
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
    assert_eq!(queue.depth(Make), 0);
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
    assert_eq!(queue.depth(Make), 0);
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
async fn what_is_another_shares_is_left_alone() {
    let queue = queue();
    queue.mark(Make, &"a");
    queue.mark(Tidy, &"b");
    let lease = queue.next(Share::Side, PLACES).await;
    assert_eq!(*lease.key(), "b");
    let other = timeout(Duration::from_secs(60), queue.next(Share::Side, PLACES)).await;
    assert!(other.is_err());
    assert_eq!(*next(&queue).await.key(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_mark_wakes_who_waits() {
    let queue = queue();
    let waiting = queue.next(Share::Main, PLACES);
    let marking = async {
        tokio::time::sleep(Duration::from_secs(5)).await;
        queue.mark(Make, &"a");
    };
    let (lease, ()) = tokio::join!(waiting, marking);
    assert_eq!(*lease.key(), "a");
}

#[tokio::test(start_paused = true)]
async fn a_key_runs_once_at_a_time_in_all_shares_together() {
    let queue = queue();
    queue.mark(Make, &"a");
    queue.mark(Tidy, &"a");
    let make = next(&queue).await;
    let tidy = queue.next(Share::Side, PLACES);
    tokio::pin!(tidy);
    assert!(timeout(Duration::from_secs(60), &mut tidy).await.is_err());
    make.succeed();
    assert_eq!(tidy.await.handler(), Tidy);
}

#[tokio::test(start_paused = true)]
async fn what_is_due_and_for_how_long_is_known_at_any_time() {
    let queue = queue();
    assert_eq!((queue.depth(Make), queue.oldest_due(Make)), (0, None));
    queue.mark(Make, &"a");
    advance(Duration::from_secs(3)).await;
    queue.mark(Make, &"b");
    queue.mark(Report, &"a");
    advance(Duration::from_secs(4)).await;
    assert_eq!(queue.depth(Make), 2);
    assert_eq!(queue.oldest_due(Make), Some(Duration::from_secs(7)));

    let a = next(&queue).await;
    assert_eq!(queue.depth(Make), 2);
    assert_eq!(queue.oldest_due(Make), Some(Duration::from_secs(4)));
    let b = next(&queue).await;
    assert_eq!(queue.oldest_due(Make), None);
    // It waits for the run of its key, not for a retry.
    assert_eq!(queue.oldest_due(Report), Some(Duration::from_secs(4)));

    // What backs off is not due.
    b.fail();
    assert_eq!((queue.depth(Make), queue.oldest_due(Make)), (2, None));
    a.succeed();
    assert_eq!(queue.depth(Make), 1);
    advance(POLICY.initial).await;
    assert!(queue.oldest_due(Make).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_cleared_share_forgets_what_waits_and_lets_end_what_runs() {
    let queue = queue();
    for key in ["a", "b", "c", "d"] {
        queue.mark(Make, &key);
    }
    let (a, b, c) = (next(&queue).await, next(&queue).await, next(&queue).await);
    queue.mark(Make, &"a");
    queue.mark(Report, &"a");
    queue.mark(Tidy, &"a");

    queue.clear(Share::Main);
    queue.mark(Make, &"c");

    assert_eq!(a.fail(), None);
    b.succeed();
    // Another share's work stays, though it was parked.
    assert_eq!(*queue.next(Share::Side, PLACES).await.key(), "a");
    // What was marked afterwards is new.
    assert_eq!(c.fail().unwrap().failures, 1);
    next(&queue).await.succeed();
    assert!(nothing_due(&queue));
    assert_eq!((queue.depth(Make), queue.depth(Report)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn what_was_cleared_can_be_marked_again_at_once() {
    let queue = queue();
    queue.mark(Make, &"a");
    for _ in 0..12 {
        next(&queue).await.fail();
    }
    queue.clear(Share::Main);
    assert_eq!(queue.depth(Make), 0);

    queue.mark(Make, &"a");

    assert_eq!(queue.oldest_due(Make), Some(Duration::ZERO));
    assert_eq!(next(&queue).await.fail().unwrap().failures, 1);
}
