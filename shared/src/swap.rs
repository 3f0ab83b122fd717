//! Replacing files so that a reader sees the old content or the new, never a part.
//!
//! [`write_atomic`] replaces one file by a rename. [`SecretVolume`] lays out a folder exactly as
//! the kubelet lays out a Secret volume: data in a timestamped folder, `..data` a symlink to it
//! that is swapped by a rename, and each visible file a symlink through `..data`.

use std::{
    fs, io,
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
};

use uuid::Uuid;

/// Mode of a secret file: its owner reads and writes.
pub const SECRET_FILE: u32 = 0o600;

/// Mode of a folder with secrets.
pub const SECRET_DIR: u32 = 0o700;

const DATA: &str = "..data";

/// Replaces `path` with a file of this content and mode, on disk before it is visible.
///
/// # Errors
/// Those of the file system; `path` is then as it was.
pub fn write_atomic(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".tmp-")
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(folder)?;
    // The mode given at creation is reduced by the umask.
    file.as_file()
        .set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// A folder that is updated as the kubelet updates a Secret volume. One writer only.
#[derive(Debug, Clone)]
pub struct SecretVolume {
    folder: PathBuf,
}

impl SecretVolume {
    /// A volume in this folder; nothing is touched yet.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// The folder that is "mounted".
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Replaces all files of the volume at once. Files have mode 0600, folders 0700.
    ///
    /// Steps as in the kubelet's `AtomicWriter`: write a new timestamped folder, point `..data_tmp`
    /// at it, rename that over `..data`, add and drop the visible symlinks, remove the old folder.
    /// What an interrupted write left is removed by the next.
    ///
    /// # Errors
    /// Those of the file system; readers then still see the old files.
    pub fn write(&self, files: &[(&str, &[u8])]) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(SECRET_DIR)
            .create(&self.folder)?;
        let name = format!("..{}", Uuid::now_v7().simple());
        if let Err(error) = self.put(&name, files) {
            // On a full disk each try would leave one more, and take what room there is.
            let _ = fs::remove_dir_all(self.folder.join(&name));
            return Err(error);
        }
        self.link_visible(files)?;
        self.remove_leftovers(&name)
    }

    /// Writes a new folder of this name, and points `..data` at it.
    fn put(&self, name: &str, files: &[(&str, &[u8])]) -> io::Result<()> {
        let new = self.folder.join(name);
        fs::DirBuilder::new().mode(SECRET_DIR).create(&new)?;
        for (file, content) in files {
            write_new(&new.join(file), content)?;
        }
        let staged = self.folder.join("..data_tmp");
        remove_if_there(&staged)?;
        symlink(name, &staged)?;
        fs::rename(&staged, self.folder.join(DATA))
    }

    /// Reads one file of the volume, as a container would.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, file: &str) -> io::Result<Vec<u8>> {
        fs::read(self.folder.join(file))
    }

    fn link_visible(&self, files: &[(&str, &[u8])]) -> io::Result<()> {
        for (file, _) in files {
            let link = self.folder.join(file);
            if fs::symlink_metadata(&link).is_err() {
                symlink(Path::new(DATA).join(file), &link)?;
            }
        }
        Ok(())
    }

    fn remove_leftovers(&self, current: &str) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let name = entry.file_name();
            let is_link = entry.file_type()?.is_symlink();
            let visible = !name.to_string_lossy().starts_with("..");
            if visible && is_link && fs::metadata(entry.path()).is_err() {
                fs::remove_file(entry.path())?;
            } else if !visible && !is_link && name != *current {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(SECRET_FILE)
        .open(path)?;
    file.write_all(content)?;
    file.sync_data()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn volume_looks_like_the_kubelets() {
        let dir = tempfile::tempdir().unwrap();
        let volume = SecretVolume::new(dir.path().join("secret"));
        volume
            .write(&[("bot-token", b"one"), ("session-key", b"k")])
            .unwrap();
        let first = fs::read_link(volume.folder().join("..data")).unwrap();
        volume
            .write(&[("bot-token", b"two"), ("session-key", b"k")])
            .unwrap();
        let second = fs::read_link(volume.folder().join("..data")).unwrap();

        assert_ne!(first, second);
        assert!(!volume.folder().join(first).exists());
        assert_eq!(
            fs::read_link(volume.folder().join("bot-token")).unwrap(),
            Path::new("..data/bot-token")
        );
        assert_eq!(volume.read("bot-token").unwrap(), b"two");
        assert_eq!(mode(volume.folder()), 0o700);
        assert_eq!(mode(&volume.folder().join("bot-token")), 0o600);
    }

    #[test]
    fn files_that_are_no_longer_given_vanish() {
        let dir = tempfile::tempdir().unwrap();
        let volume = SecretVolume::new(dir.path());
        volume.write(&[("a", b"1"), ("b", b"2")]).unwrap();
        volume.write(&[("b", b"3")]).unwrap();
        assert!(fs::symlink_metadata(dir.path().join("a")).is_err());
        assert_eq!(volume.read("b").unwrap(), b"3");
    }

    #[test]
    fn what_an_interrupted_write_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = SecretVolume::new(dir.path());
        volume.write(&[("a", b"1")]).unwrap();
        fs::create_dir(dir.path().join("..half-written")).unwrap();
        symlink("..half-written", dir.path().join("..data_tmp")).unwrap();
        assert_eq!(volume.read("a").unwrap(), b"1");
        volume.write(&[("a", b"2")]).unwrap();
        assert!(!dir.path().join("..half-written").exists());
        assert_eq!(volume.read("a").unwrap(), b"2");
    }

    #[test]
    fn what_cannot_be_written_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let volume = SecretVolume::new(dir.path());
        volume.write(&[("a", b"1")]).unwrap();
        let names = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<_> = entries.map(|it| it.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let before = names();
        let nowhere = volume.write(&[("a", b"2"), ("no/folder", b"3")]);
        assert_eq!(nowhere.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(names(), before);
        assert_eq!(volume.read("a").unwrap(), b"1");
    }

    #[test]
    fn readers_never_see_a_part() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let volume = SecretVolume::new(dir.path().join("volume"));
        let content = |n: usize| vec![b'a' + u8::try_from(n % 26).unwrap(); 4096];
        let done = AtomicBool::new(false);
        write_atomic(&path, &content(0), SECRET_FILE).unwrap();
        volume.write(&[("token", &content(0))]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..200 {
                    write_atomic(&path, &content(n), SECRET_FILE).unwrap();
                    volume.write(&[("token", &content(n))]).unwrap();
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                for seen in [fs::read(&path), volume.read("token")] {
                    // A reader that resolved the old folder in the moment it went is told so.
                    let Ok(seen) = seen else { continue };
                    assert_eq!(seen.len(), 4096);
                    assert!(seen.iter().all(|byte| *byte == seen[0]));
                }
            }
        });
        assert_eq!(mode(&path), SECRET_FILE);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn last_write_wins(writes in prop::collection::vec(
            prop::collection::btree_map("[a-z]{1,8}", prop::collection::vec(any::<u8>(), 0..64), 1..4),
            1..6,
        )) {
            let dir = tempfile::tempdir().unwrap();
            let volume = SecretVolume::new(dir.path());
            for files in &writes {
                let files: Vec<_> = files.iter().map(|(k, v)| (k.as_str(), v.as_slice())).collect();
                volume.write(&files).unwrap();
            }
            let last = writes.last().unwrap();
            for (file, content) in last {
                prop_assert_eq!(&volume.read(file).unwrap(), content);
            }
            let visible = fs::read_dir(dir.path()).unwrap()
                .filter(|entry| !entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'))
                .count();
            prop_assert_eq!(visible, last.len());
        }
    }
}
