//! The Kubernetes backend on a real etcd, kube-apiserver and kube-controller-manager, under the
//! rights that `rules` gives. No kubelet runs: tests play it.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Deref,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use ambient_control_plane::{
    backend::{
        Agent, Backend, BackendError, Credentials, DesiredRun, Observer, ResourceOverrides, RunEnd,
        RunState, RunStatus,
        kubernetes::{
            KubernetesBackend, ProjectOf, WatchTimes,
            projects::Projects,
            settings::{
                Companions, Images, KubernetesSettings, ModelAccess, Platform, PodSettings,
            },
        },
    },
    cluster::{Clients, ClusterSettings, Fence, connect},
    keypair::id::KeyId,
};
use ambient_shared::{
    client::install_crypto_provider, clock::Clock, proof::SessionRoot, session::SessionId,
    token::Token,
};
use ambient_testing::{
    DEADLINE,
    cluster::{CONTROL_PLANE, Cluster},
};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    permissions,
    scene::{Changes, id, until},
};

mod damage;
mod life;
mod outage;
mod phases;
mod refusals;
mod whole;

/// How often a call is made again that has to wait for something.
const AGAIN: Duration = Duration::from_millis(100);

/// A backend at work.
struct Work {
    backend: Arc<KubernetesBackend>,
    /// Those of the API server, with their projects.
    sessions: Sessions,
    changes: Changes,
    /// Cancelled when another replica leads.
    leading: CancellationToken,
    shutdown: CancellationToken,
    running: JoinSet<()>,
}

/// A backend at work on the shared cluster.
struct Scene {
    cluster: &'static Cluster,
    work: Work,
}

impl Deref for Scene {
    type Target = Work;

    fn deref(&self) -> &Work {
        &self.work
    }
}

/// What the API server has: sessions and their projects.
type Sessions = Arc<Mutex<HashMap<SessionId, String>>>;

/// Settings of an installation of its own, so that tests on one cluster keep apart.
fn settings(installation: &str) -> KubernetesSettings {
    KubernetesSettings {
        namespace: installation.to_owned(),
        platform: Platform::Standard,
        images: Images {
            agent: Some("agent:1".to_owned()),
            runner: Some("runner:1".to_owned()),
            sidecar: Some("sidecar:1".to_owned()),
            ..Images::default()
        },
        overlay: None,
        upstream: "http://api:8000".to_owned(),
        grpc_upstream: "http://api:8001".to_owned(),
        model_access: ModelAccess::default(),
        companions: Companions::default(),
        pods: PodSettings::default(),
    }
}

/// The shared cluster, where the control plane has its rights.
fn shared() -> &'static Cluster {
    let cluster = Cluster::shared();
    permissions::grant(cluster);
    cluster
}

/// How a backend reaches its cluster, and how long it watches.
struct Access {
    kubeconfig: PathBuf,
    times: WatchTimes,
}

impl From<&Cluster> for Access {
    fn from(cluster: &Cluster) -> Self {
        Self {
            kubeconfig: cluster.kubeconfig(CONTROL_PLANE),
            times: WatchTimes::default(),
        }
    }
}

async fn clients(kubeconfig: PathBuf) -> Clients {
    install_crypto_provider();
    let access = ClusterSettings {
        kubeconfig: Some(kubeconfig),
        project_token_file: None,
    };
    connect(&access, Fence::open()).await.unwrap()
}

impl Work {
    /// A backend that is told of sessions by hand, once it has seen what there is.
    async fn start(
        access: impl Into<Access>,
        settings: KubernetesSettings,
        sessions: &Sessions,
    ) -> Self {
        let changes = Changes::default();
        let observer: Observer = {
            let changes = Arc::clone(&changes);
            Arc::new(move |_| changes.notify_waiters())
        };
        let project_of: ProjectOf = {
            let sessions = Arc::clone(sessions);
            Arc::new(move |id| sessions.lock().unwrap().get(id).cloned())
        };
        let mut work = Self::open(access, settings, project_of, observer).await;
        work.changes = changes;
        work.sessions = Arc::clone(sessions);
        work
    }

