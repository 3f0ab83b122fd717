//! What is kept on disk of a session's runs, as JSON that people can read.

use std::{collections::BTreeMap, path::PathBuf, time::SystemTime};

use ambient_shared::session::SessionId;
use serde::{Deserialize, Serialize};

use super::identity::ProcessIdentity;
use crate::keypair::id::KeyId;

/// Which session a folder is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionRecord {
    /// Its id.
    pub(crate) id: SessionId,
}

/// How a run is to be started: all that the shim needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunRecord {
    /// The session's generation.
    pub(crate) generation: u32,
    /// Value of [`super::tree::MARK`] in all its processes.
    pub(crate) mark: String,
    /// Control plane with whose end the run ends; none: the run survives it.
    pub(crate) tied_to: Option<ProcessIdentity>,
    /// `ambient-runner`, with its arguments.
    pub(crate) runner: ProgramRecord,
    /// `ambient-sidecar`, with its arguments.
    pub(crate) sidecar: ProgramRecord,
}

/// One program that the shim starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProgramRecord {
    /// Its path.
    pub(crate) program: PathBuf,
    /// Its arguments.
    pub(crate) arguments: Vec<String>,
    /// All of its environment.
    pub(crate) environment: BTreeMap<String, String>,
}

/// The processes of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ShimRecord {
    /// The run's generation.
    pub(crate) generation: u32,
    /// As in [`RunRecord::mark`].
    pub(crate) mark: String,
    /// The shim itself.
    pub(crate) shim: ProcessIdentity,
    /// The runner, once started.
    pub(crate) runner: Option<ProcessIdentity>,
    /// The sidecar that runs now.
    pub(crate) sidecar: Option<ProcessIdentity>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExitRecord {
    /// The run's generation.
    pub(crate) generation: u32,
    /// When.
    #[serde(with = "rfc3339")]
    pub(crate) at: SystemTime,
    /// How.
    #[serde(flatten)]
    pub(crate) how: Exit,
    /// The runner's last words, when it left any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<String>,
}

/// How the runner ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Exit {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(i32),
    /// Nobody saw how; the message says what is known.
    Lost(bool),
}

/// The times of the token in the Secret.
#[derive(Serialize, Deserialize)]
pub(super) struct TokenRecord {
    /// When the token was issued.
    #[serde(with = "rfc3339")]
    pub(super) issued_at: SystemTime,
    /// When it expires, if anybody said so.
    #[serde(with = "rfc3339::option")]
    pub(super) expires_at: Option<SystemTime>,
    /// The root of the session's key beside it.
    #[serde(default)]
    pub(super) root: Option<KeyId>,
}

/// Times in the records: RFC 3339 with nanoseconds, for people who look into the folder.
mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_rfc3339_nanos(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        let text = String::deserialize(from)?;
        humantime::parse_rfc3339(&text).map_err(D::Error::custom)
    }

    pub(super) mod option {
        use super::{Deserializer, Serializer, SystemTime};
        use serde::{Deserialize as _, de::Error as _};

        #[expect(clippy::ref_option, reason = "serde calls it with a reference")]
        pub(in super::super) fn serialize<S: Serializer>(
            time: &Option<SystemTime>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            match time {
                Some(time) => super::serialize(time, to),
                None => to.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<SystemTime>, D::Error> {
            Option::<String>::deserialize(from)?
                .map(|text| humantime::parse_rfc3339(&text).map_err(D::Error::custom))
                .transpose()
        }
    }
}
