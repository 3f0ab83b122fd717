//! A real Kubernetes control plane for tests: etcd, kube-apiserver and kube-controller-manager.
//!
//! One cluster serves a whole test binary ([`Cluster::shared`]); tests keep apart by namespace. Its
//! programs come from `KUBEBUILDER_ASSETS` when that is set, else from where `make cluster-tools`
//! puts them. RBAC, Pod Security and quotas are on, and what was asked of the API server can be
//! read from its audit log ([`Cluster::requests`]). All ends with the test's process, however that
//! ends.
//!
//! Its methods block the calling thread, most for some milliseconds, `kubectl` for half a second:
//! a test that runs tasks of its own beside them needs a runtime of several threads.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, SocketAddr},
    panic::catch_unwind,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use aws_lc_rs::rsa::KeySize;
use nix::sys::signal::Signal;
use serde_json::json;
use uuid::Uuid;

use crate::keypair::RsaKey;

mod arguments;
mod audit;
mod certificates;
mod client;
mod direct;
mod kubelet;
mod ports;
mod programs;
mod users;
mod waits;

pub use audit::{NewRequests, Request};
use certificates::Certificates;
pub use direct::{Direct, Kind};
use ports::Port;
use programs::Programs;
pub use programs::tools;
pub use users::{ADMIN, CONTROL_PLANE, NOBODY, User};
use users::{CONTROLLER_MANAGER, SCHEDULER};

/// What a cluster has beside etcd, kube-apiserver and kube-controller-manager.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Its users beside [`ADMIN`], [`CONTROL_PLANE`] and [`NOBODY`].
    pub users: Vec<User>,
    /// The address that kube-apiserver listens at. `0.0.0.0` lets pods in.
    pub bind: Ipv4Addr,
    /// The address by which others than this machine's own programs reach kube-apiserver; also in
    /// its certificate, in [`Cluster::url`] and in each kubeconfig.
    pub advertise: Ipv4Addr,
    /// More names and addresses for its certificate.
    pub names: Vec<String>,
    /// Real nodes will join: kube-scheduler runs, and a node without a heartbeat is given up.
    /// Otherwise nodes are those of [`Cluster::add_node`], which have no heartbeat.
    pub nodes: bool,
    /// More arguments of etcd.
    pub etcd: Vec<String>,
    /// More arguments of kube-apiserver.
    pub api_server: Vec<String>,
    /// More arguments of kube-controller-manager.
    pub controller_manager: Vec<String>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self {
            users: Vec::new(),
            bind: Ipv4Addr::LOCALHOST,
            advertise: Ipv4Addr::LOCALHOST,
            names: Vec::new(),
            nodes: false,
            etcd: Vec::new(),
            api_server: Vec::new(),
            controller_manager: Vec::new(),
        }
    }
}

/// A running cluster; ends, with its folder, when dropped or when the test's process ends.
#[derive(Debug)]
pub struct Cluster {
    folder: PathBuf,
    options: ClusterOptions,
    api: Port,
    etcd: Port,
    users: Vec<(User, String)>,
    programs: Programs,
}

