//! Memory and descriptors of the replicas: level, or rising?

use std::{
    fmt, fs,
    sync::{Arc, Mutex, PoisonError},
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

/// How much more there may be in the last third of the run than in the first: a quarter, and this.
const SLACK_MEMORY: u64 = 16 * 1024 * 1024;
const SLACK_DESCRIPTORS: u64 = 20;

/// All samples.
pub struct Levels(Arc<Mutex<Vec<Sample>>>);

struct Sample {
    memory: u64,
    descriptors: u64,
}

impl Levels {
    /// Measures until `quit`.
    pub fn open(pids: Pids, quit: CancellationToken, tasks: &mut JoinSet<()>) -> Self {
        let samples: Arc<Mutex<Vec<Sample>>> = Arc::default();
        let taken = Arc::clone(&samples);
        tasks.spawn(async move {
            let mut since: Vec<(u32, Instant)> = Vec::new();
            let measuring = async {
                loop {
                    let now: Vec<u32> = {
                        let pids = pids.lock().unwrap_or_else(PoisonError::into_inner);
                        pids.iter().flatten().copied().collect()
                    };
                    since.retain(|(pid, _)| now.contains(pid));
                    for pid in now {
                        if !since.iter().any(|(known, _)| *known == pid) {
                            since.push((pid, Instant::now()));
                        }
                    }
                    let grown = since.iter().filter(|(_, since)| since.elapsed() >= GROWN);
                    let new: Vec<_> = grown.filter_map(|(pid, _)| sample(*pid)).collect();
                    taken
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .extend(new);
                    sleep(PAUSE).await;
                }
            };
            quit.run_until_cancelled(measuring).await;
        });
        Self(samples)
    }

    /// Whether they are level.
    pub fn judge(&self, findings: &Findings) {
        let [first, _, last] = self.thirds();
        let (memory, most) = (last.memory, first.memory / 4 * 5 + SLACK_MEMORY);
        if memory > most {
            let what = format!("{} after {}", mebibytes(memory), mebibytes(first.memory));
            findings.add("memory rises", what);
        }
        let (descriptors, most) = (
            last.descriptors,
            first.descriptors / 4 * 5 + SLACK_DESCRIPTORS,
        );
        if descriptors > most {
            let what = format!("{descriptors} after {}", first.descriptors);
            findings.add("descriptors rise", what);
        }
    }

    /// The median of each third of the run.
    fn thirds(&self) -> [Sample; 3] {
        let samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let third = samples.len().div_ceil(3).max(1);
        [0, 1, 2].map(|number| {
            let part = samples.iter().skip(number * third).take(third);
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
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(&["replicas, third of the run", "memory", "descriptors"]);
        for (name, third) in ["first", "second", "last"].iter().zip(self.thirds()) {
            let cells = [mebibytes(third.memory), third.descriptors.to_string()];
            let [memory, descriptors] = cells;
            table.row(&[(*name).to_owned(), memory, descriptors]);
        }
        write!(f, "{table}")
    }
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
