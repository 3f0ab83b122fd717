//! What the chart makes of each set of values in its `tests` folder: as it was when somebody last
//! looked at it, and such that a Kubernetes API takes it.

use ambient_testing::cluster::{ADMIN, Cluster};
use serde_json::json;

use super::*;

/// Kinds that others define, as far as dry runs need them.
const FOREIGN: [(&str, &str, &str, &str); 5] = [
    (
        "monitoring.coreos.com",
        "v1",
        "ServiceMonitor",
        "servicemonitors",
    ),
    ("monitoring.coreos.com", "v1", "PodMonitor", "podmonitors"),
    (
        "monitoring.coreos.com",
        "v1",
        "PrometheusRule",
        "prometheusrules",
    ),
    ("cert-manager.io", "v1", "Certificate", "certificates"),
    (
        "external-secrets.io",
        "v1",
        "ExternalSecret",
        "externalsecrets",
    ),
];

/// Without blank ones: Helm 3 has some between objects, Helm 4 has none.
fn lines(yaml: &str) -> Vec<&str> {
    yaml.lines().filter(|it| !it.trim().is_empty()).collect()
}

#[test]
fn each_set_of_values_gives_what_it_gave() {
    let update = std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|it| it == "1");
    let helm = Helm::offline();
    let sets = value_sets();
    assert!(sets.len() >= 10, "{sets:?}");
    for (name, values) in sets {
        let now = helm.template(NAMESPACE, &[&values], &[]).unwrap();
        let again = helm.template(NAMESPACE, &[&values], &[]).unwrap();
        assert_eq!(now, again, "{name} is another each time");
        let path = chart().join("tests").join(format!("{name}.yaml"));
        if update {
            fs::write(&path, now).unwrap();
            continue;
        }
        let before = fs::read_to_string(&path).unwrap_or_default();
        let pairs = lines(&before).into_iter().zip(lines(&now)).enumerate();
        let changed = pairs.filter(|(_, (before, now))| before != now);
        let changed: Vec<_> = changed.take(8).collect();
        assert!(
            lines(&before) == lines(&now),
            "{name} is not as in {}: {changed:#?}\nif that is meant, run the test with \
             UPDATE_SNAPSHOTS=1 and look at what git shows",
            path.display()
        );
    }
}

#[test]
fn each_set_of_values_is_taken_by_a_kubernetes_api() {
    let cluster = Cluster::shared();
    // Another test may have made some of them already.
    for namespace in [
        NAMESPACE,
        "images",
        "agents",
        "vault",
        "ambient-code--config",
    ] {
        let body = json!({"metadata": {"name": namespace}});
        let (status, answer) = cluster.request("POST", "/api/v1/namespaces", Some(&body));
        assert!(matches!(status, 201 | 409), "{answer}");
    }
    for account in ["ambient-control-plane", "agents"] {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts");
        let body = json!({"metadata": {"name": account}});
        let (status, answer) = cluster.request("POST", &path, Some(&body));
        assert!(matches!(status, 201 | 409), "{answer}");
    }
    for (group, version, kind, plural) in FOREIGN {
        cluster.apply(&definition(group, version, kind, plural));
        let path =
            format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.{group}");
        cluster.wait_for(&path, |it| {
            let conditions = it["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|it| it["type"] == "Established" && it["status"] == "True")
        });
    }
    let helm = Helm::offline();
    for (name, values) in all_values() {
        let rendered = helm.template(NAMESPACE, &[&values], &[]).unwrap();
        let file = cluster.folder().join(format!("chart-{name}.yaml"));
        fs::write(&file, rendered).unwrap();
        let file = file.display().to_string();
        // By a manager of its own, and by force: another test's permissions may be there.
        let taken = cluster.try_kubectl(
            ADMIN,
            &[
                "apply",
                "--server-side",
                "--dry-run=server",
                "--force-conflicts",
                "--field-manager=chart",
                "--validate=strict",
                "--filename",
                &file,
            ],
        );
        let said = taken.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(said.contains("ambient-control-plane"), "{name}: {said}");
    }
}

fn definition(group: &str, version: &str, kind: &str, plural: &str) -> String {
    let schema = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{group}")},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{
                "name": version, "served": true, "storage": true,
                "schema": {"openAPIV3Schema": schema},
            }],
        },
    })
    .to_string()
}
