//! The release, by helm.

use ambient_testing::{
    helm::{Helm, chart},
    node,
};
use serde_json::{Value, json};

use crate::{kube::Kube, target::Target};

/// Where the release is.
pub const NAMESPACE: &str = "ambient-code";

/// The administrator's token for the session API.
pub const OPERATOR: &str = "operator-token-of-the-trial";

/// Longest wait of helm's own.
const WAIT: [&str; 2] = ["--wait", "--timeout=3m"];

/// A volume of this name, for the session API to claim.
pub async fn volume(target: &Target, name: &str) {
    let node = target.node.as_ref().expect("one on this machine");
    let on_node = json!({
        "key": "kubernetes.io/hostname", "operator": "In", "values": [node::NAME],
    });
    let volume = json!({
        "apiVersion": "v1", "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": node.machine().volume(name)},
            "nodeAffinity": {"required": {
                "nodeSelectorTerms": [{"matchExpressions": [on_node]}],
            }},
        },
    });
    target.kube.apply(&volume.to_string()).await;
}

/// The release `ambient` of our chart, with the values for kind as they are.
pub struct Release<'a> {
    kube: &'a Kube,
    helm: Helm,
}

impl<'a> Release<'a> {
    /// Namespace and Secret, as docs/install.md says; the namespace takes restricted pods only. And
    /// a volume, which the node's cluster has nobody to make.
    pub async fn prepare(target: &'a Target) -> Self {
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": NAMESPACE, "labels": {
                "pod-security.kubernetes.io/enforce": "restricted",
            }},
        });
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {"name": "ambient-tokens", "namespace": NAMESPACE},
            "stringData": {
                "api-token": uuid::Uuid::new_v4().to_string(), "operator-token": OPERATOR,
            },
        });
        volume(target, "sessions").await;
        let kube = &target.kube;
        kube.apply(&format!("{namespace}\n---\n{secret}")).await;
        Self {
            kube,
            helm: Helm::of_cluster(kube.kubeconfig()),
        }
    }

    /// `helm VERB ambient` with our chart, the values for kind and these; waits, and gives its
    /// output.
    ///
    /// # Panics
    /// When helm fails.
    pub fn helm(&self, verb: &[&str], values: &[&str]) -> String {
        let chart = chart();
        let kind = chart.join("examples/kind.yaml");
        let mut arguments = verb.to_vec();
        arguments.extend(["ambient", chart.to_str().expect("UTF-8")]);
        arguments.extend(["--values", kind.to_str().expect("UTF-8")]);
        for value in values {
            arguments.extend(["--set", value]);
        }
        self.helm_on_release(&arguments)
    }

    /// helm with these arguments in the release's namespace; waits, and gives its output.
    ///
    /// # Panics
    /// When helm fails.
    pub fn helm_on_release(&self, arguments: &[&str]) -> String {
        let place = ["--namespace", NAMESPACE];
        let arguments = [arguments, &place, &WAIT].concat();
        let ran = self.helm.run(&arguments);
        ran.unwrap_or_else(|error| panic!("helm {arguments:?}: {error}"))
    }

    /// `helm test`: a session, its token as a runner fetches it, and the session API's word on it.
    ///
    /// # Panics
    /// When one of that fails.
    pub fn test(&self) {
        let test = [
            "test",
            "ambient",
            "--namespace",
            NAMESPACE,
            "--logs",
            WAIT[1],
        ];
        let tested = self.helm.run(&test);
        let tested = tested.unwrap_or_else(|error| panic!("helm test: {error}"));
        for row in [
            "session token  ok",
            "token in use   ok",
            "clean-up       ok",
        ] {
            assert!(tested.contains(row), "{tested}");
        }
    }

    /// What is another when a key was made anew.
    pub async fn keys(&self) -> Vec<Value> {
        let mut uids = Vec::new();
        for secret in ["token-keypair", "session-root", "signing-key"] {
            let name = format!("secret/ambient-cp-{secret}");
            let object = self.kube.get(NAMESPACE, &[&name]).await;
            let object = object.unwrap_or_else(|| panic!("no {name}"));
            uids.push(object["metadata"]["uid"].clone());
        }
        uids
    }
}
