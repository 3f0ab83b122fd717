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

#[test]
fn every_map_of_the_schema_is_closed_or_says_of_what_it_is() {
    let text = fs::read_to_string(chart().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&text).unwrap();
    let mut open = Vec::new();
    fn look(value: &Value, at: &str, open: &mut Vec<String>) {
        if let Some(map) = value.as_object() {
            if map.contains_key("properties") && !map.contains_key("additionalProperties") {
                open.push(at.to_owned());
            }
            for (key, value) in map {
                look(value, &format!("{at}/{key}"), open);
            }
        }
    }
    look(&schema, "", &mut open);
    // A parent chart has keys of its own there.
    assert_eq!(open, ["/properties/global"]);
}
