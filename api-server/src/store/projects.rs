//! Projects and their settings in the database.

use ambient_shared::{
    proto::EventType,
    rest::{BASE, Project, ProjectSettings},
};
use prost_types::Timestamp;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{Change, Listed, Page, Store, Transaction};
use crate::{
    auth::access::Caller,
    error::Error,
    events::{Committed, Event},
    projects::{
        ProjectChange, SettingsChange, create_project, create_settings, edit_project, edit_settings,
    },
    search::{Column, Filter, Kind, Order},
    time::{from_micros, to_micros},
};

const fn text(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Text,
    }
}

const fn time(name: &'static str) -> Column {
    Column {
        name,
        kind: Kind::Time,
    }
}

/// The columns of a project that lists may name.
pub(crate) const PROJECT_COLUMNS: &[Column] = &[
    text("id"),
    time("created_at"),
    time("updated_at"),
    text("name"),
    text("display_name"),
    text("description"),
    text("labels"),
    text("annotations"),
    text("status"),
];

/// The columns of a project's settings that lists may name.
pub(crate) const SETTINGS_COLUMNS: &[Column] = &[
    text("id"),
    time("created_at"),
    time("updated_at"),
    text("project_id"),
    text("group_access"),
    text("repositories"),
];

impl Store {
    /// The project of this name.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) async fn project(&self, id: &str) -> Result<Project, Error> {
        let row = sqlx::query("select * from projects where id = ?")
            .bind(id)
            .fetch_optional(&self.readers)
            .await?
            .ok_or_else(|| not_found("project", id))?;
        Ok(project_of(&row)?)
    }

    /// One page of the projects that pass the filter.
    ///
    /// # Errors
    /// When the database fails.
    pub(crate) async fn projects(
        &self,
        filter: &Filter,
        order: &Order,
        page: Page,
    ) -> Result<Listed<Project>, Error> {
        self.list("projects", project_of, filter, order, page).await
    }

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

/// Makes a project.
pub(crate) struct CreateProject {
    pub(crate) caller: Caller,
    pub(crate) change: ProjectChange,
}

impl Change for CreateProject {
    type Done = Project;

    async fn apply(&self, to: &mut Transaction) -> Result<Project, Error> {
        let project = create_project(self.change.clone(), to.now())?;
        match load_project(to.connection(), &project.id).await {
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
            Ok(_) => {
                return Err(Error::Exists(format!(
                    "project {:?} exists already",
                    project.id
                )));
            }
        }
        save_project(to.connection(), &project, self.caller.name()).await?;
        announce_project(to, EventType::Created, &project);
        Ok(project)
    }
}

/// Changes a project.
pub(crate) struct EditProject {
    pub(crate) caller: Caller,
    pub(crate) id: String,
    pub(crate) change: ProjectChange,
}

impl Change for EditProject {
    type Done = Project;

    async fn apply(&self, to: &mut Transaction) -> Result<Project, Error> {
        let (before, owner) = load_project(to.connection(), &self.id).await?;
        self.caller.check_project(owner.as_deref())?;
        let mut project = before.clone();
        edit_project(&mut project, self.change.clone())?;
        if project == before {
            return Ok(project);
        }
        project.updated_at = Some(from_micros(to.now()));
        save_project(to.connection(), &project, owner.as_deref()).await?;
        announce_project(to, EventType::Updated, &project);
        Ok(project)
    }
}

/// Deletes a project and its settings. Its sessions stay: each is deleted by itself.
pub(crate) struct DeleteProject {
    pub(crate) caller: Caller,
    pub(crate) id: String,
}

impl Change for DeleteProject {
    type Done = ();

    async fn apply(&self, to: &mut Transaction) -> Result<(), Error> {
        let (mut project, owner) = load_project(to.connection(), &self.id).await?;
        self.caller.check_project(owner.as_deref())?;
        let settings = sqlx::query("delete from project_settings where project_id = ? returning *")
            .bind(&self.id)
            .fetch_all(to.connection())
            .await?;
        for row in &settings {
            let mut settings = settings_of(row)?;
            settings.updated_at = Some(from_micros(to.now()));
            announce_settings(to, EventType::Deleted, &settings);
        }
        sqlx::query("delete from projects where id = ?")
            .bind(&self.id)
            .execute(to.connection())
            .await?;
        project.updated_at = Some(from_micros(to.now()));
        announce_project(to, EventType::Deleted, &project);
        Ok(())
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

fn announce_project(to: &mut Transaction, kind: EventType, project: &Project) {
    to.announce(Committed::Project(Event::of(kind, project)));
}

fn announce_settings(to: &mut Transaction, kind: EventType, settings: &ProjectSettings) {
    to.announce(Committed::Settings(Event::of(kind, settings)));
}

fn not_found(kind: &'static str, id: &str) -> Error {
    Error::NotFound {
        kind,
        id: id.to_owned(),
    }
}

/// A project, and who made it.
async fn load_project(
    connection: &mut SqliteConnection,
    id: &str,
) -> Result<(Project, Option<String>), Error> {
    let row = sqlx::query("select * from projects where id = ?")
        .bind(id)
        .fetch_optional(connection)
        .await?
        .ok_or_else(|| not_found("project", id))?;
    Ok((project_of(&row)?, row.try_get("created_by")?))
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

fn micros(time: Option<&Timestamp>) -> Option<i64> {
    time.and_then(to_micros)
}

async fn save_project(
    connection: &mut SqliteConnection,
    project: &Project,
    owner: Option<&str>,
) -> Result<(), Error> {
    sqlx::query(
        "insert or replace into projects (id, created_at, updated_at, name, display_name,
         description, labels, annotations, status, created_by)
         values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(&project.id)
    .bind(micros(project.created_at.as_ref()))
    .bind(micros(project.updated_at.as_ref()))
    .bind(&project.name)
    .bind(&project.display_name)
    .bind(&project.description)
    .bind(&project.labels)
    .bind(&project.annotations)
    .bind(&project.status)
    .bind(owner)
    .execute(connection)
    .await?;
    Ok(())
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

fn project_of(row: &SqliteRow) -> Result<Project, sqlx::Error> {
    let id: String = row.try_get("id")?;
    Ok(Project {
        href: format!("{BASE}/projects/{id}"),
        id,
        kind: "Project".to_owned(),
        created_at: Some(from_micros(row.try_get("created_at")?)),
        updated_at: Some(from_micros(row.try_get("updated_at")?)),
        name: row.try_get("name")?,
        display_name: row.try_get("display_name")?,
        description: row.try_get("description")?,
        labels: row.try_get("labels")?,
        annotations: row.try_get("annotations")?,
        status: row.try_get("status")?,
    })
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
