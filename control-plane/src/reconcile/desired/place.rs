//! What sessions may ask for where they run.

use std::collections::BTreeMap;

/// Where sessions run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Place {
    /// Local processes: there are no images, and resources are the machine's.
    #[default]
    Processes,
    /// Pods.
    Pods(PodLimits),
}

/// What sessions may ask for in pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodLimits {
    /// `RUNNER_IMAGE`: the image of sessions that name none; one that names it may.
    pub default_image: Option<String>,
    /// `AGENT_IMAGE_ALLOW`: the images that sessions may name besides, as globs: `*` is any text
    /// without `/`, `**` any text, `?` one character that is not `/`. Images are compared as they
    /// are written: `alpine` is not `hub.example/library/alpine`.
    pub allowed_images: Vec<String>,
    /// The most of each resource that a session may ask for, as Kubernetes quantities. Resources
    /// that are not here cannot be asked for.
    pub max_resources: BTreeMap<String, String>,
}

impl Default for PodLimits {
    /// No image, and at most 8 CPUs and 32 GiB.
    fn default() -> Self {
        let most = [("cpu", "8"), ("memory", "32Gi")];
        Self {
            default_image: None,
            allowed_images: Vec::new(),
            max_resources: most
                .map(|(name, most)| (name.to_owned(), most.to_owned()))
                .into(),
        }
    }
}

impl PodLimits {
    /// Whether a session may name this image.
    pub(super) fn allows(&self, image: &str) -> bool {
        self.default_image.as_deref() == Some(image)
            || self
                .allowed_images
                .iter()
                .any(|glob| matches_glob(glob.trim(), image))
    }
}

/// Whether the text is one that the glob stands for. Takes as many steps as the two are long,
/// multiplied: no glob makes it slow.
fn matches_glob(glob: &str, text: &str) -> bool {
    let text: Vec<char> = text.chars().collect();
    // Whether what was read of the glob so far stands for the first n characters.
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    let mut rest = glob.chars().peekable();
    while let Some(part) = rest.next() {
        let any = part == '*';
        let across = any && rest.next_if_eq(&'*').is_some();
        if any {
            for at in 0..text.len() {
                reached[at + 1] |= reached[at] && (across || text[at] != '/');
            }
            continue;
        }
        for at in (0..text.len()).rev() {
            let fits = match part {
                '?' => text[at] != '/',
                literal => text[at] == literal,
            };
            reached[at + 1] = reached[at] && fits;
        }
        reached[0] = false;
    }
    reached[text.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn globs_stand_for_images() {
        for (glob, image) in [
            (
                "registry.example/team/agent:1",
                "registry.example/team/agent:1",
            ),
            ("registry.example/team/*", "registry.example/team/agent:1"),
            ("registry.example/team/*", "registry.example/team/"),
            (
                "registry.example/**",
                "registry.example/team/sub/agent@sha256:00",
            ),
            (
                "registry.example/*/agent:*",
                "registry.example/team/agent:v1.2",
            ),
            ("*", "alpine"),
            ("**", "registry.example/team/agent"),
            ("***", "registry.example/team/agent"),
            ("agent:v?", "agent:v1"),
            ("a*b*c", "aXbYbZc"),
        ] {
            assert!(matches_glob(glob, image), "{glob} {image}");
        }
    }

    #[test]
    fn globs_stand_for_nothing_more() {
        for (glob, image) in [
            ("registry.example/team/*", "registry.example/team/sub/agent"),
            ("registry.example/team/*", "registry.example/teams/agent"),
            ("*.example.com/agent", "evil.org/x.example.com/agent"),
            (
                "registry.example/team/agent",
                "registry.example/team/agent:1",
            ),
            (
                "registry.example/team/agent",
                "hub.example/registry.example/team/agent",
            ),
            ("registry.example/team", "registry.example/team/agent"),
            ("agent:v?", "agent:v"),
            ("agent?x", "agent/x"),
            ("registry.example/[a-z]", "registry.example/a"),
            ("", "alpine"),
            ("*", "team/alpine"),
        ] {
            assert!(!matches_glob(glob, image), "{glob} {image}");
        }
    }

    #[test]
    fn without_a_list_only_the_operators_own_image_is_allowed() {
        let limits = PodLimits {
            default_image: Some("registry.example/team/runner:1".to_owned()),
            ..PodLimits::default()
        };
        assert!(limits.allows("registry.example/team/runner:1"));
        assert!(!limits.allows("registry.example/team/runner:2"));
        assert!(!PodLimits::default().allows("alpine"));
    }

    proptest! {
        #[test]
        fn a_glob_without_wildcards_stands_for_itself(text in "[a-z0-9./:@-]{0,40}", other in "[a-z0-9./:@-]{0,40}") {
            prop_assert!(matches_glob(&text, &text));
            prop_assert_eq!(matches_glob(&text, &other), text == other);
        }

        #[test]
        fn stars_stand_for_what_was_cut_out(before in "[a-z/]{0,9}", cut in "[a-z/]{0,9}", after in "[a-z/]{0,9}") {
            let text = format!("{before}{cut}{after}");
            let across = format!("{before}**{after}");
            prop_assert!(matches_glob(&across, &text));
            if !cut.contains('/') {
                let within = format!("{before}*{after}");
                prop_assert!(matches_glob(&within, &text));
            }
        }
    }
}
