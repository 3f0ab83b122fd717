//! Our archives hold what `images/Dockerfile` copies.

use super::*;

/// What one target of a Dockerfile comes to, by its instructions and those of what it is from.
#[derive(Debug, Default, Clone)]
struct Target {
    files: BTreeMap<String, String>,
    user: String,
    folder: String,
    entrypoint: Value,
    variables: Vec<String>,
    labels: BTreeMap<String, String>,
}

/// Lines with their continuations, without comments.
fn instructions(text: &str) -> Vec<String> {
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'));
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let joined = joined
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    joined.map(str::to_owned).collect()
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

fn targets() -> BTreeMap<String, Target> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/Dockerfile");
    let text = fs::read_to_string(path).unwrap();
    let mut stages: BTreeMap<String, Target> = BTreeMap::new();
    let mut at = String::new();
    for line in instructions(&text) {
        let (instruction, rest) = line.split_once(' ').unwrap_or((&line, ""));
        if instruction == "FROM" {
            let (from, name) = rest.split_once(" AS ").expect("each stage has a name");
            let base = stages.get(from).cloned().unwrap_or_default();
            name.clone_into(&mut at);
            stages.insert(at.clone(), base);
            continue;
        }
        let Some(stage) = stages.get_mut(&at) else {
            continue;
        };
        match instruction {
            "USER" => rest.clone_into(&mut stage.user),
            "WORKDIR" => rest.clone_into(&mut stage.folder),
            "ENTRYPOINT" => stage.entrypoint = serde_json::from_str(rest).unwrap(),
            "ENV" => stage.variables = vec![rest.to_owned()],
            "LABEL" => stage.labels.extend(pairs(rest)),
            "COPY" => {
                let words: Vec<_> = rest.split(' ').filter(|it| !it.starts_with("--")).collect();
                let [from, to] = words[..] else {
                    panic!("{line}")
                };
                stage.files.insert(to.to_owned(), from.to_owned());
            }
            _ => {}
        }
    }
    stages
}

fn image(name: &'static str) -> Image {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(name), fake_binary(1)).unwrap();
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
        let program = format!("/{name}");
        let from_build = BTreeMap::from([
            // The folder `tmp`, which is empty.
            ("/".to_owned(), "/empty/".to_owned()),
            (program.clone(), format!("/src/dist/{name}")),
        ]);
        assert_eq!(target.files, from_build, "{name}");
        assert_eq!(
            unpacked(&image.layer).into_keys().collect::<Vec<_>>(),
            [name]
        );
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
fn the_dockerfile_ends_in_nothing_but_static_programs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/Dockerfile");
    let text = fs::read_to_string(path).unwrap();
    let bases: Vec<_> = instructions(&text)
        .into_iter()
        .filter_map(|line| Some(line.strip_prefix("FROM ")?.split_once(' ')?.0.to_owned()))
        .collect();
    assert_eq!(bases[..2], ["${RUST_IMAGE}", "scratch"]);
    assert!(bases[2..].iter().all(|it| it == "common"), "{bases:?}");
}
