//! Sessions in the database.

use std::sync::LazyLock;

use ambient_shared::{
    proto::EventType,
    rest::{BASE, Session},
};
use prost_types::Timestamp;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{Change, Listed, Page, Store, Transaction};
use crate::{
    auth::access::{Action, Caller, Facts},
    error::Error,
    events::{Committed, Event},
    search::{Column, Filter, Order},
    sessions::{Edit, SessionChange, create, edit},
    store::messages::insert_message,
    time::{from_micros, to_micros},
};

/// The columns, in the order in which [`save`] binds them.
pub(crate) const COLUMNS: &[Column] = &[
    Column::text("id"),
    Column::time("created_at"),
    Column::time("updated_at"),
    Column::text("name"),
    Column::text("repo_url"),
    Column::text("prompt"),
    Column::text("created_by_user_id"),
    Column::text("assigned_user_id"),
    Column::text("workflow_id"),
    Column::text("repos"),
    Column::integer("timeout"),
    Column::text("llm_model"),
    Column::real("llm_temperature"),
    Column::integer("llm_max_tokens"),
    Column::text("parent_session_id"),
    Column::text("bot_account_name"),
    Column::text("resource_overrides"),
    Column::text("environment_variables"),
    Column::text("labels"),
    Column::text("annotations"),
    Column::text("project_id"),
    Column::text("phase"),
    Column::time("start_time"),
    Column::time("completion_time"),
    Column::text("sdk_session_id"),
    Column::integer("sdk_restart_count"),
    Column::text("conditions"),
    Column::text("reconciled_repos"),
    Column::text("reconciled_workflow"),
    Column::text("kube_cr_name"),
    Column::text("kube_cr_uid"),
    Column::text("kube_namespace"),
    Column::text("agent_id"),
];

impl Store {
    /// The session of this id.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) async fn session(&self, id: &str) -> Result<Session, Error> {
        sqlx::query("select * from sessions where id = ?")
            .bind(id)
            .fetch_optional(&self.readers)
            .await?
            .map_or_else(|| Err(Error::no_session(id)), |row| Ok(session_of(&row)?))
    }

    /// What decides about access to the session of this id.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) async fn facts(&self, id: &str) -> Result<Facts, Error> {
        let mut connection = self.readers.acquire().await?;
        load_facts(&mut connection, id).await
    }

    /// One page of the sessions that pass the filter.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn sessions(
        &self,
        filter: &Filter,
        order: &Order,
        page: Page,
    ) -> Result<Listed<Session>, Error> {
        self.list("sessions", session_of, filter, order, page).await
    }
}

/// Makes a session.
pub(crate) struct CreateSession {
    pub(crate) change: SessionChange,
    /// Whether the prompt is stored as the first `user` message too.
    pub(crate) prompt_is_message: bool,
}

impl Change for CreateSession {
    type Done = Session;

    async fn apply(&self, to: &mut Transaction) -> Result<Session, Error> {
        let session = create(self.change.clone(), to.now())?;
        save(to.connection(), &session).await?;
        announce(to, EventType::Created, &session);
        let prompt = session.prompt.as_deref().filter(|text| !text.is_empty());
        if let Some(prompt) = prompt.filter(|_| self.prompt_is_message) {
            insert_message(to, &session.id, None, "user", prompt).await?;
        }
        Ok(session)
    }
}

/// Changes a session. A change that changes nothing is no event, so that controllers which write
/// what they see come to rest.
pub(crate) struct EditSession {
    pub(crate) caller: Caller,
    pub(crate) id: String,
    pub(crate) edit: Edit,
}

impl Change for EditSession {
    type Done = Session;

    async fn apply(&self, to: &mut Transaction) -> Result<Session, Error> {
        let before = load(to.connection(), &self.id).await?;
        self.caller.check(Action::Change, &Facts::of(&before))?;
        let mut session = before.clone();
        edit(&mut session, self.edit.clone(), to.now())?;
        if session == before {
            return Ok(session);
        }
        session.updated_at = Some(from_micros(to.now()));
        save(to.connection(), &session).await?;
        announce(to, EventType::Updated, &session);
        Ok(session)
    }
}

/// Deletes a session and its messages.
pub(crate) struct DeleteSession {
    pub(crate) caller: Caller,
    pub(crate) id: String,
}

impl Change for DeleteSession {
    type Done = ();

    async fn apply(&self, to: &mut Transaction) -> Result<(), Error> {
        let mut session = load(to.connection(), &self.id).await?;
        self.caller.check(Action::Change, &Facts::of(&session))?;
        sqlx::query("delete from messages where session_id = ?")
            .bind(&self.id)
            .execute(to.connection())
            .await?;
        sqlx::query("delete from sessions where id = ?")
            .bind(&self.id)
            .execute(to.connection())
            .await?;
        // Newer than every snapshot that a watcher may hold.
        session.updated_at = Some(from_micros(to.now()));
        announce(to, EventType::Deleted, &session);
        Ok(())
    }
}

fn announce(to: &mut Transaction, kind: EventType, session: &Session) {
    to.announce(Committed::Session(Event::of(kind, session)));
}

