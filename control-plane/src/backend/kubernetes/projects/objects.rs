//! What a project has in the cluster, beside its sessions. Pure: objects from names and settings.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::{
        core::v1::{Namespace, Secret},
        networking::v1::{
            NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
            NetworkPolicySpec,
        },
        rbac::v1::{RoleBinding, RoleRef, Subject},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use kube::api::{ApiResource, DynamicObject};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;

use super::access::Grant;
use crate::{
    backend::kubernetes::names::{
        CREATED_BY, FIELD_MANAGER, INSTALLATION, MANAGED, PROJECT_ID, managed,
    },
    rules::{IMAGE_PULLER, SESSION_MANAGER},
};

/// Annotation of a namespace whose project the API server has had: it goes, or is let go, with the
/// project. One that was made for a session of a project that never was there does not have it.
pub(crate) const FOLLOWS_PROJECT: &str = "ambient-code.io/follows-project";
/// Annotation of a copied Secret: where it is from, `namespace/name`.
const COPIED_FROM: &str = "ambient-code.io/copied-from";

/// Our own binding in each project's namespace.
pub(crate) const OWN_BINDING: &str = "ambient-control-plane";
/// The policy of who may call session pods.
pub(crate) const POLICY: &str = "allow-ambient-api-server";
/// Secret with the keys to models that existing runner images take from their environment.
pub(crate) const MODEL_ACCESS: &str = "ambient-model-access";
/// Its data key, and the variable's name.
pub(crate) const ANTHROPIC_API_KEY: &str = "ANTHROPIC_API_KEY";

/// Port of session pods that is called from outside (contract section 3, `agui`).
const AGUI_PORT: i32 = 8001;
/// The Pod Security level of projects' namespaces.
const POD_SECURITY: &str = "restricted";
const RBAC: &str = "rbac.authorization.k8s.io";

/// Tenant of `TenantNamespace` objects: the one whose namespaces are `ambient-code--*`.
const TENANT: &str = "ambient-code";

/// The labels of a project's objects.
fn labels(project: &str) -> BTreeMap<String, String> {
    let mut labels = managed();
    labels.insert(PROJECT_ID.to_owned(), project.to_owned());
    labels
}

/// The labels of a project's namespace that is used by the control plane in `own_namespace`.
pub(crate) fn namespace_labels(project: &str, own_namespace: &str) -> BTreeMap<String, String> {
    let mut labels = labels(project);
    labels.insert(INSTALLATION.to_owned(), own_namespace.to_owned());
    for mode in ["enforce", "warn"] {
        let name = format!("pod-security.kubernetes.io/{mode}");
        labels.insert(name, POD_SECURITY.to_owned());
    }
    labels
}

fn metadata(namespace: &str, name: &str, project: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(namespace.to_owned()),
        labels: Some(labels(project)),
        ..ObjectMeta::default()
    }
}

fn created_by_us() -> BTreeMap<String, String> {
    [(CREATED_BY.to_owned(), FIELD_MANAGER.to_owned())].into()
}

/// A namespace to be created; only one that this creates is marked as made by us.
pub(crate) fn namespace(name: &str, project: &str, own_namespace: &str) -> Namespace {
    Namespace {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(namespace_labels(project, own_namespace)),
            annotations: Some(created_by_us()),
            ..ObjectMeta::default()
        },
        ..Namespace::default()
    }
}

/// The resource `TenantNamespace`.
pub(crate) fn tenant_resource() -> ApiResource {
    ApiResource {
        group: "tenant.paas.redhat.com".to_owned(),
        version: "v1alpha1".to_owned(),
        api_version: "tenant.paas.redhat.com/v1alpha1".to_owned(),
        kind: "TenantNamespace".to_owned(),
        plural: "tenantnamespaces".to_owned(),
    }
}

/// Name of a project's `TenantNamespace`: the tenant operator puts the tenant before it.
pub(crate) fn tenant_name(project: &str) -> String {
    project.to_lowercase()
}

/// A `TenantNamespace` to be created, as the operator's users write them by hand.
pub(crate) fn tenant_namespace(
    config_namespace: &str,
    project: &str,
    own_namespace: &str,
) -> DynamicObject {
    let mut metadata = metadata(config_namespace, &tenant_name(project), project);
    let mut labels = metadata.labels.take().unwrap_or_default();
    labels.insert(INSTALLATION.to_owned(), own_namespace.to_owned());
    for (name, value) in [("namespace-type", "runtime"), ("tenant", TENANT)] {
        labels.insert(format!("tenant.paas.redhat.com/{name}"), value.to_owned());
    }
    metadata.labels = Some(labels);
    metadata.annotations = Some(created_by_us());
    let mut object = DynamicObject::new(&tenant_name(project), &tenant_resource());
    object.metadata = metadata;
    object.data = json!({
        "spec": {"type": "runtime", "network": {"security-zone": "internal"}},
    });
    object
}

