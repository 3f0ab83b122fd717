//! Keys in files: what `local` mode uses.
//!
//! All in `keypair/` below the data folder: `private.pem` and `public.pem`, `session-root` (32
//! bytes), `signing.pem`, and `jwks.json`, which the local API server reads. Optional, for a
//! rotation: `previous-private.pem`, `previous-session-root`, `previous-signing.pem`. Secrets have
//! mode 0600. A file is there whole or not at all, and is never overwritten (`jwks.json` apart,
//! which follows from the others).

use std::{
    fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ambient_shared::{proof::SessionRoot, swap};
use futures_util::future::BoxFuture;
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::{
    KeypairError, KeypairStore, Keys, Rotating,
    decrypting::DecryptingKey,
    pem::{self, InvalidKey},
    root,
    signing::{SigningKey, SigningKeys},
};

/// Folder of the keys, below the data folder.
pub const FOLDER: &str = "keypair";

/// File of the published signing keys, in [`FOLDER`].
pub const JWKS: &str = "jwks.json";

const ROOT: &str = "session-root";
const PREVIOUS_ROOT: &str = "previous-session-root";

/// Mode of what is no secret.
const PUBLIC_FILE: u32 = 0o644;

/// Longest key file that is read: a key of 8192 bits has some 6 KiB.
const MAX_FILE: u64 = 64 * 1024;

/// Keys in files.
#[derive(Debug, Clone)]
pub struct FileKeypairStore {
    /// The data folder; the keys are in `keypair/` below it.
    pub folder: PathBuf,
}

impl KeypairStore for FileKeypairStore {
    fn load_or_create(&self) -> BoxFuture<'_, Result<Keys, KeypairError>> {
        let files = Files(self.folder.join(FOLDER));
        Box::pin(async move {
            let loaded = tokio::task::spawn_blocking(move || files.load_or_create()).await;
            loaded.map_err(|_| KeypairError::CutOff)?
        })
    }
}

/// The folder of the keys.
struct Files(PathBuf);

impl Files {
    fn load_or_create(&self) -> Result<Keys, KeypairError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(swap::SECRET_DIR)
            .create(&self.0)
            .map_err(|source| self.failed("make", "", source))?;
        let current = self.pair()?;
        let root = self.read_or_create(ROOT, swap::SECRET_FILE, root::generate)?;
        let root = self.parse_root(ROOT, &root)?;
        let signing = self.private("signing.pem", SigningKey::from_pem, SigningKey::generate)?;
        let previous = self.optional("previous-private.pem", DecryptingKey::from_pem)?;
        let previous_root = self
            .read(PREVIOUS_ROOT)?
            .map(|bytes| self.parse_root(PREVIOUS_ROOT, &bytes))
            .transpose()?;
        let retired = self.optional("previous-signing.pem", SigningKey::from_pem)?;

