//! The table of values in the chart's README, made from the comments in `values.yaml`.

use std::fmt::Write as _;

use super::*;

const BEGIN: &str = "<!-- values: made by a test, see CONTRIBUTING.md -->\n";
const END: &str = "<!-- /values -->\n";

/// One value as it is described.
struct Row {
    path: String,
    default: Value,
    about: String,
}

/// All described values, in order.
///
/// # Panics
/// When one has no description, neither of its own nor of what it is in.
fn rows(text: &str) -> Vec<Row> {
    let values: Value = serde_saphyr::from_str(text).unwrap();
    let mut rows: Vec<Row> = Vec::new();
    let mut above: Vec<(usize, String)> = Vec::new();
    let mut about: Option<String> = None;
    for line in text.lines() {
        let code = line.trim_start();
        let depth = line.len() - code.len();
        if let Some(comment) = code.strip_prefix('#') {
            let comment = comment.trim();
            match (comment.strip_prefix("-- "), &mut about) {
                (Some(first), _) => about = Some(first.to_owned()),
                (None, Some(begun)) => *begun = format!("{begun} {comment}"),
                (None, None) => {}
            }
            continue;
        }
        let Some((key, value)) = code.split_once(':') else {
            about = None;
            continue;
        };
        above.retain(|(of, _)| *of < depth);
        above.push((depth, key.to_owned()));
        let keys: Vec<_> = above.iter().map(|(_, key)| key.as_str()).collect();
        let path = keys.join(".");
        let described = rows
            .iter()
            .any(|row| path.starts_with(&format!("{}.", row.path)));
        match about.take() {
            Some(about) => rows.push(Row {
                default: values
                    .pointer(&format!("/{}", keys.join("/")))
                    .unwrap()
                    .clone(),
                path,
                about,
            }),
            None => assert!(described || value.is_empty(), "{path} has no description"),
        }
    }
    rows
}

fn table(text: &str) -> String {
    let mut table = "| value | default | |\n|---|---|---|\n".to_owned();
    for Row {
        path,
        default,
        about,
    } in rows(text)
    {
        let default = if default == "" {
            String::new()
        } else {
            format!("`{default}`")
        };
        let about = about.replace('|', "\\|");
        writeln!(table, "| `{path}` | {default} | {about} |").unwrap();
    }
    table
}

#[test]
fn the_readme_lists_all_values() {
    let values = fs::read_to_string(chart().join("values.yaml")).unwrap();
    let path = chart().join("README.md");
    let readme = fs::read_to_string(&path).unwrap();
    let (before, rest) = readme.split_once(BEGIN).expect("the table's beginning");
    let (there, after) = rest.split_once(END).expect("the table's end");
    let table = table(&values);
    assert!(table.lines().count() > 100);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|it| it == "1") {
        fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    assert!(
        there == table,
        "the table in {} is not of these values; run the test with UPDATE_SNAPSHOTS=1",
        path.display()
    );
}
