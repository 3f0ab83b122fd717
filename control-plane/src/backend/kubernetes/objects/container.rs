//! What all containers of session pods have in common.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, EnvVar, HTTPGetAction, PodSecurityContext, Probe,
        ResourceRequirements, SeccompProfile, SecurityContext, VolumeMount,
    },
    apimachinery::pkg::{api::resource::Quantity, util::intstr::IntOrString},
};

use crate::backend::kubernetes::settings::PodUser;

/// User, group and volume group of session pods, as of the images of our own programs.
const USER: i64 = 65532;

/// Resources of a container: cpu and memory that it is promised, and that it may have at most.
pub(super) struct Resources {
    pub(super) requests: [&'static str; 2],
    pub(super) limits: [&'static str; 2],
}

impl Resources {
    pub(super) fn requirements(&self) -> ResourceRequirements {
        let named = |[cpu, memory]: [&str; 2]| {
            let of = |(name, quantity): (&str, &str)| (name.to_owned(), Quantity(quantity.into()));
            [("cpu", cpu), ("memory", memory)].map(of).into()
        };
        ResourceRequirements {
            requests: Some(named(self.requests)),
            limits: Some(named(self.limits)),
            ..ResourceRequirements::default()
        }
    }
}

/// A container that meets Pod Security `restricted`, on a root that it cannot write.
pub(super) fn container(name: &str, image: &str, resources: &Resources) -> Container {
    Container {
        name: name.to_owned(),
        image: Some(image.to_owned()),
        resources: Some(resources.requirements()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                ..Capabilities::default()
            }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

/// What holds for all containers of a pod.
pub(super) fn pod_security(user: PodUser) -> PodSecurityContext {
    let id = match user {
        PodUser::Ours => Some(USER),
        PodUser::Platform => None,
    };
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: id,
        run_as_group: id,
        fs_group: id,
        seccomp_profile: Some(SeccompProfile {
            type_: "RuntimeDefault".to_owned(),
            ..SeccompProfile::default()
        }),
        ..PodSecurityContext::default()
    }
}

/// Variables by name, in the order in which they are written.
pub(super) type Variables = BTreeMap<String, EnvVar>;

/// A variable that has exactly this value.
pub(super) fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(literal(value)),
        ..EnvVar::default()
    }
}

/// Sets these variables, in place of what was there.
pub(super) fn set(
    variables: &mut Variables,
    these: impl IntoIterator<Item = (&'static str, String)>,
) {
    let these = these.into_iter();
    variables.extend(these.map(|(name, value)| (name.to_owned(), variable(name, &value))));
}

/// Keeps the kubelet from replacing `$(NAME)`, in variables as in commands: what people wrote is
/// theirs.
pub(super) fn literal(text: &str) -> String {
    text.replace('$', "$$")
}

/// A volume where the container finds it.
pub(super) fn mount(volume: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    }
}

/// As [`mount`], not to be written.
pub(super) fn read_only(volume: &str, path: &str) -> VolumeMount {
    VolumeMount {
        read_only: Some(true),
        ..mount(volume, path)
    }
}

/// How often and how patiently a probe asks, in seconds and tries.
pub(super) struct Patience {
    pub(super) period: i32,
    pub(super) timeout: i32,
    pub(super) failures: i32,
}

/// A probe of one of our programs' admin ports.
pub(super) fn http_probe(path: &str, port: u16, patience: &Patience) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(port.into()),
            ..HTTPGetAction::default()
        }),
        ..probe(patience)
    }
}

/// A probe that does nothing yet.
pub(super) fn probe(patience: &Patience) -> Probe {
    Probe {
        period_seconds: Some(patience.period),
        timeout_seconds: Some(patience.timeout),
        failure_threshold: Some(patience.failures),
        ..Probe::default()
    }
}
