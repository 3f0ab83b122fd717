//! The REST API as an operator uses it, by tasks that run beside each other.

use std::time::Duration;

use ambient_shared::rest::BASE;
use reqwest::{Client, Method, StatusCode, header};
use serde_json::{Value, json};

/// Longest request: an API server may be stopped for a while, and then goes on.
const LIMIT: Duration = Duration::from_secs(60);

/// A client with the operator's token. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Operator {
    client: Client,
    base: String,
    token: String,
}

impl Operator {
    /// Of the API server at this URL.
    ///
    /// # Panics
    /// When the HTTP library fails.
    pub fn new(url: &str, token: &str) -> Self {
        Self {
            client: Client::builder().no_proxy().build().expect("a client"),
            base: format!("{url}{BASE}"),
            token: token.to_owned(),
        }
    }

    /// The same as somebody else.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Self {
        Self {
            token: token.to_owned(),
            ..self.clone()
        }
    }

    /// A client for the machine's own addresses.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// One request; `path` follows the base path.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn try_request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(StatusCode, Value), reqwest::Error> {
        let request = self.client.request(method, format!("{}{path}", self.base));
        let mut request = request.timeout(LIMIT).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_string());
        }
        let answer = request.send().await?;
        let status = answer.status();
        let body = answer.text().await?;
        Ok((status, serde_json::from_str(&body).unwrap_or(Value::Null)))
    }

    /// The same where the API server is up.
    ///
    /// # Panics
    /// When there is no answer.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> (StatusCode, Value) {
        let answer = self.try_request(method, path, body).await;
        answer.expect("the API server answers")
    }

    /// Creates a project, and so a namespace.
    ///
    /// # Panics
    /// When the API server refuses.
    pub async fn create_project(&self, name: &str) {
        let body = json!({ "name": name });
        let (status, answer) = self.request(Method::POST, "/projects", Some(&body)).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
    }

    /// How many sessions are in this phase.
    ///
    /// # Panics
    /// When the API server refuses.
    pub async fn count(&self, phase: &str) -> u64 {
        let path = format!("/sessions?size=1&search=phase%20%3D%20%27{phase}%27");
        let (status, list) = self.request(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{list}");
        list["total"].as_u64().expect("a list has a total")
    }
}
