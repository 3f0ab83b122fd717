//! Kubernetes Events on a session's pod: what we did to it, for `kubectl describe`; and those on other
//! pods, which look the same.
//!
//! In: news. Out: Events of `events.k8s.io`. They are for people and nothing depends on them: a few
//! at a time are sent beside all other work, what fails is only logged, and when there are too many
//! the newest are dropped.

use std::time::{Duration, SystemTime};

use ambient_shared::{clock::Clock, exit};
use futures_util::{StreamExt as _, stream};
use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::names::{FIELD_MANAGER, SessionRef};
use crate::backend::Reason;

/// Events that may wait: as many as a burst of starts makes in some seconds.
const MAX_WAITING: usize = 512;

/// How many are sent at once: one that hangs holds up no other.
const AT_ONCE: usize = 4;

/// Longest time for one.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// Longest note that the API server takes, in bytes (`events.k8s.io/v1`).
const MAX_NOTE: usize = 1024;

/// What we did, or found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// Its pod was made.
    Started {
        /// How often it was started before.
        generation: u32,
    },
    /// Its run was asked to end.
    Stopping,
    /// It will never start, and is ended.
    Doomed(Reason),
    /// Its token cannot be replaced.
    RefreshFailed(String),
    /// Its token is replaced again, after it could not be.
    RefreshWorks,
    /// What somebody else had changed was put right: labels, owner or the whole of this kind of
    /// object.
    Repaired(&'static str),
}

/// Takes news.
#[derive(Clone)]
pub(super) struct Teller {
    sender: mpsc::Sender<(Event, SessionRef)>,
    clock: Clock,
}

/// A task that sends Events.
pub(super) struct Events {
    receiver: mpsc::Receiver<(Event, SessionRef)>,
    client: kube::Client,
}

/// A place for news, and the task that sends them.
pub(super) fn events(client: kube::Client, clock: Clock) -> (Teller, Events) {
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    (Teller { sender, clock }, Events { receiver, client })
}

impl Teller {
    /// Tells of a session's pod. Never blocks.
    pub(super) fn tell(&self, session: &SessionRef, uid: &str, news: News) {
        let event = event(session, uid, news, self.clock.now());
        if self.sender.try_send((event, session.clone())).is_err() {
            debug!("too many Events wait; one is dropped");
        }
    }
}

impl Events {
    /// Sends until `shutdown`.
    pub(super) async fn run(self, shutdown: CancellationToken) {
        let Self {
            mut receiver,
            client,
        } = self;
        let news = stream::poll_fn(|context| receiver.poll_recv(context));
        let sent = news.for_each_concurrent(AT_ONCE, |(event, session)| {
            let client = client.clone();
            async move {
                let SessionRef { id, namespace, .. } = session;
                if let Err(reason) = send(client, &namespace, &event).await {
                    // Its name has the session's id in it.
                    let reason = id.masked_in(&reason);
                    debug!(%namespace, session = %id.hash(), %reason, "an Event could not be sent");
                }
            }
        });
        shutdown.run_until_cancelled(sent).await;
    }
}

/// Sends one.
///
/// # Errors
/// Why it could not be sent; that may quote the Event's name.
pub(crate) async fn send(
    client: kube::Client,
    namespace: &str,
    event: &Event,
) -> Result<(), String> {
    let api: Api<Event> = Api::namespaced(client, namespace);
    let parameters = PostParams::default();
    match timeout(SEND_LIMIT, api.create(&parameters, event)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(exit::report(&error)),
        Err(_) => Err("no answer in time".to_owned()),
    }
}

/// The pod that an Event is about.
#[derive(Debug, Clone)]
pub(crate) struct OnPod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// What an Event says.
#[derive(Debug)]
pub(crate) struct What {
    pub(crate) reason: &'static str,
    pub(crate) action: &'static str,
    /// Longer ones are cut.
    pub(crate) note: String,
    pub(crate) is_warning: bool,
}

fn event(session: &SessionRef, uid: &str, news: News, now: SystemTime) -> Event {
    let is_warning = matches!(news, News::Doomed(_) | News::RefreshFailed(_));
    let (reason, action, note) = match news {
        News::Started { generation } => (
            "SessionStarted",
            "Start",
            format!("made for the session's start number {}", generation + 1),
        ),
        News::Stopping => (
            "SessionStopping",
            "Stop",
            "the session's run is asked to end".to_owned(),
        ),
        News::Doomed(why) => (
            "SessionDoomed",
            "Stop",
            format!(
                "the run cannot start and is ended: {}: {}",
                why.reason, why.message
            ),
        ),
        News::RefreshFailed(why) => ("TokenRefreshFailed", "Refresh", why),
        News::RefreshWorks => (
            "TokenRefreshed",
            "Refresh",
            "the session's token is replaced again".to_owned(),
        ),
        News::Repaired(what) => (
            "Repaired",
            "Repair",
            format!("the session's {what} had been changed, and is as it was"),
        ),
    };
    let on = OnPod {
        namespace: session.namespace.clone(),
        name: session.pod(),
        uid: uid.to_owned(),
    };
    let what = What {
        reason,
        action,
        note,
        is_warning,
    };
    on.event(&what, now)
}

impl OnPod {
    /// The Event.
    pub(crate) fn event(&self, what: &What, now: SystemTime) -> Event {
        let kind = if what.is_warning { "Warning" } else { "Normal" };
        let Self {
            namespace,
            name,
            uid,
        } = self.clone();
        Event {
            metadata: ObjectMeta {
                // As others name theirs. The API server's own names cannot begin with `<pod>.`.
                name: Some(format!("{name}.{:016x}", rand::random::<u64>())),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            event_time: Timestamp::try_from(now).ok().map(MicroTime),
            type_: Some(kind.to_owned()),
            reason: Some(what.reason.to_owned()),
            action: Some(what.action.to_owned()),
            note: Some(shortened(&what.note)),
            regarding: Some(ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                namespace: Some(namespace),
                name: Some(name),
                uid: Some(uid),
                ..ObjectReference::default()
            }),
            reporting_controller: Some(format!("ambient-code.io/{FIELD_MANAGER}")),
            reporting_instance: Some(FIELD_MANAGER.to_owned()),
            ..Event::default()
        }
    }
}

fn shortened(note: &str) -> String {
    let end = note.floor_char_boundary(MAX_NOTE.min(note.len()));
    note[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use ambient_shared::session::SessionId;

    use super::*;

    #[test]
    fn an_event_is_on_the_pod_and_never_too_long() {
        let id = SessionId::parse("session-0001").unwrap();
        let session = SessionRef::new(&id, "team", "team").unwrap();
        let news = News::RefreshFailed("ü".repeat(2000));
        let event = event(&session, "u-1", news, SystemTime::UNIX_EPOCH);

        let regarding = event.regarding.unwrap();
        assert_eq!(regarding.uid.as_deref(), Some("u-1"));
        assert_eq!(
            regarding.name.as_deref(),
            Some("session-session-0001-runner")
        );
        assert_eq!(event.type_.as_deref(), Some("Warning"));
        assert_eq!(event.note.unwrap().len(), MAX_NOTE);
    }
}
