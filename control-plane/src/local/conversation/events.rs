//! Following a session: its changes and its messages, over streams that are opened again.

use ambient_shared::{
    proto::{
        self, EventType, SessionMessage, SessionWatchEvent, WatchSessionMessagesRequest,
        WatchSessionsRequest,
    },
    retry::Backoff,
};
use tokio::{sync::mpsc, time::sleep};
use tonic::Streaming;
use tracing::{debug, warn};

use super::{Conversation, POLICY, limited};

/// Events that may wait for the terminal.
const EVENTS: usize = 64;

/// What happens in a session.
#[derive(Debug)]
pub(crate) enum Event {
    /// It changed; the whole object.
    Session(Box<proto::Session>),
    /// A message, in order, each once.
    Message(SessionMessage),
}

/// The events of a session that is being followed.
pub(crate) struct Events {
    pub(super) conversation: Conversation,
    pub(super) watch: Option<Streaming<SessionWatchEvent>>,
    pub(super) made: proto::Session,
}

impl Events {
    /// Both streams of events, to be run until dropped, and where they come out.
    pub(crate) fn follow(self) -> (impl Future<Output = ()>, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(EVENTS);
        let messages = follow_messages(self.conversation.clone(), sender.clone());
        let sessions = follow_session(self.conversation, self.watch, self.made, sender);
        let both = async move {
            tokio::join!(messages, sessions);
        };
        (both, receiver)
    }
}

async fn follow_session(
    conversation: Conversation,
    mut watch: Option<Streaming<SessionWatchEvent>>,
    made: proto::Session,
    events: mpsc::Sender<Event>,
) {
    let mut backoff = Backoff::new(POLICY);
    let mut last = made.clone();
    if events.send(Event::Session(Box::new(made))).await.is_err() {
        return;
    }
    loop {
        if let Some(stream) = &mut watch {
            match stream.message().await {
                Ok(Some(event)) => {
                    backoff.reset();
                    let Some(session) = ours(&conversation, event) else {
                        continue;
                    };
                    if session != last {
                        last = session.clone();
                        if events
                            .send(Event::Session(Box::new(session)))
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                    continue;
                }
                Ok(None) => debug!("watch of sessions ended"),
                Err(status) => debug!(%status, "watch of sessions broke off"),
            }
        }
        sleep(backoff.next_wait()).await;
        // Subscribe first, then look: nothing falls between.
        let mut sessions = conversation.operator.api.sessions();
        watch = limited(sessions.watch_sessions(WatchSessionsRequest {}))
            .await
            .inspect_err(|error| warn!(%error, "cannot watch sessions"))
            .ok();
        match conversation.session().await {
            Ok(session) if session == last => {}
            Ok(session) => {
                last = session.clone();
                if events
                    .send(Event::Session(Box::new(session)))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(error) => {
                warn!(error = %ambient_shared::exit::report(&error), "cannot read the session");
            }
        }
    }
}

fn ours(conversation: &Conversation, event: SessionWatchEvent) -> Option<proto::Session> {
    if event.r#type == i32::from(EventType::Deleted) {
        return None;
    }
    event.session.filter(|session| {
        session
            .metadata
            .as_ref()
            .is_some_and(|metadata| metadata.id == conversation.id.as_str())
    })
}

async fn follow_messages(conversation: Conversation, events: mpsc::Sender<Event>) {
    let mut backoff = Backoff::new(POLICY);
    let mut after_seq = 0;
    loop {
        let mut sessions = conversation.operator.api.sessions();
        let request = WatchSessionMessagesRequest {
            session_id: conversation.id.as_str().to_owned(),
            after_seq,
        };
        match limited(sessions.watch_session_messages(request)).await {
            Ok(mut stream) => loop {
                match stream.message().await {
                    Ok(Some(message)) => {
                        backoff.reset();
                        after_seq = message.seq;
                        if events.send(Event::Message(message)).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(status) => {
                        debug!(%status, "watch of messages broke off");
                        break;
                    }
                }
            },
            Err(error) => warn!(%error, "cannot watch messages"),
        }
        sleep(backoff.next_wait()).await;
    }
}
