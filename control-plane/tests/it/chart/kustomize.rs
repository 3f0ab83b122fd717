//! `helm template` as the base of a kustomization: complete in itself, and left whole by what is laid
//! over it.

use std::collections::BTreeSet;

use ambient_testing::cluster::{ADMIN, Cluster};
use serde_json::json;

use super::*;

/// Kinds of ours that are in no namespace.
const IN_NO_NAMESPACE: [&str; 4] = [
    "ClusterRole",
    "ClusterRoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];

fn names(objects: &[Value]) -> BTreeSet<String> {
    let name = |object| format!("{} {}", text(object, "/metadata/namespace"), title(object));
    objects.iter().map(name).collect()
}

#[test]
fn each_object_says_which_namespace_it_is_in() {
    for (name, values) in all_values() {
        for object in render(&[&values], &[]) {
            let is_in_none = IN_NO_NAMESPACE.contains(&text(&object, "/kind"));
            let says_none = text(&object, "/metadata/namespace").is_empty();
            assert_eq!(is_in_none, says_none, "{name}: {}", title(&object));
        }
    }
}

#[test]
fn a_rendering_is_the_base_of_a_kustomization() {
    let cluster = Cluster::shared();
    for (name, values) in all_values() {
        let folder = tempfile::tempdir().unwrap();
        let chart = chart();
        let base = Helm::offline().run(&[
            "template",
            "ambient",
            chart.to_str().unwrap(),
            "--namespace",
            NAMESPACE,
            "--no-hooks",
            "--values",
            values.to_str().unwrap(),
        ]);
        let base = base.unwrap_or_else(|error| panic!("{name}: {error}"));
        let kustomization = json!({
            "resources": ["ambient.yaml"],
            "labels": [{"pairs": {"team": "platform"}}],
            "replicas": [{"name": "ambient-control-plane", "count": 5}],
        });
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).unwrap();
        write("ambient.yaml", &base);
        write("kustomization.yaml", &kustomization.to_string());

        let made = cluster.kubectl(ADMIN, &["kustomize", folder.path().to_str().unwrap()]);

        let (base, made) = (objects(&base), objects(&made));
        assert_eq!(names(&made), names(&base), "{name}");
        assert_eq!(made.len(), base.len(), "{name}");
        for object in &made {
            assert_eq!(object["metadata"]["labels"]["team"], "platform", "{name}");
            assert_ne!(text(object, "/metadata/annotations/helm.sh~1hook"), "test");
        }
        let mut deployments = made.iter().filter(|it| it["kind"] == "Deployment");
        assert_eq!(deployments.next().unwrap()["spec"]["replicas"], 5, "{name}");
    }
}
