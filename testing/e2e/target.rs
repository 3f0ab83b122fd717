//! Where the scenarios run: a node on this machine, or a cluster that is there already.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    path::PathBuf,
};

use ambient_testing::{
    cluster::{ADMIN, Cluster, ClusterOptions, tools},
    images::Image,
    node::{Machine, Node},
};

use crate::kube::Kube;

/// A cluster with nodes.
#[derive(Debug)]
pub struct Target {
    /// As its administrator.
    pub kube: Kube,
    /// This machine's address, as pods reach it.
    pub address: Ipv4Addr,
    /// The node on this machine. Before the cluster, so that it ends before.
    pub node: Option<Node>,
    cluster: Option<Cluster>,
}

impl Target {
    /// Starts a cluster and a node.
    ///
    /// # Panics
    /// When that fails.
    pub fn on_this_machine(images: &[Image]) -> Self {
        let machine = Machine::start(images);
        let options = machine.cluster_options();
        let kubectl = tools(&options).join("kubectl");
        let cluster = Cluster::start(options);
        let node = Node::join(machine, &cluster);
        let cache = cluster.folder().join("kubectl-cache");
        Self {
            kube: Kube::new(kubectl, cluster.kubeconfig(ADMIN), Some(cache)),
            address: node.machine().address(),
            node: Some(node),
            cluster: Some(cluster),
        }
    }

    /// The cluster of this kubeconfig; `address` when its pods reach this machine by another than
    /// its nodes.
    ///
    /// # Panics
    /// When it cannot be asked, or lacks an image.
    pub async fn existing(kubeconfig: PathBuf, address: Option<Ipv4Addr>) -> Self {
        let kubectl = std::env::var_os("KUBECTL").map_or_else(
            || tools(&ClusterOptions::default()).join("kubectl"),
            PathBuf::from,
        );
        let kube = Kube::new(kubectl, kubeconfig, None);
        let address = match address {
            Some(address) => address,
            None => towards_nodes(&kube).await,
        };
        Self {
            kube,
            address,
            node: None,
            cluster: None,
        }
    }

    /// When the last change of an object was answered, by `uri` (its beginning is enough); known
    /// where the cluster is ours.
    pub fn changed(&self, uri: &str) -> Option<String> {
        let requests = self.cluster.as_ref()?.requests();
        let change = requests
            .into_iter()
            .rfind(|request| request.verb == "patch" && request.uri.starts_with(uri));
        change.map(|request| request.at)
    }

    /// What a person would look at after a failure in a namespace.
    pub async fn scene(&self, namespace: &str) -> String {
        let mut scene = self.kube.scene(namespace).await;
        if let Some(node) = &self.node {
            scene.push_str(&node.scene());
        }
        scene
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, file) = (self.address, self.kube.kubeconfig().display());
        match self.node {
            Some(_) => write!(f, "node on this machine, which is {address} to it ({file})"),
            None => write!(f, "cluster of {file}, to which this machine is {address}"),
        }
    }
}

/// The address that this machine would send from to a node of the cluster.
async fn towards_nodes(kube: &Kube) -> Ipv4Addr {
    let nodes = kube
        .get("default", &["nodes"])
        .await
        .expect("a cluster has nodes");
    let node = nodes["items"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|node| node["status"]["addresses"].as_array().into_iter().flatten())
        .find(|address| address["type"] == "InternalIP")
        .and_then(|address| address["address"].as_str())
        .expect("a node has an address");
    let found = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        // Sends nothing; chooses a way.
        socket.connect((node, 9))?;
        socket.local_addr()
    });
    match found.map(|address| address.ip()) {
        Ok(IpAddr::V4(address)) => address,
        other => panic!("no way to node {node} ({other:?}); set E2E_ADDRESS"),
    }
}
