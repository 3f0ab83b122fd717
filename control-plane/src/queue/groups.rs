//! Whose turn it is: due work of one share of the workers, fair by group.
//!
//! In: due work, each of a group (a session's project). Out: that of the group with the fewest
//! runs under way; of several such groups, of the one that was served longest ago; within a group,
//! the earliest due. So a group without a run waits for at most one run of each other group, however
//! much these have due. A group that comes back is last in the line, so nothing is remembered of
//! groups that have no work.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::Turn;

/// What work is fair by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Group(Arc<str>);

impl Group {
    /// The group of this name.
    pub(crate) fn of(name: &str) -> Self {
        Self(Arc::from(name))
    }

    /// That of all work whose group is not known.
    pub(crate) fn none() -> Self {
        Self::of("")
    }
}

/// Due work by group.
#[derive(Debug)]
pub(super) struct Groups<W> {
    lines: HashMap<Group, Line<W>>,
    /// The groups that have due work.
    order: BTreeMap<Rank, Group>,
    moments: u64,
}

/// A group that has due work, or runs.
#[derive(Debug)]
struct Line<W> {
    due: BTreeMap<Turn, W>,
    rank: Rank,
}

/// The lowest is first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    running: usize,
    /// When it was served last, or joined the line: no two groups have the same.
    since: u64,
}

impl<W> Default for Groups<W> {
    fn default() -> Self {
        Self {
            lines: HashMap::new(),
            order: BTreeMap::new(),
            moments: 0,
        }
    }
}

impl<W> Groups<W> {
    /// Adds work that is due.
    pub(super) fn add(&mut self, group: &Group, turn: Turn, work: W) {
        let line = Self::line(&mut self.lines, &mut self.moments, group);
        if line.due.is_empty() {
            self.order.insert(line.rank, group.clone());
        }
        line.due.insert(turn, work);
    }

    /// Takes out the work whose turn it is, of groups with fewer runs than `most`.
    pub(super) fn pop(&mut self, most: usize) -> Option<(Group, Turn, W)> {
        let (rank, group) = self.order.first_key_value()?;
        if rank.running >= most {
            return None;
        }
        let (rank, group) = (*rank, group.clone());
        let line = self.lines.get_mut(&group)?;
        let (turn, work) = line.due.pop_first()?;
        if line.due.is_empty() {
            self.order.remove(&rank);
            if rank.running == 0 {
                self.lines.remove(&group);
            }
        }
        Some((group, turn, work))
    }

    /// A run of this group begins.
    pub(super) fn begin(&mut self, group: &Group) {
        self.moments += 1;
        let since = self.moments;
        self.rerank(group, |rank| Rank {
            running: rank.running + 1,
            since,
        });
    }

    /// A run of this group has ended.
    pub(super) fn end(&mut self, group: &Group) {
        self.rerank(group, |rank| Rank {
            running: rank.running.saturating_sub(1),
            ..rank
        });
    }

    /// Forgets all due work.
    pub(super) fn clear(&mut self) {
        self.order.clear();
        self.lines.retain(|_, line| {
            line.due.clear();
            line.rank.running > 0
        });
    }

    fn rerank(&mut self, group: &Group, change: impl FnOnce(Rank) -> Rank) {
        let line = Self::line(&mut self.lines, &mut self.moments, group);
        let before = line.rank;
        line.rank = change(before);
        if self.order.remove(&before).is_some() {
            self.order.insert(line.rank, group.clone());
        } else if line.rank.running == 0 {
            self.lines.remove(group);
        }
    }

    fn line<'a>(
        groups: &'a mut HashMap<Group, Line<W>>,
        moments: &mut u64,
        group: &Group,
    ) -> &'a mut Line<W> {
        groups.entry(group.clone()).or_insert_with(|| {
            *moments += 1;
            Line {
                due: BTreeMap::new(),
                rank: Rank {
                    running: 0,
                    since: *moments,
                },
            }
        })
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.order.is_empty()
    }
}
