//! Gives the control plane the rights that it has in production, no more; finds unused ones.
//!
//! A test that runs the control plane's code on a cluster calls [`grant`] first and then talks to
//! the cluster as [`CONTROL_PLANE`] (`cluster.kubeconfig(CONTROL_PLANE)`): a verb that is missing
//! from `src/rules.rs` fails the test with a 403.

use std::{sync::OnceLock, time::Instant};

use ambient_control_plane::{
    backend::kubernetes::settings::{Platform, SecretRef},
    rules::{self, Place, Right, RuleSettings, Rules},
};
use ambient_testing::cluster::{CONTROL_PLANE, Cluster, ClusterOptions, Request};
use serde_json::json;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard};

/// The control plane's own namespace.
pub const NAMESPACE: &str = "ambient-code";
/// Where images may be pulled from.
pub const IMAGES: &str = "images";
/// The Secret of [`NAMESPACE`] that may be copied to projects to pull images.
pub const PULL_SECRET: &str = "pull";
/// The Secret of [`NAMESPACE`] that may be copied to projects for access to models.
pub const MODELS_SECRET: &str = "vertex";

/// A usual installation: what the shared cluster has.
pub fn usual() -> RuleSettings {
    RuleSettings {
        namespace: NAMESPACE.to_owned(),
        service_account: rules::CONTROL_PLANE.to_owned(),
        platform: Platform::Standard,
        pull_namespace: None,
        copied: Vec::new(),
    }
}

/// With all that is optional: what the quiet cluster has.
pub fn full() -> RuleSettings {
    let copied = [PULL_SECRET, MODELS_SECRET].map(|name| SecretRef {
        namespace: NAMESPACE.to_owned(),
        name: name.to_owned(),
    });
    RuleSettings {
        pull_namespace: Some(IMAGES.to_owned()),
        copied: copied.into(),
        ..usual()
    }
}

/// Gives [`CONTROL_PLANE`] its rights in the shared cluster by [`usual`], and returns when they are
/// in force. May be called by every test.
///
/// # Panics
/// When the API server refuses.
pub fn grant(cluster: &Cluster) {
    static GRANTED: OnceLock<()> = OnceLock::new();
    GRANTED.get_or_init(|| grant_for(cluster, &usual()));
}

/// A cluster beside the shared one, with the rights of [`full`]: for tests that look at all projects' namespaces
/// or at the policies. Whoever uses it holds [`quiet`] meanwhile.
pub fn quiet_cluster() -> &'static Cluster {
    static QUIET: OnceLock<Cluster> = OnceLock::new();
    QUIET.get_or_init(|| {
        let cluster = Cluster::start(ClusterOptions::default());
        grant_for(&cluster, &full());
        cluster
    })
}

/// Waits until nobody else uses [`quiet_cluster`].
pub async fn quiet() -> MutexGuard<'static, ()> {
    static USED: AsyncMutex<()> = AsyncMutex::const_new(());
    USED.lock().await
}

/// As [`grant`], by other settings: for a cluster of the test's own, as its roles are for the whole
/// cluster.
///
/// # Panics
/// When the API server refuses.
pub fn grant_for(cluster: &Cluster, settings: &RuleSettings) {
    let rules = Rules::new(settings);
    for role in &rules.roles {
        ensure_namespace(cluster, role.metadata.namespace.as_deref().unwrap());
    }
    cluster.apply(&rules.yaml().unwrap());
    wait_until_in_force(cluster, &settings.namespace);
}

/// Gives [`CONTROL_PLANE`] what it may do in its own namespace in another one too, so that a test
/// can have one of its own.
///
/// # Panics
/// When the API server refuses.
pub fn grant_own(cluster: &Cluster, namespace: &str) {
    let mut rules = Rules::new(&RuleSettings {
        namespace: namespace.to_owned(),
        ..usual()
    });
    ensure_namespace(cluster, namespace);
    for subject in rules
        .role_bindings
        .iter_mut()
        .flat_map(|it| &mut it.subjects)
        .flatten()
    {
        subject.namespace = Some(NAMESPACE.to_owned());
    }
    let documents: Vec<_> = rules
        .roles
        .iter()
        .map(|role| serde_json::to_string(role).unwrap())
        .chain(
            rules
                .role_bindings
                .iter()
                .map(|it| serde_json::to_string(it).unwrap()),
        )
        .collect();
    cluster.apply(&documents.join("\n---\n"));
    wait_until_in_force(cluster, namespace);
}

fn ensure_namespace(cluster: &Cluster, name: &str) {
    let body = json!({"metadata": {"name": name}});
    let (status, answer) = cluster.request("POST", "/api/v1/namespaces", Some(&body));
    assert!(matches!(status, 201 | 409), "namespace {name}: {answer}");
}

/// The API server hears of its own roles by a watch.
fn wait_until_in_force(cluster: &Cluster, namespace: &str) {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": CONTROL_PLANE.name,
            "resourceAttributes": {"namespace": namespace, "verb": "create", "resource": "secrets"},
        },
    });
    let deadline = Instant::now() + ambient_testing::DEADLINE;
    loop {
        let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
        let (_, answer) = cluster.request("POST", path, Some(&review));
        if answer["status"]["allowed"] == true {
            return;
        }
        assert!(Instant::now() < deadline, "no rights: {answer:#}");
    }
}

/// All requests that were answered before this call. The log may be a moment behind the answers, so
/// requests of our own are sent after them and waited for: one after the other, as one that passes
/// another in the log does not pass it three times.
///
/// # Panics
/// When they do not come into the log.
pub fn requests_so_far(cluster: &Cluster) -> Vec<Request> {
    for _ in 0..3 {
        let name = format!("marker-{}", uuid::Uuid::new_v4());
        let path = format!("/api/v1/namespaces/default/configmaps/{name}");
        assert_eq!(cluster.get(&path), None);
        cluster.wait_for_request(|it| it.name == name);
    }
    cluster.requests()
}

/// The rights that this user has not used, by the requests in the audit log. Not `bind`, which is
/// part of writing a RoleBinding and in no log.
pub fn unused(rights: &[Right], user: &str, requests: &[Request]) -> Vec<Right> {
    let used = |right: &Right| {
        requests.iter().any(|request| {
            let resource = match request.subresource.as_str() {
                "" => request.resource.clone(),
                subresource => format!("{}/{subresource}", request.resource),
            };
            // An apply that makes an object needs the right to make it too.
            let made = request.verb == "patch" && request.code == 201 && right.verb == "create";
            request.user == user
                && request.code != 403
                && (request.verb == right.verb || made)
                && request.group == right.group
                && resource == right.resource
                && right.name.as_ref().is_none_or(|name| *name == request.name)
                && match &right.place {
                    Place::Namespace(namespace) => *namespace == request.namespace,
                    Place::Cluster | Place::Projects => true,
                }
        })
    };
    let rights = rights.iter().filter(|right| right.verb != "bind");
    rights.filter(|right| !used(right)).cloned().collect()
}
