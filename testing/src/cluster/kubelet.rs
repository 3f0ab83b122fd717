//! Plays scheduler and kubelet for tests without a real node.
//!
//! What the API server does with a pod depends on whether it is bound to a node: one that is not is
//! deleted at once, whatever its grace period; one that is stays, terminating, until its kubelet
//! deletes it with a grace period of 0 ([`Cluster::finish_pod`]). So a test of a pod that
//! terminates binds it first. A pod whose node does not exist is collected after about a minute.

use serde_json::{Value, json};

use super::Cluster;

impl Cluster {
    /// A node that is ready and that nobody looks after; nothing happens when it is there already.
    ///
    /// # Panics
    /// When the API server refuses.
    pub fn add_node(&self, name: &str) {
        let node = json!({"metadata": {"name": name}});
        let (status, answer) = self.request("POST", "/api/v1/nodes", Some(&node));
        assert!(matches!(status, 201 | 409), "node {name}: {answer}");
        let (status, answer) = self.request(
            "PATCH",
            &format!("/api/v1/nodes/{name}/status"),
            Some(&json!({"status": {
                "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
                "capacity": {"cpu": "64", "memory": "256Gi", "pods": "10000"},
                "allocatable": {"cpu": "64", "memory": "256Gi", "pods": "10000"},
            }})),
        );
        assert_eq!(status, 200, "status of node {name}: {answer}");
    }

    /// Binds a pod to a node, as the scheduler does.
    ///
    /// # Panics
    /// When the API server refuses.
    pub fn bind_pod(&self, namespace: &str, name: &str, node: &str) {
        let (status, answer) = self.request(
            "POST",
            &format!("/api/v1/namespaces/{namespace}/pods/{name}/binding"),
            Some(&json!({
                "metadata": {"name": name},
                "target": {"kind": "Node", "name": node},
            })),
        );
        assert_eq!(status, 201, "binding of pod {name}: {answer}");
    }

    /// Sets fields of a pod's status, as the kubelet does; lists are replaced as a whole.
    ///
    /// # Panics
    /// When the API server refuses.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "callers write the status in place, with json!"
    )]
    pub fn set_pod_status(&self, namespace: &str, name: &str, status: Value) {
        let (code, answer) = self.request(
            "PATCH",
            &format!("/api/v1/namespaces/{namespace}/pods/{name}/status"),
            Some(&json!({ "status": status })),
        );
        assert_eq!(code, 200, "status of pod {name}: {answer}");
    }

    /// Removes a pod, as the kubelet does when all its containers have ended. Nothing happens when
    /// it is gone already.
    ///
    /// # Panics
    /// When the API server refuses.
    pub fn finish_pod(&self, namespace: &str, name: &str) {
        let (status, answer) = self.request(
            "DELETE",
            &format!("/api/v1/namespaces/{namespace}/pods/{name}"),
            Some(&json!({"gracePeriodSeconds": 0})),
        );
        assert!(matches!(status, 200 | 404), "end of pod {name}: {answer}");
    }
}
