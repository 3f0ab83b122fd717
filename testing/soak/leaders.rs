//! Whether somebody leads soon after a replica has ended.
//!
//! In: the ends of replicas, and what the others say in their metrics. Out: findings, and a table.
//! While no replica can lead, the time does not count, and it counts anew afterwards.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ambient_testing::table::Table;
use reqwest::Client;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    findings::Findings,
    system::{LEASE, Pids, System},
    weather::Weather,
};

/// Time between two looks while somebody is to lead.
const PAUSE: Duration = Duration::from_millis(200);

/// Longest wait for a replica's metrics.
const LIMIT: Duration = Duration::from_millis(500);

/// Longest time without a leader after a replica was ended in order.
const HANDED_OVER: Duration = Duration::from_secs(5);

/// The same after it was killed.
const TAKEN_OVER: Duration = LEASE.saturating_add(Duration::from_secs(1));

/// How a replica ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// By SIGTERM.
    InOrder,
    /// By SIGKILL.
    Killed,
}

/// Looks for leaders.
pub struct Leaders {
    admins: Vec<SocketAddr>,
    pids: Pids,
    client: Client,
    weather: Weather,
    findings: Findings,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waits: Vec<Wait>,
    judged: Vec<Judged>,
}

/// A replica has ended, and nobody has been seen to lead since.
#[derive(Debug, Clone, Copy)]
struct Wait {
    how: How,
    did_lead: bool,
    ended: Instant,
    /// From when on the time counts.
    since: Instant,
    limit: Duration,
}

/// What came of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Judged {
    how: How,
    did_lead: bool,
    /// From the end on, also what does not count; none when nobody led in time.
    took: Option<Duration>,
}

impl Leaders {
    /// Looks until `quit`.
    pub fn open(
        system: &System,
        weather: Weather,
        findings: Findings,
        quit: CancellationToken,
        tasks: &mut JoinSet<()>,
    ) -> Arc<Self> {
        let leaders = Arc::new(Self {
            admins: system.admins(),
            pids: system.pids(),
            client: system.operator().client().clone(),
            weather,
            findings,
            state: Mutex::default(),
        });
        let looking = Arc::clone(&leaders);
        tasks.spawn(async move {
            let looking = async {
                loop {
                    looking.look().await;
                    sleep(PAUSE).await;
                }
            };
            quit.run_until_cancelled(looking).await;
        });
        leaders
    }

    /// Whether this replica says that it leads.
    pub async fn leads(&self, replica: usize) -> bool {
        let url = format!("http://{}/metrics", self.admins[replica]);
        let page = async {
            let answer = self.client.get(url).timeout(LIMIT).send().await?;
            answer.text().await
        };
        let page = page.await.unwrap_or_default();
        page.lines()
            .any(|line| line == "ambient_control_plane_leader 1")
    }

    /// A replica ends now. Whether it led is for the table.
    pub fn ends(&self, how: How, did_lead: bool) {
        self.lock()
            .waits
            .push(Wait::new(how, did_lead, Instant::now()));
    }

    async fn look(&self) {
        let waiting = self.lock().waits.len();
        if waiting == 0 {
            return;
        }
        let began = Instant::now();
        let running: Vec<_> = {
            let pids = self.pids.lock().unwrap_or_else(PoisonError::into_inner);
            let all = pids.iter().enumerate();
            all.filter_map(|(replica, pid)| pid.map(|_| replica))
                .collect()
        };
        let mut somebody_leads = false;
        for replica in running {
            somebody_leads = somebody_leads || self.leads(replica).await;
        }
        let can_lead = (0..self.admins.len()).any(|replica| {
            let weather = &self.weather;
            !weather.explains(began, |it| it.excuses_no_leader(replica))
        });
        let mut state = self.lock();
        // Those that have come meanwhile were not asked for.
        let mut waits = std::mem::take(&mut state.waits);
        let new = waits.split_off(waiting);
        for mut wait in waits {
            match wait.judge(Instant::now(), somebody_leads, can_lead) {
                None => state.waits.push(wait),
                Some(judged) => {
                    if judged.took.is_none() {
                        let Wait { how, limit, .. } = wait;
                        self.findings.add(
                            "nobody leads after a replica has ended",
                            format!("{how:?}: not within {limit:?}"),
                        );
                    }
                    state.judged.push(judged);
                }
            }
        }
        state.waits.extend(new);
    }

    /// How often and how soon somebody led.
    pub fn account(&self) -> Table {
        let state = self.lock();
        let heads = ["leader after", "times", "of a leader", "longest without"];
        let mut table = Table::new(&heads);
        for how in [How::InOrder, How::Killed] {
            let all: Vec<_> = state.judged.iter().filter(|it| it.how == how).collect();
            let of_leaders = all.iter().filter(|it| it.did_lead);
            let longest = all
                .iter()
                .filter_map(|it| it.took)
                .max()
                .unwrap_or_default();
            table.row(&[
                format!("{how:?}"),
                all.len().to_string(),
                of_leaders.count().to_string(),
                format!("{:.1} s", longest.as_secs_f32()),
            ]);
        }
        table
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wait {
    fn new(how: How, did_lead: bool, now: Instant) -> Self {
        let limit = match how {
            How::InOrder => HANDED_OVER,
            How::Killed => TAKEN_OVER,
        };
        Self {
            how,
            did_lead,
            ended: now,
            since: now,
            limit,
        }
    }

    /// What has come of it, if anything has.
    fn judge(&mut self, now: Instant, somebody_leads: bool, can_lead: bool) -> Option<Judged> {
        let Self { how, did_lead, .. } = *self;
        if somebody_leads {
            let took = Some(now.duration_since(self.ended));
            return Some(Judged {
                how,
                did_lead,
                took,
            });
        }
        if !can_lead {
            self.since = now;
            // The Lease may not have been given up.
            self.limit = TAKEN_OVER;
            return None;
        }
        let took = None;
        (now.duration_since(self.since) > self.limit).then_some(Judged {
            how,
            did_lead,
            took,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// What comes of a replica's end when nobody leads, and somebody could or not, second by second.
    fn judged(how: How, could: &[bool]) -> Option<Judged> {
        let mut now = Instant::now();
        let mut wait = Wait::new(how, true, now);
        could.iter().find_map(|can_lead| {
            now += SECOND;
            wait.judge(now, false, *can_lead)
        })
    }

    #[test]
    fn nobody_is_found_after_the_time_that_it_may_take() {
        assert_eq!(judged(How::InOrder, &[true; 5]), None);
        let nobody = judged(How::InOrder, &[true; 6]);
        assert_eq!(nobody.and_then(|it| it.took), None);
        assert!(nobody.is_some());
        assert_eq!(judged(How::Killed, &[true; 16]), None);
        assert!(judged(How::Killed, &[true; 17]).is_some());
    }

    #[test]
    fn time_in_which_no_replica_can_lead_does_not_count() {
        assert_eq!(judged(How::InOrder, &[false; 60]), None);
        let mut then = vec![false; 60];
        then.extend([true; 16]);
        assert_eq!(judged(How::InOrder, &then), None);
        then.push(true);
        assert!(judged(How::InOrder, &then).is_some());
    }

    #[test]
    fn somebody_who_leads_in_time_is_no_finding() {
        let now = Instant::now();
        let mut wait = Wait::new(How::InOrder, false, now);
        assert_eq!(wait.judge(now + SECOND, false, false), None);
        let judged = wait.judge(now + 2 * SECOND, true, true).unwrap();
        assert_eq!(judged.took, Some(2 * SECOND));
    }
}
