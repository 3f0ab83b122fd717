//! What a user does with sessions, over REST and with kubectl.

use std::{collections::BTreeMap, time::Duration};

use ambient_shared::{
    phase::Phase,
    rest::{BASE, Session, SessionMessage},
};
use ambient_testing::{DEADLINE as REQUEST, local::NewSession};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use reqwest::{Method, StatusCode, header};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::{AGENT, PROJECT, System, pod};
use crate::kube::DEADLINE;

/// How often a session is asked for.
const POLL: Duration = Duration::from_millis(200);

impl System {
    /// One request to the REST API with the operator's token; `path` follows the base path.
    ///
    /// # Panics
    /// When there is no answer.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        let mut request = self
            .client
            .request(method, format!("{}{BASE}{path}", self.api_url()))
            .timeout(REQUEST)
            .bearer_auth(&self.operator_token);
        if let Some(body) = body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_string());
        }
        let answer = request.send().await.expect("the API server answers");
        let status = answer.status();
        let body = answer.text().await.expect("the answer is whole");
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// Creates a session of the project.
    ///
    /// # Panics
    /// When the API server refuses it.
    pub async fn create(&self, session: NewSession) -> String {
        let body = session.field("project_id", PROJECT).into_json();
        let (status, session) = self.request(Method::POST, "/sessions", Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{session}");
        session["id"].as_str().expect("a session has an id").into()
    }

    /// Deletes a session and waits until nothing of it is in the cluster.
    ///
    /// # Panics
    /// When the API server refuses, or something is left at the deadline.
    pub async fn delete(&self, id: &str) {
        let path = format!("/sessions/{id}");
        let (status, answer) = self.request(Method::DELETE, &path, None).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
        let label = format!("ambient-code.io/session-id={id}");
        let what = [
            "pods,secrets,services,serviceaccounts,networkpolicies",
            "--selector",
            &label,
        ];
        self.kube().wait_gone(PROJECT, &what).await;
    }

    /// Deletes all sessions, so that what a failed scenario left disturbs no other.
    pub async fn clear(&self) {
        let (_, list) = self.request(Method::GET, "/sessions?size=1000", None).await;
        for session in list["items"].as_array().into_iter().flatten() {
            let path = format!("/sessions/{}", session["id"].as_str().unwrap_or_default());
            self.request(Method::DELETE, &path, None).await;
        }
    }

    /// A session as it is now.
    ///
    /// # Panics
    /// When it is not there.
    pub async fn session(&self, id: &str) -> Session {
        let path = format!("/sessions/{id}");
        let (status, session) = self.request(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{session}");
        serde_json::from_value(session).expect("a session")
    }

    /// Waits until a session is in this phase.
    ///
    /// # Panics
    /// When it ends otherwise, or at the deadline.
    pub async fn phase(&self, id: &str, wanted: Phase) -> Session {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let session = self.session(id).await;
            let phase = Phase::of(session.phase.as_deref()).expect("a known phase");
            if phase == wanted {
                return session;
            }
            assert!(
                !phase.is_terminal() && Instant::now() < deadline,
                "session is {phase}, not {wanted}: {session:?}"
            );
            sleep(POLL).await;
        }
    }

    /// All messages of a type of a session.
    ///
    /// # Panics
    /// When the API server refuses.
    pub async fn texts(&self, id: &str, event_type: &str) -> Vec<String> {
        let path = format!("/sessions/{id}/messages?after_seq=0");
        let (status, messages) = self.request(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{messages}");
        let messages: Vec<SessionMessage> =
            serde_json::from_value(messages).expect("a list of messages");
        messages
            .into_iter()
            .filter(|message| message.event_type == event_type)
            .map(|message| message.payload)
            .collect()
    }

    /// Waits for a line of an agent's output with this in it; gives its time and the line.
    ///
    /// # Panics
    /// When its pod is not there, or at the deadline.
    pub async fn says(&self, id: &str, part: &str) -> (String, String) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let log = self.kube().log(PROJECT, &pod(id), AGENT).await;
            if let Some(found) = log.iter().find(|(_, line)| line.contains(part)) {
                return found.clone();
            }
            assert!(
                Instant::now() < deadline,
                "the agent never wrote {part:?}: {log:#?}"
            );
            sleep(POLL).await;
        }
    }

    /// The data of a session's token Secret, decoded.
    ///
    /// # Panics
    /// When it is not there.
    pub async fn secret(&self, id: &str) -> BTreeMap<String, String> {
        let name = format!("session-{id}-creds");
        let secret = self.kube().get(PROJECT, &["secret", &name]).await;
        let secret = secret.expect("a running session has a Secret");
        let data = secret["data"].as_object().expect("it holds data");
        data.iter()
            .map(|(name, value)| {
                let value = value.as_str().expect("base64");
                (name.clone(), decode(value))
            })
            .collect()
    }
}

fn decode(text: &str) -> String {
    let bytes = STANDARD.decode(text).expect("base64");
    String::from_utf8(bytes).expect("tokens are text")
}
