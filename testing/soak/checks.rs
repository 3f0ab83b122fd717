//! What must hold once all is calm again.

use std::{collections::HashSet, time::Duration};

use ambient_testing::{cluster::Direct, operator::Operator};
use reqwest::{Method, StatusCode};
use tokio::time::{Instant, sleep};

use crate::findings::Findings;

/// Longest wait until what belongs to nothing is collected.
const LONGEST: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_secs(1);

/// Kinds of objects that sessions have.
const KINDS: [&str; 4] = ["pods", "secrets", "services", "serviceaccounts"];

/// No object without a session; and none at all once all sessions are deleted.
pub async fn nothing_is_left(operator: &Operator, direct: &Direct, findings: &Findings) {
    let there = sessions(operator).await;
    let left = wait(direct, |session| !there.contains(session)).await;
    if !left.is_empty() {
        let what = format!("{}: {:?}", left.len(), &left[..left.len().min(5)]);
        findings.add("objects of sessions that are gone", what);
    }
    for session in &there {
        let path = format!("/sessions/{session}");
        let (status, answer) = operator.request(Method::DELETE, &path, None).await;
        if !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_FOUND) {
            findings.add("a session cannot be deleted", format!("{status}: {answer}"));
        }
    }
    let left = wait(direct, |_| true).await;
    if !left.is_empty() {
        let what = format!("{}: {:?}", left.len(), &left[..left.len().min(5)]);
        findings.add("objects after all sessions were deleted", what);
    }
}

/// Waits until no object is of such a session; gives those that are.
async fn wait(direct: &Direct, of: impl Fn(&str) -> bool) -> Vec<String> {
    let deadline = Instant::now() + LONGEST;
    loop {
        let mut left = Vec::new();
        for kind in KINDS {
            let path = format!("/api/v1/{kind}?labelSelector=ambient-code.io%2Fsession-id");
            let (status, list) = direct
                .ask(Method::GET, &path, None)
                .await
                .expect("Kubernetes answers again");
            assert_eq!(status, 200, "{list}");
            for object in list["items"].as_array().into_iter().flatten() {
                let metadata = &object["metadata"];
                let session = metadata["labels"]["ambient-code.io/session-id"].as_str();
                if of(session.unwrap_or_default()) {
                    let (namespace, name) = (&metadata["namespace"], &metadata["name"]);
                    left.push(format!("{kind} {namespace}/{name}"));
                }
            }
        }
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        sleep(POLL).await;
    }
}

async fn sessions(operator: &Operator) -> HashSet<String> {
    let mut all = HashSet::new();
    for page in 1.. {
        let path = format!("/sessions?size=1000&orderBy=id&page={page}");
        let (status, list) = operator.request(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{list}");
        let items = list["items"].as_array().expect("a list");
        let ids = items.iter().filter_map(|it| it["id"].as_str());
        all.extend(ids.map(ToOwned::to_owned));
        if items.len() < 1000 {
            break;
        }
    }
    all
}
