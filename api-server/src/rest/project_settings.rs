//! `/project_settings`.

use ambient_shared::rest::ProjectSettings;
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
    projects::SettingsChange,
    store::project_settings::{COLUMNS, CreateSettings, DeleteSettings, EditSettings},
};

pub(super) async fn list(
    State(app): State<App>,
    Signed(caller): Signed,
    query: Query,
) -> Result<impl IntoResponse, Error> {
    caller.not_a_session()?;
    let page = query.page()?;
    let mut filter = query.filter(COLUMNS)?;
    let order = query.order(COLUMNS)?;
    if let Some(project) = query.project()? {
        filter.and_equals("project_id", project);
    }
    let listed = app
        .store
        .all_project_settings(&filter, &order, page)
        .await?;
    Ok(envelope("ProjectSettingsList", page, listed))
}

pub(super) async fn create(
    State(app): State<App>,
    Signed(caller): Signed,
    query: Query,
    Json(mut change): Json<SettingsChange>,
) -> Result<impl IntoResponse, Error> {
    caller.not_a_session()?;
    if change.project_id.is_none() {
        change.project_id = query.project()?.map(str::to_owned);
    }
    let settings = app.store.change(CreateSettings { caller, change }).await?;
    Ok((StatusCode::CREATED, Answer(settings)))
}

pub(super) async fn get(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<Answer<ProjectSettings>, Error> {
    caller.not_a_session()?;
    Ok(Answer(app.store.project_settings(&id).await?))
}

pub(super) async fn change(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
    Json(change): Json<SettingsChange>,
) -> Result<Answer<ProjectSettings>, Error> {
    let edit = EditSettings { caller, id, change };
    Ok(Answer(app.store.change(edit).await?))
}

pub(super) async fn delete(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<StatusCode, Error> {
    app.store.change(DeleteSettings { caller, id }).await?;
    Ok(StatusCode::NO_CONTENT)
}
