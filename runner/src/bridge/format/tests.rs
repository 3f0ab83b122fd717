use proptest::prelude::*;

use super::*;

fn said(line: &Value) -> Vec<(&'static str, Value)> {
    heard(&from_agent(
        AgentIo::StreamJson,
        &Piece::line(line.to_string()),
    ))
}

fn heard(said: &Said) -> Vec<(&'static str, Value)> {
    said.events
        .iter()
        .map(|(kind, payload)| {
            let plain = || Value::String(payload.clone());
            let value = match kind {
                EventType::Assistant => plain(),
                _ => serde_json::from_str(payload).unwrap_or_else(|_| plain()),
            };
            (kind.as_str(), value)
        })
        .collect()
}

#[test]
fn a_run_of_stream_json_becomes_the_contracts_events() {
    let init = json!({"type": "system", "subtype": "init", "model": "m"});
    assert_eq!(
        said(&init),
        [("lifecycle", json!({"event": "run_started"}))]
    );

    let assistant = json!({"type": "assistant", "message": {"role": "assistant", "content": [
        {"type": "text", "text": "I look"},
        {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "ls"}},
        {"type": "thinking", "thinking": "hm"},
    ]}});
    assert_eq!(
        said(&assistant),
        [
            ("assistant", json!("I look")),
            (
                "tool_use",
                json!({"tool": "Bash", "tool_call_id": "t1", "input": {"command": "ls"}})
            ),
            (
                "system",
                json!({"custom_event": "thinking", "value": {"type": "thinking", "thinking": "hm"}})
            ),
        ]
    );

    let result = json!({"type": "user", "message": {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": "t1", "content": [
            {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": true},
    ]}});
    assert_eq!(
        said(&result),
        [
            (
                "tool_result",
                json!({"tool_call_id": "t1", "result": "a\nb"})
            ),
            (
                "tool_result",
                json!({"tool_call_id": "t2", "result": "no", "is_error": true})
            ),
        ]
    );

    let finished =
        json!({"type": "result", "subtype": "success", "is_error": false, "result": "x"});
    let piece = Piece::line(finished.to_string());
    let said = from_agent(AgentIo::StreamJson, &piece);
    assert!(said.ends_turn);
    assert_eq!(
        heard(&said),
        [("lifecycle", json!({"event": "run_finished"}))]
    );
}

#[test]
fn a_failed_result_is_an_error_and_still_ends_the_run() {
    let failed = json!({"type": "result", "subtype": "error_max_turns", "is_error": true});
    assert_eq!(
        said(&failed),
        [
            (
                "error",
                json!({"error": "error_max_turns", "code": "error_max_turns"})
            ),
            ("lifecycle", json!({"event": "run_finished"})),
        ]
    );
    let error = json!({"type": "error", "error": {"type": "overloaded", "message": "busy"}});
    assert_eq!(
        said(&error),
        [("error", json!({"error": "busy", "code": "overloaded"}))]
    );
}

#[test]
fn what_is_not_understood_is_not_lost() {
    let event = json!({"type": "stream_event", "event": {"n": 1}});
    assert_eq!(
        said(&event),
        [(
            "system",
            json!({"custom_event": "stream_event", "value": event})
        )]
    );
    let boundary = json!({"type": "system", "subtype": "compact_boundary"});
    assert_eq!(
        said(&boundary),
        [(
            "system",
            json!({"custom_event": "system.compact_boundary", "value": boundary})
        )]
    );
    let plain = from_agent(AgentIo::StreamJson, &Piece::line("warning: {"));
    assert_eq!(heard(&plain), [("assistant", json!("warning: {"))]);
    let odd = json!({"type": "assistant", "message": 7});
    assert_eq!(
        said(&odd),
        [("system", json!({"custom_event": "assistant", "value": odd}))]
    );
}

#[test]
fn an_agent_cannot_forge_the_runners_records() {
    let forged = json!({"type": "ambient.delivered", "seq": 7});
    let piece = Piece::line(forged.to_string());
    let (kind, payload) = from_agent(AgentIo::StreamJson, &piece).events.remove(0);
    assert_eq!(kind, EventType::System);
    assert_eq!(control(&payload), None);
}

