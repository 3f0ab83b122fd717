//! Keys in Secrets of our own namespace (contract section 2).
//!
//! The ConfigMap [`CONFIG_MAP`] owns them: it outlives a re-created Deployment, and deleting it
//! collects them all. What is missing is made with one create each, so that of many replicas that
//! start together one wins and the others read. A Secret is never overwritten; one of ours without
//! its owner gets it, one without our label belongs to somebody else and is only read.

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference},
};
use kube::{
    Api, Resource as _,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::json;
use tracing::{info, warn};

use self::content::{Content, Made};
use super::{
    Ids, KeypairError, KeypairStore, Keys, kind::KeyKind, pem::InvalidKey, readers::Readers,
};

pub mod change;
pub(super) mod content;

/// Owner of all key Secrets.
pub const CONFIG_MAP: &str = "ambient-cp-keys";
/// Secret of the RSA keypair.
pub const TOKEN_KEYPAIR: &str = "ambient-cp-token-keypair";
/// Secret of the root of session keys.
pub const SESSION_ROOT: &str = "ambient-cp-session-root";
/// Secret of the keys that sign minted tokens.
pub const SIGNING_KEY: &str = "ambient-cp-signing-key";
/// All key Secrets.
pub const SECRETS: [&str; 3] = [TOKEN_KEYPAIR, SESSION_ROOT, SIGNING_KEY];

/// Who we are, in labels and as field manager.
const CONTROL_PLANE: &str = "ambient-control-plane";

/// The label that says whose a Secret is.
const MANAGED_BY: &str = "ambient-code.io/managed-by";

/// How often one Secret is looked at again because somebody else made, changed or deleted it in
/// between. Two rounds are usual when replicas start together.
const ROUNDS: usize = 8;

/// Keys in Secrets.
#[derive(Clone)]
pub struct SecretKeypairStore {
    /// A client that may read and make the key Secrets.
    pub client: kube::Client,
    /// The control plane's own namespace.
    pub namespace: String,
}

/// Which Secret it is, and how often it was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    uid: Option<String>,
    version: Option<String>,
}

impl Version {
    fn of(secret: &Secret) -> Self {
        Self {
            uid: secret.metadata.uid.clone(),
            version: secret.metadata.resource_version.clone(),
        }
    }
}

/// A key Secret as it was read.
pub(super) struct Seen {
    pub(super) version: Version,
    pub(super) content: Content,
    pub(super) readers: Readers,
    /// Whether we may write it.
    pub(super) is_ours: bool,
}

/// What is there of one key Secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It holds what it should.
    Usable,
    /// There is none; it is made at start.
    Missing,
}

impl KeypairStore for SecretKeypairStore {
    fn load_or_create(&self) -> BoxFuture<'_, Result<Keys, KeypairError>> {
        Box::pin(async {
            let owner = self.owner().await?;
            let keypair = self.read_or_create(TOKEN_KEYPAIR, content::new_keypair, &owner);
            let keypair = keypair.await?;
            let root = self.read_or_create(SESSION_ROOT, content::new_root, &owner);
            let root = root.await?;
            let signing = self.read_or_create(SIGNING_KEY, content::new_signing_key, &owner);
            let signing = signing.await?;

            Ok(Keys::new(
                keypair.keypair()?,
                root.root()?,
                signing.signing()?,
            ))
        })
    }
}

