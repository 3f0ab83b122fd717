//! What the chart renders against Pod Security `restricted` and common hardening rules.

use ambient_testing::cluster::Cluster;
use serde_json::json;

use super::*;

/// Findings that stay, each with its reason.
const ACCEPTED: [(&str, &str); 1] = [(
    "has a secret in its environment",
    "the programs take their tokens from the environment, as existing installations set them; no \
     program of ours puts its own environment into a log, an error or a child",
)];

/// Volumes that `restricted` allows, of those that the chart uses.
const VOLUMES: [&str; 5] = [
    "configMap",
    "secret",
    "projected",
    "emptyDir",
    "persistentVolumeClaim",
];

/// Endings of names of variables whose values are secret.
const SECRETS: [&str; 4] = ["_TOKEN", "_SECRET", "_KEY", "_PASSWORD"];

/// The name of a Secret, which is none.
const NAME_OF_SECRET: &str = "IMAGE_PULL_SECRET";

struct Findings(Vec<String>);

impl Findings {
    fn check(&mut self, holds: bool, object: &Value, what: &str) {
        if !holds {
            self.0.push(format!("{} {what}", title(object)));
        }
    }
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn check_pod(object: &Value, findings: &mut Findings) {
    let Some(pod) = pod_of(object) else { return };
    let spec = &pod["spec"];
    let mut check = |holds: bool, what: &str| findings.check(holds, object, what);
    for host in ["hostNetwork", "hostPID", "hostIPC"] {
        check(spec[host].is_null(), &format!("sets {host}"));
    }
    for volume in list(spec, "/volumes") {
        let known = VOLUMES.iter().any(|kind| volume.get(kind).is_some());
        check(known, &format!("has the volume {volume}"));
    }
    let security = &spec["securityContext"];
    check(security["runAsNonRoot"] == true, "may run as root");
    check(security["runAsUser"] != 0, "runs as root");
    check(
        security["seccompProfile"]["type"] == "RuntimeDefault",
        "has no seccomp profile",
    );
    let account = text(spec, "/serviceAccountName");
    check(
        !account.is_empty() && account != "default",
        "has no ServiceAccount of its own",
    );
    let mounts = &spec["automountServiceAccountToken"];
    let needs = account != "ambient-api-server";
    check(
        *mounts == needs,
        "gets a Kubernetes token that it does not need, or none",
    );
    check(spec["enableServiceLinks"] == false, "has links to services");
    let runs_on = text(object, "/kind") != "Pod";
    check(
        runs_on || spec["activeDeadlineSeconds"].is_u64(),
        "may run for ever",
    );
    for container in list(spec, "/initContainers").chain(list(spec, "/containers")) {
        check_container(object, container, runs_on, findings);
    }
}

fn check_container(object: &Value, container: &Value, runs_on: bool, findings: &mut Findings) {
    let mut check = |holds: bool, what: &str| findings.check(holds, object, what);
    let security = &container["securityContext"];
    check(
        security["allowPrivilegeEscalation"] == false,
        "may gain privileges",
    );
    check(security["privileged"].is_null(), "is privileged");
    check(
        security["readOnlyRootFilesystem"] == true,
        "may write its root",
    );
    check(
        security["capabilities"] == json!({"drop": ["ALL"]}),
        "has capabilities",
    );
    let resources = &container["resources"];
    for pointer in ["/requests/cpu", "/requests/memory", "/limits/memory"] {
        let there = resources.pointer(pointer).is_some();
        check(there, &format!("has no resources{pointer}"));
    }
    let image = text(container, "/image");
    let version = image.rsplit_once('/').map_or("", |(_, name)| name);
    check(
        version.contains(['@', ':']) && !image.ends_with(":latest"),
        &format!("has the image {image}"),
    );
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        check(
            !runs_on || container[probe].is_object(),
            &format!("has no {probe}"),
        );
    }
    for port in list(container, "/ports") {
        check(port["hostPort"].is_null(), "takes a port of its node");
    }
    for variable in list(container, "/env") {
        let name = text(variable, "/name");
        let is_secret =
            name != NAME_OF_SECRET && SECRETS.iter().any(|ending| name.ends_with(ending));
        check(
            !is_secret || variable["value"].is_null(),
            &format!("has the value of {name} in its manifest"),
        );
        check(
            variable.pointer("/valueFrom/secretKeyRef").is_none(),
            "has a secret in its environment",
        );
    }
}

