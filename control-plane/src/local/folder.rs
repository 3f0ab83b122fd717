//! The data folder: all state of local mode, and one `local` at a time.
//!
//! ```text
//! lock             locked while a `local` runs on it
//! keypair/         keys (see keypair/files.rs)
//! operator-token   an administrator's API token, for people and curl
//! service-token    the control plane's own API token
//! addresses.json   where the servers listened last: running sessions know these addresses
//! ambient.db       the API server's database
//! demo-agent.sh    the bundled agent
//! sessions/        a folder for each session (see backend/process/folder.rs)
//! ```

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ambient_shared::{
    swap::{SECRET_FILE, write_atomic},
    token::Token,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use zeroize::Zeroizing;

use crate::backend::process::folder::private_dir;

/// The bundled agent, in sh and curl.
const DEMO_AGENT: &str = include_str!("../../../examples/agent/agent.sh");

/// Random bytes of a token that we make.
const TOKEN_BYTES: usize = 32;

/// Why the data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another `local` runs on it.
    #[error("{} is in use by another local; end it, or choose another --data-dir", .0.display())]
    InUse(PathBuf),
    /// A file cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    File {
        /// Such as `read`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file holds something else than we wrote.
    #[error("{} is malformed ({reason}); mend it, or remove it to have a new one made", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never its content.
        reason: String,
    },
}

/// Where the servers listened last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// REST of the API server.
    pub rest: SocketAddr,
    /// gRPC of the API server.
    pub grpc: SocketAddr,
    /// The token endpoint.
    pub token: SocketAddr,
}

/// The data folder, ours alone until dropped.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: fs::File,
    temporary: Option<TempDir>,
}

impl DataDir {
    /// Opens the folder, making it if need be; a temporary one when none is given.
    ///
    /// # Errors
    /// When it cannot be made, or another `local` runs on it.
    pub fn open(path: Option<&Path>) -> Result<Self, DataDirError> {
        let (path, temporary) = if let Some(path) = path {
            private_dir(path).map_err(failed("make", path))?;
            // Sessions' programs run in other folders than we do.
            let absolute = fs::canonicalize(path).map_err(failed("find", path))?;
            (absolute, None)
        } else {
            let folder = std::env::temp_dir();
            let temporary = tempfile::Builder::new()
                .prefix("ambient-")
                .tempdir()
                .map_err(failed("make a folder in", &folder))?;
            (temporary.path().to_owned(), Some(temporary))
        };
        let lock_path = path.join("lock");
        let lock = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(SECRET_FILE)
            .open(&lock_path)
            .map_err(failed("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self {
                path,
                _lock: lock,
                temporary,
            }),
            Err(fs::TryLockError::WouldBlock) => Err(DataDirError::InUse(path)),
            Err(fs::TryLockError::Error(error)) => Err(failed("lock", &lock_path)(error)),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it vanishes when closed.
    pub fn is_temporary(&self) -> bool {
        self.temporary.is_some()
    }

    /// Lets go of it, and removes it if it is a temporary one.
    ///
    /// # Errors
    /// When a temporary one cannot be removed.
    pub fn close(self) -> Result<(), DataDirError> {
        match self.temporary {
            Some(temporary) => temporary.close().map_err(failed("remove", &self.path)),
            None => Ok(()),
        }
    }

    /// The API server's database.
    pub fn database(&self) -> PathBuf {
        self.path.join("ambient.db")
    }

    /// Folder of the sessions' folders.
    pub fn sessions(&self) -> PathBuf {
        self.path.join("sessions")
    }

    /// File of [`DataDir::operator_token`].
    pub fn operator_token_file(&self) -> PathBuf {
        self.path.join("operator-token")
    }

    /// An administrator's API token; made once.
    ///
    /// # Errors
    /// When the file cannot be read or made, or holds no token.
    pub fn operator_token(&self) -> Result<Token, DataDirError> {
        token(&self.operator_token_file())
    }

    /// The control plane's own API token; made once.
    ///
    /// # Errors
    /// As [`DataDir::operator_token`].
    pub fn service_token(&self) -> Result<Token, DataDirError> {
        token(&self.path.join("service-token"))
    }

    /// Writes the bundled agent, and gives the command that runs it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn demo_agent(&self) -> Result<Vec<String>, DataDirError> {
        let path = self.path.join("demo-agent.sh");
        write_atomic(&path, DEMO_AGENT.as_bytes(), SECRET_FILE).map_err(failed("write", &path))?;
        Ok(vec!["sh".to_owned(), path.to_string_lossy().into_owned()])
    }

