//! The Kubernetes API for tasks that run beside each other: a bare client, as the administrator.

use std::{fs, time::Duration};

use reqwest::{Client, Method, header};
use serde_json::Value;

use super::{ADMIN, Cluster};

/// Longest request.
const LIMIT: Duration = Duration::from_secs(30);

/// A client of the cluster. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Direct {
    client: Client,
    url: String,
    token: String,
}

/// Content type of what is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A whole object.
    Json,
    /// A merge patch.
    Merge,
    /// A server-side apply.
    Apply,
}

impl Direct {
    /// One request by path: status and body of the answer.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Option<(Kind, &Value)>,
    ) -> Result<(u16, Value), reqwest::Error> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.url))
            .timeout(LIMIT)
            .bearer_auth(&self.token);
        if let Some((kind, body)) = body {
            let kind = match kind {
                Kind::Json => "application/json",
                Kind::Merge => "application/merge-patch+json",
                Kind::Apply => "application/apply-patch+yaml",
            };
            request = request
                .header(header::CONTENT_TYPE, kind)
                .body(body.to_string());
        }
        let answer = request.send().await?;
        let status = answer.status().as_u16();
        let text = answer.text().await?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }
}

impl Cluster {
    /// A client for tasks; others of this file block.
    ///
    /// # Panics
    /// When the cluster's certificate cannot be read.
    pub fn direct(&self) -> Direct {
        let ca = fs::read(self.ca()).expect("a certificate");
        let ca = reqwest::Certificate::from_pem(&ca).expect("a certificate");
        let client = Client::builder().no_proxy().tls_certs_only([ca]).build();
        Direct {
            client: client.expect("a client"),
            url: self.url(),
            token: self.token(ADMIN).to_owned(),
        }
    }
}
