//! Names and labels of a session's objects (contract section 3).
//!
//! In: ids as the API server has them. Out: names that Kubernetes takes, or why there are none.

use std::collections::BTreeMap;

use ambient_shared::session::SessionId;

use crate::backend::BackendError;

/// Label and annotation: the session's id.
pub(crate) const SESSION_ID: &str = "ambient-code.io/session-id";
/// Label: the project's id.
pub(crate) const PROJECT_ID: &str = "ambient-code.io/project-id";
/// Label of all that we made: `true`.
pub(crate) const MANAGED: &str = "ambient-code.io/managed";
/// Label of all that we made: [`FIELD_MANAGER`].
pub(crate) const MANAGED_BY: &str = "ambient-code.io/managed-by";
/// Label of a project's namespace: the namespace of the control plane that uses it. Another one on
/// the same cluster has other projects, and keeps away.
pub(crate) const INSTALLATION: &str = "ambient-code.io/installation";
/// Annotation: the session's name.
pub(crate) const SESSION_NAME: &str = "ambient-code.io/session-name";
/// Annotation of a pod: the generation of the run.
pub(crate) const GENERATION: &str = "ambient-code.io/generation";
/// Annotation of a pod: the id of the token endpoint's keypair whose public key it was given.
pub(crate) const TOKEN_KEYPAIR: &str = "ambient-code.io/token-keypair";
/// Annotation of a token Secret: the id of the root that its session key was made from.
pub(crate) const SESSION_ROOT: &str = "ambient-code.io/session-root";
/// Annotation of a token Secret: when its token was issued (RFC 3339).
pub(crate) const TOKEN_ISSUED_AT: &str = "ambient-code.io/token-issued-at";
/// Annotation of a token Secret: when its token expires (RFC 3339); absent when it does not.
pub(crate) const TOKEN_EXPIRES_AT: &str = "ambient-code.io/token-expires-at";
/// Annotation of a namespace that we made, and so may delete: [`FIELD_MANAGER`].
pub(crate) const CREATED_BY: &str = "ambient-code.io/created-by";

/// Field manager of everything that we apply.
pub(crate) const FIELD_MANAGER: &str = "ambient-control-plane";
/// Field manager of a token's replacement.
pub(crate) const REFRESH_MANAGER: &str = "ambient-control-plane-refresh";

/// How much of a session's id is in names, in characters.
const SHORT: usize = ambient_shared::session::IN_NAMES;
/// Longest label value, and longest DNS label (RFC 1123).
const MAX_LABEL: usize = 63;

/// A session, as its objects in the cluster are named and labelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionRef {
    /// The session.
    pub(crate) id: SessionId,
    /// Its project's id.
    pub(crate) project: String,
    /// The project's namespace.
    pub(crate) namespace: String,
    short: String,
}

impl SessionRef {
    /// The names of this session's objects.
    ///
    /// # Errors
    /// `Impossible` when Kubernetes refuses the id in a name or label.
    pub(crate) fn new(
        id: &SessionId,
        project: &str,
        namespace: &str,
    ) -> Result<Self, BackendError> {
        let text = id.as_str();
        let short = text.chars().take(SHORT).collect::<String>().to_lowercase();
        if !is_label_value(text) {
            return Err(impossible(
                "SessionIdUnusable",
                format!(
                    "the session's id cannot be a label: at most {MAX_LABEL} letters, digits, `-`, \
                     `_` and `.` are possible, a letter or digit first and last"
                ),
            ));
        }
        if !is_dns_label(&short) {
            return Err(impossible(
                "SessionIdUnusable",
                format!(
                    "the first {SHORT} characters of the session's id cannot be part of names: \
                     letters, digits and `-` are possible, a letter or digit first and last"
                ),
            ));
        }
        Ok(Self {
            id: id.clone(),
            project: project.to_owned(),
            namespace: namespace.to_owned(),
            short,
        })
    }

    /// The runner's pod.
    pub(crate) fn pod(&self) -> String {
        format!("session-{}-runner", self.short)
    }

    /// The ServiceAccount, which owns all else.
    pub(crate) fn service_account(&self) -> String {
        format!("session-{}-sa", self.short)
    }

