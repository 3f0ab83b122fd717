//! `ProjectService`.

use ambient_shared::proto::{
    CreateProjectRequest, DeleteProjectRequest, DeleteProjectResponse, GetProjectRequest,
    ListProjectsRequest, ListProjectsResponse, Project, ProjectWatchEvent, UpdateProjectRequest,
    WatchProjectsRequest, project_service_server::ProjectService,
};
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status};

use super::{Answers, answers, caller, list_meta, page};
use crate::{
    App,
    projects::ProjectChange,
    search::{Filter, Order},
    store::projects::{CreateProject, DeleteProject, EditProject},
};

/// The service.
pub(super) struct ProjectsGrpc(pub(super) App);

#[tonic::async_trait]
impl ProjectService for ProjectsGrpc {
    type WatchProjectsStream = Answers<ProjectWatchEvent>;

    async fn get_project(
        &self,
        request: Request<GetProjectRequest>,
    ) -> Result<Response<Project>, Status> {
        caller(&self.0, request.metadata()).await?.not_a_session()?;
        let project = self.0.store.project(&request.get_ref().id).await?;
        Ok(Response::new(project.into()))
    }

    async fn create_project(
        &self,
        request: Request<CreateProjectRequest>,
    ) -> Result<Response<Project>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        caller.not_a_session()?;
        let request = request.into_inner();
        let change = ProjectChange {
            name: Some(request.name),
            display_name: request.display_name,
            description: request.description,
            labels: request.labels,
            annotations: request.annotations,
            status: None,
        };
        let project = self
            .0
            .store
            .change(CreateProject { caller, change })
            .await?;
        Ok(Response::new(project.into()))
    }

    async fn update_project(
        &self,
        request: Request<UpdateProjectRequest>,
    ) -> Result<Response<Project>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let request = request.into_inner();
        let edit = EditProject {
            caller,
            id: request.id,
            change: ProjectChange {
                name: request.name,
                display_name: request.display_name,
                description: request.description,
                labels: request.labels,
                annotations: request.annotations,
                status: request.status,
            },
        };
        Ok(Response::new(self.0.store.change(edit).await?.into()))
    }

    async fn delete_project(
        &self,
        request: Request<DeleteProjectRequest>,
    ) -> Result<Response<DeleteProjectResponse>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let id = request.into_inner().id;
        self.0.store.change(DeleteProject { caller, id }).await?;
        Ok(Response::new(DeleteProjectResponse {}))
    }

    async fn list_projects(
        &self,
        request: Request<ListProjectsRequest>,
    ) -> Result<Response<ListProjectsResponse>, Status> {
        caller(&self.0, request.metadata()).await?.not_a_session()?;
        let page = page(request.get_ref().page, request.get_ref().size);
        let store = &self.0.store;
        let listed = store
            .projects(&Filter::default(), &Order::default(), page)
            .await?;
        Ok(Response::new(ListProjectsResponse {
            metadata: list_meta(page, &listed),
            items: listed.items.into_iter().map(Project::from).collect(),
        }))
    }

    async fn watch_projects(
        &self,
        request: Request<WatchProjectsRequest>,
    ) -> Result<Response<Self::WatchProjectsStream>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        caller.not_a_session()?;
        let events = self.0.events.projects().map(|event| {
            event.map(|event| ProjectWatchEvent {
                r#type: event.kind.into(),
                resource_id: event.object.id.clone(),
                project: Some(event.object.clone().into()),
            })
        });
        Ok(answers(&self.0, &caller, events))
    }
}
