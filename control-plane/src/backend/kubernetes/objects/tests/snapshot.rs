//! Objects as they were when somebody last looked at them: `tests/NAME.json`.

use std::{fs, path::PathBuf};

use serde_json::Value;

/// Compares with the file; with `UPDATE_SNAPSHOTS=1` writes it.
#[track_caller]
pub fn assert_snapshot(name: &str, objects: &Value) {
    let folder = "src/backend/kubernetes/objects/tests";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join(folder)
        .join(format!("{name}.json"));
    let now = format!("{objects:#}\n");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|it| it == "1") {
        fs::write(&path, now).unwrap();
        return;
    }
    let before = fs::read_to_string(&path).unwrap_or_default();
    if before == now {
        return;
    }
    let same = before.lines().zip(now.lines());
    let line = same.take_while(|(before, now)| before == now).count();
    let around = |text: &str| -> String {
        let lines = text.lines().skip(line.saturating_sub(3)).take(10);
        lines.flat_map(|line| ["    ", line, "\n"]).collect()
    };
    panic!(
        "{name} is not as in {}, from line {}:\n{}  now:\n{}\
         if that is meant, run the test with UPDATE_SNAPSHOTS=1 and look at what git shows",
        path.display(),
        line + 1,
        around(&before),
        around(&now),
    );
}
