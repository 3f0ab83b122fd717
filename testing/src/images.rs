//! Container images of static binaries, as archives: no Docker, no registry.
//!
//! In: files. Out: an OCI image layout in a tar archive, which `ctr images import` and
//! `kind load image-archive` take; a `manifest.json` beside it lets every `docker load` take it
//! too. The same content gives the same bytes.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use aws_lc_rs::digest;
use serde_json::{Value, json};

use self::tar::Archive;

mod tar;

/// Tag of all images made here. Not `latest`, which a kubelet would try to pull.
const TAG: &str = "e2e";

/// The user of the images that hold our own binaries; the pods ask for it too.
const OUR_USER: &str = "65532:65532";

/// Where an image starts; nothing of the machine that makes it may be in it.
const EPOCH: &str = "1970-01-01T00:00:00Z";

/// Where a static shell is looked for (Debian: package `busybox-static`).
const BUSYBOX: [&str; 3] = ["/usr/bin/busybox", "/bin/busybox", "/usr/local/bin/busybox"];

/// Our programs and what their images say of them, as in `images/Dockerfile`.
const OURS: [(&str, &str); 4] = [
    (
        "ambient-runner",
        "Starts an agent and keeps its API token fresh.",
    ),
    (
        "ambient-sidecar",
        "Follows a mounted API token, serves it, and proxies with it.",
    ),
    (
        "ambient-control-plane",
        "Runs agent sessions as pods and keeps their API tokens fresh.",
    ),
    ("ambient-api-server", "Session API on an embedded database."),
];

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// One of the binaries that an image is made of is not there.
    #[error("cannot read {}; {mend}", path.display())]
    Binary {
        /// The file.
        path: PathBuf,
        /// What to do.
        mend: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The binary would not start in an image that holds nothing else.
    #[error("{} needs a loader or is no program for Linux; {mend}", path.display())]
    NotStatic {
        /// The file.
        path: PathBuf,
        /// What to do.
        mend: &'static str,
    },
    /// The shell does not say which programs are in it.
    #[error("cannot ask {} for its programs: {said}", path.display())]
    Applets {
        /// The shell.
        path: PathBuf,
        /// What went wrong.
        said: String,
    },
    /// The archive could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The archive.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// An image: one layer and how it starts.
#[derive(Debug, Clone)]
pub struct Image {
    name: &'static str,
    layer: Vec<u8>,
    /// The image's `config`, as the OCI image specification names its fields.
    config: Value,
}

impl Image {
    /// The runner, or any other static binary of ours, alone in its image: started by default,
    /// as user 65532. The same files as `images/Dockerfile` gives.
    ///
    /// # Errors
    /// When the binary is not there or not static.
    pub fn of_ours(name: &'static str, folder: &Path) -> Result<Self, ImageError> {
        let mend = "build it with `make static static-servers`";
        let binary = static_binary(&folder.join(name), mend)?;
        let about = OURS.iter().find(|(known, _)| *known == name);
        let about = about.map(|(_, about)| *about).unwrap_or_default();
        let mut layer = Archive::default();
        layer.file(name, 0o755, &binary);
        layer.folder("tmp", 0o1777);
        Ok(Self {
            name,
            layer: layer.finish(),
            config: json!({
                "User": OUR_USER,
                "Entrypoint": [format!("/{name}")],
                "Env": ["PATH=/"],
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.vendor": "Ambient",
                    "org.opencontainers.image.licenses": "Apache-2.0",
                    "org.opencontainers.image.title": name,
                    "org.opencontainers.image.description": about,
                    "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                },
            }),
        })
    }

    /// An image that knows nothing of us: a shell and the usual small programs in `/bin`, root by
    /// default.
    ///
    /// # Errors
    /// When there is no static busybox.
    pub fn shell() -> Result<Self, ImageError> {
        let (path, binary) = busybox()?;
        let mut layer = Archive::default();
        layer.folder("bin", 0o755);
        layer.file("bin/busybox", 0o755, &binary);
        for program in applets(&path)? {
            layer.link(&format!("bin/{program}"), "busybox");
        }
        layer.folder("etc", 0o755);
        layer.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/sh\n");
        layer.folder("tmp", 0o1777);
        Ok(Self {
            name: "shell",
            layer: layer.finish(),
            config: json!({ "Cmd": ["sh"], "Env": ["PATH=/bin"], "WorkingDir": "/" }),
        })
    }

    /// What holds a pod's namespaces: sleeps for ever.
    ///
    /// # Errors
    /// When there is no static busybox.
    pub fn pause() -> Result<Self, ImageError> {
        let (_, binary) = busybox()?;
        let mut layer = Archive::default();
        layer.file("busybox", 0o755, &binary);
        Ok(Self {
            name: "pause",
            layer: layer.finish(),
            config: json!({
                "User": OUR_USER,
                "Entrypoint": ["/busybox", "sleep", "infinity"],
                "WorkingDir": "/",
            }),
        })
    }

    /// Those of all our programs.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn of_all_ours(folder: &Path) -> Result<Vec<Self>, ImageError> {
        let names = OURS.iter();
        names.map(|(name, _)| Self::of_ours(name, folder)).collect()
    }

    /// All that `make e2e` uses; ours from the folder that `make static` fills.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn all(ours: &Path) -> Result<Vec<Self>, ImageError> {
        Ok(vec![
            Self::of_ours("ambient-runner", ours)?,
            Self::of_ours("ambient-sidecar", ours)?,
            Self::shell()?,
            Self::pause()?,
        ])
    }

    /// Its name, without the tag.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What pods call it: `images.example/NAME:e2e`.
    pub fn reference(name: &str) -> String {
        format!("images.example/{name}:{TAG}")
    }

    /// Writes it to `NAME.tar` in this folder and gives the path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_to(&self, folder: &Path) -> Result<PathBuf, ImageError> {
        let path = folder.join(format!("{}.tar", self.name));
        let written = fs::write(&path, self.archive());
        written.map_err(|source| ImageError::Write {
            path: path.clone(),
            source,
        })?;
        Ok(path)
    }

    /// The whole archive.
    pub fn archive(&self) -> Vec<u8> {
        let reference = Self::reference(self.name);
        let platform = json!({ "architecture": architecture(), "os": "linux" });
        let layer = Blob::new("application/vnd.oci.image.layer.v1.tar", self.layer.clone());
        let config = Blob::json(
            "application/vnd.oci.image.config.v1+json",
            &json!({
                "created": EPOCH,
                "architecture": platform["architecture"],
                "os": platform["os"],
                "config": self.config,
                "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
                "history": [{ "created": EPOCH, "created_by": "ambient-testing" }],
            }),
        );
        let manifest = Blob::json(
            "application/vnd.oci.image.manifest.v1+json",
            &json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": config.descriptor(),
                "layers": [layer.descriptor()],
            }),
        );
        let mut listed = manifest.descriptor();
        listed["platform"] = platform;
        listed["annotations"] = json!({
            // What containerd calls it, then what the specification knows.
            "io.containerd.image.name": reference,
            "org.opencontainers.image.ref.name": TAG,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [listed],
        });
        let for_docker = json!([{
            "Config": config.path(),
            "RepoTags": [reference],
            "Layers": [layer.path()],
        }]);

        let mut archive = Archive::default();
        archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#);
        archive.file("index.json", 0o644, index.to_string().as_bytes());
        archive.file("manifest.json", 0o644, for_docker.to_string().as_bytes());
        archive.folder("blobs", 0o755);
        archive.folder("blobs/sha256", 0o755);
        for blob in [&manifest, &config, &layer] {
            archive.file(&blob.path(), 0o644, &blob.content);
        }
        archive.finish()
    }
}

