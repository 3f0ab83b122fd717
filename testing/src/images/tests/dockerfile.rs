//! Our archives hold the same files as what `images/Dockerfile` builds, and start in the same way.
//!
//! Without a builder: its instructions are followed here, in folders in place of images. The one that
//! compiles is run with a `make` that writes a few bytes in place of each program.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use super::*;

/// What one target comes to.
#[derive(Debug, Default, Clone)]
struct Target {
    files: Tree,
    user: String,
    folder: String,
    entrypoint: Value,
    variables: Vec<String>,
    labels: BTreeMap<String, String>,
}

/// Mode and content by path; none for a folder.
type Tree = BTreeMap<String, (u32, Option<Vec<u8>>)>;

/// When all files of an image were made, in seconds since 1970.
const EPOCH: i64 = 1_000_000_000;

/// All that is in a folder.
fn tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            let mode = fs::symlink_metadata(&path).unwrap().mode() & 0o7777;
            assert!(!path.is_symlink(), "{name} is a link");
            let content = path.is_file().then(|| fs::read(&path).unwrap());
            if content.is_none() {
                folders.push(path);
            }
            tree.insert(name, (mode, content));
        }
    }
    tree
}

/// What an image's only layer unpacks to; all of it belongs to root.
fn layer_of(image: &Image) -> Tree {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layer.tar");
    fs::write(&file, &image.layer).unwrap();
    let to = folder.path().join("content");
    fs::create_dir(&to).unwrap();
    let tar = |arguments: &[&str]| {
        let mut command = Command::new("tar");
        command.args(arguments).arg("--file").arg(&file);
        let output = command.arg("--directory").arg(&to).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    tar(&["--extract", "--preserve-permissions"]);
    for line in tar(&["--list", "--verbose", "--numeric-owner"]).lines() {
        assert_eq!(line.split_whitespace().nth(1), Some("0/0"), "{line}");
    }
    tree(&to)
}

/// Lines with their continuations, without comments.
fn instructions() -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/Dockerfile");
    let text = fs::read_to_string(path).unwrap();
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    joined
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .map(|(instruction, rest)| (instruction.to_owned(), rest.trim().to_owned()))
        .collect()
}

/// `KEY=value KEY="a value"`.
fn pairs(text: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = text.trim();
    while let Some((key, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').expect("a closing quote"),
            None => after.split_once(' ').unwrap_or((after, "")),
        };
        pairs.push((key.to_owned(), value.to_owned()));
        rest = after.trim();
    }
    pairs
}

/// What stands in for a compiled program.
fn program(name: &str) -> Vec<u8> {
    [fake_binary(1), name.as_bytes().to_vec()].concat()
}

