//! A small disk that one program alone has, and that a test can fill.
//!
//! In: a folder, and the program that is to find a disk there. Out: that program below `unshare`
//! (util-linux), in a mount namespace of its own with a tmpfs on the folder. What was in the folder
//! is on the disk. Needs root, or leave to make user namespaces. The test sees the disk through
//! `/proc`, as long as the program runs.

use std::{
    fs::{self, File},
    io::{ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;

use crate::programs::Program;

/// What is written at a time to fill it: a page of a tmpfs.
const PAGE: usize = 4096;

/// A small disk.
#[derive(Debug, Clone)]
pub struct SmallDisk {
    folder: PathBuf,
    size: String,
}

/// All the room that was left on a disk. It is free again when this is dropped.
#[derive(Debug)]
#[must_use = "there is room again when it is dropped"]
pub struct Ballast(PathBuf);

impl SmallDisk {
    /// A disk of this size, as `mount` takes it, such as `4m`, on an existing folder.
    pub fn new(folder: &Path, size: &str) -> Self {
        Self {
            folder: folder.to_owned(),
            size: size.to_owned(),
        }
    }

    /// A program that has it: this binary, with the arguments that are added. It keeps the process
    /// id that it is started with.
    pub fn program(&self, binary: &Path) -> Program {
        let script = r#"
            disk=$1 size=$2
            shift 2
            kept=$(mktemp -d)
            cp -a "$disk/." "$kept"
            mount -t tmpfs -o "size=$size,mode=0700" none "$disk"
            cp -a "$kept/." "$disk"
            rm -rf "$kept"
            exec "$@"
        "#;
        let namespaces: &[&str] = if geteuid().is_root() {
            &["--mount"]
        } else {
            &["--user", "--map-root-user", "--mount"]
        };
        Program::at("unshare")
            .args(namespaces)
            .args(["sh", "-ec", script, "sh"])
            .arg(&self.folder)
            .arg(&self.size)
            .arg(binary)
    }

    /// The folder as the running program of this process id sees it.
    pub fn seen_by(&self, pid: u32) -> PathBuf {
        let inside = self.folder.strip_prefix("/").unwrap_or(&self.folder);
        Path::new("/proc")
            .join(pid.to_string())
            .join("root")
            .join(inside)
    }

    /// Takes all the room that is left.
    ///
    /// # Panics
    /// When it cannot be written for another reason.
    pub fn fill(&self, pid: u32) -> Ballast {
        let path = self.seen_by(pid).join("ballast");
        let mut file = File::create_new(&path).expect("a new file on the disk");
        let full = loop {
            if let Err(error) = file.write_all(&[b'x'; PAGE]) {
                break error;
            }
        };
        assert_eq!(full.kind(), ErrorKind::StorageFull, "{full}");
        Ballast(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        // Gone with the disk when the program has ended.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_program_has_it_and_what_was_there_is_on_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("before"), "it").unwrap();
        let disk = SmallDisk::new(folder.path(), "64k");
        let mut program = disk
            .program(Path::new("/bin/sh"))
            .args(["-c", r#"echo ready; while read -r line; do echo "$line" > "$0/said" && echo said || echo full; done"#])
            .arg(folder.path())
            .start();
        program.output_line("ready").await;
        let seen = disk.seen_by(program.pid());
        assert_eq!(fs::read_to_string(seen.join("before")).unwrap(), "it");

        let ballast = disk.fill(program.pid());
        program.write_line("one").await;
        program.output_line("full").await;
        drop(ballast);
        program.write_line("two").await;
        program.output_line("said").await;

        assert_eq!(fs::read_to_string(seen.join("said")).unwrap(), "two\n");
        assert!(!folder.path().join("said").exists());
    }
}
