//! A [`Proxy`] in front of a cluster's kube-apiserver, for a program that has its kubeconfig.
//!
//! In: calls without TLS. Out: the same calls with TLS; who calls is told by the token in each, as
//! without a proxy. What is asked is read from the path, as RBAC names it.

use std::{fs, ops::Deref, path::PathBuf};

use http::{
    Method,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use serde_json::json;

use crate::{
    cluster::{Cluster, User},
    proxy::{Answer, Call, Proxy, Upstream},
};

/// A running proxy; ends, with all its connections, when dropped.
#[derive(Debug)]
pub struct KubeProxy {
    proxy: Proxy,
    folder: PathBuf,
}

impl Deref for KubeProxy {
    type Target = Proxy;

    fn deref(&self) -> &Proxy {
        &self.proxy
    }
}

impl KubeProxy {
    /// Starts a proxy to this cluster, which may stop and start its API server meanwhile.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn start(cluster: &Cluster) -> Self {
        let upstream = Upstream::Tls {
            address: cluster.address(),
            ca: cluster.ca(),
        };
        Self {
            proxy: Proxy::start(&upstream).await,
            folder: cluster.folder().to_owned(),
        }
    }

    /// A kubeconfig file for one of the cluster's users, whose calls then come through here.
    ///
    /// # Panics
    /// When the cluster does not know the user, or the file cannot be written.
    pub fn kubeconfig(&self, cluster: &Cluster, user: User) -> PathBuf {
        let address = self.address();
        let name = user.name.replace(':', "-");
        let file = format!("kubeconfig-{name}-by-{}", address.port());
        let path = self.folder.join(file);
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: 'http://{address}'}}}}]\n\
             users: [{{name: '{name}', user: {{token: '{}'}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: '{name}'}}}}]\n",
            cluster.token(user),
        );
        fs::write(&path, text).expect("disk is there");
        path
    }

    /// Tells these watches, in their streams, that their version is forgotten, and ends them. Gives
    /// how many there were.
    pub fn expire_watches(&self, which: impl Fn(&Asked) -> bool) -> usize {
        let status = status_of(410, "Expired", "too old resource version: 1 (2)");
        let event = json!({"type": "ERROR", "object": status}).to_string() + "\n";
        self.end_streams(|call| is_watch_of(call, &which), event)
    }
}

/// What a call asks of the Kubernetes API, as RBAC names it. What does not apply is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Such as `get`, `list`, `watch`, `create`, `patch`.
    pub verb: &'static str,
    /// API group; empty for that of pods and Secrets.
    pub group: String,
    /// Such as `pods`; empty for calls that are about no resource, such as for `/version`.
    pub resource: String,
    /// Such as `status`.
    pub subresource: String,
    /// Namespace of the object, or of the list; of a namespace, itself.
    pub namespace: String,
    /// Name of the object; empty for lists and for what is being made.
    pub name: String,
}

impl Asked {
    /// Whether it changes an object. Not so a question that is asked by a `create`, such as a
    /// `SelfSubjectAccessReview`.
    pub fn is_write(&self) -> bool {
        let changes = !matches!(self.verb, "get" | "list" | "watch");
        changes && !self.resource.is_empty() && !self.resource.ends_with("reviews")
    }
}

/// Reads a call.
pub fn asked(call: &Call) -> Asked {
    let mut parts = call.path.split('/').filter(|part| !part.is_empty());
    let mut group = String::new();
    let is_about_resources = match parts.next() {
        Some("api") => parts.next().is_some(),
        Some("apis") => {
            parts.next().unwrap_or_default().clone_into(&mut group);
            parts.next().is_some()
        }
        _ => false,
    };
    let rest: Vec<&str> = if is_about_resources {
        parts.collect()
    } else {
        Vec::new()
    };
    let (namespace, rest) = match rest.as_slice() {
        ["namespaces", namespace, rest @ ..] if !rest.is_empty() && rest[0] != "status" => {
            (*namespace, rest)
        }
        ["namespaces", namespace, ..] => (*namespace, rest.as_slice()),
        rest => ("", rest),
    };
    let part = |place: usize| rest.get(place).copied().unwrap_or_default().to_owned();
    let name = part(1);
    let has = |pair: &str| call.query.split('&').any(|it| it == pair);
    let verb = match call.method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE if name.is_empty() => "deletecollection",
        Method::DELETE => "delete",
        _ if has("watch=true") || has("watch=1") => "watch",
        _ if name.is_empty() => "list",
        _ => "get",
    };
    Asked {
        verb,
        group,
        resource: part(0),
        subresource: part(2),
        namespace: namespace.to_owned(),
        name,
    }
}

