//! The proxy in front of a real kube-apiserver.

use ambient_testing::{
    DEADLINE,
    cluster::{ADMIN, Cluster, NOBODY},
    kube_proxy::{KubeProxy, asked, expired},
    proxy::{Call, Fault},
};
use reqwest::{Method, Response};
use serde_json::{Value, json};
use tokio::time::timeout;

async fn ask(proxy: &KubeProxy, token: &str, method: Method, path: &str, body: &str) -> Response {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("http://{}{path}", proxy.address());
    let request = client.request(method, url).bearer_auth(token);
    let request = request.header("content-type", "application/json");
    request.body(body.to_owned()).send().await.unwrap()
}

/// The next event of a watch.
async fn event(watch: &mut Response) -> Value {
    let chunk = timeout(DEADLINE, watch.chunk()).await.expect("in time");
    serde_json::from_slice(&chunk.unwrap().expect("an event")).unwrap()
}

fn is_watch(call: &Call) -> bool {
    asked(call).verb == "watch"
}

#[tokio::test(flavor = "multi_thread")]
async fn kubernetes_knows_who_calls_and_its_watches_can_be_broken() {
    let cluster = Cluster::shared();
    cluster.create_namespace("proxied");
    let proxy = KubeProxy::start(cluster).await;
    let kubeconfig = std::fs::read_to_string(proxy.kubeconfig(cluster, NOBODY)).unwrap();
    assert!(kubeconfig.contains(&format!("http://{}", proxy.address())));
    let maps = "/api/v1/namespaces/proxied/configmaps";
    let refused = ask(&proxy, cluster.token(NOBODY), Method::GET, maps, "").await;
    assert_eq!(refused.status(), 403);

    let admin = cluster.token(ADMIN);
    let watched = format!("{maps}?watch=true&fieldSelector=metadata.name=one");
    let mut watch = ask(&proxy, admin, Method::GET, &watched, "").await;
    let made = json!({"metadata": {"name": "one"}}).to_string();
    let answer = ask(&proxy, admin, Method::POST, maps, &made).await;
    assert_eq!(answer.status(), 201);
    assert_eq!(event(&mut watch).await["type"], "ADDED");

    // What happens while it is silent never comes.
    let silent = proxy.inject(usize::MAX, is_watch, Fault::Silent);
    let gone = ask(&proxy, admin, Method::DELETE, &format!("{maps}/one"), "").await;
    assert_eq!(gone.status(), 200);
    drop(silent);
    assert_eq!(proxy.expire_watches(|it| it.resource == "configmaps"), 1);
    let last = event(&mut watch).await;
    assert_eq!(
        (&last["type"], &last["object"]["code"]),
        (&json!("ERROR"), &json!(410))
    );
    assert_eq!(
        timeout(DEADLINE, watch.chunk()).await.unwrap().unwrap(),
        None
    );

    let _expired = proxy.inject(1, is_watch, Fault::Answer(expired()));
    let answer = ask(&proxy, admin, Method::GET, &watched, "").await;
    assert_eq!(answer.status(), 410);
    assert_eq!(answer.json::<Value>().await.unwrap()["reason"], "Expired");
    let calls = proxy.calls();
    let codes = calls.iter().filter_map(|it| it.answered);
    let codes: Vec<u16> = codes.map(|it| it.as_u16()).collect();
    assert_eq!(codes, [403, 200, 201, 200, 410]);
}
