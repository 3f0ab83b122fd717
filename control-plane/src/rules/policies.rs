//! Limits that RBAC cannot express, as admission policies in CEL.
//!
//! RBAC lets the control plane write RoleBindings in every namespace, as those of projects are made
//! at run time. These policies keep it to namespaces that are projects', from becoming projects'
//! by its own hand, and from deleting what it has not made.

use k8s_openapi::api::admissionregistration::v1::{
    MatchCondition, MatchResources, NamedRuleWithOperations, ValidatingAdmissionPolicy,
    ValidatingAdmissionPolicyBinding, ValidatingAdmissionPolicyBindingSpec,
    ValidatingAdmissionPolicySpec, Validation,
};

use super::{CORE, IMAGE_PULLER, RBAC, RuleSettings, metadata, owned};
use crate::backend::kubernetes::settings::Platform;

/// Whether a namespace (`NS` stands for it) is a project's.
const IS_PROJECTS: &str = "NS.metadata.?labels[?'ambient-code.io/managed'].orValue('') == 'true'";
/// Whether a namespace is known as a project's by its other marks.
const IS_MARKED: &str = "'ambient-code.io/project-id' in NS.metadata.?labels.orValue({})";
/// Who made a namespace, if it is marked so.
const CREATED_BY: &str = "NS.metadata.?annotations[?'ambient-code.io/created-by'].orValue('')";

/// Beginning of the names of projects' namespaces where a tenant operator makes them.
const TENANTS: &str = "ambient-code--";

pub(super) fn policies(settings: &RuleSettings) -> Vec<ValidatingAdmissionPolicy> {
    vec![bindings(settings), namespaces(settings)]
}

/// Puts a policy in force: what it refuses is refused.
pub(super) fn in_force(policy: &ValidatingAdmissionPolicy) -> ValidatingAdmissionPolicyBinding {
    let name = policy.metadata.name.as_deref().unwrap_or_default();
    ValidatingAdmissionPolicyBinding {
        metadata: metadata(name, None),
        spec: Some(ValidatingAdmissionPolicyBindingSpec {
            policy_name: Some(name.to_owned()),
            validation_actions: Some(owned(&["Deny"])),
            ..ValidatingAdmissionPolicyBindingSpec::default()
        }),
    }
}

/// RoleBindings: in projects' namespaces; where images are pulled from, for that alone.
fn bindings(settings: &RuleSettings) -> ValidatingAdmissionPolicy {
    let mut allowed = vec![of(IS_PROJECTS, "namespaceObject")];
    if let Platform::Mpp { .. } = settings.platform {
        allowed.push(format!("request.namespace.startsWith('{TENANTS}')"));
    }
    if let Some(namespace) = &settings.pull_namespace {
        allowed.push(format!(
            "request.namespace == '{namespace}' && \
             (object == null ? oldObject : object).roleRef.name == '{IMAGE_PULLER}'"
        ));
    }
    let validation = Validation {
        expression: any(&allowed),
        message: Some(
            "the Ambient control plane writes RoleBindings only in projects' namespaces \
             (label ambient-code.io/managed=true)"
                .to_owned(),
        ),
        ..Validation::default()
    };
    policy(
        "ambient-control-plane-rolebindings",
        settings,
        (RBAC, "rolebindings"),
        &["CREATE", "UPDATE", "DELETE"],
        vec![validation],
    )
}

/// Namespaces: it changes those that are projects' already, and deletes those that it made.
fn namespaces(settings: &RuleSettings) -> ValidatingAdmissionPolicy {
    let mut changed = vec![of(IS_PROJECTS, "oldObject"), of(IS_MARKED, "oldObject")];
    if let Platform::Mpp { .. } = settings.platform {
        changed.push(format!("oldObject.metadata.name.startsWith('{TENANTS}')"));
    }
    let made_by_us = format!(
        "{} == '{}'",
        of(CREATED_BY, "oldObject"),
        super::CONTROL_PLANE
    );
    changed.push(made_by_us.clone());
    let validation = |expression: String, message: &str| Validation {
        expression,
        message: Some(message.to_owned()),
        ..Validation::default()
    };
    policy(
        "ambient-control-plane-namespaces",
        settings,
        (CORE, "namespaces"),
        &["UPDATE", "DELETE"],
        vec![
            validation(
                any(&changed),
                "the Ambient control plane changes only projects' namespaces (label \
                 ambient-code.io/managed=true)",
            ),
            validation(
                format!("request.operation != 'DELETE' || {made_by_us}"),
                "the Ambient control plane deletes only namespaces that it made",
            ),
            validation(
                format!(
                    "request.operation == 'DELETE' || {} == {}",
                    of(CREATED_BY, "object"),
                    of(CREATED_BY, "oldObject")
                ),
                "who made a namespace is not changed afterwards",
            ),
        ],
    )
}

fn policy(
    name: &str,
    settings: &RuleSettings,
    (group, resource): (&str, &str),
    operations: &[&str],
    validations: Vec<Validation>,
) -> ValidatingAdmissionPolicy {
    let user = format!(
        "request.userInfo.username == 'system:serviceaccount:{}:{}'",
        settings.namespace, settings.service_account
    );
    ValidatingAdmissionPolicy {
        // By installation: each has its own user.
        metadata: metadata(&format!("{name}.{}", settings.namespace), None),
        spec: Some(ValidatingAdmissionPolicySpec {
            failure_policy: Some("Fail".to_owned()),
            match_conditions: Some(vec![MatchCondition {
                name: "is-control-plane".to_owned(),
                expression: user,
            }]),
            match_constraints: Some(MatchResources {
                resource_rules: Some(vec![NamedRuleWithOperations {
                    api_groups: Some(owned(&[group])),
                    api_versions: Some(owned(&["*"])),
                    operations: Some(owned(operations)),
                    resources: Some(owned(&[resource])),
                    ..NamedRuleWithOperations::default()
                }]),
                ..MatchResources::default()
            }),
            validations: Some(validations),
            ..ValidatingAdmissionPolicySpec::default()
        }),
        status: None,
    }
}

fn of(expression: &str, namespace: &str) -> String {
    expression.replace("NS", namespace)
}

fn any(expressions: &[String]) -> String {
    let each: Vec<_> = expressions.iter().map(|it| format!("({it})")).collect();
    each.join(" || ")
}
