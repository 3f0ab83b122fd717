//! Names that look like numbers stay names.

use super::*;

/// Keys whose values are names.
const NAMES: [&str; 10] = [
    "name",
    "namespace",
    "serviceAccountName",
    "secretName",
    "storageClassName",
    "priorityClassName",
    "key",
    "app.kubernetes.io/instance",
    "ambient-code.io/installation",
    "kubernetes.io/metadata.name",
];

fn assert_names(value: &Value, at: &str) {
    match value {
        Value::Object(map) => {
            for (key, inner) in map {
                let at = format!("{at}/{key}");
                let is_name = NAMES.contains(&key.as_str()) && !inner.is_object();
                assert!(!is_name || inner.is_string(), "{at}: {inner}");
                assert_names(inner, &at);
            }
        }
        Value::Array(list) => {
            for (number, inner) in list.iter().enumerate() {
                assert_names(inner, &format!("{at}/{number}"));
            }
        }
        _ => {}
    }
}

#[test]
fn a_number_may_be_a_name() {
    let numbers = [
        r#"serviceAccount.name="7""#,
        r#"priorityClassName="8""#,
        r#"trustedCas=[{"secret": "9", "key": "1e3"}, {"configMap": "10", "key": "11"}]"#,
        r#"sessions={"imageNamespace": "12", "imagePullSecret": "13",
            "kubeToken": {"existingSecret": "14", "key": "15"},
            "vertex": {"enabled": true, "secretName": "16", "secretNamespace": "1e6"}}"#,
        r#"global={"imageRegistry": "registry.example", "imagePullSecrets": ["17"]}"#,
        r#"networkPolicy={"monitoringNamespace": "18", "egress": {"dns": {"namespace": "19"}}}"#,
    ];
    let with = |set: &str, more: &[&str]| {
        let values = value_set(set);
        let chart = chart();
        let mut arguments = vec!["template", "1e2", chart.to_str().unwrap()];
        arguments.extend(["--namespace", "1e1", "--values", values.to_str().unwrap()]);
        for value in numbers.iter().chain(more) {
            arguments.extend(["--set-json", value]);
        }
        objects(&Helm::offline().run(&arguments).unwrap())
    };
    let token = r#"credential.apiToken={"existingSecret": "20", "key": "21"}"#;
    let whole = with(
        "tls",
        &[
            token,
            r#"tls.existingSecret="22""#,
            r#"tls.ca={"configMap": "23", "key": "24"}"#,
            r#"apiServer.operatorToken={"existingSecret": "25", "key": "26"}"#,
            r#"apiServer.persistence={"enabled": true, "storageClass": "27"}"#,
        ],
    );
    let given = with(
        "whole",
        &[
            r#"credential.apiToken={"value": "hush", "key": "28"}"#,
            r#"apiServer.operatorToken={"value": "hush", "key": "29"}"#,
        ],
    );
    for object in whole.iter().chain(&given) {
        assert_names(object, &title(object));
    }
    assert!(
        whole
            .iter()
            .any(|it| text(it, "/metadata/namespace") == "1e6")
    );
}
