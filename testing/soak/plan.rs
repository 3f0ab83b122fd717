//! Which faults come when. Pure: the same seed gives the same plan.

use std::{fmt, time::Duration};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::system::TOKEN_LIFE;

/// Before the first fault, and after the last: sessions come to run, and to their ends.
const CALM: Duration = Duration::from_secs(20);

/// A run from this length on is a full one: all that is to be judged can be.
pub const FULL: Duration = Duration::from_mins(30);

/// At the end of a full run no replica ends any more, so that each has a life that is long enough
/// to be judged by its memory. In others it is as large a part.
const QUIET: Duration = Duration::from_mins(6);

/// How long the API server is gone once in a full run: longer than sessions' tokens live.
const GONE: Duration = TOKEN_LIFE.saturating_add(Duration::from_secs(30));

/// Tries to find a fault that there is room for.
const TRIES: usize = 8;

/// Something that fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and started again at the end.
    KillReplica(usize),
    /// SIGTERM, and started again at the end.
    StopReplica(usize),
    /// SIGSTOP, and SIGCONT at the end.
    FreezeReplica(usize),
    /// kube-apiserver is killed, and started again at the end.
    KillKubernetes,
    /// kube-apiserver hangs.
    FreezeKubernetes,
    /// The API server is killed, and started again at the end.
    KillApiServer,
    /// The API server hangs.
    FreezeApiServer,
    /// The identity provider answers so.
    IdentityProvider(Sick),
    /// The API server is killed, and started again when all tokens of its time have expired.
    LoseApiServer,
    /// A replica's connections to this are broken so.
    Link(usize, Link, Broken),
    /// kube-apiserver answers a replica so.
    Kubernetes(usize, Refusal),
    /// The API server answers a replica so, whatever it asks.
    ApiServer(usize, Page),
}

/// How the identity provider answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sick {
    Down,
    Hangs,
    LoginPage,
    Expired,
    Slow,
}

/// What a replica is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    Kubernetes,
    Rest,
    Grpc,
}

/// How connections are broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// Each is ended once.
    Cut,
    /// Each is ended once, rudely.
    Reset,
    /// New ones are refused.
    Refused,
    /// Nothing arrives.
    Silent,
    /// All arrives late.
    Slow,
}

/// How kube-apiserver answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// 409: each write is too late.
    Conflict,
    /// 410: each watch has expired.
    Expired,
    /// 500, to all.
    Failed,
}

/// How the API server answers, or who is in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// 500.
    Failed,
    /// 200 with HTML.
    Login,
}

const SICK: [Sick; 5] = [
    Sick::Down,
    Sick::Hangs,
    Sick::LoginPage,
    Sick::Expired,
    Sick::Slow,
];
const LINKS: [Link; 3] = [Link::Kubernetes, Link::Rest, Link::Grpc];
const BROKEN: [Broken; 5] = [
    Broken::Cut,
    Broken::Reset,
    Broken::Refused,
    Broken::Silent,
    Broken::Slow,
];
const REFUSALS: [Refusal; 3] = [Refusal::Conflict, Refusal::Expired, Refusal::Failed];
const PAGES: [Page; 2] = [Page::Failed, Page::Login];

/// A fault and its time.
#[derive(Debug, Clone, Copy)]
pub struct Planned {
    /// When it begins, from the run's beginning.
    pub at: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// What fails.
    pub fault: Fault,
}

impl Planned {
    /// When it ends.
    pub fn until(&self) -> Duration {
        self.at + self.lasts
    }

    /// Whether both cannot be.
    fn is_in_the_way_of(&self, other: &Self) -> bool {
        let apart = Duration::from_secs(1);
        let is_at_once = self.until() + apart > other.at && other.until() + apart > self.at;
        is_at_once && self.fault.meets(other.fault)
    }
}

/// The faults of a run: one after the other, sometimes two at once.
pub fn plan(seed: u64, length: Duration, replicas: usize) -> Vec<Planned> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut plan: Vec<Planned> = Vec::new();
    let end = length.saturating_sub(CALM);
    let quiet = quiet_from(length);
    if length >= FULL {
        let first = random.random_range(0..quiet.saturating_sub(GONE + CALM).as_secs());
        plan.push(Planned {
            at: CALM + Duration::from_secs(first),
            lasts: GONE,
            fault: Fault::LoseApiServer,
        });
    }
    let mut at = CALM;
    while at < end {
        let mut drawn = || {
            let fault = draw(&mut random, replicas);
            let lasts = fault.lasts(&mut random).min(end.saturating_sub(at));
            Planned { at, lasts, fault }
        };
        let fits = |new: &Planned| {
            let is_loud = new.fault.ends_replica() && new.until() > quiet;
            !is_loud && !plan.iter().any(|it| it.is_in_the_way_of(new))
        };
        let new = (0..TRIES).map(|_| drawn()).find(fits);
        let lasts = new.map(|it| it.lasts).unwrap_or_default();
        plan.extend(new);
        let overlaps = random.random_bool(0.25);
        let pause = Duration::from_millis(random.random_range(500..8_000));
        at += if overlaps { pause } else { lasts + pause };
    }
    plan.sort_by_key(|it| it.at);
    plan
}

/// From when on no replica ends any more.
fn quiet_from(length: Duration) -> Duration {
    length.saturating_sub(QUIET.min(length.mul_f64(QUIET.div_duration_f64(FULL))))
}

