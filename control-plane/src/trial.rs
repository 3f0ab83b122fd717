//! `ambient-control-plane try`: makes a session, fetches its token as its runner would, shows it to
//! the API server, and deletes the session again.
//!
//! In: [`TrialSettings`]. Out: a [`Report`] as of [`check`](crate::check), which it goes beyond: the
//! control plane itself must run, know the session, and be reached at the URL that runners are told.

use std::time::{Duration, Instant};

use ambient_shared::{
    api::Api,
    bearer::PublicKey,
    client::{grpc_channel, http_client_to, parse_certificates, trust_roots},
    clock::Clock,
    exchange::{Exchange, TIMEOUT},
    exit,
    proto::{
        CreateProjectRequest, CreateSessionRequest, DeleteProjectRequest, DeleteSessionRequest,
        GetProjectRequest, GetSessionRequest, Session,
    },
    resolve::Resolver,
    retry::{Backoff, Policy, Retry, Retryable as _},
    session::SessionId,
    token::Token,
};
use serde_json::Value;
use tokio::{sync::watch, time::sleep};
use url::Url;

use crate::{
    check::{CheckSettings, Report, Row, credential},
    cluster::{self, Fence},
    keypair::{KeypairStore as _, Keys, secret::SecretKeypairStore},
    sessions::remote::{RemoteError, call},
    settings::ServeSettings,
};

/// How long the control plane may take until it knows the session and gives its token.
const LIMIT: Duration = Duration::from_secs(60);

/// The session's name.
const NAME: &str = "trial of the installation";

/// Phases that a session leaves only when somebody starts it again.
const ENDED: [&str; 3] = ["Completed", "Failed", "Stopped"];

const SESSION: &str = "session";
const TOKEN: &str = "session token";
const ACCEPTED: &str = "token in use";
const CLEAN_UP: &str = "clean-up";

/// What is tried.
#[derive(Debug, Clone)]
pub struct TrialSettings {
    /// The API server, our credential for it, and the cluster.
    pub check: CheckSettings,
    /// Where runners are told to fetch tokens.
    pub token_url: Url,
    /// CA certificates that they are told to trust for that, PEM.
    pub token_ca: Option<String>,
    /// The session's project; made, and deleted again, when it is not there.
    pub project: String,
}

impl TrialSettings {
    /// The trial of an installation with these settings.
    pub fn new(settings: &ServeSettings, project: String) -> Self {
        Self {
            check: CheckSettings::from(settings),
            token_url: settings.token_url.clone(),
            token_ca: settings.token_ca.as_ref().map(|it| it.pem().to_string()),
            project,
        }
    }
}

/// Tries it; takes a minute at most, and leaves nothing behind.
pub async fn run(settings: &TrialSettings, clock: &Clock) -> Report {
    let (row, token) = credential(&settings.check.own, clock).await;
    let Some(token) = token else {
        return Report { rows: vec![row] };
    };
    let mut rows = vec![row];
    match Trial::new(settings, token, clock) {
        Ok(mut trial) => {
            let tried = trial.go(&mut rows).await;
            rows.extend(tried.err());
            rows.push(trial.clean_up().await);
        }
        Err(row) => rows.push(row),
    }
    Report { rows }
}

struct Trial<'a> {
    settings: &'a TrialSettings,
    clock: &'a Clock,
    api: Api,
    made_project: Option<String>,
    made_session: Option<String>,
}

impl<'a> Trial<'a> {
    fn new(settings: &'a TrialSettings, token: Token, clock: &'a Clock) -> Result<Self, Row> {
        Ok(Self {
            api: api(settings, token).map_err(|why| Row::failed(SESSION, why))?,
            settings,
            clock,
            made_project: None,
            made_session: None,
        })
    }

    /// All steps; a row for each that went well, and the one that did not as the error.
    async fn go(&mut self, rows: &mut Vec<Row>) -> Result<(), Row> {
        let failed = |name| move |why: String| Row::failed(name, why);
        let keys = self.keys().await.map_err(failed(TOKEN))?;
        let id = self.make().await.map_err(|error| {
            let why = exit::report(&error);
            Row::failed(
                SESSION,
                format!("{why}; check the credential's rights there"),
            )
        })?;
        let parsed = SessionId::parse(&id);
        let session = parsed.map_err(|error| Row::failed(SESSION, error.to_string()))?;
        let project = &self.settings.project;
        let made = format!("made {} in project {project}", session.hash());
        rows.push(Row::ok(SESSION, made));

        let token = self.fetch(&keys, &session).await.map_err(failed(TOKEN))?;
        let life = token.life_left(self.clock.now());
        let life = life.map_or_else(String::new, |left| {
            let left = Duration::from_secs(left.as_secs());
            format!(", which lives for {}", humantime::format_duration(left))
        });
        let from = &self.settings.token_url;
        rows.push(Row::ok(TOKEN, format!("got one from {from}{life}")));

        let api = api(self.settings, token).map_err(failed(ACCEPTED))?;
        let seen = session_of(&api, &id).await.map_err(|error| {
            let why = exit::report(&error);
            Row::failed(
                ACCEPTED,
                format!("{why}; does it know the keys of our tokens?"),
            )
        });
        seen?;
        rows.push(Row::ok(
            ACCEPTED,
            "the API server takes it for the session's",
        ));
        Ok(())
    }

    /// Those that the control plane serves with.
    async fn keys(&self) -> Result<Keys, String> {
        let clients = cluster::connect(&self.settings.check.cluster, Fence::open()).await;
        let store = SecretKeypairStore {
            client: clients.map_err(|error| exit::report(&error))?.own,
            namespace: self.settings.check.rules.namespace.clone(),
        };
        let keys = store.load_or_create().await;
        keys.map_err(|error| exit::report(&error))
    }

