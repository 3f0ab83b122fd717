//! Projects in the database.

use ambient_shared::{
    proto::EventType,
    rest::{BASE, Project},
};
use prost_types::Timestamp;
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{Change, Listed, Page, Store, Transaction, project_settings::delete_settings_of};
use crate::{
    auth::access::Caller,
    error::Error,
    events::{Committed, Event},
    projects::{ProjectChange, create_project, edit_project},
    search::{Column, Filter, Order},
    time::{from_micros, to_micros},
};

/// The columns of a project that lists may name.
pub(crate) const COLUMNS: &[Column] = &[
    Column::text("id"),
    Column::time("created_at"),
    Column::time("updated_at"),
    Column::text("name"),
    Column::text("display_name"),
    Column::text("description"),
    Column::text("labels"),
    Column::text("annotations"),
    Column::text("status"),
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
        delete_settings_of(to, &self.id).await?;
        sqlx::query("delete from projects where id = ?")
            .bind(&self.id)
            .execute(to.connection())
            .await?;
        project.updated_at = Some(from_micros(to.now()));
        announce_project(to, EventType::Deleted, &project);
        Ok(())
    }
}

fn announce_project(to: &mut Transaction, kind: EventType, project: &Project) {
    to.announce(Committed::Project(Event::of(kind, project)));
}

/// There is no such object.
pub(super) fn not_found(kind: &'static str, id: &str) -> Error {
    Error::NotFound {
        kind,
        id: id.to_owned(),
    }
}

/// A project, and who made it.
pub(super) async fn load_project(
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

/// As the database keeps it.
pub(super) fn micros(time: Option<&Timestamp>) -> Option<i64> {
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
