//! The sessions of the run, made through the API server.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ambient_shared::clock::Clock;
use ambient_testing::installation::Installation;
use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};

use crate::audit::Audit;

/// Requests at once where sessions are made as fast as possible.
const AT_ONCE: usize = 16;

/// How often is looked whether all are there.
const POLL: Duration = Duration::from_millis(250);

/// Longest wait for that.
const LONGEST: Duration = Duration::from_mins(20);

/// Sessions that were made.
pub struct Sessions {
    installation: Arc<Installation>,
    projects: Vec<String>,
    /// Each session's project.
    made: Vec<(String, String)>,
}

/// Sessions that came one after the other: when each was asked for, by its pod's name.
pub type Arrivals = HashMap<String, SystemTime>;

impl Sessions {
    /// None yet.
    pub async fn new(installation: Arc<Installation>, projects: usize) -> Self {
        let projects: Vec<_> = (0..projects).map(|it| format!("team-{it:03}")).collect();
        for project in &projects {
            installation.operator().create_project(project).await;
        }
        Self {
            installation,
            projects,
            made: Vec::new(),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.made.len()
    }

    /// Namespace and name of each token Secret.
    pub fn secrets(&self) -> impl Iterator<Item = (String, String)> {
        self.made
            .iter()
            .map(|(id, project)| (project.clone(), format!("session-{id}-creds")))
    }

    /// Makes so many as fast as the API server takes them.
    pub async fn create(&mut self, count: usize) {
        let mut running = JoinSet::new();
        for _ in 0..count {
            if running.len() >= AT_ONCE {
                let made = running.join_next().await.expect("one runs");
                self.made.push(made.expect("no panic"));
            }
            let project = self.project(self.made.len() + running.len());
            running.spawn(create(Arc::clone(&self.installation), project));
        }
        while let Some(made) = running.join_next().await {
            self.made.push(made.expect("no panic"));
        }
    }

    /// Makes `rate` a second, whether or not those before are answered, until told that it is
    /// enough.
    pub async fn arrive(
        &mut self,
        rate: u32,
        mut is_enough: impl FnMut(usize) -> bool,
    ) -> Arrivals {
        let begin = Instant::now();
        let mut running = JoinSet::new();
        let mut number = 0_u32;
        while !is_enough(number as usize) {
            sleep_until(begin + Duration::from_secs(1) * number / rate).await;
            number += 1;
            let installation = Arc::clone(&self.installation);
            let project = self.project(number as usize);
            running.spawn(async move {
                let asked = Clock::system().now();
                (create(installation, project).await, asked)
            });
        }
        let mut arrivals = Arrivals::new();
        for (session, asked) in running.join_all().await {
            arrivals.insert(format!("session-{}-runner", session.0), asked);
            self.made.push(session);
        }
        arrivals
    }

    /// Waits until all run.
    pub async fn until_all_run(&self) {
        let deadline = Instant::now() + LONGEST;
        while self.installation.operator().count("Running").await < self.made.len() as u64 {
            assert!(Instant::now() < deadline, "not all sessions run");
            sleep(POLL).await;
        }
    }

    fn project(&self, number: usize) -> String {
        self.projects[number % self.projects.len()].clone()
    }
}

async fn create(installation: Arc<Installation>, project: String) -> (String, String) {
    let body = json!({"name": "a session", "project_id": project, "prompt": "say hello"});
    let (status, session) = installation
        .operator()
        .request(Method::POST, "/sessions", Some(&body))
        .await;
    assert_eq!(status, StatusCode::CREATED, "{session}");
    let id = session["id"].as_str().expect("a session has an id");
    (id.to_owned(), project)
}

/// From the request for each session until its pod was made. Waits for all.
pub async fn waits(arrivals: &Arrivals, audit: &mut Audit) -> Vec<Duration> {
    let deadline = Instant::now() + LONGEST;
    loop {
        audit.update();
        let pods = audit.pods();
        let waits: Vec<_> = arrivals
            .iter()
            .filter_map(|(pod, asked)| {
                let made = pods.get(pod.as_str())?;
                Some(made.duration_since(*asked).unwrap_or_default())
            })
            .collect();
        if waits.len() == arrivals.len() {
            return waits;
        }
        assert!(Instant::now() < deadline, "pods are missing");
        sleep(POLL).await;
    }
}