fn check_rights(object: &Value, findings: &mut Findings) {
    let mut check = |holds: bool, what: &str| findings.check(holds, object, what);
    let in_cluster = text(object, "/metadata/name") == "ambient-control-plane"
        && text(object, "/kind") == "ClusterRole";
    for rule in list(object, "/rules") {
        for part in ["/verbs", "/resources", "/apiGroups"] {
            check(list(rule, part).all(|it| it != "*"), "has a wildcard");
        }
        for verb in ["escalate", "impersonate"] {
            check(
                list(rule, "/verbs").all(|it| it != verb),
                &format!("may {verb}"),
            );
        }
        let named = rule["resourceNames"].is_array();
        let binds = list(rule, "/verbs").any(|it| it == "bind");
        check(!binds || named, "may bind any role");
        let secrets = list(rule, "/resources").any(|it| it == "secrets" || it == "pods");
        check(
            !(secrets && in_cluster),
            "reaches Secrets or pods of the whole cluster",
        );
    }
    for subject in list(object, "/subjects") {
        check(
            subject["kind"] == "ServiceAccount",
            "gives rights to others than ours",
        );
    }
}

/// Whether some policy of the set is for pods with these labels.
fn is_covered(objects: &[Value], labels: &Value) -> bool {
    let mut policies = objects
        .iter()
        .filter(|it| text(it, "/kind") == "NetworkPolicy");
    policies.any(|policy| {
        let selector = policy
            .pointer("/spec/podSelector/matchLabels")
            .and_then(Value::as_object);
        selector.is_some_and(|it| it.iter().all(|(name, value)| labels[name] == *value))
    })
}

#[test]
fn nothing_is_softer_than_it_must_be() {
    let mut findings = Findings(Vec::new());
    let mut pods = 0;
    for (name, values) in all_values() {
        let objects = render(&[&values], &[]);
        for object in &objects {
            check_pod(object, &mut findings);
            check_rights(object, &mut findings);
            let kind = text(object, "/kind");
            let is_service = kind == "Service";
            let inside = text(object, "/spec/type");
            findings.check(
                !is_service || matches!(inside, "" | "ClusterIP"),
                object,
                "is reached from outside",
            );
            let given = ["whole", "runners"].contains(&name.as_str());
            findings.check(kind != "Secret" || given, object, "is a Secret nobody gave");
            if let Some(pod) = pod_of(object) {
                pods += 1;
                // The one set that switches them off.
                let covered = name == "second" || is_covered(&objects, &pod["metadata"]["labels"]);
                findings.check(covered, object, "is open to every pod");
            }
        }
    }
    assert!(pods > 20, "{pods}");
    let accepted = |it: &String| ACCEPTED.iter().any(|(finding, _)| it.ends_with(finding));
    let (accepted, open): (Vec<_>, Vec<_>) = findings.0.into_iter().partition(accepted);
    assert!(open.is_empty(), "{open:#?}");
    for (finding, _) in ACCEPTED {
        let used = accepted.iter().any(|it| it.ends_with(finding));
        assert!(used, "nothing {finding} any more: take it off the list");
    }
}

/// The same by Kubernetes itself.
#[test]
fn a_restricted_namespace_takes_all_pods() {
    let cluster = Cluster::shared();
    let namespace = "chart-restricted";
    cluster.create_namespace(namespace);
    let level =
        json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    let path = format!("/api/v1/namespaces/{namespace}");
    assert_eq!(cluster.request("PATCH", &path, Some(&level)).0, 200);
    for account in ["ambient-control-plane", "ambient-api-server", "agents"] {
        let body = json!({"metadata": {"name": account}});
        let made = cluster.request("POST", &format!("{path}/serviceaccounts"), Some(&body));
        assert_eq!(made.0, 201, "{}", made.1);
    }
    let make = |spec: &Value| {
        let body = json!({"metadata": {"generateName": "chart-"}, "spec": spec});
        cluster.request("POST", &format!("{path}/pods?dryRun=All"), Some(&body))
    };
    let mut tried = 0;
    for (name, values) in all_values() {
        for object in render(&[&values], &[]) {
            let Some(pod) = pod_of(&object) else { continue };
            let mut spec = pod["spec"].clone();
            // The StatefulSet's own volume comes from its template.
            if text(&object, "/kind") == "StatefulSet" {
                let volumes = spec["volumes"].as_array().cloned().unwrap_or_default();
                let data = json!({"name": "data", "emptyDir": {}});
                let others = volumes.into_iter().filter(|it| it["name"] != "data");
                spec["volumes"] = others.chain([data]).collect();
            }
            let (status, answer) = make(&spec);
            assert_eq!(status, 201, "{name}: {}: {answer}", title(&object));
            tried += 1;
            // It would be refused if it were softer.
            spec["securityContext"]["runAsNonRoot"] = json!(false);
            assert_eq!(make(&spec).0, 403);
        }
    }
    assert!(tried > 20, "{tried}");
}
