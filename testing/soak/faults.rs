//! Carries out the plan.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use ambient_testing::{faults::Mode, idp::Answer, programs::Running, table::Table};
use nix::sys::signal::Signal;
use tokio::{
    task::block_in_place,
    time::{Instant, sleep_until},
};

use crate::{
    findings::Findings,
    plan::{Broken, Fault, Planned, Sick},
    system::System,
};

/// How late things arrive over a slow link, and a slow identity provider answers.
const LATE: Duration = Duration::from_millis(300);
const LATE_ANSWER: Duration = Duration::from_secs(4);

/// Longest orderly end of a replica.
const DRAIN: Duration = Duration::from_secs(30);

/// Causes faults and mends them.
pub struct Faults {
    system: System,
    findings: Findings,
    begin: Instant,
    count: BTreeMap<String, usize>,
    /// What replicas said that have ended, or were looked at last.
    logs: Vec<String>,
}

/// A fault begins or ends.
enum Turn {
    Begins,
    Ends,
}

impl Faults {
    /// None yet.
    pub fn new(system: System, findings: Findings, begin: Instant) -> Self {
        Self {
            system,
            findings,
            begin,
            count: BTreeMap::new(),
            logs: Vec::new(),
        }
    }

    /// Causes all of them, and returns when the last is mended and the run is to end.
    pub async fn cause(&mut self, plan: Vec<Planned>, end: Instant) {
        let begins = plan.iter().map(|it| (it.at, Turn::Begins, it));
        let ends = plan.iter().map(|it| (it.until(), Turn::Ends, it));
        let mut turns: Vec<_> = begins.chain(ends).collect();
        turns.sort_by_key(|(at, _, _)| *at);
        for (at, turn, planned) in turns {
            sleep_until(self.begin + at).await;
            self.look().await;
            match turn {
                Turn::Begins => {
                    *self.count.entry(planned.fault.kind()).or_default() += 1;
                    let lasts = planned.lasts.as_secs_f32();
                    self.say(&format!("{} for {lasts:.1} s", planned.fault));
                    self.break_it(planned.fault).await;
                }
                Turn::Ends => {
                    self.say(&format!("{} is over", planned.fault));
                    self.mend(planned.fault).await;
                }
            }
        }
        self.say("no more faults");
        sleep_until(end).await;
    }

    async fn break_it(&mut self, fault: Fault) {
        match fault {
            Fault::KillReplica(number) => {
                if let Some(mut running) = self.system.take_replica(number) {
                    running.kill().await;
                    self.read_log(number, running.log());
                }
            }
            Fault::StopReplica(number) => {
                if let Some(mut running) = self.system.take_replica(number) {
                    running.signal(Signal::SIGTERM);
                    match running.ended_within(DRAIN).await {
                        Some(status) if status.success() => {}
                        other => self.findings.add(
                            "SIGTERM does not end a replica in order",
                            format!("{other:?}"),
                        ),
                    }
                    self.read_log(number, running.log());
                }
            }
            Fault::FreezeReplica(number) => self.signal(number, Signal::SIGSTOP),
            Fault::KillKubernetes => {
                block_in_place(|| self.system.installation.cluster.stop_api_server());
            }
            Fault::FreezeKubernetes => self.system.installation.cluster.freeze_api_server(),
            Fault::KillApiServer => self.system.installation.api_server.kill().await,
            Fault::FreezeApiServer => self.system.installation.api_server.signal(Signal::SIGSTOP),
            Fault::IdentityProvider(sick) => self.system.idp.answer(match sick {
                Sick::Down => Answer::Status(503),
                Sick::Hangs => Answer::Hang,
                Sick::LoginPage => Answer::Html,
                Sick::Expired => Answer::Expired,
                Sick::Slow => Answer::Slow(LATE_ANSWER),
            }),
            Fault::Link(number, link, broken) => {
                let link = self.system.replicas[number].link(link);
                match broken {
                    Broken::Cut => link.cut(),
                    Broken::Reset => link.reset(),
                    Broken::Refused => {
                        link.set(Mode::Refuse).await;
                        link.reset();
                    }
                    Broken::Silent => link.set(Mode::HalfOpen).await,
                    Broken::Slow => link.set(Mode::Slow(LATE)).await,
                }
            }
        }
    }

