use super::*;

#[test]
fn the_same_authorization_may_be_sent_twice() {
    for (values, token) in [
        (vec!["Bearer abc"], Some("abc")),
        (vec!["bearer  abc "], Some("abc")),
        (vec!["Bearer abc", "Bearer abc"], Some("abc")),
        (vec!["Bearer abc", "Bearer abd"], None),
        (vec![], None),
        (vec!["abc"], None),
        (vec!["Basic abc"], None),
        (vec!["Bearer "], None),
    ] {
        let sent = values.iter().map(|value| value.as_bytes());
        assert_eq!(bearer(sent).ok(), token, "{values:?}");
    }
}

#[test]
fn claims_of_one_or_several_values_are_compared() {
    let wanted = ["ours".to_owned()];
    for (claim, is_accepted) in [
        (Some(Value::from("ours")), true),
        (Some(Value::from(vec!["theirs", "ours"])), true),
        (Some(Value::from("theirs")), false),
        (Some(Value::from(1)), false),
        (None, false),
    ] {
        assert_eq!(accepted(&wanted, claim.as_ref()), is_accepted, "{claim:?}");
        assert!(accepted(&[], claim.as_ref()));
    }
}
