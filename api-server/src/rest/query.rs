//! What list calls carry beside their path: `page`, `size`, `search`, `orderBy`, the project.

use std::collections::HashMap;

use ambient_shared::rest::{DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, PROJECT_HEADER};
use axum::extract::FromRequestParts;
use http::request::Parts;
use url::form_urlencoded;

use crate::{
    App,
    error::Error,
    search::{Column, Filter, Order},
    store::Page,
};

/// The query string, and the header that restricts to a project.
pub(super) struct Query {
    parameters: HashMap<String, String>,
    project_header: Option<String>,
}

impl FromRequestParts<App> for Query {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Error> {
        let query = parts.uri.query().unwrap_or_default();
        let project_header = match parts.headers.get(PROJECT_HEADER) {
            None => None,
            Some(value) => Some(
                value
                    .to_str()
                    .map_err(|_| Error::Invalid("X-Ambient-Project is not text".to_owned()))?
                    .to_owned(),
            ),
        };
        Ok(Self {
            parameters: form_urlencoded::parse(query.as_bytes())
                .into_owned()
                .collect(),
            project_header,
        })
    }
}

impl Query {
    /// The page asked for. A size above the largest is cut to it.
    ///
    /// # Errors
    /// When page or size is no number, or below 1.
    pub(super) fn page(&self) -> Result<Page, Error> {
        let number = self.number("page", 1)?;
        let size = self.number("size", DEFAULT_PAGE_SIZE)?.min(MAX_PAGE_SIZE);
        Ok(Page { number, size })
    }

    /// `search`, as checked conditions on these columns.
    ///
    /// # Errors
    /// When it is malformed.
    pub(super) fn filter(&self, columns: &[Column]) -> Result<Filter, Error> {
        Filter::parse(columns, self.text("search").unwrap_or_default())
            .map_err(|error| Error::Invalid(format!("search: {error}")))
    }

    /// `orderBy`, as checked columns.
    ///
    /// # Errors
    /// When it is malformed.
    pub(super) fn order(&self, columns: &[Column]) -> Result<Order, Error> {
        Order::parse(columns, self.text("orderBy").unwrap_or_default())
            .map_err(|error| Error::Invalid(format!("orderBy: {error}")))
    }

    /// The project that `X-Ambient-Project` or `project_id` names.
    ///
    /// # Errors
    /// When they name two.
    pub(super) fn project(&self) -> Result<Option<&str>, Error> {
        let header = self.project_header.as_deref().filter(|id| !id.is_empty());
        let query = self.text("project_id");
        if header.is_some() && query.is_some() && header != query {
            return Err(Error::Invalid(
                "X-Ambient-Project and project_id name different projects".to_owned(),
            ));
        }
        Ok(header.or(query))
    }

    /// `after_seq`; 0 when not given.
    ///
    /// # Errors
    /// When it is no number.
    pub(super) fn after_seq(&self) -> Result<i64, Error> {
        self.text("after_seq").map_or(Ok(0), |text| {
            text.parse()
                .map_err(|_| Error::Invalid(format!("after_seq must be a number, not {text:?}")))
        })
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.parameters
            .get(name)
            .map(String::as_str)
            .filter(|text| !text.is_empty())
    }

    fn number(&self, name: &str, default: u32) -> Result<u32, Error> {
        let Some(text) = self.text(name) else {
            return Ok(default);
        };
        // More than 32 bits hold is a number all the same.
        match text.parse::<u64>() {
            Ok(number) if number >= 1 => Ok(u32::try_from(number).unwrap_or(u32::MAX)),
            _ => Err(Error::Invalid(format!(
                "{name} must be a number from 1, not {text:?}"
            ))),
        }
    }
}
