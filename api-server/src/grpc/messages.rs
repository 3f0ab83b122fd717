//! The messages of a session: pushing and watching.

use ambient_shared::{
    api::MESSAGE_ID,
    proto::{PushSessionMessageRequest, SessionMessage, WatchSessionMessagesRequest},
    rest,
};
use futures_util::StreamExt as _;
use tonic::{Request, Response};

use super::{Answers, answers, caller};
use crate::{
    App,
    auth::access::{Action, Facts},
    error::Error,
    store::messages::{PushMessage, message_id},
};

/// Stores a message. With an id in the metadata a repeat answers what was stored first, and the
/// echo of the id tells the client that this server does so.
pub(super) async fn push(
    app: &App,
    request: Request<PushSessionMessageRequest>,
) -> Result<Response<SessionMessage>, Error> {
    let caller = caller(app, request.metadata()).await?;
    let given = request.metadata().get(MESSAGE_ID).cloned();
    let id = given.as_ref().map(|id| message_id(id.as_bytes()));
    let request = request.into_inner();
    let push = PushMessage {
        caller,
        session_id: request.session_id,
        message_id: id.transpose()?,
        event_type: request.event_type,
        payload: request.payload,
    };
    let stored = app.store.change(push.checked()?).await?;
    let mut response = Response::new(message(stored));
    if let Some(given) = given {
        response.metadata_mut().insert(MESSAGE_ID, given);
    }
    Ok(response)
}

/// All messages after `after_seq`: those that are stored, then each new one.
pub(super) async fn watch(
    app: &App,
    request: Request<WatchSessionMessagesRequest>,
) -> Result<Response<Answers<SessionMessage>>, Error> {
    let caller = caller(app, request.metadata()).await?;
    let request = request.into_inner();
    // Before the look-up: what comes after it is noticed.
    let follower = app.events.follow(&request.session_id);
    let session = app.store.session(&request.session_id).await?;
    caller.check(Action::ReadMessages, &Facts::of(&session))?;
    let messages = follower
        .messages(app.store.clone(), request.after_seq, caller.clone())
        .map(|stored| stored.map(message));
    Ok(answers(app, &caller, messages))
}

fn message(stored: rest::SessionMessage) -> SessionMessage {
    SessionMessage {
        id: stored.id,
        session_id: stored.session_id,
        seq: stored.seq,
        event_type: stored.event_type,
        payload: stored.payload,
        created_at: stored.created_at,
    }
}
