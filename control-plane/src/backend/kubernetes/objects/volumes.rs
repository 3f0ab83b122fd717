//! The volumes of session pods, and where containers find them.

use k8s_openapi::{
    api::core::v1::{
        ConfigMapVolumeSource, EmptyDirVolumeSource, KeyToPath, SecretVolumeSource, Volume,
        VolumeMount,
    },
    apimachinery::pkg::api::resource::Quantity,
};

use super::{
    API_TOKEN, BOT_TOKEN, SESSION_KEY,
    container::{mount, read_only},
};
use crate::backend::kubernetes::names::SessionRef;

/// The session's token Secret.
pub(super) const TOKEN: &str = "ambient-token";
/// Where it is mounted: as a whole, as the kubelet never updates a `subPath`.
pub(super) const TOKEN_FOLDER: &str = "/var/run/secrets/ambient";

/// The session's files.
pub(super) const WORKSPACE: &str = "workspace";
pub(super) const WORKSPACE_FOLDER: &str = "/workspace";
/// The agent's home; the image's own may be neither writable nor its user's.
pub(super) const HOME: &str = "ambient-home";
pub(super) const HOME_FOLDER: &str = "/home/ambient";
pub(super) const TMP: &str = "ambient-tmp";
pub(super) const TMP_FOLDER: &str = "/tmp";

/// Our runner, which is copied there.
pub(super) const PROGRAMS: &str = "ambient-programs";
pub(super) const PROGRAMS_FOLDER: &str = "/opt/ambient";
/// The token that the runner hands to the agent; in memory.
pub(super) const HANDOVER: &str = "ambient-handover";
pub(super) const HANDOVER_FOLDER: &str = "/run/ambient";
/// Messages that have not been sent yet; on disk, so that they outlive the runner's container.
pub(super) const SPOOL: &str = "ambient-spool";
pub(super) const SPOOL_FOLDER: &str = "/var/spool/ambient";
/// The addresses of the sidecar, which it writes.
pub(super) const SIDECAR: &str = "ambient-sidecar";
pub(super) const SIDECAR_FOLDER: &str = "/run/ambient-sidecar";

/// Certificates of the platform's own authority.
pub(super) const SERVICE_CA: &str = "service-ca";
/// Not where the image's own certificates are.
pub(super) const SERVICE_CA_FOLDER: &str = "/etc/ambient/service-ca";
/// The file, as OpenShift names it.
pub(super) const SERVICE_CA_FILE: &str = "/etc/ambient/service-ca/service-ca.crt";

/// Room for a token and the next one: a token has 64 KiB at most.
const HANDOVER_SIZE: &str = "1Mi";

/// Readable by the pod's group, as the files are root's.
const SECRET_MODE: i32 = 0o440;

/// An empty folder on the node's disk.
pub(super) fn empty(name: &str) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    }
}

/// The folder in memory through which the agent gets its token.
pub(super) fn handover() -> Volume {
    Volume {
        name: HANDOVER.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: Some("Memory".to_owned()),
            size_limit: Some(Quantity(HANDOVER_SIZE.to_owned())),
        }),
        ..Volume::default()
    }
}

/// The token Secret, with the file names that runners know.
pub(super) fn token(session: &SessionRef) -> Volume {
    let files = [(API_TOKEN, BOT_TOKEN), (SESSION_KEY, SESSION_KEY)];
    let files = files.map(|(key, path)| KeyToPath {
        key: key.to_owned(),
        path: path.to_owned(),
        mode: None,
    });
    secret(TOKEN, session.token_secret(), Some(files.into()))
}

/// A Secret of the session's namespace; all of it, or these files.
pub(super) fn secret(name: &str, secret_name: String, items: Option<Vec<KeyToPath>>) -> Volume {
    Volume {
        name: name.to_owned(),
        secret: Some(SecretVolumeSource {
            secret_name: Some(secret_name),
            default_mode: Some(SECRET_MODE),
            items,
            ..SecretVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// The platform's certificates. The kubelet waits for them: a program that cannot trust the API
/// server would only fail later.
pub(super) fn service_ca(config_map: &str) -> Volume {
    Volume {
        name: SERVICE_CA.to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: config_map.to_owned(),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    }
}

/// Their mount.
pub(super) fn service_ca_mount() -> VolumeMount {
    read_only(SERVICE_CA, SERVICE_CA_FOLDER)
}

/// The token's mount.
pub(super) fn token_mount() -> VolumeMount {
    read_only(TOKEN, TOKEN_FOLDER)
}

/// What every agent may write, and reads its token from.
pub(super) fn of_agents() -> Vec<VolumeMount> {
    vec![
        mount(WORKSPACE, WORKSPACE_FOLDER),
        mount(HOME, HOME_FOLDER),
        mount(TMP, TMP_FOLDER),
        token_mount(),
    ]
}
