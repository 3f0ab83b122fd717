//! Makes sure that minted tokens open one session only: that the API server is one which knows
//! them (contract section 5, `X-Ambient-Session-Tokens`).

use std::time::Duration;

use ambient_shared::{
    exit,
    rest::{BASE, SESSION_TOKENS_HEADER},
    retry::{Backoff, Policy},
};
use http::StatusCode;
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

/// Asks until the API server has answered, or `shutdown`. A refusal will do, too, but not what may
/// come from something in between, such as a gateway without its server.
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
            Ok(answer) if is_of_a_server(answer.status()) => return Err(UnlimitedTokens { url }),
            other if !told => {
                let reason = match other {
                    Ok(answer) => format!("it answers {}", answer.status()),
                    Err(error) => exit::report(&error),
                };
                warn!(%reason, "cannot ask the API server yet whether it limits minted tokens");
                told = true;
            }
            _ => {}
        }
        let pause = backoff.next_wait().max(Duration::from_millis(50));
        if shutdown.run_until_cancelled(sleep(pause)).await.is_none() {
            return Ok(());
        }
    }
}

/// Whether one that has sessions says this to a stranger.
fn is_of_a_server(status: StatusCode) -> bool {
    let is_refusal = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
    status.is_success() || is_refusal
}

fn any_path(url: &Url) -> String {
    format!(
        "{}{BASE}/sessions?size=1",
        url.as_str().trim_end_matches('/')
    )
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{Arc, Mutex},
    };

    use ambient_testing::DEADLINE;
    use axum::{Router, routing::get};
    use tokio::{net::TcpListener, task::JoinSet, time::timeout};

    use super::*;

    /// Answers with these one after the other, with the last one again and again.
    async fn server(answers: &[(StatusCode, bool)]) -> (Url, JoinSet<()>) {
        let (left, last) = (answers.to_vec(), answers[answers.len() - 1]);
        let left = Arc::new(Mutex::new(VecDeque::from(left)));
        let answer = move || async move {
            let (status, header) = left.lock().unwrap().pop_front().unwrap_or(last);
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

    async fn confirmed(answers: &[(StatusCode, bool)]) -> Result<(), UnlimitedTokens> {
        ambient_shared::client::install_crypto_provider();
        let (url, _server) = server(answers).await;
        let asked = confirm(reqwest::Client::new(), url, CancellationToken::new());
        timeout(DEADLINE, asked).await.unwrap()
    }

    #[tokio::test]
    async fn ours_is_known_by_its_header_also_when_it_refuses() {
        assert!(confirmed(&[(StatusCode::OK, true)]).await.is_ok());
        assert!(confirmed(&[(StatusCode::UNAUTHORIZED, true)]).await.is_ok());
        let busy = (StatusCode::SERVICE_UNAVAILABLE, true);
        assert!(confirmed(&[busy]).await.is_ok());
    }

    #[tokio::test]
    async fn any_other_is_refused() {
        for status in [
            StatusCode::OK,
            StatusCode::UNAUTHORIZED,
            StatusCode::FORBIDDEN,
        ] {
            assert!(confirmed(&[(status, false)]).await.is_err(), "{status}");
        }
    }

    #[tokio::test]
    async fn what_a_gateway_says_while_the_server_is_away_decides_nothing() {
        for (of_gateway, ours) in [(502, true), (404, true), (429, true), (404, false)] {
            let of_gateway = StatusCode::from_u16(of_gateway).unwrap();
            let answers = [(of_gateway, false), (StatusCode::UNAUTHORIZED, ours)];
            assert_eq!(confirmed(&answers).await.is_ok(), ours, "{of_gateway}");
        }
    }

    #[tokio::test]
    async fn one_that_stays_away_is_waited_for_until_the_end() {
        ambient_shared::client::install_crypto_provider();
        let (url, _server) = server(&[(StatusCode::NOT_FOUND, false)]).await;
        let shutdown = CancellationToken::new();
        let mut asked = Box::pin(confirm(reqwest::Client::new(), url, shutdown.clone()));
        let waited = timeout(Duration::from_millis(300), &mut asked).await;
        assert!(waited.is_err());
        shutdown.cancel();
        assert!(timeout(DEADLINE, asked).await.unwrap().is_ok());
    }
}
