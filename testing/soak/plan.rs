//! Which faults come when. Pure: the same seed gives the same plan.

use std::{fmt, time::Duration};

use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};

/// Before the first fault, and after the last: sessions come to run, and to their ends.
const CALM: Duration = Duration::from_secs(20);

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
    /// A replica's connections to this are broken so.
    Link(usize, Link, Broken),
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
}

/// The faults of a run: one after the other, sometimes two at once.
pub fn plan(seed: u64, length: Duration, replicas: usize) -> Vec<Planned> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut plan: Vec<Planned> = Vec::new();
    let mut at = CALM;
    let end = length.saturating_sub(CALM);
    while at < end {
        let fault = draw(&mut random, replicas);
        let lasts = fault.lasts(&mut random).min(end.saturating_sub(at));
        let is_taken = plan
            .iter()
            .any(|it| it.until() + Duration::from_secs(1) > at && it.fault.meets(fault));
        if !is_taken {
            plan.push(Planned { at, lasts, fault });
        }
        let overlaps = random.random_bool(0.25);
        let pause = Duration::from_millis(random.random_range(500..8_000));
        at += if overlaps { pause } else { lasts + pause };
    }
    plan
}

fn draw(random: &mut impl Rng, replicas: usize) -> Fault {
    let replica = random.random_range(0..replicas);
    let sick = [
        Sick::Down,
        Sick::Hangs,
        Sick::LoginPage,
        Sick::Expired,
        Sick::Slow,
    ];
    let links = [Link::Kubernetes, Link::Rest, Link::Grpc];
    let broken = [
        Broken::Cut,
        Broken::Reset,
        Broken::Refused,
        Broken::Silent,
        Broken::Slow,
    ];
    match random.random_range(0..14) {
        0 | 1 => Fault::KillReplica(replica),
        2 => Fault::StopReplica(replica),
        3 | 4 => Fault::FreezeReplica(replica),
        5 => Fault::KillKubernetes,
        6 => Fault::FreezeKubernetes,
        7 => Fault::KillApiServer,
        8 => Fault::FreezeApiServer,
        9 => Fault::IdentityProvider(sick[random.random_range(0..sick.len())]),
        _ => Fault::Link(
            replica,
            links[random.random_range(0..links.len())],
            broken[random.random_range(0..broken.len())],
        ),
    }
}

impl Fault {
    /// How long it may last: longer than a lease where leadership is at stake, and shorter than half
    /// of a token's life.
    fn lasts(self, random: &mut impl Rng) -> Duration {
        let most = match self {
            Self::KillReplica(_) | Self::StopReplica(_) => 15,
            Self::KillApiServer | Self::FreezeApiServer => 20,
            Self::IdentityProvider(_) => 45,
            Self::Link(_, _, Broken::Cut | Broken::Reset) => 1,
            Self::FreezeReplica(_)
            | Self::KillKubernetes
            | Self::FreezeKubernetes
            | Self::Link(..) => 30,
        };
        Duration::from_millis(random.random_range(200..most * 1000))
    }

    /// Whether it cannot be told apart from another one at the same time.
    fn meets(self, other: Self) -> bool {
        match (self.replica(), other.replica()) {
            (Some(one), Some(other)) => one == other,
            (None, None) => {
                let is_idp = |it| matches!(it, Self::IdentityProvider(_));
                let is_api = |it| matches!(it, Self::KillApiServer | Self::FreezeApiServer);
                is_idp(self) == is_idp(other) && is_api(self) == is_api(other)
            }
            _ => false,
        }
    }

    fn replica(self) -> Option<usize> {
        match self {
            Self::KillReplica(it)
            | Self::StopReplica(it)
            | Self::FreezeReplica(it)
            | Self::Link(it, _, _) => Some(it),
            _ => None,
        }
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
            Self::IdentityProvider(sick) => format!("identity provider: {sick:?}"),
            Self::Link(_, link, broken) => format!("link to {link:?}: {broken:?}"),
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
