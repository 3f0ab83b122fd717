//! Against a model that is simple and slow: any marks, runs and times in any order.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use futures_util::FutureExt as _;
use proptest::prelude::*;

use super::{state::Turn, *};

#[derive(Debug, Clone)]
enum Step {
    Mark(Handler, usize),
    Take(Share),
    Finish(usize, bool),
    Pass(u64),
    Clear(Share),
}

const KEYS: [&str; 7] = ["a1", "a2", "a3", "a4", "b1", "b2", "c1"];

/// A group may have three of these.
const FEW_PLACES: usize = 6;

type Job = (Handler, &'static str);

/// Due work that could run now, by group and the order within it.
type Candidates = BTreeMap<&'static str, Vec<(Turn, Job)>>;

fn job(lease: &Lease<Handler, &'static str>) -> Job {
    (lease.handler(), *lease.key())
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let handler = || prop_oneof![Just(Make), Just(Report), Just(Tidy)];
    let share = || prop_oneof![4 => Just(Share::Main), 1 => Just(Share::Side)];
    let step = prop_oneof![
        40 => (handler(), 0..KEYS.len()).prop_map(|(handler, key)| Step::Mark(handler, key)),
        40 => share().prop_map(Step::Take),
        30 => (0..6_usize, any::<bool>()).prop_map(|(lease, ok)| Step::Finish(lease, ok)),
        10 => (0..5_000_u64).prop_map(Step::Pass),
        1 => share().prop_map(Step::Clear),
    ];
    prop::collection::vec(step, 1..200)
}

/// What the queue owes.
#[derive(Default)]
struct Model {
    /// Whether a run is owed.
    owed: BTreeMap<Job, bool>,
    running: HashSet<Job>,
    /// Runs that nobody wants any more if they fail.
    forgotten: HashSet<Job>,
    /// For each group that has work due and none that runs: which others went first.
    overtaken: HashMap<(Share, &'static str), BTreeSet<&'static str>>,
}

impl Model {
    fn runs_of(&self, share: Share, of: &str) -> usize {
        let counts = |(handler, key): &&Job| handler.share() == share && group(key) == of;
        self.running.iter().filter(counts).count()
    }

    fn is_busy(&self, key: &str) -> bool {
        self.running.iter().any(|(_, of)| *of == key)
    }

    fn candidates(&self, queue: &Queue, share: Share) -> Candidates {
        let mut candidates = Candidates::new();
        for (job, entry) in &queue.lock().entries {
            let (Stage::Waiting(turn) | Stage::Parked(turn)) = entry.stage else {
                continue;
            };
            if job.0.share() == share && turn.at <= Instant::now() && !self.is_busy(job.1) {
                candidates
                    .entry(group(job.1))
                    .or_default()
                    .push((turn, *job));
            }
        }
        for jobs in candidates.values_mut() {
            jobs.sort();
        }
        candidates
    }

    fn take(&mut self, share: Share, candidates: &Candidates, taken: Option<Job>) {
        let fewest = candidates.keys().map(|of| self.runs_of(share, of)).min();
        let fewest = fewest.filter(|fewest| *fewest < FEW_PLACES / 2);
        // Whoever had nothing to do has lost its turn.
        let waits = |(of, group): &(Share, &str)| *of != share || candidates.contains_key(group);
        self.overtaken.retain(|it, _| waits(it));
        let (Some(job), Some(fewest)) = (taken, fewest) else {
            assert_eq!((taken, fewest), (None, None), "of {candidates:?}");
            return;
        };
        let of = group(job.1);
        assert_eq!(candidates[of][0].1, job, "not the earliest");
        assert_eq!(self.runs_of(share, of), fewest, "{of} has more than others");
        for waiting in candidates.keys().filter(|waiting| **waiting != of) {
            if self.runs_of(share, waiting) == 0 {
                let overtaken = self.overtaken.entry((share, waiting)).or_default();
                assert!(overtaken.insert(of), "{of} overtook {waiting} twice");
            }
        }
        self.overtaken.remove(&(share, of));
        self.begin(job);
    }

    fn begin(&mut self, job: Job) {
        assert_eq!(
            self.owed.insert(job, false),
            Some(true),
            "nobody asked for {job:?}"
        );
        assert!(!self.is_busy(job.1), "two runs for {job:?}");
        self.running.insert(job);
    }

    fn end(&mut self, lease: Lease<Handler, &'static str>, success: bool) {
        let job = job(&lease);
        assert!(self.running.remove(&job));
        let is_forgotten = self.forgotten.remove(&job);
        if success {
            lease.succeed();
            return;
        }
        if !is_forgotten {
            self.owed.insert(job, true);
        }
        assert_eq!(lease.fail().is_none(), is_forgotten, "{job:?}");
    }

    fn mark(&mut self, job: Job) {
        self.owed.insert(job, true);
        self.forgotten.remove(&job);
    }

    fn clear(&mut self, share: Share) {
        self.owed.retain(|(handler, _), _| handler.share() != share);
        self.overtaken.retain(|(in_share, _), _| *in_share != share);
        let running = self.running.iter().filter(|it| it.0.share() == share);
        self.forgotten.extend(running);
    }
}

async fn check(steps: Vec<Step>) {
    let queue = queue();
    let mut model = Model::default();
    let mut leases: Vec<Lease<Handler, &'static str>> = Vec::new();
    for step in steps {
        match step {
            Step::Mark(handler, key) => {
                queue.mark(handler, &KEYS[key]);
                model.mark((handler, KEYS[key]));
            }
            Step::Take(share) => {
                let candidates = model.candidates(&queue, share);
                let taken = queue.next(share, FEW_PLACES).now_or_never();
                model.take(share, &candidates, taken.as_ref().map(job));
                leases.extend(taken);
            }
            Step::Finish(number, success) => {
                if number < leases.len() {
                    model.end(leases.remove(number), success);
                }
            }
            Step::Pass(millis) => advance(Duration::from_millis(millis)).await,
            Step::Clear(share) => {
                queue.clear(share);
                model.clear(share);
            }
        }
    }
    // In the end everything that was ever asked for has run after it was asked for.
    for lease in leases {
        model.end(lease, true);
    }
    while let Some((handler, _)) = model
        .owed
        .iter()
        .find_map(|(job, owed)| owed.then_some(*job))
    {
        let due = queue.next(handler.share(), PLACES);
        let lease = timeout(Duration::from_secs(3600), due).await;
        let lease = lease.expect("what is owed is due within an hour");
        model.begin(job(&lease));
        model.end(lease, true);
    }
    assert!(queue.lock().is_empty(), "{:?}", queue.lock());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

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
