//! The control plane's rights, one by one.

use std::fmt;

use k8s_openapi::api::rbac::v1::PolicyRule;

use super::{CONTROL_PLANE, Rules, SESSION_MANAGER};

/// Where a right holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// In the whole cluster.
    Cluster,
    /// In this namespace.
    Namespace(String),
    /// In each project's namespace.
    Projects,
}

/// One verb on one resource.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Right {
    /// Where.
    pub place: Place,
    /// API group; empty for that of pods.
    pub group: String,
    /// Such as `pods` or `pods/log`.
    pub resource: String,
    /// Such as `patch`.
    pub verb: String,
    /// The only object that it holds for; none: for all.
    pub name: Option<String>,
}

impl Rules {
    /// All rights of the control plane.
    pub fn rights(&self) -> Vec<Right> {
        let of_cluster = self.cluster_roles.iter().filter_map(|role| {
            let place = match role.metadata.name.as_deref() {
                Some(CONTROL_PLANE) => Place::Cluster,
                Some(SESSION_MANAGER) => Place::Projects,
                _ => return None,
            };
            Some((place, role.rules.as_deref()))
        });
        let of_namespaces = self.roles.iter().map(|role| {
            let namespace = role.metadata.namespace.clone().unwrap_or_default();
            (Place::Namespace(namespace), role.rules.as_deref())
        });
        of_cluster
            .chain(of_namespaces)
            .flat_map(|(place, rules)| {
                let rules = rules.unwrap_or_default().iter();
                rules.flat_map(move |rule| single(&place, rule))
            })
            .collect()
    }
}

fn single(place: &Place, rule: &PolicyRule) -> Vec<Right> {
    let names: Vec<Option<&String>> = match &rule.resource_names {
        Some(names) => names.iter().map(Some).collect(),
        None => vec![None],
    };
    let mut rights = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                for name in &names {
                    rights.push(Right {
                        place: place.clone(),
                        group: group.clone(),
                        resource: resource.clone(),
                        verb: verb.clone(),
                        name: name.cloned(),
                    });
                }
            }
        }
    }
    rights
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)?;
        if !self.group.is_empty() {
            write!(f, ".{}", self.group)?;
        }
        if let Some(name) = &self.name {
            write!(f, " {name}")?;
        }
        match &self.place {
            Place::Cluster => f.write_str(" in the whole cluster"),
            Place::Namespace(namespace) => write!(f, " in namespace {namespace}"),
            Place::Projects => f.write_str(" in projects' namespaces"),
        }
    }
}
