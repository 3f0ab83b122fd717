//! The rules by themselves; on a real cluster in `tests/it/rules.rs`.

use super::*;

fn settings() -> RuleSettings {
    RuleSettings {
        namespace: "ambient-code".to_owned(),
        service_account: CONTROL_PLANE.to_owned(),
        platform: Platform::Standard,
        pull_namespace: None,
        copied: Vec::new(),
    }
}

fn has(rules: &Rules, right: &str) -> bool {
    rules.rights().iter().any(|it| it.to_string() == right)
}

#[test]
fn no_right_covers_more_than_it_names() {
    let rules = Rules::new(&settings());
    for right in rules.rights() {
        assert!(right.verb != "*" && right.resource != "*", "{right}");
        // Whole Secrets are read by name only, in our own namespace.
        if right.resource == "secrets" && right.verb == "get" {
            assert!(right.name.is_some(), "{right}");
        }
        if right.place == Place::Cluster {
            let known = ["namespaces", "rolebindings", "clusterroles"];
            assert!(known.contains(&right.resource.as_str()), "{right}");
        }
        if right.verb == "bind" {
            assert!(right.name.is_some(), "{right}");
        }
    }
    assert!(!has(
        &rules,
        "bind clusterroles.rbac.authorization.k8s.io system:image-puller in the whole cluster"
    ));
}

#[test]
fn people_read_no_secrets_and_make_no_pods() {
    for (name, rules) in people::roles() {
        for rule in rules {
            let resources = rule.resources.unwrap_or_default();
            assert!(!resources.iter().any(|it| it == "secrets"), "{name}");
            let writes = rule
                .verbs
                .iter()
                .any(|verb| verb == "create" || verb == "patch");
            assert!(
                !(writes && resources.iter().any(|it| it == "pods")),
                "{name}"
            );
        }
    }
}

#[test]
fn settings_give_rights_where_they_need_them() {
    let rules = Rules::new(&RuleSettings {
        platform: Platform::Mpp {
            config_namespace: "ambient-code--config".to_owned(),
        },
        pull_namespace: Some("images".to_owned()),
        copied: vec![SecretRef {
            namespace: "vault".to_owned(),
            name: "vertex".to_owned(),
        }],
        ..settings()
    });
    for right in [
        "create tenantnamespaces.tenant.paas.redhat.com in namespace ambient-code--config",
        "delete rolebindings.rbac.authorization.k8s.io in namespace images",
        "get secrets vertex in namespace vault",
        "bind clusterroles.rbac.authorization.k8s.io system:image-puller in the whole cluster",
    ] {
        assert!(has(&rules, right), "{right}");
    }
    assert!(!has(&rules, "create namespaces in the whole cluster"));
    assert_eq!(rules.role_bindings.len(), 4);
    assert!(has(
        &Rules::new(&settings()),
        "create namespaces in the whole cluster"
    ));
}

#[test]
fn what_is_printed_is_yaml_of_every_object() {
    let rules = Rules::new(&settings());
    let yaml = rules.yaml().unwrap();
    let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(&yaml).unwrap();
    let kinds: Vec<_> = documents
        .iter()
        .map(|it| it["kind"].as_str().unwrap())
        .collect();
    for (kind, count) in [
        ("ClusterRole", 5),
        ("Role", 1),
        ("ClusterRoleBinding", 1),
        ("RoleBinding", 1),
        ("ValidatingAdmissionPolicy", 2),
        ("ValidatingAdmissionPolicyBinding", 2),
    ] {
        assert_eq!(
            kinds.iter().filter(|it| **it == kind).count(),
            count,
            "{kind}"
        );
    }
}
