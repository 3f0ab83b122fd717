//! One condition after another, into SQL and values.

use prost_types::Timestamp;

use super::{Column, Filter, Kind, MAX_PATTERN, MAX_VALUES, SearchError, Value, token::Token};
use crate::time::to_micros;

/// Reads `condition (and condition)*`, or nothing.
///
/// # Errors
/// [`SearchError`] that names what is wrong.
pub(super) fn conditions(columns: &[Column], tokens: Vec<Token>) -> Result<Filter, SearchError> {
    let mut parser = Parser {
        columns,
        rest: tokens.into_iter().peekable(),
        filter: Filter::default(),
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
        self.compare(column, sql)?;
        match self.filter.values.last() {
            Some(Value::Text(pattern)) if pattern.len() > MAX_PATTERN => {
                Err(SearchError::Pattern(pattern.len()))
            }
            _ => Ok(()),
        }
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

/// The column that this word names.
pub(super) fn column(columns: &[Column], token: Option<Token>) -> Result<Column, SearchError> {
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

/// Something else should stand here.
pub(super) fn expected(expected: &'static str, token: Option<Token>) -> SearchError {
    SearchError::Expected {
        expected,
        found: found(token),
    }
}

fn found(token: Option<Token>) -> String {
    token.map_or_else(|| "the end".to_owned(), |token| token.to_string())
}
