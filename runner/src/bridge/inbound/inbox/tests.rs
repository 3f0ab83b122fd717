use proptest::prelude::*;

use super::*;

/// The `seq` of the start message in all tests.
const START: i64 = 1000;

fn message(seq: i64, second: i64, event_type: &str, payload: &str) -> SessionMessage {
    let mut message = SessionMessage {
        id: format!("id-{seq}"),
        session_id: "session".to_owned(),
        seq,
        event_type: event_type.to_owned(),
        payload: payload.to_owned(),
        created_at: None,
    };
    message.created_at.get_or_insert_default().seconds = second;
    message
}

fn user(seq: i64, text: &str) -> SessionMessage {
    message(seq, seq, "user", text)
}

fn delivered(seq: i64, of: i64) -> SessionMessage {
    message(seq, seq, "system", &format::delivered(of).1)
}

fn closed(seq: i64) -> SessionMessage {
    let payload = r#"{"custom_event":"ambient.input-closed"}"#;
    message(seq, seq, "system", payload)
}

fn start() -> SessionMessage {
    message(START, START, "system", &format::runner_started(false).1)
}

fn started() -> Started {
    Started {
        seq: START,
        knows_ids: true,
    }
}

/// An inbox that followed the stream from its beginning.
fn replayed(beginning: Beginning, stored: &[SessionMessage]) -> Inbox {
    let mut inbox = Inbox::new(beginning);
    inbox.start(started(), START);
    assert_eq!(inbox.resume_from(), 0);
    for message in stored {
        inbox.receive(message);
        assert_eq!(inbox.next(), None, "the replay goes on");
    }
    inbox.receive(&start());
    inbox
}

fn beginning(prompt: Option<&str>, preamble: Option<&str>, is_resume: bool) -> Beginning {
    Beginning {
        prompt: prompt.map(str::to_owned),
        preamble: preamble.map(str::to_owned),
        is_resume,
    }
}

/// Takes everything that can be handed over.
fn hand_over_all(inbox: &mut Inbox) -> Vec<String> {
    let mut handed = Vec::new();
    while let Some(next) = inbox.next() {
        match next {
            Next::Message { seq, text } => {
                handed.push(text);
                inbox.done(seq);
            }
            Next::Close { .. } => {
                handed.push("<closed>".to_owned());
                break;
            }
        }
    }
    handed
}

#[test]
fn only_what_nobody_delivered_is_handed_over() {
    let stored = [user(1, "a"), delivered(2, 1), user(3, "b"), user(5, "c")];
    let mut inbox = replayed(Beginning::default(), &stored);
    assert_eq!(hand_over_all(&mut inbox), ["b", "c"]);
    inbox.receive(&user(START + 1, "d"));
    inbox.receive(&user(START + 1, "d"));
    assert_eq!(hand_over_all(&mut inbox), ["d"]);
}

#[test]
fn the_prompt_is_handed_over_once() {
    let both = |is_resume| beginning(Some("all"), Some("pre"), is_resume);
    let mut inbox = replayed(both(false), &[]);
    assert_eq!(hand_over_all(&mut inbox), ["all"]);
    inbox.receive(&user(START + 1, "hi"));
    assert_eq!(hand_over_all(&mut inbox), ["hi"]);

    let mut inbox = replayed(both(false), &[user(1, "own"), user(2, "more")]);
    assert_eq!(hand_over_all(&mut inbox), ["pre\n\nown", "more"]);

    // As after a restart of the runner.
    let mut inbox = replayed(both(false), &[delivered(1, 0)]);
    assert_eq!(hand_over_all(&mut inbox), [""; 0]);
    inbox.receive(&user(START + 1, "hi"));
    assert_eq!(hand_over_all(&mut inbox), ["hi"]);
    let stored = [user(1, "own"), delivered(2, 1), user(3, "more")];
    let mut inbox = replayed(both(false), &stored);
    assert_eq!(hand_over_all(&mut inbox), ["more"]);

    let mut inbox = replayed(both(true), &[]);
    assert_eq!(hand_over_all(&mut inbox), [""; 0]);
    let mut inbox = replayed(both(true), &[user(1, "own")]);
    assert_eq!(hand_over_all(&mut inbox), ["own"]);

    let mut inbox = replayed(beginning(None, Some("pre"), false), &[]);
    inbox.receive(&user(START + 1, "typed"));
    assert_eq!(hand_over_all(&mut inbox), ["pre\n\ntyped"]);
}

#[test]
fn a_message_right_after_the_start_does_not_stand_for_the_prompt() {
    let mut inbox = replayed(beginning(Some("all"), Some("pre"), false), &[]);
    // Read in one go with the start message, before anybody asked what to hand over.
    inbox.receive(&user(START + 1, "hi"));
    assert_eq!(hand_over_all(&mut inbox), ["all", "hi"]);
}

