//! The ways of comparison: a bare client of the Kubernetes API that replaces tokens.

use std::{sync::Arc, time::Duration};

use ambient_testing::cluster::{Cluster, Direct, Kind};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// A bare client.
#[derive(Clone)]
pub struct Bare {
    direct: Direct,
}

impl Bare {
    /// Of this cluster.
    pub fn new(cluster: &Cluster) -> Self {
        Self {
            direct: cluster.direct(),
        }
    }

    /// Replaces each token with a read and a write, one session after the other, with at most so many
    /// requests a second. Gives the time.
    pub async fn one_by_one(&self, secrets: &[(String, String)], limit: Option<f64>) -> Duration {
        let begin = Instant::now();
        for ((namespace, name), before) in secrets.iter().zip(0_u32..) {
            if let Some(limit) = limit {
                let earliest = Duration::from_secs_f64(f64::from(2 * before) / limit);
                sleep_until(begin + earliest).await;
            }
            let path = path(namespace, name);
            let mut secret = self.ask(Method::GET, &path, None).await;
            secret["data"]["api-token"] = json!(new_token());
            let body = Some((Kind::Json, &secret));
            self.ask(Method::PUT, &path, body).await;
        }
        begin.elapsed()
    }

    /// Replaces each token with one write of the kind that the control plane makes, so many at once.
    /// Gives the time.
    pub async fn at_once(&self, secrets: &[(String, String)], at_once: usize) -> Duration {
        let mut patches = Vec::new();
        for (namespace, name) in secrets {
            let path = path(namespace, name);
            let secret = self.ask(Method::GET, &path, None).await;
            let query = "fieldManager=ambient-control-plane-refresh&force=true";
            patches.push((format!("{path}?{query}"), patch(secret)));
        }
        let patches = Arc::new(std::sync::Mutex::new(patches));
        let begin = Instant::now();
        let mut running = JoinSet::new();
        for _ in 0..at_once {
            let (bare, patches) = (self.clone(), Arc::clone(&patches));
            running.spawn(async move {
                loop {
                    let next = patches.lock().expect("no panic").pop();
                    let Some((path, body)) = next else { return };
                    let body = Some((Kind::Apply, &body));
                    bare.ask(Method::PATCH, &path, body).await;
                }
            });
        }
        running.join_all().await;
        begin.elapsed()
    }

    async fn ask(&self, method: Method, path: &str, body: Option<(Kind, &Value)>) -> Value {
        let answer = self.direct.ask(method, path, body).await;
        let (status, object) = answer.expect("the Kubernetes API answers");
        assert!(status < 300, "{status}: {object}");
        object
    }
}

fn path(namespace: &str, name: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/secrets/{name}")
}

/// Of the length that minted ones have.
fn new_token() -> String {
    STANDARD.encode(format!("{:0>700}", uuid::Uuid::new_v4()))
}

/// What is applied: the Secret without what the server adds.
fn patch(mut secret: Value) -> Value {
    let metadata = secret["metadata"].as_object_mut().expect("an object");
    metadata.retain(|name, _| {
        let ours = [
            "name",
            "namespace",
            "labels",
            "annotations",
            "ownerReferences",
        ];
        ours.contains(&name.as_str())
    });
    secret["data"]["api-token"] = json!(new_token());
    secret
}
