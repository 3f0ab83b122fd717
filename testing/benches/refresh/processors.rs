//! Who used the processors.

use std::{fs, time::Duration};

use ambient_testing::table::Table;
use tokio::time::Instant;

/// The programs that share the machine.
pub struct Processors {
    programs: Vec<(&'static str, u32)>,
}

/// Their use up to a moment.
pub struct Used {
    at: Instant,
    seconds: Vec<f64>,
}

impl Processors {
    /// These programs, by their process ids.
    pub fn new(programs: Vec<(&'static str, u32)>) -> Self {
        Self { programs }
    }

    /// Up to now; the control plane is another process each time.
    pub fn used(&self, plane: u32) -> Used {
        let own = std::process::id();
        let pids = self
            .programs
            .iter()
            .map(|(_, pid)| *pid)
            .chain([plane, own]);
        Used {
            at: Instant::now(),
            seconds: pids.map(seconds).collect(),
        }
    }

    /// Cores that each kept busy since then.
    pub fn since(&self, before: &Used, plane: u32) -> String {
        let now = self.used(plane);
        let passed = now
            .at
            .duration_since(before.at)
            .max(Duration::from_millis(1));
        let names = self.programs.iter().map(|(name, _)| *name);
        let names = names.chain(["control plane", "this program"]);
        let seconds = now.seconds.iter().zip(&before.seconds);
        let shares: Vec<_> = names
            .zip(seconds.map(|(now, before)| (now - before) / passed.as_secs_f64()))
            .collect();
        let heads: Vec<_> = shares.iter().map(|(name, _)| *name).collect();
        let mut table = Table::new(&heads);
        let cells: Vec<_> = shares
            .iter()
            .map(|(_, share)| format!("{share:.2}"))
            .collect();
        table.row(&cells);
        table.to_string()
    }
}

/// Processor time of a process so far: user and system, in ticks of 10 ms.
fn seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name.split_whitespace().skip(11).take(2);
    ticks.filter_map(|it| it.parse::<f64>().ok()).sum::<f64>() / 100.0
}
