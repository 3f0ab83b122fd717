//! Watches the projects' namespaces, and the sessions' objects in each.
//!
//! In: the namespaces of our installation, cluster-wide; in each of them pods, and the metadata of
//! Secrets, `ServiceAccounts` and Services. Out: [`Seen`]. One task for each namespace, so that one
//! that we may not read, or that does not answer, holds up no other.

use std::{collections::HashMap, fmt::Debug, future::ready, sync::Arc, time::Duration};

use ambient_shared::exit;
use futures_util::{StreamExt as _, stream};
use k8s_openapi::{
    NamespaceResourceScope,
    api::core::v1::{Namespace, Pod, Secret, Service, ServiceAccount},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{Api, core::PartialObjectMeta};
use serde::de::DeserializeOwned;
use tokio::{
    task::{AbortHandle, JoinSet},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info};

use super::{
    follow::{Follower, Happened, WatchTimes},
    names::{
        CREATED_BY, FIELD_MANAGER, INSTALLATION, MANAGED, MANAGED_BY, SESSION_ID, check_project,
    },
    refusal::is_not_found,
    seen::{
        Found, Seen,
        facts::{Kind, Reader, Sighting, version},
    },
};

/// A task that watches all there is to see.
pub(super) struct Watches {
    pub(super) client: kube::Client,
    pub(super) seen: Arc<Seen>,
    /// The control plane's own namespace, which tells its projects from those of another one.
    pub(super) installation: String,
    /// Whether a tenant operator makes the namespaces: then all that have a project's name are ours.
    pub(super) tenants: bool,
    pub(super) times: WatchTimes,
}

/// A namespace that a watch told of.
struct Place {
    found: Found,
    deleting: bool,
}

/// How many namespaces are looked for at once: one that hangs holds up no other.
const AT_ONCE: usize = 8;

/// How long a failed look for a namespace rests.
const AGAIN: Duration = Duration::from_secs(5);

impl Watches {
    /// Watches until `shutdown`.
    pub(super) async fn run(self, shutdown: CancellationToken) {
        let mut tasks = JoinSet::new();
        let mut running: HashMap<(String, u64), AbortHandle> = HashMap::new();
        let namespaces = self.namespaces();
        tokio::pin!(namespaces);
        let mut progress = self.seen.progress();
        loop {
            progress.mark_unchanged();
            let wanted = self.seen.namespaces();
            running.retain(|place, task| {
                let is_wanted = wanted.contains(place);
                if !is_wanted {
                    task.abort();
                    info!(namespace = %place.0, "namespace is not watched any more");
                }
                is_wanted && !task.is_finished()
            });
            for place in wanted {
                running.entry(place).or_insert_with_key(|(name, _)| {
                    info!(namespace = %name, "namespace is watched");
                    tasks.spawn(watch(
                        self.client.clone(),
                        Arc::clone(&self.seen),
                        name.clone(),
                        self.times,
                    ))
                });
            }
            tokio::select! {
                () = shutdown.cancelled() => break,
                () = &mut namespaces => {}
                _ = progress.changed() => {}
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        error!(%error, "a watch of a namespace panicked; it begins anew");
                    }
                }
            }
        }
        tasks.shutdown().await;
    }

    /// Follows which namespaces there are.
    async fn namespaces(&self) {
        let api: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        let (doubts, mut doubted) = tokio::sync::watch::channel(Vec::new());
        let follower = Follower {
            api: api.clone(),
            selector: format!("{MANAGED}=true,{INSTALLATION}={}", self.installation),
            strays: None,
            kind: "namespaces",
            namespace: String::new(),
            times: self.times,
        };
        let following = follower.run(
            |namespace: &PartialObjectMeta<Namespace>| Place {
                found: found(&namespace.metadata),
                deleting: namespace.metadata.deletion_timestamp.is_some(),
            },
            |happened| match happened {
                Happened::Listed(all, _) => {
                    let all: Vec<Found> = all.into_iter().map(|it| it.found).collect();
                    doubts.send_replace(self.seen.namespaces_listed(&all));
                }
                Happened::Applied(place) => self.seen.namespace_seen(&place.found),
                Happened::Deleted(place) if place.deleting => {
                    self.seen.namespace_gone(&place.found);
                }
                // It has lost our label, but not our sessions.
                Happened::Deleted(_) | Happened::Reached(_) | Happened::Failed => {}
            },
        );
        // What a list did not have has lost its label, or is gone.
        let confirming = async {
            while doubted.changed().await.is_ok() {
                let names = doubted.borrow_and_update().clone();
                let confirmed = stream::iter(names)
                    .for_each_concurrent(AT_ONCE, |name| self.confirm(&api, name));
                confirmed.await;
            }
        };
        tokio::join!(following, confirming, self.find(&api));
    }

    async fn confirm(&self, api: &Api<PartialObjectMeta<Namespace>>, name: String) {
        match api.get(&name).await {
            Err(error) if is_not_found(&error) => self.seen.namespace_gone(&Found {
                name,
                uid: None,
                version: u64::MAX,
            }),
            // The next list asks again.
            Err(error) => {
                let reason = exit::report(&error);
                debug!(namespace = %name, %reason, "cannot tell whether it is there");
            }
            Ok(_) => {}
        }
    }

    /// Looks for sessions' namespaces that the list did not have.
    async fn find(&self, api: &Api<PartialObjectMeta<Namespace>>) {
        let mut progress = self.seen.progress();
        loop {
            progress.mark_unchanged();
            let found = stream::iter(self.seen.unfound())
                .map(|name| self.look(api, name))
                .buffer_unordered(AT_ONCE)
                .fold(true, |all, one| ready(all && one));
            let all_found = found.await;
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { return },
                () = sleep(AGAIN), if !all_found => {}
            }
        }
    }

    /// Looks for one namespace. Says whether that told anything.
    async fn look(&self, api: &Api<PartialObjectMeta<Namespace>>, name: String) -> bool {
        // Of a session that can have none; the API server would not say that it is not there.
        if check_project(&name, &name).is_err() {
            self.seen.namespace_absent(&name);
            return true;
        }
        match api.get_opt(&name).await {
            Ok(Some(namespace)) if self.is_ours(&namespace.metadata) => {
                if self.is_labelled(&namespace.metadata) {
                    debug!(namespace = %name, "a namespace was found before its watch told of it");
                } else {
                    info!(namespace = %name, "a namespace with sessions has lost our labels");
                }
                self.seen.namespace_seen(&found(&namespace.metadata));
            }
            Ok(_) => self.seen.namespace_absent(&name),
            Err(error) => {
                let reason = exit::report(&error);
                debug!(namespace = %name, %reason, "cannot tell whether it is there");
                return false;
            }
        }
        true
    }

    /// Whether it has the labels by which we list and watch.
    fn is_labelled(&self, namespace: &ObjectMeta) -> bool {
        label(namespace, MANAGED) == Some("true")
            && label(namespace, INSTALLATION) == Some(&self.installation)
    }

    /// Whether sessions of ours may be in a namespace that is not labelled as ours.
    fn is_ours(&self, namespace: &ObjectMeta) -> bool {
        let is_others = label(namespace, INSTALLATION).is_some_and(|it| it != self.installation);
        let annotations = namespace.annotations.as_ref();
        let is_made_by_us = annotations.is_some_and(|all| all.contains_key(CREATED_BY));
        let is_given = label(namespace, MANAGED) == Some("true");
        !is_others && (self.tenants || is_made_by_us || is_given)
    }
}

