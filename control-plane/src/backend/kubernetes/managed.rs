//! Who owns which field of an object, by its metadata alone. Pure.
//!
//! In: an object's `managedFields`, and an object as we apply it. Out: whether all that we applied
//! is ours still. The API server takes a field from us when somebody else gives it another value
//! (or removes it), so that an edit shows without reading what was edited.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use serde_json::Value;

use super::names::{FIELD_MANAGER, REFRESH_MANAGER};

/// Whether everything in `applied` is ours. Names, kinds and the like have no owner, and are left
/// out; so are values: it is the fields that count.
pub(super) fn owns_all(fields: &[ManagedFieldsEntry], applied: &Value) -> bool {
    let ours: Vec<&Value> = fields
        .iter()
        .filter(|entry| {
            let manager = entry.manager.as_deref().unwrap_or_default();
            manager == FIELD_MANAGER || manager == REFRESH_MANAGER
        })
        .filter_map(|entry| entry.fields_v1.as_ref().map(|fields| &fields.0))
        .collect();
    let Value::Object(parts) = applied else {
        return true;
    };
    parts.iter().all(|(name, part)| match name.as_str() {
        "apiVersion" | "kind" => true,
        "metadata" => metadata_is_owned(&ours, part),
        name => is_owned(&ours, &format!("f:{name}"), part),
    })
}

fn metadata_is_owned(ours: &[&Value], metadata: &Value) -> bool {
    let within: Vec<&Value> = ours.iter().filter_map(|it| it.get("f:metadata")).collect();
    let parts = metadata.as_object().into_iter().flatten();
    parts.into_iter().all(|(name, part)| match name.as_str() {
        "name" | "namespace" => true,
        name => is_owned(&within, &format!("f:{name}"), part),
    })
}

/// Whether one of these sets of fields has this one, and together they have all that is in it.
fn is_owned(sets: &[&Value], field: &str, applied: &Value) -> bool {
    let within: Vec<&Value> = sets.iter().filter_map(|set| set.get(field)).collect();
    !within.is_empty() && is_owned_within(&within, applied)
}

fn is_owned_within(sets: &[&Value], applied: &Value) -> bool {
    // A map that is owned as a whole, such as a selector, has nothing in it.
    let is_whole = |set: &&Value| set.as_object().is_some_and(serde_json::Map::is_empty);
    match applied {
        Value::Object(_) if sets.iter().any(is_whole) => true,
        Value::Object(parts) => parts
            .iter()
            .all(|(name, part)| is_owned(sets, &format!("f:{name}"), part)),
        // All lists that we apply have keys, so that each element has an owner.
        Value::Array(elements) => elements.iter().all(|element| {
            let of_element: Vec<&Value> = sets
                .iter()
                .filter_map(|set| set.as_object())
                .flatten()
                .filter(|(key, _)| names_element(key, element))
                .map(|(_, fields)| fields)
                .collect();
            !of_element.is_empty() && is_owned_within(&of_element, element)
        }),
        _ => true,
    }
}

/// Whether `k:{"port":8001,"protocol":"TCP"}` or `v:"a"` stands for this element of a list. What the
/// element does not say, the API server has filled in.
fn names_element(key: &str, element: &Value) -> bool {
    let parse = |text: &str| serde_json::from_str::<Value>(text).ok();
    if let Some(keys) = key.strip_prefix("k:").and_then(parse) {
        let keys = keys.as_object().into_iter().flatten();
        return keys
            .into_iter()
            .all(|(name, value)| element.get(name).is_none_or(|it| it == value));
    }
    key.strip_prefix("v:").and_then(parse).as_ref() == Some(element)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn applied() -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": "session-a",
                "namespace": "team",
                "labels": {"a/b": "1", "c": "2"},
                "ownerReferences": [{"uid": "u-1", "name": "session-a-sa", "kind": "ServiceAccount"}],
            },
            "spec": {
                "selector": {"a/b": "1"},
                "ports": [{"name": "agui", "port": 8001}],
            },
        })
    }

    /// As the API server (1.36) has it after that was applied.
    fn fields() -> Value {
        json!({
            "f:metadata": {
                "f:labels": {"f:a/b": {}, "f:c": {}},
                "f:ownerReferences": {"k:{\"uid\":\"u-1\"}": {}},
            },
            "f:spec": {
                "f:ports": {"k:{\"port\":8001,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}, "f:port": {}}},
                "f:selector": {},
            },
        })
    }

    fn entry(manager: &str, fields: &Value) -> ManagedFieldsEntry {
        serde_json::from_value(json!({"manager": manager, "fieldsV1": fields})).unwrap()
    }

    fn without(mut fields: Value, path: &str) -> Value {
        let (parent, name) = path.rsplit_once('/').unwrap();
        let parent = fields.pointer_mut(parent).unwrap();
        parent
            .as_object_mut()
            .unwrap()
            .remove(&name.replace("~1", "/"));
        fields
    }

    #[test]
    fn what_was_applied_and_left_alone_is_owned() {
        assert!(owns_all(&[entry(FIELD_MANAGER, &fields())], &applied()));
        assert!(owns_all(&[entry(REFRESH_MANAGER, &fields())], &applied()));
        assert!(!owns_all(&[entry("kubectl-edit", &fields())], &applied()));
        assert!(!owns_all(&[], &applied()));
    }

    #[test]
    fn our_two_managers_own_together() {
        let without_port = without(fields(), "/f:spec/f:ports");
        let ports = json!({"f:spec": {"f:ports": fields()["f:spec"]["f:ports"].clone()}});
        let both = [
            entry(FIELD_MANAGER, &without_port),
            entry(REFRESH_MANAGER, &ports),
        ];
        assert!(owns_all(&both, &applied()));
        assert!(!owns_all(&both[..1], &applied()));
    }

    #[test]
    fn each_field_that_somebody_took_shows() {
        let port = "/f:spec/f:ports/k:{\"port\":8001,\"protocol\":\"TCP\"}";
        for path in [
            "/f:metadata/f:labels/f:a~1b",
            "/f:metadata/f:labels/f:c",
            "/f:metadata/f:ownerReferences/k:{\"uid\":\"u-1\"}",
            "/f:spec/f:selector",
            "/f:spec/f:ports",
            port,
            &format!("{port}/f:name"),
        ] {
            let taken = entry(FIELD_MANAGER, &without(fields(), path));
            assert!(!owns_all(&[taken], &applied()), "{path}");
        }
    }

    #[test]
    fn another_owner_reference_than_ours_does_not_count() {
        let mut applied = applied();
        applied["metadata"]["ownerReferences"][0]["uid"] = json!("u-2");
        assert!(!owns_all(&[entry(FIELD_MANAGER, &fields())], &applied));
    }
}
