//! The command line of each program of the cluster. Paths are relative to the cluster's folder,
//! where they run.

use std::net::Ipv4Addr;

use super::{
    Cluster,
    users::{CONTROLLER_MANAGER, SCHEDULER},
};

/// Address of the service `kubernetes`: the first of the services' range.
pub(super) const KUBERNETES_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

impl Cluster {
    pub(super) fn etcd_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.etcd.number())
    }

    pub(super) fn etcd_arguments(&self) -> Vec<String> {
        let url = self.etcd_url();
        let mut arguments = vec![
            "--data-dir=etcd".to_owned(),
            format!("--listen-client-urls={url}"),
            format!("--advertise-client-urls={url}"),
            // It has no peers, but wants an address for them.
            "--listen-peer-urls=http://127.0.0.1:0".to_owned(),
            "--socket-reuse-port".to_owned(),
            // Nothing of it outlives the test.
            "--unsafe-no-fsync".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        arguments.extend_from_slice(&self.options.etcd);
        arguments
    }

    pub(super) fn api_server_arguments(&self) -> Vec<String> {
        let options = &self.options;
        let mut arguments = vec![
            format!("--etcd-servers={}", self.etcd_url()),
            format!("--secure-port={}", self.api.number()),
            "--permit-port-sharing".to_owned(),
            format!("--bind-address={}", options.bind),
            format!("--advertise-address={}", options.advertise),
            "--tls-cert-file=api-server.crt".to_owned(),
            "--tls-private-key-file=api-server.key".to_owned(),
            "--client-ca-file=ca.crt".to_owned(),
            "--kubelet-client-certificate=kubelet-client.crt".to_owned(),
            "--kubelet-client-key=kubelet-client.key".to_owned(),
            "--kubelet-preferred-address-types=InternalIP,Hostname".to_owned(),
            "--token-auth-file=users.csv".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--service-account-key-file=sa.key".to_owned(),
            "--service-account-signing-key-file=sa.key".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--allow-privileged".to_owned(),
            "--audit-policy-file=audit.yaml".to_owned(),
            "--audit-log-path=audit.log".to_owned(),
            // MB: never rotated, so that one file has it all.
            "--audit-log-maxsize=10000".to_owned(),
        ];
        if options.advertise.is_loopback() {
            // An Endpoints object must not name loopback; trying to make one is noise in the log.
            arguments.push("--endpoint-reconciler-type=none".to_owned());
        }
        arguments.extend_from_slice(&options.api_server);
        arguments
    }

    pub(super) fn controller_manager_arguments(&self) -> Vec<String> {
        let kubeconfig = self.kubeconfig(CONTROLLER_MANAGER);
        let mut arguments = vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            "--secure-port=0".to_owned(),
            "--leader-elect=false".to_owned(),
            "--use-service-account-credentials".to_owned(),
            "--service-account-private-key-file=sa.key".to_owned(),
            "--root-ca-file=ca.crt".to_owned(),
            // A test that deletes 100 sessions must not wait for its usual 20 requests a second.
            "--kube-api-qps=300".to_owned(),
            "--kube-api-burst=500".to_owned(),
        ];
        if !self.options.nodes {
            // Our nodes have no heartbeat, and must not be given up for that.
            arguments.push(
                "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller".to_owned(),
            );
        }
        arguments.extend_from_slice(&self.options.controller_manager);
        arguments
    }

    pub(super) fn scheduler_arguments(&self) -> Vec<String> {
        let kubeconfig = self.kubeconfig(SCHEDULER);
        vec![
            format!("--kubeconfig={}", kubeconfig.display()),
            "--secure-port=0".to_owned(),
            "--leader-elect=false".to_owned(),
        ]
    }
}
