//! `/sessions`.

use ambient_shared::rest::Session;
use axum::{
    Json as Answer,
    extract::{Path, State},
    response::IntoResponse,
};
use http::StatusCode;

use super::{Signed, body::Json, envelope, query::Query};
use crate::{
    App,
    auth::access::{Action, Caller, Facts, Who},
    error::Error,
    sessions::{Edit, SessionChange, StatusChange},
    store::sessions::{COLUMNS, CreateSession, DeleteSession, EditSession},
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
    if let Who::Person(name) = &caller.who {
        filter.and_equals("created_by_user_id", name);
    }
    let listed = app.store.sessions(&filter, &order, page).await?;
    Ok(envelope("SessionList", page, listed))
}

pub(super) async fn create(
    State(app): State<App>,
    Signed(caller): Signed,
    query: Query,
    Json(mut change): Json<SessionChange>,
) -> Result<impl IntoResponse, Error> {
    caller.not_a_session()?;
    if let Some(project) = query.project()? {
        let given = change.project_id.as_deref().filter(|id| !id.is_empty());
        if given.is_some_and(|given| given != project) {
            return Err(Error::Invalid(
                "project_id in the body and X-Ambient-Project name different projects".to_owned(),
            ));
        }
        change.project_id = Some(project.to_owned());
    }
    change.created_by_user_id = caller.creator(change.created_by_user_id);
    let create = CreateSession {
        change,
        prompt_is_message: true,
    };
    Ok((StatusCode::CREATED, Answer(app.store.change(create).await?)))
}

pub(super) async fn get(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<Answer<Session>, Error> {
    let session = app.store.session(&id).await?;
    caller.check(Action::Read, &Facts::of(&session))?;
    Ok(Answer(session))
}

pub(super) async fn change(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
    Json(change): Json<SessionChange>,
) -> Result<Answer<Session>, Error> {
    edit(&app, caller, id, Edit::Fields(change)).await
}

pub(super) async fn status(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
    Json(change): Json<StatusChange>,
) -> Result<Answer<Session>, Error> {
    edit(&app, caller, id, Edit::Status(change)).await
}

pub(super) async fn start(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<Answer<Session>, Error> {
    edit(&app, caller, id, Edit::Start).await
}

pub(super) async fn stop(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<Answer<Session>, Error> {
    edit(&app, caller, id, Edit::Stop).await
}

pub(super) async fn delete(
    State(app): State<App>,
    Signed(caller): Signed,
    Path(id): Path<String>,
) -> Result<StatusCode, Error> {
    app.store.change(DeleteSession { caller, id }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn edit(app: &App, caller: Caller, id: String, edit: Edit) -> Result<Answer<Session>, Error> {
    let edit = EditSession { caller, id, edit };
    Ok(Answer(app.store.change(edit).await?))
}
