//! `/sessions/{id}/messages`: as one array, as server-sent events, and posting.

use std::{convert::Infallible, time::Duration};

use ambient_shared::{api::MESSAGE_ID, rest::SessionMessage};
use async_stream::try_stream;
use axum::{
    Json as Answer,
    body::Body,
    extract::{Path, State},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::StreamExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;

use super::{Signed, body::Json, query::Query};
use crate::{
    App,
    auth::access::{Action, Facts, Who},
    error::Error,
    store::{
        Store,
        messages::{PushMessage, message_id},
    },
};

/// How often a silent event stream says that it lives (contract section 5).
const PING: Duration = Duration::from_secs(30);

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NewMessage {
    event_type: Option<String>,
    payload: Option<String>,
}

pub(super) async fn read(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Error> {
    let mut after = query.after_seq()?;
    // Before the look-up: what comes after it is noticed.
    let follower = app.events.follow(&id);
    let session = app.store.session(&id).await?;
    caller.check(Action::ReadMessages, &Facts::of(&session))?;
    if !wants_events(&headers) {
        return array(app.store, id, after).await;
    }
    if let Some(last) = headers.get(LAST_EVENT_ID) {
        after = last
            .to_str()
            .ok()
            .and_then(|last| last.trim().parse().ok())
            .ok_or_else(|| Error::Invalid("Last-Event-ID must be a message's seq".to_owned()))?;
    }
    let expires_at = caller.expires_at;
    let messages = follower.messages(app.store, after, caller);
    let messages = app.ends.of(messages, expires_at);
    // An error ends the stream; the client comes back with the last id that it saw.
    let events = messages
        .take_while(|message| std::future::ready(message.is_ok()))
        .filter_map(|message| std::future::ready(message.ok().and_then(|it| event(&it))))
        .map(Ok::<_, Infallible>);
    let pings = KeepAlive::new().interval(PING).text("ping");
    Ok(Sse::new(events).keep_alive(pings).into_response())
}

pub(super) async fn push(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(session_id): Path<String>,
    headers: HeaderMap,
    Json(message): Json<NewMessage>,
) -> Result<Response, Error> {
    let event_type = message.event_type.unwrap_or_default();
    let is_person = matches!(caller.who, Who::Person(_) | Who::Administrator(_));
    if is_person && !matches!(event_type.as_str(), "" | "user") {
        return Err(Error::forbidden(
            "people post event_type=user only; agents push the rest over gRPC",
        ));
    }
    let given = headers.get(MESSAGE_ID);
    let push = PushMessage {
        caller,
        session_id,
        message_id: given.map(|id| message_id(id.as_bytes())).transpose()?,
        event_type,
        payload: message
            .payload
            .ok_or_else(|| Error::Invalid("payload is missing".to_owned()))?,
    };
    let stored = app.store.change(push.checked()?).await?;
    let mut response = (StatusCode::CREATED, Answer(stored)).into_response();
    if let Some(given) = given {
        response.headers_mut().insert(MESSAGE_ID, given.clone());
    }
    Ok(response)
}

fn wants_events(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("text/event-stream"))
}

fn event(message: &SessionMessage) -> Option<Event> {
    let data = serde_json::to_string(message).ok()?;
    Some(Event::default().id(message.seq.to_string()).data(data))
}

/// All messages after `after` as of now, read and sent page by page.
async fn array(store: Store, session_id: String, after: i64) -> Result<Response, Error> {
    let upto = store.last_seq(&session_id).await?;
    // The first page before the status, so that a broken database is a 500.
    let mut page = store.messages(&session_id, after, upto).await?;
    let text = try_stream! {
        let mut text = String::from("[");
        let mut separator = "";
        while let Some(last) = page.last() {
            let after = last.seq;
            for message in &page {
                text.push_str(separator);
                text.push_str(&serde_json::to_string(message)?);
                separator = ",";
            }
            yield std::mem::take(&mut text);
            page = store.messages(&session_id, after, upto).await?;
        }
        text.push(']');
        yield text;
    };
    let text = text.map(|part: Result<String, axum::BoxError>| part);
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], Body::from_stream(text)).into_response())
}