    /// Where the servers listened last.
    ///
    /// # Errors
    /// When the file cannot be read, or is malformed.
    pub fn addresses(&self) -> Result<Option<Addresses>, DataDirError> {
        let path = self.addresses_file();
        match fs::read(&path) {
            Ok(json) => {
                serde_json::from_slice(&json)
                    .map(Some)
                    .map_err(|error| DataDirError::Malformed {
                        path,
                        reason: error.to_string(),
                    })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Keeps the addresses for the next start.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep_addresses(&self, addresses: &Addresses) -> Result<(), DataDirError> {
        let path = self.addresses_file();
        let failed = failed("write", &path);
        match serde_json::to_vec_pretty(addresses) {
            Ok(json) => write_atomic(&path, &json, SECRET_FILE).map_err(failed),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn addresses_file(&self) -> PathBuf {
        self.path.join("addresses.json")
    }
}

/// The token in this file, which is made if missing.
fn token(path: &Path) -> Result<Token, DataDirError> {
    match fs::read_to_string(path) {
        Ok(text) => {
            let text = Zeroizing::new(text);
            // Copied or made by hand, it may be open to others.
            fs::set_permissions(path, fs::Permissions::from_mode(SECRET_FILE))
                .map_err(failed("close to others", path))?;
            Token::new(&text, None).map_err(|error| DataDirError::Malformed {
                path: path.to_owned(),
                reason: error.to_string(),
            })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut bytes = Zeroizing::new([0; TOKEN_BYTES]);
            aws_lc_rs::rand::fill(&mut *bytes)
                .map_err(|_| failed("make", path)(io::Error::other("no random numbers")))?;
            let text = Zeroizing::new(URL_SAFE_NO_PAD.encode(*bytes));
            write_atomic(path, format!("{}\n", *text).as_bytes(), SECRET_FILE)
                .map_err(failed("write", path))?;
            token(path)
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(DataDirError::Malformed {
            path: path.to_owned(),
            reason: "not text".to_owned(),
        }),
        Err(error) => Err(failed("read", path)(error)),
    }
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> DataDirError + use<> {
    let path = path.to_owned();
    move |source| DataDirError::File {
        action,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_local_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let open = DataDir::open(Some(&path)).unwrap();
        assert!(matches!(
            DataDir::open(Some(&path)),
            Err(DataDirError::InUse(_))
        ));
        drop(open);
        DataDir::open(Some(&path)).unwrap();
    }

    #[test]
    fn tokens_are_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(Some(dir.path())).unwrap();
        let operator = data.operator_token().unwrap();
        assert!(data.operator_token().unwrap().same_secret(&operator));
        assert!(!data.service_token().unwrap().same_secret(&operator));
        let mode = fs::metadata(data.operator_token_file())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn malformed_files_are_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(Some(dir.path())).unwrap();
        fs::write(data.operator_token_file(), "two words").unwrap();
        fs::write(dir.path().join("addresses.json"), "{").unwrap();
        let token = data.operator_token().unwrap_err().to_string();
        assert!(token.contains("operator-token") && !token.contains("two words"));
        let addresses = data.addresses().unwrap_err().to_string();
        assert!(addresses.contains("addresses.json"), "{addresses}");
        assert_eq!(
            fs::read_to_string(data.operator_token_file()).unwrap(),
            "two words"
        );
    }

    #[test]
    fn a_temporary_folder_goes_when_closed() {
        let data = DataDir::open(None).unwrap();
        let path = data.path().to_owned();
        data.demo_agent().unwrap();
        data.close().unwrap();
        assert!(!path.exists());
    }
}
