//! Which replica has read which signing keys.
//!
//! In: the annotations of their Secret, where each replica says what it signs with and which key it
//! knows to be next. Out: who has not followed a rotation. One that cannot read its keys signs with
//! those that it has, and cannot be told: so a rotation waits for it.

use std::collections::BTreeMap;

use aws_lc_rs::digest;

use super::{Ids, id::KeyId};

/// What the annotations' names begin with. The name of the replica follows.
const PREFIX: &str = "replica.ambient-code.io/";

/// Longest name of an annotation after its prefix.
const MAX_NAME: usize = 63;

/// Most that a Secret keeps: a replica that is killed with its pod leaves its annotation, and all
/// annotations of an object may have 256 KiB (Kubernetes docs, Annotations).
const MOST: usize = 100;

/// What each replica has said, by its annotation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Readers(BTreeMap<String, String>);

/// How many replicas have not followed a rotation of the signing key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Behind {
    /// Those that do not know the next key.
    pub(super) of_next: usize,
    /// Those that sign with another than the current one.
    pub(super) of_current: usize,
}

/// The annotation of a replica of this name, which is best its pod's.
pub(super) fn annotation_of(replica: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let ends = |name: &str| {
        let (first, last) = (name.bytes().next(), name.bytes().last());
        [first, last]
            .iter()
            .flatten()
            .all(u8::is_ascii_alphanumeric)
    };
    let fits = (1..=MAX_NAME).contains(&replica.len()) && replica.bytes().all(is_plain);
    if fits && ends(replica) {
        return format!("{PREFIX}{replica}");
    }
    let hash = digest::digest(&digest::SHA256, replica.as_bytes());
    let mut short = [0; 8];
    short.copy_from_slice(&hash.as_ref()[..8]);
    format!("{PREFIX}{}", KeyId::from_bytes(short))
}

/// What a replica with these signing keys says.
pub(super) fn said_of(signing: &Ids<String>) -> String {
    match &signing.next {
        Some(next) => format!("{} {next}", signing.current),
        None => signing.current.clone(),
    }
}

impl Readers {
    /// From all annotations of the Secret.
    pub(super) fn of(annotations: Option<BTreeMap<String, String>>) -> Self {
        let all = annotations.into_iter().flatten();
        Self(all.filter(|(name, _)| name.starts_with(PREFIX)).collect())
    }

    /// What the replica with this annotation has said.
    pub(super) fn said_by(&self, annotation: &str) -> Option<&str> {
        self.0.get(annotation).map(String::as_str)
    }

    /// It has said this now.
    pub(super) fn hear(&mut self, annotation: String, said: String) {
        self.0.insert(annotation, said);
    }

    /// The annotations to take away before one more is added: all of a crowd, which is mostly of who
    /// is gone. Who is not says it again with its next reading.
    pub(super) fn crowd(&self) -> Vec<String> {
        if self.0.len() < MOST {
            return Vec::new();
        }
        self.names(|_| true)
    }

    /// These are there no more.
    pub(super) fn forget(&mut self, annotations: &[String]) {
        for annotation in annotations {
            self.0.remove(annotation);
        }
    }

    /// The annotations of those that do not know this key, neither as the next nor as the current.
    pub(super) fn unaware_of(&self, kid: &str) -> Vec<String> {
        self.names(|said| said.split(' ').all(|known| known != kid))
    }

    /// The annotations of those that sign with another key than this.
    pub(super) fn signing_without(&self, kid: &str) -> Vec<String> {
        self.names(|said| said.split(' ').next() != Some(kid))
    }

    /// Who has not followed so far.
    pub(super) fn behind(&self, signing: &Ids<String>) -> Behind {
        let unaware = signing.next.as_ref().map(|next| self.unaware_of(next));
        Behind {
            of_next: unaware.map_or(0, |all| all.len()),
            of_current: self.signing_without(&signing.current).len(),
        }
    }

    fn names(&self, which: impl Fn(&str) -> bool) -> Vec<String> {
        let all = self.0.iter().filter(|(_, said)| which(said));
        all.map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(current: &str, next: Option<&str>) -> Ids<String> {
        Ids {
            current: current.to_owned(),
            previous: None,
            next: next.map(ToOwned::to_owned),
        }
    }

    #[test]
    fn each_says_what_it_signs_with_and_what_is_next() {
        let mut readers = Readers::default();
        readers.hear("a".to_owned(), said_of(&ids("old", None)));
        readers.hear("b".to_owned(), said_of(&ids("old", Some("new"))));
        readers.hear("c".to_owned(), said_of(&ids("new", None)));

        assert_eq!(readers.unaware_of("new"), ["a"]);
        assert_eq!(readers.signing_without("new"), ["a", "b"]);
        let behind = readers.behind(&ids("old", Some("new")));
        assert_eq!((behind.of_next, behind.of_current), (1, 1));
        // Nothing is next, so nobody needs to know it.
        assert_eq!(readers.behind(&ids("new", None)).of_next, 0);
        assert_eq!(readers.said_by("b"), Some("old new"));
    }

    #[test]
    fn a_crowd_goes_before_one_more_comes() {
        let mut readers = Readers::default();
        for killed in 1..MOST {
            readers.hear(format!("{PREFIX}{killed}"), "old".to_owned());
            assert!(readers.crowd().is_empty(), "{killed}");
        }
        readers.hear(format!("{PREFIX}last"), "old".to_owned());
        let crowd = readers.crowd();
        assert_eq!(crowd.len(), MOST);
        readers.forget(&crowd);
        assert_eq!(readers, Readers::default());
    }

    #[test]
    fn other_annotations_are_nobodys() {
        let all = [("replica.ambient-code.io/a", "old"), ("reloader/why", "x")];
        let all = all.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let readers = Readers::of(Some(all.into()));
        assert_eq!(
            readers.signing_without("new"),
            ["replica.ambient-code.io/a"]
        );
    }

    #[test]
    fn a_name_that_no_annotation_can_have_is_hashed() {
        let pod = "ambient-control-plane-5d8c7b9f6-x2x7z";
        assert_eq!(annotation_of(pod), format!("{PREFIX}{pod}"));
        let long = "x".repeat(64);
        for odd in ["", "-host", "host.", "my host", "höst", long.as_str()] {
            let name = annotation_of(odd);
            let name = name.strip_prefix(PREFIX).unwrap();
            assert!((1..=MAX_NAME).contains(&name.len()), "{odd}: {name}");
            assert!(name.bytes().all(|it| it.is_ascii_alphanumeric()), "{name}");
            assert_ne!(name, odd);
        }
        assert_ne!(annotation_of("my host"), annotation_of("höst"));
    }
}