fn draw(random: &mut impl Rng, replicas: usize) -> Fault {
    let replica = random.random_range(0..replicas);
    match random.random_range(0..18) {
        0 | 1 => Fault::KillReplica(replica),
        2 => Fault::StopReplica(replica),
        3 | 4 => Fault::FreezeReplica(replica),
        5 => Fault::KillKubernetes,
        6 => Fault::FreezeKubernetes,
        7 => Fault::KillApiServer,
        8 => Fault::FreezeApiServer,
        9 => Fault::IdentityProvider(one_of(SICK, random)),
        10 | 11 => Fault::Kubernetes(replica, one_of(REFUSALS, random)),
        12 => Fault::ApiServer(replica, one_of(PAGES, random)),
        _ => Fault::Link(replica, one_of(LINKS, random), one_of(BROKEN, random)),
    }
}

fn one_of<T: Copy, const N: usize>(all: [T; N], random: &mut impl Rng) -> T {
    all[random.random_range(0..N)]
}

impl Fault {
    /// How long it may last when it is drawn: longer than a lease where leadership is at stake, and
    /// shorter than half of a token's life.
    fn lasts(self, random: &mut impl Rng) -> Duration {
        let most = match self {
            Self::KillReplica(_) | Self::StopReplica(_) => 15,
            Self::KillApiServer
            | Self::FreezeApiServer
            | Self::LoseApiServer
            | Self::Kubernetes(..)
            | Self::ApiServer(..) => 20,
            Self::IdentityProvider(_) => 45,
            Self::Link(_, _, Broken::Cut | Broken::Reset) => 1,
            Self::FreezeReplica(_)
            | Self::KillKubernetes
            | Self::FreezeKubernetes
            | Self::Link(..) => 30,
        };
        Duration::from_millis(random.random_range(200..most * 1000))
    }

    /// Whether it cannot be at the same time as another one: they could not be told apart; or, while
    /// the API server is gone for long, what a session needs then is in Kubernetes and in replicas.
    fn meets(self, other: Self) -> bool {
        let both = [self, other];
        if both.contains(&Self::LoseApiServer)
            && both
                .iter()
                .any(|it| it.ends_replica() || it.is_kubernetes())
        {
            return true;
        }
        match both.map(Self::replica) {
            [Some(one), Some(other)] => one == other,
            [None, None] => {
                let is_idp = |it| matches!(it, Self::IdentityProvider(_));
                is_idp(self) == is_idp(other)
                    && self.is_api_server() == other.is_api_server()
                    && self.is_kubernetes() == other.is_kubernetes()
            }
            _ => false,
        }
    }

    /// The replica that it is about, if it is about one.
    pub fn replica(self) -> Option<usize> {
        match self {
            Self::KillReplica(it)
            | Self::StopReplica(it)
            | Self::FreezeReplica(it)
            | Self::Link(it, _, _)
            | Self::Kubernetes(it, _)
            | Self::ApiServer(it, _) => Some(it),
            Self::KillKubernetes
            | Self::FreezeKubernetes
            | Self::KillApiServer
            | Self::FreezeApiServer
            | Self::LoseApiServer
            | Self::IdentityProvider(_) => None,
        }
    }

    /// Whether it ends a replica.
    fn ends_replica(self) -> bool {
        matches!(self, Self::KillReplica(_) | Self::StopReplica(_))
    }

    /// Whether it takes kube-apiserver from all.
    pub fn is_kubernetes(self) -> bool {
        matches!(self, Self::KillKubernetes | Self::FreezeKubernetes)
    }

    /// Whether it takes the API server from all.
    pub fn is_api_server(self) -> bool {
        matches!(
            self,
            Self::KillApiServer | Self::FreezeApiServer | Self::LoseApiServer
        )
    }

    /// Whether it explains that this replica fails to give a token.
    pub fn excuses_no_token(self, replica: usize) -> bool {
        self.replica() == Some(replica) || self.is_kubernetes() || self.is_api_server()
    }

    /// Whether it explains that this replica does not lead when it is its turn.
    pub fn excuses_no_leader(self, replica: usize) -> bool {
        let keeps_from_lease = match self {
            Self::KillReplica(_)
            | Self::StopReplica(_)
            | Self::FreezeReplica(_)
            | Self::Link(_, Link::Kubernetes, _)
            | Self::Kubernetes(_, Refusal::Conflict | Refusal::Failed) => true,
            Self::Link(_, Link::Rest | Link::Grpc, _)
            | Self::Kubernetes(_, Refusal::Expired)
            | Self::ApiServer(..)
            | Self::KillKubernetes
            | Self::FreezeKubernetes
            | Self::KillApiServer
            | Self::FreezeApiServer
            | Self::LoseApiServer
            | Self::IdentityProvider(_) => false,
        };
        self.is_kubernetes() || (keeps_from_lease && self.replica() == Some(replica))
    }

    /// Its kind, for the account.
    pub fn kind(self) -> String {
        match self {
            Self::KillReplica(_) => "replica killed".to_owned(),
            Self::StopReplica(_) => "replica stopped in order".to_owned(),
            Self::FreezeReplica(_) => "replica frozen".to_owned(),
            Self::KillKubernetes => "kube-apiserver killed".to_owned(),
            Self::FreezeKubernetes => "kube-apiserver frozen".to_owned(),
            Self::KillApiServer => "API server killed".to_owned(),
            Self::FreezeApiServer => "API server frozen".to_owned(),
            Self::LoseApiServer => "API server gone for longer than tokens live".to_owned(),
            Self::IdentityProvider(sick) => format!("identity provider: {sick:?}"),
            Self::Link(_, link, broken) => format!("link to {link:?}: {broken:?}"),
            Self::Kubernetes(_, refusal) => format!("kube-apiserver answers: {refusal:?}"),
            Self::ApiServer(_, page) => format!("API server answers: {page:?}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.replica() {
            Some(replica) => write!(f, "{} ({replica})", self.kind()),
            None => f.write_str(&self.kind()),
        }
    }
}

#[cfg(test)]
mod tests;
