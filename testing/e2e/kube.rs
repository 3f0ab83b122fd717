//! A cluster as a person uses it: through kubectl.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::AsyncWriteExt as _,
    process::Command,
    time::{Instant, sleep, timeout},
};

/// Longest wait for a state of the cluster. Long, since a shared machine can be slow.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// How often a state is asked for.
const POLL: Duration = Duration::from_millis(300);

/// Longest run of kubectl.
const CALL: Duration = Duration::from_secs(60);

/// kubectl with one kubeconfig.
#[derive(Debug, Clone)]
pub struct Kube {
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    cache: Option<PathBuf>,
}

impl Kube {
    /// This kubectl with this file; its cache in this folder, or else where the user has it.
    pub fn new(kubectl: PathBuf, kubeconfig: PathBuf, cache: Option<PathBuf>) -> Self {
        Self {
            kubectl,
            kubeconfig,
            cache,
        }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.kubectl
    }

    /// The file that gives access.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Runs kubectl; gives its output, or what it said when it failed.
    ///
    /// # Errors
    /// What it wrote to its standard error.
    pub async fn attempt(&self, arguments: &[&str], input: &str) -> Result<String, String> {
        let mut command = Command::new(&self.kubectl);
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(
                self.cache
                    .iter()
                    .map(|folder| format!("--cache-dir={}", folder.display())),
            )
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let ran = timeout(CALL, async {
            let mut child = command.spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // It may end before it has read all; its own message says why.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        });
        let output = match ran.await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(format!("cannot run kubectl: {error}")),
            Err(_) => return Err(format!("not done after {CALL:?}")),
        };
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }

    /// Runs kubectl; gives its output.
    ///
    /// # Panics
    /// When it fails.
    pub async fn run(&self, arguments: &[&str]) -> String {
        let ran = self.attempt(arguments, "").await;
        ran.unwrap_or_else(|error| panic!("kubectl {}: {error}", arguments.join(" ")))
    }

    /// Applies manifests (YAML).
    ///
    /// # Panics
    /// When one is refused.
    pub async fn apply(&self, manifests: &str) {
        let arguments = [
            "apply",
            "--server-side",
            "--force-conflicts",
            "--filename=-",
        ];
        let applied = self.attempt(&arguments, manifests).await;
        applied.unwrap_or_else(|error| panic!("kubectl apply: {error}\n{manifests}"));
    }

    /// What `kubectl get` says in JSON, if it is there.
    ///
    /// # Panics
    /// When it fails for another reason.
    pub async fn get(&self, namespace: &str, what: &[&str]) -> Option<Value> {
        let mut arguments = vec!["get", "--namespace", namespace, "--output", "json"];
        arguments.extend_from_slice(what);
        match self.attempt(&arguments, "").await {
            Ok(text) => Some(serde_json::from_str(&text).expect("kubectl writes JSON")),
            Err(error) if error.contains("(NotFound)") => None,
            Err(error) => panic!("kubectl get {}: {error}", what.join(" ")),
        }
    }

    /// The text of a kubeconfig for a ServiceAccount of this cluster, as a program in one of its
    /// pods would have access.
    ///
    /// # Panics
    /// When there is no such account.
    pub async fn kubeconfig_of(&self, namespace: &str, account: &str) -> String {
        let arguments = [
            "config",
            "view",
            "--raw",
            "--minify",
            "--flatten",
            "--output=json",
        ];
        let config = self.run(&arguments).await;
        let mut config: Value = serde_json::from_str(&config).expect("kubectl writes JSON");
        let arguments = [
            "create",
            "token",
            account,
            "--namespace",
            namespace,
            "--duration=10h",
        ];
        let token = self.run(&arguments).await;
        config["users"][0]["user"] = serde_json::json!({ "token": token.trim() });
        config.to_string()
    }

    /// Waits until an object is there and as wanted, and gives it; `what` as for [`Kube::get`].
    ///
    /// # Panics
    /// At the deadline, with the object as it last was.
    pub async fn wait(
        &self,
        namespace: &str,
        what: &[&str],
        wanted: impl Fn(&Value) -> bool,
    ) -> Value {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let found = self.get(namespace, what).await;
            if let Some(object) = found.as_ref().filter(|object| wanted(object)) {
                return object.clone();
            }
            let there = found.map_or_else(|| "not there".to_owned(), |it| format!("{it:#}"));
            assert!(
                Instant::now() < deadline,
                "{} in {namespace} is not as wanted after {DEADLINE:?}: {there}",
                what.join(" "),
            );
            sleep(POLL).await;
        }
    }

    /// Waits until an object is gone.
    ///
    /// # Panics
    /// At the deadline, with the object as it last was.
    pub async fn wait_gone(&self, namespace: &str, what: &[&str]) {
        let deadline = Instant::now() + DEADLINE;
        while let Some(object) = self.get(namespace, what).await {
            let none = object["items"].as_array().is_some_and(Vec::is_empty);
            if none {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{} in {namespace} is still there after {DEADLINE:?}: {object:#}",
                what.join(" "),
            );
            sleep(POLL).await;
        }
    }

    /// A container's log, each line after its time (RFC 3339).
    ///
    /// # Panics
    /// When there is none.
    pub async fn log(&self, namespace: &str, pod: &str, container: &str) -> Vec<(String, String)> {
        let arguments = [
            "logs",
            "--namespace",
            namespace,
            pod,
            "--container",
            container,
            "--timestamps",
        ];
        let text = self.run(&arguments).await;
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(time, line)| (time.to_owned(), line.to_owned()))
            .collect()
    }

    /// All that a person would look at after a failure in a namespace.
    pub async fn scene(&self, namespace: &str) -> String {
        let mut scene = String::new();
        for arguments in [
            vec!["describe", "pods", "--namespace", namespace],
            vec!["get", "events", "--namespace", namespace],
        ] {
            let said = self.attempt(&arguments, "").await.unwrap_or_else(|it| it);
            let _ = write!(scene, "--- kubectl {}\n{said}\n", arguments.join(" "));
        }
        let pods = ["get", "pods", "--namespace", namespace, "--output", "name"];
        let pods = self.attempt(&pods, "").await.unwrap_or_default();
        for pod in pods.lines() {
            let arguments = [
                "logs",
                "--namespace",
                namespace,
                pod,
                "--all-containers",
                "--prefix",
                "--tail=60",
            ];
            let said = self.attempt(&arguments, "").await.unwrap_or_else(|it| it);
            let _ = write!(scene, "--- logs of {pod}\n{said}\n");
        }
        scene
    }
}
