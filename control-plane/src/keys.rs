//! `ambient-control-plane keys`: shows and rotates the keys in the cluster.
//!
//! In: [`KeysSettings`]. Out: what to tell the person who asked. A rotation only begins here; the
//! control plane that runs completes it (`keypair/rotation.rs`).

use std::fmt::Write as _;

use ambient_shared::exit;

use crate::{
    cluster::{self, ClusterError, ClusterSettings, Fence},
    keypair::{
        Ids, KeypairError,
        kind::KeyKind,
        secret::{SecretKeypairStore, change::ChangeError},
    },
    settings::LogSettings,
};

/// What is asked for, and where.
#[derive(Debug)]
pub struct KeysSettings {
    /// How the cluster is reached.
    pub cluster: ClusterSettings,
    /// The control plane's own namespace.
    pub namespace: String,
    /// What is asked for.
    pub action: KeysAction,
    /// What is logged.
    pub log: LogSettings,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeysAction {
    /// Which keys there are.
    Show,
    /// A new key of this kind.
    Rotate(KeyKind),
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// There is no cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The keys cannot be read.
    #[error(transparent)]
    Keypair(#[from] KeypairError),
    /// The keys are not changed.
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl KeysError {
    /// The exit code that says whose fault it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Cluster(_) => exit::CONFIG,
            Self::Keypair(error) => error.exit_code(),
            Self::Change(error) => error.exit_code(),
        }
    }
}

/// Does what is asked for, and says what there is now.
///
/// # Errors
/// [`KeysError`] says why it was not done.
pub async fn run(settings: &KeysSettings) -> Result<String, KeysError> {
    let clients = cluster::connect(&settings.cluster, Fence::open()).await?;
    let store = SecretKeypairStore {
        client: clients.own,
        namespace: settings.namespace.clone(),
    };
    match settings.action {
        KeysAction::Show => show(&store).await,
        KeysAction::Rotate(kind) => {
            store.rotate(kind).await?;
            let table = show(&store).await?;
            Ok(format!("{}\n\n{table}", what_happens_next(kind)))
        }
    }
}

async fn show(store: &SecretKeypairStore) -> Result<String, KeysError> {
    let mut table = String::new();
    let mut notes = String::new();
    let mut row = |key: &str, which: &str, id: &str| {
        let _ = writeln!(table, "{key:12}  {which:8}  {id}");
    };
    row("KEY", "WHICH", "ID");
    for kind in KeyKind::ALL {
        let Some((ids, is_ours)) = store.ids(kind).await? else {
            row(kind.as_str(), "none", "made when a control plane starts");
            continue;
        };
        let Ids {
            current,
            previous,
            next,
        } = ids;
        row(kind.as_str(), "current", &current);
        for (which, id) in [("previous", previous), ("next", next)] {
            if let Some(id) = id {
                row(kind.as_str(), which, &id);
            }
        }
        if !is_ours {
            let secret = kind.secret();
            let _ = writeln!(
                notes,
                "Secret {secret} is kept by somebody else; it is rotated there."
            );
        }
    }
    if !notes.is_empty() {
        let _ = write!(table, "\n{notes}");
    }
    Ok(table)
}

fn what_happens_next(kind: KeyKind) -> &'static str {
    match kind {
        KeyKind::Keypair => {
            "A new keypair is there. Sessions that start from now on use it.\n\
             The previous one is accepted until the last session that was started with it has \
             ended;\nthen the control plane takes it out."
        }
        KeyKind::SessionRoot => {
            "A new session root is there. The control plane writes a new session key to the Secret \
             of each\nsession with the next refresh. The previous root is accepted until all \
             sessions have seen theirs;\nthen the control plane takes it out. Where the refresh is \
             off, that is when the last session\nthat was started before has ended."
        }
        KeyKind::SigningKey => {
            "A new signing key is published, and signs some minutes from now. The one before stays \
             published\nuntil its last token has expired; then the control plane takes it out."
        }
    }
}