/// The stage that compiles, as a folder.
fn compile(root: &Path, script: &str) {
    let (source, programs) = (root.join("src"), root.join("programs"));
    for folder in [&source, &programs] {
        fs::create_dir_all(folder).unwrap();
    }
    for (name, _) in OURS {
        fs::write(programs.join(name), program(name)).unwrap();
    }
    let make = root.join("make");
    let copies = "#!/bin/sh\n[ \"$*\" = \"static static-servers\" ] || exit 1\n\
                  mkdir dist && cp ../programs/* dist/\n";
    fs::write(&make, copies).unwrap();
    fs::set_permissions(&make, fs::Permissions::from_mode(0o755)).unwrap();
    // Absolute paths are of the image.
    let script = script.replace(" /", &format!(" {}/", root.display()));
    let path = format!("{}:{}", root.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("sh");
    shell.arg("-euc").arg(&script).current_dir(&source);
    shell.env("SOURCE_DATE_EPOCH", EPOCH.to_string());
    let output = shell.env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{script}: {output:?}");
}

/// `COPY [--chmod=MODE] --from=build FROM TO`.
fn copy(root: &Path, arguments: &str, files: &mut Tree) {
    let (options, paths): (Vec<_>, Vec<_>) = arguments
        .split_whitespace()
        .partition(|word| word.starts_with("--"));
    let [from, to] = paths[..] else {
        panic!("COPY {arguments}")
    };
    let mut mode = None;
    for option in options {
        match option.split_once('=') {
            Some(("--from", "build")) => {}
            Some(("--chmod", octal)) => mode = Some(u32::from_str_radix(octal, 8).unwrap()),
            _ => panic!("COPY {arguments}"),
        }
    }
    let from = root.join(from.trim_start_matches('/'));
    let to = to.trim_start_matches('/');
    // A copy keeps the time.
    for path in [from.clone(), from.join("tmp")] {
        let made = fs::symlink_metadata(path).map_or(EPOCH, |it| it.mtime());
        assert_eq!(made, EPOCH, "COPY {arguments}");
    }
    if from.is_dir() {
        assert_eq!((mode, to), (None, ""), "COPY {arguments}");
        files.extend(tree(&from));
        return;
    }
    let is = fs::metadata(&from).unwrap_or_else(|error| panic!("COPY {arguments}: {error}"));
    let mode = mode.unwrap_or(is.mode() & 0o7777);
    files.insert(to.to_owned(), (mode, Some(fs::read(&from).unwrap())));
}

fn targets() -> BTreeMap<String, Target> {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let mut stages: BTreeMap<String, Target> = BTreeMap::new();
    let mut at = String::new();
    for (instruction, rest) in instructions() {
        if instruction == "FROM" {
            let (from, name) = rest.split_once(" AS ").expect("each stage has a name");
            let base = match from {
                "${RUST_IMAGE}" | "scratch" => Target::default(),
                other => stages[other].clone(),
            };
            name.clone_into(&mut at);
            stages.insert(at.clone(), base);
            continue;
        }
        let Some(stage) = stages.get_mut(&at) else {
            assert_eq!(instruction, "ARG");
            continue;
        };
        match (at.as_str(), instruction.as_str()) {
            ("build", "RUN") => compile(root, &rest),
            ("build", _) | (_, "ARG") => {}
            (_, "USER") => rest.clone_into(&mut stage.user),
            (_, "WORKDIR") => rest.clone_into(&mut stage.folder),
            (_, "ENTRYPOINT") => stage.entrypoint = serde_json::from_str(&rest).unwrap(),
            (_, "ENV") => stage.variables = vec![rest],
            (_, "LABEL") => stage.labels.extend(pairs(&rest)),
            (_, "COPY") => copy(root, &rest, &mut stage.files),
            (_, other) => panic!("what would {other} do here?"),
        }
    }
    stages
}

fn image(name: &'static str) -> Image {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), program(name)).unwrap();
    Image::of_ours(name, folder.path()).unwrap()
}

#[test]
fn each_program_has_a_target_that_gives_the_same_image() {
    let targets = targets();
    for (name, _) in OURS {
        let target = targets
            .get(name)
            .unwrap_or_else(|| panic!("no target {name}"));
        let image = image(name);
        let files = layer_of(&image);
        assert_eq!(files, target.files, "{name}");
        // And these are they.
        assert_eq!(files[name], (0o755, Some(program(name))));
        assert_eq!(files["tmp"], (0o1777, None));
        assert_eq!(files.len(), 2, "{name}");

        let config = &image.config;
        assert_eq!(config["User"], target.user);
        assert_eq!(config["WorkingDir"], target.folder);
        assert_eq!(config["Entrypoint"], target.entrypoint);
        assert_eq!(config["Env"], json!(target.variables));
        let ours = config["Labels"].as_object().unwrap();
        for (label, value) in ours {
            let there = target
                .labels
                .get(label)
                .unwrap_or_else(|| panic!("{name} lacks {label}"));
            assert!(there == value || there == "${VERSION}", "{label}: {there}");
        }
    }
    let programs = targets.keys().filter(|it| it.starts_with("ambient-"));
    assert_eq!(programs.count(), OURS.len(), "{:?}", targets.keys());
}

#[test]
fn the_chart_asks_for_images_that_are_made() {
    let values =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/ambient-control-plane/values.yaml");
    let values = fs::read_to_string(values).unwrap();
    let mut asked: Vec<_> = values
        .lines()
        .filter_map(|line| line.trim().strip_prefix("repository: "))
        .collect();
    let mut made: Vec<_> = OURS.iter().map(|(name, _)| *name).collect();
    asked.sort_unstable();
    made.sort_unstable();
    assert_eq!(asked, made);
}

#[test]
fn the_dockerfile_ends_in_nothing_but_static_programs() {
    let bases: Vec<_> = instructions()
        .into_iter()
        .filter(|(instruction, _)| instruction == "FROM")
        .filter_map(|(_, rest)| Some(rest.split_once(' ')?.0.to_owned()))
        .collect();
    assert_eq!(bases[..2], ["${RUST_IMAGE}", "scratch"]);
    assert!(bases[2..].iter().all(|it| it == "common"), "{bases:?}");
}
