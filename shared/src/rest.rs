//! JSON objects of the REST API (contract section 5), as server and clients see them.
//!
//! Names are the proto names, with the metadata flat beside them. Times are RFC 3339.

use prost_types::Timestamp;
use serde::{Deserialize, Serialize};

use crate::proto;

/// Base path of the REST API.
pub const BASE: &str = "/api/ambient/v1";

/// Header of every answer of an API server that takes minted tokens for one session only. Without
/// it they would open every session.
pub const SESSION_TOKENS_HEADER: &str = "x-ambient-session-tokens";

/// Header that restricts lists to one project, and names the project of a new session.
pub const PROJECT_HEADER: &str = "x-ambient-project";

/// Page size when none is asked for.
pub const DEFAULT_PAGE_SIZE: u32 = 100;

/// Page size that larger ones are cut to.
pub const MAX_PAGE_SIZE: u32 = 1000;

/// One page of a list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct List<T> {
    /// Such as `SessionList`.
    pub kind: String,
    /// From 1.
    pub page: u32,
    /// Number of items on this page.
    pub size: u32,
    /// Number of items on all pages.
    pub total: u32,
    /// The items.
    pub items: Vec<T>,
}

/// An error's body.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Always `Error`.
    pub kind: String,
    /// The error's number, as text.
    pub id: String,
    /// Where the error is described.
    pub href: String,
    /// Such as `ambient-404`.
    pub code: String,
    /// For people.
    pub reason: String,
    /// Names this request in the server's log.
    pub operation_id: String,
}

/// A session.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "docs/contract.md describes each field, in section 4"
)]
#[serde(default)]
pub struct Session {
    pub id: String,
    pub kind: String,
    pub href: String,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repo_url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_by_user_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assigned_user_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workflow_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repos: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm_model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm_temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub llm_max_tokens: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_session_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bot_account_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource_overrides: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment_variables: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub project_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Timestamp>,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sdk_session_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sdk_restart_count: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conditions: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconciled_repos: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconciled_workflow: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kube_cr_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kube_cr_uid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kube_namespace: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_id: Option<String>,
}

impl From<proto::Session> for Session {
    fn from(from: proto::Session) -> Self {
        let metadata = from.metadata.unwrap_or_default();
        Self {
            id: metadata.id,
            kind: metadata.kind,
            href: metadata.href,
            created_at: metadata.created_at,
            updated_at: metadata.updated_at,
            name: from.name,
            repo_url: from.repo_url,
            prompt: from.prompt,
            created_by_user_id: from.created_by_user_id,
            assigned_user_id: from.assigned_user_id,
            workflow_id: from.workflow_id,
            repos: from.repos,
            timeout: from.timeout,
            llm_model: from.llm_model,
            llm_temperature: from.llm_temperature,
            llm_max_tokens: from.llm_max_tokens,
            parent_session_id: from.parent_session_id,
            bot_account_name: from.bot_account_name,
            resource_overrides: from.resource_overrides,
            environment_variables: from.environment_variables,
            labels: from.labels,
            annotations: from.annotations,
            project_id: from.project_id,
            phase: from.phase,
            start_time: from.start_time,
            completion_time: from.completion_time,
            sdk_session_id: from.sdk_session_id,
            sdk_restart_count: from.sdk_restart_count,
            conditions: from.conditions,
            reconciled_repos: from.reconciled_repos,
            reconciled_workflow: from.reconciled_workflow,
            kube_cr_name: from.kube_cr_name,
            kube_cr_uid: from.kube_cr_uid,
            kube_namespace: from.kube_namespace,
            agent_id: from.agent_id,
        }
    }
}

impl From<Session> for proto::Session {
    fn from(from: Session) -> Self {
        Self {
            metadata: Some(proto::ObjectReference {
                id: from.id,
                created_at: from.created_at,
                updated_at: from.updated_at,
                kind: from.kind,
                href: from.href,
            }),
            name: from.name,
            repo_url: from.repo_url,
            prompt: from.prompt,
            created_by_user_id: from.created_by_user_id,
            assigned_user_id: from.assigned_user_id,
            workflow_id: from.workflow_id,
            repos: from.repos,
            timeout: from.timeout,
            llm_model: from.llm_model,
            llm_temperature: from.llm_temperature,
            llm_max_tokens: from.llm_max_tokens,
            parent_session_id: from.parent_session_id,
            bot_account_name: from.bot_account_name,
            resource_overrides: from.resource_overrides,
            environment_variables: from.environment_variables,
            labels: from.labels,
            annotations: from.annotations,
            project_id: from.project_id,
            phase: from.phase,
            start_time: from.start_time,
            completion_time: from.completion_time,
            sdk_session_id: from.sdk_session_id,
            sdk_restart_count: from.sdk_restart_count,
            conditions: from.conditions,
            reconciled_repos: from.reconciled_repos,
            reconciled_workflow: from.reconciled_workflow,
            kube_cr_name: from.kube_cr_name,
            kube_cr_uid: from.kube_cr_uid,
            kube_namespace: from.kube_namespace,
            agent_id: from.agent_id,
        }
    }
}