fn role_binding(metadata: ObjectMeta, role: &str, subject: Subject) -> RoleBinding {
    RoleBinding {
        metadata,
        role_ref: RoleRef {
            api_group: RBAC.to_owned(),
            kind: "ClusterRole".to_owned(),
            name: role.to_owned(),
        },
        subjects: Some(vec![subject]),
    }
}

fn group(name: &str) -> Subject {
    Subject {
        api_group: Some(RBAC.to_owned()),
        kind: "Group".to_owned(),
        name: name.to_owned(),
        namespace: None,
    }
}

/// The subject that the API server knows by this user name.
pub(crate) fn subject(user: &str) -> Subject {
    let account = user
        .strip_prefix("system:serviceaccount:")
        .and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, name)) => Subject {
            api_group: None,
            kind: "ServiceAccount".to_owned(),
            name: name.to_owned(),
            namespace: Some(namespace.to_owned()),
        },
        None => Subject {
            api_group: Some(RBAC.to_owned()),
            kind: "User".to_owned(),
            name: user.to_owned(),
            namespace: None,
        },
    }
}

/// Lets us manage sessions in the namespace.
pub(crate) fn own_binding(namespace: &str, project: &str, us: &Subject) -> RoleBinding {
    role_binding(
        metadata(namespace, OWN_BINDING, project),
        SESSION_MANAGER,
        us.clone(),
    )
}

/// Lets a group into the project.
pub(crate) fn group_binding(namespace: &str, project: &str, grant: &Grant) -> RoleBinding {
    role_binding(
        metadata(namespace, &grant.binding_name(), project),
        grant.role.cluster_role(),
        group(&grant.group),
    )
}

/// Name of [`image_puller`]: one for each namespace that pulls.
pub(crate) fn image_puller_name(namespace: &str) -> String {
    format!("ambient-image-puller-{namespace}")
}

/// Lets the pods of `namespace` pull the images of `image_namespace` (OpenShift).
pub(crate) fn image_puller(image_namespace: &str, namespace: &str, project: &str) -> RoleBinding {
    role_binding(
        metadata(image_namespace, &image_puller_name(namespace), project),
        IMAGE_PULLER,
        group(&format!("system:serviceaccounts:{namespace}")),
    )
}

/// Our pods may be called from `own_namespace` only, where the API server is. Other pods of the
/// namespace, and what ours call, are nobody's business here.
pub(crate) fn network_policy(namespace: &str, project: &str, own_namespace: &str) -> NetworkPolicy {
    let matching = |name: &str, value: &str| LabelSelector {
        match_labels: Some([(name.to_owned(), value.to_owned())].into()),
        ..LabelSelector::default()
    };
    let from = NetworkPolicyPeer {
        namespace_selector: Some(matching("kubernetes.io/metadata.name", own_namespace)),
        ..NetworkPolicyPeer::default()
    };
    let port = NetworkPolicyPort {
        port: Some(IntOrString::Int(AGUI_PORT)),
        protocol: Some("TCP".to_owned()),
        ..NetworkPolicyPort::default()
    };
    NetworkPolicy {
        metadata: metadata(namespace, POLICY, project),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(matching(MANAGED, "true")),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(vec![NetworkPolicyIngressRule {
                from: Some(vec![from]),
                ports: Some(vec![port]),
            }]),
            egress: None,
        }),
    }
}

/// The keys to models, for existing runner images.
pub(crate) fn model_access(namespace: &str, project: &str, key: &SecretString) -> Secret {
    let value = ByteString(key.expose_secret().as_bytes().to_vec());
    Secret {
        metadata: metadata(namespace, MODEL_ACCESS, project),
        type_: Some("Opaque".to_owned()),
        data: Some([(ANTHROPIC_API_KEY.to_owned(), value)].into()),
        ..Secret::default()
    }
}

/// A Secret of another namespace, for this one.
pub(crate) fn copied_secret(source: Secret, namespace: &str, project: &str) -> Secret {
    let name = source.metadata.name.unwrap_or_default();
    let origin = source.metadata.namespace.unwrap_or_default();
    let mut metadata = metadata(namespace, &name, project);
    metadata.annotations = Some([(COPIED_FROM.to_owned(), format!("{origin}/{name}"))].into());
    Secret {
        metadata,
        type_: source.type_,
        data: source.data,
        ..Secret::default()
    }
}

#[cfg(test)]
pub(super) mod tests;
