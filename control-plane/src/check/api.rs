//! The API server, and the credential for it.

use ambient_shared::{
    api::Api,
    client::{GrpcAddress, grpc_channel, http_client_to, trust_roots},
    clock::Clock,
    exit,
    proto::ListSessionsRequest,
    resolve::Resolver,
    session::SessionId,
    token::Token,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{CheckSettings, LIMIT, Row, limited};
use crate::{
    issuer::{Issuer as _, Subject, fixed::FixedIssuer, oidc::OidcIssuer},
    sessions::{
        list::Query,
        remote::call,
        rest::{RestClient, RestError},
    },
    settings::IssuerSettings,
};

const CREDENTIAL: &str = "API token";
const REST: &str = "API server REST";
const GRPC: &str = "API server gRPC";

pub(super) async fn rows(settings: &CheckSettings, clock: &Clock) -> Vec<Row> {
    let (credential, token) = credential(&settings.own, clock).await;
    let Some(token) = token else {
        let without = "not tried: there is no token for it, see above";
        return vec![
            credential,
            Row::failed(REST, without),
            Row::failed(GRPC, without),
        ];
    };
    let (_sender, token) = watch::channel(Some(token));
    let (rest, grpc) = tokio::join!(
        limited(REST, rest(&settings.api_url, token.clone())),
        limited(GRPC, grpc(&settings.grpc, token)),
    );
    vec![credential, rest, grpc]
}

/// Whether there is a token, and that token.
pub(crate) async fn credential(own: &IssuerSettings, clock: &Clock) -> (Row, Option<Token>) {
    let found = match own {
        IssuerSettings::Static { token } => FixedIssuer::new(token)
            .map(|issuer| ("AMBIENT_API_TOKEN", issuer.token().clone()))
            .map_err(|error| format!("AMBIENT_API_TOKEN: {error}")),
        IssuerSettings::Oidc {
            url,
            client_id,
            client_secret,
        } => match OidcIssuer::connect(url, client_id, client_secret, clock) {
            Ok(issuer) => ask(&issuer).await.map(|token| (url.as_str(), token)),
            Err(error) => Err(exit::report(&error)),
        },
        IssuerSettings::Minted { .. } => Err("the control plane needs a token that somebody \
                                              else made; set AMBIENT_API_TOKEN or OIDC_TOKEN_URL"
            .to_owned()),
    };
    let (from, token) = match found {
        Ok(found) => found,
        Err(why) => return (Row::failed(CREDENTIAL, why), None),
    };
    let row = match token.life_left(clock.now()) {
        None => Row::ok(CREDENTIAL, format!("from {from}")),
        Some(left) if left.is_zero() => Row::failed(
            CREDENTIAL,
            format!("the token from {from} has expired; get a new one"),
        ),
        Some(left) => {
            let left = humantime::format_duration(std::time::Duration::from_secs(left.as_secs()));
            Row::ok(CREDENTIAL, format!("from {from}, valid for another {left}"))
        }
    };
    (row, Some(token))
}

/// One request to the identity provider.
async fn ask(issuer: &OidcIssuer) -> Result<Token, String> {
    // Its tokens are the same for every session.
    let Ok(session) = SessionId::parse("ambient-check") else {
        return Err("no session to ask for".to_owned());
    };
    let subject = Subject {
        session,
        generation: 0,
    };
    let ended = CancellationToken::new();
    let asking = async {
        let token = issuer.issue(&subject, std::time::Duration::ZERO).await;
        ended.cancel();
        token
    };
    let (token, ()) = tokio::join!(asking, issuer.run(ended.clone()));
    token.map_err(|error| exit::report(&error))
}

async fn rest(url: &Url, token: watch::Receiver<Option<Token>>) -> Row {
    let client =
        trust_roots(None).and_then(|roots| http_client_to(url, &Resolver::system(), roots, LIMIT));
    let client = match client {
        Ok(client) => RestClient::new(client, url, token),
        Err(error) => return Row::failed(REST, exit::report(&error)),
    };
    match client.page(&Query { phase: None }, 1, 1).await {
        Ok(page) => Row::ok(REST, format!("{url} has {} sessions", page.total)),
        Err(error @ RestError::Refused(_)) => Row::note(
            REST,
            format!("{error}; sessions are listed over gRPC then, which is slower"),
        ),
        Err(error) => {
            let why = exit::report(&error);
            Row::failed(REST, format!("{why}; check AMBIENT_API_SERVER_URL"))
        }
    }
}

async fn grpc(to: &GrpcAddress, token: watch::Receiver<Option<Token>>) -> Row {
    let channel = match grpc_channel(&Resolver::system(), to) {
        Ok(channel) => channel,
        Err(error) => return Row::failed(GRPC, exit::report(&error)),
    };
    let mut sessions = Api::new(channel, token).sessions();
    let request = ListSessionsRequest { page: 1, size: 1 };
    let address = &to.address;
    match call("list sessions", sessions.list_sessions(request)).await {
        Ok(_) => Row::ok(GRPC, format!("{address} lists sessions")),
        Err(error) => Row::failed(
            GRPC,
            format!(
                "{} from {address}; check AMBIENT_GRPC_SERVER_ADDR and AMBIENT_GRPC_USE_TLS",
                exit::report(&error)
            ),
        ),
    }
}