impl SecretKeypairStore {
    /// Reads all, makes nothing.
    ///
    /// # Errors
    /// When one cannot be read or is malformed.
    pub async fn look(&self) -> Result<[(&'static str, Found); 3], KeypairError> {
        let mut found = SECRETS.map(|name| (name, Found::Missing));
        for (name, found) in &mut found {
            let Some(secret) = self.read(name).await? else {
                continue;
            };
            let content = self.content(name, secret);
            match *name {
                TOKEN_KEYPAIR => content.keypair().map(drop)?,
                SESSION_ROOT => content.root().map(drop)?,
                _ => content.signing().map(drop)?,
            }
            *found = Found::Usable;
        }
        Ok(found)
    }

    /// The public names of the keys of a kind, and whether the Secret is ours. None: there is none.
    ///
    /// # Errors
    /// When it cannot be read or is malformed.
    pub async fn ids(&self, kind: KeyKind) -> Result<Option<(Ids<String>, bool)>, KeypairError> {
        let name = kind.secret();
        let Some(secret) = self.read(name).await? else {
            return Ok(None);
        };
        let is_ours = change::is_ours(&secret.metadata);
        let ids = self.content(name, secret).ids(kind)?;
        Ok(Some((ids, is_ours)))
    }

    /// The reference to the ConfigMap, which is made first when it is not there.
    async fn owner(&self) -> Result<OwnerReference, KeypairError> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.namespace);
        let object = || format!("ConfigMap {}/{CONFIG_MAP}", self.namespace);
        let failed = |action, source| KeypairError::Kubernetes {
            action,
            object: object(),
            source: Box::new(source),
        };
        for _ in 0..ROUNDS {
            let map = match maps.get_opt(CONFIG_MAP).await {
                Ok(Some(map)) => map,
                Ok(None) => {
                    let new = ConfigMap {
                        metadata: self.metadata(CONFIG_MAP, None),
                        data: Some([("about".to_owned(), ABOUT.to_owned())].into()),
                        ..ConfigMap::default()
                    };
                    match maps.create(&by_us(), &new).await {
                        Ok(map) => map,
                        Err(error) if is_conflict(&error) => continue,
                        Err(error) => return Err(failed("make", error)),
                    }
                }
                Err(error) => return Err(failed("read", error)),
            };
            if let Some(owner) = map.owner_ref(&()) {
                return Ok(owner);
            }
        }
        Err(KeypairError::Unsettled { object: object() })
    }

    /// What is in the Secret, made first when there is none.
    async fn read_or_create(
        &self,
        name: &'static str,
        make: fn() -> Result<Made, InvalidKey>,
        owner: &OwnerReference,
    ) -> Result<Content, KeypairError> {
        for _ in 0..ROUNDS {
            if let Some(secret) = self.read(name).await? {
                if self.own(name, &secret, owner).await {
                    return Ok(self.content(name, secret));
                }
                continue;
            }
            let made = tokio::task::spawn_blocking(make).await;
            let made = made
                .map_err(|_| KeypairError::CutOff)?
                .map_err(KeypairError::Generate)?;
            let new = Secret {
                metadata: self.metadata(name, Some(owner)),
                type_: Some("Opaque".to_owned()),
                data: Some(bytes(&made)),
                ..Secret::default()
            };
            match self.secrets().create(&by_us(), &new).await {
                Ok(secret) => {
                    info!(secret = %self.place(name), "made a new key Secret");
                    return Ok(self.content(name, secret));
                }
                // Somebody else was faster; what is there now counts.
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(self.failed("make", name, error)),
            }
        }
        Err(KeypairError::Unsettled {
            object: self.place(name),
        })
    }

    /// A Secret that should be there.
    pub(super) async fn see(&self, name: &'static str) -> Result<Seen, KeypairError> {
        let Some(mut secret) = self.read(name).await? else {
            return Err(KeypairError::Missing {
                secret: self.place(name),
            });
        };
        Ok(Seen {
            version: Version::of(&secret),
            is_ours: change::is_ours(&secret.metadata),
            readers: Readers::of(secret.metadata.annotations.take()),
            content: self.content(name, secret),
        })
    }

    /// Sets these annotations of the Secret of the signing keys; none takes one away. Each replica
    /// writes its own alone, so no version is named.
    pub(super) async fn annotate(
        &self,
        annotations: impl IntoIterator<Item = (String, Option<String>)>,
    ) -> Result<(), KeypairError> {
        let annotations: BTreeMap<_, _> = annotations.into_iter().collect();
        let patch = json!({"metadata": {"annotations": annotations}});
        let secrets = self.secrets();
        let patched = secrets
            .patch_metadata(SIGNING_KEY, &patched_by_us(), &Patch::Merge(&patch))
            .await;
        patched.map_err(|error| self.failed("change", SIGNING_KEY, error))?;
        Ok(())
    }

    async fn read(&self, name: &str) -> Result<Option<Secret>, KeypairError> {
        let read = self.secrets().get_opt(name).await;
        read.map_err(|error| self.failed("read", name, error))
    }

    /// Makes the ConfigMap the owner of a Secret of ours that has lost it, or never had it. False
    /// when the Secret was changed meanwhile and must be read again. Not being able to is no reason
    /// to run without keys.
    async fn own(&self, name: &str, secret: &Secret, owner: &OwnerReference) -> bool {
        let Some(owners) = owners_to_set(&secret.metadata, owner) else {
            return true;
        };
        let patch = json!({"metadata": {
            "resourceVersion": secret.metadata.resource_version,
            "uid": secret.metadata.uid,
            "ownerReferences": owners,
        }});
        let secrets = self.secrets();
        let patch = Patch::Merge(&patch);
        match secrets.patch_metadata(name, &patched_by_us(), &patch).await {
            Ok(_) => {
                info!(secret = %self.place(name), owner = CONFIG_MAP, "gave a key Secret its owner");
                true
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => false,
            Err(error) => {
                let error = ambient_shared::exit::report(&error);
                warn!(secret = %self.place(name), %error, "cannot give a key Secret its owner");
                true
            }
        }
    }

    fn content(&self, name: &'static str, secret: Secret) -> Content {
        Content::new(self.place(name), secret.data.unwrap_or_default())
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn metadata(&self, name: &str, owner: Option<&OwnerReference>) -> ObjectMeta {
        let labels = [("app", CONTROL_PLANE), (MANAGED_BY, CONTROL_PLANE)];
        ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(self.namespace.clone()),
            labels: Some(
                labels
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
            ),
            owner_references: owner.map(|owner| vec![owner.clone()]),
            ..ObjectMeta::default()
        }
    }

    fn place(&self, name: &str) -> String {
        format!("Secret {}/{name}", self.namespace)
    }

    fn failed(&self, action: &'static str, name: &str, source: kube::Error) -> KeypairError {
        KeypairError::Kubernetes {
            action,
            object: self.place(name),
            source: Box::new(source),
        }
    }
}

