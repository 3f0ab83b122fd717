//! The chart in charts/ambient-control-plane, by the real helm.

use std::{
    fs,
    path::{Path, PathBuf},
};

use ambient_testing::helm::{Helm, chart};
use serde_json::Value;

mod alerts;
mod hardening;
mod install;
mod kustomize;
mod monitoring;
mod names;
mod network;
mod notes;
mod placement;
mod readme;
mod refusals;
mod rules;
mod scene;
mod snapshots;
mod values;

/// The namespace that the chart is rendered for.
const NAMESPACE: &str = "ambient-code";

/// Values of the chart's `tests` folder, by name.
fn value_sets() -> Vec<(String, PathBuf)> {
    let mut sets: Vec<_> = fs::read_dir(chart().join("tests"))
        .unwrap()
        .filter_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name()?.to_str()?.strip_suffix(".values.yaml")?;
            Some((name.to_owned(), path.clone()))
        })
        .collect();
    sets.sort();
    sets
}

/// Those, and the chart's examples.
fn all_values() -> Vec<(String, PathBuf)> {
    let examples = fs::read_dir(chart().join("examples")).unwrap();
    let examples = examples.map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        (format!("example-{name}"), path.clone())
    });
    let mut all = value_sets();
    all.extend(examples);
    assert!(all.len() > 14, "{all:?}");
    all
}

fn value_set(name: &str) -> PathBuf {
    chart().join("tests").join(format!("{name}.values.yaml"))
}

/// All objects of one rendering.
fn objects(yaml: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
    documents.into_iter().filter(|it| !it.is_null()).collect()
}

fn render(files: &[&Path], values: &[&str]) -> Vec<Value> {
    let rendered = Helm::offline().template(NAMESPACE, files, values);
    objects(&rendered.unwrap_or_else(|error| panic!("{files:?} {values:?}: {error}")))
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Kind and name, for messages.
fn title(object: &Value) -> String {
    format!(
        "{} {}",
        text(object, "/kind"),
        text(object, "/metadata/name")
    )
}

/// The pod of an object that makes pods, or is one.
fn pod_of(object: &Value) -> Option<Value> {
    match text(object, "/kind") {
        "Deployment" | "StatefulSet" | "Job" => Some(object["spec"]["template"].clone()),
        "Pod" => Some(object.clone()),
        _ => None,
    }
}
