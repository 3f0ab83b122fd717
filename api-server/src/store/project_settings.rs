//! Projects' settings in the database.

use ambient_shared::{
    proto::EventType,
    rest::{BASE, ProjectSettings},
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{
    Change, Listed, Page, Store, Transaction,
    projects::{load_project, micros, not_found},
};
use crate::{
    auth::access::Caller,
    error::Error,
    events::{Committed, Event},
    projects::{SettingsChange, create_settings, edit_settings},
    search::{Column, Filter, Order},
    time::from_micros,
};

/// The columns that lists may name.
pub(crate) const COLUMNS: &[Column] = &[
    Column::text("id"),
    Column::time("created_at"),
    Column::time("updated_at"),
    Column::text("project_id"),
    Column::text("group_access"),
    Column::text("repositories"),
];

impl Store {
    /// The settings of this id.
    ///
    /// # Errors
    /// When there are none.
    pub(crate) async fn project_settings(&self, id: &str) -> Result<ProjectSettings, Error> {
        let row = sqlx::query("select * from project_settings where id = ?")
            .bind(id)
            .fetch_optional(&self.readers)
            .await?
            .ok_or_else(|| not_found("project settings", id))?;
        Ok(settings_of(&row)?)
    }

    /// One page of the settings that pass the filter.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn all_project_settings(
        &self,
        filter: &Filter,
        order: &Order,
        page: Page,
    ) -> Result<Listed<ProjectSettings>, Error> {
        self.list("project_settings", settings_of, filter, order, page)
            .await
    }
}

/// Makes the settings of a project.
pub(crate) struct CreateSettings {
    pub(crate) caller: Caller,
    pub(crate) change: SettingsChange,
}

impl Change for CreateSettings {
    type Done = ProjectSettings;

    async fn apply(&self, to: &mut Transaction) -> Result<ProjectSettings, Error> {
        let settings = create_settings(self.change.clone(), to.now())?;
        let project = &settings.project_id;
        let owner = match load_project(to.connection(), project).await {
            Ok((_, owner)) => owner,
            Err(Error::NotFound { .. }) => {
                return Err(Error::Invalid(format!(
                    "project_id: there is no project {project:?}"
                )));
            }
            Err(error) => return Err(error),
        };
        self.caller.check_project(owner.as_deref())?;
        let there = sqlx::query("select id from project_settings where project_id = ?")
            .bind(project)
            .fetch_optional(to.connection())
            .await?;
        if there.is_some() {
            return Err(Error::Exists(format!(
                "project {project:?} has settings already; change those"
            )));
        }
        save_settings(to.connection(), &settings).await?;
        announce_settings(to, EventType::Created, &settings);
        Ok(settings)
    }
}

/// Changes the settings of a project.
pub(crate) struct EditSettings {
    pub(crate) caller: Caller,
    pub(crate) id: String,
    pub(crate) change: SettingsChange,
}

impl Change for EditSettings {
    type Done = ProjectSettings;

    async fn apply(&self, to: &mut Transaction) -> Result<ProjectSettings, Error> {
        let before = load_settings(to, &self.caller, &self.id).await?;
        let mut settings = before.clone();
        edit_settings(&mut settings, self.change.clone())?;
        if settings == before {
            return Ok(settings);
        }
        settings.updated_at = Some(from_micros(to.now()));
        save_settings(to.connection(), &settings).await?;
        announce_settings(to, EventType::Updated, &settings);
        Ok(settings)
    }
}

/// Deletes the settings of a project.
pub(crate) struct DeleteSettings {
    pub(crate) caller: Caller,
    pub(crate) id: String,
}

impl Change for DeleteSettings {
    type Done = ();

    async fn apply(&self, to: &mut Transaction) -> Result<(), Error> {
        let mut settings = load_settings(to, &self.caller, &self.id).await?;
        sqlx::query("delete from project_settings where id = ?")
            .bind(&self.id)
            .execute(to.connection())
            .await?;
        settings.updated_at = Some(from_micros(to.now()));
        announce_settings(to, EventType::Deleted, &settings);
        Ok(())
    }
}

/// Deletes a project's settings with the project.
pub(super) async fn delete_settings_of(to: &mut Transaction, project: &str) -> Result<(), Error> {
    let deleted = sqlx::query("delete from project_settings where project_id = ? returning *")
        .bind(project)
        .fetch_all(to.connection())
        .await?;
    for row in &deleted {
        let mut settings = settings_of(row)?;
        settings.updated_at = Some(from_micros(to.now()));
        announce_settings(to, EventType::Deleted, &settings);
    }
    Ok(())
}

fn announce_settings(to: &mut Transaction, kind: EventType, settings: &ProjectSettings) {
    to.announce(Committed::Settings(Event::of(kind, settings)));
}

/// Settings that the caller may change.
async fn load_settings(
    from: &mut Transaction,
    caller: &Caller,
    id: &str,
) -> Result<ProjectSettings, Error> {
    let row = sqlx::query("select * from project_settings where id = ?")
        .bind(id)
        .fetch_optional(from.connection())
        .await?
        .ok_or_else(|| not_found("project settings", id))?;
    let settings = settings_of(&row)?;
    let (_, owner) = load_project(from.connection(), &settings.project_id).await?;
    caller.check_project(owner.as_deref())?;
    Ok(settings)
}

async fn save_settings(
    connection: &mut SqliteConnection,
    settings: &ProjectSettings,
) -> Result<(), Error> {
    sqlx::query(
        "insert or replace into project_settings (id, created_at, updated_at, project_id,
         group_access, repositories) values (?, ?, ?, ?, ?, ?)",
    )
    .bind(&settings.id)
    .bind(micros(settings.created_at.as_ref()))
    .bind(micros(settings.updated_at.as_ref()))
    .bind(&settings.project_id)
    .bind(&settings.group_access)
    .bind(&settings.repositories)
    .execute(connection)
    .await?;
    Ok(())
}

fn settings_of(row: &SqliteRow) -> Result<ProjectSettings, sqlx::Error> {
    let id: String = row.try_get("id")?;
    Ok(ProjectSettings {
        href: format!("{BASE}/project_settings/{id}"),
        id,
        kind: "ProjectSettings".to_owned(),
        created_at: Some(from_micros(row.try_get("created_at")?)),
        updated_at: Some(from_micros(row.try_get("updated_at")?)),
        project_id: row.try_get("project_id")?,
        group_access: row.try_get("group_access")?,
        repositories: row.try_get("repositories")?,
    })
}
