//! `/projects`.

use ambient_shared::rest::Project;
use axum::{
    Json as Answer,
    extract::{Path, State},
    response::IntoResponse,
};
use http::StatusCode;

use super::{Signed, body::Json, envelope, query::Query};
use crate::{
    App,
    error::Error,
    projects::ProjectChange,
    store::projects::{COLUMNS, CreateProject, DeleteProject, EditProject},
};

pub(super) async fn list(
    State(app): State<App>,
    Signed(caller): Signed,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    caller.not_a_session()?;
    let page = query.page()?;
    let filter = query.filter(COLUMNS)?;
    let order = query.order(COLUMNS)?;
    let listed = app.store.projects(&filter, &order, page).await?;
    Ok(envelope("ProjectList", page, listed))
}

pub(super) async fn create(
    State(app): State<App>,
    Signed(caller): Signed,
    Json(change): Json<ProjectChange>,
) -> Result<impl IntoResponse, Error> {
    caller.not_a_session()?;
    let project = app.store.change(CreateProject { caller, change }).await?;
    Ok((StatusCode::CREATED, Answer(project)))
}

pub(super) async fn get(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<Answer<Project>, Error> {
    caller.not_a_session()?;
    Ok(Answer(app.store.project(&id).await?))
}

pub(super) async fn change(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
    Json(change): Json<ProjectChange>,
) -> Result<Answer<Project>, Error> {
    let edit = EditProject { caller, id, change };
    Ok(Answer(app.store.change(edit).await?))
}

pub(super) async fn delete(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<StatusCode, Error> {
    app.store.change(DeleteProject { caller, id }).await?;
    Ok(StatusCode::NO_CONTENT)
}