    async fn mend(&mut self, fault: Fault) {
        match fault {
            Fault::KillReplica(number) | Fault::StopReplica(number) => {
                self.system.start_replica(number);
            }
            Fault::FreezeReplica(number) => self.signal(number, Signal::SIGCONT),
            Fault::KillKubernetes => {
                block_in_place(|| self.system.installation.cluster.start_api_server());
            }
            Fault::FreezeKubernetes => self.system.installation.cluster.thaw_api_server(),
            Fault::KillApiServer => self.system.installation.start_api_server().await,
            Fault::FreezeApiServer => self.system.installation.api_server.signal(Signal::SIGCONT),
            Fault::IdentityProvider(_) => self.system.idp.answer(Answer::Token),
            Fault::Link(number, link, broken) => {
                let link = self.system.replicas[number].link(link);
                link.set(Mode::Pass).await;
                // What was silent for so long is dead on real networks, too.
                if broken == Broken::Silent {
                    link.reset();
                }
            }
        }
    }

    fn signal(&self, number: usize, signal: Signal) {
        if let Some(running) = &self.system.replicas[number].running {
            running.signal(signal);
        }
    }

    /// Whether a replica ended by itself. It is started again.
    async fn look(&mut self) {
        for number in 0..self.system.replicas.len() {
            let Some(running) = &mut self.system.replicas[number].running else {
                continue;
            };
            if let Some(status) = running.ended_within(Duration::from_millis(1)).await {
                let log = running.log();
                let last = log.last().map_or("", String::as_str);
                self.findings
                    .add("a replica ended by itself", format!("{status}: {last}"));
                self.system.start_replica(number);
            }
        }
    }

    /// The same at the end, with all logs.
    pub async fn last_look(&mut self) {
        self.look().await;
        for number in 0..self.system.replicas.len() {
            let running = self.system.replicas[number].running.as_ref();
            if let Some(log) = running.map(Running::log) {
                self.read_log(number, log);
            }
        }
    }

    fn read_log(&mut self, number: usize, log: Vec<String>) {
        for line in log {
            if line.contains("panicked") {
                self.findings.add("panic", line.as_str());
            }
            self.logs.push(format!("replica {number}: {line}"));
        }
    }

    /// Keeps what tells how a finding came about: what was asked of Kubernetes, and the replicas'
    /// logs. Gives the folder.
    pub fn keep(&self) -> PathBuf {
        let folder = tempfile::Builder::new().prefix("ambient-soak-").tempdir();
        let folder = folder.expect("a folder").keep();
        let audit = self.system.installation.cluster.folder().join("audit.log");
        fs::copy(audit, folder.join("audit.log")).expect("disk is there");
        fs::write(folder.join("replicas.log"), self.logs.join("\n")).expect("disk is there");
        folder
    }

    /// Ends the replicas in order.
    pub async fn end(mut self) {
        for number in 0..self.system.replicas.len() {
            if let Some(mut running) = self.system.take_replica(number) {
                running.signal(Signal::SIGTERM);
                let _ = running.ended_within(DRAIN).await;
            }
        }
    }

    /// How often what was broken.
    pub fn account(&self) -> Table {
        let mut table = Table::new(&["fault", "times"]);
        for (kind, count) in &self.count {
            table.row(&[kind.clone(), count.to_string()]);
        }
        table
    }

    #[expect(clippy::print_stderr, reason = "for whoever waits")]
    fn say(&self, what: &str) {
        eprintln!("[{:7.1} s] {what}", self.begin.elapsed().as_secs_f32());
    }
}
