//! Memory and descriptors of the replicas: level, or rising?
//!
//! In: the replicas' process ids. Out: findings, and a table. Each life of a replica, from its start
//! to its end, is judged by itself: what a leader keeps says nothing of what a replica keeps that
//! does not lead, and a restart begins anew.

use std::{
    fmt, fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ambient_testing::{
    processes::memory,
    table::{Table, mebibytes},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{findings::Findings, system::Pids};

/// Time between two samples.
const PAUSE: Duration = Duration::from_secs(5);

/// A process is not measured before this age: it is still growing to its size.
const GROWN: Duration = Duration::from_secs(20);

/// Samples of the shortest life that is judged: five minutes.
const LONG: usize = 60;

/// How much more there may be in the last third of a life than in the first: a tenth, and this.
const SLACK: Sample = Sample {
    memory: 4 * 1024 * 1024,
    descriptors: 20,
};

/// All lives.
pub struct Levels(Arc<Mutex<Vec<Life>>>);

/// A replica between its start and its end.
struct Life {
    replica: usize,
    pid: u32,
    since: Instant,
    samples: Vec<Sample>,
}

#[derive(Clone, Copy)]
struct Sample {
    memory: u64,
    descriptors: u64,
}

impl Levels {
    /// Measures until `quit`.
    pub fn open(pids: Pids, quit: CancellationToken, tasks: &mut JoinSet<()>) -> Self {
        let lives: Arc<Mutex<Vec<Life>>> = Arc::default();
        let measured = Arc::clone(&lives);
        tasks.spawn(async move {
            let measuring = async {
                loop {
                    let now = lock(&pids).clone();
                    measure(&mut lock(&measured), &now);
                    sleep(PAUSE).await;
                }
            };
            quit.run_until_cancelled(measuring).await;
        });
        Self(lives)
    }

    /// Whether they are level, and whether so much can be said of each replica. In a run that is too
    /// short for that, what cannot be said is none of the findings.
    pub fn judge(&self, findings: &Findings, replicas: usize, is_full: bool) {
        let lives = lock(&self.0);
        for replica in (0..replicas).filter(|_| is_full) {
            let mut its = lives.iter().filter(|it| it.replica == replica);
            if !its.any(Life::is_long) {
                findings.add(
                    "no life of a replica was judged",
                    format!("replica {replica}"),
                );
            }
        }
        for life in lives.iter().filter(|it| it.is_long()) {
            let [first, _, last] = life.thirds();
            let of = life.replica;
            if last.memory > most(first.memory, SLACK.memory) {
                let [first, last] = [first, last].map(|it| mebibytes(it.memory));
                findings.add(
                    "memory rises",
                    format!("replica {of}: {last} after {first}"),
                );
            }
            if last.descriptors > most(first.descriptors, SLACK.descriptors) {
                let [first, last] = [first, last].map(|it| it.descriptors);
                findings.add(
                    "descriptors rise",
                    format!("replica {of}: {last} after {first}"),
                );
            }
        }
    }
}

fn most(first: u64, slack: u64) -> u64 {
    first / 10 * 11 + slack
}

/// Takes a sample of each replica that runs.
fn measure(lives: &mut Vec<Life>, now: &[Option<u32>]) {
    for (replica, pid) in now.iter().enumerate() {
        let Some(pid) = *pid else { continue };
        let known = lives.iter_mut().rfind(|it| it.replica == replica);
        match known.filter(|it| it.pid == pid) {
            Some(life) if life.since.elapsed() >= GROWN => life.samples.extend(sample(pid)),
            Some(_) => {}
            None => lives.push(Life {
                replica,
                pid,
                since: Instant::now(),
                samples: Vec::new(),
            }),
        }
    }
}

impl Life {
    /// Whether it is judged.
    fn is_long(&self) -> bool {
        self.samples.len() >= LONG
    }

    /// By how many bytes memory rises in an hour, by the first and the last third.
    fn rise(&self) -> i64 {
        let [first, _, last] = self.thirds().map(|it| it.memory.cast_signed());
        // From the middle of the one to that of the other.
        let between = PAUSE.as_secs() * self.samples.len() as u64 * 2 / 3;
        (last - first) * 3600 / between.max(1).cast_signed()
    }

    /// The median of each third.
    fn thirds(&self) -> [Sample; 3] {
        let third = self.samples.len().div_ceil(3).max(1);
        [0, 1, 2].map(|number| {
            let part = self.samples.iter().skip(number * third).take(third);
            let (mut memory, mut descriptors): (Vec<_>, Vec<_>) =
                part.map(|it| (it.memory, it.descriptors)).unzip();
            Sample {
                memory: median(&mut memory),
                descriptors: median(&mut descriptors),
            }
        })
    }
}

impl fmt::Display for Levels {
    /// All lives that were judged, and how many of each replica that were not.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&[
            "life of replica",
            "minutes",
            "memory: first, second, last third",
            "rises in an hour",
            "descriptors",
        ]);
        let lives = lock(&self.0);
        for life in lives.iter().filter(|it| it.is_long()) {
            let thirds = life.thirds();
            let row = thirds.map(|it| (mebibytes(it.memory), it.descriptors.to_string()));
            let (memory, descriptors): (Vec<_>, Vec<_>) = row.into_iter().unzip();
            let rise = life.rise();
            let sign = if rise < 0 { "-" } else { "" };
            table.row(&[
                life.replica.to_string(),
                (PAUSE.as_secs() * life.samples.len() as u64 / 60).to_string(),
                memory.join(", "),
                format!("{sign}{}", mebibytes(rise.unsigned_abs())),
                descriptors.join(", "),
            ]);
        }
        write!(f, "{table}")?;
        let replicas = lives.iter().map(|it| it.replica + 1).max();
        for replica in 0..replicas.unwrap_or_default() {
            let its: Vec<_> = lives.iter().filter(|it| it.replica == replica).collect();
            let judged = its.iter().filter(|it| it.is_long()).count();
            let all = its.len();
            writeln!(f, "replica {replica}: {judged} of {all} lives judged")?;
        }
        Ok(())
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sample(pid: u32) -> Option<Sample> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some(Sample {
        memory: memory(pid, "VmRSS")?,
        descriptors: u64::try_from(descriptors).ok()?,
    })
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A replica whose memory goes from the one to the other, in mebibytes.
    fn life(replica: usize, from: u64, to: u64) -> Life {
        let count = LONG as u64;
        let memory = |at| (from * (count - at) + to * at) * 1024 * 1024 / count;
        Life {
            replica,
            pid: 1,
            since: Instant::now(),
            samples: (0..count)
                .map(|at| Sample {
                    memory: memory(at),
                    descriptors: 10,
                })
                .collect(),
        }
    }

    /// One that ended before it could be judged.
    fn short(replica: usize) -> Life {
        let mut life = life(replica, 50, 90);
        life.samples.pop();
        life
    }

    /// What is found in a run of these lives of two replicas.
    fn found(lives: Vec<Life>, is_full: bool) -> String {
        let findings = Findings::new();
        Levels(Arc::new(Mutex::new(lives))).judge(&findings, 2, is_full);
        findings.to_string()
    }

    #[test]
    fn one_replica_that_grows_is_found_beside_one_that_does_not() {
        let finds = |lives| !found(lives, false).is_empty();
        assert!(!finds(vec![life(0, 50, 50), life(1, 40, 43)]));
        assert!(finds(vec![life(0, 50, 50), life(1, 40, 60)]));
        // Not each life is larger than the one before.
        assert!(finds(vec![life(0, 40, 60), life(0, 40, 60)]));
        assert!(!finds(vec![life(0, 40, 42), life(0, 60, 62)]));
    }

    #[test]
    fn descriptors_that_grow_are_found() {
        let mut leaking = life(0, 50, 50);
        for (number, sample) in leaking.samples.iter_mut().enumerate() {
            sample.descriptors += number as u64;
        }
        assert!(found(vec![leaking], false).contains("descriptors rise"));
    }

    #[test]
    fn a_replica_of_which_no_life_was_judged_is_found_in_a_full_run() {
        let lives = || vec![life(0, 50, 50), short(0), short(1), short(1)];
        assert_eq!(found(lives(), false), "");
        let told = found(lives(), true);
        assert!(
            told.contains("no life of a replica was judged: 1\n  replica 1"),
            "{told}"
        );
        assert_eq!(found(vec![life(1, 50, 50), life(0, 50, 50)], true), "");
    }

    #[test]
    fn how_many_lives_were_judged_is_told_with_level_and_rise() {
        let lives = vec![life(0, 50, 56), short(0), short(1)];
        let told = Levels(Arc::new(Mutex::new(lives))).to_string();
        assert!(told.contains("replica 0: 1 of 2 lives judged"), "{told}");
        assert!(told.contains("replica 1: 0 of 1 lives judged"), "{told}");
        // Four in two thirds of five minutes.
        assert!(told.contains("72.0 MiB"), "{told}");
    }
}
