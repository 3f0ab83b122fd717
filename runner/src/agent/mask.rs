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
