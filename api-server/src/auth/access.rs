//! Who may do what (contract section 4).

use std::time::SystemTime;

use ambient_shared::{phase::Phase, rest::Session};
use serde_json::Value;

use crate::{error::Error, sessions::phase_of};

/// `custom_event` of the message that ends an agent's input.
const INPUT_CLOSED: &str = "ambient.input-closed";

/// Somebody who is signed in.
#[derive(Clone)]
pub(crate) struct Caller {
    /// Who.
    pub(crate) who: Who,
    /// Until when; none for static tokens.
    pub(crate) expires_at: Option<SystemTime>,
}

/// Kinds of callers.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Who {
    /// May do everything.
    Administrator(String),
    /// A program of the platform, by its user name if its token has one.
    Service(Option<String>),
    /// A person, by user name.
    Person(String),
    /// A session, by a token minted for it.
    Session {
        /// Its id.
        id: String,
        /// How often it had been started when the token was minted.
        generation: i64,
    },
}

/// What a caller wants to do with a session.
#[derive(Clone, Copy)]
pub(crate) enum Action<'a> {
    /// See the session.
    Read,
    /// See its messages.
    ReadMessages,
    /// Change or delete it.
    Change,
    /// Add a message.
    Push {
        /// Its type.
        event_type: &'a str,
        /// Its text.
        payload: &'a str,
    },
}

/// What decides about access to a session.
pub(crate) struct Facts {
    id: String,
    creator: Option<String>,
    phase: Phase,
    generation: i64,
}

impl Facts {
    /// Those of a session.
    pub(crate) fn of(session: &Session) -> Self {
        Self {
            id: session.id.clone(),
            creator: session.created_by_user_id.clone(),
            phase: phase_of(session),
            generation: session.sdk_restart_count.unwrap_or_default().into(),
        }
    }
}

impl Caller {
    /// The user name, if there is one.
    pub(crate) fn name(&self) -> Option<&str> {
        match &self.who {
            Who::Administrator(name) | Who::Person(name) => Some(name),
            Who::Service(name) => name.as_deref(),
            Who::Session { .. } => None,
        }
    }

    /// Whether the caller sees every session.
    pub(crate) fn sees_all(&self) -> bool {
        matches!(self.who, Who::Administrator(_) | Who::Service(_))
    }

    /// Whether what the caller may see of one session ends while its token is still valid: people's
    /// and programs' rights depend on nothing that changes.
    pub(crate) fn rights_may_end(&self) -> bool {
        matches!(self.who, Who::Session { .. })
    }

    /// Refuses session tokens, where a call is not about one session.
    ///
    /// # Errors
    /// When it is one.
    pub(crate) fn not_a_session(&self) -> Result<(), Error> {
        match self.who {
            Who::Session { .. } => Err(Error::forbidden(
                "a session's token may only read its session, and read and push its messages",
            )),
            Who::Administrator(_) | Who::Service(_) | Who::Person(_) => Ok(()),
        }
    }

    /// Whether a list or watch of sessions shows the caller this one.
    pub(crate) fn sees(&self, session: &Session) -> bool {
        self.check(Action::Read, &Facts::of(session)).is_ok()
    }

    /// Whose session it is when the caller creates one: callers that act for others say so,
    /// everybody else is the creator.
    pub(crate) fn creator(&self, asked: Option<String>) -> Option<String> {
        let asked = asked.filter(|name| !name.is_empty() && self.sees_all());
        asked.or_else(|| self.name().map(str::to_owned))
    }

    /// Checks one action on one session.
    ///
    /// # Errors
    /// When the caller may not do it.
    pub(crate) fn check(&self, action: Action<'_>, session: &Facts) -> Result<(), Error> {
        match &self.who {
            Who::Administrator(_) => Ok(()),
            Who::Service(_) => refuse_push_for_people(action, "a service caller"),
            Who::Person(name) => {
                if session.creator.as_ref() == Some(name) {
                    return Ok(());
                }
                Err(Error::NotYours {
                    over_grpc: match action {
                        Action::ReadMessages => "not authorized to watch this session",
                        Action::Read | Action::Change | Action::Push { .. } => {
                            "not authorized to use this session"
                        }
                    },
                })
            }
            Who::Session { id, generation } => {
                if *id != session.id {
                    return Err(Error::NotYours {
                        over_grpc: match action {
                            Action::ReadMessages => "not authorized to watch this session",
                            Action::Read | Action::Change | Action::Push { .. } => {
                                "token is for another session"
                            }
                        },
                    });
                }
                if *generation != session.generation {
                    // Unlike the rest, a fresh token mends this.
                    return Err(Error::unauthenticated(
                        "token is for an earlier start of this session",
                    ));
                }
                if !session.phase.is_active() {
                    return Err(Error::forbidden(
                        "the session has ended, and its token with it",
                    ));
                }
                match action {
                    Action::Read | Action::ReadMessages => Ok(()),
                    Action::Change => self.not_a_session(),
                    Action::Push { .. } => refuse_push_for_people(action, "a session's token"),
                }
            }
        }
    }

    /// Checks a change of a project or its settings: its creator's, an administrator's or a
    /// service caller's.
    ///
    /// # Errors
    /// When the caller is none of these.
    pub(crate) fn check_project(&self, creator: Option<&str>) -> Result<(), Error> {
        self.not_a_session()?;
        if self.sees_all() || self.name().is_some_and(|name| Some(name) == creator) {
            return Ok(());
        }
        Err(Error::forbidden(
            "only the project's creator or an administrator may change it",
        ))
    }
}

/// What only people may say: `user` messages, and that there will be no more of them.
fn refuse_push_for_people(action: Action<'_>, who: &str) -> Result<(), Error> {
    let Action::Push {
        event_type,
        payload,
    } = action
    else {
        return Ok(());
    };
    if event_type == "user" {
        return Err(Error::forbidden(format!(
            "{who} may not push event_type=user"
        )));
    }
    if event_type == "system" && custom_event(payload).as_deref() == Some(INPUT_CLOSED) {
        return Err(Error::forbidden(format!(
            "{who} may not push {INPUT_CLOSED}; the session's creator may"
        )));
    }
    Ok(())
}

fn custom_event(payload: &str) -> Option<String> {
    let payload: Value = serde_json::from_str(payload).ok()?;
    Some(payload.get("custom_event")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests;
