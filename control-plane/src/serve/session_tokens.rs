//! Makes sure that minted tokens open one session only: that the API server is one which knows
//! them (contract section 5, `X-Ambient-Session-Tokens`).

use std::time::Duration;

use ambient_shared::{
    exit,
    rest::{BASE, SESSION_TOKENS_HEADER},
    retry::{Backoff, Policy},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use url::Url;

/// The API server takes minted tokens for something else.
#[derive(Debug, thiserror::Error)]
#[error(
    "CP_TOKEN_ISSUER is minted, but the API server at {url} does not limit minted tokens to one \
     session; use oidc or static with it"
)]
pub struct UnlimitedTokens {
    /// Its base URL.
    pub url: Url,
}

/// Asks until the API server has answered, or `shutdown`. Any answer will do, also a refusal.
///
/// # Errors
/// When the API server is none of ours.
pub(super) async fn confirm(
    http: reqwest::Client,
    url: Url,
    shutdown: CancellationToken,
) -> Result<(), UnlimitedTokens> {
    let mut backoff = Backoff::new(Policy::default());
    let mut told = false;
    loop {
        let asked = http.get(any_path(&url)).send();
        let Some(answer) = shutdown.run_until_cancelled(asked).await else {
            return Ok(());
        };
        match answer {
            Ok(answer) if answer.headers().contains_key(SESSION_TOKENS_HEADER) => {
                info!("the API server limits minted tokens to one session");
                return Ok(());
            }
            // Something in between, such as a gateway without its server.
            Ok(answer) if answer.status().is_server_error() => {}
            Ok(_) => return Err(UnlimitedTokens { url }),
            Err(error) if !told => {
                warn!(reason = %exit::report(&error), "cannot ask the API server yet whether it limits minted tokens");
                told = true;
            }
            Err(_) => {}
        }
        let pause = backoff.next_wait().max(Duration::from_millis(50));
        if shutdown.run_until_cancelled(sleep(pause)).await.is_none() {
            return Ok(());
        }
    }
}

fn any_path(url: &Url) -> String {
    format!(
        "{}{BASE}/sessions?size=1",
        url.as_str().trim_end_matches('/')
    )
}

#[cfg(test)]
mod tests {
    use ambient_testing::DEADLINE;
    use axum::{Router, http::StatusCode, routing::get};
    use tokio::{net::TcpListener, task::JoinSet, time::timeout};

    use super::*;

    async fn server(status: StatusCode, header: bool) -> (Url, JoinSet<()>) {
        let answer = move || async move {
            let headers = header.then_some((SESSION_TOKENS_HEADER, "v1"));
            (status, axum::response::AppendHeaders(headers))
        };
        let routes = Router::new().route(&format!("{BASE}/sessions"), get(answer));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { axum::serve(listener, routes).await.unwrap() });
        (url.parse().unwrap(), tasks)
    }

    async fn confirmed(status: StatusCode, header: bool) -> Result<(), UnlimitedTokens> {
        let (url, _server) = server(status, header).await;
        let asked = confirm(reqwest::Client::new(), url, CancellationToken::new());
        timeout(DEADLINE, asked).await.unwrap()
    }

    #[tokio::test]
    async fn ours_is_known_by_its_header_also_when_it_refuses() {
        ambient_shared::client::install_crypto_provider();
        assert!(confirmed(StatusCode::OK, true).await.is_ok());
        assert!(confirmed(StatusCode::UNAUTHORIZED, true).await.is_ok());
    }

    #[tokio::test]
    async fn any_other_is_refused() {
        ambient_shared::client::install_crypto_provider();
        assert!(confirmed(StatusCode::OK, false).await.is_err());
        assert!(confirmed(StatusCode::UNAUTHORIZED, false).await.is_err());
    }

    #[tokio::test]
    async fn one_that_is_away_is_waited_for() {
        ambient_shared::client::install_crypto_provider();
        let (url, _server) = server(StatusCode::BAD_GATEWAY, false).await;
        let shutdown = CancellationToken::new();
        let mut asked = Box::pin(confirm(reqwest::Client::new(), url, shutdown.clone()));
        // It is not decided by a gateway's word.
        let waited = timeout(Duration::from_millis(300), &mut asked).await;
        assert!(waited.is_err());
        shutdown.cancel();
        assert!(timeout(DEADLINE, asked).await.unwrap().is_ok());
    }
}