/// A project. Its id is its name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "docs/contract.md describes each field, in section 4"
)]
#[serde(default)]
pub struct Project {
    pub id: String,
    pub kind: String,
    pub href: String,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub annotations: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
}

impl From<proto::Project> for Project {
    fn from(from: proto::Project) -> Self {
        let metadata = from.metadata.unwrap_or_default();
        Self {
            id: metadata.id,
            kind: metadata.kind,
            href: metadata.href,
            created_at: metadata.created_at,
            updated_at: metadata.updated_at,
            name: from.name,
            display_name: from.display_name,
            description: from.description,
            labels: from.labels,
            annotations: from.annotations,
            status: from.status,
        }
    }
}

impl From<Project> for proto::Project {
    fn from(from: Project) -> Self {
        Self {
            metadata: Some(proto::ObjectReference {
                id: from.id,
                created_at: from.created_at,
                updated_at: from.updated_at,
                kind: from.kind,
                href: from.href,
            }),
            name: from.name,
            display_name: from.display_name,
            description: from.description,
            labels: from.labels,
            annotations: from.annotations,
            status: from.status,
        }
    }
}

/// The settings of a project.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "docs/contract.md describes each field, in section 4"
)]
#[serde(default)]
pub struct ProjectSettings {
    pub id: String,
    pub kind: String,
    pub href: String,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Timestamp>,
    pub project_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_access: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repositories: Option<String>,
}

impl From<proto::ProjectSettings> for ProjectSettings {
    fn from(from: proto::ProjectSettings) -> Self {
        let metadata = from.metadata.unwrap_or_default();
        Self {
            id: metadata.id,
            kind: metadata.kind,
            href: metadata.href,
            created_at: metadata.created_at,
            updated_at: metadata.updated_at,
            project_id: from.project_id,
            group_access: from.group_access,
            repositories: from.repositories,
        }
    }
}

impl From<ProjectSettings> for proto::ProjectSettings {
    fn from(from: ProjectSettings) -> Self {
        Self {
            metadata: Some(proto::ObjectReference {
                id: from.id,
                created_at: from.created_at,
                updated_at: from.updated_at,
                kind: from.kind,
                href: from.href,
            }),
            project_id: from.project_id,
            group_access: from.group_access,
            repositories: from.repositories,
        }
    }
}

/// A message of a session.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[expect(
    missing_docs,
    reason = "docs/contract.md describes each field, in section 4"
)]
#[serde(default)]
pub struct SessionMessage {
    pub id: String,
    pub session_id: String,
    pub seq: i64,
    pub event_type: String,
    pub payload: String,
    #[serde(with = "rfc3339", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
}

impl From<proto::SessionMessage> for SessionMessage {
    fn from(from: proto::SessionMessage) -> Self {
        Self {
            id: from.id,
            session_id: from.session_id,
            seq: from.seq,
            event_type: from.event_type,
            payload: from.payload,
            created_at: from.created_at,
        }
    }
}

/// Times as RFC 3339 text.
mod rfc3339 {
    use prost_types::Timestamp;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::ref_option, reason = "serde asks for this form")]
    pub(super) fn serialize<S: Serializer>(
        time: &Option<Timestamp>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => to.collect_str(time),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Timestamp>, D::Error> {
        match Option::<String>::deserialize(from)?.as_deref() {
            None | Some("") => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .map_err(|_| D::Error::custom("not an RFC 3339 time")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_survives_the_way_through_json_and_proto() {
        let json = r#"{"id":"a","kind":"Session","href":"/h","created_at":"2026-01-02T03:04:05Z",
            "name":"n","phase":"Running","timeout":7,"llm_temperature":0.5,"unknown":[1]}"#;
        let session: Session = serde_json::from_str(json).unwrap();
        let again: Session = proto::Session::from(session.clone()).into();
        assert_eq!(session, again);
        let json = serde_json::to_value(&again).unwrap();
        assert_eq!(json["created_at"], "2026-01-02T03:04:05Z");
        assert_eq!(json["timeout"], 7);
        assert!(json.get("repos").is_none());
    }
}
