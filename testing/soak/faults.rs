//! Carries out the plan.

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};

use ambient_testing::{
    faults::Mode,
    idp::Answer,
    kube_proxy::{asked, conflict, expired, refusal},
    programs::Running,
    proxy::{self, Call, Injected},
    table::Table,
};
use http::header::CONTENT_TYPE;
use nix::sys::signal::Signal;
use tokio::{
    task::block_in_place,
    time::{Instant, sleep_until},
};

use crate::{
    findings::Findings,
    leaders::{How, Leaders},
    plan::{Broken, Fault, Page, Planned, Refusal, Sick},
    system::System,
    weather::Weather,
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
    weather: Weather,
    leaders: Arc<Leaders>,
    begin: Instant,
    count: BTreeMap<String, Count>,
    /// What proxies answer in place of a server.
    injected: Vec<(Fault, Vec<Injected>)>,
    /// What replicas said that have ended, or were looked at last.
    logs: Vec<String>,
}

/// How often something was broken.
#[derive(Default)]
struct Count {
    times: usize,
    /// Calls that a proxy has answered.
    calls: usize,
}

/// A fault begins or ends.
enum Turn {
    Begins,
    Ends,
}

impl Faults {
    /// None yet.
    pub fn new(
        system: System,
        findings: Findings,
        weather: Weather,
        leaders: Arc<Leaders>,
        begin: Instant,
    ) -> Self {
        Self {
            system,
            findings,
            weather,
            leaders,
            begin,
            count: BTreeMap::new(),
            injected: Vec::new(),
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
                    self.count.entry(planned.fault.kind()).or_default().times += 1;
                    let lasts = planned.lasts.as_secs_f32();
                    self.say(&format!("{} for {lasts:.1} s", planned.fault));
                    self.weather.begins(planned.fault);
                    self.break_it(planned.fault).await;
                }
                Turn::Ends => {
                    self.say(&format!("{} is over", planned.fault));
                    self.mend(planned.fault).await;
                    self.weather.ends(planned.fault, Instant::now());
                }
            }
        }
        self.say("no more faults");
        sleep_until(end).await;
    }

    async fn break_it(&mut self, fault: Fault) {
        match fault {
            Fault::KillReplica(number) => {
                let did_lead = self.leaders.leads(number).await;
                if let Some(mut running) = self.system.take_replica(number) {
                    running.kill_now();
                    self.leaders.ends(How::Killed, did_lead);
                    running.kill().await;
                    self.read_log(number, running.log());
                }
            }
            Fault::StopReplica(number) => {
                let did_lead = self.leaders.leads(number).await;
                if let Some(mut running) = self.system.take_replica(number) {
                    running.signal(Signal::SIGTERM);
                    self.leaders.ends(How::InOrder, did_lead);
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
            Fault::KillApiServer | Fault::LoseApiServer => {
                self.system.installation.api_server.kill().await;
            }
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
            Fault::Kubernetes(number, refusal) => {
                let injected = self.refuse(number, refusal);
                self.injected.push((fault, vec![injected]));
            }
            Fault::ApiServer(number, page) => {
                let replica = &self.system.replicas[number];
                let answer = page_of(page);
                let both = [&replica.rest_proxy, &replica.grpc_proxy];
                let injected = both.map(|it| it.inject(usize::MAX, |_| true, answer.clone()));
                replica.grpc_proxy.end_streams(|_| true, "");
                self.injected.push((fault, injected.into()));
            }
        }
    }

    /// Lets kube-apiserver answer a replica so.
    fn refuse(&self, number: usize, how: Refusal) -> Injected {
        let kubernetes = &self.system.replicas[number].kubernetes_proxy;
        let answer = proxy::Fault::Answer;
        match how {
            Refusal::Conflict => {
                let is_write = |call: &Call| asked(call).is_write();
                kubernetes.inject(usize::MAX, is_write, answer(conflict()))
            }
            Refusal::Expired => {
                let is_watch = |call: &Call| asked(call).verb == "watch";
                let injected = kubernetes.inject(usize::MAX, is_watch, answer(expired()));
                kubernetes.expire_watches(|_| true);
                injected
            }
            Refusal::Failed => {
                let sorry = refusal(500, "InternalError", "etcd is away");
                let injected = kubernetes.inject(usize::MAX, |_| true, answer(sorry));
                kubernetes.end_streams(|_| true, "");
                injected
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
            Fault::KillApiServer | Fault::LoseApiServer => {
                self.system.installation.start_api_server().await;
            }
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
            Fault::Kubernetes(..) | Fault::ApiServer(..) => {
                let mended = self.injected.extract_if(.., |(it, _)| *it == fault);
                let all = mended.flat_map(|(_, injected)| injected);
                let calls: usize = all.map(|it| it.hits()).sum();
                self.count.entry(fault.kind()).or_default().calls += calls;
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
        let mut table = Table::new(&["fault", "times", "calls answered so"]);
        for (kind, count) in &self.count {
            let is_counted = |it: &usize| *it > 0;
            let calls = Some(count.calls).filter(is_counted);
            let calls = calls.map(|it| it.to_string()).unwrap_or_default();
            table.row(&[kind.clone(), count.times.to_string(), calls]);
        }
        table
    }

    #[expect(clippy::print_stderr, reason = "for whoever waits")]
    fn say(&self, what: &str) {
        eprintln!("[{:7.1} s] {what}", self.begin.elapsed().as_secs_f32());
    }
}

/// What the API server, or who is in its place, answers.
fn page_of(page: Page) -> proxy::Fault {
    proxy::Fault::Answer(match page {
        Page::Failed => proxy::Answer::new(500, "sorry"),
        Page::Login => proxy::Answer::new(200, "<!doctype html><title>Sign in</title>")
            .header(CONTENT_TYPE, "text/html; charset=utf-8"),
    })
}