/// A part of an image, named by its content.
struct Blob {
    media_type: &'static str,
    digest: String,
    content: Vec<u8>,
}

impl Blob {
    fn new(media_type: &'static str, content: Vec<u8>) -> Self {
        Self {
            media_type,
            digest: sha256(&content),
            content,
        }
    }

    fn json(media_type: &'static str, content: &Value) -> Self {
        Self::new(media_type, content.to_string().into_bytes())
    }

    fn descriptor(&self) -> Value {
        json!({
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.content.len(),
        })
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }
}

/// As images name digests: `sha256:` and hexadecimal digits.
fn sha256(content: &[u8]) -> String {
    let sum = digest::digest(&digest::SHA256, content);
    let hex = sum.as_ref().iter().map(|byte| format!("{byte:02x}"));
    format!("sha256:{}", hex.collect::<String>())
}

/// This machine's, by its name in images.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn busybox() -> Result<(PathBuf, Vec<u8>), ImageError> {
    let mend = "install Debian's busybox-static, or another static busybox";
    let there = BUSYBOX.iter().find(|path| Path::new(path).is_file());
    let path = PathBuf::from(there.unwrap_or(&BUSYBOX[0]));
    let binary = static_binary(&path, mend)?;
    Ok((path, binary))
}

/// Names of the programs that busybox can be called by, in order.
fn applets(busybox: &Path) -> Result<Vec<String>, ImageError> {
    let failed = |said: String| ImageError::Applets {
        path: busybox.to_owned(),
        said,
    };
    let listed = Command::new(busybox).arg("--list").output();
    let listed = listed.map_err(|error| failed(error.to_string()))?;
    if !listed.status.success() {
        return Err(failed(listed.status.to_string()));
    }
    let mut names: Vec<_> = String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter(|name| !name.is_empty() && *name != "busybox")
        .map(str::to_owned)
        .collect();
    names.sort_unstable();
    Ok(names)
}

/// Reads a program and makes sure that it starts where there is nothing else.
fn static_binary(path: &Path, mend: &'static str) -> Result<Vec<u8>, ImageError> {
    let content = fs::read(path).map_err(|source| ImageError::Binary {
        path: path.to_owned(),
        mend,
        source,
    })?;
    if is_static(&content) {
        return Ok(content);
    }
    let path = path.to_owned();
    Err(ImageError::NotStatic { path, mend })
}

/// A 64-bit little-endian ELF file without a program header that names a loader.
fn is_static(binary: &[u8]) -> bool {
    const INTERP: [u8; 4] = [3, 0, 0, 0];
    let number = |at: usize, length: usize| -> Option<usize> {
        let bytes = binary.get(at..at + length)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        Some(value)
    };
    let has_loader = || -> Option<bool> {
        let (first, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut kinds = Vec::new();
        for entry in 0..count {
            let at = first.checked_add(entry * size)?;
            kinds.push(binary.get(at..at.checked_add(4)?)?);
        }
        Some(kinds.contains(&INTERP.as_slice()))
    };
    binary.starts_with(b"\x7fELF\x02\x01") && has_loader() == Some(false)
}

#[cfg(test)]
mod tests;
