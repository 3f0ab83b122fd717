//! Settings of the node's programs: all their files in the node's folder, nothing of the machine's.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::ground::Ground;
use crate::images::Image;

/// Where packages put the network plugins: Debian, then the plugins' own default.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// The folder of the network plugins, if they are installed.
pub(super) fn network_plugins() -> Option<PathBuf> {
    let folders = PLUGINS.iter().map(PathBuf::from);
    folders
        .into_iter()
        .find(|folder| folder.join("bridge").is_file() && folder.join("host-local").is_file())
}

/// containerd's, in TOML.
pub(super) fn containerd(ground: &Ground) -> String {
    let folder = ground.folder.display();
    let plugins = network_plugins().unwrap_or_default();
    format!(
        r#"version = 2
root = "{folder}/containerd"
# On a tmpfs of the node's own.
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
address = "{folder}/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
# Small virtual machines lack CAP_SYS_RESOURCE.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{folder}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{snapshotter}"
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#,
        pause = Image::reference("pause"),
        plugins = plugins.display(),
        snapshotter = if ground.in_overlay() {
            "native"
        } else {
            "overlayfs"
        },
    )
}

/// The pods' network, for the bridge plugin.
pub(super) fn network(ground: &Ground) -> String {
    json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge",
            "bridge": "pods",
            "isDefaultGateway": true,
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": ground.pods }]],
                "dataDir": ground.folder.join("addresses"),
            },
        }],
    })
    .to_string()
}

/// kube-proxy's.
pub(super) fn proxy(ground: &Ground, kubeconfig: &Path) -> String {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "iptables",
        "clientConnection": { "kubeconfig": kubeconfig },
        "hostnameOverride": super::NAME,
        "clusterCIDR": ground.pods,
        "healthzBindAddress": format!("{}:10256", ground.inside),
        // Pods share a bridge: without it an answer would not pass here on its way back.
        "iptables": { "masqueradeAll": true, "localhostNodePorts": false },
        // The machine's limits are nobody's business here.
        "conntrack": {
            "maxPerCore": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    })
    .to_string()
}

/// `CoreDNS`'s: names of Services, and no others.
pub(super) fn names(ground: &Ground, kubeconfig: &Path) -> String {
    format!(
        "cluster.local:53 {{\n  bind {}\n  errors\n  ready {}:8181\n  \
         kubernetes cluster.local {{\n    kubeconfig {}\n  }}\n}}\n",
        ground.inside,
        ground.inside,
        kubeconfig.display()
    )
}

/// The kubelet's; JSON is YAML too.
pub(super) fn kubelet(ground: &Ground, ca: &Path) -> String {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": ground.inside,
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": false },
            "x509": { "clientCAFile": ca },
        },
        // Whoever has a certificate of the cluster: the API server, for logs.
        "authorization": { "mode": "AlwaysAllow" },
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", ground.name),
        "containerRuntimeEndpoint": format!("unix://{}/containerd.sock", ground.folder.display()),
        "failSwapOn": false,
        "failCgroupV1": false,
        "healthzPort": 0,
        "readOnlyPort": 0,
        "makeIPTablesUtilChains": false,
        // Other names than those of Services are refused at once.
        "clusterDNS": [ground.inside],
        "clusterDomain": "cluster.local",
        "resolvConf": ground.folder.join("resolv.conf"),
        "volumePluginDir": ground.folder.join("plugins"),
        // How soon a changed Secret is in its volume; a minute by default.
        "syncFrequency": "10s",
        // The disk is the developer's, and may be nearly full.
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    })
    .to_string()
}
