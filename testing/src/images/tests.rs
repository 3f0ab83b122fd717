use std::{collections::BTreeMap, process::Command};

use super::*;

mod dockerfile;

/// The archive as another tar reads it: each file's bytes.
fn unpacked(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("image.tar");
    fs::write(&file, archive).unwrap();
    let to = folder.path().join("content");
    fs::create_dir(&to).unwrap();
    let tar = Command::new("tar")
        .arg("--extract")
        .arg("--file")
        .arg(&file)
        .arg("--directory")
        .arg(&to)
        .status()
        .unwrap();
    assert!(tar.success());
    let mut files = BTreeMap::new();
    let mut folders = vec![to.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(&to).unwrap().display().to_string();
                let content = if path.is_symlink() {
                    let target = fs::read_link(&path).unwrap();
                    format!("-> {}", target.display()).into_bytes()
                } else {
                    fs::read(&path).unwrap()
                };
                files.insert(name, content);
            }
        }
    }
    files
}

/// A program of a few bytes that passes for a static one: an ELF header with one program header.
fn fake_binary(kind: u8) -> Vec<u8> {
    let mut elf = vec![0; 64 + 56];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[32] = 64;
    elf[54] = 56;
    elf[56] = 1;
    elf[64] = kind;
    elf
}

fn runner() -> Image {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("ambient-runner"), fake_binary(1)).unwrap();
    Image::of_ours("ambient-runner", folder.path()).unwrap()
}

/// Follows a descriptor as the OCI image specification says: the media type it must have, the
/// blob at its digest, of its size and sum.
fn blob<'a>(
    files: &'a BTreeMap<String, Vec<u8>>,
    descriptor: &Value,
    media_type: &str,
) -> &'a [u8] {
    assert_eq!(descriptor["mediaType"], media_type);
    let digest = descriptor["digest"].as_str().unwrap();
    let path = format!("blobs/{}", digest.replace(':', "/"));
    let content = files.get(&path).unwrap_or_else(|| panic!("no {path}"));
    assert_eq!(descriptor["size"], content.len());
    assert_eq!(digest, sha256(content));
    content
}

fn json(content: &[u8]) -> Value {
    serde_json::from_slice(content).unwrap()
}

#[test]
fn an_archive_is_an_oci_image_layout() {
    let files = unpacked(&runner().archive());

    assert_eq!(
        json(&files["oci-layout"]),
        json!({ "imageLayoutVersion": "1.0.0" })
    );
    let index = json(&files["index.json"]);
    assert_eq!(index["schemaVersion"], 2);
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
    let listed = &index["manifests"][0];
    assert_eq!(listed["platform"]["os"], "linux");
    assert_eq!(
        listed["annotations"]["io.containerd.image.name"],
        "images.example/ambient-runner:e2e"
    );

    let manifest = json(blob(
        &files,
        listed,
        "application/vnd.oci.image.manifest.v1+json",
    ));
    assert_eq!(manifest["schemaVersion"], 2);
    let config = "application/vnd.oci.image.config.v1+json";
    let config = json(blob(&files, &manifest["config"], config));
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let layer = blob(&files, &manifest["layers"][0], layer);

    assert_eq!(config["rootfs"]["type"], "layers");
    // An uncompressed layer's digest is that of its content.
    assert_eq!(config["rootfs"]["diff_ids"], json!([sha256(layer)]));
    assert_eq!(config["os"], "linux");
    assert_eq!(config["architecture"], listed["platform"]["architecture"]);
    assert_eq!(config["config"]["Entrypoint"], json!(["/ambient-runner"]));
    assert_eq!(config["config"]["User"], "65532:65532");
    let content = unpacked(layer);
    assert_eq!(content["ambient-runner"], fake_binary(1));
}

#[test]
fn docker_finds_the_same_image_in_it() {
    let files = unpacked(&runner().archive());
    let listed = json(&files["manifest.json"]);
    assert_eq!(
        listed[0]["RepoTags"],
        json!(["images.example/ambient-runner:e2e"])
    );
    let config = json(&files[listed[0]["Config"].as_str().unwrap()]);
    assert_eq!(config["config"]["Entrypoint"], json!(["/ambient-runner"]));
    let layer = &files[listed[0]["Layers"][0].as_str().unwrap()];
    assert!(unpacked(layer).contains_key("ambient-runner"));
}

#[test]
fn digests_are_those_of_another_program() {
    assert_eq!(
        sha256(b"abc"),
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    assert_eq!(runner().archive(), runner().archive());
}

#[test]
fn labels_say_what_is_in_it() {
    let labels = &runner().config["Labels"];
    assert_eq!(labels["org.opencontainers.image.title"], "ambient-runner");
    assert_eq!(
        labels["org.opencontainers.image.version"],
        env!("CARGO_PKG_VERSION")
    );
}

#[test]
fn what_needs_a_loader_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |content: &[u8]| {
        fs::write(folder.path().join("ambient-runner"), content).unwrap();
        let error = Image::of_ours("ambient-runner", folder.path()).unwrap_err();
        assert!(matches!(error, ImageError::NotStatic { .. }), "{error}");
    };
    refused(&fake_binary(3));
    refused(b"#!/bin/sh\n");
    refused(b"\x7fELF\x02\x01 and no more");
    refused(b"");

    let error = Image::of_ours("ambient-sidecar", folder.path()).unwrap_err();
    assert!(error.to_string().contains("make static"), "{error}");
}
