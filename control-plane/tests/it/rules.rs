//! The rules on a real API server: what they allow, and what the policies refuse.

use std::time::Instant;

use ambient_control_plane::rules::{CONTROL_PLANE as NAME, RuleSettings, Rules};
use ambient_testing::{
    DEADLINE,
    cluster::{ADMIN, CONTROL_PLANE, Cluster, User},
};
use serde_json::json;

use crate::permissions;

const VIEWER: User = User {
    name: "viewer",
    groups: &[],
};

fn can(cluster: &Cluster, user: &str, verb: &str, resource: &str, namespace: &str) -> bool {
    let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": {
            "namespace": namespace, "verb": verb, "resource": resource, "subresource": subresource,
        }},
    });
    let path = "/apis/authorization.k8s.io/v1/subjectaccessreviews";
    let (_, answer) = cluster.request("POST", path, Some(&review));
    answer["status"]["allowed"] == true
}

fn binding(namespace: &str, role: &str, user: &str) -> String {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": format!("{user}-{role}").replace(':', "-"), "namespace": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    })
    .to_string()
}

/// Applies a manifest as the control plane.
fn apply(cluster: &Cluster, name: &str, manifest: &str) -> Result<String, String> {
    let file = cluster.folder().join(format!("{name}.json"));
    std::fs::write(&file, manifest).unwrap();
    let file = file.display().to_string();
    cluster.try_kubectl(
        CONTROL_PLANE,
        &["apply", "--server-side", "--filename", &file],
    )
}

#[tokio::test]
async fn the_control_plane_is_kept_to_its_projects() {
    let _quiet = permissions::quiet().await;
    let cluster = permissions::quiet_cluster();
    cluster.create_namespace("foreign");
    let project = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: team\n  labels: \
                   {ambient-code.io/managed: 'true'}\n  annotations: \
                   {ambient-code.io/created-by: ambient-control-plane}\n";
    apply(cluster, "project", project).unwrap();

    // A policy is in force some time after it was made.
    let refused = |what: &dyn Fn() -> Result<String, String>, why: &str| {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match what() {
                Err(error) if error.contains(why) => return,
                Err(error) => panic!("refused for another reason: {error}"),
                Ok(_) => assert!(Instant::now() < deadline, "never refused: {why}"),
            }
        }
    };
    let label = |value: &str| {
        let label = format!("ambient-code.io/managed={value}");
        let arguments = ["label", "namespace", "foreign", "--overwrite", &label];
        cluster.try_kubectl(CONTROL_PLANE, &arguments)
    };
    let mine = "ambient-session-manager";
    let foreign = binding("foreign", mine, CONTROL_PLANE.name);
    refused(
        &|| apply(cluster, "foreign", &foreign),
        "only in projects' namespaces",
    );
    refused(&|| label("true"), "changes only projects' namespaces");
    let delete = |name: &str| {
        cluster.try_kubectl(
            CONTROL_PLANE,
            &["delete", "namespace", name, "--wait=false"],
        )
    };
    refused(&|| delete("foreign"), "changes only projects' namespaces");

    // In a project's namespace: the named roles only.
    apply(cluster, "own", &binding("team", mine, CONTROL_PLANE.name)).unwrap();
    apply(
        cluster,
        "view",
        &binding("team", "ambient-project-view", VIEWER.name),
    )
    .unwrap();
    let admin = apply(
        cluster,
        "admin",
        &binding("team", "cluster-admin", CONTROL_PLANE.name),
    );
    assert!(
        admin
            .unwrap_err()
            .contains("attempting to grant RBAC permissions")
    );

    // One that somebody else made is used, but neither deleted nor claimed.
    cluster.kubectl(
        ADMIN,
        &[
            "label",
            "namespace",
            "foreign",
            "ambient-code.io/managed=true",
        ],
    );
    apply(cluster, "foreign", &foreign).unwrap();
    refused(&|| delete("foreign"), "only namespaces that it made");
    let claim = || {
        let claim = "ambient-code.io/created-by=ambient-control-plane";
        cluster.try_kubectl(CONTROL_PLANE, &["annotate", "namespace", "foreign", claim])
    };
    refused(&claim, "who made a namespace");
    delete("team").unwrap();

    // Where images are pulled from, for that alone.
    let puller = binding(
        permissions::IMAGES,
        "system:image-puller",
        "system:serviceaccounts:team",
    );
    apply(cluster, "puller", &puller).unwrap();
    let other = binding(permissions::IMAGES, "ambient-project-view", VIEWER.name);
    let other = apply(cluster, "other", &other);
    assert!(other.unwrap_err().contains("only in projects' namespaces"));
}

#[test]
fn people_see_what_runs_and_no_secrets() {
    let cluster = Cluster::shared();
    permissions::grant(cluster);
    cluster.create_namespace("people");
    for (user, role) in [("ann", "admin"), ("eve", "edit"), ("vic", "view")] {
        cluster.apply(&binding("people", &format!("ambient-project-{role}"), user));
    }
    let deadline = Instant::now() + DEADLINE;
    while !can(cluster, "vic", "get", "pods", "people") {
        assert!(Instant::now() < deadline, "never bound");
    }
    for (verb, resource, may) in [
        ("get", "pods/log", "ann eve vic"),
        ("list", "events", "ann eve vic"),
        ("delete", "pods", "ann eve"),
        ("create", "pods/portforward", "ann eve"),
        ("create", "pods/exec", "ann"),
        ("create", "pods", ""),
        ("get", "secrets", ""),
        ("list", "secrets", ""),
        ("patch", "serviceaccounts", ""),
    ] {
        for user in ["ann", "eve", "vic"] {
            let wanted = may.contains(user);
            assert_eq!(
                can(cluster, user, verb, resource, "people"),
                wanted,
                "{user} {verb} {resource}"
            );
        }
    }
}

#[test]
fn the_verb_prints_what_is_applied() {
    let printed = std::process::Command::new(env!("CARGO_BIN_EXE_ambient-control-plane"))
        .args(["--cp-runtime-namespace", "elsewhere", "rules"])
        .env_clear()
        .output()
        .unwrap();
    let text = String::from_utf8(printed.stdout).unwrap();
    let settings = RuleSettings {
        namespace: "elsewhere".to_owned(),
        ..permissions::usual()
    };
    assert_eq!(text, Rules::new(&settings).yaml().unwrap());
    assert!(text.contains(NAME));
}
