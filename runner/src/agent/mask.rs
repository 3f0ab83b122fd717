//! Takes the secrets that the runner knows out of all output.
//!
//! In: text of the agent. Out: the same, with [`MASK`] in place of each known secret. What is
//! shorter than [`SHORTEST`] is no secret worth the name, and masking it would garble all output.

use std::{
    borrow::Cow,
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use ambient_shared::{clock::Clock, token::Token};
use secrecy::{ExposeSecret as _, SecretString};

/// What stands in place of a secret.
pub(crate) const MASK: &str = "[masked]";

/// Fewest bytes of a secret that is masked.
pub(crate) const SHORTEST: usize = 8;

/// Most tokens that are remembered. At one a second (the shortest life is 2 s), more than any
/// token's expiry needs; of tokens without expiry, the newest.
const MAX_TOKENS: usize = 64;

/// Most other secrets: the session key and a few keys of the environment.
const MAX_SECRETS: usize = 16;

/// How long a token is still masked after its expiry: clocks differ, and servers allow for it.
const AFTER_EXPIRY: Duration = Duration::from_mins(2);

/// The secrets known to the runner, masked in everything that leaves. Clones share them.
#[derive(Clone)]
pub(crate) struct Masker(Arc<Known>);

struct Known {
    clock: Clock,
    needles: Mutex<Needles>,
}

#[derive(Default)]
struct Needles {
    tokens: VecDeque<(Vec<SecretString>, Option<SystemTime>)>,
    secrets: VecDeque<Vec<SecretString>>,
}

impl Masker {
    /// Knows nothing yet. `clock` says when a token has expired and is forgotten.
    pub(crate) fn new(clock: Clock) -> Self {
        let needles = Mutex::default();
        Self(Arc::new(Known { clock, needles }))
    }

    /// Masks this token from now until some time after its expiry.
    pub(crate) fn add_token(&self, token: &Token) {
        let now = self.0.clock.now();
        let Some(needle) = needle(token.expose()) else {
            return;
        };
        let forget_at = token
            .expires_at()
            .and_then(|at| at.checked_add(AFTER_EXPIRY));
        self.with(|known| {
            known
                .tokens
                .retain(|(_, forget_at)| forget_at.is_none_or(|at| at > now));
            if known.tokens.iter().any(|(known, _)| same(known, &needle)) {
                return;
            }
            if known.tokens.len() == MAX_TOKENS {
                known.tokens.pop_front();
            }
            known.tokens.push_back((needle, forget_at));
        });
    }

    /// Masks this secret for ever.
    pub(crate) fn add_secret(&self, secret: &str) {
        let Some(needle) = needle(secret) else { return };
        self.with(|known| {
            if known.secrets.len() < MAX_SECRETS && !known.secrets.iter().any(|s| same(s, &needle))
            {
                known.secrets.push_back(needle);
            }
        });
    }

    /// The line without the secrets; borrowed when it holds none.
    pub(crate) fn mask<'a>(&self, line: &'a str) -> Cow<'a, str> {
        match self.mask_bytes(line.as_bytes()) {
            Cow::Borrowed(_) => Cow::Borrowed(line),
            // Secrets are whole characters, so what is left is too.
            Cow::Owned(masked) => Cow::Owned(String::from_utf8_lossy(&masked).into_owned()),
        }
    }

    /// As [`Masker::mask`], for output that may not be text.
    pub(crate) fn mask_bytes<'a>(&self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let found = self.with(|known| occurrences(bytes, known.all()));
        if found.is_empty() {
            return Cow::Borrowed(bytes);
        }
        let mut masked = Vec::with_capacity(bytes.len());
        let mut from = 0;
        for Range { start, end } in found {
            masked.extend_from_slice(&bytes[from..start]);
            masked.extend_from_slice(MASK.as_bytes());
            from = end;
        }
        masked.extend_from_slice(&bytes[from..]);
        Cow::Owned(masked)
    }

    /// How many bytes at the end may be the start of a secret whose rest is still to come.
    pub(crate) fn unfinished(&self, bytes: &[u8]) -> usize {
        self.with(|known| {
            known
                .all()
                .map(|needle| unfinished(bytes, needle))
                .max()
                .unwrap_or(0)
        })
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut Needles) -> T) -> T {
        use_it(
            &mut self
                .0
                .needles
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

impl std::fmt::Debug for Masker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Masker(..)")
    }
}

impl Needles {
    fn all(&self) -> impl Iterator<Item = &[u8]> {
        let tokens = self.tokens.iter().map(|(forms, _)| forms);
        tokens
            .chain(&self.secrets)
            .flatten()
            .map(|form| form.expose_secret().as_bytes())
    }
}

/// A secret in the forms in which it may be printed: as it is, and inside a JSON string, where
/// some writers escape the slash too.
fn needle(secret: &str) -> Option<Vec<SecretString>> {
    let secret = secret.trim();
    if secret.len() < SHORTEST {
        return None;
    }
    let mut forms = vec![secret.to_owned()];
    let quoted = serde_json::Value::from(secret).to_string();
    let escaped = quoted.get(1..quoted.len() - 1).unwrap_or_default();
    for form in [escaped.to_owned(), escaped.replace('/', "\\/")] {
        if !form.is_empty() && !forms.contains(&form) {
            forms.push(form);
        }
    }
    Some(forms.into_iter().map(SecretString::from).collect())
}

