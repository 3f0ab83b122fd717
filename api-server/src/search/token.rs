//! The words of a `search` or an `orderBy`.

use std::fmt;

use super::SearchError;

/// One word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// A column or a keyword.
    Word(String),
    /// A quoted text, without its quotes.
    Text(String),
    /// Digits, maybe with a sign, a point or an exponent; not checked further.
    Number(String),
    /// An operator made of signs, known or not.
    Symbol(String),
    /// `(`
    Open,
    /// `)`
    Close,
    /// `,`
    Comma,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "'{}'", text.replace('\'', "''")),
            Self::Word(text) | Self::Number(text) | Self::Symbol(text) => f.write_str(text),
            Self::Open => f.write_str("("),
            Self::Close => f.write_str(")"),
            Self::Comma => f.write_str(","),
        }
    }
}

/// Splits a text into words.
pub(super) fn tokens(text: &str) -> Result<Vec<Token>, SearchError> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, length) = match first {
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            ',' => (Token::Comma, 1),
            '\'' => quoted(rest)?,
            '=' | '!' | '<' | '>' | '~' | '+' | '*' | '/' | '|' | '&' => {
                let run = run_of(rest, |c| "=!<>~+*/|&".contains(c));
                (Token::Symbol(run.to_owned()), run.len())
            }
            '0'..='9' | '-' | '.' => {
                let run = run_of(rest, |c| c.is_ascii_alphanumeric() || "+-.".contains(c));
                (Token::Number(run.to_owned()), run.len())
            }
            c if c.is_alphabetic() || c == '_' => {
                let run = run_of(rest, |c| c.is_alphanumeric() || c == '_' || c == '.');
                (Token::Word(run.to_owned()), run.len())
            }
            other => return Err(SearchError::Character(other)),
        };
        found.push(token);
        rest = rest.get(length..).unwrap_or_default().trim_start();
    }
    Ok(found)
}

/// A text in single quotes; a quote in it is doubled. With the bytes that it takes.
fn quoted(from: &str) -> Result<(Token, usize), SearchError> {
    let mut text = String::new();
    let mut characters = from.char_indices().skip(1).peekable();
    while let Some((at, character)) = characters.next() {
        if character != '\'' {
            text.push(character);
        } else if characters.next_if(|(_, next)| *next == '\'').is_some() {
            text.push('\'');
        } else {
            return Ok((Token::Text(text), at + 1));
        }
    }
    Err(SearchError::Unterminated(text))
}

fn run_of(text: &str, belongs: impl Fn(char) -> bool) -> &str {
    let end = text.find(|c| !belongs(c)).unwrap_or(text.len());
    text.get(..end).unwrap_or_default()
}
