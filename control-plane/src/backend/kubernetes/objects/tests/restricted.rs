//! The rules of Pod Security `restricted` (and `baseline` below it), as Kubernetes writes them down.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use serde_json::{Value, json};

/// Volumes that `restricted` takes.
const VOLUMES: [&str; 8] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

/// Fails with all rules that the pod breaks.
#[track_caller]
pub fn assert_restricted(pod: &Pod) {
    let broken = broken_rules(pod);
    assert!(broken.is_empty(), "{broken:#?}");
}

fn broken_rules(pod: &Pod) -> Vec<String> {
    let spec = pod.spec.as_ref().unwrap();
    let mut broken = Vec::new();
    let mut rule = |holds: bool, what: String| {
        if !holds {
            broken.push(what);
        }
    };
    for (name, shared) in [
        ("hostNetwork", spec.host_network),
        ("hostPID", spec.host_pid),
        ("hostIPC", spec.host_ipc),
    ] {
        rule(shared != Some(true), format!("{name} is set"));
    }
    for volume in spec.volumes.iter().flatten() {
        let sources = json!(volume);
        let sources = sources.as_object().unwrap().keys();
        for source in sources.filter(|it| *it != "name") {
            rule(
                VOLUMES.contains(&source.as_str()),
                format!("volume {} is a {source}", volume.name),
            );
        }
    }
    let context = spec.security_context.clone().unwrap_or_default();
    rule(
        context.run_as_user != Some(0),
        "the pod runs as root".to_owned(),
    );
    rule(
        context.sysctls.is_none(),
        "the pod sets kernel parameters".to_owned(),
    );
    let init = spec.init_containers.iter().flatten();
    for container in init.chain(&spec.containers) {
        check_container(spec, container, &mut rule);
    }
    broken
}

fn check_container(spec: &PodSpec, container: &Container, rule: &mut impl FnMut(bool, String)) {
    let name = &container.name;
    let mut rule = |holds: bool, what: &str| rule(holds, format!("{name} {what}"));
    let context = container.security_context.clone().unwrap_or_default();
    let of_pod = spec.security_context.clone().unwrap_or_default();
    rule(context.privileged != Some(true), "is privileged");
    rule(
        context.allow_privilege_escalation == Some(false),
        "may gain privileges",
    );
    let capabilities = context.capabilities.unwrap_or_default();
    rule(
        capabilities.drop.unwrap_or_default() == ["ALL"],
        "keeps capabilities",
    );
    let added = capabilities.add.unwrap_or_default();
    rule(
        added.iter().all(|it| it == "NET_BIND_SERVICE"),
        "adds capabilities",
    );
    rule(
        context.run_as_non_root.or(of_pod.run_as_non_root) == Some(true),
        "may run as root",
    );
    rule(context.run_as_user != Some(0), "runs as root");
    let seccomp = context.seccomp_profile.or(of_pod.seccomp_profile);
    rule(
        seccomp.is_some_and(|it| ["RuntimeDefault", "Localhost"].contains(&it.type_.as_str())),
        "has no seccomp profile",
    );
    rule(
        context.proc_mount.is_none_or(|it| it == "Default"),
        "has another proc mount",
    );
    let mut ports = container.ports.iter().flatten();
    rule(
        ports.all(|port| port.host_port.is_none()),
        "has a port of the host",
    );
    let probes = [
        &container.liveness_probe,
        &container.readiness_probe,
        &container.startup_probe,
    ];
    let hosts = probes.into_iter().flatten().any(|probe| {
        let http = probe.http_get.as_ref().and_then(|it| it.host.as_ref());
        let tcp = probe.tcp_socket.as_ref().and_then(|it| it.host.as_ref());
        http.or(tcp).is_some()
    });
    rule(!hosts, "is probed at another host");
}

#[test]
fn what_breaks_a_rule_is_found() {
    let good = json!({
        "spec": {
            "securityContext": {
                "runAsNonRoot": true,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{
                "name": "a",
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]},
                },
            }],
            "volumes": [{"name": "v", "emptyDir": {}}],
        },
    });
    assert_restricted(&serde_json::from_value(good.clone()).unwrap());
    for (path, value) in [
        ("/spec/securityContext/runAsNonRoot", json!(false)),
        (
            "/spec/securityContext/seccompProfile/type",
            json!("Unconfined"),
        ),
        (
            "/spec/containers/0/securityContext/allowPrivilegeEscalation",
            Value::Null,
        ),
        (
            "/spec/containers/0/securityContext/capabilities/drop",
            json!(["CHOWN"]),
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "hostPath": {"path": "/"}}),
        ),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        let broken = broken_rules(&serde_json::from_value(bad).unwrap());
        assert_eq!(broken.len(), 1, "{path}: {broken:?}");
    }
}