/// An answer of the Kubernetes API that is no success.
pub fn refusal(code: u16, reason: &str, message: &str) -> Answer {
    let status = status_of(code, reason, message).to_string();
    Answer::new(code, status).header(CONTENT_TYPE, "application/json")
}

/// Somebody else has written at the same time.
pub fn conflict() -> Answer {
    let message = "Operation cannot be fulfilled: the object has been modified";
    refusal(409, "Conflict", message)
}

/// The API server is too busy for this call, and names the time after which to try again.
pub fn too_busy(seconds: &'static str) -> Answer {
    let message = "too many requests, please try again later";
    refusal(429, "TooManyRequests", message).header(RETRY_AFTER, seconds)
}

/// The version that a list or watch begins at is forgotten.
pub fn expired() -> Answer {
    refusal(410, "Expired", "too old resource version: 1 (2)")
}

fn is_watch_of(call: &Call, which: impl Fn(&Asked) -> bool) -> bool {
    let asked = asked(call);
    asked.verb == "watch" && which(&asked)
}

fn status_of(code: u16, reason: &str, message: &str) -> serde_json::Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(method: Method, path: &str, query: &str) -> Asked {
        asked(&Call {
            method,
            path: path.to_owned(),
            query: query.to_owned(),
            answered: None,
        })
    }

    fn words(asked: &Asked) -> [&str; 6] {
        [
            asked.verb,
            &asked.group,
            &asked.resource,
            &asked.subresource,
            &asked.namespace,
            &asked.name,
        ]
    }

    #[test]
    fn what_is_asked_is_read_from_the_path() {
        let (get, post) = (Method::GET, Method::POST);
        let cases = [
            (
                read(get.clone(), "/api/v1/namespaces/a/pods/b", ""),
                ["get", "", "pods", "", "a", "b"],
                false,
            ),
            (
                read(get.clone(), "/api/v1/namespaces/a/pods", "limit=5"),
                ["list", "", "pods", "", "a", ""],
                false,
            ),
            (
                read(get.clone(), "/api/v1/pods", "labelSelector=a&watch=true"),
                ["watch", "", "pods", "", "", ""],
                false,
            ),
            (
                read(Method::PATCH, "/api/v1/namespaces/a/pods/b/status", ""),
                ["patch", "", "pods", "status", "a", "b"],
                true,
            ),
            (
                read(post.clone(), "/api/v1/namespaces", ""),
                ["create", "", "namespaces", "", "", ""],
                true,
            ),
            (
                read(Method::DELETE, "/api/v1/namespaces/a", ""),
                ["delete", "", "namespaces", "", "a", "a"],
                true,
            ),
            (
                read(
                    Method::PUT,
                    "/apis/coordination.k8s.io/v1/namespaces/a/leases/b",
                    "",
                ),
                ["update", "coordination.k8s.io", "leases", "", "a", "b"],
                true,
            ),
            (
                read(
                    post,
                    "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
                    "",
                ),
                [
                    "create",
                    "authorization.k8s.io",
                    "selfsubjectaccessreviews",
                    "",
                    "",
                    "",
                ],
                false,
            ),
            (
                read(get, "/version", ""),
                ["list", "", "", "", "", ""],
                false,
            ),
        ];
        for (asked, expected, is_write) in cases {
            assert_eq!(words(&asked), expected);
            assert_eq!(asked.is_write(), is_write, "{asked:?}");
        }
    }
}
