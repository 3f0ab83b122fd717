//! Alerts and dashboard ask for metrics that there are.

use super::*;

/// Names of ours in a text.
fn names(text: &str) -> Vec<&str> {
    let word = |it: char| !(it.is_ascii_alphanumeric() || it == '_');
    let words = text.split(word);
    words.filter(|it| it.starts_with("ambient_")).collect()
}

#[test]
fn every_metric_that_is_asked_for_is_documented() {
    let values = value_set("monitoring");
    let objects = render(&[&values], &[]);
    let of_kind = |kind: &str| {
        let mut found = objects.iter().filter(|it| text(it, "/kind") == kind);
        found.next().unwrap_or_else(|| panic!("no {kind}"))
    };
    let alerts = of_kind("PrometheusRule")["spec"].to_string();
    let dashboard = fs::read_to_string(chart().join("files/dashboard.json")).unwrap();
    let documented = fs::read_to_string(chart().join("../../docs/metrics.md")).unwrap();
    let mut asked = [names(&alerts), names(&dashboard)].concat();
    asked.sort_unstable();
    asked.dedup();
    assert!(asked.len() > 20, "{asked:?}");
    for name in asked {
        let base = name.strip_suffix("_bucket").unwrap_or(name);
        assert!(documented.contains(&format!("`{base}`")), "{name}");
    }
}

#[test]
fn the_dashboard_is_in_its_config_map_as_json() {
    let objects = render(&[&value_set("monitoring")], &[]);
    let map = objects
        .iter()
        .find(|it| title(it) == "ConfigMap ambient-control-plane-dashboard");
    let json = text(map.unwrap(), "/data/ambient-control-plane.json");
    let dashboard: Value = serde_json::from_str(json).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() > 15);
    let mut ids: Vec<_> = panels.iter().map(|it| it["id"].as_u64().unwrap()).collect();
    let count = ids.len();
    ids.dedup();
    assert_eq!(ids.len(), count);
}

#[test]
fn each_alert_says_what_to_do() {
    let objects = render(&[&value_set("monitoring")], &[]);
    let rule = objects
        .iter()
        .find(|it| text(it, "/kind") == "PrometheusRule");
    let rules = rule.unwrap().pointer("/spec/groups/0/rules").unwrap();
    let rules = rules.as_array().unwrap();
    for name in [
        "AmbientTokenIssueFailing",
        "AmbientRefreshLate",
        "AmbientOldestTokenTooOld",
        "AmbientQueueAge",
        "AmbientNoLeader",
    ] {
        let rule = rules.iter().find(|it| it["alert"] == name);
        let rule = rule.unwrap_or_else(|| panic!("no alert {name}"));
        assert!(!text(rule, "/annotations/summary").is_empty(), "{rule}");
        assert!(!text(rule, "/annotations/description").is_empty(), "{rule}");
        assert!(!text(rule, "/labels/severity").is_empty(), "{rule}");
        assert_eq!(text(rule, "/labels/team"), "platform");
    }
}
