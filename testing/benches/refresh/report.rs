//! What was measured, beside its targets.

use std::fmt;

use ambient_testing::{installation::Installation, table::Table};

use crate::processors::{Processors, Used};

/// The account of a run.
pub struct Report {
    table: Table,
    notes: Vec<String>,
    processors: Processors,
}

impl Report {
    /// Nothing is measured yet.
    pub fn new(installation: &Installation, kwok: u32) -> Self {
        let cluster = &installation.cluster;
        let programs = vec![
            ("kube-apiserver", cluster.pid("kube-apiserver")),
            ("etcd", cluster.pid("etcd")),
            ("controller-manager", cluster.pid("kube-controller-manager")),
            ("kwok", kwok),
            ("API server", installation.api_server.pid()),
        ];
        Self {
            table: Table::new(&["what", "measured", "target", ""]),
            notes: Vec::new(),
            processors: Processors::new(programs),
        }
    }

    /// Something without a target.
    pub fn fact(&mut self, what: &str, measured: impl Into<String>) {
        self.row(what, measured.into(), String::new(), "");
    }

    /// Something with a target, and whether it is met.
    pub fn target(&mut self, what: &str, measured: impl Into<String>, target: &str, met: bool) {
        let verdict = if met { "ok" } else { "missed" };
        self.row(what, measured.into(), target.to_owned(), verdict);
    }

    /// Something for below the table.
    pub fn note(&mut self, note: String) {
        eprintln_progress(&note);
        self.notes.push(note);
    }

    /// The use of the processors up to now.
    pub fn used(&self, plane: u32) -> Used {
        self.processors.used(plane)
    }

    /// Notes who kept how many cores busy since then.
    pub fn processors(&mut self, what: &str, before: &Used, plane: u32) {
        let shares = self.processors.since(before, plane);
        self.note(format!("cores kept busy, {what}:\n\n{shares}"));
    }

    fn row(&mut self, what: &str, measured: String, target: String, verdict: &str) {
        eprintln_progress(&format!("{what}: {measured} {verdict}"));
        self.table
            .row(&[what.to_owned(), measured, target, verdict.to_owned()]);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.table)?;
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        Ok(())
    }
}

/// A run takes minutes: what is known is shown at once.
#[expect(clippy::print_stderr, reason = "for whoever waits")]
fn eprintln_progress(text: &str) {
    eprintln!("{text}");
}