#[test]
fn ids_are_forgotten_on_a_stream_that_never_breaks() {
    let mut inbox = replayed(Beginning::default(), &[]);
    inbox.limits.seen = 10;
    for n in 1..=100 {
        inbox.receive(&user(START + n, "text"));
        assert_eq!(hand_over_all(&mut inbox), ["text"]);
        assert!(inbox.seen.len() <= 10 && inbox.seen_ids.len() <= 10);
    }
    let from = inbox.resume_from();
    for n in (1..=101).filter(|n| START + n > from) {
        inbox.receive(&user(START + n, "again"));
    }
    assert_eq!(hand_over_all(&mut inbox), ["again"], "only the new one");
}

#[test]
fn ends_of_input_that_wait_are_bounded() {
    let mut inbox = replayed(Beginning::default(), &[]);
    inbox.limits.messages = 3;
    inbox.receive(&user(START + 1, "a"));
    for n in 2..=100 {
        inbox.receive(&closed(START + n));
        assert!(inbox.closing.len() <= 3);
    }
    assert_eq!(hand_over_all(&mut inbox), ["a", "<closed>"]);
}

#[test]
fn an_end_of_input_that_this_runners_last_agent_had_holds_for_the_next() {
    for is_resume in [false, true] {
        let mut inbox = Inbox::new(beginning(None, None, is_resume));
        inbox.start(started(), 10);
        let stored = [
            user(1, "a"),
            closed(2),
            delivered(3, 1),
            delivered(4, 2),
            // The runner's own first start message would be here: 10.
            user(11, "b"),
            closed(12),
            delivered(13, 11),
            delivered(14, 12),
            start(),
        ];
        for message in &stored {
            inbox.receive(message);
        }
        let closes_at = if is_resume { 12 } else { 2 };
        assert_eq!(inbox.next(), Some(Next::Close { seq: closes_at }));
    }
}

#[test]
fn input_ends_after_every_message_before_it() {
    let stored = [user(1, "a"), user(2, "b"), closed(3), user(4, "late")];
    let mut inbox = replayed(Beginning::default(), &stored);
    assert_eq!(hand_over_all(&mut inbox), ["a", "b", "<closed>"]);

    let mut inbox = replayed(Beginning::default(), &[]);
    inbox.receive(&closed(START + 1));
    assert_eq!(hand_over_all(&mut inbox), ["<closed>"]);
}

#[test]
fn an_end_of_input_holds_for_one_start_of_the_session() {
    let stored = [user(1, "a"), closed(2), delivered(3, 1), delivered(4, 2)];
    let mut same_start = replayed(beginning(None, None, false), &stored);
    assert_eq!(hand_over_all(&mut same_start), ["<closed>"]);
    let mut next_start = replayed(beginning(None, None, true), &stored);
    next_start.receive(&user(START + 1, "again"));
    assert_eq!(hand_over_all(&mut next_start), ["again"]);
}

#[test]
fn a_reconnect_starts_a_little_back() {
    let mut inbox = replayed(Beginning::default(), &[]);
    for second in 0..200 {
        inbox.receive(&message(
            START + 1 + second,
            START + second,
            "assistant",
            "",
        ));
    }
    let from = inbox.resume_from();
    // The newest is from second START + 199.
    assert_eq!(from, START + 1 + 139);
}

#[test]
fn what_waits_is_bounded_and_the_rest_is_read_again() {
    let mut inbox = Inbox::new(Beginning::default());
    inbox.limits.bytes = 100;
    inbox.start(started(), START);
    let text = "x".repeat(30);
    let stored: Vec<_> = (1..=20)
        .map(|seq| user(seq, &format!("{seq}{text}")))
        .collect();
    let mut handed = Vec::new();
    for _ in 0..10 {
        let from = inbox.resume_from();
        for message in stored.iter().filter(|message| message.seq > from) {
            inbox.receive(message);
            assert!(inbox.waiting_bytes <= 100);
        }
        inbox.receive(&start());
        handed.append(&mut hand_over_all(&mut inbox));
        if !inbox.wants_to_reread() {
            break;
        }
    }
    let all: Vec<_> = stored.into_iter().map(|message| message.payload).collect();
    assert_eq!(handed, all);
}

#[test]
fn a_replay_that_broke_off_is_begun_where_it_was() {
    let mut inbox = replayed(Beginning::default(), &[]);
    inbox.limits.messages = 1;
    let stored = [
        user(START + 1, "a"),
        user(START + 2, "b"),
        user(START + 500, "c"),
    ];
    for message in &stored {
        inbox.receive(message);
    }
    assert_eq!(hand_over_all(&mut inbox), ["a"]);
    assert!(inbox.wants_to_reread());
    assert_eq!(inbox.resume_from(), START + 1);
    // Nothing came.
    assert_eq!(inbox.resume_from(), START + 1);
    inbox.receive(&stored[1]);
    assert_eq!(inbox.resume_from(), START + 2);
    inbox.receive(&stored[2]);
    assert_eq!(hand_over_all(&mut inbox), ["b"]);
}

#[test]
fn a_message_longer_than_all_that_may_wait_still_passes() {
    let mut inbox = replayed(Beginning::default(), &[]);
    inbox.limits.bytes = 10;
    inbox.receive(&user(START + 1, "longer than ten bytes"));
    assert_eq!(hand_over_all(&mut inbox), ["longer than ten bytes"]);
}

