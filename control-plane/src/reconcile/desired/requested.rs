//! What a session itself wants in its environment.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::CannotRun;
use crate::{backend::is_machine_owned, sessions::Session};

/// Variables of our own prefix that a session may set: they are about its agent alone.
const OWN_TO_SET: [&str; 3] = [
    "AMBIENT_ON_REFRESH",
    "AMBIENT_GRACE_PERIOD",
    "AMBIENT_HOLD_BACK",
];

/// Most variables that a session may set, and the longest name of one: far more than anybody writes.
const MAX_VARIABLES: usize = 500;
const MAX_NAME: usize = 256;

/// What the session itself wants in its environment, without what it may not set.
pub(super) fn requested(session: &Session) -> Result<BTreeMap<String, String>, CannotRun> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Scalar {
        Text(String),
        Number(serde_json::Number),
        Flag(bool),
    }

    let text = session.object.environment_variables.as_deref();
    let text = text.unwrap_or_default();
    if text.trim().is_empty() {
        return Ok(BTreeMap::new());
    }
    let malformed = |message: String| CannotRun::new("EnvironmentMalformed", message);
    let parsed: Option<BTreeMap<String, Scalar>> = serde_json::from_str(text).map_err(|_| {
        malformed("the session's `environment_variables` is no JSON object of strings".to_owned())
    })?;
    let parsed = parsed.unwrap_or_default();
    if parsed.len() > MAX_VARIABLES {
        return Err(CannotRun::new(
            "EnvironmentTooLarge",
            format!(
                "the session's `environment_variables` has {} variables; at most {MAX_VARIABLES} are \
                 possible",
                parsed.len()
            ),
        ));
    }
    let mut variables = BTreeMap::new();
    for (name, value) in parsed {
        if !is_name(&name) {
            let shown: String = name.chars().take(40).collect();
            return Err(malformed(format!(
                "{shown:?} in `environment_variables` is no name of a variable"
            )));
        }
        let value = match value {
            Scalar::Text(text) => text,
            Scalar::Number(number) => number.to_string(),
            Scalar::Flag(flag) => flag.to_string(),
        };
        if !is_reserved(&name) {
            variables.insert(name, value);
        }
    }
    Ok(variables)
}

/// POSIX: letters, digits and underscores, no digit first.
fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    let first = bytes.next();
    name.len() <= MAX_NAME
        && first.is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// What only we set, even where we set nothing: where the runner finds its credentials, and
/// (with what is the machine's) whom it trusts.
fn is_reserved(name: &str) -> bool {
    let ours = name.starts_with("AMBIENT_") && !OWN_TO_SET.contains(&name);
    ours || is_machine_owned(name)
        || matches!(
            name,
            // The credentials that it may use are found by their ids.
            "BOT_TOKEN" | "SESSION_ID" | "BACKEND_API_URL" | "IS_RESUME" | "CREDENTIAL_IDS"
        )
}
