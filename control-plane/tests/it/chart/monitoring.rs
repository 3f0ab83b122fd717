//! Who reads metrics, and that somebody can.

use std::collections::BTreeMap;

use serde_json::json;

use super::*;

/// The programs that have metrics, by their component.
const PROGRAMS: [(&str, &str); 2] = [
    ("control-plane", "ambient-control-plane"),
    ("api-server", "ambient-api-server"),
];

/// Objects of a kind.
fn of_kind<'a>(objects: &'a [Value], kind: &str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |it| text(it, "/kind") == kind)
}

fn named<'a>(objects: &'a [Value], kind: &str, name: &str) -> Option<&'a Value> {
    of_kind(objects, kind).find(|it| text(it, "/metadata/name") == name)
}

/// Whom the ingress rules of this policy let to the port, rule by rule; `None`: everybody.
fn let_in<'a>(policy: &'a Value, port: &str) -> Vec<Option<&'a Value>> {
    let rules = policy.pointer("/spec/ingress").and_then(Value::as_array);
    let rules = rules.into_iter().flatten();
    let admits = |rule: &&Value| match rule["ports"].as_array() {
        Some(ports) => ports.iter().any(|it| it["port"] == port),
        None => true,
    };
    rules.filter(admits).map(|rule| rule.get("from")).collect()
}

#[test]
fn metrics_are_for_the_monitoring_namespace() {
    let monitoring = json!([{"namespaceSelector":
        {"matchLabels": {"kubernetes.io/metadata.name": "watchers"}}}]);
    let values = value_set("whole");
    let objects = render(
        &[&values],
        &[r#"networkPolicy.monitoringNamespace="watchers""#],
    );
    let nobody = render(
        &[&values],
        &[
            r#"networkPolicy.monitoringNamespace="""#,
            "metrics.serviceMonitor.enabled=false",
        ],
    );
    for (_, name) in PROGRAMS {
        let policy = named(&objects, "NetworkPolicy", name).unwrap();
        assert_eq!(let_in(policy, "metrics"), [Some(&monitoring)], "{name}");
        let policy = named(&nobody, "NetworkPolicy", name).unwrap();
        assert!(let_in(policy, "metrics").is_empty(), "{policy}");
    }
    let api_server = named(&objects, "NetworkPolicy", "ambient-api-server").unwrap();
    for port in ["rest", "grpc"] {
        assert_eq!(let_in(api_server, port), [None], "{port}");
    }
}

#[test]
fn the_api_server_serves_metrics_where_the_policy_says() {
    let objects = render(&[&value_set("whole")], &[]);
    let set = named(&objects, "StatefulSet", "ambient-api-server").unwrap();
    let container = set.pointer("/spec/template/spec/containers/0").unwrap();
    let ports = container["ports"].as_array().unwrap();
    let metrics = ports.iter().find(|it| it["name"] == "metrics").unwrap();
    let port = metrics["containerPort"].to_string();
    let variables = container["env"].as_array().unwrap();
    let mut variables = variables.iter();
    let listen = variables.find(|it| it["name"] == "AMBIENT_ADMIN_LISTEN");
    assert_eq!(text(listen.unwrap(), "/value"), format!("[::]:{port}"));
}

/// Whether an object selects, by what is there, things of these labels.
fn selects(object: &Value, pointer: &str, labels: &Value) -> bool {
    let selector = object.pointer(pointer).and_then(Value::as_object);
    let mut wanted = selector.unwrap().iter();
    wanted.all(|(name, value)| labels[name] == *value)
}

#[test]
fn each_monitor_finds_all_programs_and_each_once() {
    let values = value_set("whole");
    let whole = |kind: &str| {
        let switch = |it: &str| format!("metrics.{it}.enabled={}", it == kind);
        let switches = ["serviceMonitor", "podMonitor"].map(switch);
        render(&[&values], &switches.each_ref().map(String::as_str))
    };
    let labels = |component: &str| {
        json!({
            "app.kubernetes.io/name": "ambient-control-plane",
            "app.kubernetes.io/instance": "ambient",
            "app.kubernetes.io/component": component,
        })
    };
    let mut times = BTreeMap::new();

    let objects = whole("serviceMonitor");
    for monitor in of_kind(&objects, "ServiceMonitor") {
        for service in of_kind(&objects, "Service") {
            let of_service = &service["metadata"]["labels"];
            if !selects(monitor, "/spec/selector/matchLabels", of_service) {
                continue;
            }
            assert_eq!(text(service, "/spec/ports/0/name"), "metrics");
            assert_eq!(text(service, "/spec/ports/0/targetPort"), "metrics");
            for (component, _) in PROGRAMS {
                if selects(service, "/spec/selector", &labels(component)) {
                    *times.entry((component, "by Service")).or_insert(0) += 1;
                }
            }
        }
    }
    let objects = whole("podMonitor");
    for monitor in of_kind(&objects, "PodMonitor") {
        assert_eq!(text(monitor, "/spec/podMetricsEndpoints/0/port"), "metrics");
        for (component, _) in PROGRAMS {
            if selects(monitor, "/spec/selector/matchLabels", &labels(component)) {
                *times.entry((component, "by pod")).or_insert(0) += 1;
            }
        }
    }

    let once = PROGRAMS.map(|(component, _)| [(component, "by Service"), (component, "by pod")]);
    let once = once.into_iter().flatten().map(|it| (it, 1)).collect();
    assert_eq!(times, once);
}
