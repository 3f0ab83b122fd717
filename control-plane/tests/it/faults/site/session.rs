//! A session of a site, and its node and kubelet, which tests play.

use std::net::SocketAddr;

use ambient_shared::{
    bearer::PublicKey, clock::Clock, exchange::Exchange, proof::SessionKey, session::SessionId,
};
use ambient_testing::DEADLINE;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{LOOK, NODE, Site};

/// A session of a site.
pub struct Session<'a> {
    pub site: &'a Site,
    pub project: String,
    pub id: String,
}

impl Session<'_> {
    /// Path of one of its objects, by the contract.
    pub fn path(&self, resource: &str, ending: &str) -> String {
        let (project, id) = (&self.project, &self.id);
        format!("/api/v1/namespaces/{project}/{resource}/session-{id}{ending}")
    }

    pub fn pod(&self) -> String {
        self.path("pods", "-runner")
    }

    pub fn secret(&self) -> String {
        self.path("secrets", "-creds")
    }

    /// Waits until the API server has it in this phase.
    pub async fn until_phase(&self, phase: &str) -> Value {
        let deadline = Instant::now() + DEADLINE;
        let path = format!("/sessions/{}", self.id);
        loop {
            let session = self.site.rest(Method::GET, &path, None).await;
            if session["phase"] == phase {
                return session;
            }
            assert!(Instant::now() < deadline, "not {phase}: {session:#}");
            sleep(LOOK).await;
        }
    }

    /// `start`, `stop`.
    pub async fn post(&self, what: &str) {
        let path = format!("/sessions/{}/{what}", self.id);
        self.site.rest(Method::POST, &path, None).await;
    }

    pub async fn delete(&self) {
        let path = format!("/sessions/{}", self.id);
        self.site.rest(Method::DELETE, &path, None).await;
    }

    /// Waits for its pod of this generation, and gives it a node.
    pub async fn bound(&self, generation: u32) -> Value {
        let generation = generation.to_string();
        let path = self.pod();
        let pod = self.site.wait_for(&path, |pod| {
            let metadata = &pod["metadata"];
            metadata["annotations"]["ambient-code.io/generation"] == generation.as_str()
                && metadata["deletionTimestamp"].is_null()
        });
        let pod = pod.await;
        let name = pod["metadata"]["name"].as_str().unwrap();
        let body = json!({
            "metadata": {"name": name},
            "target": {"kind": "Node", "name": NODE},
        });
        let path = format!("{}/binding", self.pod());
        let bound = self.site.ask(Method::POST, &path, Some(&body)).await;
        assert_eq!(bound.0, 201, "{}", bound.1);
        pod
    }

    /// Lets its pod of this generation run.
    pub async fn runs(&self, generation: u32) -> Value {
        let pod = self.bound(generation).await;
        let state = json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}});
        self.set_status("Running", &state).await;
        pod
    }

    /// Its agent has ended with this code.
    pub async fn ends(&self, code: i32) {
        let at = "2026-01-01T00:00:00Z";
        let state = json!({"terminated": {"exitCode": code, "startedAt": at, "finishedAt": at}});
        let phase = if code == 0 { "Succeeded" } else { "Failed" };
        self.set_status(phase, &state).await;
    }

    async fn set_status(&self, phase: &str, state: &Value) {
        let runs = phase == "Running";
        let body = json!({"status": {
            "phase": phase,
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": if runs { "True" } else { "False" }},
            ],
            "containerStatuses": [{
                "name": "ambient-code-runner", "image": "", "imageID": "", "restartCount": 0,
                "ready": runs, "state": state,
            }],
        }});
        let path = format!("{}/status", self.pod());
        let set = self.site.ask(Method::PATCH, &path, Some(&body)).await;
        assert_eq!(set.0, 200, "{}", set.1);
    }

    /// Waits until its pod is asked to end, and lets it, as its kubelet does.
    pub async fn finishes(&self) {
        let deadline = Instant::now() + DEADLINE;
        while let Some(pod) = self.site.get(&self.pod()).await {
            if pod["metadata"]["deletionTimestamp"].is_string() {
                let at_once = json!({
                    "gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]},
                });
                self.site
                    .ask(Method::DELETE, &self.pod(), Some(&at_once))
                    .await;
                return;
            }
            assert!(Instant::now() < deadline, "not asked to end: {pod:#}");
            sleep(LOOK).await;
        }
    }

    /// The objects of a kind in its namespace that are of this session, by whatever says so.
    pub async fn objects(&self, resource: &str) -> Vec<Value> {
        let path = format!("/api/v1/namespaces/{}/{resource}", self.project);
        let list = self.site.get(&path).await.unwrap_or_default();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let is_its = |it: &Value| it["metadata"].to_string().contains(&self.id);
        items.into_iter().filter(is_its).collect()
    }

    /// Waits until nothing is left of it.
    pub async fn is_gone(&self) {
        for (resource, ending) in [
            ("pods", "-runner"),
            ("serviceaccounts", "-sa"),
            ("secrets", "-creds"),
            ("services", ""),
        ] {
            self.site.wait_gone(&self.path(resource, ending)).await;
            let left = self.objects(resource).await;
            assert!(left.is_empty(), "{left:#?}");
        }
    }

    /// What asks this endpoint for its tokens, as its runner does. Its objects must be there.
    pub async fn exchange(&self, endpoint: SocketAddr) -> Exchange {
        let id = SessionId::parse(self.id.as_str()).unwrap();
        let secret = self.site.get(&self.secret()).await.unwrap();
        let key = secret["data"]["session-key"].as_str().unwrap();
        let key = String::from_utf8(STANDARD.decode(key).unwrap()).unwrap();
        let pod = self.site.get(&self.pod()).await.unwrap();
        let environment = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        let mut environment = environment.iter();
        let public = environment.find(|it| it["name"] == "AMBIENT_CP_TOKEN_PUBLIC_KEY");
        let public = public.unwrap()["value"].as_str().unwrap();
        Exchange::new(
            self.site.http.clone(),
            format!("http://{endpoint}/token").parse().unwrap(),
            PublicKey::from_pem(public).unwrap().encrypt(&id).unwrap(),
            SessionKey::from_text(&key),
            Clock::system(),
        )
    }

    /// Exactly one object of each kind is there.
    pub async fn is_whole(&self) {
        for resource in ["pods", "serviceaccounts", "secrets", "services"] {
            let there = self.objects(resource).await;
            assert_eq!(there.len(), 1, "{resource}: {there:#?}");
        }
    }
}
