//! `search` and `orderBy` of list calls, as checked conditions.
//!
//! In: text from a query string and the columns of a table. Out: SQL made of our own words alone,
//! with every value bound. The grammar is `condition (and condition)*`, where a condition is
//! `column operator value` (`=`, `!=`, `<>`, `<`, `<=`, `>`, `>=`, `[not] like`),
//! `column [not] in (value, …)` or `column is [not] null`. Keywords in any case; texts and times in
//! single quotes, a quote in a text doubled; `like` knows `%`, `_` and the escape `\`, and ignores
//! the case of ASCII letters.

mod parser;
mod token;

use std::fmt::Write as _;

use self::{
    parser::{column, expected},
    token::{Token, tokens},
};

/// Longest `search` and `orderBy`, in bytes: longer ones are no query a person or program wrote.
pub(crate) const MAX_LENGTH: usize = 8 * 1024;

/// Longest pattern of a `like`, in bytes: the work is that length times the column's.
const MAX_PATTERN: usize = 256;

/// Most values in all conditions together; SQLite binds at most 32,766.
const MAX_VALUES: usize = 1000;

/// Most columns to order by.
const MAX_ORDER: usize = 8;

/// A column that may be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Column {
    /// Its name, on the wire and in the database.
    pub(crate) name: &'static str,
    /// What it holds.
    pub(crate) kind: Kind,
}

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Text.
    Text,
    /// A whole number.
    Integer,
    /// A number.
    Real,
    /// A time, stored as microseconds since the epoch.
    Time,
}

impl Column {
    /// A column of texts.
    pub(crate) const fn text(name: &'static str) -> Self {
        Self {
            name,
            kind: Kind::Text,
        }
    }

    /// A column of whole numbers.
    pub(crate) const fn integer(name: &'static str) -> Self {
        Self {
            name,
            kind: Kind::Integer,
        }
    }

    /// A column of numbers.
    pub(crate) const fn real(name: &'static str) -> Self {
        Self {
            name,
            kind: Kind::Real,
        }
    }

    /// A column of times.
    pub(crate) const fn time(name: &'static str) -> Self {
        Self {
            name,
            kind: Kind::Time,
        }
    }
}

/// A value to bind.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    /// For [`Kind::Text`].
    Text(String),
    /// For [`Kind::Integer`] and [`Kind::Time`].
    Integer(i64),
    /// For [`Kind::Real`].
    Real(f64),
}

/// Which rows a list shows: SQL with a `?` for each value.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Filter {
    sql: String,
    values: Vec<Value>,
}

/// In which order: SQL for `order by`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Order(String);

/// What is wrong with a `search` or an `orderBy`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SearchError {
    /// Longer than [`MAX_LENGTH`].
    #[error("has {0} bytes; at most {MAX_LENGTH} are read")]
    TooLong(usize),
    /// More than [`MAX_VALUES`] or [`MAX_ORDER`].
    #[error("has more than {most} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        most: usize,
    },
    /// No such column.
    #[error("unknown column {0:?}; known are {1}")]
    Column(String, String),
    /// No such operator.
    #[error(
        "unknown operator {0:?}; known are = != <> < <= > >= like, not like, in, not in, is null, \
         is not null"
    )]
    Operator(String),
    /// `or` and other joins.
    #[error("conditions are joined by \"and\", not by {0:?}")]
    Join(String),
    /// Something else should stand there.
    #[error("expected {expected}, found {found}")]
    Expected {
        /// What should.
        expected: &'static str,
        /// What does.
        found: String,
    },
    /// A text without its closing quote.
    #[error("text {0:?} has no closing quote")]
    Unterminated(String),
    /// A character that begins nothing.
    #[error("cannot read {0:?}")]
    Character(char),
    /// A value of the wrong kind.
    #[error("{column} is compared with {expected}, not with {found}")]
    Value {
        /// The column.
        column: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// `like` on what is no text.
    #[error("like compares texts; {0} is none")]
    Like(&'static str),
    /// Longer than [`MAX_PATTERN`].
    #[error("pattern of like has {0} bytes; at most {MAX_PATTERN} are compared")]
    Pattern(usize),
}

impl Filter {
    /// Reads a `search`. Empty shows all rows.
    ///
    /// # Errors
    /// [`SearchError`] that names what is wrong.
    pub(crate) fn parse(columns: &[Column], search: &str) -> Result<Self, SearchError> {
        if search.len() > MAX_LENGTH {
            return Err(SearchError::TooLong(search.len()));
        }
        parser::conditions(columns, tokens(search)?)
    }

    /// Also asks that `column` be this text. `column` is one of ours, never a caller's.
    pub(crate) fn and_equals(&mut self, column: &'static str, text: &str) {
        self.begin(column);
        self.sql.push_str(" = ?");
        self.values.push(Value::Text(text.to_owned()));
    }

    /// ` where …`, or nothing.
    pub(crate) fn sql(&self) -> &str {
        &self.sql
    }

    /// What to bind, in the order of the `?`.
    pub(crate) fn values(&self) -> &[Value] {
        &self.values
    }

    fn begin(&mut self, column: &'static str) {
        let joint = if self.sql.is_empty() {
            " where"
        } else {
            " and"
        };
        let _ = write!(self.sql, "{joint} {column}");
    }
}

impl Order {
    /// Reads an `orderBy`. Ends with `id`, so that pages never show a row twice or none at all.
    ///
    /// # Errors
    /// [`SearchError`] that names what is wrong.
    pub(crate) fn parse(columns: &[Column], order: &str) -> Result<Self, SearchError> {
        if order.len() > MAX_LENGTH {
            return Err(SearchError::TooLong(order.len()));
        }
        let mut rest = tokens(order)?.into_iter().peekable();
        let mut sql = String::from(" order by ");
        let mut count = 0;
        while rest.peek().is_some() {
            count += 1;
            if count > MAX_ORDER {
                return Err(SearchError::TooMany {
                    what: "columns",
                    most: MAX_ORDER,
                });
            }
            let column = column(columns, rest.next())?;
            sql.push_str(column.name);
            let mut next = rest.next();
            if let Some(Token::Word(word)) = &next {
                match word.to_ascii_lowercase().as_str() {
                    "asc" => {}
                    "desc" => sql.push_str(" desc"),
                    _ => return Err(expected("asc or desc", next)),
                }
                next = rest.next();
            }
            sql.push_str(", ");
            match next {
                None => break,
                Some(Token::Comma) if rest.peek().is_some() => {}
                other => return Err(expected("a comma and a column", other)),
            }
        }
        sql.push_str("id");
        Ok(Self(sql))
    }

    /// ` order by …`.
    pub(crate) fn sql(&self) -> &str {
        &self.0
    }
}

impl Default for Order {
    fn default() -> Self {
        Self(" order by id".to_owned())
    }
}

#[cfg(test)]
mod tests;
