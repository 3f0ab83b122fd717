//! Against a server that answers as told.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use ambient_shared::telemetry::MetricsPage;
use ambient_testing::DEADLINE;
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse as _, Response},
};
use futures_util::{StreamExt as _, future::join_all};
use http::{HeaderMap, StatusCode, header};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchParams},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};

use super::*;

/// What the server does with a request.
#[derive(Clone)]
enum Act {
    /// This status, with `Retry-After` if there is a number.
    Refuse(u16, Option<u64>),
    /// 401 unless this is the bearer token.
    Demand(&'static str),
}

struct Seen {
    acts: Mutex<VecDeque<Act>>,
    headers: Mutex<Vec<HeaderMap>>,
    running: AtomicUsize,
    most: AtomicUsize,
    /// Answers about objects named `held` wait for a permit of this.
    gate: Semaphore,
}

struct Server {
    seen: Arc<Seen>,
    address: SocketAddr,
    folder: TempDir,
    _running: JoinSet<()>,
}

impl Server {
    async fn start(acts: impl IntoIterator<Item = Act>) -> Self {
        let seen = Arc::new(Seen {
            acts: Mutex::new(acts.into_iter().collect()),
            headers: Mutex::default(),
            running: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            gate: Semaphore::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(answer).with_state(Arc::clone(&seen));
        let mut running = JoinSet::new();
        running.spawn(async move { axum::serve(listener, app).await.unwrap() });
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("token"), "first\n").unwrap();
        let server = Self {
            seen,
            address,
            folder,
            _running: running,
        };
        server.write_kubeconfig("kubeconfig", &format!("http://{address}"), "");
        server
    }

    fn write_kubeconfig(&self, name: &str, url: &str, cluster: &str) {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             clusters: [{{name: c, cluster: {{server: '{url}'{cluster}}}}}]\n\
             users: [{{name: u, user: {{tokenFile: '{}'}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
            self.path("token").display()
        );
        std::fs::write(self.path(name), text).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn settings(&self) -> ClusterSettings {
        ClusterSettings {
            kubeconfig: Some(self.path("kubeconfig")),
            project_token_file: None,
        }
    }

    async fn objects(&self) -> Api<ConfigMap> {
        Api::namespaced(
            connect(&self.settings(), Fence::open()).await.unwrap().own,
            "here",
        )
    }

    fn requests(&self) -> usize {
        self.seen.headers.lock().unwrap().len()
    }

    fn header(&self, request: usize, name: header::HeaderName) -> String {
        let headers = self.seen.headers.lock().unwrap();
        headers[request][name].to_str().unwrap().to_owned()
    }
}

async fn answer(State(seen): State<Arc<Seen>>, request: Request) -> Response {
    seen.headers.lock().unwrap().push(request.headers().clone());
    if request
        .uri()
        .query()
        .is_some_and(|query| query.contains("watch=true"))
    {
        let open = futures_util::stream::pending::<Result<Vec<u8>, std::io::Error>>();
        return Response::new(Body::from_stream(open));
    }
    let running = seen.running.fetch_add(1, Ordering::SeqCst) + 1;
    seen.most.fetch_max(running, Ordering::SeqCst);
    if request.uri().path().ends_with("/held") {
        seen.gate.acquire().await.unwrap().forget();
    }
    seen.running.fetch_sub(1, Ordering::SeqCst);
    let act = seen.acts.lock().unwrap().pop_front();
    match act {
        None => object(),
        Some(Act::Refuse(status, after)) => {
            let status = StatusCode::from_u16(status).unwrap();
            let after = after.map(|after| [(header::RETRY_AFTER, after.to_string())]);
            match after {
                Some(after) => (status, after).into_response(),
                None => status.into_response(),
            }
        }
        Some(Act::Demand(token)) => {
            let sent = &request.headers()[header::AUTHORIZATION];
            if *sent == format!("Bearer {token}") {
                object()
            } else {
                StatusCode::UNAUTHORIZED.into_response()
            }
        }
    }
}

fn object() -> Response {
    axum::Json(serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "it", "namespace": "here"},
    }))
    .into_response()
}

fn code(error: &kube::Error) -> u16 {
    match error {
        kube::Error::Api(status) => status.code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_busy_server_is_asked_again_after_the_time_that_it_named() {
    let server = Server::start([Act::Refuse(429, Some(1))]).await;
    let objects = server.objects().await;

    let began = Instant::now();
    objects
        .create(&PostParams::default(), &ConfigMap::default())
        .await
        .unwrap();

    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.requests(), 2);
    let agent = server.header(1, header::USER_AGENT);
    assert!(agent.starts_with("ambient-control-plane/"), "{agent}");
    assert_eq!(server.header(1, header::AUTHORIZATION), "Bearer first");
}

#[tokio::test]
async fn a_server_that_stays_busy_is_left_to_the_caller() {
    let busy = std::iter::repeat_n(Act::Refuse(429, Some(0)), 10);
    let server = Server::start(busy).await;

    let error = server.objects().await.get("it").await.unwrap_err();

    assert_eq!(code(&error), 429);
    assert_eq!(server.requests(), 4);
}

#[tokio::test]
async fn a_wait_that_is_too_long_is_left_to_the_caller() {
    let server = Server::start([Act::Refuse(429, Some(3600))]).await;

    let error = server.objects().await.get("it").await.unwrap_err();

    assert_eq!((code(&error), server.requests()), (429, 1));
}

#[tokio::test]
async fn an_object_that_may_have_been_made_is_not_made_again() {
    let unavailable = std::iter::repeat_n(Act::Refuse(503, Some(0)), 2);
    let server = Server::start(unavailable).await;
    let objects = server.objects().await;

    let made = objects
        .create(&PostParams::default(), &ConfigMap::default())
        .await;
    assert_eq!((code(&made.unwrap_err()), server.requests()), (503, 1));

    objects.get("it").await.unwrap();
    assert_eq!(server.requests(), 3);
}

#[tokio::test]
async fn calls_are_bounded_and_watches_do_not_count() {
    let server = Server::start([]).await;
    let objects = server.objects().await;
    let all = WatchParams::default();
    let watches = (0..shares::OWN + 8).map(|_| objects.watch(&all, "0"));
    let watches = timeout(DEADLINE, join_all(watches)).await.unwrap();
    let mut watches: Vec<_> = watches
        .into_iter()
        .map(|watch| watch.unwrap().boxed())
        .collect();

    let opened = server.requests();
    let running = AtomicUsize::new(0);
    let calls = join_all((0..shares::OWN * 3).map(|_| objects.get("held")));
    let release = async {
        let gate = &server.seen.gate;
        while server.seen.running.load(Ordering::SeqCst) < shares::OWN {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.store(server.requests() - opened, Ordering::SeqCst);
        gate.add_permits(shares::OWN * 3);
    };
    let (answers, ()) = timeout(DEADLINE, async { tokio::join!(calls, release) })
        .await
        .unwrap();

    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(running.into_inner(), shares::OWN);
    assert_eq!(server.seen.most.load(Ordering::SeqCst), shares::OWN);
    // And they are still open.
    for watch in &mut watches {
        assert!(futures_util::poll!(watch.next()).is_pending());
    }
}

#[tokio::test]
async fn each_kind_of_work_has_calls_of_its_own() {
    let server = Server::start([]).await;
    let clients = connect(&server.settings(), Fence::open()).await.unwrap();
    let Clients {
        own,
        projects,
        starting,
        ending,
        refresh,
        upkeep,
        watching,
    } = clients;
    let kinds = [own, projects, starting, ending, refresh, upkeep, watching]
        .map(|client| Api::<ConfigMap>::namespaced(client, "here"));
    for hanging in 0..kinds.len() {
        // More than any kind has places for.
        let calls = (0..shares::SUM).map(|_| kinds[hanging].get("held"));
        let calls = join_all(calls);
        tokio::pin!(calls);
        let others = kinds.iter().enumerate().filter(|(it, _)| *it != hanging);
        let others = join_all(others.map(|(_, kind)| kind.get("it")));

        tokio::select! {
            _ = &mut calls => panic!("nothing was held"),
            answers = timeout(DEADLINE, others) => {
                assert!(answers.unwrap().iter().all(Result::is_ok));
            }
        }

        server.seen.gate.add_permits(shares::SUM);
        let answers = timeout(DEADLINE, calls).await.unwrap();
        assert!(answers.iter().all(Result::is_ok));
    }
    assert!(server.seen.most.load(Ordering::SeqCst) < shares::SUM);
}

#[tokio::test]
async fn a_refused_token_is_read_again_at_once() {
    let server = Server::start([
        Act::Demand("first"),
        Act::Demand("second"),
        Act::Demand("second"),
    ])
    .await;
    let objects = server.objects().await;
    objects.get("it").await.unwrap();

    std::fs::write(server.path("token"), "second").unwrap();
    objects.get("it").await.unwrap();
    assert_eq!(server.requests(), 3);
    assert_eq!(server.header(2, header::AUTHORIZATION), "Bearer second");

    // The same token again helps nobody, and a file that is gone does no harm.
    std::fs::remove_file(server.path("token")).unwrap();
    server
        .seen
        .acts
        .lock()
        .unwrap()
        .push_back(Act::Demand("third"));
    let error = objects.get("it").await.unwrap_err();
    assert_eq!((code(&error), server.requests()), (401, 4));
    objects.get("it").await.unwrap();
}

#[tokio::test]
async fn projects_may_have_a_token_of_their_own() {
    let server = Server::start([]).await;
    std::fs::write(server.path("other"), "  theirs\n").unwrap();
    let clients = connect(
        &ClusterSettings {
            project_token_file: Some(server.path("other")),
            ..server.settings()
        },
        Fence::open(),
    )
    .await
    .unwrap();

    for client in [clients.projects, clients.own] {
        Api::<ConfigMap>::namespaced(client, "here")
            .get("it")
            .await
            .unwrap();
    }

    assert_eq!(server.header(0, header::AUTHORIZATION), "Bearer theirs");
    assert_eq!(server.header(1, header::AUTHORIZATION), "Bearer first");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_answers_is_given_up() {
    client::install_crypto_provider();
    let silent = tower::service_fn(|_| std::future::pending());
    let calls = Arc::new(Semaphore::new(1));
    let manners = Manners::new(
        BoxCloneSyncService::new(silent),
        None,
        Arc::clone(&calls),
        Fence::open(),
    );
    let objects: Api<ConfigMap> = Api::namespaced(kube::Client::new(manners, "here"), "here");

    // The second waits for the place of the first.
    let (first, second) = tokio::join!(objects.get("it"), objects.get("it"));

    for error in [first.unwrap_err(), second.unwrap_err()] {
        assert!(error.to_string().contains("no answer within 1m"), "{error}");
    }
    assert_eq!(calls.available_permits(), 1);
}

#[tokio::test]
async fn who_leads_no_more_writes_nothing_and_reads_on() {
    let busy = [Act::Refuse(429, Some(0)), Act::Refuse(429, Some(1))];
    let server = Server::start(busy).await;
    let leads = Arc::new(AtomicBool::new(true));
    let fence = {
        let (leads, seen) = (Arc::clone(&leads), Arc::clone(&server.seen));
        // Lost while a busy server is waited for.
        Fence::new(move || leads.load(Ordering::SeqCst) && seen.headers.lock().unwrap().len() < 2)
    };
    let clients = connect(&server.settings(), fence).await.unwrap();
    let objects: Api<ConfigMap> = Api::namespaced(clients.projects, "here");
    let object = ConfigMap::default();

    let error = objects
        .create(&PostParams::default(), &object)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("not the leader any more"),
        "{error}"
    );
    assert_eq!(server.requests(), 2);

    leads.store(false, Ordering::SeqCst);
    let apply = PatchParams::apply("us");
    let patch = Patch::Apply(&object);
    let (delete, list) = (DeleteParams::default(), ListParams::default());
    let refused = [
        objects
            .replace("it", &PostParams::default(), &object)
            .await
            .err(),
        objects.patch("it", &apply, &patch).await.err(),
        objects.delete("it", &delete).await.err(),
        objects.delete_collection(&delete, &list).await.err(),
    ];
    for error in refused {
        let text = error.unwrap().to_string();
        assert!(text.contains("nothing was written"), "{text}");
    }
    assert_eq!(server.requests(), 2);

    objects.get("it").await.unwrap();
    let own: Api<ConfigMap> = Api::namespaced(clients.own, "here");
    own.create(&PostParams::default(), &object).await.unwrap();
    assert_eq!(server.requests(), 4);
}

#[tokio::test]
async fn every_try_is_counted_by_verb_and_code() {
    let page = MetricsPage::default();
    let _guard = metrics::set_default_local_recorder(&page);
    let server = Server::start([Act::Refuse(429, Some(0))]).await;
    let objects = server.objects().await;
    objects.get("it").await.unwrap();
    let _watch = objects.watch(&WatchParams::default(), "0").await.unwrap();

    let page = page.render();
    for (verb, code) in [("get", 429), ("get", 200), ("watch", 200)] {
        let line = format!(r#"kubernetes_requests_total{{code="{code}",verb="{verb}"}} 1"#);
        assert!(page.contains(&line), "{page}");
    }
    assert!(
        page.contains("kubernetes_request_duration_seconds"),
        "{page}"
    );
}

#[tokio::test]
async fn faults_of_the_settings_are_named() {
    let server = Server::start([]).await;
    let told = async |change: &dyn Fn(&mut ClusterSettings)| {
        let mut settings = server.settings();
        change(&mut settings);
        let error = connect(&settings, Fence::open()).await.unwrap_err();
        let mut text = ambient_shared::exit::report(&error);
        let _ = write!(text, " {error:?}");
        text
    };

    let text = told(&|it| it.kubeconfig = Some("/nowhere/kubeconfig".into())).await;
    assert!(text.contains("/nowhere/kubeconfig"), "{text}");

    let text = told(&|it| it.project_token_file = Some(server.path("missing"))).await;
    assert!(text.contains("missing"), "{text}");

    std::fs::write(server.path("empty"), " \n").unwrap();
    let text = told(&|it| it.project_token_file = Some(server.path("empty"))).await;
    assert!(text.contains("no token in it"), "{text}");

    std::fs::write(server.path("two"), "secret-1\nsecret-2\n").unwrap();
    let text = told(&|it| it.project_token_file = Some(server.path("two"))).await;
    assert!(
        text.contains("no token") && !text.contains("secret-"),
        "{text}"
    );

    let proxy = ", proxy-url: 'http://me:hunter2@proxy.test:3128'";
    server.write_kubeconfig("proxied", "https://kubernetes.test", proxy);
    let text = told(&|it| it.kubeconfig = Some(server.path("proxied"))).await;
    assert!(
        text.contains("proxy.test") && !text.contains("hunter2"),
        "{text}"
    );
}

#[tokio::test]
async fn a_proxy_of_the_kubeconfig_is_used_and_resolves_the_name() {
    let server = Server::start([]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = format!(", proxy-url: 'http://{}'", listener.local_addr().unwrap());
    server.write_kubeconfig("kubeconfig", "http://kubernetes.test:8443", &proxy);
    let target = server.address;
    let mut running = JoinSet::new();
    running.spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            asked.push(client.read_u8().await.unwrap());
        }
        assert!(asked.starts_with(b"CONNECT kubernetes.test:8443 HTTP/1.1"));
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        let mut server = TcpStream::connect(target).await.unwrap();
        let _ = copy_bidirectional(&mut client, &mut server).await;
    });

    timeout(DEADLINE, server.objects().await.get("it"))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn several_kubeconfigs_are_merged() {
    let server = Server::start([]).await;
    std::fs::write(server.path("more"), "apiVersion: v1\nkind: Config\n").unwrap();
    let both = std::env::join_paths([server.path("more"), server.path("kubeconfig")]).unwrap();
    let settings = ClusterSettings {
        kubeconfig: Some(both.into()),
        project_token_file: None,
    };

    let clients = connect(&settings, Fence::open()).await.unwrap();

    Api::<ConfigMap>::namespaced(clients.own, "here")
        .get("it")
        .await
        .unwrap();
}
