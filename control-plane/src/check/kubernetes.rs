//! The cluster: its API, our rights there, our keys.

use ambient_shared::exit;
use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::{
    authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
    core::v1::Namespace,
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};

use super::{CheckSettings, Row, limited};
use crate::{
    backend::kubernetes::names::{INSTALLATION, MANAGED},
    cluster::{self, Clients, Fence},
    keypair::secret::{Found, SecretKeypairStore},
    rules::{Place, Right, RuleSettings, Rules},
};

const API: &str = "Kubernetes API";
const RIGHTS: &str = "permissions";
const KEYS: &str = "keys";

/// The oldest Kubernetes that is supported: 1.33.
const OLDEST_MINOR: u32 = 33;

/// Most namespaces of projects that are looked through for one that stays.
const LOOKED_AT: u32 = 50;

/// How many rights are asked for at once.
const AT_ONCE: usize = 8;

pub(super) async fn rows(settings: &CheckSettings) -> Vec<Row> {
    let clients = match cluster::connect(&settings.cluster, Fence::open()).await {
        Ok(clients) => clients,
        Err(error) => return vec![Row::failed(API, exit::report(&error))],
    };
    let answers = limited(API, version(&clients.own)).await;
    if answers.outcome == super::Outcome::Failed {
        return vec![answers];
    }
    let store = SecretKeypairStore {
        client: clients.own.clone(),
        namespace: settings.rules.namespace.clone(),
    };
    let (rights, keys) = tokio::join!(rights(&clients, &settings.rules), keys(&store));
    [answers].into_iter().chain(rights).chain(keys).collect()
}

async fn version(client: &Client) -> Row {
    match client.apiserver_version().await {
        Ok(version) => {
            let minor = version
                .minor
                .trim_end_matches(|it: char| !it.is_ascii_digit());
            let seen = format!("version {}.{}", version.major, version.minor);
            match minor.parse::<u32>() {
                Ok(minor) if version.major == "1" && minor < OLDEST_MINOR => Row::note(
                    API,
                    format!("{seen}; the oldest that is supported is 1.{OLDEST_MINOR}"),
                ),
                _ => Row::ok(API, seen),
            }
        }
        Err(error) => {
            let why = exit::report(&error);
            Row::failed(
                API,
                format!("{why}; check KUBECONFIG or the ServiceAccount"),
            )
        }
    }
}

/// One row when all is well, else one for each right that is missing.
async fn rights(clients: &Clients, settings: &RuleSettings) -> Vec<Row> {
    let project = match a_project(&clients.projects, &settings.namespace).await {
        Ok(project) => project,
        Err(why) => return vec![Row::failed(RIGHTS, why)],
    };
    let needed = Rules::new(settings).rights();
    let (asked, unknown): (Vec<_>, Vec<_>) = needed
        .into_iter()
        .partition(|right| right.place != Place::Projects || project.is_some());
    let count = asked.len();
    let answers = stream::iter(asked).map(|right| {
        let project = project.as_deref();
        async move {
            let what = format!("may not {right}");
            limited(RIGHTS, async {
                match may(clients, &right, project).await {
                    Ok(true) => Row::ok(RIGHTS, ""),
                    Ok(false) => Row::failed(
                        RIGHTS,
                        format!("{what}; apply what `ambient-control-plane rules` prints"),
                    ),
                    Err(error) => Row::failed(
                        RIGHTS,
                        format!(
                            "cannot ask for the right to {right}: {}",
                            exit::report(&error)
                        ),
                    ),
                }
            })
            .await
        }
    });
    let answers: Vec<Row> = answers.buffered(AT_ONCE).collect().await;
    let mut rows: Vec<Row> = answers
        .into_iter()
        .filter(|row| row.outcome != super::Outcome::Ok)
        .collect();
    if rows.is_empty() {
        let ok = format!("all {count} are there");
        rows.push(match &project {
            Some(project) => Row::ok(
                RIGHTS,
                format!("{ok}, tried in project namespace {project}"),
            ),
            None => Row::note(
                RIGHTS,
                format!(
                    "{ok}; the {} in projects' namespaces can be tried once there is a project",
                    unknown.len()
                ),
            ),
        });
    }
    rows
}

/// A namespace of a project of this installation that is not about to go, if there is one.
async fn a_project(client: &Client, installation: &str) -> Result<Option<String>, String> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let ours = format!("{MANAGED}=true,{INSTALLATION}={installation}");
    let some = ListParams::default().labels(&ours).limit(LOOKED_AT);
    match namespaces.list_metadata(&some).await {
        Ok(found) => {
            let mut stay = found.items.into_iter().map(|it| it.metadata);
            let one = stay.find(|it| it.deletion_timestamp.is_none());
            Ok(one.and_then(|it| it.name))
        }
        // Said again, and better, where this right is asked for.
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(None),
        Err(error) => Err(format!("cannot list namespaces: {}", exit::report(&error))),
    }
}

async fn may(clients: &Clients, right: &Right, project: Option<&str>) -> Result<bool, kube::Error> {
    let (namespace, client) = match &right.place {
        Place::Cluster => (None, &clients.projects),
        Place::Projects => (project, &clients.projects),
        // What is read or made in single namespaces for ourselves; the rest is for projects.
        Place::Namespace(namespace) => {
            let for_us = matches!(right.resource.as_str(), "secrets" | "configmaps");
            let client = if for_us {
                &clients.own
            } else {
                &clients.projects
            };
            (Some(namespace.as_str()), client)
        }
    };
    let (resource, subresource) = match right.resource.split_once('/') {
        Some((resource, subresource)) => (resource, Some(subresource.to_owned())),
        None => (right.resource.as_str(), None),
    };
    let question = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                namespace: namespace.map(ToOwned::to_owned),
                group: Some(right.group.clone()),
                resource: Some(resource.to_owned()),
                subresource,
                verb: Some(right.verb.clone()),
                name: right.name.clone(),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let reviews: Api<SelfSubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &question).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

/// The key Secrets: what is there must be usable; what is not there is made at start.
async fn keys(store: &SecretKeypairStore) -> Vec<Row> {
    let looking = async {
        match store.look().await {
            Err(error) => Row::failed(KEYS, exit::report(&error)),
            Ok(found) => {
                let named = |wanted: Found| {
                    let names = found.iter().filter(|(_, found)| *found == wanted);
                    names.map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
                };
                let (usable, missing) = (named(Found::Usable), named(Found::Missing));
                match (usable.as_str(), missing.as_str()) {
                    (usable, "") => Row::ok(KEYS, format!("usable: {usable}")),
                    ("", missing) => Row::ok(KEYS, format!("made at start: {missing}")),
                    (usable, missing) => {
                        Row::ok(KEYS, format!("usable: {usable}; made at start: {missing}"))
                    }
                }
            }
        }
    };
    vec![limited(KEYS, looking).await]
}
