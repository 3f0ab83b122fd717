//! What a session asks for in place of the usual resources (`resource_overrides`).
//!
//! Two forms: `{"cpu": "2", "memory": "4Gi"}` is requests and limits alike; `{"requests": {…},
//! "limits": {…}}` says each for itself.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{CannotRun, place::PodLimits, quantity::Amount};
use crate::{backend::ResourceOverrides, sessions::Session};

/// The least that a container can start with: what is below was meant otherwise, such as `4` for
/// `4Gi` of memory.
const LEAST: [(&str, &str); 2] = [("cpu", "1m"), ("memory", "16Mi")];

/// Reads a JSON object of quantities, such as `{"cpu":"8","memory":"32Gi"}`.
///
/// # Errors
/// What is wrong with it, for people.
pub(crate) fn parse_quantities(text: &str) -> Result<BTreeMap<String, String>, String> {
    let parsed: BTreeMap<String, String> = serde_json::from_str(text).map_err(|_| {
        format!(r#"{text:?} is no JSON object of quantities such as {{"cpu":"8","memory":"32Gi"}}"#)
    })?;
    match parsed.iter().find(|(_, it)| Amount::parse(it).is_none()) {
        Some((name, quantity)) => Err(format!(
            "{quantity:?} of {name} is no quantity such as 500m, 2 or 4Gi"
        )),
        None => Ok(parsed),
    }
}

/// What the session asks for, within the operator's limits.
pub(super) fn overrides(
    session: &Session,
    limits: &PodLimits,
) -> Result<ResourceOverrides, CannotRun> {
    let text = session.object.resource_overrides.as_deref();
    let text = text.unwrap_or_default();
    if text.trim().is_empty() {
        return Ok(ResourceOverrides::default());
    }
    let parsed: Option<Map<String, Value>> =
        serde_json::from_str(text).map_err(|_| malformed("is no JSON object"))?;
    let mut given = parsed.unwrap_or_default();
    let requests = given.remove("requests");
    let most = given.remove("limits");
    if requests.is_none() && most.is_none() {
        let both = amounts(&given, limits)?;
        return Ok(ResourceOverrides {
            requests: both.clone(),
            limits: both,
        });
    }
    if let Some((name, _)) = given.iter().next() {
        return Err(malformed(format!(
            "has {:?} beside `requests` and `limits`; it must be within one of them",
            shown(name)
        )));
    }
    let part = |name: &str, part: Option<Value>| match part {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::Object(part)) => amounts(&part, limits),
        Some(_) => Err(malformed(format!("has a {name:?} that is no JSON object"))),
    };
    let requests = part("requests", requests)?;
    let most = part("limits", most)?;
    for (name, request) in &requests {
        if let Some(limit) = most.get(name)
            && Amount::parse(request) > Amount::parse(limit)
        {
            return Err(malformed(format!(
                "requests {request} of {name}, which is more than its limit of {limit}"
            )));
        }
    }
    Ok(ResourceOverrides {
        requests,
        limits: most,
    })
}

/// Quantities by resource, each checked.
fn amounts(
    given: &Map<String, Value>,
    limits: &PodLimits,
) -> Result<BTreeMap<String, String>, CannotRun> {
    let mut amounts = BTreeMap::new();
    for (name, value) in given {
        let quantity = match value {
            Value::Null => continue,
            Value::String(text) => text.trim().to_owned(),
            Value::Number(number) => number.to_string(),
            _ => {
                return Err(malformed(format!(
                    "has a {:?} that is no quantity",
                    shown(name)
                )));
            }
        };
        if quantity.is_empty() {
            continue;
        }
        let Some(most) = limits.max_resources.get(name) else {
            let known: Vec<&str> = limits.max_resources.keys().map(String::as_str).collect();
            return Err(malformed(format!(
                "asks for {:?}; what can be asked for is {}",
                shown(name),
                known.join(", ")
            )));
        };
        let Some(amount) = Amount::parse(&quantity) else {
            return Err(malformed(format!(
                "has {:?} of {name}, which is no quantity such as 500m, 2 or 4Gi",
                shown(&quantity)
            )));
        };
        let least = LEAST.iter().find(|(it, _)| it == name);
        let least = least.map_or("1", |(_, least)| least);
        if Amount::parse(least).is_some_and(|least| amount < least) {
            return Err(malformed(format!(
                "has {quantity} of {name}; less than {least} does not do"
            )));
        }
        if Amount::parse(most).is_none_or(|most| amount > most) {
            return Err(CannotRun::new(
                "ResourceOverridesTooLarge",
                format!("the session asks for {quantity} of {name}; at most {most} is allowed"),
            ));
        }
        amounts.insert(name.clone(), quantity);
    }
    Ok(amounts)
}

/// As much of a text as people need to find it.
fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

fn malformed(what: impl AsRef<str>) -> CannotRun {
    CannotRun::new(
        "ResourceOverridesMalformed",
        format!("the session's `resource_overrides` {}", what.as_ref()),
    )
}
