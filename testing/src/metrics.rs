//! The table of all metrics (docs/metrics.md), and what a program serves beside it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// `counter`, `gauge` or `histogram`.
    pub kind: String,
    /// Names of its labels.
    pub labels: BTreeSet<String>,
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// A text of the repository.
pub fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The table of all metrics, by name.
pub fn table() -> BTreeMap<String, Row> {
    let text = read("docs/metrics.md");
    let mut table = BTreeMap::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", name, kind, labels, question, ""] = cells[..] else {
            continue;
        };
        let Some(name) = name.strip_prefix('`').and_then(|it| it.strip_suffix('`')) else {
            continue;
        };
        assert!(
            question.contains('?'),
            "{name} answers no question: {question}"
        );
        let row = Row {
            kind: kind.to_owned(),
            labels: labels_of(labels),
        };
        assert_eq!(
            table.insert(name.to_owned(), row),
            None,
            "{name} stands twice"
        );
    }
    table
}

/// Of "`key`, `result`: `ok`, `failed`; `step`" the names, which come before the values.
pub fn labels_of(cell: &str) -> BTreeSet<String> {
    let names = cell
        .split(';')
        .map(|part| part.split(':').next().unwrap_or_default());
    let quoted = |it: &str| {
        it.split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    names.flat_map(quoted).collect()
}

/// Names and labels of all series on a page of metrics, by metric.
pub fn served(page: &str) -> BTreeMap<String, Row> {
    let mut served: BTreeMap<String, Row> = BTreeMap::new();
    let mut family = String::new();
    for line in page.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            name.clone_into(&mut family);
            let (kind, labels) = (kind.to_owned(), BTreeSet::new());
            served.insert(family.clone(), Row { kind, labels });
        } else if !line.starts_with('#')
            && let Some((_, labels)) = line.split_once('{')
        {
            let labels = labels.split('}').next().unwrap();
            let names = labels.split("\",").filter_map(|it| it.split_once("=\""));
            let names = names
                .map(|(name, _)| name.to_owned())
                .filter(|it| it != "le");
            served.get_mut(&family).unwrap().labels.extend(names);
        }
    }
    served
}

/// Fails when a page serves what the table does not have.
pub fn is_in_table(page: &str) {
    let table = table();
    let served = served(page);
    assert!(served.len() > 10, "{page}");
    for (name, row) in served {
        let known = table
            .get(&name)
            .unwrap_or_else(|| panic!("docs/metrics.md lacks {name}"));
        assert_eq!(row.kind, known.kind, "{name}");
        let unknown: Vec<_> = row.labels.difference(&known.labels).collect();
        assert!(
            unknown.is_empty(),
            "docs/metrics.md lacks the labels {unknown:?} of {name}"
        );
    }
}

/// Fails when a metric of this prefix has a label's value on the page that its row of the table does
/// not list.
pub fn values_are_in_table(page: &str, prefix: &str) {
    let text = read("docs/metrics.md");
    let mut row = "";
    let mut looked_at = 0;
    for line in page.lines() {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let name = declared.split(' ').next().unwrap_or_default();
            let begins = format!("| `{name}` |");
            let found = text.lines().find(|it| it.starts_with(&begins));
            row = found.unwrap_or_else(|| panic!("docs/metrics.md lacks {name}"));
        } else if line.starts_with(prefix)
            && let Some((_, labels)) = line.split_once('{')
        {
            let labels = labels.split('}').next().unwrap_or_default();
            for label in labels.split("\",").filter(|it| !it.starts_with("le=")) {
                let (_, value) = label.split_once("=\"").unwrap_or_default();
                let listed = format!("`{}`", value.trim_end_matches('"'));
                assert!(row.contains(&listed), "{row} lacks {line}");
                looked_at += 1;
            }
        }
    }
    assert!(looked_at > 0, "{page}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_told_from_their_values() {
        let labels = labels_of("`key`, `result`: `ok`, `failed`; `step`");
        assert_eq!(labels, ["key", "result", "step"].map(str::to_owned).into());
        assert!(labels_of("").is_empty());
        let page = "# TYPE a_seconds histogram\na_seconds_bucket{of=\"x, y\",le=\"1\"} 2\n";
        let row = &served(page)["a_seconds"];
        assert_eq!(row.labels, ["of".to_owned()].into());
    }
}
