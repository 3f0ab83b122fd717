//! What a node leaves on this machine, after its end and after a kill: nothing.

use std::{collections::BTreeMap, path::Path, process::Stdio, time::Duration};

use ambient_testing::{
    images::Image,
    node::{Traces, leftovers},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::{Instant, sleep, timeout},
};

use crate::{kube::DEADLINE, scenarios::by_hand, target::Target};

/// Longest time until all of a killed node is gone; a second on a quiet machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Names of the scenarios.
pub const KILLED: &str = "nothing_is_left_of_a_killed_node";
pub const ENDED: &str = "nothing_is_left_of_an_ended_node";

/// This machine before anything was started.
#[derive(Debug)]
pub struct Outside(BTreeMap<String, String>);

impl Outside {
    /// As it is now.
    pub fn look() -> Self {
        Self(leftovers::machine())
    }

    fn assert_unchanged(&self) {
        assert_eq!(self.0, leftovers::machine(), "a node changed this machine");
    }
}

/// A node that is ended leaves nothing.
#[expect(clippy::unused_async, reason = "a scenario, as the others are")]
pub async fn ended(target: Target, outside: Outside) -> String {
    let Some(node) = &target.node else {
        return String::new();
    };
    let traces = node.machine().traces();
    assert!(
        leftovers::of(&traces).len() > 3,
        "a running node is not found, so nor would be what it leaves"
    );
    drop(target);
    assert_eq!(leftovers::of(&traces), [""; 0]);
    outside.assert_unchanged();
    String::new()
}

/// A node whose test is killed with SIGKILL, while a pod runs on it, leaves nothing.
pub async fn killed(binaries: &Path) -> String {
    let outside = Outside::look();
    let mut test = Command::new(std::env::current_exe().expect("a program knows its own path"))
        .arg("--hold")
        .arg("--binaries")
        .arg(binaries)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("it can be started again");
    let mut lines = BufReader::new(test.stdout.take().expect("a pipe")).lines();
    let line = timeout(2 * DEADLINE, lines.next_line()).await;
    let line = line.expect("the node is up in time").expect("a pipe");
    let traces = parse(&line.expect("the node came up"));
    assert!(
        leftovers::of(&traces).len() > 3,
        "a running node is not found, so nor would be what it leaves"
    );

    test.start_kill().expect("it runs");
    test.wait().await.expect("it ends");

    let killed = Instant::now();
    let deadline = killed + LIMIT;
    loop {
        let left = leftovers::of(&traces);
        if left.is_empty() {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "left {LIMIT:?} after the kill: {left:#?}"
        );
        sleep(Duration::from_millis(100)).await;
    }
    outside.assert_unchanged();
    let took = killed.elapsed().as_secs_f64();
    format!(", gone {took:.1} s after the kill")
}

/// Starts a node with a pod that runs, says how to recognise them, and waits to be killed.
pub async fn hold(images: &[Image]) {
    let target = Target::on_this_machine(images);
    by_hand::start(&target).await;
    let node = target.node.as_ref().expect("one on this machine");
    let traces = node.machine().traces();
    println!(
        "{} {} {}",
        traces.name,
        traces.folder.display(),
        traces.namespaces.join(" ")
    );
    sleep(4 * DEADLINE).await;
}

fn parse(line: &str) -> Traces {
    let mut words = line.split(' ');
    Traces {
        name: words.next().expect("a name").to_owned(),
        folder: words.next().expect("a folder").into(),
        namespaces: words.map(str::to_owned).collect(),
    }
}