fn same(one: &[SecretString], other: &[SecretString]) -> bool {
    let text = |forms: &[SecretString]| forms.first().map(|form| form.expose_secret().to_owned());
    text(one) == text(other)
}

/// Where the needles occur, in order, overlapping ones as one.
fn occurrences<'a>(bytes: &[u8], needles: impl Iterator<Item = &'a [u8]>) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for needle in needles {
        let mut from = 0;
        while let Some(at) = find(&bytes[from..], needle) {
            let start = from + at;
            found.push(start..start + needle.len());
            from = start + 1;
        }
    }
    found.sort_unstable_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(found.len());
    for range in found {
        match merged.last_mut() {
            Some(last) if range.start < last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let mut from = 0;
    loop {
        let at = from + bytes.get(from..)?.iter().position(|byte| *byte == first)?;
        if bytes[at..].starts_with(needle) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// The longest end of `bytes` that is a start of `needle`, but not all of it.
fn unfinished(bytes: &[u8], needle: &[u8]) -> usize {
    let longest = bytes.len().min(needle.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|length| needle.starts_with(&bytes[bytes.len() - length..]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(text: &str, expires_at: Option<SystemTime>) -> Token {
        Token::new(text, expires_at).unwrap()
    }

    #[test]
    fn secrets_are_masked_also_in_json_and_next_to_each_other() {
        let masker = Masker::new(Clock::system());
        masker.add_token(&token("header.payload.signature", None));
        masker.add_secret("a/key+with=\"quotes\"");
        let cases = [
            ("nothing in it", "nothing in it"),
            ("x header.payload.signature y", "x [masked] y"),
            (
                "header.payload.signatureheader.payload.signature",
                "[masked][masked]",
            ),
            (r#"{"k":"a/key+with=\"quotes\""}"#, r#"{"k":"[masked]"}"#),
            (r#"{"k":"a\/key+with=\"quotes\""}"#, r#"{"k":"[masked]"}"#),
            ("header.payload", "header.payload"),
        ];
        for (line, masked) in cases {
            assert_eq!(masker.mask(line), masked);
        }
        assert!(matches!(masker.mask("nothing"), Cow::Borrowed(_)));
    }

    #[test]
    fn what_is_too_short_to_be_a_secret_is_left_alone() {
        let masker = Masker::new(Clock::system());
        masker.add_secret("dev");
        masker.add_secret("");
        assert_eq!(masker.mask("developer"), "developer");
    }

    #[test]
    fn overlapping_secrets_leave_no_part() {
        let masker = Masker::new(Clock::system());
        masker.add_secret("abcdefghij");
        masker.add_secret("ghijklmnop");
        masker.add_secret("cdefghij");
        assert_eq!(masker.mask("<abcdefghijklmnop>"), "<[masked]>");
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_are_forgotten_some_time_after_their_expiry() {
        let start = ambient_shared::clock::from_unix_seconds(1_000_000).unwrap();
        let clock = Clock::manual(start);
        let masker = Masker::new(clock.clone());
        let second = Duration::from_secs(1);
        masker.add_token(&token("first-token", Some(start + second)));
        clock.set(start + second + AFTER_EXPIRY / 2);
        masker.add_token(&token("second-token", None));
        assert_eq!(masker.mask("first-token second-token"), "[masked] [masked]");
        clock.set(start + second + AFTER_EXPIRY);
        masker.add_token(&token("third-token", None));
        assert_eq!(
            masker.mask("first-token third-token"),
            "first-token [masked]"
        );
    }

    #[test]
    fn memory_is_bounded_and_the_newest_tokens_stay_known() {
        let masker = Masker::new(Clock::system());
        for number in 0..10 * MAX_TOKENS {
            masker.add_token(&token(&format!("token-number-{number}."), None));
            masker.add_token(&token(&format!("token-number-{number}."), None));
        }
        assert_eq!(masker.with(|known| known.tokens.len()), MAX_TOKENS);
        let newest = format!("token-number-{}.", 10 * MAX_TOKENS - 1);
        assert_eq!(masker.mask(&newest), "[masked]");
    }

    proptest! {
        /// No secret survives, wherever and how often it stands; the rest is as it was.
        #[test]
        fn no_secret_leaves(
            secrets in prop::collection::vec("[!-Z^-~]{8,40}", 1..5),
            around in prop::collection::vec("[a-z ü€\n]{0,6}", 1..8),
            order in prop::collection::vec(any::<prop::sample::Index>(), 8),
        ) {
            let masker = Masker::new(Clock::system());
            for (number, secret) in secrets.iter().enumerate() {
                if number % 2 == 0 {
                    masker.add_secret(secret);
                } else {
                    masker.add_token(&token(secret, None));
                }
            }
            let mut line = String::new();
            for (text, index) in around.iter().zip(&order) {
                line.push_str(text);
                line.push_str(&secrets[index.index(secrets.len())]);
            }
            let masked = masker.mask(&line);
            for secret in &secrets {
                prop_assert!(!masked.contains(secret.as_str()), "{masked}");
            }
        }

        /// Text without secrets is not touched.
        #[test]
        fn other_text_is_untouched(text in "[a-m \n]{0,80}") {
            let masker = Masker::new(Clock::system());
            masker.add_secret("nopqrstuvw");
            prop_assert_eq!(masker.mask(&text), text.as_str());
        }
    }
}
