//! Snapshots: what changes here changes every project's namespace at the next look.

use serde::Serialize;
use serde_json::{Value, json};

use super::{super::access::Role, *};
use crate::backend::kubernetes::settings::{
    Companions, Images, KubernetesSettings, ModelAccess, Platform, PodSettings,
};

/// Settings of an installation with nothing special.
pub(in super::super) fn settings() -> KubernetesSettings {
    KubernetesSettings {
        namespace: "ambient-code".to_owned(),
        platform: Platform::Standard,
        images: Images::default(),
        overlay: None,
        upstream: "http://api:8000".to_owned(),
        grpc_upstream: "http://api:8001".to_owned(),
        model_access: ModelAccess::default(),
        companions: Companions::default(),
        pods: PodSettings::default(),
    }
}

/// The same with a tenant operator.
pub(in super::super) fn mpp() -> KubernetesSettings {
    KubernetesSettings {
        platform: Platform::Mpp {
            config_namespace: "ambient-code--config".to_owned(),
        },
        ..settings()
    }
}

#[track_caller]
fn assert_is(object: &impl Serialize, expected: &Value) {
    let object = serde_json::to_value(object).unwrap();
    assert_eq!(&object, expected, "{object:#}");
}

fn labels_of_team() -> Value {
    json!({
        "ambient-code.io/managed": "true",
        "ambient-code.io/managed-by": "ambient-control-plane",
        "ambient-code.io/project-id": "Team",
    })
}

fn metadata_of(namespace: &str, name: &str) -> Value {
    json!({"name": name, "namespace": namespace, "labels": labels_of_team()})
}

#[test]
fn namespace_is_labelled_restricted_and_marked_as_made_by_us() {
    assert_is(
        &namespace("team", "Team", "ambient-code"),
        &json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {
                "name": "team",
                "annotations": {"ambient-code.io/created-by": "ambient-control-plane"},
                "labels": {
                    "ambient-code.io/installation": "ambient-code",
                    "ambient-code.io/managed": "true",
                    "ambient-code.io/managed-by": "ambient-control-plane",
                    "ambient-code.io/project-id": "Team",
                    "pod-security.kubernetes.io/enforce": "restricted",
                    "pod-security.kubernetes.io/warn": "restricted",
                },
            },
        }),
    );
}

#[test]
fn tenant_namespace_is_what_the_tenant_operator_takes() {
    assert_is(
        &tenant_namespace("ambient-code--config", "Team", "ambient-code"),
        &json!({
            "apiVersion": "tenant.paas.redhat.com/v1alpha1", "kind": "TenantNamespace",
            "metadata": {
                "name": "team", "namespace": "ambient-code--config",
                "annotations": {"ambient-code.io/created-by": "ambient-control-plane"},
                "labels": {
                    "ambient-code.io/installation": "ambient-code",
                    "ambient-code.io/managed": "true",
                    "ambient-code.io/managed-by": "ambient-control-plane",
                    "ambient-code.io/project-id": "Team",
                    "tenant.paas.redhat.com/namespace-type": "runtime",
                    "tenant.paas.redhat.com/tenant": "ambient-code",
                },
            },
            "spec": {"type": "runtime", "network": {"security-zone": "internal"}},
        }),
    );
}

#[test]
fn we_are_bound_to_the_session_manager_as_the_subject_that_we_are() {
    let us = subject("system:serviceaccount:ambient-code:ambient-control-plane");
    assert_is(
        &own_binding("team", "Team", &us),
        &json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": metadata_of("team", "ambient-control-plane"),
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                "name": "ambient-session-manager",
            },
            "subjects": [{
                "kind": "ServiceAccount", "namespace": "ambient-code",
                "name": "ambient-control-plane",
            }],
        }),
    );
    assert_is(
        &subject("kubernetes-admin"),
        &json!({
            "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "kubernetes-admin",
        }),
    );
}

#[test]
fn a_group_is_bound_to_the_role_of_its_grant() {
    let grant = Grant {
        group: "devs".to_owned(),
        role: Role::Edit,
    };
    assert_is(
        &group_binding("team", "Team", &grant),
        &json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": metadata_of("team", "devs-edit"),
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                "name": "ambient-project-edit",
            },
            "subjects": [{
                "apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "devs",
            }],
        }),
    );
}

#[test]
fn each_namespace_has_its_own_binding_where_images_are() {
    assert_is(
        &image_puller("images", "team", "Team"),
        &json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": metadata_of("images", "ambient-image-puller-team"),
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                "name": "system:image-puller",
            },
            "subjects": [{
                "apiGroup": "rbac.authorization.k8s.io", "kind": "Group",
                "name": "system:serviceaccounts:team",
            }],
        }),
    );
}

#[test]
fn session_pods_are_called_from_our_namespace_only() {
    assert_is(
        &network_policy("team", "Team", "ambient-code"),
        &json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": metadata_of("team", "allow-ambient-api-server"),
            "spec": {
                "podSelector": {"matchLabels": {"ambient-code.io/managed": "true"}},
                "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{"namespaceSelector": {"matchLabels": {
                        "kubernetes.io/metadata.name": "ambient-code",
                    }}}],
                    "ports": [{"protocol": "TCP", "port": 8001}],
                }],
            },
        }),
    );
}

#[test]
fn keys_to_models_are_in_a_secret() {
    assert_is(
        &model_access("team", "Team", &"sk-1".to_owned().into()),
        &json!({
            "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": metadata_of("team", "ambient-model-access"),
            "data": {"ANTHROPIC_API_KEY": "c2stMQ=="},
        }),
    );
}

#[test]
fn a_copy_has_type_and_data_of_its_source_and_nothing_else_of_it() {
    let source = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson",
        "metadata": {
            "name": "pull", "namespace": "ambient-code", "uid": "u", "resourceVersion": "7",
            "labels": {"app": "other"}, "ownerReferences": [],
        },
        "data": {".dockerconfigjson": "e30="},
        "immutable": true,
    });
    let source = serde_json::from_value(source).unwrap();
    let mut metadata = metadata_of("team", "pull");
    metadata["annotations"] = json!({"ambient-code.io/copied-from": "ambient-code/pull"});
    assert_is(
        &copied_secret(source, "team", "Team"),
        &json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/dockerconfigjson",
            "metadata": metadata,
            "data": {".dockerconfigjson": "e30="},
        }),
    );
}
