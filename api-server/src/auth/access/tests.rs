use super::*;

fn caller(who: Who) -> Caller {
    Caller {
        who,
        expires_at: None,
    }
}

fn facts(phase: Phase) -> Facts {
    Facts {
        id: "session-1".to_owned(),
        creator: Some("ann".to_owned()),
        phase,
        generation: 2,
    }
}

fn minted(id: &str, generation: i64) -> Who {
    Who::Session {
        id: id.to_owned(),
        generation,
    }
}

/// Read, read messages, change, push `assistant`, push `user`, push the end of input.
#[test]
fn rights_are_those_of_the_contract() {
    let all = [true; 6];
    let none = [false; 6];
    let service = [true, true, true, true, false, false];
    let own_token = [true, true, false, true, false, false];
    for (what, who, expected) in [
        ("administrator", Who::Administrator("root".to_owned()), all),
        ("static service", Who::Service(None), service),
        ("service", Who::Service(Some("cp".to_owned())), service),
        ("creator", Who::Person("ann".to_owned()), all),
        ("stranger", Who::Person("bob".to_owned()), none),
        ("own token", minted("session-1", 2), own_token),
        ("old token", minted("session-1", 1), none),
        ("other session", minted("session-2", 2), none),
    ] {
        let push = |event_type, payload| Action::Push {
            event_type,
            payload,
        };
        let actions = [
            Action::Read,
            Action::ReadMessages,
            Action::Change,
            push("assistant", "hello"),
            push("user", "hello"),
            push("system", r#"{ "custom_event": "ambient.input-closed" }"#),
        ];
        let caller = caller(who);
        let allowed = actions.map(|action| caller.check(action, &facts(Phase::Running)).is_ok());
        assert_eq!(allowed, expected, "{what}");
    }
}

#[test]
fn a_session_token_ends_with_its_session() {
    let own = caller(minted("session-1", 2));
    for phase in Phase::ALL {
        let allowed = own.check(Action::Read, &facts(phase)).is_ok();
        assert_eq!(allowed, phase.is_active(), "{phase}");
    }
}

#[test]
fn only_who_acts_for_others_names_the_creator() {
    let asked = || Some("eve".to_owned());
    let creator = |who: Who| caller(who).creator(asked());
    assert_eq!(
        creator(Who::Person("ann".to_owned())).as_deref(),
        Some("ann")
    );
    assert_eq!(creator(Who::Service(None)).as_deref(), Some("eve"));
    assert_eq!(caller(Who::Service(None)).creator(None), None);
}