/// A server, as the inbox sees it.
struct Server {
    stored: Vec<SessionMessage>,
    /// Got a `seq`, but not stored yet.
    uncommitted: Vec<SessionMessage>,
    next_seq: i64,
    second: i64,
}

impl Server {
    fn number(&mut self, event_type: &str, gap: i64) -> SessionMessage {
        self.next_seq += 1 + gap;
        let seq = self.next_seq;
        let text = format!("{seq}");
        message(seq, self.second, event_type, &text)
    }

    fn store(&mut self, message: SessionMessage) {
        self.stored.push(message);
        self.stored.sort_by_key(|message| message.seq);
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Somebody pushes; it reaches the stream, unless that drops it.
    Push {
        user: bool,
        gap: i64,
        dropped: bool,
    },
    /// Somebody pushes, but it is stored only later.
    Begin,
    Commit,
    /// The clock goes on.
    Wait(i64),
    /// The agent takes one.
    Hand,
    /// The stream breaks after that many messages of the replay.
    Break(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (any::<bool>(), 0i64..3, prop::bool::weighted(0.2))
            .prop_map(|(user, gap, dropped)| Step::Push { user, gap, dropped }),
        1 => Just(Step::Begin),
        2 => Just(Step::Commit),
        3 => (0i64..50).prop_map(Step::Wait),
        6 => Just(Step::Hand),
        1 => (0usize..20).prop_map(Step::Break),
    ];
    prop::collection::vec(step, 1..150)
}

fn reconnect(inbox: &mut Inbox, server: &Server, at_most: usize) {
    let from = inbox.resume_from();
    let replay = server.stored.iter().filter(|message| message.seq > from);
    for message in replay.take(at_most) {
        inbox.receive(message);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn every_message_is_handed_over_exactly_once(
        before in prop::collection::vec((any::<bool>(), any::<bool>()), 0..30),
        steps in steps(),
        knows_ids in any::<bool>(),
        most_waiting in 1usize..6,
    ) {
        let mut server = Server {
            stored: Vec::new(), uncommitted: Vec::new(), next_seq: 0, second: 1,
        };
        let mut expected = Vec::new();
        // What an earlier runner left: some delivered, some not.
        let mut records = Vec::new();
        for (is_user, was_delivered) in before {
            let sent = server.number(if is_user { "user" } else { "assistant" }, 0);
            if is_user && was_delivered {
                records.push(sent.seq);
            } else if is_user {
                expected.push(sent.payload.clone());
            }
            server.store(sent);
        }
        for of in records {
            let mut record = server.number("system", 0);
            record.payload = format::delivered(of).1;
            server.store(record);
        }
        let start = server.number("system", 0);
        let mut inbox = Inbox::new(Beginning::default());
        inbox.limits.messages = most_waiting;
        inbox.start(Started { seq: start.seq, knows_ids }, start.seq);
        server.store(start);

        let mut handed = Vec::new();
        reconnect(&mut inbox, &server, usize::MAX);
        for step in steps {
            match step {
                Step::Push { user, gap, dropped } => {
                    let sent = server.number(if user { "user" } else { "assistant" }, gap);
                    if user {
                        expected.push(sent.payload.clone());
                    }
                    server.store(sent.clone());
                    // Only servers that do not know ids drop messages.
                    if !dropped || knows_ids {
                        inbox.receive(&sent);
                    }
                }
                Step::Begin => {
                    let sent = server.number("user", 0);
                    server.uncommitted.push(sent);
                }
                Step::Commit => {
                    for sent in std::mem::take(&mut server.uncommitted) {
                        expected.push(sent.payload.clone());
                        server.store(sent.clone());
                        inbox.receive(&sent);
                    }
                }
                // What was begun is stored in less than a minute.
                Step::Wait(seconds) if server.uncommitted.is_empty() => server.second += seconds,
                Step::Wait(_) => {}
                Step::Hand => {
                    if let Some(Next::Message { seq, text }) = inbox.next() {
                        handed.push(text);
                        inbox.done(seq);
                    }
                    if inbox.wants_to_reread() {
                        reconnect(&mut inbox, &server, usize::MAX);
                    }
                }
                Step::Break(after) => {
                    reconnect(&mut inbox, &server, after);
                    reconnect(&mut inbox, &server, usize::MAX);
                }
            }
            prop_assert!(inbox.waiting.len() <= most_waiting);
            prop_assert!(inbox.settled.by_second.len() <= 61);
            prop_assert_eq!(inbox.seen.len(), inbox.seen_ids.len());
        }
        for sent in std::mem::take(&mut server.uncommitted) {
            expected.push(sent.payload.clone());
            server.store(sent);
        }
        for _ in 0..200 {
            reconnect(&mut inbox, &server, usize::MAX);
            handed.append(&mut hand_over_all(&mut inbox));
        }
        handed.sort_by_key(|text| text.parse::<i64>().unwrap());
        expected.sort_by_key(|text| text.parse::<i64>().unwrap());
        prop_assert_eq!(handed, expected);
    }
}
