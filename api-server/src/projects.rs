//! Projects and their settings: writable fields and what they may hold. Pure.

use ambient_shared::rest::{BASE, Project, ProjectSettings};
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use crate::{error::Error, time::from_micros};

/// Most bytes of all texts of a project, or of its settings, together.
const MAX_SIZE: usize = 64 * 1024;

/// Most characters of a DNS label (RFC 1123): a project is a namespace's name.
const MAX_LABEL: usize = 63;

/// The writable fields of a project. What is absent stays as it is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ProjectChange {
    pub(crate) name: Option<String>,
    pub(crate) display_name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) labels: Option<String>,
    pub(crate) annotations: Option<String>,
    pub(crate) status: Option<String>,
}

/// The writable fields of a project's settings. What is absent stays as it is.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SettingsChange {
    pub(crate) project_id: Option<String>,
    pub(crate) group_access: Option<String>,
    pub(crate) repositories: Option<String>,
}

/// Checks a DNS label: lower-case letters, digits and hyphens, a letter or digit at both ends.
///
/// # Errors
/// When it is none.
pub(crate) fn check_label(field: &str, label: &str) -> Result<(), Error> {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let sound = (1..=MAX_LABEL).contains(&label.len())
        && label.bytes().all(inner)
        && !label.starts_with('-')
        && !label.ends_with('-');
    if sound {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{field} must be a DNS label: from 1 to {MAX_LABEL} lower-case letters, digits and \
         hyphens, with no hyphen at the ends"
    )))
}

/// A new project; its id is its name.
///
/// # Errors
/// When a field is missing or malformed.
pub(crate) fn create_project(change: ProjectChange, now: i64) -> Result<Project, Error> {
    let Some(name) = change.name.clone() else {
        return Err(Error::Invalid("name is missing".to_owned()));
    };
    check_label("name", &name)?;
    let mut project = Project {
        id: name.clone(),
        kind: "Project".to_owned(),
        href: format!("{BASE}/projects/{name}"),
        created_at: Some(from_micros(now)),
        updated_at: Some(from_micros(now)),
        name,
        ..Project::default()
    };
    edit_project(&mut project, change)?;
    Ok(project)
}

/// Changes a project.
///
/// # Errors
/// When a field is malformed, or the name would change: it is the id.
pub(crate) fn edit_project(project: &mut Project, change: ProjectChange) -> Result<(), Error> {
    if change.name.is_some_and(|name| name != project.name) {
        return Err(Error::Invalid(
            "name is the project's id and cannot change; display_name can".to_owned(),
        ));
    }
    for (field, text) in [
        ("labels", &change.labels),
        ("annotations", &change.annotations),
    ] {
        let is_object =
            |text: &str| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object());
        if text
            .as_deref()
            .is_some_and(|text| !text.is_empty() && !is_object(text))
        {
            return Err(Error::Invalid(format!(
                "{field} must hold a JSON object, as a string"
            )));
        }
    }
    let ProjectChange {
        name: _,
        display_name,
        description,
        labels,
        annotations,
        status,
    } = change;
    project.display_name = display_name.or(project.display_name.take());
    project.description = description.or(project.description.take());
    project.labels = labels.or(project.labels.take());
    project.annotations = annotations.or(project.annotations.take());
    project.status = status.or(project.status.take());
    check_size(&[
        &project.display_name,
        &project.description,
        &project.labels,
        &project.annotations,
        &project.status,
    ])
}

/// New settings of a project.
///
/// # Errors
/// When a field is missing or malformed.
pub(crate) fn create_settings(change: SettingsChange, now: i64) -> Result<ProjectSettings, Error> {
    let Some(project_id) = change.project_id.clone() else {
        return Err(Error::Invalid("project_id is missing".to_owned()));
    };
    check_label("project_id", &project_id)?;
    let id = Uuid::now_v7().to_string();
    let mut settings = ProjectSettings {
        kind: "ProjectSettings".to_owned(),
        href: format!("{BASE}/project_settings/{id}"),
        id,
        created_at: Some(from_micros(now)),
        updated_at: Some(from_micros(now)),
        project_id,
        ..ProjectSettings::default()
    };
    edit_settings(&mut settings, change)?;
    Ok(settings)
}

/// Changes the settings of a project.
///
/// # Errors
/// When a field is malformed, or they would become another project's.
pub(crate) fn edit_settings(
    settings: &mut ProjectSettings,
    change: SettingsChange,
) -> Result<(), Error> {
    if change
        .project_id
        .is_some_and(|id| id != settings.project_id)
    {
        return Err(Error::Invalid(
            "project_id cannot change; delete these settings and make others".to_owned(),
        ));
    }
    settings.group_access = change.group_access.or(settings.group_access.take());
    settings.repositories = change.repositories.or(settings.repositories.take());
    check_size(&[&settings.group_access, &settings.repositories])
}

fn check_size(texts: &[&Option<String>]) -> Result<(), Error> {
    let size: usize = texts
        .iter()
        .filter_map(|text| text.as_ref())
        .map(String::len)
        .sum();
    if size > MAX_SIZE {
        return Err(Error::TooLarge(format!(
            "the texts have {size} bytes; at most {MAX_SIZE} are kept"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "team-1", "0", &"x".repeat(63)] {
            assert!(check_label("name", good).is_ok(), "{good}");
        }
        for bad in ["", "A", "-a", "a-", "a_b", "a.b", "ä", &"x".repeat(64)] {
            assert!(check_label("name", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_identifies_cannot_change() {
        let change = |name: &str| ProjectChange {
            name: Some(name.to_owned()),
            ..ProjectChange::default()
        };
        let mut project = create_project(change("team"), 0).unwrap();
        assert!(edit_project(&mut project, change("team")).is_ok());
        assert!(edit_project(&mut project, change("other")).is_err());
    }
}
