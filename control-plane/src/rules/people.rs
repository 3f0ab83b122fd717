//! What people may do in a project's namespace, by the role that the project's settings give their
//! groups.
//!
//! Nobody reads Secrets or makes pods there: who may make a pod can mount every Secret beside it.
//! Only administrators may look into a running session's container, where its token is.

use k8s_openapi::api::rbac::v1::PolicyRule;

use super::{CORE, PROJECT_ROLES, RBAC, rule};

const READ: [&str; 3] = ["get", "list", "watch"];

/// The ClusterRoles, by name.
pub(super) fn roles() -> impl Iterator<Item = (&'static str, Vec<PolicyRule>)> {
    let [admin, edit, view] = PROJECT_ROLES;
    [
        (admin, rules_of_admin()),
        (edit, rules_of_edit()),
        (view, rules_of_view()),
    ]
    .into_iter()
}

/// To see what runs, and why it does not.
fn rules_of_view() -> Vec<PolicyRule> {
    vec![
        rule(
            CORE,
            &[
                "pods",
                "pods/status",
                "pods/log",
                "services",
                "serviceaccounts",
                "events",
                "resourcequotas",
                "limitranges",
            ],
            &READ,
        ),
        rule("events.k8s.io", &["events"], &READ),
        rule("networking.k8s.io", &["networkpolicies"], &READ),
    ]
}

/// And to end a run, and reach its port.
fn rules_of_edit() -> Vec<PolicyRule> {
    let mut rules = rules_of_view();
    rules.push(rule(CORE, &["pods"], &["delete"]));
    rules.push(rule(CORE, &["pods/portforward"], &["create", "get"]));
    rules
}

/// And to look into its container, and see who has access.
fn rules_of_admin() -> Vec<PolicyRule> {
    let mut rules = rules_of_edit();
    rules.push(rule(
        CORE,
        &["pods/exec", "pods/attach"],
        &["create", "get"],
    ));
    rules.push(rule(RBAC, &["roles", "rolebindings"], &READ));
    rules
}