async fn load(connection: &mut SqliteConnection, id: &str) -> Result<Session, Error> {
    sqlx::query("select * from sessions where id = ?")
        .bind(id)
        .fetch_optional(connection)
        .await?
        .map_or_else(|| Err(Error::no_session(id)), |row| Ok(session_of(&row)?))
}

/// What decides about access, without the rest of the session.
pub(super) async fn load_facts(
    connection: &mut SqliteConnection,
    id: &str,
) -> Result<Facts, Error> {
    let row = sqlx::query(
        "select created_by_user_id, phase, sdk_restart_count from sessions where id = ?",
    )
    .bind(id)
    .fetch_optional(connection)
    .await?
    .ok_or_else(|| Error::no_session(id))?;
    Ok(Facts::of(&Session {
        id: id.to_owned(),
        created_by_user_id: row.try_get("created_by_user_id")?,
        phase: row.try_get("phase")?,
        sdk_restart_count: row.try_get("sdk_restart_count")?,
        ..Session::default()
    }))
}

/// Inserts or replaces all columns of one session.
static SAVE: LazyLock<String> = LazyLock::new(|| {
    let names: Vec<_> = COLUMNS.iter().map(|column| column.name).collect();
    let places = vec!["?"; names.len()].join(", ");
    let updates: Vec<_> = names
        .iter()
        .filter(|name| **name != "id")
        .map(|name| format!("{name} = excluded.{name}"))
        .collect();
    format!(
        "insert into sessions ({}) values ({places}) on conflict (id) do update set {}",
        names.join(", "),
        updates.join(", ")
    )
});

async fn save(connection: &mut SqliteConnection, session: &Session) -> Result<(), Error> {
    let micros = |time: &Option<Timestamp>| time.as_ref().and_then(to_micros);
    sqlx::query(SAVE.as_str())
        .bind(&session.id)
        .bind(micros(&session.created_at))
        .bind(micros(&session.updated_at))
        .bind(&session.name)
        .bind(&session.repo_url)
        .bind(&session.prompt)
        .bind(&session.created_by_user_id)
        .bind(&session.assigned_user_id)
        .bind(&session.workflow_id)
        .bind(&session.repos)
        .bind(session.timeout)
        .bind(&session.llm_model)
        .bind(session.llm_temperature)
        .bind(session.llm_max_tokens)
        .bind(&session.parent_session_id)
        .bind(&session.bot_account_name)
        .bind(&session.resource_overrides)
        .bind(&session.environment_variables)
        .bind(&session.labels)
        .bind(&session.annotations)
        .bind(&session.project_id)
        .bind(&session.phase)
        .bind(micros(&session.start_time))
        .bind(micros(&session.completion_time))
        .bind(&session.sdk_session_id)
        .bind(session.sdk_restart_count)
        .bind(&session.conditions)
        .bind(&session.reconciled_repos)
        .bind(&session.reconciled_workflow)
        .bind(&session.kube_cr_name)
        .bind(&session.kube_cr_uid)
        .bind(&session.kube_namespace)
        .bind(&session.agent_id)
        .execute(connection)
        .await?;
    Ok(())
}

fn session_of(row: &SqliteRow) -> Result<Session, sqlx::Error> {
    let time = |name| -> Result<Option<Timestamp>, sqlx::Error> {
        Ok(row.try_get::<Option<i64>, _>(name)?.map(from_micros))
    };
    let id: String = row.try_get("id")?;
    Ok(Session {
        href: format!("{BASE}/sessions/{id}"),
        id,
        kind: "Session".to_owned(),
        created_at: time("created_at")?,
        updated_at: time("updated_at")?,
        name: row.try_get("name")?,
        repo_url: row.try_get("repo_url")?,
        prompt: row.try_get("prompt")?,
        created_by_user_id: row.try_get("created_by_user_id")?,
        assigned_user_id: row.try_get("assigned_user_id")?,
        workflow_id: row.try_get("workflow_id")?,
        repos: row.try_get("repos")?,
        timeout: row.try_get("timeout")?,
        llm_model: row.try_get("llm_model")?,
        llm_temperature: row.try_get("llm_temperature")?,
        llm_max_tokens: row.try_get("llm_max_tokens")?,
        parent_session_id: row.try_get("parent_session_id")?,
        bot_account_name: row.try_get("bot_account_name")?,
        resource_overrides: row.try_get("resource_overrides")?,
        environment_variables: row.try_get("environment_variables")?,
        labels: row.try_get("labels")?,
        annotations: row.try_get("annotations")?,
        project_id: row.try_get("project_id")?,
        phase: row.try_get("phase")?,
        start_time: time("start_time")?,
        completion_time: time("completion_time")?,
        sdk_session_id: row.try_get("sdk_session_id")?,
        sdk_restart_count: row.try_get("sdk_restart_count")?,
        conditions: row.try_get("conditions")?,
        reconciled_repos: row.try_get("reconciled_repos")?,
        reconciled_workflow: row.try_get("reconciled_workflow")?,
        kube_cr_name: row.try_get("kube_cr_name")?,
        kube_cr_uid: row.try_get("kube_cr_uid")?,
        kube_namespace: row.try_get("kube_namespace")?,
        agent_id: row.try_get("agent_id")?,
    })
}
