//! Projects and their settings, over both faces.

use ambient_shared::proto::{
    CreateProjectRequest, CreateProjectSettingsRequest, DeleteProjectRequest, EventType,
    GetProjectRequest, ListProjectSettingsRequest, ListProjectsRequest, ProjectSettingsWatchEvent,
    UpdateProjectSettingsRequest, WatchProjectSettingsRequest, WatchProjectsRequest,
};
use reqwest::Method;
use serde_json::json;
use tonic::Code;

use crate::server::{OPERATOR, SERVICE, Server, take, user};

#[tokio::test]
async fn a_project_is_its_name() {
    let server = Server::start().await;
    let ann = user("ann");
    let fields = json!({"name": "team", "display_name": "Team", "labels": r#"{"a":"b"}"#});
    let (status, made) = server.post(&ann, "/projects", fields.clone()).await;
    assert_eq!((status, &made["id"]), (201, &json!("team")));
    assert_eq!(
        (&made["kind"], &made["href"]),
        (&json!("Project"), &json!("/api/ambient/v1/projects/team"))
    );
    assert_eq!(server.post(OPERATOR, "/projects", fields).await.0, 409);
    for bad in ["", "Team", "a_b", "-a", &"x".repeat(64)] {
        let (status, error) = server.post(&ann, "/projects", json!({"name": bad})).await;
        assert_eq!(status, 400, "{bad}");
        assert!(error["reason"].as_str().unwrap().contains("DNS label"));
    }
    let path = "/projects/team";
    assert_eq!(server.get(&user("bob"), path).await, (200, made));
    assert_eq!(
        server
            .patch(&user("bob"), path, json!({"status": "x"}))
            .await
            .0,
        403
    );
    assert_eq!(
        server.patch(&ann, path, json!({"name": "other"})).await.0,
        400
    );
    let (status, changed) = server.patch(&ann, path, json!({"description": "d"})).await;
    assert_eq!(
        (status, &changed["description"], &changed["display_name"]),
        (200, &json!("d"), &json!("Team"))
    );
    server
        .post(OPERATOR, "/projects", json!({"name": "all"}))
        .await;
    let (_, list) = server
        .get(&ann, "/projects?orderBy=name desc&search=name like '%a%'")
        .await;
    assert_eq!(list["kind"], "ProjectList");
    assert_eq!(
        (&list["items"][0]["id"], &list["items"][1]["id"]),
        (&json!("team"), &json!("all"))
    );
    assert_eq!(server.get(&ann, "/projects?search=phase='x'").await.0, 400);
    assert_eq!(
        server
            .call(Method::DELETE, &user("bob"), path, None)
            .await
            .0,
        403
    );
    assert_eq!(server.call(Method::DELETE, &ann, path, None).await.0, 204);
    assert_eq!(server.get(&ann, path).await.0, 404);
}

#[tokio::test]
async fn settings_belong_to_their_project() {
    let server = Server::start().await;
    let ann = user("ann");
    server
        .post(&ann, "/projects", json!({"name": "team"}))
        .await;
    let fields = json!({"project_id": "team", "group_access": "[]"});
    assert_eq!(
        server
            .post(&user("bob"), "/project_settings", fields.clone())
            .await
            .0,
        403
    );
    let (status, made) = server.post(&ann, "/project_settings", fields.clone()).await;
    assert_eq!((status, &made["kind"]), (201, &json!("ProjectSettings")));
    assert_eq!(server.post(&ann, "/project_settings", fields).await.0, 409);
    let unknown = json!({"project_id": "nowhere"});
    assert_eq!(
        server.post(OPERATOR, "/project_settings", unknown).await.0,
        400
    );
    let path = format!("/project_settings/{}", made["id"].as_str().unwrap());
    assert_eq!(server.get(&ann, &path).await, (200, made));
    let change = json!({"repositories": "r"});
    assert_eq!(
        server.patch(&user("bob"), &path, change.clone()).await.0,
        403
    );
    let (_, changed) = server.patch(&ann, &path, change).await;
    assert_eq!(
        (&changed["group_access"], &changed["repositories"]),
        (&json!("[]"), &json!("r"))
    );
    let list = |project: &'static str| server.get(&ann, project);
    assert_eq!(
        list("/project_settings?project_id=team").await.1["total"],
        1
    );
    assert_eq!(
        list("/project_settings?project_id=other").await.1["total"],
        0
    );
    // They go with their project.
    server
        .call(Method::DELETE, &ann, "/projects/team", None)
        .await;
    assert_eq!(server.get(&ann, &path).await.0, 404);
}

#[tokio::test]
async fn both_over_grpc_with_their_events() {
    let server = Server::start().await;
    let api = server.api(SERVICE);
    let (mut projects, mut settings) = (api.projects(), api.project_settings());
    let mut events = projects
        .watch_projects(WatchProjectsRequest {})
        .await
        .unwrap()
        .into_inner();
    let watch = WatchProjectSettingsRequest {};
    let mut settings_events = settings
        .watch_project_settings(watch)
        .await
        .unwrap()
        .into_inner();
    let create = CreateProjectRequest {
        name: "team".to_owned(),
        ..CreateProjectRequest::default()
    };
    projects.create_project(create.clone()).await.unwrap();
    let twice = projects.create_project(create).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists);
    let create = CreateProjectSettingsRequest {
        project_id: "team".to_owned(),
        ..CreateProjectSettingsRequest::default()
    };
    let made = settings
        .create_project_settings(create)
        .await
        .unwrap()
        .into_inner();
    let update = UpdateProjectSettingsRequest {
        id: made.metadata.unwrap().id,
        repositories: Some("r".to_owned()),
        ..UpdateProjectSettingsRequest::default()
    };
    settings.update_project_settings(update).await.unwrap();
    let list = projects
        .list_projects(ListProjectsRequest::default())
        .await
        .unwrap();
    assert_eq!(list.into_inner().metadata.unwrap().total, 1);
    let list = settings.list_project_settings(ListProjectSettingsRequest::default());
    assert_eq!(
        list.await.unwrap().into_inner().items[0].repositories(),
        "r"
    );
    let delete = DeleteProjectRequest {
        id: "team".to_owned(),
    };
    projects.delete_project(delete).await.unwrap();
    let get = GetProjectRequest {
        id: "team".to_owned(),
    };
    assert_eq!(
        projects.get_project(get).await.unwrap_err().code(),
        Code::NotFound
    );

    let seen = take(&mut events, 2).await;
    assert_eq!(seen[0].r#type(), EventType::Created);
    assert_eq!(
        (seen[1].r#type(), seen[1].resource_id.as_str()),
        (EventType::Deleted, "team")
    );
    let seen = take(&mut settings_events, 3).await;
    let kinds: Vec<_> = seen.iter().map(ProjectSettingsWatchEvent::r#type).collect();
    assert_eq!(
        kinds,
        [EventType::Created, EventType::Updated, EventType::Deleted]
    );
}
