//! What the control plane asked of the Kubernetes API, by its audit log.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, SystemTime},
};

use ambient_testing::cluster::{CONTROL_PLANE, NewRequests, Request};

/// All requests of the control plane in a part of the run.
pub struct Audit {
    log: NewRequests,
    requests: Vec<Request>,
}

impl Audit {
    /// Begins now.
    pub fn new(log: NewRequests) -> Self {
        Self {
            log,
            requests: Vec::new(),
        }
    }

    /// Reads what came meanwhile.
    pub fn update(&mut self) {
        let new = self.log.read().into_iter();
        self.requests
            .extend(new.filter(|it| it.user == CONTROL_PLANE.name));
    }

    /// When each pod was made, by its name.
    pub fn pods(&self) -> HashMap<&str, SystemTime> {
        let made = self.requests.iter().filter(|it| {
            it.verb == "create"
                && it.resource == "pods"
                && it.subresource.is_empty()
                && it.code == 201
        });
        made.map(|it| (it.name.as_str(), at(it))).collect()
    }

    /// When tokens were written by the refresh, in order.
    pub fn refreshed(&self) -> Vec<SystemTime> {
        let written = self
            .requests
            .iter()
            .filter(|it| is_refresh(it) && it.code < 300);
        let mut times: Vec<_> = written.map(at).collect();
        times.sort_unstable();
        times
    }

    /// Single Secrets of sessions that were read.
    pub fn secrets_read(&self) -> usize {
        let read = |it: &&Request| {
            it.verb == "get" && it.resource == "secrets" && it.name.ends_with("-creds")
        };
        self.requests.iter().filter(read).count()
    }

    /// Requests by what they are for; watches and what concerns no session left out.
    pub fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for it in &self.requests {
            if it.verb == "watch" || it.verb == "list" || it.resource == "leases" {
                continue;
            }
            let kind = if is_refresh(it) {
                "refresh"
            } else {
                it.verb.as_str()
            };
            *kinds.entry(format!("{kind} {}", it.resource)).or_default() += 1;
        }
        kinds
    }

    /// Answers that were no success, by status.
    pub fn refused(&self) -> BTreeMap<u16, usize> {
        let mut codes = BTreeMap::new();
        for it in self
            .requests
            .iter()
            .filter(|it| it.code >= 300 || it.code == 0)
        {
            *codes.entry(it.code).or_default() += 1;
        }
        codes
    }
}

fn is_refresh(request: &Request) -> bool {
    request.verb == "patch"
        && request.resource == "secrets"
        && request
            .uri
            .contains("fieldManager=ambient-control-plane-refresh")
}

fn at(request: &Request) -> SystemTime {
    humantime::parse_rfc3339(&request.at).expect("the audit log has times")
}

/// Events a second between the first and the last of these.
pub fn rate(times: &[SystemTime]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "for people to read")]
    let count = times.len().saturating_sub(1) as f64;
    count / span(times).as_secs_f64().max(f64::EPSILON)
}

/// From the first to the last of these.
pub fn span(times: &[SystemTime]) -> Duration {
    let (Some(first), Some(last)) = (times.first(), times.last()) else {
        return Duration::ZERO;
    };
    last.duration_since(*first).unwrap_or_default()
}
