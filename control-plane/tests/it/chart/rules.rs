//! The chart's permissions are those of `src/rules.rs`.

use std::collections::BTreeMap;

use ambient_control_plane::{
    backend::kubernetes::settings::{Platform, SecretRef},
    rules::{CONTROL_PLANE, RuleSettings, Rules},
};

use super::*;

const KINDS: [&str; 6] = [
    "ClusterRole",
    "Role",
    "ClusterRoleBinding",
    "RoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];

/// What gives and limits rights, by kind, namespace and name; labels apart.
fn rights(objects: &[Value]) -> BTreeMap<String, Value> {
    let objects = objects
        .iter()
        .filter(|it| KINDS.contains(&text(it, "/kind")));
    objects
        .map(|object| {
            let namespace = text(object, "/metadata/namespace");
            let mut object = object.clone();
            let key = format!("{namespace} {}", title(&object));
            assert_eq!(text(&object, "/metadata/labels/app"), CONTROL_PLANE);
            object["metadata"] = Value::Null;
            (key, object)
        })
        .collect()
}

fn usual() -> RuleSettings {
    RuleSettings {
        namespace: NAMESPACE.to_owned(),
        service_account: CONTROL_PLANE.to_owned(),
        platform: Platform::Standard,
        pull_namespace: None,
        copied: Vec::new(),
    }
}

fn copied(namespace: &str, name: &str) -> SecretRef {
    SecretRef {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    }
}

#[track_caller]
fn assert_same(settings: &RuleSettings, values: &[&str]) {
    let ours = Rules::new(settings).yaml().unwrap();
    let ours = rights(&objects(&ours));
    let charts = rights(&render(&[&value_set("minimal")], values));
    for (key, object) in &ours {
        let of_chart = charts
            .get(key)
            .unwrap_or_else(|| panic!("the chart lacks {key}"));
        assert_eq!(of_chart, object, "{key}: the chart's is on the left");
    }
    let more: Vec<_> = charts
        .keys()
        .filter(|key| !ours.contains_key(*key))
        .collect();
    assert!(more.is_empty(), "only the chart has {more:?}");
    assert!(ours.len() >= 12, "{:?}", ours.keys());
}

#[test]
fn the_usual_rights_are_the_charts() {
    assert_same(&usual(), &[]);
}

#[test]
fn options_give_the_same_rights() {
    assert_same(
        &RuleSettings {
            service_account: "agents".to_owned(),
            pull_namespace: Some("images".to_owned()),
            copied: vec![copied(NAMESPACE, "pull"), copied("vault", "vertex")],
            ..usual()
        },
        &[
            r#"serviceAccount={"name": "agents"}"#,
            r#"sessions={"imageNamespace": "images", "imagePullSecret": "pull",
                "vertex": {"enabled": true, "secretName": "vertex", "secretNamespace": "vault"}}"#,
        ],
    );
    // In our own namespace, and switched off.
    assert_same(
        &RuleSettings {
            copied: vec![copied(NAMESPACE, "vertex")],
            ..usual()
        },
        &[r#"sessions.vertex={"enabled": true, "secretName": "vertex"}"#],
    );
    assert_same(
        &usual(),
        &[r#"sessions.vertex={"enabled": false, "secretName": "vertex"}"#],
    );
}

#[test]
fn a_tenant_operators_platform_has_the_same_rights() {
    let mpp = RuleSettings {
        platform: Platform::Mpp {
            config_namespace: "ambient-code--config".to_owned(),
        },
        ..usual()
    };
    let values = r#"platform={"mode": "mpp", "mppConfigNamespace": "ambient-code--config"}"#;
    assert_same(&mpp, &[values]);
    assert_same(
        &RuleSettings {
            pull_namespace: Some("images".to_owned()),
            copied: vec![copied(NAMESPACE, "pull")],
            ..mpp
        },
        &[
            values,
            r#"sessions={"imageNamespace": "images", "imagePullSecret": "pull"}"#,
        ],
    );
}

#[test]
fn a_second_installation_leaves_the_shared_roles_to_the_first() {
    let objects = render(&[&value_set("minimal")], &["rbac.clusterRoles=false"]);
    let kinds: Vec<_> = objects.iter().map(|it| text(it, "/kind")).collect();
    assert!(!kinds.contains(&"ClusterRole"), "{kinds:?}");
    assert!(kinds.contains(&"ClusterRoleBinding"), "{kinds:?}");

    let none = render(&[&value_set("minimal")], &["rbac.create=false"]);
    assert!(rights(&none).is_empty());
}
