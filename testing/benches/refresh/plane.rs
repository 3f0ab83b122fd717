//! The control plane that is measured.

use std::{sync::Arc, time::Duration};

use ambient_testing::{
    DEADLINE, cluster::Cluster, installation::Installation, processes::memory, programs::Running,
};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use crate::pages::Pages;

/// How often is looked whether it is ready.
const POLL: Duration = Duration::from_millis(20);

/// When it has last listed all sessions.
const LAST_LIST: &str = "ambient_control_plane_last_list_timestamp_seconds";

/// One control plane, started again and again.
pub struct Plane {
    installation: Arc<Installation>,
    running: Option<Running>,
    pages: Pages,
}

/// How long tokens live, and how often they are looked at.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    life: &'static str,
    interval: &'static str,
}

impl Tokens {
    /// Not due before half an hour.
    pub const FIRST: Self = Self {
        life: "1h",
        interval: "20m",
    };
    /// With these, all tokens of [`Self::FIRST`] are due at once: they have less life left than the
    /// interval, the kubelet's 120 s and a tenth of their life.
    pub const SECOND: Self = Self {
        life: "2h",
        interval: "1h",
    };
    /// And with these, all of [`Self::SECOND`].
    pub const THIRD: Self = Self {
        life: "4h",
        interval: "2h",
    };
}

impl Plane {
    /// Not started yet.
    pub async fn new(installation: Arc<Installation>, page: u32) -> Self {
        let pages = Pages::start(installation.rest_url(), page).await;
        Self {
            installation,
            running: None,
            pages,
        }
    }

    /// Starts it, after the end of the one before. Gives the time until it is ready: until it knows
    /// all that runs and all sessions.
    pub async fn start(&mut self, tokens: Tokens) -> Duration {
        self.stop().await;
        let program = self.installation.control_plane(0);
        let begin = Instant::now();
        self.pages.restart();
        let mut running = program
            .env("AMBIENT_API_SERVER_URL", self.pages.url())
            .env("CP_TOKEN_TTL", tokens.life)
            .env("CP_REFRESH_INTERVAL", tokens.interval)
            .start();
        let admin = running.listening("admin").await;
        self.running = Some(running);
        let url = format!("http://{admin}/readyz");
        loop {
            let answer = self.installation.operator().client().get(&url).send().await;
            // The one that leads is ready before it knows all sessions, when it sees runs.
            if answer.is_ok_and(|it| it.status().is_success())
                && self.metric(LAST_LIST, "").await > 0.0
            {
                return begin.elapsed();
            }
            assert!(begin.elapsed() < 5 * DEADLINE, "the control plane is ready");
            sleep(POLL).await;
        }
    }

    /// Ends it in order.
    pub async fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.signal(Signal::SIGTERM);
            let status = running.wait().await;
            assert!(status.success(), "{status}");
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.running.as_ref().expect("it runs").pid()
    }

    /// Resident now and at most, in bytes.
    pub fn memory(&self) -> (u64, u64) {
        let field = |name| memory(self.pid(), name).expect("it runs");
        (field("VmRSS"), field("VmHWM"))
    }

    /// Pages of sessions that it has read since its start.
    pub fn pages(&self) -> u64 {
        self.pages.count()
    }

    /// Sum of a counter or gauge of its metrics, over all labels that have this in them.
    pub async fn metric(&self, name: &str, labels: &str) -> f64 {
        let url = format!("http://{}/metrics", self.installation.admin(0));
        let page = self.installation.operator().client().get(url).send().await;
        let page = page.expect("it runs").text().await.expect("a page");
        let samples = page.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (of, value) = rest.rsplit_once(' ')?;
            let is_it = of.is_empty() || of.starts_with('{');
            (is_it && of.contains(labels)).then(|| value.parse::<f64>().ok())?
        });
        samples.sum()
    }

    /// The cluster that it works on.
    pub fn cluster(&self) -> &Cluster {
        &self.installation.cluster
    }
}
