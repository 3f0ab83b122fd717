//! The real helm, and our chart.
//!
//! Its program comes from `HELM` when that is set, else from where `make cluster-tools` puts it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

/// Which build of helm this source tree needs; part of its folder's name.
const VERSION: &str = include_str!("../cluster/helm/version");

/// Helm with folders of its own: nothing of the user's is read or changed.
#[derive(Debug)]
pub struct Helm {
    program: PathBuf,
    kubeconfig: Option<PathBuf>,
    home: TempDir,
}

impl Helm {
    /// Without a cluster, for `template` and `lint`.
    ///
    /// # Panics
    /// When there is no helm, with a sentence on how to get it.
    pub fn offline() -> Self {
        let program = std::env::var_os("HELM").map_or_else(
            || {
                let home = std::env::var_os("HOME").expect("HOME is set");
                let folder = format!(".cache/ambient-tools/helm-{}", VERSION.trim());
                Path::new(&home).join(folder).join("helm")
            },
            PathBuf::from,
        );
        assert!(
            program.is_file(),
            "{} is not there: build it with `make cluster-tools`, or set HELM to one",
            program.display()
        );
        Self {
            program,
            kubeconfig: None,
            home: tempfile::tempdir().expect("a folder"),
        }
    }

    /// For the cluster that this kubeconfig leads to.
    ///
    /// # Panics
    /// See [`Self::offline`].
    pub fn of_cluster(kubeconfig: &Path) -> Self {
        Self {
            kubeconfig: Some(kubeconfig.to_owned()),
            ..Self::offline()
        }
    }

    /// The program itself.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs it; gives its output.
    ///
    /// # Errors
    /// What it wrote to its standard error, when its exit code is not 0.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.home.path())
            // None: no cluster by accident.
            .env(
                "KUBECONFIG",
                self.kubeconfig.as_deref().unwrap_or(Path::new("/dev/null")),
            )
            .stdin(Stdio::null());
        let output = command.output().expect("helm can be started");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }

    /// The objects of our chart with these files of values and single values, as YAML documents.
    ///
    /// # Errors
    /// What helm says when it refuses.
    pub fn template(
        &self,
        namespace: &str,
        files: &[&Path],
        values: &[&str],
    ) -> Result<String, String> {
        let chart = chart();
        let chart = chart.to_str().expect("a path of this source tree");
        let mut arguments = vec!["template", "ambient", chart, "--namespace", namespace];
        for file in files {
            arguments.extend(["--values", file.to_str().expect("a path of ours")]);
        }
        for value in values {
            arguments.extend(["--set-json", value]);
        }
        self.run(&arguments)
    }
}

/// The folder of our chart.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../charts/ambient-control-plane")
        .canonicalize()
        .expect("the chart is there")
}