    /// The Service.
    pub(crate) fn service(&self) -> String {
        format!("session-{}", self.short)
    }

    /// The token Secret.
    pub(crate) fn token_secret(&self) -> String {
        format!("session-{}-creds", self.short)
    }

    /// The labels of all its objects.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = managed();
        labels.insert(SESSION_ID.to_owned(), self.id.as_str().to_owned());
        labels.insert(PROJECT_ID.to_owned(), self.project.clone());
        labels
    }
}

/// The labels of everything that we make.
pub(crate) fn managed() -> BTreeMap<String, String> {
    [(MANAGED, "true"), (MANAGED_BY, FIELD_MANAGER)]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

/// Checks that a project's id can be a label, and its namespace's name a name.
///
/// # Errors
/// `Impossible` when not, or when there is no project.
pub(crate) fn check_project(project: &str, namespace: &str) -> Result<(), BackendError> {
    if project.is_empty() {
        let message = "the session is of no project, so it has no namespace to run in";
        return Err(impossible("ProjectMissing", message.to_owned()));
    }
    if is_label_value(project) && is_dns_label(namespace) {
        return Ok(());
    }
    Err(impossible(
        "ProjectIdUnusable",
        format!(
            "the project's id cannot name a namespace: at most {MAX_LABEL} letters, digits and `-` \
             are possible, a letter or digit first and last"
        ),
    ))
}

fn impossible(reason: &'static str, message: String) -> BackendError {
    BackendError::Impossible { reason, message }
}

fn is_label_value(text: &str) -> bool {
    text.len() <= MAX_LABEL
        && framed(text)
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

fn is_dns_label(text: &str) -> bool {
    text.len() <= MAX_LABEL
        && framed(text)
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn framed(text: &str) -> bool {
    let ends = [text.bytes().next(), text.bytes().next_back()];
    ends.iter()
        .all(|end| end.is_some_and(|byte| byte.is_ascii_alphanumeric()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: &str) -> Result<SessionRef, BackendError> {
        SessionRef::new(&SessionId::parse(id).unwrap(), "Project-1", "project-1")
    }

    #[test]
    fn names_are_those_of_the_contract() {
        let session = session("01991F2E-0000-7000-8000-000000000001").unwrap();

        let short = "01991f2e-0000-7000-8000-000000000001";
        assert_eq!(session.pod(), format!("session-{short}-runner"));
        assert_eq!(session.service_account(), format!("session-{short}-sa"));
        assert_eq!(session.service(), format!("session-{short}"));
        assert_eq!(session.token_secret(), format!("session-{short}-creds"));
        let labels = session.labels();
        assert_eq!(labels[SESSION_ID], "01991F2E-0000-7000-8000-000000000001");
        assert_eq!(labels[PROJECT_ID], "Project-1");
        assert_eq!(labels[MANAGED], "true");
        assert_eq!(labels[MANAGED_BY], "ambient-control-plane");
    }

    #[test]
    fn only_the_first_forty_characters_are_in_names() {
        let id = format!("{}{}", "a".repeat(40), "_B".repeat(11));
        assert_eq!(
            session(&id).unwrap().service(),
            format!("session-{}", "a".repeat(40))
        );
    }

    #[test]
    fn ids_that_kubernetes_refuses_are_impossible() {
        let dash_at_40 = format!("{}-{}", "a".repeat(39), "b");
        for id in [
            "under_score",
            "dots.in.it",
            "-leading",
            "trailing-",
            "slash/es",
            "größer-als",
            &"a".repeat(64),
            &dash_at_40,
        ] {
            assert!(
                matches!(
                    session(id),
                    Err(BackendError::Impossible {
                        reason: "SessionIdUnusable",
                        ..
                    })
                ),
                "{id}"
            );
        }
    }

    #[test]
    fn a_project_must_be_able_to_name_a_namespace() {
        assert!(check_project("Team-1", "team-1").is_ok());
        for (project, namespace) in [("", ""), ("a_b", "a_b"), ("a.b", "a.b"), ("-a", "-a")] {
            assert!(check_project(project, namespace).is_err(), "{project}");
        }
    }
}
