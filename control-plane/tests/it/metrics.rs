//! docs/metrics.md and the programs say the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use ambient_testing::metrics::{Row, read, root, table};

/// The values of all constants of our programs that name a metric.
fn constants() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for program in ["shared", "control-plane", "api-server", "runner", "sidecar"] {
        collect(&root().join(program).join("src"), &mut found);
    }
    found
}

fn collect(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let texts = text.split("const ").skip(1);
            found.extend(texts.filter_map(name_of_a_metric));
        }
    }
}

/// Of `X: &str = "ambient_…";` the value.
fn name_of_a_metric(constant: &str) -> Option<String> {
    let (declared, rest) = constant.split_once('=')?;
    let value = rest.trim_start().strip_prefix('"')?.split('"').next()?;
    let is_name = value.len() > "ambient_".len()
        && value.starts_with("ambient_")
        && value.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    (declared.trim_end().ends_with(": &str") && is_name).then(|| value.to_owned())
}

#[test]
fn the_table_has_all_metrics_and_no_others() {
    let table: BTreeSet<String> = table().into_keys().collect();
    // The library names these itself.
    let ours = |name: &&String| !name.starts_with("process_");
    let constants = constants();
    assert!(constants.len() > 60, "{constants:#?}");
    let missing: Vec<_> = constants.iter().filter(|it| !table.contains(*it)).collect();
    assert!(missing.is_empty(), "docs/metrics.md lacks {missing:#?}");
    let unknown: Vec<_> = table
        .iter()
        .filter(ours)
        .filter(|it| !constants.contains(*it))
        .collect();
    assert!(
        unknown.is_empty(),
        "docs/metrics.md has, and no program {unknown:#?}"
    );
}

#[test]
fn names_of_metrics_are_told_from_other_texts() {
    let name = name_of_a_metric("X: &str =\n    \"ambient_a_b\";");
    assert_eq!(name, Some("ambient_a_b".to_owned()));
    assert_eq!(
        name_of_a_metric("X: &str = \"ambient_runner=debug\";"),
        None
    );
}

/// The alerts of docs/operations.md: name, expression, and for how long it must hold.
fn alerts() -> Vec<[String; 3]> {
    let text = read("docs/operations.md");
    let rows = text
        .lines()
        .skip_while(|line| !line.starts_with("| alert |"));
    let rows = rows.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        // A pipe within a cell is written with a backslash.
        let row = row.replace("\\|", "\u{0}");
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let ["", alert, expression, holds, meaning, action, ""] = cells[..] else {
            panic!("not five cells: {row}");
        };
        assert!(!meaning.is_empty() && !action.is_empty(), "{alert}");
        let expression = expression.split('`').nth(1).expect("an expression");
        let expression = expression.replace('\u{0}', "|");
        let holds = holds.trim_end_matches('°');
        [alert.to_owned(), expression, holds.to_owned()]
    })
    .collect()
}

#[test]
fn the_charts_alerts_are_those_of_the_document() {
    let documented = alerts();
    let rules = read("charts/ambient-control-plane/templates/metrics/prometheusrule.yaml");
    let alerts: Vec<&str> = rules.split("(dict \"name\" \"").skip(1).collect();
    assert!(alerts.len() > 10, "{rules}");
    for alert in alerts {
        let name = alert.split('"').next().unwrap_or_default();
        let found = documented.iter().find(|it| it[0] == name);
        let [_, expression, holds] = found.unwrap_or_else(|| panic!("{name} is not documented"));
        assert_eq!(alert.split('`').nth(1), Some(expression.as_str()), "{name}");
        let said = alert.split("\"for\" \"").nth(1);
        let said = said.and_then(|it| it.split('"').next());
        assert_eq!(said, Some(holds.as_str()), "{name}");
    }
}

#[test]
fn the_dashboard_is_about_metrics_that_there_are() {
    let table = table();
    let dashboard = read("charts/ambient-control-plane/files/dashboard.json");
    let series = words(&dashboard).filter(|it| it.starts_with("ambient_control_plane_"));
    let series: BTreeSet<&str> = series.collect();
    assert!(series.len() > 10, "{series:#?}");
    for series in series {
        assert!(metric_of(&table, series).is_some(), "there is no {series}");
    }
}

/// Texts in quotation marks, which are values of labels, left out.
fn unquoted(expression: &str) -> String {
    expression.split('"').step_by(2).collect()
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(move |c| !is_of_word(c))
        .filter(|it| !it.is_empty())
}

/// The metric that a series belongs to.
fn metric_of<'a>(table: &BTreeMap<String, Row>, series: &'a str) -> Option<&'a str> {
    let of_histogram = ["_bucket", "_sum", "_count"].iter();
    let base = of_histogram
        .filter_map(|end| series.strip_suffix(end))
        .find(|base| table.get(*base).is_some_and(|row| row.kind == "histogram"));
    base.or_else(|| table.contains_key(series).then_some(series))
}

#[test]
fn alerts_are_about_metrics_that_there_are() {
    let (table, alerts) = (table(), alerts());
    assert!(alerts.len() > 20, "{alerts:#?}");
    for [alert, expression, _] in alerts {
        let plain = unquoted(&expression);
        let series: Vec<_> = words(&plain)
            .filter(|it| it.starts_with("ambient_") || it.starts_with("process_"))
            .collect();
        assert!(
            !series.is_empty(),
            "{alert} is about no metric: {expression}"
        );
        // What Prometheus adds to all.
        let mut labels: BTreeSet<String> = ["instance", "le"].map(str::to_owned).into();
        for series in series {
            let metric = metric_of(&table, series);
            let metric = metric.unwrap_or_else(|| panic!("{alert}: there is no {series}"));
            labels.extend(table[metric].labels.iter().cloned());
        }
        for part in plain.split('{').skip(1) {
            let inside = part.split('}').next().unwrap_or_default();
            for label in inside.split(',').filter_map(|it| words(it).next()) {
                assert!(
                    labels.contains(label),
                    "{alert}: no label {label} in {expression}"
                );
            }
        }
        for grouping in ["by (", "on ("] {
            for part in plain.split(grouping).skip(1) {
                for label in words(part.split(')').next().unwrap_or_default()) {
                    assert!(
                        labels.contains(label),
                        "{alert}: no label {label} in {expression}"
                    );
                }
            }
        }
    }
}

#[test]
fn documents_name_only_metrics_that_there_are() {
    let table = table();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let programs = [
            "control_plane",
            "api",
            "api_server",
            "runner",
            "sidecar",
            "trace",
            "build",
        ];
        for word in words(&text) {
            let rest = word.strip_prefix("ambient_").unwrap_or_default();
            let is_metric = programs.iter().any(|it| {
                rest.strip_prefix(it)
                    .is_some_and(|rest| rest.starts_with('_') && rest.len() > 1)
            });
            // A module of ours, as in a log level, is no metric.
            if is_metric {
                let metric = metric_of(&table, word);
                assert!(metric.is_some(), "{} names {word}", path.display());
            }
        }
    }
}
