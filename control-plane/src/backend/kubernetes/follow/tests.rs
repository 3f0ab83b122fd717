use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};

use super::*;

/// An API server that gives these answers, one after the other, and then hangs.
#[derive(Clone, Default)]
struct Script {
    answers: Arc<Mutex<VecDeque<(u16, String)>>>,
    asked: Arc<Mutex<Vec<(Instant, String)>>>,
}

impl Script {
    fn of(answers: impl IntoIterator<Item = (u16, String)>) -> Self {
        let script = Self::default();
        script.answers.lock().unwrap().extend(answers);
        script
    }

    fn client(&self) -> kube::Client {
        let script = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let script = script.clone();
            async move {
                let uri = request.uri().to_string();
                script.asked.lock().unwrap().push((Instant::now(), uri));
                let answer = script.answers.lock().unwrap().pop_front();
                let Some((status, body)) = answer else {
                    return std::future::pending().await;
                };
                let response = Response::builder().status(status);
                let response = response.body(Full::new(Bytes::from(body))).unwrap();
                Ok::<_, Infallible>(response)
            }
        });
        kube::Client::new(service, "team")
    }

    /// The queries so far, without what is the same in all.
    fn asked(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        let short = |uri: &String| {
            let url = url::Url::parse(&format!("http://api{uri}")).unwrap();
            let said = url.query_pairs().filter(|(name, value)| {
                let is_usual = *value == *"a=b";
                match name.as_ref() {
                    "watch" | "continue" | "resourceVersion" => true,
                    "labelSelector" => !is_usual,
                    _ => false,
                }
            });
            let said: Vec<_> = said
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            said.join("&")
        };
        asked.iter().map(|(_, uri)| short(uri)).collect()
    }

    /// Follows until so many things have happened.
    async fn follow(&self, count: usize) -> Vec<String> {
        self.follow_with(None, count).await
    }

    async fn follow_with(&self, strays: Option<&str>, count: usize) -> Vec<String> {
        let follower = Follower {
            api: Api::<ConfigMap>::namespaced(self.client(), "team"),
            selector: "a=b".to_owned(),
            strays: strays.map(ToOwned::to_owned),
            kind: "configmaps",
            namespace: "team".to_owned(),
            times: WatchTimes::default(),
        };
        let (sender, mut happened) = mpsc::channel(100);
        let name = |object: &ConfigMap| object.metadata.name.clone().unwrap();
        let tell = move |happened| {
            let text = match happened {
                Happened::Listed(names, version) => format!("{}@{version}", names.join(",")),
                Happened::Applied(name) => format!("+{name}"),
                Happened::Deleted(name) => format!("-{name}"),
                Happened::Reached(version) => format!("@{version}"),
                Happened::Failed => "failed".to_owned(),
            };
            sender.try_send(text).unwrap();
        };
        let mut all = Vec::new();
        let collecting = async {
            while all.len() < count {
                all.push(happened.recv().await.unwrap());
            }
        };
        tokio::select! {
            () = follower.run(name, tell) => {}
            done = timeout(Duration::from_secs(3600), collecting) => {
                assert!(done.is_ok(), "{:?}", self.asked());
            }
        }
        all
    }
}

fn list(version: &str, next: &str, names: &[&str]) -> (u16, String) {
    let items: Vec<Value> = names
        .iter()
        .map(|name| json!({"metadata": {"name": name, "resourceVersion": "1"}}))
        .collect();
    let list = json!({
        "kind": "ConfigMapList", "apiVersion": "v1",
        "metadata": {"resourceVersion": version, "continue": next},
        "items": items,
    });
    (200, list.to_string())
}

fn events(events: &[Value]) -> (u16, String) {
    let lines: Vec<String> = events.iter().map(|event| format!("{event}\n")).collect();
    (200, lines.concat())
}

fn event(kind: &str, name: &str, version: &str) -> Value {
    json!({"type": kind, "object": {
        "kind": "ConfigMap", "apiVersion": "v1",
        "metadata": {"name": name, "resourceVersion": version},
    }})
}

fn refusal(code: u16) -> (u16, String) {
    (code, status(code).to_string())
}

fn status(code: u16) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "no",
        "reason": "Reason", "code": code, "metadata": {},
    })
}

#[tokio::test(start_paused = true)]
async fn a_list_comes_in_pages_and_a_watch_goes_on_where_it_ended() {
    let script = Script::of([
        list("7", "next", &["a", "b"]),
        list("7", "", &["c"]),
        events(&[event("ADDED", "d", "8"), event("DELETED", "a", "9")]),
        events(&[event("BOOKMARK", "", "20")]),
        events(&[event("MODIFIED", "d", "21")]),
    ]);

    let happened = script.follow(5).await;

    assert_eq!(happened, ["a,b,c@7", "+d", "-a", "@20", "+d"]);
    assert_eq!(
        script.asked()[..5],
        [
            "",
            "continue=next",
            "watch=true&resourceVersion=7",
            "watch=true&resourceVersion=9",
            "watch=true&resourceVersion=20",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_list_has_strays_and_the_watch_begins_where_the_list_was_taken() {
    let script = Script::of([
        list("7", "", &["a"]),
        list("8", "next", &["b"]),
        list("8", "", &["c"]),
        events(&[event("ADDED", "b", "9")]),
    ]);

    let happened = script.follow_with(Some("a!=b"), 2).await;

    assert_eq!(happened, ["a,b,c@7", "+b"]);
    assert_eq!(
        script.asked()[..4],
        [
            "",
            "labelSelector=a!=b",
            "labelSelector=a!=b&continue=next",
            "watch=true&resourceVersion=7",
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_api_server_has_forgotten_is_listed_again() {
    let expired = json!({"type": "ERROR", "object": status(410)});
    let script = Script::of([
        list("7", "", &["a"]),
        events(&[event("ADDED", "b", "8"), expired]),
        list("30", "", &["b"]),
        refusal(410),
        // A page that is asked for too late.
        list("40", "next", &["b"]),
        refusal(410),
        list("50", "", &["c"]),
    ]);

    let happened = script.follow(4).await;

    assert_eq!(happened, ["a@7", "+b", "b@30", "c@50"]);
}

#[tokio::test(start_paused = true)]
async fn failures_are_tried_again_ever_more_slowly() {
    let mut answers: Vec<_> = (0..12).map(|_| refusal(403)).collect();
    answers.push(list("7", "", &["a"]));
    let script = Script::of(answers);
    let began = Instant::now();

    let happened = script.follow(13).await;

    assert_eq!(happened[11..], ["failed", "a@7"]);
    assert!(script.asked().iter().take(13).all(String::is_empty));
    let took = began.elapsed();
    // With full jitter: 12 waits, each a part of up to 30 s.
    assert!(took > Duration::from_secs(15), "{took:?}");
    assert!(took < AGAIN.max * 12, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_for_long_is_no_busy_loop() {
    let mut answers = Vec::new();
    for _ in 0..10 {
        answers.push(list("7", "", &["a"]));
        answers.extend((0..3).map(|_| refusal(403)));
    }
    let script = Script::of(answers);
    let began = Instant::now();

    script.follow(40).await;

    assert!(
        began.elapsed() > Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_says_nothing_is_opened_again() {
    let script = Script::of([list("7", "", &["a"]), (200, String::new())]);
    let following = script.follow(2);
    assert!(timeout(Duration::from_secs(2), following).await.is_err());
    // The list, the watch that ended at once, and the next one.
    assert_eq!(script.asked().len(), 3);
}
