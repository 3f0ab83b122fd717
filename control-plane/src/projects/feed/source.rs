//! What is followed: the gRPC calls of projects, and of their settings.

use std::collections::HashSet;

use ambient_shared::{
    api::Api,
    proto::{self, EventType},
};
use futures_util::{StreamExt as _, future::BoxFuture};
use tonic::{Request, Status};

use crate::{
    projects::catalog::Catalog,
    sessions::remote::{RemoteError, call},
    watching::Events,
};

/// Largest answer to a list, in bytes.
const MAX_LIST: usize = 32 * 1024 * 1024;

/// What an event or an item is about.
#[derive(Debug)]
pub(in crate::projects) struct Named {
    pub(super) id: String,
    /// The project of settings; of a project itself its id. None in a deletion.
    pub(super) project: Option<String>,
}

/// One page of a list.
pub(in crate::projects) struct Page {
    pub(super) items: Vec<Named>,
    /// On all pages; 0 when the server does not say.
    pub(super) total: i32,
}

/// What is followed: projects, or their settings.
pub(in crate::projects) trait Source: Send + Sync + 'static {
    /// For logs.
    const WHAT: &'static str;

    /// Opens the watch.
    fn watch(api: &Api) -> BoxFuture<'static, Result<Events<Named>, Status>>;

    /// Reads one page, from 1.
    fn page(api: &Api, page: i32, size: i32) -> BoxFuture<'static, Result<Page, RemoteError>>;

    /// Takes note of one.
    fn take(catalog: &Catalog, named: &Named);

    /// Takes note of a complete list.
    fn listed(catalog: &Catalog, seen: &HashSet<String>, certain: bool);
}

/// [`Source`]: projects.
pub(in crate::projects) struct OfProjects;

impl Source for OfProjects {
    const WHAT: &'static str = "projects";

    fn watch(api: &Api) -> BoxFuture<'static, Result<Events<Named>, Status>> {
        let mut client = api.projects();
        Box::pin(async move {
            let request = Request::new(proto::WatchProjectsRequest {});
            let events = client.watch_projects(request).await?.into_inner();
            Ok(events
                .map(|event| {
                    let event = event?;
                    let deleted = event.r#type() == EventType::Deleted;
                    let id = event.project.and_then(|it| id_of(it.metadata));
                    let id = id.unwrap_or(event.resource_id);
                    Ok(Named {
                        project: (!deleted).then(|| id.clone()),
                        id,
                    })
                })
                .boxed())
        })
    }

    fn page(api: &Api, page: i32, size: i32) -> BoxFuture<'static, Result<Page, RemoteError>> {
        let mut client = api.projects().max_decoding_message_size(MAX_LIST);
        Box::pin(async move {
            let request = proto::ListProjectsRequest { page, size };
            let answer = client.list_projects(Request::new(request));
            let answer = call("list projects", answer).await?;
            let ids = answer.items.into_iter().filter_map(|it| id_of(it.metadata));
            Ok(Page {
                items: ids
                    .map(|id| Named {
                        project: Some(id.clone()),
                        id,
                    })
                    .collect(),
                total: answer.metadata.map_or(0, |it| it.total),
            })
        })
    }

    fn take(catalog: &Catalog, named: &Named) {
        if named.project.is_some() {
            catalog.project_seen(&named.id);
        } else {
            catalog.project_doubted(&named.id);
        }
    }

    fn listed(catalog: &Catalog, seen: &HashSet<String>, _certain: bool) {
        catalog.projects_listed(seen);
    }
}

/// [`Source`]: settings of projects.
pub(in crate::projects) struct OfSettings;

impl Source for OfSettings {
    const WHAT: &'static str = "project settings";

    fn watch(api: &Api) -> BoxFuture<'static, Result<Events<Named>, Status>> {
        let mut client = api.project_settings();
        Box::pin(async move {
            let request = Request::new(proto::WatchProjectSettingsRequest {});
            let events = client.watch_project_settings(request).await?.into_inner();
            Ok(events
                .map(|event| {
                    let event = event?;
                    let deleted = event.r#type() == EventType::Deleted;
                    let resource = event.resource_id;
                    Ok(match event.project_settings {
                        Some(settings) if !deleted => Named {
                            id: id_of(settings.metadata).unwrap_or(resource),
                            project: Some(settings.project_id),
                        },
                        settings => Named {
                            id: settings
                                .and_then(|it| id_of(it.metadata))
                                .unwrap_or(resource),
                            project: None,
                        },
                    })
                })
                .boxed())
        })
    }

    fn page(api: &Api, page: i32, size: i32) -> BoxFuture<'static, Result<Page, RemoteError>> {
        let mut client = api.project_settings().max_decoding_message_size(MAX_LIST);
        Box::pin(async move {
            let request = proto::ListProjectSettingsRequest { page, size };
            let answer = client.list_project_settings(Request::new(request));
            let answer = call("list project settings", answer).await?;
            let items = answer.items.into_iter().filter_map(|it| {
                Some(Named {
                    id: id_of(it.metadata)?,
                    project: Some(it.project_id),
                })
            });
            Ok(Page {
                items: items.collect(),
                total: answer.metadata.map_or(0, |it| it.total),
            })
        })
    }

    fn take(catalog: &Catalog, named: &Named) {
        match &named.project {
            Some(project) => catalog.settings_seen(&named.id, project),
            None => catalog.settings_doubted(&named.id),
        }
    }

    fn listed(catalog: &Catalog, seen: &HashSet<String>, certain: bool) {
        catalog.settings_listed(seen, certain);
    }
}

fn id_of(metadata: Option<proto::ObjectReference>) -> Option<String> {
    metadata.map(|it| it.id).filter(|id| !id.is_empty())
}
