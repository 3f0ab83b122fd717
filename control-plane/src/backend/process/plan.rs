//! How a run's programs are started: arguments and environment. Holds no secret.

use std::{collections::BTreeMap, path::PathBuf};

use super::{
    ProcessSettings,
    entry::failed,
    folder::{ProgramRecord, RunRecord, SessionFolder},
    identity::ProcessIdentity,
    tree::MARK,
};
use crate::backend::{Agent, BackendError, DesiredRun, is_machine_owned};

/// How the shim is to start this run.
///
/// # Errors
/// When there is no command, or one that needs an image, or this process cannot be identified.
pub(super) fn plan(
    settings: &ProcessSettings,
    folder: &SessionFolder,
    run: &DesiredRun,
) -> Result<RunRecord, BackendError> {
    let command = match &run.agent {
        Agent::Command {
            command,
            image: None,
        } if !command.is_empty() => command,
        Agent::Command { image: Some(_), .. } => {
            return Err(BackendError::Impossible {
                reason: "AgentImageUnsupported",
                message: "the session asks for an image, but sessions are processes here"
                    .to_owned(),
            });
        }
        Agent::Command { .. } | Agent::RunnerImage => {
            return Err(BackendError::Impossible {
                reason: "AgentCommandMissing",
                message: "the session has no agent command".to_owned(),
            });
        }
    };
    let mark = uuid::Uuid::new_v4().to_string();
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let common = [
        (MARK, mark.clone()),
        ("AMBIENT_BOT_TOKEN_FILE", text(folder.token_mount())),
        ("AMBIENT_SESSION_KEY_FILE", text(folder.session_key_mount())),
        (
            "AMBIENT_SIDECAR_ADDRESSES",
            text(folder.sidecar_addresses()),
        ),
        ("AMBIENT_ADMIN_LISTEN", "127.0.0.1:0".to_owned()),
        ("AMBIENT_LOG_FORMAT", "json".to_owned()),
    ];
    let of_runner = [
        ("AMBIENT_TOKEN_FILE", text(folder.token_file())),
        ("AMBIENT_SPOOL_DIR", text(folder.spool())),
        ("AMBIENT_TERMINATION_LOG", text(folder.termination_log())),
        ("AMBIENT_STARTED_FILE", text(folder.started())),
        ("WORKSPACE_PATH", text(folder.workspace())),
    ];
    let of_sidecar = [
        ("AMBIENT_UPSTREAM_URL", settings.upstream.clone()),
        ("AMBIENT_UPSTREAM_GRPC_URL", settings.grpc_upstream.clone()),
    ];
    let named = |variables: &[(&str, String)]| -> BTreeMap<String, String> {
        variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect()
    };
    let mut runner = settings.environment.clone();
    runner.extend(
        run.environment
            .iter()
            .filter(|(name, _)| !is_machine_owned(name))
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    runner.extend(named(&common));
    runner.extend(named(&of_runner));
    let mut sidecar = settings.environment.clone();
    // What people set for the agent is not the sidecar's matter; the log level is.
    sidecar.extend(
        run.environment
            .get_key_value("LOG_LEVEL")
            .map(|(name, level)| (name.clone(), level.clone())),
    );
    sidecar.extend(named(&common));
    sidecar.extend(named(&of_sidecar));
    let arguments = std::iter::once("--".to_owned())
        .chain(command.iter().cloned())
        .collect();
    let tied_to = settings.tied.then(ProcessIdentity::own).transpose();
    Ok(RunRecord {
        generation: run.generation,
        mark,
        tied_to: tied_to.map_err(|error| failed("identify this process", error))?,
        runner: ProgramRecord {
            program: settings.programs.runner.clone(),
            arguments,
            environment: runner,
        },
        sidecar: ProgramRecord {
            program: settings.programs.sidecar.clone(),
            arguments: Vec::new(),
            environment: sidecar,
        },
    })
}

#[cfg(test)]
mod tests {
    use ambient_shared::session::SessionId;

    use super::*;
    use crate::backend::ResourceOverrides;
    use crate::backend::process::Programs;

    #[test]
    fn a_session_does_not_decide_whom_our_programs_trust() {
        let variables = |variables: &[(&str, &str)]| -> BTreeMap<String, String> {
            let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            variables.iter().map(owned).collect()
        };
        let settings = ProcessSettings {
            sessions: PathBuf::from("/s"),
            programs: Programs {
                control_plane: PathBuf::new(),
                runner: PathBuf::new(),
                sidecar: PathBuf::new(),
            },
            environment: variables(&[("PATH", "/bin"), ("no_proxy", "127.0.0.1")]),
            upstream: String::new(),
            grpc_upstream: String::new(),
            tied: false,
        };
        let foreign = [
            "PATH",
            "HOME",
            "no_proxy",
            "NO_PROXY",
            "Https_Proxy",
            "http_proxy",
            "ALL_PROXY",
            "SSL_CERT_FILE",
            "SSL_CERT_DIR",
            "LD_PRELOAD",
        ];
        let mut environment = variables(&[("MODEL", "kept")]);
        environment.extend(foreign.map(|name| (name.to_owned(), "theirs".to_owned())));
        let id = SessionId::parse("session-0001").unwrap();
        let run = DesiredRun {
            id: id.clone(),
            generation: 0,
            name: "a session".to_owned(),
            project: String::new(),
            agent: Agent::Command {
                command: vec!["true".to_owned()],
                image: None,
            },
            environment,
            resources: ResourceOverrides::default(),
            keypair: crate::keypair::id::KeyId::from_bytes([1; 8]),
        };
        let folder = SessionFolder::of(&settings.sessions, &id);

        let plan = plan(&settings, &folder, &run).unwrap();

        let runner = &plan.runner.environment;
        assert_eq!(runner["PATH"], "/bin");
        assert_eq!(runner["no_proxy"], "127.0.0.1");
        assert_eq!(runner["MODEL"], "kept");
        for environment in [runner, &plan.sidecar.environment] {
            assert!(
                environment.values().all(|value| value != "theirs"),
                "{environment:?}"
            );
        }
    }
}
