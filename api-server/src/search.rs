//! `search` and `orderBy` of list calls, as checked conditions.
//!
//! In: text from a query string and the columns of a table. Out: SQL made of our own words alone,
//! with every value bound. The grammar is `condition (and condition)*`, where a condition is
//! `column operator value` (`=`, `!=`, `<>`, `<`, `<=`, `>`, `>=`, `[not] like`),
//! `column [not] in (value, …)` or `column is [not] null`. Keywords in any case; texts and times in
//! single quotes, a quote in a text doubled; `like` knows `%`, `_` and the escape `\`, and ignores
//! the case of ASCII letters.

mod token;

use std::fmt::Write as _;

use prost_types::Timestamp;

use self::token::{Token, tokens};
use crate::time::to_micros;

/// Longest `search` and `orderBy`, in bytes: longer ones are no query a person or program wrote.
pub(crate) const MAX_LENGTH: usize = 8 * 1024;

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
        let mut parser = Parser {
            columns,
            rest: tokens(search)?.into_iter().peekable(),
            filter: Self::default(),
        };
        if parser.rest.peek().is_none() {
            return Ok(parser.filter);
        }
        loop {
            parser.condition()?;
            match parser.rest.next() {
                None => return Ok(parser.filter),
                Some(Token::Word(word)) if word.eq_ignore_ascii_case("and") => {}
                Some(other) => return Err(SearchError::Join(other.to_string())),
            }
        }
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

struct Parser<'c> {
    columns: &'c [Column],
    rest: std::iter::Peekable<std::vec::IntoIter<Token>>,
    filter: Filter,
}

impl Parser<'_> {
    fn condition(&mut self) -> Result<(), SearchError> {
        let column = column(self.columns, self.rest.next())?;
        self.filter.begin(column.name);
        let operator = match self.rest.next() {
            Some(Token::Symbol(symbol)) => symbol,
            Some(Token::Word(word)) => word.to_ascii_lowercase(),
            other => return Err(expected("an operator", other)),
        };
        match operator.as_str() {
            "=" => self.compare(column, " = ?"),
            "!=" | "<>" => self.compare(column, " <> ?"),
            "<" => self.compare(column, " < ?"),
            "<=" => self.compare(column, " <= ?"),
            ">" => self.compare(column, " > ?"),
            ">=" => self.compare(column, " >= ?"),
            "like" => self.like(column, " like ? escape '\\'"),
            "in" => self.within(column, " in ("),
            "not" => match self.word().as_deref() {
                Some("like") => self.like(column, " not like ? escape '\\'"),
                Some("in") => self.within(column, " not in ("),
                other => Err(SearchError::Operator(
                    format!("not {}", other.unwrap_or_default())
                        .trim_end()
                        .to_owned(),
                )),
            },
            "is" => {
                let mut word = self.word();
                let sql = if word.as_deref() == Some("not") {
                    word = self.word();
                    " is not null"
                } else {
                    " is null"
                };
                if word.as_deref() != Some("null") {
                    return Err(SearchError::Operator("is".to_owned()));
                }
                self.filter.sql.push_str(sql);
                Ok(())
            }
            _ => Err(SearchError::Operator(operator)),
        }
    }

    fn compare(&mut self, column: Column, sql: &str) -> Result<(), SearchError> {
        self.filter.sql.push_str(sql);
        self.value(column)
    }

    fn like(&mut self, column: Column, sql: &str) -> Result<(), SearchError> {
        if column.kind != Kind::Text {
            return Err(SearchError::Like(column.name));
        }
        self.compare(column, sql)
    }

    fn within(&mut self, column: Column, sql: &str) -> Result<(), SearchError> {
        match self.rest.next() {
            Some(Token::Open) => {}
            other => return Err(expected("\"(\" after in", other)),
        }
        self.filter.sql.push_str(sql);
        loop {
            self.filter.sql.push('?');
            self.value(column)?;
            match self.rest.next() {
                Some(Token::Comma) => self.filter.sql.push_str(", "),
                Some(Token::Close) => break,
                other => return Err(expected("\",\" or \")\"", other)),
            }
        }
        self.filter.sql.push(')');
        Ok(())
    }

    fn value(&mut self, column: Column) -> Result<(), SearchError> {
        let token = self.rest.next();
        let value = match (column.kind, &token) {
            (Kind::Text, Some(Token::Text(text))) => Some(Value::Text(text.clone())),
            (Kind::Integer, Some(Token::Text(text) | Token::Number(text))) => {
                text.parse().ok().map(Value::Integer)
            }
            (Kind::Real, Some(Token::Text(text) | Token::Number(text))) => text
                .parse()
                .ok()
                .filter(|number: &f64| number.is_finite())
                .map(Value::Real),
            (Kind::Time, Some(Token::Text(text))) => text
                .parse::<Timestamp>()
                .ok()
                .and_then(|time| to_micros(&time))
                .map(Value::Integer),
            _ => None,
        };
        let Some(value) = value else {
            return Err(SearchError::Value {
                column: column.name,
                expected: match column.kind {
                    Kind::Text => "a text in single quotes",
                    Kind::Integer => "a whole number",
                    Kind::Real => "a number",
                    Kind::Time => "a time such as '2026-01-02T03:04:05Z'",
                },
                found: found(token),
            });
        };
        if self.filter.values.len() == MAX_VALUES {
            return Err(SearchError::TooMany {
                what: "values",
                most: MAX_VALUES,
            });
        }
        self.filter.values.push(value);
        Ok(())
    }

    fn word(&mut self) -> Option<String> {
        self.rest.next().map(|token| match token {
            Token::Word(word) => word.to_ascii_lowercase(),
            other => other.to_string(),
        })
    }
}

fn column(columns: &[Column], token: Option<Token>) -> Result<Column, SearchError> {
    let Some(Token::Word(name)) = token else {
        return Err(expected("a column", token));
    };
    columns
        .iter()
        .find(|column| column.name.eq_ignore_ascii_case(&name))
        .copied()
        .ok_or_else(|| {
            let known: Vec<_> = columns.iter().map(|column| column.name).collect();
            SearchError::Column(name, known.join(", "))
        })
}

fn expected(expected: &'static str, token: Option<Token>) -> SearchError {
    SearchError::Expected {
        expected,
        found: found(token),
    }
}

fn found(token: Option<Token>) -> String {
    token.map_or_else(|| "the end".to_owned(), |token| token.to_string())
}

#[cfg(test)]
mod tests;
