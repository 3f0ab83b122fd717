use proptest::prelude::*;

use super::*;

const COLUMNS: &[Column] = &[
    Column::text("id"),
    Column::text("phase"),
    Column::integer("timeout"),
    Column::real("llm_temperature"),
    Column::time("created_at"),
];

fn filter(search: &str) -> (String, Vec<Value>) {
    let filter = Filter::parse(COLUMNS, search).unwrap();
    (filter.sql, filter.values)
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

#[test]
fn conditions_become_sql_with_bound_values() {
    for (search, sql, values) in [
        ("", "", vec![]),
        ("  ", "", vec![]),
        (
            "phase = 'Running'",
            " where phase = ?",
            vec![text("Running")],
        ),
        (
            "PHASE!='it''s' AnD timeout >= 10",
            " where phase <> ? and timeout >= ?",
            vec![text("it's"), Value::Integer(10)],
        ),
        (
            "phase in ('a','b') and timeout <> -3",
            " where phase in (?, ?) and timeout <> ?",
            vec![text("a"), text("b"), Value::Integer(-3)],
        ),
        (
            "phase NOT IN ('a') and phase not like '%x'",
            " where phase not in (?) and phase not like ? escape '\\'",
            vec![text("a"), text("%x")],
        ),
        (
            "phase is null and id is not null",
            " where phase is null and id is not null",
            vec![],
        ),
        (
            "created_at > '1970-01-01T00:00:01Z' and llm_temperature<0.5",
            " where created_at > ? and llm_temperature < ?",
            vec![Value::Integer(1_000_000), Value::Real(0.5)],
        ),
    ] {
        assert_eq!(filter(search), (sql.to_owned(), values), "{search}");
    }
}

#[test]
fn faults_are_named() {
    for (search, reason) in [
        ("colour = 'red'", "unknown column \"colour\""),
        ("phase ~ 'x'", "unknown operator \"~\""),
        ("phase == 'x'", "unknown operator \"==\""),
        ("phase between 'a'", "unknown operator \"between\""),
        ("phase not 'a'", "unknown operator \"not 'a'\""),
        ("phase is 'a'", "unknown operator \"is\""),
        ("phase = 'a' or phase = 'b'", "not by \"or\""),
        ("phase = 'a' phase = 'b'", "not by \"phase\""),
        ("phase = 'a' and", "expected a column, found the end"),
        ("phase = 'a", "no closing quote"),
        (
            "phase = Running",
            "a text in single quotes, not with Running",
        ),
        ("phase =", "not with the end"),
        ("phase", "expected an operator, found the end"),
        ("phase in 'a'", "\"(\" after in"),
        ("phase in ()", "not with )"),
        ("phase in ('a' 'b')", "\",\" or \")\""),
        (
            "timeout = 'soon'",
            "timeout is compared with a whole number",
        ),
        ("timeout like '1%'", "like compares texts"),
        ("llm_temperature = 1e999", "a number, not with 1e999"),
        ("created_at > 'yesterday'", "a time such as"),
        ("phase = 'a'; drop table sessions", "cannot read ';'"),
        ("phase = \"a\"", "cannot read '\"'"),
    ] {
        let error = Filter::parse(COLUMNS, search).unwrap_err().to_string();
        assert!(error.contains(reason), "{search}: {error}");
    }
    let long = format!("phase = '{}'", "x".repeat(MAX_LENGTH));
    assert!(matches!(
        Filter::parse(COLUMNS, &long),
        Err(SearchError::TooLong(_))
    ));
    let many = format!("timeout in ({}1)", "1,".repeat(MAX_VALUES));
    assert!(matches!(
        Filter::parse(COLUMNS, &many),
        Err(SearchError::TooMany { .. })
    ));
}

#[test]
fn order_is_checked_and_ends_with_id() {
    for (order, sql) in [
        ("", " order by id"),
        ("created_at desc", " order by created_at desc, id"),
        (
            "phase ASC, timeout DESC",
            " order by phase, timeout desc, id",
        ),
        ("id", " order by id, id"),
    ] {
        assert_eq!(Order::parse(COLUMNS, order).unwrap().sql(), sql);
    }
    for (order, reason) in [
        ("colour", "unknown column \"colour\""),
        ("phase sideways", "asc or desc"),
        ("phase,", "a comma and a column"),
        ("phase desc timeout", "a comma and a column"),
        (", phase", "expected a column"),
        ("phase; drop table", "cannot read ';'"),
        ("id,id,id,id,id,id,id,id,id", "more than 8 columns"),
    ] {
        let error = Order::parse(COLUMNS, order).unwrap_err().to_string();
        assert!(error.contains(reason), "{order}: {error}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        let _ = Filter::parse(COLUMNS, &text);
        let _ = Order::parse(COLUMNS, &text);
    }

    #[test]
    fn near_queries_are_read_or_refused(
        words in proptest::collection::vec(
            prop_oneof![
                Just("phase"), Just("timeout"), Just("="), Just("'"), Just("''"), Just("in"),
                Just("("), Just(")"), Just(","), Just("and"), Just("not"), Just("like"),
                Just("is"), Just("null"), Just("5"), Just("'x'"), Just("é"), Just("--"),
            ],
            0..12,
        )
    ) {
        let text = words.join(" ");
        if let Ok(filter) = Filter::parse(COLUMNS, &text) {
            prop_assert_eq!(filter.sql().matches('?').count(), filter.values().len());
        }
    }

    /// What a caller wrote between quotes reaches the database as a value, whole and unchanged,
    /// and changes nothing about the SQL.
    #[test]
    fn values_are_never_spliced(value in "\\PC{0,40}", other in "[';)(? -]{0,10}") {
        let quote = |text: &str| text.replace('\'', "''");
        let search = format!("phase = '{}' and id in ('{}')", quote(&value), quote(&other));
        let (sql, values) = filter(&search);
        prop_assert_eq!(sql, " where phase = ? and id in (?)");
        prop_assert_eq!(values, vec![Value::Text(value), Value::Text(other)]);
    }
}

#[test]
fn patterns_are_bounded_and_plain_texts_are_not() {
    let search = |operator: &str, length: usize| {
        let search = format!("name {operator} '{}'", "%".repeat(length));
        Filter::parse(crate::store::sessions::COLUMNS, &search)
    };
    for operator in ["like", "not like"] {
        assert!(search(operator, MAX_PATTERN).is_ok());
        assert_eq!(
            search(operator, MAX_PATTERN + 1),
            Err(SearchError::Pattern(MAX_PATTERN + 1))
        );
    }
    assert!(search("=", MAX_PATTERN + 1).is_ok());
    assert!(matches!(
        search("=", MAX_LENGTH),
        Err(SearchError::TooLong(_))
    ));
}
