//! `ProjectSettingsService`.

use ambient_shared::proto::{
    CreateProjectSettingsRequest, DeleteProjectSettingsRequest, DeleteProjectSettingsResponse,
    GetProjectSettingsRequest, ListProjectSettingsRequest, ListProjectSettingsResponse,
    ProjectSettings, ProjectSettingsWatchEvent, UpdateProjectSettingsRequest,
    WatchProjectSettingsRequest, project_settings_service_server::ProjectSettingsService,
};
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status};

use super::{Answers, answers, caller, list_meta, page};
use crate::{
    App,
    projects::SettingsChange,
    search::{Filter, Order},
    store::project_settings::{CreateSettings, DeleteSettings, EditSettings},
};

/// The service.
pub(super) struct ProjectSettingsGrpc(pub(super) App);

#[tonic::async_trait]
impl ProjectSettingsService for ProjectSettingsGrpc {
    type WatchProjectSettingsStream = Answers<ProjectSettingsWatchEvent>;

    async fn get_project_settings(
        &self,
        request: Request<GetProjectSettingsRequest>,
    ) -> Result<Response<ProjectSettings>, Status> {
        caller(&self.0, request.metadata()).await?.not_a_session()?;
        let settings = self.0.store.project_settings(&request.get_ref().id).await?;
        Ok(Response::new(settings.into()))
    }

    async fn create_project_settings(
        &self,
        request: Request<CreateProjectSettingsRequest>,
    ) -> Result<Response<ProjectSettings>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let request = request.into_inner();
        let change = SettingsChange {
            project_id: Some(request.project_id),
            group_access: request.group_access,
            repositories: request.repositories,
        };
        let create = CreateSettings { caller, change };
        Ok(Response::new(self.0.store.change(create).await?.into()))
    }

    async fn update_project_settings(
        &self,
        request: Request<UpdateProjectSettingsRequest>,
    ) -> Result<Response<ProjectSettings>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let request = request.into_inner();
        let edit = EditSettings {
            caller,
            id: request.id,
            change: SettingsChange {
                project_id: request.project_id,
                group_access: request.group_access,
                repositories: request.repositories,
            },
        };
        Ok(Response::new(self.0.store.change(edit).await?.into()))
    }

    async fn delete_project_settings(
        &self,
        request: Request<DeleteProjectSettingsRequest>,
    ) -> Result<Response<DeleteProjectSettingsResponse>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let id = request.into_inner().id;
        self.0.store.change(DeleteSettings { caller, id }).await?;
        Ok(Response::new(DeleteProjectSettingsResponse {}))
    }

    async fn list_project_settings(
        &self,
        request: Request<ListProjectSettingsRequest>,
    ) -> Result<Response<ListProjectSettingsResponse>, Status> {
        caller(&self.0, request.metadata()).await?.not_a_session()?;
        let page = page(request.get_ref().page, request.get_ref().size);
        let store = &self.0.store;
        let listed = store
            .all_project_settings(&Filter::default(), &Order::default(), page)
            .await?;
        Ok(Response::new(ListProjectSettingsResponse {
            metadata: list_meta(page, &listed),
            items: listed
                .items
                .into_iter()
                .map(ProjectSettings::from)
                .collect(),
        }))
    }

    async fn watch_project_settings(
        &self,
        request: Request<WatchProjectSettingsRequest>,
    ) -> Result<Response<Self::WatchProjectSettingsStream>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        caller.not_a_session()?;
        let events = self.0.events.settings().map(|event| {
            event.map(|event| ProjectSettingsWatchEvent {
                r#type: event.kind.into(),
                resource_id: event.object.id.clone(),
                project_settings: Some(event.object.clone().into()),
            })
        });
        Ok(answers(&self.0, &caller, events))
    }
}