impl Cluster {
    /// The cluster of this test binary, with default options; the first caller starts it.
    ///
    /// # Panics
    /// When it does not start, with its programs' last words for the first caller.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Option<Cluster>> = OnceLock::new();
        // A second try would take as long, and fail as well.
        let start = || catch_unwind(|| Self::start(ClusterOptions::default())).ok();
        let started = SHARED.get_or_init(start).as_ref();
        started.expect("the shared cluster starts; the first test that wanted it says why")
    }

    /// Starts a cluster of its own, for a test that stops its programs or needs other options, and
    /// waits until it is ready: some seconds.
    ///
    /// # Panics
    /// When it does not start, with its programs' last words.
    pub fn start(options: ClusterOptions) -> Self {
        let tools = tools(&options);
        let folder = tempfile::Builder::new()
            .prefix("ambient-cluster-")
            .tempdir()
            .expect("a temporary folder can be made")
            .keep();
        let own = [ADMIN, CONTROL_PLANE, NOBODY, CONTROLLER_MANAGER, SCHEDULER];
        let users = own.iter().chain(&options.users).copied();
        let mut cluster = Self {
            // First, so that the folder goes if anything below fails.
            programs: Programs::new(tools, &folder),
            api: Port::hold(options.bind),
            etcd: Port::hold(Ipv4Addr::LOCALHOST),
            users: users.map(|it| (it, Uuid::new_v4().to_string())).collect(),
            folder,
            options,
        };
        cluster.write_files();
        cluster.start_programs();
        cluster
    }

    /// URL of the API server.
    pub fn url(&self) -> String {
        format!("https://{}", self.address())
    }

    /// Address of the API server.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((self.options.advertise, self.api.number()))
    }

    /// PEM of the certificate that signed the API server's.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    /// Its folder: logs of its programs, certificates, kubeconfig files. Whatever runs in it (by its
    /// working directory) is killed with the cluster.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Path of one of its programs, such as `kubectl`.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.path(name)
    }

    /// The token of one of its users.
    ///
    /// # Panics
    /// When it does not know the user.
    pub fn token(&self, user: User) -> &str {
        let known = self.users.iter().find(|(it, _)| *it == user);
        let (_, token) = known.unwrap_or_else(|| panic!("{user:?} is not in ClusterOptions.users"));
        token
    }

    /// A kubeconfig file for one of its users.
    ///
    /// # Panics
    /// When it does not know the user, or the file cannot be written.
    pub fn kubeconfig(&self, user: User) -> PathBuf {
        self.kubeconfig_with(user.name, self.token(user))
    }

    /// A kubeconfig file for a real `ServiceAccount`, which is made when it is not there; its
    /// namespace must be. For a test whose requests must be told from those of others.
    ///
    /// # Panics
    /// When the API server refuses.
    pub fn service_account(&self, namespace: &str, name: &str) -> PathBuf {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        let made = self.request("POST", &path, Some(&json!({"metadata": {"name": name}})));
        assert!(matches!(made.0, 201 | 409), "service account: {made:?}");
        let (status, token) = self.request(
            "POST",
            &format!("{path}/{name}/token"),
            Some(&json!({"spec": {"expirationSeconds": 36_000}})),
        );
        assert_eq!(status, 201, "token of a service account: {token}");
        let token = token["status"]["token"].as_str().expect("a token");
        self.kubeconfig_with(&format!("{namespace}-{name}"), token)
    }

    fn kubeconfig_with(&self, name: &str, token: &str) -> PathBuf {
        let name = name.replace(':', "-");
        let path = self.folder.join(format!("kubeconfig-{name}"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: '{}', certificate-authority: '{}'}}}}]\n\
             users: [{{name: '{name}', user: {{token: '{token}'}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: '{name}'}}}}]\n",
            self.url(),
            self.ca().display(),
        );
        // The same text each time, but two tests may write it at once, and a third read it.
        let new = self
            .folder
            .join(format!("kubeconfig-{name}.{}", Uuid::new_v4()));
        fs::write(&new, text).expect("disk is there");
        fs::rename(&new, &path).expect("disk is there");
        path
    }

    /// What was asked of the API server so far, in order of the answers, apart from what the
    /// cluster's own programs asked. A watch is there as soon as it was answered.
    pub fn requests(&self) -> Vec<Request> {
        audit::read(&self.folder)
    }

    /// The same piece by piece, from now on, for a log that grows large.
    pub fn new_requests(&self) -> NewRequests {
        NewRequests::open(&self.folder)
    }

    /// Process id of one of its programs, such as `kube-apiserver`.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self, program: &str) -> u32 {
        self.programs.pid(program)
    }

    /// Ends kube-apiserver as a crash does; its port then refuses connections. Not for the shared
    /// cluster, which others use.
    ///
    /// # Panics
    /// When it does not run.
    pub fn stop_api_server(&mut self) {
        self.programs.end("kube-apiserver");
    }

    /// Starts kube-apiserver again, at the same address and with all objects, and waits until it is
    /// ready.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_api_server(&mut self) {
        let arguments = self.api_server_arguments();
        self.programs.run("kube-apiserver", &arguments);
        self.wait_until("kube-apiserver", |it| {
            it.get("/api/v1/namespaces/default").is_some() && it.is_ready()
        });
    }

    /// Lets kube-apiserver hang: connections stay open and are made, nothing is answered.
    ///
    /// # Panics
    /// When it does not run.
    pub fn freeze_api_server(&mut self) {
        self.programs.signal("kube-apiserver", Signal::SIGSTOP);
    }

    /// Ends [`Self::freeze_api_server`].
    ///
    /// # Panics
    /// When it does not run.
    pub fn thaw_api_server(&mut self) {
        self.programs.signal("kube-apiserver", Signal::SIGCONT);
    }

    fn write_files(&self) {
        let write = |name: &str, text: &str| {
            fs::write(self.folder.join(name), text).expect("disk is there");
        };
        let mut tokens = String::new();
        for (number, (user, token)) in self.users.iter().enumerate() {
            let groups = user.groups.join(",");
            let _ = writeln!(tokens, "{token},{},{number},\"{groups}\"", user.name);
        }
        write("users.csv", &tokens);
        let mut names = vec![
            "localhost".to_owned(),
            "kubernetes".to_owned(),
            "kubernetes.default".to_owned(),
            "kubernetes.default.svc".to_owned(),
            "kubernetes.default.svc.cluster.local".to_owned(),
            Ipv4Addr::LOCALHOST.to_string(),
            arguments::KUBERNETES_SERVICE.to_string(),
        ];
        names.push(self.options.advertise.to_string());
        names.extend_from_slice(&self.options.names);
        names.sort();
        names.dedup();
        Certificates::make(names).write(&self.folder);
        write(
            "sa.key",
            &RsaKey::generate(KeySize::Rsa2048).private_pkcs1_pem(),
        );
        write("audit.yaml", audit::POLICY);
        write("curl.conf", &self.curl_config());
    }

    fn start_programs(&mut self) {
        let arguments = self.etcd_arguments();
        self.programs.run("etcd", &arguments);
        self.wait_until("etcd", Self::etcd_is_ready);
        self.start_api_server();
        self.kubeconfig(CONTROLLER_MANAGER);
        let arguments = self.controller_manager_arguments();
        self.programs.run("kube-controller-manager", &arguments);
        if self.options.nodes {
            let arguments = self.scheduler_arguments();
            self.programs.run("kube-scheduler", &arguments);
        }
        self.wait_until("kube-controller-manager", |cluster| {
            // It makes both in each namespace; pods need them.
            let default = "/api/v1/namespaces/default";
            cluster
                .get(&format!("{default}/serviceaccounts/default"))
                .is_some()
                && cluster
                    .get(&format!("{default}/configmaps/kube-root-ca.crt"))
                    .is_some()
        });
    }
}
