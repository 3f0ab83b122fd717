//! Which namespaces are for projects, and for which. Pure.

use k8s_openapi::api::core::v1::Namespace;
use kube::ResourceExt;

use crate::backend::{
    BackendError,
    kubernetes::{
        names::{CREATED_BY, FIELD_MANAGER, INSTALLATION, MANAGED, PROJECT_ID},
        settings::{KubernetesSettings, Platform},
    },
};

/// The rules of this installation.
pub(super) struct Ground<'a>(pub(super) &'a KubernetesSettings);

impl Ground<'_> {
    /// # Errors
    /// `Impossible` when no project may have a namespace of this name.
    pub(super) fn check_name(&self, name: &str) -> Result<(), BackendError> {
        let Some(whose) = self.owner_of(name) else {
            return Ok(());
        };
        Err(BackendError::Impossible {
            reason: "NamespaceReserved",
            message: format!("namespace {name} is {whose}; give the project another name"),
        })
    }

    fn owner_of(&self, name: &str) -> Option<&'static str> {
        let is_system = matches!(name, "default" | "openshift")
            || ["kube-", "openshift-"]
                .iter()
                .any(|prefix| name.starts_with(prefix));
        if is_system {
            return Some("the cluster's own");
        }
        let settings = self.0;
        if name == settings.namespace {
            return Some("the control plane's own");
        }
        if let Platform::Mpp { config_namespace } = &settings.platform
            && name == config_namespace
        {
            return Some("the tenant's configuration");
        }
        if settings.images.pull_namespace.as_deref() == Some(name) {
            return Some("the one that images are pulled from");
        }
        None
    }

    /// # Errors
    /// `Impossible` when this namespace is not for the project; `Refused` while it terminates.
    pub(super) fn check(&self, namespace: &Namespace, project: &str) -> Result<(), BackendError> {
        let name = namespace.name_any();
        if is_terminating(namespace) {
            return Err(terminating(&name));
        }
        self.check_labels(namespace, project, "namespace")?;
        let is_marked = namespace.labels().get(MANAGED).map(String::as_str) == Some("true");
        let is_tenants = matches!(self.0.platform, Platform::Mpp { .. });
        if is_marked
            || is_tenants
            || namespace.labels().contains_key(PROJECT_ID)
            || is_made_by_us(namespace)
        {
            return Ok(());
        }
        Err(BackendError::Impossible {
            reason: "NamespaceForeign",
            message: format!(
                "namespace {name} was there before the project; if it is meant for it, label it: \
                 kubectl label namespace {name} {MANAGED}=true"
            ),
        })
    }

    /// # Errors
    /// `Impossible` when the labels name another project, or another control plane.
    pub(super) fn check_labels(
        &self,
        object: &impl ResourceExt,
        project: &str,
        kind: &str,
    ) -> Result<(), BackendError> {
        let other = |label, ours: &str| object.labels().get(label).filter(|it| *it != ours);
        let whose = if let Some(other) = other(PROJECT_ID, project) {
            format!("project {other}'s")
        } else if let Some(other) = other(INSTALLATION, &self.0.namespace) {
            format!("that of the control plane in namespace {other}")
        } else {
            return Ok(());
        };
        Err(BackendError::Impossible {
            reason: "NamespaceTaken",
            message: format!("{kind} {} is {whose}", object.name_any()),
        })
    }

    /// Whether an object is labelled as this project's, by us.
    pub(super) fn is_labelled(&self, object: &impl ResourceExt, project: &str) -> bool {
        let is = |label, value: &str| object.labels().get(label).is_some_and(|it| it == value);
        is(PROJECT_ID, project) && is(INSTALLATION, &self.0.namespace)
    }
}

/// Whether an object was created by us, and so is ours to delete.
pub(super) fn is_made_by_us(object: &impl ResourceExt) -> bool {
    object.annotations().get(CREATED_BY).map(String::as_str) == Some(FIELD_MANAGER)
}

pub(super) fn is_terminating(namespace: &Namespace) -> bool {
    let phase = namespace.status.as_ref().and_then(|it| it.phase.as_deref());
    namespace.metadata.deletion_timestamp.is_some() || phase == Some("Terminating")
}

pub(super) fn terminating(name: &str) -> BackendError {
    BackendError::Refused {
        reason: "NamespaceTerminating",
        message: format!("namespace {name} is being deleted"),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::core::v1::NamespaceStatus, apimachinery::pkg::apis::meta::v1::ObjectMeta,
    };

    use super::{
        super::objects::tests::{mpp, settings},
        *,
    };

    fn with(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Namespace {
        let owned = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter();
            pairs
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        Namespace {
            metadata: ObjectMeta {
                name: Some("team".to_owned()),
                labels: Some(owned(labels)),
                annotations: Some(owned(annotations)),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        }
    }

    fn reason(checked: Result<(), BackendError>) -> &'static str {
        match checked {
            Ok(()) => "",
            Err(BackendError::Impossible { reason, .. } | BackendError::Refused { reason, .. }) => {
                reason
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn the_namespaces_of_others_are_no_projects() {
        let mut settings = settings();
        settings.images.pull_namespace = Some("images".to_owned());
        let ground = Ground(&settings);
        for name in [
            "default",
            "kube-system",
            "kube-public",
            "openshift",
            "openshift-monitoring",
            "ambient-code",
            "images",
        ] {
            assert_eq!(
                reason(ground.check_name(name)),
                "NamespaceReserved",
                "{name}"
            );
        }
        assert!(ground.check_name("kubernetes-fans").is_ok());
        let settings = mpp();
        let config = Ground(&settings).check_name("ambient-code--config");
        assert_eq!(reason(config), "NamespaceReserved");
    }

    #[test]
    fn a_namespace_is_used_by_its_project_only() {
        let settings = settings();
        let check = |namespace| reason(Ground(&settings).check(&namespace, "team"));
        assert_eq!(check(with(&[], &[])), "NamespaceForeign");
        assert_eq!(check(with(&[(MANAGED, "false")], &[])), "NamespaceForeign");
        assert_eq!(check(with(&[], &[(CREATED_BY, "me")])), "NamespaceForeign");
        assert_eq!(check(with(&[(MANAGED, "true")], &[])), "");
        assert_eq!(check(with(&[(PROJECT_ID, "team")], &[])), "");
        assert_eq!(check(with(&[], &[(CREATED_BY, FIELD_MANAGER)])), "");
        let other = [(MANAGED, "true"), (PROJECT_ID, "Team")];
        let ours = [(CREATED_BY, FIELD_MANAGER)];
        assert_eq!(check(with(&other, &ours)), "NamespaceTaken");
        let other = [(PROJECT_ID, "team"), (INSTALLATION, "elsewhere")];
        assert_eq!(check(with(&other, &ours)), "NamespaceTaken");
        let settings = mpp();
        assert!(Ground(&settings).check(&with(&[], &[]), "team").is_ok());
    }

    #[test]
    fn a_namespace_that_goes_is_waited_for() {
        let settings = settings();
        let mut namespace = with(&[], &[]);
        namespace.status = Some(NamespaceStatus {
            phase: Some("Terminating".to_owned()),
            ..NamespaceStatus::default()
        });
        let checked = Ground(&settings).check(&namespace, "team");
        assert_eq!(reason(checked), "NamespaceTerminating");
    }
}