    async fn open(
        access: impl Into<Access>,
        settings: KubernetesSettings,
        project_of: ProjectOf,
        observer: Observer,
    ) -> Self {
        let Access { kubeconfig, times } = access.into();
        let clients = clients(kubeconfig).await;
        let settings = Arc::new(settings);
        let projects = Arc::new(Projects::new(clients.clone(), Arc::clone(&settings)));
        let clock = Clock::system();
        let (backend, tasks) =
            KubernetesBackend::new(&clients, settings, projects, project_of, observer, clock);
        let shutdown = CancellationToken::new();
        let leading = shutdown.child_token();
        let mut running = JoinSet::new();
        let run = tasks.with_watch_times(times).run(shutdown.clone());
        let backend = Arc::new(backend);
        running.spawn({
            let (backend, leading) = (Arc::clone(&backend), leading.clone());
            async move {
                let ((), ended) = tokio::join!(backend.repair(leading), run);
                ended.unwrap();
            }
        });
        assert!(backend.synced(DEADLINE).await, "not synced");
        Self {
            backend,
            sessions: Sessions::default(),
            changes: Changes::default(),
            leading,
            shutdown,
            running,
        }
    }

    async fn stop(mut self) {
        self.shutdown.cancel();
        let ended = timeout(DEADLINE, self.running.join_next()).await;
        ended.unwrap().unwrap().unwrap();
    }

    /// Starts a run, as often as the controller would: until the one before it has ended, and what
    /// is in its namespace was seen.
    async fn started(&self, run: &DesiredRun) {
        let started = self.settled(run).await;
        assert!(started.is_ok(), "not started: {started:?}");
    }

    /// How a start ends that waits for nothing any more.
    async fn settled(&self, run: &DesiredRun) -> Result<(), BackendError> {
        let starting = async {
            loop {
                match self.try_start(run).await {
                    Err(
                        BackendError::StillEnding
                        | BackendError::Refused {
                            reason: "NamespaceUnreadable" | "RightsMissing",
                            ..
                        },
                    ) => sleep(AGAIN).await,
                    settled => return settled,
                }
            }
        };
        timeout(DEADLINE, starting).await.expect("it is settled")
    }

    async fn try_start(&self, run: &DesiredRun) -> Result<(), BackendError> {
        self.knows(run);
        self.backend.start(run, &credentials(&run.id, 900)).await
    }

    /// The API server has this run's session.
    fn knows(&self, run: &DesiredRun) {
        let mut sessions = self.sessions.lock().unwrap();
        sessions.insert(run.id.clone(), run.project.clone());
    }

    /// Removes a session that was deleted.
    async fn removed(&self, id: &SessionId) {
        self.sessions.lock().unwrap().remove(id);
        let removing = async {
            while let Err(error) = self.backend.remove(id).await {
                let is_ending = matches!(error, BackendError::StillEnding);
                assert!(is_ending, "not removed: {error:?}");
                sleep(AGAIN).await;
            }
        };
        timeout(DEADLINE, removing).await.expect("it is removed");
    }

    async fn until(&self, what: &str, is_so: impl Fn() -> bool) {
        until(&self.changes, what, is_so).await;
    }

    async fn until_run(&self, run: &DesiredRun, what: &str, is_so: impl Fn(&RunStatus) -> bool) {
        let last = Mutex::new(None);
        let seen = timeout(
            DEADLINE,
            self.until(what, || {
                let state = self.backend.run_state(&run.id);
                let is_it = state.as_ref().is_some_and(|state| is_so(&state.status));
                *last.lock().unwrap() = state;
                is_it
            }),
        );
        assert!(seen.await.is_ok(), "not seen: {what}, but {last:?}");
    }

    fn state(&self, run: &DesiredRun) -> Option<RunState> {
        self.backend.run_state(&run.id)
    }
}

impl Scene {
    /// A backend of this installation.
    async fn start(installation: &str) -> Self {
        Self::with(settings(installation), &Sessions::default()).await
    }

    async fn with(settings: KubernetesSettings, sessions: &Sessions) -> Self {
        let cluster = shared();
        Self {
            cluster,
            work: Work::start(cluster, settings, sessions).await,
        }
    }

    async fn stop(self) {
        self.work.stop().await;
    }

    /// Gives the run's pod to a node and lets its agent run.
    fn runs(&self, run: &DesiredRun) {
        self.bind(run);
        self.set_status(run, running());
    }

    /// Gives the run's pod to a node: from now on only its kubelet can end it.
    fn bind(&self, run: &DesiredRun) {
        bind(self.cluster, run);
    }

    fn set_status(&self, run: &DesiredRun, status: Value) {
        set_status(self.cluster, run, status);
    }

    /// As its kubelet does at the end of a pod's grace period.
    fn finish(&self, run: &DesiredRun) {
        self.cluster.finish_pod(&run.project, &name(run, "-runner"));
    }

    fn pod(&self, run: &DesiredRun) -> Option<Value> {
        self.cluster.get(&path(run, "pods", "-runner"))
    }

