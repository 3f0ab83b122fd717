//! Groups do not delay one another.

use super::*;

#[tokio::test(start_paused = true)]
async fn groups_take_turns_however_much_one_has_due() {
    let queue = queue();
    for key in ["a1", "a2", "a3", "a4"] {
        queue.mark(Make, &key);
    }
    queue.mark(Make, &"b1");
    queue.mark(Make, &"c1");
    queue.mark(Make, &"b2");
    let mut order = Vec::new();
    for _ in 0..7 {
        let lease = next(&queue).await;
        order.push(*lease.key());
        lease.succeed();
    }
    assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]);
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_at_once_does_not_overtake() {
    let queue = queue();
    queue.mark(Make, &"a1");
    queue.mark(Make, &"a2");
    queue.mark(Make, &"a3");
    // Each time that `b` was served it has new work: as many as it likes, but in turn.
    let mut order = Vec::new();
    for _ in 0..6 {
        queue.mark(Make, &"b1");
        let lease = next(&queue).await;
        order.push(*lease.key());
        lease.succeed();
    }
    assert_eq!(order, ["a1", "b1", "a2", "b1", "a3", "b1"]);
}

#[tokio::test(start_paused = true)]
async fn the_group_with_the_fewest_runs_goes_first() {
    let queue = queue();
    for key in ["a1", "a2", "a3", "b1", "b2"] {
        queue.mark(Make, &key);
    }
    let a1 = next(&queue).await;
    let b1 = next(&queue).await;
    let a2 = next(&queue).await;
    assert_eq!((*a1.key(), *b1.key(), *a2.key()), ("a1", "b1", "a2"));
    // `a` has waited longer, but runs twice.
    assert_eq!(*next(&queue).await.key(), "b2");
    a1.succeed();
    a2.succeed();
    queue.mark(Make, &"b3");
    assert_eq!(*next(&queue).await.key(), "a3");
}

#[tokio::test(start_paused = true)]
async fn a_group_has_half_of_the_places_at_most() {
    let queue = queue();
    for key in ["a1", "a2", "a3", "a4"] {
        queue.mark(Make, &key);
    }
    let take = || timeout(Duration::from_secs(60), queue.next(Share::Main, 4));
    let hanging = (take().await.unwrap(), take().await.unwrap());
    assert!(take().await.is_err(), "one group has more than half");

    queue.mark(Make, &"b1");
    let b1 = take().await.unwrap();
    assert_eq!(*b1.key(), "b1");
    assert!(take().await.is_err());

    // A place that is given back is taken at once, without a new mark.
    let (taken, ()) = tokio::join!(take(), async { hanging.0.succeed() });
    assert_eq!(*taken.unwrap().key(), "a3");
}

#[tokio::test(start_paused = true)]
async fn one_place_is_for_everybody() {
    let queue = queue();
    queue.mark(Make, &"a1");
    let lease = timeout(Duration::from_secs(1), queue.next(Share::Main, 1)).await;
    assert_eq!(*lease.unwrap().key(), "a1");
}

#[tokio::test(start_paused = true)]
async fn runs_in_another_share_do_not_count() {
    let queue = queue();
    queue.mark(Tidy, &"a1");
    queue.mark(Tidy, &"a2");
    let _hanging = (
        queue.next(Share::Side, 4).await,
        queue.next(Share::Side, 4).await,
    );
    queue.mark(Make, &"a3");
    queue.mark(Make, &"b1");
    assert_eq!(*next(&queue).await.key(), "a3");
}

fn many(
    count: usize,
    group_of: impl Fn(&usize) -> Group + Send + Sync + 'static,
) -> WorkQueue<(), usize> {
    let queue = WorkQueue::new(POLICY, Arc::new(group_of));
    for key in 0..count {
        queue.mark((), &key);
    }
    queue
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_failing_entries_of_one_group_delay_no_other() {
    const FAILING: usize = 10_000;
    let queue = many(FAILING, |key| {
        Group::of(if *key < FAILING { "failing" } else { "good" })
    });
    let fail = |turns: usize| {
        let queue = queue.clone();
        async move {
            for _ in 0..turns {
                queue.next((), 8).await.fail();
            }
        }
    };
    // Some are due for the first time, others again and again.
    fail(FAILING / 2).await;
    for good in 0..100 {
        queue.mark((), &(FAILING + good));
        let first = queue.next((), 8).await;
        let second = queue.next((), 8).await;
        let keys = [*first.key(), *second.key()];
        assert!(keys.contains(&(FAILING + good)), "{keys:?} went first");
        for lease in [first, second] {
            if *lease.key() < FAILING {
                lease.fail();
            } else {
                lease.succeed();
            }
        }
        fail(10).await;
    }
}

/// Each step looks things up; none goes through all entries. With scans this takes minutes, without
/// them a second.
#[tokio::test(start_paused = true)]
async fn many_entries_cost_no_more_than_few() {
    const MANY: usize = 30_000;
    for groups in [1, MANY] {
        let queue = many(MANY, move |key| Group::of(&(key % groups).to_string()));
        let began = std::time::Instant::now();
        for _ in 0..MANY {
            queue.next((), 8).await.succeed();
            queue.oldest_due(());
            queue.depth(());
        }
        assert!(queue.lock().is_empty());
        let took = began.elapsed();
        assert!(took < Duration::from_secs(20), "{groups} groups: {took:?}");
    }
}
