//! Sessions come and go, each as its life says.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ambient_shared::clock::Clock;
use ambient_testing::{
    cluster::{Direct, Kind},
    operator::Operator,
    table::Table,
};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::{
    book::Book,
    findings::Findings,
    lives::{Ending, Life},
    runner::Runner,
    tokens::Tokens,
    weather::Weather,
};

/// Projects, so namespaces.
const PROJECTS: u64 = 10;

/// Longest wait for a phase: faults, the lease after them, and backoff. It counts while the API
/// server answers.
const LONGEST: Duration = Duration::from_secs(180);

/// Pause before something is tried again, which a fault is in the way of.
const AGAIN: Duration = Duration::from_millis(500);

/// Time between two new sessions, so that not all come at once.
const BETWEEN: Duration = Duration::from_millis(50);

/// What sessions need.
#[derive(Clone)]
pub struct Sessions {
    pub operator: Operator,
    pub direct: Direct,
    pub book: Book,
    pub tokens: Arc<Tokens>,
    pub findings: Findings,
    pub weather: Weather,
    pub endpoints: Vec<Url>,
    pub seed: u64,
}

impl Sessions {
    /// The projects that sessions are in.
    pub async fn make_projects(&self) {
        for number in 0..PROJECTS {
            self.operator.create_project(&project(number)).await;
        }
    }

    /// Keeps so many sessions alive until `end`, and then waits for all to end.
    pub async fn come_and_go(&self, count: usize, end: Instant) -> Table {
        let mut running = JoinSet::new();
        let mut ends: BTreeMap<&'static str, usize> = BTreeMap::new();
        let mut number = 0;
        while Instant::now() < end || !running.is_empty() {
            if Instant::now() < end && running.len() < count {
                let (sessions, life) = (self.clone(), Life::of(self.seed, number));
                running.spawn(async move { sessions.live(life).await });
                number += 1;
                sleep(BETWEEN).await;
                continue;
            }
            let ended = timeout(Duration::from_secs(1), running.join_next()).await;
            if let Ok(Some(ended)) = ended {
                *ends.entry(ended.expect("no panic")).or_default() += 1;
            }
        }
        let mut table = Table::new(&["sessions that", "count"]);
        for (how, count) in ends {
            table.row(&[how.to_owned(), count.to_string()]);
        }
        table
    }

