//! Messages in the database.
//!
//! `seq` counts over all sessions and, with one writer, becomes visible in its order: whoever has
//! read up to a number has seen everything below it.

use ambient_shared::{api::MESSAGE_ID, rest::SessionMessage};
use futures_util::TryStreamExt as _;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};
use uuid::Uuid;

use super::{Change, Store, Transaction, sessions::load_facts};
use crate::{
    auth::access::{Action, Caller},
    error::Error,
    events::Committed,
    time::from_micros,
};

/// Largest payload, in bytes (contract section 5).
pub(crate) const MAX_PAYLOAD: usize = 1024 * 1024;

/// Most characters of an event type.
const MAX_EVENT_TYPE: usize = 64;

/// Most messages that a reader gets at once.
const PAGE_MESSAGES: i64 = 256;

/// Bytes of payload after which a page ends early: what each reader may hold in memory.
const PAGE_BYTES: usize = 256 * 1024;

impl Store {
    /// The next messages of a session after `after`, in order, none past `upto`. Empty only when
    /// there are no more at this moment.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn messages(
        &self,
        session_id: &str,
        after: i64,
        upto: i64,
    ) -> Result<Vec<SessionMessage>, Error> {
        let mut rows = sqlx::query(
            "select seq, id, session_id, event_type, payload, created_at from messages
             where session_id = ? and seq > ? and seq <= ? order by seq limit ?",
        )
        .bind(session_id)
        .bind(after)
        .bind(upto)
        .bind(PAGE_MESSAGES)
        .fetch(&self.readers);
        let mut page = Vec::new();
        let mut bytes = 0;
        while bytes < PAGE_BYTES
            && let Some(row) = rows.try_next().await?
        {
            let message = message_of(&row)?;
            bytes += message.payload.len();
            page.push(message);
        }
        Ok(page)
    }

    /// The number of a session's last message; 0 when it has none.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn last_seq(&self, session_id: &str) -> Result<i64, Error> {
        let row = sqlx::query("select max(seq) from messages where session_id = ?")
            .bind(session_id)
            .fetch_one(&self.readers)
            .await?;
        Ok(row.try_get::<Option<i64>, _>(0)?.unwrap_or_default())
    }
}

/// Stores a message, once for each id that its sender gives.
pub(crate) struct PushMessage {
    pub(crate) caller: Caller,
    pub(crate) session_id: String,
    /// The sender's own id of the message: a repeat answers what was stored first.
    pub(crate) message_id: Option<Uuid>,
    pub(crate) event_type: String,
    pub(crate) payload: String,
}

impl PushMessage {
    /// Checks what can be checked without the database. An empty event type is `user`.
    ///
    /// # Errors
    /// When the event type is no word, or the payload too long.
    pub(crate) fn checked(mut self) -> Result<Self, Error> {
        if self.event_type.is_empty() {
            "user".clone_into(&mut self.event_type);
        }
        let of_a_word = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if self.event_type.len() > MAX_EVENT_TYPE || !self.event_type.bytes().all(of_a_word) {
            return Err(Error::Invalid(format!(
                "event_type must have at most {MAX_EVENT_TYPE} letters, digits, _, - or ."
            )));
        }
        if self.payload.len() > MAX_PAYLOAD {
            return Err(Error::TooLarge(format!(
                "payload has {} bytes; at most {MAX_PAYLOAD} are taken",
                self.payload.len()
            )));
        }
        Ok(self)
    }
}

/// The sender's own id of a message, as its metadata gives it.
///
/// # Errors
/// When it is no UUID.
pub(crate) fn message_id(given: &[u8]) -> Result<Uuid, Error> {
    Uuid::try_parse_ascii(given).map_err(|_| Error::Invalid(format!("{MESSAGE_ID} must be a UUID")))
}

impl Change for PushMessage {
    type Done = SessionMessage;

    async fn apply(&self, to: &mut Transaction) -> Result<SessionMessage, Error> {
        let facts = load_facts(to.connection(), &self.session_id).await?;
        let action = Action::Push {
            event_type: &self.event_type,
            payload: &self.payload,
        };
        self.caller.check(action, &facts)?;
        if let Some(message_id) = self.message_id
            && let Some(stored) = find(to.connection(), &self.session_id, message_id).await?
        {
            return Ok(stored);
        }
        insert_message(
            to,
            &self.session_id,
            self.message_id,
            &self.event_type,
            &self.payload,
        )
        .await
    }
}

async fn find(
    connection: &mut SqliteConnection,
    session_id: &str,
    message_id: Uuid,
) -> Result<Option<SessionMessage>, Error> {
    let row = sqlx::query("select * from messages where session_id = ? and message_id = ?")
        .bind(session_id)
        .bind(message_id.to_string())
        .fetch_optional(connection)
        .await?;
    Ok(row.as_ref().map(message_of).transpose()?)
}

/// Adds a message to a session that is there.
pub(super) async fn insert_message(
    to: &mut Transaction,
    session_id: &str,
    message_id: Option<Uuid>,
    event_type: &str,
    payload: &str,
) -> Result<SessionMessage, Error> {
    let created_at = to.now();
    let id = Uuid::now_v7().to_string();
    let seq = sqlx::query(
        "insert into messages (id, session_id, message_id, event_type, payload, created_at)
         values (?, ?, ?, ?, ?, ?)",
    )
    .bind(&id)
    .bind(session_id)
    .bind(message_id.map(|id| id.to_string()))
    .bind(event_type)
    .bind(payload)
    .bind(created_at)
    .execute(to.connection())
    .await?
    .last_insert_rowid();
    to.announce(Committed::Message {
        session_id: session_id.to_owned(),
        seq,
    });
    Ok(SessionMessage {
        id,
        session_id: session_id.to_owned(),
        seq,
        event_type: event_type.to_owned(),
        payload: payload.to_owned(),
        created_at: Some(from_micros(created_at)),
    })
}

fn message_of(row: &SqliteRow) -> Result<SessionMessage, sqlx::Error> {
    Ok(SessionMessage {
        id: row.try_get("id")?,
        session_id: row.try_get("session_id")?,
        seq: row.try_get("seq")?,
        event_type: row.try_get("event_type")?,
        payload: row.try_get("payload")?,
        created_at: Some(from_micros(row.try_get("created_at")?)),
    })
}
