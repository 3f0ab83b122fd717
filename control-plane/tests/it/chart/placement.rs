//! Values about nodes hold for each pod of the chart, whoever else the cluster keeps nodes for.

use super::*;

#[test]
fn each_pod_runs_where_values_say() {
    let whole = [
        "test.enabled=true",
        "apiServer.enabled=true",
        r#"api={"url": "", "grpcAddress": "", "grpcTls": false}"#,
        r#"affinity.podAntiAffinity={"requiredDuringSchedulingIgnoredDuringExecution": []}"#,
    ];
    let objects = render(&[&value_set("placed")], &whole);
    let pods: Vec<_> = objects
        .iter()
        .filter_map(|it| Some((title(it), pod_of(it)?)))
        .collect();
    assert_eq!(pods.len(), 3);
    for (title, pod) in pods {
        let spec = &pod["spec"];
        assert_eq!(spec["nodeSelector"]["kubernetes.io/os"], "linux", "{title}");
        assert_eq!(spec["tolerations"][0]["key"], "infra", "{title}");
        let affinity = &spec["affinity"];
        assert!(affinity["nodeAffinity"].is_object(), "{title}");
        // That is about the control plane's own replicas.
        let is_ours = title.starts_with("Deployment");
        assert_eq!(affinity["podAntiAffinity"].is_object(), is_ours, "{title}");
    }
}