    async fn make(&mut self) -> Result<String, RemoteError> {
        let project = &self.settings.project;
        let mut projects = self.api.projects();
        let known = GetProjectRequest {
            id: project.clone(),
        };
        match call("read a project", projects.get_project(known)).await {
            Ok(_) => {}
            Err(error) if error.is_not_found() => {
                let new = CreateProjectRequest {
                    name: project.clone(),
                    ..CreateProjectRequest::default()
                };
                let made = call("make a project", projects.create_project(new)).await?;
                self.made_project = Some(made.metadata.map_or(project.clone(), |it| it.id));
            }
            Err(error) => return Err(error),
        }
        let new = CreateSessionRequest {
            name: NAME.to_owned(),
            project_id: Some(project.clone()),
            ..CreateSessionRequest::default()
        };
        let made = call("make a session", self.api.sessions().create_session(new)).await?;
        let id = made.metadata.map(|it| it.id).unwrap_or_default();
        self.made_session = Some(id.clone());
        Ok(id)
    }

    /// Asks until there is a token, the session has ended, or the time is over.
    async fn fetch(&self, keys: &Keys, session: &SessionId) -> Result<Token, String> {
        let exchange = self.exchange(keys, session)?;
        let started = Instant::now();
        let mut backoff = Backoff::new(Policy::default());
        loop {
            let error = match exchange.fetch().await {
                Ok(token) => return Ok(token),
                Err(error) => error,
            };
            let seen = session_of(&self.api, session.as_str()).await;
            if let Ok(Some(ended)) = seen.as_ref().map(how_ended) {
                return Err(ended);
            }
            let is_final = matches!(error.retry(), Retry::Never);
            let pause = backoff.next_wait();
            if is_final || started.elapsed() + pause > LIMIT {
                return Err(format!(
                    "{}; look at the control plane's log and at NetworkPolicies",
                    exit::report(&error)
                ));
            }
            sleep(pause).await;
        }
    }

    /// What a runner asks with.
    fn exchange(&self, keys: &Keys, session: &SessionId) -> Result<Exchange, String> {
        let report = |error: &(dyn std::error::Error + 'static)| exit::report(error);
        let key = PublicKey::from_pem(keys.public_pem()).map_err(|error| report(&error))?;
        let bearer = key.encrypt(session).map_err(|error| report(&error))?;
        let mut roots = trust_roots(None).map_err(|error| report(&error))?;
        if let Some(pem) = &self.settings.token_ca {
            let more = parse_certificates(pem).map_err(|error| report(&error))?;
            roots.add_parsable_certificates(more);
        }
        let url = &self.settings.token_url;
        let client = http_client_to(url, &Resolver::system(), roots, TIMEOUT);
        Ok(Exchange::new(
            client.map_err(|error| report(&error))?,
            url.clone(),
            bearer,
            Some(keys.session_key(session)),
            self.clock.clone(),
        ))
    }

    /// Deletes what was made.
    async fn clean_up(&self) -> Row {
        let mut gone = Vec::new();
        if let Some(id) = self.made_session.clone() {
            let request = DeleteSessionRequest { id };
            let mut sessions = self.api.sessions();
            let deleted = call("delete the session", sessions.delete_session(request)).await;
            gone.push(("session", deleted.err()));
        }
        if let Some(id) = self.made_project.clone() {
            let request = DeleteProjectRequest { id };
            let mut projects = self.api.projects();
            let deleted = call("delete the project", projects.delete_project(request)).await;
            gone.push(("project", deleted.err()));
        }
        let left = gone.iter().find_map(|(_, error)| error.as_ref());
        if let Some(error) = left {
            let why = exit::report(error);
            return Row::failed(CLEAN_UP, format!("{why}; delete it by hand"));
        }
        let names: Vec<_> = gone.iter().map(|(name, _)| *name).collect();
        let what = if names.is_empty() {
            "nothing was made".to_owned()
        } else {
            format!("deleted: {}", names.join(", "))
        };
        Row::ok(CLEAN_UP, what)
    }
}

fn api(settings: &TrialSettings, token: Token) -> Result<Api, String> {
    let channel = grpc_channel(&Resolver::system(), &settings.check.grpc);
    let channel = channel.map_err(|error| exit::report(&error))?;
    // The value stays readable without its sender.
    let (_, token) = watch::channel(Some(token));
    Ok(Api::new(channel, token))
}

async fn session_of(api: &Api, id: &str) -> Result<Session, RemoteError> {
    let request = GetSessionRequest { id: id.to_owned() };
    call("read the session", api.sessions().get_session(request)).await
}

/// That the session has ended, and why; a session that has may have no token.
fn how_ended(session: &Session) -> Option<String> {
    let phase = session.phase.as_deref().filter(|it| ENDED.contains(it))?;
    let conditions = session.conditions.as_deref().unwrap_or_default();
    let conditions: Value = serde_json::from_str(conditions).unwrap_or_default();
    let said = |key: &str| conditions[0][key].as_str().unwrap_or_default().to_owned();
    let why = [said("reason"), said("message")].join(" ");
    Some(format!("the session is {phase} already: {}", why.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_ended_says_why() {
        let session = |phase: &str| Session {
            phase: Some(phase.to_owned()),
            conditions: Some(
                r#"[{"reason": "AgentCommandMissing", "message": "no command"}]"#.to_owned(),
            ),
            ..Session::default()
        };
        assert_eq!(how_ended(&session("Running")), None);
        assert_eq!(how_ended(&Session::default()), None);
        let failed = how_ended(&session("Failed")).unwrap();
        assert_eq!(
            failed,
            "the session is Failed already: AgentCommandMissing no command"
        );
    }
}
