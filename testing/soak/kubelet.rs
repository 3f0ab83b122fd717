//! Ends the pods that are to be deleted, as a kubelet does: each by its uid.

use std::time::Duration;

use ambient_testing::cluster::{Direct, Kind};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Time between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// Ends pods until `quit`. What fails is tried again at the next look.
pub async fn end_pods(direct: Direct, quit: CancellationToken) {
    let ending = async {
        loop {
            if let Ok((200, pods)) = direct.ask(Method::GET, "/api/v1/pods", None).await {
                for pod in pods["items"].as_array().into_iter().flatten() {
                    end(&direct, &pod["metadata"]).await;
                }
            }
            sleep(PAUSE).await;
        }
    };
    quit.run_until_cancelled(ending).await;
}

async fn end(direct: &Direct, pod: &Value) {
    let (Some(namespace), Some(name), Some(_)) = (
        pod["namespace"].as_str(),
        pod["name"].as_str(),
        pod["deletionTimestamp"].as_str(),
    ) else {
        return;
    };
    let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
    let options = json!({"gracePeriodSeconds": 0, "preconditions": {"uid": pod["uid"]}});
    let body = Some((Kind::Json, &options));
    let _ = direct.ask(Method::DELETE, &path, body).await;
}
