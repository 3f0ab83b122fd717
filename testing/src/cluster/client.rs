//! Talks to the cluster from a thread without a runtime: curl for one object, kubectl as a person
//! uses it.

use std::{
    io::Write as _,
    process::{Command, Output, Stdio},
};

use serde_json::Value;

use super::{ADMIN, Cluster, User};

impl Cluster {
    /// Runs `kubectl` as this user; gives its output.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl(&self, user: User, arguments: &[&str]) -> String {
        self.try_kubectl(user, arguments)
            .unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    /// Runs `kubectl` as this user; gives its output, or what it said when it failed.
    ///
    /// # Errors
    /// What it wrote to its standard error, when its exit code is not 0.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn try_kubectl(&self, user: User, arguments: &[&str]) -> Result<String, String> {
        let output = self
            .kubectl_command(user)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("kubectl can be started");
        said(&output)
    }

    /// Runs a script of the shell as this user of `kubectl`; gives its output.
    ///
    /// # Panics
    /// When one of its commands fails.
    pub fn shell(&self, user: User, script: &str) -> String {
        let kubectl = self.programs.path("kubectl");
        let folder = kubectl.parent().expect("a program is in a folder");
        let path = std::env::var("PATH").expect("PATH is set");
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", script])
            .env("PATH", format!("{}:{path}", folder.display()))
            .env("KUBECONFIG", self.kubeconfig(user))
            .env("HOME", self.folder())
            .stdin(Stdio::null())
            .output()
            .expect("bash can be started");
        said(&output).unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    /// Applies manifests (YAML, server side) as the administrator.
    ///
    /// # Panics
    /// When the API server refuses one.
    pub fn apply(&self, manifests: &str) {
        let mut child = self
            .kubectl_command(ADMIN)
            .args(["apply", "--server-side", "--filename=-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl can be started");
        let mut stdin = child.stdin.take().expect("a pipe");
        // It may end before it has read all; its own message says why.
        let _ = stdin.write_all(manifests.as_bytes());
        drop(stdin);
        let output = child.wait_with_output().expect("kubectl ends");
        said(&output).unwrap_or_else(|error| panic!("kubectl apply: {error}\n{manifests}"));
    }

    /// One request as the administrator, by path: status and body of the answer. Status 0 when
    /// there was no answer. A patch is a merge patch.
    ///
    /// # Panics
    /// When curl cannot be started.
    pub fn request(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let kind = if method == "PATCH" {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let mut command = Command::new("curl");
        command
            .arg("--config")
            .arg(self.folder.join("curl.conf"))
            .args(["--write-out", "\n%{http_code}", "--request", method])
            .arg(format!("{}{path}", self.url()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        if body.is_some() {
            command
                .args(["--header", &format!("Content-Type: {kind}")])
                .args(["--data-binary", "@-"]);
        }
        let mut child = command.stdin(Stdio::piped()).spawn().expect("curl");
        let mut stdin = child.stdin.take().expect("a pipe");
        if let Some(body) = body {
            // It does not read it where it cannot connect.
            let _ = stdin.write_all(body.to_string().as_bytes());
        }
        drop(stdin);
        let output = child.wait_with_output().expect("curl ends");
        let answer = String::from_utf8_lossy(&output.stdout);
        let (text, status) = answer.rsplit_once('\n').unwrap_or(("", "0"));
        let body = serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
        (status.parse().unwrap_or(0), body)
    }

    /// One object by path, such as `/api/v1/namespaces/default`, if it is there.
    pub fn get(&self, path: &str) -> Option<Value> {
        let (status, body) = self.request("GET", path, None);
        (status == 200).then_some(body)
    }

    pub(super) fn is_ready(&self) -> bool {
        self.request("GET", "/readyz", None).0 == 200
    }

    pub(super) fn etcd_is_ready(&self) -> bool {
        Command::new("curl")
            .args(["--silent", "--fail", "--noproxy", "*", "--max-time", "10"])
            .arg(format!("{}/health", self.etcd_url()))
            .stdin(Stdio::null())
            .output()
            .is_ok_and(|output| output.status.success())
    }

    /// In a file, so that the token is in no argument.
    pub(super) fn curl_config(&self) -> String {
        format!(
            "silent\nnoproxy = \"*\"\nmax-time = 30\ncacert = \"{}\"\n\
             header = \"Authorization: Bearer {}\"\n",
            self.ca().display(),
            self.token(ADMIN)
        )
    }

    fn kubectl_command(&self, user: User) -> Command {
        let mut command = Command::new(self.programs.path("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig(user))
            // Its usual cache is by address, which another cluster may have had before.
            .arg("--cache-dir")
            .arg(self.folder.join("kubectl-cache"));
        command
    }
}

fn said(output: &Output) -> Result<String, String> {
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}
