//! `values.yaml` and `values.schema.json` know the same values.

use std::collections::BTreeSet;

use super::*;

/// Only in the schema: for charts that depend on this one.
const FOR_PARENTS: &str = "enabled";

fn paths(value: &Value, at: &str, found: &mut BTreeSet<String>) {
    match value.as_object() {
        Some(map) if !map.is_empty() => {
            for (key, value) in map {
                let at = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                found.insert(at.clone());
                paths(value, &at, found);
            }
        }
        _ => {}
    }
}

fn schema_paths(schema: &Value, root: &Value, at: &str, found: &mut BTreeSet<String>) {
    let schema = match schema["$ref"].as_str() {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap(),
        None => schema,
    };
    for (key, inner) in schema["properties"].as_object().into_iter().flatten() {
        let at = if at.is_empty() {
            key.clone()
        } else {
            format!("{at}.{key}")
        };
        found.insert(at.clone());
        schema_paths(inner, root, &at, found);
    }
}

#[test]
fn every_value_is_in_the_schema_and_has_a_default() {
    let read = |name: &str| fs::read_to_string(chart().join(name)).unwrap();
    let values: Value = serde_saphyr::from_str(&read("values.yaml")).unwrap();
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let (mut given, mut known) = (BTreeSet::new(), BTreeSet::new());
    paths(&values, "", &mut given);
    schema_paths(&schema, &schema, "", &mut known);
    known.remove(FOR_PARENTS);
    // Maps of Kubernetes' own, whose keys are not ours to list in values.
    let free = |path: &&String| {
        let inner = ["resources.", "podTemplate.", "dashboard.labels."];
        !inner.iter().any(|it| path.contains(it))
    };
    let given: Vec<_> = given.iter().filter(free).collect();
    let known: Vec<_> = known.iter().filter(free).collect();
    assert_eq!(given, known, "values.yaml is on the left");
}

fn open_maps(value: &Value, at: &str, open: &mut Vec<String>) {
    let Some(map) = value.as_object() else { return };
    if map.contains_key("properties") && !map.contains_key("additionalProperties") {
        open.push(at.to_owned());
    }
    for (key, value) in map {
        open_maps(value, &format!("{at}/{key}"), open);
    }
}

#[test]
fn every_map_of_the_schema_is_closed_or_says_of_what_it_is() {
    let text = fs::read_to_string(chart().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&text).unwrap();
    let mut open = Vec::new();
    open_maps(&schema, "", &mut open);
    // A parent chart has keys of its own there.
    assert_eq!(open, ["/properties/global"]);
}

#[test]
fn the_chart_is_for_these_programs() {
    let text = fs::read_to_string(chart().join("Chart.yaml")).unwrap();
    let about: Value = serde_saphyr::from_str(&text).unwrap();
    assert_eq!(about["appVersion"], env!("CARGO_PKG_VERSION"));
    // What docs/install.md says of each chart version.
    let notes = fs::read_to_string(chart().join("../../docs/install.md")).unwrap();
    let version = about["version"].as_str().unwrap();
    assert!(
        notes.contains(&format!("| {version} | ")),
        "no upgrade note for {version}"
    );
}

/// What is for control planes outside of the cluster.
const LEFT_OUT: [&str; 1] = ["KUBECONFIG"];

#[test]
fn every_setting_of_the_control_plane_is_a_value() {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/settings/raw/serve.rs");
    let source = fs::read_to_string(source).unwrap();
    let template = fs::read_to_string(chart().join("templates/_env.tpl")).unwrap();
    let names = source.split("env = \"").skip(1);
    let names: Vec<_> = names.filter_map(|it| it.split('"').next()).collect();
    assert!(names.len() > 30, "{names:?}");
    let set = |name: &&str| {
        template.contains(&format!("\"{name}\"")) || template.contains(&format!("name: {name}\n"))
    };
    let left: Vec<_> = names.into_iter().filter(|it| !set(it)).collect();
    assert_eq!(left, LEFT_OUT, "the settings that the chart does not set");
}