fn label<'a>(namespace: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    namespace.labels.as_ref()?.get(name).map(String::as_str)
}

fn found(metadata: &ObjectMeta) -> Found {
    Found {
        name: metadata.name.clone().unwrap_or_default(),
        uid: metadata.uid.clone(),
        version: version(metadata),
    }
}

/// One namespace that is watched.
struct Watched {
    client: kube::Client,
    seen: Arc<Seen>,
    namespace: String,
    reader: Reader,
    times: WatchTimes,
}

/// Watches one namespace.
async fn watch(client: kube::Client, seen: Arc<Seen>, namespace: String, times: WatchTimes) {
    let watched = Watched {
        reader: Reader {
            namespace: namespace.clone(),
            project_of: seen.project_of(),
        },
        client,
        seen,
        namespace,
        times,
    };
    tokio::join!(
        watched.follow::<PartialObjectMeta<Secret>>(Kind::Secret, |reader, it| {
            reader.secret(&it.metadata)
        }),
        watched.follow::<PartialObjectMeta<ServiceAccount>>(Kind::Account, |reader, it| {
            reader.account(&it.metadata)
        }),
        watched.follow::<PartialObjectMeta<Service>>(Kind::Service, |reader, it| {
            reader.service(&it.metadata)
        }),
        watched.pods(),
    );
}

impl Watched {
    /// After the others: a run that is seen before its token looks like one without.
    async fn pods(&self) {
        let others = [Kind::Secret, Kind::Account, Kind::Service];
        let mut progress = self.seen.progress();
        let settled = progress.wait_for(|_| self.seen.are_settled(&self.namespace, &others));
        drop(settled.await);
        self.follow::<Pod>(Kind::Pod, Reader::pod).await;
    }

    async fn follow<K>(&self, kind: Kind, read: fn(&Reader, &K) -> Sighting)
    where
        K: kube::Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K: Send + 'static,
        K::DynamicType: Default,
    {
        let (seen, namespace) = (&self.seen, &self.namespace);
        let follower = Follower {
            api: Api::<K>::namespaced(self.client.clone(), namespace),
            selector: format!("{MANAGED_BY}={FIELD_MANAGER}"),
            strays: Some(format!("{SESSION_ID},{MANAGED_BY}!={FIELD_MANAGER}")),
            kind: kind.as_str(),
            namespace: namespace.clone(),
            times: self.times,
        };
        let tell = |happened| match happened {
            Happened::Listed(all, version) => seen.listed(namespace, kind, all, version),
            Happened::Applied(sighting) => seen.applied(namespace, kind, sighting),
            Happened::Deleted(sighting) => seen.deleted(namespace, kind, &sighting),
            Happened::Reached(version) => seen.reached(namespace, kind, version),
            Happened::Failed => seen.failed(namespace, kind),
        };
        follower
            .run(|object| read(&self.reader, object), tell)
            .await;
    }
}
