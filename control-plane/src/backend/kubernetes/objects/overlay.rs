//! The operator's overlay of the pod template (`AMBIENT_POD_TEMPLATE`).
//!
//! Merged as `kubectl patch` merges (strategic merge): containers and volumes by name, variables by
//! name, mounts by path; a volume or variable of the same name replaces ours. A container of ours
//! that this kind of pod does not have is passed over, so that one overlay fits all kinds.
//!
//! What makes the pod a session's is not the overlay's to change, and is left out of it: who owns it
//! and is found by it (our labels and annotations), whose rights it has (the `ServiceAccount`), what
//! it runs (image and command of our containers), how often (`restartPolicy`), and its token. An
//! overlay that tries is refused at start ([`check`]), so that nothing is left out silently.

use std::collections::BTreeMap;

use k8s_openapi::{
    DeepMerge as _,
    api::core::v1::{Container, Pod, PodSpec, PodTemplateSpec},
};

use super::{
    AGENT, command, companions,
    volumes::{TOKEN, TOKEN_FOLDER},
};
use crate::backend::kubernetes::names::{
    GENERATION, MANAGED, MANAGED_BY, PROJECT_ID, SESSION_ID, SESSION_NAME,
};

/// Labels and annotations that are ours.
const OURS: [&str; 6] = [
    SESSION_ID,
    PROJECT_ID,
    MANAGED,
    MANAGED_BY,
    SESSION_NAME,
    GENERATION,
];

/// The variable that says whose pod it is.
const SESSION_ID_VARIABLE: &str = "SESSION_ID";

/// Whether an overlay leaves alone what is not its to change.
///
/// # Errors
/// All that it must not say, for people.
pub(crate) fn check(template: &PodTemplateSpec) -> Result<(), String> {
    let mut template = template.clone();
    let refused = strip(&mut template);
    if refused.is_empty() {
        return Ok(());
    }
    Err(format!(
        "these are the control plane's own to say: {}",
        refused.join(", ")
    ))
}

/// Lays the overlay over the pod.
pub(super) fn lay_over(pod: &mut Pod, template: &PodTemplateSpec) {
    let mut template = template.clone();
    strip(&mut template);
    if let Some(metadata) = template.metadata {
        add(&mut pod.metadata.labels, metadata.labels);
        add(&mut pod.metadata.annotations, metadata.annotations);
    }
    if let (Some(spec), Some(overlay)) = (pod.spec.as_mut(), template.spec) {
        merge(spec, overlay);
    }
}

/// Adds what is not there yet.
fn add(ours: &mut Option<BTreeMap<String, String>>, more: Option<BTreeMap<String, String>>) {
    let ours = ours.get_or_insert_default();
    for (name, value) in more.into_iter().flatten() {
        ours.entry(name).or_insert(value);
    }
}

fn merge(spec: &mut PodSpec, mut overlay: PodSpec) {
    let init = overlay.init_containers.take().unwrap_or_default();
    let containers = std::mem::take(&mut overlay.containers);
    let ours = |it: &Container| is_ours(&it.name);
    let (of_ours, others): (Vec<_>, Vec<_>) = containers.into_iter().partition(ours);
    let (init_of_ours, init_others): (Vec<_>, Vec<_>) = init.into_iter().partition(ours);
    for container in of_ours.into_iter().chain(init_of_ours) {
        let known = spec.init_containers.iter_mut().flatten();
        let mut known = known.chain(&mut spec.containers);
        if let Some(known) = known.find(|it| it.name == container.name) {
            merge_container(known, container);
        }
    }
    overlay.containers = others;
    overlay.init_containers = (!init_others.is_empty()).then_some(init_others);
    // A volume has one source: merged with ours it would have two.
    let volumes = overlay.volumes.take().unwrap_or_default();
    let known = spec.volumes.get_or_insert_default();
    for volume in volumes {
        match known.iter_mut().find(|it| it.name == volume.name) {
            Some(known) => *known = volume,
            None => known.push(volume),
        }
    }
    spec.merge_from(overlay);
}

fn merge_container(ours: &mut Container, mut overlay: Container) {
    // A variable has one value, given or found.
    let variables = overlay.env.take().unwrap_or_default();
    let known = ours.env.get_or_insert_default();
    for variable in variables {
        match known.iter_mut().find(|it| it.name == variable.name) {
            Some(known) => *known = variable,
            None => known.push(variable),
        }
    }
    ours.merge_from(overlay);
}

/// Whether a container of some kind of pod of ours has this name.
fn is_ours(name: &str) -> bool {
    [AGENT, command::INSTALL, command::SIDECAR].contains(&name)
        || companions::names().any(|it| it == name)
}

/// Takes out what is not the overlay's to say, and says what that was.
fn strip(template: &mut PodTemplateSpec) -> Vec<String> {
    let mut refused = Vec::new();
    if let Some(metadata) = &mut template.metadata {
        let lists = [&mut metadata.labels, &mut metadata.annotations];
        for (name, list) in ["labels", "annotations"].into_iter().zip(lists) {
            let Some(list) = list else { continue };
            for ours in OURS {
                if list.remove(ours).is_some() {
                    refused.push(format!("metadata.{name}[{ours}]"));
                }
            }
        }
    }
    if let Some(spec) = &mut template.spec {
        strip_spec(spec, &mut refused);
    }
    refused
}

fn strip_spec(spec: &mut PodSpec, refused: &mut Vec<String>) {
    let mut refuse = |was_there: bool, what: &str| {
        if was_there {
            refused.push(what.to_owned());
        }
    };
    let account = spec.service_account_name.take();
    refuse(account.is_some(), "spec.serviceAccountName");
    let account = spec.service_account.take();
    refuse(account.is_some(), "spec.serviceAccount");
    let automount = spec.automount_service_account_token.take();
    refuse(automount == Some(true), "spec.automountServiceAccountToken");
    let restart = spec.restart_policy.take();
    refuse(
        restart.is_some_and(|it| it != "Never"),
        "spec.restartPolicy",
    );
    let ephemeral = spec.ephemeral_containers.take();
    refuse(ephemeral.is_some(), "spec.ephemeralContainers");
    if let Some(volumes) = &mut spec.volumes {
        let before = volumes.len();
        volumes.retain(|volume| volume.name != TOKEN);
        refuse(volumes.len() < before, &format!("spec.volumes[{TOKEN}]"));
    }
    let init = spec.init_containers.iter_mut().flatten();
    let ours = init.chain(&mut spec.containers);
    for container in ours.filter(|it| is_ours(&it.name)) {
        strip_container(container, refused);
    }
}

fn strip_container(container: &mut Container, refused: &mut Vec<String>) {
    let name = container.name.clone();
    let mut refuse = |was_there: bool, what: &str| {
        if was_there {
            refused.push(format!("{what} of {name}"));
        }
    };
    refuse(container.image.take().is_some(), "image");
    refuse(container.command.take().is_some(), "command");
    refuse(container.args.take().is_some(), "args");
    refuse(container.restart_policy.take().is_some(), "restartPolicy");
    if let Some(variables) = &mut container.env {
        let before = variables.len();
        variables.retain(|variable| variable.name != SESSION_ID_VARIABLE);
        refuse(variables.len() < before, "the variable SESSION_ID");
    }
    if let Some(mounts) = &mut container.volume_mounts {
        let before = mounts.len();
        mounts.retain(|mount| mount.mount_path.trim_end_matches('/') != TOKEN_FOLDER);
        refuse(
            mounts.len() < before,
            &format!("the mount at {TOKEN_FOLDER}"),
        );
    }
}
