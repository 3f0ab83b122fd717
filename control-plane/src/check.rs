//! `ambient-control-plane check`: tries all that the control plane depends on, and changes nothing.
//!
//! In: [`CheckSettings`]. Out: a [`Report`] with a row for each dependency, which says what to do
//! where something is wrong. What does not depend on one another is tried at the same time, each
//! with a deadline.

use std::{fmt, future::Future, time::Duration};

use ambient_shared::{client::GrpcAddress, clock::Clock, exit};
use tokio::time::timeout;
use url::Url;

use crate::{cluster::ClusterSettings, rules::RuleSettings, settings::IssuerSettings};

mod api;
mod kubernetes;

pub(crate) use api::credential;

/// Longest time of one check: as long as the control plane itself waits for a page of sessions.
const LIMIT: Duration = Duration::from_secs(30);

/// What is tried.
#[derive(Debug, Clone)]
pub struct CheckSettings {
    /// API server's REST.
    pub api_url: Url,
    /// API server's gRPC.
    pub grpc: GrpcAddress,
    /// The control plane's own credential for both.
    pub own: IssuerSettings,
    /// How the cluster is reached.
    pub cluster: ClusterSettings,
    /// The rights that are needed there.
    pub rules: RuleSettings,
}

/// What was found, as a table for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// In the order in which they are shown.
    pub rows: Vec<Row>,
}

/// One dependency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Such as `API server REST`.
    pub name: String,
    /// How it is.
    pub outcome: Outcome,
    /// What was seen; where it failed, what to do.
    pub detail: String,
}

/// How a dependency is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// The control plane can work, but somebody should know.
    Note,
    /// The control plane cannot work.
    Failed,
}

impl Row {
    pub(crate) fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Outcome::Ok, detail)
    }

    fn note(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Outcome::Note, detail)
    }

    pub(crate) fn failed(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Outcome::Failed, detail)
    }

    fn new(name: &str, outcome: Outcome, detail: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            outcome,
            detail: detail.into(),
        }
    }
}

impl Report {
    /// Whether the control plane can work.
    pub fn is_ok(&self) -> bool {
        self.rows.iter().all(|row| row.outcome != Outcome::Failed)
    }

    /// 0 when it can work, else [`exit::UNAVAILABLE`].
    pub fn exit_code(&self) -> u8 {
        if self.is_ok() { 0 } else { exit::UNAVAILABLE }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.rows.iter().map(|row| row.name.chars().count());
        let width = names.chain([HEAD.0.len()]).max().unwrap_or_default();
        let mut line = |name: &str, outcome: &str, detail: &str| {
            let detail = detail.replace(['\n', '\r'], " ");
            writeln!(f, "{name:width$}  {outcome:6}  {detail}")
        };
        line(HEAD.0, HEAD.1, HEAD.2)?;
        for row in &self.rows {
            line(&row.name, row.outcome.word(), &row.detail)?;
        }
        Ok(())
    }
}

const HEAD: (&str, &str, &str) = ("CHECK", "RESULT", "DETAIL");

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Failed => "failed",
        }
    }
}

/// Tries everything. Takes as long as its slowest part, at most a minute or so.
pub async fn check(settings: &CheckSettings, clock: &Clock) -> Report {
    let (mut rows, of_cluster) =
        tokio::join!(api::rows(settings, clock), kubernetes::rows(settings));
    rows.extend(of_cluster);
    Report { rows }
}

/// The row that a check gives, or that it took too long.
async fn limited(name: &str, checking: impl Future<Output = Row>) -> Row {
    timeout(LIMIT, checking).await.unwrap_or_else(|_| {
        let limit = humantime::format_duration(LIMIT);
        Row::failed(name, format!("no answer within {limit}"))
    })
}

#[cfg(test)]
mod tests;
