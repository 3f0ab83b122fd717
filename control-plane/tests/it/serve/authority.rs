//! The authority of the token port changes while the program runs.

use std::fs;

use ambient_shared::swap::write_atomic;
use ambient_testing::cluster::Cluster;
use serde_json::Value;

use crate::{
    faults::site::{Session, Site},
    permissions,
};

fn certificate() -> String {
    let pair = rcgen::generate_simple_self_signed(["cp.example".to_owned()]);
    pair.unwrap().cert.pem()
}

/// What the runner of a session is told to trust.
async fn given(session: &Session<'_>) -> String {
    let site = session.site;
    let pod = site
        .wait_for(&session.pod(), |pod| pod["metadata"]["uid"].is_string())
        .await;
    let of_runner = |it: &&Value| it["name"] == "ambient-code-runner";
    let containers = pod["spec"]["containers"].as_array().unwrap();
    let runner = containers.iter().find(of_runner).unwrap();
    let variables = runner["env"].as_array().unwrap();
    let of_ca = |it: &&Value| it["name"] == "AMBIENT_CP_TOKEN_CA";
    let variable = variables.iter().find(of_ca).unwrap();
    variable["value"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_starts_is_told_of_the_authority_of_now() {
    let cluster = Cluster::shared();
    permissions::grant(cluster);
    let site = Site::new("serve-authority").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.crt");
    let (first, second) = (certificate(), certificate());
    fs::write(&file, &first).unwrap();
    let program = site.program().env("CP_TOKEN_CA_FILE", &file);
    let _program = program
        .env("CP_TOKEN_URL", "https://cp.example/token")
        .start();
    site.create_project().await;
    assert_eq!(given(&site.create().await).await, first);

    write_atomic(&file, second.as_bytes(), 0o644).unwrap();
    assert_eq!(given(&site.create().await).await, second);

    // What cannot be used is given to nobody.
    write_atomic(&file, b"no certificate", 0o644).unwrap();
    assert_eq!(given(&site.create().await).await, second);
}
