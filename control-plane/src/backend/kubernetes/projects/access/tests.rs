//! Texts of settings, and the names that come of them.

use super::*;

fn grant(group: &str, role: Role) -> Grant {
    Grant {
        group: group.to_owned(),
        role,
    }
}

#[test]
fn groups_get_the_roles_that_the_settings_name() {
    let text = r#"[{"groupName":"devs","role":"edit"},{"groupName":"ops","role":"Admin"},
        {"group_name":"all","role":"view","more":1},{"groupName":"devs","role":"edit"}]"#;
    let expected = [
        grant("devs", Role::Edit),
        grant("ops", Role::Admin),
        grant("all", Role::View),
    ];
    assert_eq!(parse(text).unwrap(), BTreeSet::from(expected));
    for nothing in ["", " ", "[]", "null"] {
        assert_eq!(parse(nothing).unwrap(), BTreeSet::new());
    }
}

#[test]
fn what_is_not_understood_is_refused_as_a_whole() {
    for text in [
        "{}",
        "devs",
        r#"["devs"]"#,
        r#"[{"groupName":"devs"}]"#,
        r#"[{"role":"edit"}]"#,
        r#"[{"groupName":"a","role":"edit"},{"groupName":"devs","role":"owner"}]"#,
        r#"[{"groupName":"","role":"edit"}]"#,
        r#"[{"groupName":"a\nb","role":"edit"}]"#,
        r#"[{"groupName":"system:unauthenticated","role":"view"}]"#,
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
    let long = format!(r#"[{{"groupName":"{}","role":"edit"}}]"#, "a".repeat(201));
    assert!(matches!(parse(&long), Err(AccessError::Group)));
    let many: Vec<_> = (0..=MAX_GRANTS)
        .map(|number| format!(r#"{{"groupName":"g{number}","role":"view"}}"#))
        .collect();
    let many = format!("[{}]", many.join(","));
    assert!(matches!(parse(&many), Err(AccessError::TooMany)));
}

#[test]
fn bindings_are_named_by_group_and_role() {
    assert_eq!(grant("devs", Role::View).binding_name(), "devs-view");
    let all = grant("system:authenticated", Role::Edit);
    assert_eq!(all.binding_name(), "system:authenticated-edit");
}

#[test]
fn names_that_cannot_be_differ_for_each_group() {
    let names: BTreeSet<_> = ["a/b", "a%b", "a b", "a-b", "ä", "ö", ".."]
        .map(|group| grant(group, Role::Admin).binding_name())
        .into();
    assert_eq!(names.len(), 7);
    for name in &names {
        assert!(!name.contains(['/', '%', ' ']), "{name}");
        assert!(name.is_ascii() && name.ends_with("-admin"), "{name}");
    }
}
