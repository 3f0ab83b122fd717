//! What is kept of an object: little, and never data of a Secret. Pure.
//!
//! In: pods, and the metadata of Secrets, `ServiceAccounts` and Services. Out: [`Facts`], if the
//! object is a session's: its labels or annotations name the session, and the object has the name
//! that this session's has. So nobody can pass an object off as another session's.

use std::{collections::BTreeMap, time::SystemTime};

use ambient_shared::session::SessionId;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde_json::{Value, json};

use super::super::{
    managed::owns_all,
    names::{
        GENERATION, MANAGED, MANAGED_BY, PROJECT_ID, SESSION_ID, SESSION_ROOT, SessionRef,
        TOKEN_EXPIRES_AT, TOKEN_ISSUED_AT, TOKEN_KEYPAIR,
    },
    objects,
    pod_state::{Stage, has_running_container},
};
use crate::{backend::TokenTimes, keypair::id::KeyId};

/// Kinds of a session's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Pod,
    Secret,
    Account,
    Service,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Pod, Self::Secret, Self::Account, Self::Service];

    /// As people call them.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "pods",
            Self::Secret => "secrets",
            Self::Account => "serviceaccounts",
            Self::Service => "services",
        }
    }
}

/// An object that a watch told of.
#[derive(Debug, Clone)]
pub(crate) struct Sighting {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: u64,
    /// Whether it is being deleted.
    pub(crate) deleting: bool,
    /// What is known of it, if it is (still) a session's.
    pub(crate) facts: Option<Facts>,
}

/// What is known of a session's object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Whose it is.
    pub(crate) id: SessionId,
    /// The project that it says it is of.
    pub(crate) project: String,
    /// Which of that name it is.
    pub(crate) uid: String,
    /// The object's version.
    pub(crate) version: u64,
    /// UIDs of the `ServiceAccounts` that own it.
    pub(crate) owners: Vec<String>,
    /// Whether all labels are as we made them.
    pub(crate) labelled: bool,
    /// What its kind is about.
    pub(crate) what: What,
}

/// What is known of an object of each kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    Pod(PodFacts),
    /// What is known of its token; none when it was edited by somebody else.
    Secret(Option<TokenFacts>),
    Account {
        /// It is being deleted, and with it all else.
        deleting: bool,
    },
    Service {
        /// Edited by somebody else.
        edited: bool,
    },
}

/// What is known of a token in a Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenFacts {
    pub(crate) times: TokenTimes,
    /// Of the run that it was issued for; none when that was not noted.
    pub(crate) generation: Option<u32>,
}

/// What is known of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFacts {
    pub(crate) generation: u32,
    pub(crate) keypair: Option<KeyId>,
    pub(crate) stage: Stage,
    pub(crate) deleting: bool,
    /// The agent has ended, but a container beside it runs on.
    pub(crate) lingers: bool,
}

impl What {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Pod(_) => Kind::Pod,
            Self::Secret(_) => Kind::Secret,
            Self::Account { .. } => Kind::Account,
            Self::Service { .. } => Kind::Service,
        }
    }
}

/// Reads objects of one namespace.
pub(crate) struct Reader {
    /// The namespace.
    pub(crate) namespace: String,
    /// The project of a session, when it is known.
    pub(crate) project_of: super::ProjectOf,
}

impl Reader {
    /// A pod.
    pub(crate) fn pod(&self, pod: &Pod) -> Sighting {
        self.sighting(&pod.metadata, SessionRef::pod, |_| {
            let generation = annotation(&pod.metadata, GENERATION);
            let stage = Stage::of(pod);
            What::Pod(PodFacts {
                generation: generation.and_then(|it| it.parse().ok()).unwrap_or(0),
                keypair: key_id(&pod.metadata, TOKEN_KEYPAIR),
                deleting: pod.metadata.deletion_timestamp.is_some(),
                lingers: matches!(stage, Stage::Ended { .. }) && has_running_container(pod),
                stage,
            })
        })
    }

    /// A token Secret, by its metadata.
    pub(crate) fn secret(&self, metadata: &ObjectMeta) -> Sighting {
        self.sighting(metadata, SessionRef::token_secret, |session| {
            let managed = metadata.managed_fields.as_deref().unwrap_or_default();
            let is_ours = owns_all(managed, &written_secret(session, metadata));
            What::Secret(is_ours.then(|| token_facts(metadata)).flatten())
        })
    }

    /// A `ServiceAccount`, by its metadata.
    pub(crate) fn account(&self, metadata: &ObjectMeta) -> Sighting {
        self.sighting(metadata, SessionRef::service_account, |_| What::Account {
            deleting: metadata.deletion_timestamp.is_some(),
        })
    }

