//! The whole backend on a replica that does not lead, with all that is told of a change.

use ambient_shared::{proto, rest};
use futures_util::future::ready;

use super::*;
use crate::{
    backend::{
        Backend as _,
        kubernetes::{
            KubernetesBackend,
            projects::Projects,
            settings::{
                Companions, Images, KubernetesSettings, ModelAccess, Platform, PodSettings,
            },
        },
    },
    cluster::Clients,
    reconcile::due::Due,
    sessions::{Session, SessionCache},
};

struct Standby {
    backend: Arc<KubernetesBackend>,
    due: Arc<Due>,
    cache: SessionCache,
}

/// Of a cluster that answers nothing.
fn clients() -> Clients {
    let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
        let error = std::io::Error::from(std::io::ErrorKind::NotConnected);
        ready(Err::<http::Response<kube::client::Body>, _>(error))
    });
    let client = || kube::Client::new(silent, "ambient-code");
    Clients {
        own: client(),
        projects: client(),
        starting: client(),
        ending: client(),
        refresh: client(),
        upkeep: client(),
        watching: client(),
    }
}

impl Standby {
    /// One that has seen a namespace in which nothing is.
    fn new() -> Self {
        let cache = SessionCache::new();
        let due = Arc::new(Due::new(cache.clone(), None));
        let settings = Arc::new(KubernetesSettings {
            namespace: "ambient-code".to_owned(),
            platform: Platform::Standard,
            images: Images::default(),
            overlay: None,
            upstream: "http://api:8000".to_owned(),
            grpc_upstream: "http://api:8001".to_owned(),
            model_access: ModelAccess::default(),
            companions: Companions::default(),
            pods: PodSettings::default(),
        });
        let clients = clients();
        let (backend, _) = KubernetesBackend::new(
            &clients,
            Arc::clone(&settings),
            Arc::new(Projects::new(clients.clone(), settings)),
            {
                let cache = cache.clone();
                Arc::new(move |id| cache.get(id)?.object.project_id.clone())
            },
            {
                let due = Arc::clone(&due);
                Arc::new(move |id| due.touch(id))
            },
            Clock::manual(start()),
        );
        let backend = Arc::new(backend);
        due.set_backend(backend.clone());
        backend.inner.seen.namespaces_listed(&[found("team")]);
        for kind in Kind::ALL {
            backend.inner.seen.listed("team", kind, Vec::new(), 1);
        }
        Self {
            backend,
            due,
            cache,
        }
    }

    fn runs(&self) {
        let session = rest::Session {
            id: ID.to_owned(),
            project_id: Some("team".to_owned()),
            phase: Some("Running".to_owned()),
            ..rest::Session::default()
        };
        let session = Session::try_from(proto::Session::from(session)).unwrap();
        self.cache.apply_event(session);
        self.due.touch(&id(ID));
        let seen = &self.backend.inner.seen;
        let reader = self.backend.inner.reader("team");
        seen.applied("team", Kind::Secret, reader.secret(&secret(2, |_| {})));
        seen.applied("team", Kind::Pod, reader.pod(&pod(ID, 3, |_| {})));
    }

    fn is_deleted(&self) {
        assert!(self.cache.delete(&id(ID)));
        self.due.touch(&id(ID));
    }

    /// As the leader has it removed.
    fn is_removed(&self) {
        let seen = &self.backend.inner.seen;
        let reader = self.backend.inner.reader("team");
        seen.applied("team", Kind::Pod, reader.pod(&pod(ID, 4, is_deleted)));
        seen.deleted("team", Kind::Pod, &reader.pod(&pod(ID, 5, is_deleted)));
        seen.deleted("team", Kind::Secret, &reader.secret(&secret(6, |_| {})));
    }

    fn remembers_nothing(&self) {
        assert_eq!(self.backend.sessions(), []);
        assert_eq!(self.backend.run_state(&id(ID)), None);
        assert_eq!(self.cache.uncleaned(), []);
    }
}

#[tokio::test]
async fn a_deleted_session_is_forgotten_once_nothing_is_left_of_it() {
    let standby = Standby::new();
    standby.runs();
    standby.is_deleted();
    assert_eq!(standby.backend.sessions(), [id(ID)]);
    standby.is_removed();
    standby.remembers_nothing();
}

#[tokio::test]
async fn so_it_is_when_its_deletion_is_heard_of_last() {
    let standby = Standby::new();
    standby.runs();
    standby.is_removed();
    // It may be told how it ended, by this replica if it leads next.
    assert_eq!(standby.backend.sessions(), [id(ID)]);
    standby.is_deleted();
    standby.remembers_nothing();
}
