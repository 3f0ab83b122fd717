//! JSON bodies: limits, and errors that name the field.

use std::time::Duration;

use ambient_shared::api::MAX_MESSAGE;
use axum::extract::{FromRequest, Request};
use futures_util::StreamExt as _;
use http::header;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::timeout;

use crate::{App, error::Error};

/// Longest time that a body may take.
const BODY_LIMIT: Duration = Duration::from_secs(30);

/// The largest body in bytes: a payload of 1 MiB, its escapes and its envelope.
const MAX_BODY: usize = MAX_MESSAGE;

/// Of a larger body so much is read and thrown away, so that a client which sends first and reads
/// later gets our answer rather than a broken connection.
const MAX_DRAINED: usize = 4 * MAX_BODY;

/// A JSON object, whatever its content type says: `curl -d` calls it a form.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &App) -> Result<Self, Error> {
        let read = timeout(BODY_LIMIT, read(request));
        let bytes = read.await.map_err(|_| Error::SlowBody)??;
        parse(&bytes).map(Self)
    }
}

async fn read(request: Request) -> Result<Vec<u8>, Error> {
    let too_large = || Error::TooLarge(format!("the body has more than {MAX_BODY} bytes"));
    let length = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > MAX_DRAINED) {
        return Err(too_large());
    }
    let mut chunks = request.into_body().into_data_stream();
    let mut bytes = Vec::new();
    let mut received = 0;
    while let Some(chunk) = chunks.next().await {
        let chunk =
            chunk.map_err(|_| Error::Invalid("the body ended before its end".to_owned()))?;
        received += chunk.len();
        if received <= MAX_BODY {
            bytes.extend_from_slice(&chunk);
        } else if received > MAX_DRAINED {
            break;
        }
    }
    if received > MAX_BODY {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Reads an object whose fields may all be absent.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| Error::Invalid(format!("the body is not JSON: {error}")))?;
    let Value::Object(fields) = &value else {
        return Err(Error::Invalid("the body is not a JSON object".to_owned()));
    };
    T::deserialize(&value).map_err(|error| {
        // The library does not say where: the field that fails alone is the one.
        let culprit = fields.iter().find_map(|(name, field)| {
            let alone = Value::Object([(name.clone(), field.clone())].into_iter().collect());
            T::deserialize(&alone).err().map(|error| (name, error))
        });
        Error::Invalid(match culprit {
            Some((name, error)) => format!("{name}: {error}"),
            None => format!("the body cannot be read: {error}"),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sessions::SessionChange;

    #[test]
    fn faults_name_the_field() {
        for (body, reason) in [
            ("", "the body is not JSON: EOF"),
            ("{", "the body is not JSON: EOF"),
            ("[]", "the body is not a JSON object"),
            ("null", "the body is not a JSON object"),
            (
                r#"{"name":"n","labels":{"a":"b"}}"#,
                "labels: invalid type: map, expected a string",
            ),
            (r#"{"timeout":"1"}"#, "timeout: invalid type: string"),
            (r#"{"timeout":99999999999}"#, "timeout: invalid value"),
        ] {
            let error = parse::<SessionChange>(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains(reason), "{body}: {error}");
        }
        let change: SessionChange =
            parse(br#"{"name":"n","prompt":null,"unknown":[1],"id":"x"}"#).unwrap();
        assert_eq!((change.name.as_deref(), change.prompt), (Some("n"), None));
    }
}
