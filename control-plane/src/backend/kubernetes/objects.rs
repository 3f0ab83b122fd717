//! The objects of a session (contract section 3). Pure: from the session, its run and the settings.
//!
//! Everything is owned by the session's `ServiceAccount`, so that its deletion collects all. Only
//! the token Secret holds secrets; no other object has a value of one.

use std::{collections::BTreeMap, time::SystemTime};

use k8s_openapi::{
    ByteString,
    api::core::v1::{Secret, Service, ServiceAccount, ServicePort, ServiceSpec},
    apimachinery::pkg::{
        apis::meta::v1::{ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};

use super::names::{
    GENERATION, SESSION_ID, SESSION_ROOT, SessionRef, TOKEN_EXPIRES_AT, TOKEN_ISSUED_AT,
};
use crate::backend::Credentials;

mod command;
mod companions;
mod container;
mod image;
mod overlay;
mod pod;
mod resources;
mod volumes;

pub(crate) use overlay::check as check_overlay;
pub(crate) use pod::pod;

/// The agent's container.
pub(crate) const AGENT: &str = "ambient-code-runner";

/// Data key of the token; mounted as [`BOT_TOKEN`].
const API_TOKEN: &str = "api-token";
/// Data key and file of the session's key.
const SESSION_KEY: &str = "session-key";
/// The file of the token, as existing peers know it.
const BOT_TOKEN: &str = "bot-token";

/// Name of the port at which existing API servers reach a session.
const AGUI: &str = "agui";
/// Its number.
const AGUI_PORT: i32 = 8001;

/// Latest time that can be written as RFC 3339: the end of the year 9999, in Unix seconds.
const LAST_WRITABLE: u64 = 253_402_300_799;

/// The reference to the session's `ServiceAccount` of this UID, which owns all else.
///
/// It does not block the owner's deletion: that takes a right on the owner's finalizers where the
/// platform checks it. And it is no controller: a drained node would take a pod with one for
/// replaceable.
pub(crate) fn owner(session: &SessionRef, uid: &str) -> OwnerReference {
    OwnerReference {
        api_version: "v1".to_owned(),
        kind: "ServiceAccount".to_owned(),
        name: session.service_account(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    }
}

fn metadata(
    session: &SessionRef,
    name: String,
    owner_uid: Option<&str>,
    annotations: BTreeMap<String, String>,
) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(session.namespace.clone()),
        labels: Some(session.labels()),
        annotations: (!annotations.is_empty()).then_some(annotations),
        owner_references: owner_uid.map(|uid| vec![owner(session, uid)]),
        ..ObjectMeta::default()
    }
}

/// The `ServiceAccount`: owner of all else, and without any right. Its own token is mounted nowhere.
pub(crate) fn service_account(session: &SessionRef) -> ServiceAccount {
    let annotations = [(SESSION_ID.to_owned(), session.id.as_str().to_owned())];
    ServiceAccount {
        metadata: metadata(session, session.service_account(), None, annotations.into()),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

/// The token Secret. `now` counts as the time of issue where the token does not say one, and for one
/// that never expires: of that it matters whether it was written under an earlier configuration.
pub(crate) fn token_secret(
    session: &SessionRef,
    owner_uid: &str,
    credentials: &Credentials,
    now: SystemTime,
) -> Secret {
    let token = &credentials.token;
    let issued_at = token.expires_at().and(token.issued_at());
    let issued_at = issued_at.and_then(written).or_else(|| written(now));
    let known = [
        (GENERATION, Some(credentials.generation.to_string())),
        (SESSION_ROOT, Some(credentials.root.to_string())),
        (TOKEN_ISSUED_AT, issued_at),
        (TOKEN_EXPIRES_AT, token.expires_at().and_then(written)),
    ];
    let annotations = known
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    let data = [
        (API_TOKEN, token.expose()),
        (SESSION_KEY, credentials.session_key.expose()),
    ];
    let data = data.map(|(name, value)| (name.to_owned(), ByteString(value.as_bytes().to_vec())));
    Secret {
        metadata: metadata(
            session,
            session.token_secret(),
            Some(owner_uid),
            annotations.collect(),
        ),
        type_: Some("Opaque".to_owned()),
        data: Some(data.into()),
        ..Secret::default()
    }
}

/// RFC 3339 in seconds; none for a time that cannot be written so.
fn written(time: SystemTime) -> Option<String> {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs();
    (seconds <= LAST_WRITABLE).then(|| humantime::format_rfc3339_seconds(time).to_string())
}

/// The Service at which existing API servers reach the session, by its name in DNS. Headless: a
/// cluster's addresses for Services may be fewer than sessions, and a Kubernetes API server looks
/// through all that are taken whenever it gives one out.
pub(crate) fn service(session: &SessionRef, owner_uid: &str) -> Service {
    let selector = [(SESSION_ID.to_owned(), session.id.as_str().to_owned())];
    Service {
        metadata: metadata(session, session.service(), Some(owner_uid), BTreeMap::new()),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(selector.into()),
            ports: Some(vec![ServicePort {
                name: Some(AGUI.to_owned()),
                port: AGUI_PORT,
                target_port: Some(IntOrString::Int(AGUI_PORT)),
                protocol: Some("TCP".to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

#[cfg(test)]
mod tests;
