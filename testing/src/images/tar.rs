//! Writes tar archives (POSIX ustar) that are the same for the same content.
//!
//! No times, owners or devices: every entry belongs to root and is from 1970, so that an image's
//! digest depends on nothing but what is in it.

/// Tar archives are written in blocks of this size.
const BLOCK: usize = 512;

/// An archive being written, in memory: images here are a few binaries.
#[derive(Debug, Default)]
pub struct Archive(Vec<u8>);

impl Archive {
    /// A folder, such as `bin`.
    pub fn folder(&mut self, path: &str, mode: u32) {
        self.header(&format!("{path}/"), mode, b'5', 0, "");
    }

    /// A file and its bytes.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.header(path, mode, b'0', content.len(), "");
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
    }

    /// A symbolic link at `path` to `target`.
    pub fn link(&mut self, path: &str, target: &str) {
        self.header(path, 0o777, b'2', 0, target);
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 2 * BLOCK]);
        self.0
    }

    fn header(&mut self, path: &str, mode: u32, kind: u8, size: usize, target: &str) {
        let mut header = [0; BLOCK];
        text(&mut header[..100], path);
        number(&mut header[100..108], mode as usize);
        number(&mut header[108..116], 0);
        number(&mut header[116..124], 0);
        number(&mut header[124..136], size);
        number(&mut header[136..148], 0);
        header[156] = kind;
        text(&mut header[157..257], target);
        header[257..265].copy_from_slice(b"ustar\x0000");
        // The sum counts its own field as spaces.
        header[148..156].fill(b' ');
        let sum: usize = header.iter().map(|byte| usize::from(*byte)).sum();
        number(&mut header[148..155], sum);
        self.0.extend_from_slice(&header);
    }
}

/// Longer names would need extension headers, which nothing here wants.
fn text(field: &mut [u8], value: &str) {
    assert!(value.len() <= field.len(), "{value} is too long for tar");
    field[..value.len()].copy_from_slice(value.as_bytes());
}

/// Octal digits that fill the field but for the NUL at its end.
fn number(field: &mut [u8], value: usize) {
    let digits = format!("{value:0width$o}", width = field.len() - 1);
    text(&mut field[..digits.len()], &digits);
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

    use super::*;

    #[test]
    fn what_is_written_is_what_another_tar_unpacks() {
        let mut archive = Archive::default();
        archive.folder("bin", 0o755);
        archive.file("bin/one", 0o750, &[7; 513]);
        archive.file("empty", 0o644, b"");
        archive.link("bin/two", "one");
        let folder = tempfile::tempdir().unwrap();
        let tar = folder.path().join("a.tar");
        fs::write(&tar, archive.finish()).unwrap();

        let unpacked = Command::new("tar")
            .args(["--extract", "--preserve-permissions", "--file"])
            .arg(&tar)
            .arg("--directory")
            .arg(folder.path())
            .output()
            .unwrap();

        let complaints = String::from_utf8_lossy(&unpacked.stderr);
        assert!(
            unpacked.status.success() && complaints.is_empty(),
            "{complaints}"
        );
        let one = folder.path().join("bin/one");
        assert_eq!(fs::read(&one).unwrap(), [7; 513]);
        let mode = fs::metadata(&one).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o750);
        assert_eq!(fs::read(folder.path().join("empty")).unwrap(), b"");
        let target = fs::read_link(folder.path().join("bin/two")).unwrap();
        assert_eq!(target, Path::new("one"));
    }
}