impl std::fmt::Debug for SecretKeypairStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretKeypairStore")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// For who finds the ConfigMap and wonders.
const ABOUT: &str = "Owner of the key Secrets of the Ambient control plane. Deleting it deletes \
                     them: sessions that run then lose their credentials.";

/// The owners that a Secret of ours should have, when it has others: its own and the ConfigMap as
/// it is now. An earlier ConfigMap of that name is gone, so its reference would have the Secret
/// collected. None for a Secret of somebody else.
fn owners_to_set(secret: &ObjectMeta, owner: &OwnerReference) -> Option<Vec<OwnerReference>> {
    let label = secret.labels.as_ref()?.get(MANAGED_BY)?;
    let there = secret.owner_references.as_deref().unwrap_or_default();
    if label != CONTROL_PLANE || there.iter().any(|it| it.uid == owner.uid) {
        return None;
    }
    let is_earlier = |it: &&OwnerReference| it.kind == owner.kind && it.name == owner.name;
    let others = there.iter().filter(|it| !is_earlier(it)).cloned();
    Some(others.chain([owner.clone()]).collect())
}

fn bytes(made: &Made) -> BTreeMap<String, ByteString> {
    let entries = made.iter();
    entries
        .map(|(key, value)| ((*key).to_owned(), ByteString(value.to_vec())))
        .collect()
}

fn by_us() -> PostParams {
    PostParams {
        field_manager: Some(CONTROL_PLANE.to_owned()),
        ..PostParams::default()
    }
}

fn patched_by_us() -> PatchParams {
    PatchParams {
        field_manager: Some(CONTROL_PLANE.to_owned()),
        ..PatchParams::default()
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

#[cfg(test)]
mod tests;