    fn secret(&self, run: &DesiredRun) -> Option<Value> {
        self.cluster.get(&path(run, "secrets", "-creds"))
    }

    /// Waits for an Event on the run's pod.
    async fn until_event(&self, run: &DesiredRun, reason: &str) {
        let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", run.project);
        let pod = name(run, "-runner");
        self.until(reason, || {
            let events = self.cluster.get(&path).unwrap_or_default();
            let mut events = events["items"].as_array().into_iter().flatten();
            events.any(|it| it["reason"] == reason && it["regarding"]["name"] == pod.as_str())
        })
        .await;
    }
}

fn bind(cluster: &Cluster, run: &DesiredRun) {
    cluster.add_node("kubernetes-tests");
    let pod = name(run, "-runner");
    cluster.bind_pod(&run.project, &pod, "kubernetes-tests");
}

fn set_status(cluster: &Cluster, run: &DesiredRun, status: Value) {
    let pod = name(run, "-runner");
    cluster.set_pod_status(&run.project, &pod, status);
}

/// A run of a session in a project, the first one.
fn run(session: &str, project: &str) -> DesiredRun {
    DesiredRun {
        id: id(session),
        generation: 0,
        name: "a session".to_owned(),
        project: project.to_owned(),
        agent: Agent::Command {
            command: vec!["agent".to_owned()],
            image: None,
        },
        environment: BTreeMap::from([("SESSION_ID".to_owned(), session.to_owned())]),
        resources: ResourceOverrides::default(),
        keypair: KeyId::from_bytes([1; 8]),
    }
}

fn again(run: &DesiredRun, generation: u32) -> DesiredRun {
    DesiredRun {
        generation,
        ..run.clone()
    }
}

/// A new token that lives so many seconds.
fn credentials(id: &SessionId, life: u64) -> Credentials {
    let expires_at = now() + Duration::from_secs(life);
    let text = format!("token-{}", uuid::Uuid::new_v4());
    Credentials {
        token: Token::new(&text, Some(expires_at)).unwrap(),
        session_key: SessionRoot::new([7; 32]).session_key(id),
        root: KeyId::from_bytes([2; 8]),
        generation: 0,
    }
}

fn now() -> SystemTime {
    Clock::system().now()
}

/// Names by the contract: this run's prefix and an ending.
fn name(run: &DesiredRun, ending: &str) -> String {
    let short: String = run.id.as_str().chars().take(40).collect();
    format!("session-{}{ending}", short.to_lowercase())
}

fn path(run: &DesiredRun, resource: &str, ending: &str) -> String {
    format!(
        "/api/v1/namespaces/{}/{resource}/{}",
        run.project.to_lowercase(),
        name(run, ending)
    )
}

/// All objects of a run.
fn paths(run: &DesiredRun) -> [String; 4] {
    [
        path(run, "serviceaccounts", "-sa"),
        path(run, "secrets", "-creds"),
        path(run, "services", ""),
        path(run, "pods", "-runner"),
    ]
}

/// A status in which the agent's container is in this state.
fn agent(phase: &str, state: &Value) -> Value {
    let is_ready = state.get("running").is_some();
    json!({
        "phase": phase,
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": if is_ready { "True" } else { "False" }},
        ],
        "containerStatuses": [{
            "name": "ambient-code-runner", "ready": is_ready, "started": is_ready, "state": state,
            "image": "agent:1", "imageID": "", "restartCount": 0,
        }],
    })
}

fn running() -> Value {
    agent(
        "Running",
        &json!({"running": {"startedAt": "2026-01-01T00:00:00Z"}}),
    )
}

fn ended(code: i32, reason: &str, message: &str) -> Value {
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    agent(
        phase,
        &json!({"terminated": {
            "exitCode": code, "reason": reason, "message": message,
            "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:01:00Z",
        }}),
    )
}

/// Whether a run was ended for this reason.
fn was_killed(status: &RunStatus, wanted: &str) -> bool {
    matches!(status, RunStatus::Ended { end: RunEnd::Killed(it), .. } if it.reason == wanted)
}

fn is_running(status: &RunStatus) -> bool {
    matches!(status, RunStatus::Running { .. })
}

/// Why a start was refused: for now, or for ever.
fn refusal(result: &Result<(), BackendError>) -> String {
    match result {
        Err(BackendError::Impossible { reason, .. }) => format!("impossible: {reason}"),
        Err(BackendError::Refused { reason, .. }) => format!("refused: {reason}"),
        other => panic!("{other:?}"),
    }
}