    /// One session from its creation to its end; says how that was.
    async fn live(self, life: Life) -> &'static str {
        let id = self.create(&life).await;
        let mut ends = life.ends;
        let mut is_second = false;
        loop {
            if !self.reaches(&id, "Running").await {
                return "never ran";
            }
            let project = project(life.number % PROJECTS);
            let quit = CancellationToken::new();
            let runner = Runner {
                session: id.clone(),
                generation: is_second.into(),
                namespace: project.clone(),
                direct: self.direct.clone(),
                tokens: Arc::clone(&self.tokens),
                findings: self.findings.clone(),
                weather: self.weather.clone(),
                endpoints: self.endpoints.clone(),
                api: self.operator.clone(),
                first: life.number,
            };
            let mut runs = JoinSet::new();
            runs.spawn(runner.run(quit.clone()));
            if life.loses_secret {
                sleep(life.runs / 2).await;
                self.lose_secret(&project, &id).await;
                sleep(life.runs / 2).await;
            } else {
                sleep(life.runs).await;
            }
            // From here on it may have no token.
            quit.cancel();
            runs.join_all().await;
            self.end(&project, &id, ends).await;
            let Some(phase) = ends.phase() else {
                return if self.is_gone(&id).await {
                    "were deleted"
                } else {
                    "stayed"
                };
            };
            if !self.reaches(&id, phase).await {
                return "never ended right";
            }
            sleep(life.stays).await;
            if !life.again || is_second {
                break;
            }
            is_second = true;
            ends = Ending::Completes;
            self.ask(&id, Method::POST, "/start", &[200, 409]).await;
        }
        // Not all: some are there at the end.
        if life.number.is_multiple_of(10) {
            return "ended and stayed";
        }
        self.ask(&id, Method::DELETE, "", &[204, 404]).await;
        if self.is_gone(&id).await {
            "ended"
        } else {
            "stayed"
        }
    }

    /// Makes it exactly once, also where an answer is lost.
    async fn create(&self, life: &Life) -> String {
        let name = format!("soak-{}", life.number);
        let project = project(life.number % PROJECTS);
        let body = json!({"name": name, "project_id": project, "prompt": "hello"});
        loop {
            let answer = self
                .operator
                .try_request(Method::POST, "/sessions", Some(&body));
            if let Ok((StatusCode::CREATED, session)) = answer.await {
                return session["id"].as_str().expect("an id").to_owned();
            }
            sleep(AGAIN).await;
            let path = format!("/sessions?search=name%20%3D%20%27{name}%27");
            let found = self.operator.try_request(Method::GET, &path, None).await;
            if let Ok((StatusCode::OK, list)) = found
                && let Some(id) = list["items"][0]["id"].as_str()
            {
                return id.to_owned();
            }
        }
    }

    async fn reaches(&self, id: &str, phase: &str) -> bool {
        let reached = self.book.until(id, LONGEST, |now| now == Some(phase)).await;
        if let Err(last) = &reached {
            let last = last.as_deref().unwrap_or("gone");
            let path = format!("/sessions/{id}");
            let now = self.operator.try_request(Method::GET, &path, None).await;
            let conditions = now.map(|(_, it)| it["conditions"].to_string());
            let conditions = conditions.unwrap_or_default();
            self.findings.add(
                "a session did not reach its phase",
                format!("{id}: not {phase} but {last:?} after {LONGEST:?}: {conditions}"),
            );
        }
        reached.is_ok()
    }

    async fn is_gone(&self, id: &str) -> bool {
        let gone = self
            .book
            .until(id, LONGEST, |now| now.is_none())
            .await
            .is_ok();
        if !gone {
            self.findings.add("a deleted session is there", id);
        }
        gone
    }

    async fn end(&self, project: &str, id: &str, ending: Ending) {
        let pod = format!("/api/v1/namespaces/{project}/pods/session-{id}-runner");
        match ending {
            Ending::Completes => self.end_agent(&pod, 0).await,
            Ending::Fails => self.end_agent(&pod, 3).await,
            Ending::Stopped => self.ask(id, Method::POST, "/stop", &[200, 409]).await,
            Ending::Deleted => self.ask(id, Method::DELETE, "", &[204, 404]).await,
            Ending::PodDeleted => self.kubernetes(Method::DELETE, &pod, None).await,
        }
    }

    /// The agent's container ends, as its kubelet says it.
    async fn end_agent(&self, pod: &str, code: i32) {
        let now: SystemTime = Clock::system().now();
        let now = humantime::format_rfc3339_seconds(now).to_string();
        let status = json!({"status": {
            "phase": if code == 0 { "Succeeded" } else { "Failed" },
            "containerStatuses": [{
                "name": "ambient-code-runner", "image": "", "imageID": "", "restartCount": 0,
                "ready": false,
                "state": {"terminated": {"exitCode": code, "startedAt": now, "finishedAt": now}},
            }],
        }});
        self.kubernetes(Method::PATCH, &format!("{pod}/status"), Some(&status))
            .await;
    }

    async fn lose_secret(&self, project: &str, id: &str) {
        let path = format!("/api/v1/namespaces/{project}/secrets/session-{id}-creds");
        self.kubernetes(Method::DELETE, &path, None).await;
    }

    /// Asks Kubernetes until it answers.
    async fn kubernetes(&self, method: Method, path: &str, body: Option<&Value>) {
        loop {
            let body = body.map(|body| (Kind::Merge, body));
            match self.direct.ask(method.clone(), path, body).await {
                Ok((status, _)) if status < 300 || status == 404 => return,
                _ => sleep(AGAIN).await,
            }
        }
    }

    /// Asks the API server until it answers with one of these.
    async fn ask(&self, id: &str, method: Method, what: &str, wanted: &[u16]) {
        let path = format!("/sessions/{id}{what}");
        loop {
            let answer = self.operator.try_request(method.clone(), &path, None).await;
            match answer {
                Ok((status, _)) if wanted.contains(&status.as_u16()) => return,
                _ => sleep(AGAIN).await,
            }
        }
    }
}

fn project(number: u64) -> String {
    format!("soak-{number}")
}
