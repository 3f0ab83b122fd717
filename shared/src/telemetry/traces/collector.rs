//! How the exporter reaches the collector: by our own HTTP client, with its name resolution, TLS
//! roots and limits.

use std::{fmt, pin::Pin};

use bytes::Bytes;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};

/// A collector's HTTP client.
pub(super) struct Collector(reqwest::Client);

impl Collector {
    pub(super) fn new(client: reqwest::Client) -> Self {
        Self(client)
    }
}

impl HttpClient for Collector {
    fn send_bytes<'a, 'b>(
        &'a self,
        mut request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        // Whatever the HTTP libraries log, it is not what the headers' variable holds.
        let headers = request.headers_mut();
        headers
            .values_mut()
            .for_each(|value| value.set_sensitive(true));
        self.0.send_bytes(request)
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").finish_non_exhaustive()
    }
}