        let signing = SigningKeys::new(signing, None, retired.as_ref());
        self.publish(&signing)?;
        let keypair = Rotating { current, previous };
        let root = Rotating {
            current: root,
            previous: previous_root,
        };
        Ok(Keys::new(keypair, root, signing))
    }

    /// The keypair. `public.pem` is looked for first: it is made last, so that if it is there,
    /// `private.pem` was there before it.
    fn pair(&self) -> Result<DecryptingKey, KeypairError> {
        let public_there = self.read("public.pem")?.is_some();
        if public_there && self.read("private.pem")?.is_none() {
            return Err(KeypairError::Incomplete {
                public: self.place("public.pem"),
                private: self.place("private.pem"),
            });
        }
        let key = self.private(
            "private.pem",
            DecryptingKey::from_pem,
            DecryptingKey::generate,
        )?;
        let public = self.read_or_create("public.pem", PUBLIC_FILE, || {
            Ok(Zeroizing::new(key.public_pem().as_bytes().to_vec()))
        })?;
        let is_pair = pem::text(&public).and_then(|public| key.is_pair_of(public));
        match is_pair {
            Ok(true) => Ok(key),
            Ok(false) => Err(KeypairError::Mismatch {
                public: self.place("public.pem"),
                private: self.place("private.pem"),
            }),
            Err(source) => Err(self.malformed("public.pem", source)),
        }
    }

    fn private<K>(
        &self,
        file: &'static str,
        parse: fn(&str) -> Result<K, InvalidKey>,
        generate: fn() -> Result<Zeroizing<String>, InvalidKey>,
    ) -> Result<K, KeypairError> {
        let pem = self.read_or_create(file, swap::SECRET_FILE, || {
            Ok(Zeroizing::new(generate()?.as_bytes().to_vec()))
        })?;
        self.warn_if_open_to_others(file);
        pem::text(&pem)
            .and_then(parse)
            .map_err(|source| self.malformed(file, source))
    }

    fn optional<K>(
        &self,
        file: &'static str,
        parse: fn(&str) -> Result<K, InvalidKey>,
    ) -> Result<Option<K>, KeypairError> {
        let Some(pem) = self.read(file)? else {
            return Ok(None);
        };
        pem::text(&pem)
            .and_then(parse)
            .map(Some)
            .map_err(|source| self.malformed(file, source))
    }

    fn parse_root(&self, file: &str, bytes: &[u8]) -> Result<SessionRoot, KeypairError> {
        self.warn_if_open_to_others(file);
        root::parse(bytes).map_err(|source| self.malformed(file, source))
    }

    fn publish(&self, keys: &SigningKeys) -> Result<(), KeypairError> {
        let jwks = keys.jwks();
        let path = self.0.join(JWKS);
        if fs::read(&path).is_ok_and(|there| there == jwks) {
            return Ok(());
        }
        swap::write_atomic(&path, &jwks, PUBLIC_FILE)
            .map_err(|source| self.failed("write", JWKS, source))
    }

    /// What is in the file, made first when it is not there.
    fn read_or_create(
        &self,
        file: &'static str,
        mode: u32,
        make: impl FnOnce() -> Result<Zeroizing<Vec<u8>>, InvalidKey>,
    ) -> Result<Zeroizing<Vec<u8>>, KeypairError> {
        if let Some(there) = self.read(file)? {
            return Ok(there);
        }
        let made = make().map_err(KeypairError::Generate)?;
        if self.create(file, mode, &made)? {
            info!(file = %self.place(file), "made a new key file");
            return Ok(made);
        }
        // Somebody else was faster; what is there now counts.
        self.read(file)?
            .ok_or_else(|| self.failed("read", file, io::ErrorKind::NotFound.into()))
    }

    /// Makes the file, whole and on disk; false when it is there already.
    fn create(&self, file: &'static str, mode: u32, content: &[u8]) -> Result<bool, KeypairError> {
        let path = self.0.join(file);
        let written = || -> io::Result<bool> {
            let mut new = tempfile::Builder::new()
                .prefix(".tmp-")
                .permissions(fs::Permissions::from_mode(mode))
                .tempfile_in(&self.0)?;
            // The mode given at creation is reduced by the umask.
            new.as_file()
                .set_permissions(fs::Permissions::from_mode(mode))?;
            new.write_all(content)?;
            new.as_file().sync_all()?;
            match new.persist_noclobber(&path) {
                Ok(_) => {}
                Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                    return Ok(false);
                }
                Err(error) => return Err(error.error),
            }
            // A key that was used must not be gone after a power cut.
            fs::File::open(&self.0)?.sync_all()?;
            Ok(true)
        };
        written().map_err(|source| self.failed("write", file, source))
    }

    fn read(&self, file: &str) -> Result<Option<Zeroizing<Vec<u8>>>, KeypairError> {
        let path = self.0.join(file);
        let read = || -> io::Result<Vec<u8>> {
            if fs::metadata(&path)?.len() > MAX_FILE {
                return Err(io::Error::other("too large for a key"));
            }
            fs::read(&path)
        };
        match read() {
            Ok(content) => Ok(Some(Zeroizing::new(content))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed("read", file, source)),
        }
    }

    fn warn_if_open_to_others(&self, file: &str) {
        let mode = fs::metadata(self.0.join(file)).map(|file| file.permissions().mode());
        if mode.is_ok_and(|mode| mode & 0o077 != 0) {
            warn!(file = %self.place(file), "others may read this secret; chmod it to 0600");
        }
    }

    fn failed(&self, action: &'static str, file: &str, source: io::Error) -> KeypairError {
        KeypairError::File {
            action,
            path: self.0.join(file),
            source,
        }
    }

    fn malformed(&self, file: &str, source: InvalidKey) -> KeypairError {
        KeypairError::Malformed {
            place: self.place(file),
            source,
        }
    }

    fn place(&self, file: &str) -> String {
        Path::new(&self.0).join(file).display().to_string()
    }
}

#[cfg(test)]
mod tests;
