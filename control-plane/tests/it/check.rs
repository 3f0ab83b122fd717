//! `check` against real servers, whole and broken.

use ambient_api_server::{Server, Settings};
use ambient_control_plane::{
    check::{CheckSettings, Outcome, Report, check},
    cluster::ClusterSettings,
    settings::IssuerSettings,
};
use ambient_shared::{client::GrpcAddress, clock::Clock};
use ambient_testing::{
    cluster::{CONTROL_PLANE, NOBODY, User},
    idp::{CLIENT_ID, Idp},
    programs::Program,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::permissions;

const TOKEN: &str = "service-token";

/// An API server, and settings that lead to it and to the cluster.
struct Scene {
    settings: CheckSettings,
    _running: JoinSet<()>,
}

impl Scene {
    async fn start(user: User) -> Self {
        let server = Settings {
            api_token: Some(TOKEN.to_owned().into()),
            ..Settings::default()
        };
        let server = Server::bind(server, Clock::system()).await.unwrap();
        let (rest, grpc) = (server.rest_address(), server.grpc_address());
        let mut running = JoinSet::new();
        running.spawn(async move { server.run(CancellationToken::new()).await.unwrap() });
        let kubeconfig =
            tokio::task::spawn_blocking(move || permissions::quiet_cluster().kubeconfig(user));
        let settings = CheckSettings {
            api_url: format!("http://{rest}").parse().unwrap(),
            grpc: GrpcAddress {
                address: grpc.to_string(),
                tls: false,
                ca: None,
            },
            own: IssuerSettings::Static {
                token: TOKEN.to_owned().into(),
            },
            cluster: ClusterSettings {
                kubeconfig: Some(kubeconfig.await.unwrap()),
                project_token_file: None,
            },
            rules: permissions::full(),
        };
        Self {
            settings,
            _running: running,
        }
    }

    async fn check(&self) -> Report {
        check(&self.settings, &Clock::system()).await
    }
}

fn details(report: &Report, name: &str, outcome: Outcome) -> String {
    let rows = report.rows.iter();
    let matching: Vec<_> = rows
        .filter(|row| row.name == name && row.outcome == outcome)
        .map(|row| row.detail.as_str())
        .collect();
    assert!(!matching.is_empty(), "no {outcome:?} {name} in\n{report}");
    matching.join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn all_is_well() {
    let _quiet = permissions::quiet().await;
    let scene = Scene::start(CONTROL_PLANE).await;

    let report = scene.check().await;

    assert!(report.is_ok(), "{report}");
    assert_eq!(report.exit_code(), 0);
    details(&report, "API token", Outcome::Ok);
    details(&report, "API server REST", Outcome::Ok);
    details(&report, "API server gRPC", Outcome::Ok);
    assert!(details(&report, "Kubernetes API", Outcome::Ok).contains("version 1."));
    assert!(details(&report, "keys", Outcome::Ok).contains("ambient-cp-token-keypair"));
    assert!(!report.to_string().contains(TOKEN));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_missing_right_is_named() {
    let _quiet = permissions::quiet().await;
    let scene = Scene::start(NOBODY).await;

    let report = scene.check().await;

    assert_eq!(report.exit_code(), 69);
    let missing = details(&report, "permissions", Outcome::Failed);
    for right in [
        "may not create namespaces in the whole cluster",
        "may not get secrets ambient-cp-session-root in namespace ambient-code",
        "may not bind clusterroles.rbac.authorization.k8s.io ambient-session-manager",
    ] {
        assert!(missing.contains(right), "{report}");
    }
    assert!(missing.contains("ambient-control-plane rules"));
    let keys = details(&report, "keys", Outcome::Failed);
    assert!(keys.contains("forbidden"), "{keys}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_reached_says_which_setting() {
    let _quiet = permissions::quiet().await;
    let mut scene = Scene::start(CONTROL_PLANE).await;
    // Nothing listens there: a port below 1024 that the system hands to nobody.
    scene.settings.api_url = "http://127.0.0.1:1".parse().unwrap();
    scene.settings.grpc.address = "127.0.0.1:1".to_owned();
    scene.settings.cluster.kubeconfig = Some("/nowhere/kubeconfig".into());

    let report = scene.check().await;

    let rest = details(&report, "API server REST", Outcome::Failed);
    assert!(rest.contains("AMBIENT_API_SERVER_URL"), "{rest}");
    let grpc = details(&report, "API server gRPC", Outcome::Failed);
    assert!(grpc.contains("AMBIENT_GRPC_SERVER_ADDR"), "{grpc}");
    let cluster = details(&report, "Kubernetes API", Outcome::Failed);
    assert!(cluster.contains("/nowhere/kubeconfig"), "{cluster}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_nobody_takes_is_seen() {
    let _quiet = permissions::quiet().await;
    let mut scene = Scene::start(CONTROL_PLANE).await;
    let idp = Idp::start().await;
    scene.settings.own = IssuerSettings::Oidc {
        url: idp.token_url().parse().unwrap(),
        client_id: CLIENT_ID.to_owned(),
        client_secret: "wrong-secret".to_owned().into(),
    };
    let report = scene.check().await;
    let refused = details(&report, "API token", Outcome::Failed);
    assert!(refused.contains("OIDC_CLIENT_SECRET"), "{refused}");
    assert!(!report.to_string().contains("wrong-secret"));
    details(&report, "API server gRPC", Outcome::Failed);

    // One that REST refuses, as an existing API server's does with a static one.
    scene.settings.own = IssuerSettings::Static {
        token: "another".to_owned().into(),
    };
    let report = scene.check().await;
    let rest = details(&report, "API server REST", Outcome::Note);
    assert!(rest.contains("gRPC"), "{rest}");
    details(&report, "API server gRPC", Outcome::Failed);
}

#[tokio::test]
async fn the_verb_prints_the_table_and_says_by_its_exit_code() {
    let mut program = Program::new("ambient-control-plane")
        .arg("check")
        .env("AMBIENT_API_TOKEN", TOKEN)
        .env("AMBIENT_API_SERVER_URL", "http://127.0.0.1:1")
        .env("AMBIENT_GRPC_SERVER_ADDR", "127.0.0.1:1")
        .env("KUBECONFIG", "/nowhere/kubeconfig")
        .start();

    let status = program.wait().await;

    assert_eq!(status.code(), Some(69), "{:?}", program.log());
    let table = program.output();
    assert!(table[0].starts_with("CHECK "), "{table:#?}");
    assert_eq!(table.len(), 5, "{table:#?}");
    assert!(
        table[4].starts_with("Kubernetes API   failed"),
        "{table:#?}"
    );
}