#[test]
fn a_user_payload_is_plain_text_or_a_run() {
    assert_eq!(user_text("plain"), "plain");
    assert_eq!(user_text(r#"{"just": "json"}"#), r#"{"just": "json"}"#);
    let run = json!({"threadId": "t", "runId": "r", "messages": [
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "last"}]},
        {"role": "assistant", "content": "not this"},
    ]});
    assert_eq!(user_text(&run.to_string()), "last");
    let nobody = json!({"messages": [{"role": "assistant", "content": "x"}]}).to_string();
    assert_eq!(user_text(&nobody), nobody);
}

#[test]
fn control_messages_are_read_back() {
    assert_eq!(control(&delivered(42).1), Some(Control::Delivered(42)));
    assert_eq!(
        control(r#"{"custom_event":"ambient.input-closed"}"#),
        Some(Control::InputClosed)
    );
    assert_eq!(control(&runner_started(true).1), None);
    assert_eq!(control(r#"{"custom_event":"ambient.delivered"}"#), None);
    assert_eq!(control("ambient.delivered"), None);
}

#[test]
fn a_json_line_that_makes_a_payload_too_long_is_sent_in_parts() {
    let text = "\u{1}".repeat(MAX_PAYLOAD / 6 * 5);
    let line = json!({"type": "result", "is_error": true, "result": text}).to_string();
    let said = from_agent(AgentIo::StreamJson, &Piece::line(line.clone()));
    assert!(said.ends_turn);
    let mut joined = String::new();
    let last = said.events.len() - 1;
    for (number, (kind, payload)) in said.events.iter().enumerate() {
        assert_eq!(*kind, EventType::System);
        assert!(payload.len() <= MAX_PAYLOAD);
        let payload: Value = serde_json::from_str(payload).unwrap();
        assert_eq!(payload["value"]["continues"], number < last);
        joined.push_str(payload["value"]["text"].as_str().unwrap());
    }
    assert_eq!(joined, line);
}

/// JSON of some depth, with the words that the mapping looks for.
fn any_json() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "type",
        "system",
        "subtype",
        "init",
        "assistant",
        "user",
        "result",
        "message",
        "content",
        "text",
        "tool_use",
        "tool_result",
        "id",
        "name",
        "input",
        "is_error",
        "error",
    ]);
    let leaf = prop_oneof![
        word.clone().prop_map(|w| Value::String(w.to_owned())),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::from),
        Just(Value::Null),
        ".{0,8}".prop_map(Value::String),
    ];
    leaf.prop_recursive(5, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::Array),
            prop::collection::vec((word.clone(), inner), 0..6).prop_map(|pairs| {
                Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
            }),
        ]
    })
}

proptest! {
    #[test]
    fn any_json_line_says_something_that_fits(line in any_json()) {
        let said = from_agent(AgentIo::StreamJson, &Piece::line(line.to_string()));
        for (kind, payload) in &said.events {
            prop_assert!(payload.len() <= MAX_PAYLOAD);
            let json = matches!(kind, EventType::System | EventType::ToolUse
                | EventType::ToolResult | EventType::Lifecycle | EventType::Error);
            prop_assert!(!json || serde_json::from_str::<Value>(payload).is_ok());
        }
    }

    #[test]
    fn any_text_is_one_assistant_message_in_lines(text in "[^\n]{0,200}") {
        let said = from_agent(AgentIo::Lines, &Piece::line(text.clone()));
        prop_assert_eq!(said.events, vec![(EventType::Assistant, text)]);
    }

    #[test]
    fn a_user_message_is_one_line_for_the_agent(text in any::<String>()) {
        let lines = to_agent(AgentIo::Lines, &text);
        prop_assert_eq!(lines.matches(['\n', '\r']).count(), 1);
        prop_assert!(lines.ends_with('\n'));

        let json = to_agent(AgentIo::StreamJson, &text);
        prop_assert_eq!(json.matches('\n').count(), 1);
        let json: Value = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(json["message"]["content"][0]["text"].as_str().unwrap(), text);
    }

    #[test]
    fn parts_join_to_the_text(text in any::<String>(), longest in 4usize..20) {
        let parts = parts(&text, longest);
        prop_assert!(parts.iter().all(|part| part.len() <= longest));
        prop_assert_eq!(parts.concat(), text);
    }

    #[test]
    fn payloads_of_anybody_never_panic(payload in any::<String>(), json in any_json()) {
        control(&payload);
        user_text(&payload);
        control(&json.to_string());
        user_text(&json.to_string());
    }
}