    /// A Service, by its metadata.
    pub(crate) fn service(&self, metadata: &ObjectMeta) -> Sighting {
        self.sighting(metadata, SessionRef::service, |session| {
            let owner = owners(metadata, session).pop().unwrap_or_default();
            let wanted = serde_json::to_value(objects::service(session, &owner));
            let managed = metadata.managed_fields.as_deref().unwrap_or_default();
            What::Service {
                edited: !owns_all(managed, &wanted.unwrap_or_default()),
            }
        })
    }

    fn sighting(
        &self,
        metadata: &ObjectMeta,
        name_of: impl Fn(&SessionRef) -> String,
        what: impl Fn(&SessionRef) -> What,
    ) -> Sighting {
        let version = version(metadata);
        let name = metadata.name.clone().unwrap_or_default();
        let facts = self
            .session(metadata)
            .filter(|session| name_of(session) == name)
            .map(|session| Facts {
                id: session.id.clone(),
                project: label(metadata, PROJECT_ID).unwrap_or_default().to_owned(),
                uid: metadata.uid.clone().unwrap_or_default(),
                version,
                owners: owners(metadata, &session),
                labelled: is_labelled(metadata, &session),
                what: what(&session),
            });
        Sighting {
            name,
            version,
            deleting: metadata.deletion_timestamp.is_some(),
            facts,
        }
    }

    /// The session that an object says it is of.
    fn session(&self, metadata: &ObjectMeta) -> Option<SessionRef> {
        let id = annotation(metadata, SESSION_ID).or_else(|| label(metadata, SESSION_ID))?;
        let id = SessionId::parse(id).ok()?;
        let project = (self.project_of)(&id)
            .or_else(|| label(metadata, PROJECT_ID).map(ToOwned::to_owned))
            .unwrap_or_default();
        SessionRef::new(&id, &project, &self.namespace).ok()
    }
}

/// The fields of a token Secret that nobody but us may write.
fn written_secret(session: &SessionRef, metadata: &ObjectMeta) -> Value {
    let mut annotations = BTreeMap::from([(TOKEN_ISSUED_AT, "")]);
    for name in [TOKEN_EXPIRES_AT, SESSION_ROOT, GENERATION] {
        if annotation(metadata, name).is_some() {
            annotations.insert(name, "");
        }
    }
    json!({
        "metadata": {"labels": session.labels(), "annotations": annotations},
        "data": {"api-token": "", "session-key": ""},
    })
}

fn token_facts(metadata: &ObjectMeta) -> Option<TokenFacts> {
    let time = |name| humantime::parse_rfc3339(annotation(metadata, name)?).ok();
    Some(TokenFacts {
        times: TokenTimes {
            issued_at: time(TOKEN_ISSUED_AT)?,
            // One that cannot be read is no time without end.
            expires_at: annotation(metadata, TOKEN_EXPIRES_AT)
                .map(|_| time(TOKEN_EXPIRES_AT).unwrap_or(SystemTime::UNIX_EPOCH)),
            root: key_id(metadata, SESSION_ROOT),
        },
        generation: annotation(metadata, GENERATION).and_then(|it| it.parse().ok()),
    })
}

fn key_id(metadata: &ObjectMeta, name: &str) -> Option<KeyId> {
    annotation(metadata, name)?.parse().ok()
}

fn owners(metadata: &ObjectMeta, session: &SessionRef) -> Vec<String> {
    let name = session.service_account();
    let owners = metadata.owner_references.iter().flatten();
    owners
        .filter(|owner| owner.kind == "ServiceAccount" && owner.name == name)
        .map(|owner| owner.uid.clone())
        .collect()
}

fn is_labelled(metadata: &ObjectMeta, session: &SessionRef) -> bool {
    let wanted = session.labels();
    [SESSION_ID, PROJECT_ID, MANAGED, MANAGED_BY]
        .iter()
        .all(|name| label(metadata, name) == wanted.get(*name).map(String::as_str))
        && annotation(metadata, SESSION_ID).is_none_or(|id| id == session.id.as_str())
}

fn label<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(name).map(String::as_str)
}

fn annotation<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

/// An object's version as a number, which it is on every API server with etcd below; else 0, and
/// then what comes later counts.
pub(crate) fn version(metadata: &ObjectMeta) -> u64 {
    let version = metadata.resource_version.as_deref();
    version.and_then(|it| it.parse().ok()).unwrap_or(0)
}
