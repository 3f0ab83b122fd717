//! What an error of the Kubernetes API means for a session: whether trying again can help, and
//! what people are told.

use crate::backend::BackendError;

/// Longest text of the API server that is shown to people, in characters.
const MAX_MESSAGE: usize = 500;

/// What a failed call means. `action` says what was tried, such as `create the pod of a session`.
pub(crate) fn backend_error(action: &'static str, error: kube::Error) -> BackendError {
    let kube::Error::Api(status) = &error else {
        return BackendError::Failed {
            action,
            source: Box::new(error),
        };
    };
    let message = shortened(&status.message);
    let has_cause = |reason: &str| {
        let causes = status.details.iter().flat_map(|details| &details.causes);
        causes
            .into_iter()
            .any(|cause| cause.reason.eq_ignore_ascii_case(reason))
    };
    match status.code {
        403 if has_cause("NamespaceTerminating") || message.contains("is being terminated") => {
            BackendError::Refused {
                reason: "NamespaceTerminating",
                message,
            }
        }
        403 if message.contains("exceeded quota") => BackendError::Refused {
            reason: "QuotaExceeded",
            message,
        },
        403 if message.contains("violates PodSecurity") => BackendError::Impossible {
            reason: "PodSecurityViolation",
            message,
        },
        403 => BackendError::Refused {
            reason: "Forbidden",
            message,
        },
        413 | 422 => BackendError::Impossible {
            reason: "ObjectRefused",
            message,
        },
        _ => BackendError::Failed {
            action,
            source: Box::new(error),
        },
    }
}

fn shortened(message: &str) -> String {
    message.chars().take(MAX_MESSAGE).collect()
}

/// Whether the API server says that there is no such object.
pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether the API server says that there is one of that name, or that it is another one (a UID
/// precondition).
pub(crate) fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
