//! docs/install.md, typed as it is written: its commands run in a shell, on a cluster that its
//! reader has already made and given the images.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use ambient_testing::{helm::chart, metrics::read};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{process::Command, time::timeout};

use super::release::{self, NAMESPACE};
use crate::target::Target;

/// The scenario's name.
pub const NAME: &str = "the_install_guide_holds_as_it_is_written";

/// Longest time for all commands of a section.
const LONGEST: Duration = Duration::from_mins(6);

/// What makes images and the cluster, and brings the one to the other.
const MADE_ALREADY: [&str; 3] = ["make images", "kind create", "for image in dist/images"];

/// From nothing to a running session, and back to nothing.
pub async fn holds(target: &Target) -> String {
    let started = Instant::now();
    release::volume(target, "guide").await;
    let shell = Shell::new(target);
    let section = section("## From nothing to a running session");
    let commands: Vec<_> = commands(&section)
        .lines()
        .filter(|line| !MADE_ALREADY.iter().any(|it| line.starts_with(it)))
        .map(|line| format!("{line}\n"))
        .collect();
    let said = shell.types(&commands.concat()).await;
    for words in [
        "session token  ok",
        "token in use   ok",
        "clean-up       ok",
        "hello from",
    ] {
        assert!(said.contains(words), "no {words:?} in\n{said}");
    }
    let took = started.elapsed().as_secs_f64();

    let uninstall = format!("helm uninstall ambient --namespace {NAMESPACE}\n");
    let section = self::section("## Upgrade, rollback, uninstall");
    let (_, removal) = section
        .split_once("To remove all of it")
        .expect("it says how to remove all");
    shell
        .types(&(uninstall + &commands_of_first(removal)))
        .await;
    let kube = &target.kube;
    kube.run(&["delete", "namespace", NAMESPACE]).await;
    let left = kube.run(&["get", "namespaces", "--output", "name"]).await;
    assert!(
        !left.contains("team") && !left.contains(NAMESPACE),
        "{left}"
    );
    format!(", a session ran after {took:.0} s")
}

/// A section of the guide, from its heading to the next one.
fn section(heading: &str) -> String {
    let guide = read("docs/install.md");
    let (_, after) = guide
        .split_once(heading)
        .unwrap_or_else(|| panic!("there is no {heading}"));
    after.split("\n## ").next().unwrap_or_default().to_owned()
}

/// All that is to be typed.
fn commands(text: &str) -> String {
    let blocks = text.split("```sh\n").skip(1);
    blocks.filter_map(|it| it.split("```").next()).collect()
}

fn commands_of_first(text: &str) -> String {
    let block = text.split("```sh\n").nth(1).unwrap_or_default();
    block.split("```").next().unwrap_or_default().to_owned()
}

/// A shell of somebody who has kubectl and helm, and is in the folder of the sources.
struct Shell<'a> {
    target: &'a Target,
    home: TempDir,
}

impl<'a> Shell<'a> {
    fn new(target: &'a Target) -> Self {
        let home = tempfile::tempdir().expect("a folder");
        let release = ambient_testing::helm::Helm::offline();
        for (name, program) in [
            ("kubectl", target.kube.program()),
            ("helm", release.program()),
        ] {
            symlink(absolute(program), home.path().join(name)).expect("a link");
        }
        Self { target, home }
    }

    /// Runs these commands until the first one that fails.
    ///
    /// # Panics
    /// When one fails, or it takes too long.
    async fn types(&self, commands: &str) -> String {
        let home = self.home.path().display();
        let mut command = Command::new("bash");
        command
            .args(["-e", "-o", "pipefail", "-c", commands])
            .current_dir(chart().join("../.."))
            .env_clear()
            .env("HOME", self.home.path())
            .env("PATH", format!("{home}:/usr/bin:/bin"))
            .env("KUBECONFIG", absolute(self.target.kube.kubeconfig()))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let child = command.spawn().expect("there is bash");
        let group = child.id().and_then(|id| i32::try_from(id).ok());
        let ran = timeout(LONGEST, child.wait_with_output()).await;
        // A port-forward that was not come to an end of.
        if let Some(group) = group {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let Output {
            status,
            stdout,
            stderr,
        } = ran.expect("in time").expect("bash ran");
        let [said, errors] = [stdout, stderr].map(|it| String::from_utf8_lossy(&it).into_owned());
        assert!(status.success(), "{commands}\n{status}\n{said}\n{errors}");
        said
    }
}

fn absolute(path: &Path) -> std::path::PathBuf {
    fs::canonicalize(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
