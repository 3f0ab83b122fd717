//! What an error of the Kubernetes API means for a session: whether trying again can help, and
//! what people are told.

use kube::core::Status;

use crate::backend::BackendError;

/// Longest text of the API server that is shown to people, in characters.
const MAX_MESSAGE: usize = 500;

/// An answer of the Kubernetes API that is no success.
#[derive(Debug, thiserror::Error)]
#[error("the Kubernetes API answered {code}: {message}")]
struct Answer {
    code: u16,
    message: String,
}

/// What a failed call means. `action` says what was tried, such as `create the pod of a session`.
pub(crate) fn backend_error(action: &'static str, error: kube::Error) -> BackendError {
    match error {
        kube::Error::Api(status) => refused(action, &status),
        // Its own text repeats what is below.
        kube::Error::Service(source) => BackendError::Failed { action, source },
        error => BackendError::Failed {
            action,
            source: Box::new(error),
        },
    }
}

fn refused(action: &'static str, status: &Status) -> BackendError {
    let message = shortened(&status.message);
    let has_cause = |reason: &str| {
        let causes = status.details.iter().flat_map(|details| &details.causes);
        causes
            .into_iter()
            .any(|cause| cause.reason.eq_ignore_ascii_case(reason))
    };
    let says = |text: &str| status.message.contains(text);
    let reason = match status.code {
        403 if has_cause("NamespaceTerminating") || says("is being terminated") => {
            "NamespaceTerminating"
        }
        403 if says("exceeded quota") || says("failed quota") => "QuotaExceeded",
        // A namespace's LimitRange.
        403 if says(" usage per ") || says("limit to request ratio per") => "LimitExceeded",
        403 if says("violates PodSecurity") => {
            return BackendError::Impossible {
                reason: "PodSecurityViolation",
                message,
            };
        }
        400..=499 if says("admission webhook") || says("ValidatingAdmissionPolicy") => {
            "AdmissionDenied"
        }
        403 => "Forbidden",
        413 | 422 => {
            return BackendError::Impossible {
                reason: "ObjectRefused",
                message,
            };
        }
        // What etcd says of an object that the API server would have taken.
        500 if says("request is too large") => {
            return BackendError::Impossible {
                reason: "ObjectRefused",
                message,
            };
        }
        code => {
            let source = Box::new(Answer { code, message });
            return BackendError::Failed { action, source };
        }
    };
    BackendError::Refused { reason, message }
}

fn shortened(message: &str) -> String {
    message.chars().take(MAX_MESSAGE).collect()
}

/// Whether the API server says that there is no such object.
pub(crate) fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether the API server says that there is one of that name. Not what it also answers with 409:
/// that a quota was changed by somebody else at the same time.
pub(crate) fn is_already_there(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_already_exists())
}

#[cfg(test)]
mod tests {
    use ambient_shared::exit;
    use serde_json::{Value, json};

    use super::*;

    fn error(answer: Value) -> kube::Error {
        kube::Error::Api(serde_json::from_value(answer).unwrap())
    }

    fn meaning(code: u16, reason: &str, message: &str) -> String {
        let answer = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": reason, "code": code,
        });
        match backend_error("create the pod of a session", error(answer)) {
            BackendError::Impossible { reason, .. } => format!("impossible: {reason}"),
            BackendError::Refused { reason, .. } => format!("refused: {reason}"),
            BackendError::Failed { .. } => "failed".to_owned(),
            other => panic!("{other:?}"),
        }
    }

    /// As Kubernetes 1.36 words them.
    #[test]
    fn each_refusal_has_its_meaning() {
        let forbidden = "Forbidden";
        let cases = [
            (
                403,
                forbidden,
                "pods \"a\" is forbidden: unable to create new content in namespace team because \
                 it is being terminated",
                "refused: NamespaceTerminating",
            ),
            (
                403,
                forbidden,
                "pods \"a\" is forbidden: exceeded quota: none, requested: pods=1, used: pods=0, \
                 limited: pods=0",
                "refused: QuotaExceeded",
            ),
            (
                403,
                forbidden,
                "pods \"a\" is forbidden: failed quota: q: must specify limits.cpu for: mcp",
                "refused: QuotaExceeded",
            ),
            (
                403,
                forbidden,
                "pods \"a\" is forbidden: maximum memory usage per Container is 1Gi, but limit is \
                 4Gi",
                "refused: LimitExceeded",
            ),
            (
                403,
                forbidden,
                "pods \"a\" is forbidden: violates PodSecurity \"restricted:latest\": host \
                 namespaces (hostNetwork=true)",
                "impossible: PodSecurityViolation",
            ),
            (
                403,
                forbidden,
                "pods is forbidden: User \"system:serviceaccount:ambient-code:cp\" cannot create \
                 resource \"pods\" in API group \"\" in the namespace \"team\"",
                "refused: Forbidden",
            ),
            (
                400,
                "",
                "admission webhook \"policy.example\" denied the request: no",
                "refused: AdmissionDenied",
            ),
            (
                422,
                "Invalid",
                "ServiceAccount \"a\" is invalid: metadata.annotations: Too long: may not be more \
                 than 262144 bytes",
                "impossible: ObjectRefused",
            ),
            (
                413,
                "RequestEntityTooLarge",
                "Request entity too large: limit is 3145728",
                "impossible: ObjectRefused",
            ),
            (
                500,
                "",
                "etcdserver: request is too large",
                "impossible: ObjectRefused",
            ),
            (
                409,
                "Conflict",
                "Operation cannot be fulfilled on resourcequotas \"q\": the object has been \
                 modified",
                "failed",
            ),
            (404, "NotFound", "namespaces \"team\" not found", "failed"),
            (500, "InternalError", "etcd is away", "failed"),
        ];
        for (code, reason, message, expected) in cases {
            assert_eq!(meaning(code, reason, message), expected, "{message}");
        }
    }

    #[test]
    fn a_cause_tells_of_a_namespace_that_ends() {
        let answer = json!({
            "status": "Failure", "code": 403, "reason": "Forbidden", "message": "forbidden",
            "details": {"causes": [{"reason": "NamespaceTerminating", "message": "m"}]},
        });
        let refused = backend_error("create the pod of a session", error(answer));
        assert!(matches!(
            refused,
            BackendError::Refused {
                reason: "NamespaceTerminating",
                ..
            }
        ));
    }

    #[test]
    fn a_failure_says_what_was_tried_and_what_was_answered_once() {
        let answer = json!({"code": 500, "reason": "InternalError", "message": "etcd is away"});
        let failed = backend_error("create the pod of a session", error(answer));
        assert_eq!(
            exit::report(&failed),
            "cannot create the pod of a session: the Kubernetes API answered 500: etcd is away"
        );
    }

    #[test]
    fn a_name_that_is_taken_is_told_from_a_lost_race() {
        let taken = error(json!({"code": 409, "reason": "AlreadyExists", "message": "m"}));
        let lost = error(json!({"code": 409, "reason": "Conflict", "message": "m"}));
        assert!(is_already_there(&taken));
        assert!(!is_already_there(&lost));
        assert!(is_not_found(&error(json!({"code": 404, "message": "m"}))));
    }
}
