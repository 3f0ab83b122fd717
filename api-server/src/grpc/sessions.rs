//! `SessionService`, but for messages.

use ambient_shared::proto::{
    CreateSessionRequest, DeleteSessionRequest, DeleteSessionResponse, GetSessionRequest,
    ListSessionsRequest, ListSessionsResponse, PushSessionMessageRequest, Session, SessionMessage,
    SessionWatchEvent, UpdateSessionRequest, UpdateSessionStatusRequest,
    WatchSessionMessagesRequest, WatchSessionsRequest, session_service_server::SessionService,
};
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status};

use super::{Answers, answers, caller, list_meta, messages, page};
use crate::{
    App,
    auth::access::{Action, Caller, Facts, Who},
    search::{Filter, Order},
    sessions::{Edit, SessionChange, StatusChange},
    store::sessions::{CreateSession, DeleteSession, EditSession},
};

/// The service.
pub(super) struct SessionsGrpc(pub(super) App);

impl SessionsGrpc {
    async fn edit(
        &self,
        caller: Caller,
        id: String,
        edit: Edit,
    ) -> Result<Response<Session>, Status> {
        let edit = EditSession { caller, id, edit };
        Ok(Response::new(self.0.store.change(edit).await?.into()))
    }
}

#[tonic::async_trait]
impl SessionService for SessionsGrpc {
    type WatchSessionsStream = Answers<SessionWatchEvent>;
    type WatchSessionMessagesStream = Answers<SessionMessage>;

    async fn get_session(
        &self,
        request: Request<GetSessionRequest>,
    ) -> Result<Response<Session>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let session = self.0.store.session(&request.get_ref().id).await?;
        caller.check(Action::Read, &Facts::of(&session))?;
        Ok(Response::new(session.into()))
    }

    async fn create_session(
        &self,
        request: Request<CreateSessionRequest>,
    ) -> Result<Response<Session>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        caller.not_a_session()?;
        let mut change = SessionChange::from(request.into_inner());
        change.created_by_user_id = caller.creator(change.created_by_user_id);
        let create = CreateSession {
            change,
            prompt_is_message: false,
        };
        Ok(Response::new(self.0.store.change(create).await?.into()))
    }

    async fn update_session(
        &self,
        request: Request<UpdateSessionRequest>,
    ) -> Result<Response<Session>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let mut request = request.into_inner();
        let id = std::mem::take(&mut request.id);
        self.edit(caller, id, Edit::Fields(request.into())).await
    }

    async fn update_session_status(
        &self,
        request: Request<UpdateSessionStatusRequest>,
    ) -> Result<Response<Session>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let mut request = request.into_inner();
        let id = std::mem::take(&mut request.id);
        self.edit(caller, id, Edit::Status(request.into())).await
    }

    async fn delete_session(
        &self,
        request: Request<DeleteSessionRequest>,
    ) -> Result<Response<DeleteSessionResponse>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        let id = request.into_inner().id;
        self.0.store.change(DeleteSession { caller, id }).await?;
        Ok(Response::new(DeleteSessionResponse {}))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        caller.not_a_session()?;
        let mut filter = Filter::default();
        if let Who::Person(name) = &caller.who {
            filter.and_equals("created_by_user_id", name);
        }
        let page = page(request.get_ref().page, request.get_ref().size);
        let store = &self.0.store;
        let listed = store.sessions(&filter, &Order::default(), page).await?;
        Ok(Response::new(ListSessionsResponse {
            metadata: list_meta(page, &listed),
            items: listed.items.into_iter().map(Session::from).collect(),
        }))
    }

    async fn watch_sessions(
        &self,
        request: Request<WatchSessionsRequest>,
    ) -> Result<Response<Self::WatchSessionsStream>, Status> {
        let caller = caller(&self.0, request.metadata()).await?;
        caller.not_a_session()?;
        let watcher = caller.clone();
        let events = self.0.events.sessions().filter_map(move |event| {
            let seen = match event {
                Ok(event) => watcher.sees(&event.object).then(|| {
                    Ok(SessionWatchEvent {
                        r#type: event.kind.into(),
                        resource_id: event.object.id.clone(),
                        session: Some(event.object.clone().into()),
                    })
                }),
                Err(error) => Some(Err(error)),
            };
            std::future::ready(seen)
        });
        Ok(answers(&self.0, &caller, events))
    }

    async fn push_session_message(
        &self,
        request: Request<PushSessionMessageRequest>,
    ) -> Result<Response<SessionMessage>, Status> {
        messages::push(&self.0, request).await.map_err(Status::from)
    }

    async fn watch_session_messages(
        &self,
        request: Request<WatchSessionMessagesRequest>,
    ) -> Result<Response<Self::WatchSessionMessagesStream>, Status> {
        messages::watch(&self.0, request)
            .await
            .map_err(Status::from)
    }
}

impl From<CreateSessionRequest> for SessionChange {
    fn from(request: CreateSessionRequest) -> Self {
        Self {
            name: Some(request.name),
            repo_url: request.repo_url,
            prompt: request.prompt,
            assigned_user_id: request.assigned_user_id,
            workflow_id: request.workflow_id,
            repos: request.repos,
            timeout: request.timeout,
            llm_model: request.llm_model,
            llm_temperature: request.llm_temperature,
            llm_max_tokens: request.llm_max_tokens,
            parent_session_id: request.parent_session_id,
            bot_account_name: request.bot_account_name,
            resource_overrides: request.resource_overrides,
            environment_variables: request.environment_variables,
            labels: request.labels,
            annotations: request.annotations,
            project_id: request.project_id,
            created_by_user_id: request.created_by_user_id,
        }
    }
}

impl From<UpdateSessionRequest> for SessionChange {
    fn from(request: UpdateSessionRequest) -> Self {
        Self {
            name: request.name,
            repo_url: request.repo_url,
            prompt: request.prompt,
            assigned_user_id: request.assigned_user_id,
            workflow_id: request.workflow_id,
            repos: request.repos,
            timeout: request.timeout,
            llm_model: request.llm_model,
            llm_temperature: request.llm_temperature,
            llm_max_tokens: request.llm_max_tokens,
            parent_session_id: request.parent_session_id,
            bot_account_name: request.bot_account_name,
            resource_overrides: request.resource_overrides,
            environment_variables: request.environment_variables,
            labels: request.labels,
            annotations: request.annotations,
            project_id: request.project_id,
            created_by_user_id: None,
        }
    }
}

impl From<UpdateSessionStatusRequest> for StatusChange {
    fn from(request: UpdateSessionStatusRequest) -> Self {
        Self {
            phase: request.phase,
            start_time: request.start_time,
            completion_time: request.completion_time,
            sdk_session_id: request.sdk_session_id,
            sdk_restart_count: request.sdk_restart_count,
            conditions: request.conditions,
            reconciled_repos: request.reconciled_repos,
            reconciled_workflow: request.reconciled_workflow,
            kube_cr_uid: request.kube_cr_uid,
            kube_namespace: request.kube_namespace,
        }
    }
}
