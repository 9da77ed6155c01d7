//! Fault and replay: runs a kernel until all of its invocations have finished, and services what they miss in between.
//!
//! Why it ends is told in `Documentation/svm.md`. In short: a round in which something finishes is progress. One in which nothing
//! does, and in which something is missed that was brought in since the last progress, shows that what runs together does not fit
//! together: then less runs together, down to one invocation; and one alone is tried so many times only.

use std::collections::{HashMap, HashSet};

use super::stats::DispatchStats;
use crate::range::PAGE_BYTES;
use crate::Error;

/// How often an invocation that runs alone may miss what it missed before.
const PATIENCE: u32 = 64;

/// How often a page may be missed that was brought in just before, until kernels use a copy of it.
const BOUNCES: u32 = 3;

/// What a kernel missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Miss {
    /// The address.
    pub addr: usize,
    /// Whether it is to be written to.
    pub write: bool,
    /// Whether the table has the page, but in system memory.
    pub system: bool,
}

/// What runs in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Batch<'a> {
    pub(crate) groups: Groups<'a>,
    /// Which invocations of each group: the first, and how many.
    pub(crate) lanes: (u32, u32),
    /// Whether what was asked for before is reported again.
    pub(crate) loud: bool,
}

/// Groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Groups<'a> {
    /// So many from the first one on, none of which ran before.
    Fresh(u32, u32),
    /// These, of which runs what has not finished.
    Again(&'a [u32]),
}

/// What became of a round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Whether any invocation missed anything.
    pub(crate) missed: bool,
    /// Whether one that did has got on, and kept how far.
    pub(crate) advanced: bool,
    /// What was reported; `reported` may be more than there was room for.
    pub(crate) misses: Vec<Miss>,
    pub(crate) reported: u64,
}

/// The invocations of a group that have not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) group: u32,
    pub(crate) count: u32,
    /// The first of them.
    pub(crate) lane: u32,
}

/// What runs kernels, and services what they miss.
pub(crate) trait Machine {
    /// Runs a batch.
    fn run(&mut self, batch: Batch<'_>) -> Result<Outcome, Error>;

    /// What is left of a group that ran.
    fn left(&mut self, group: u32) -> Left;

    /// Brings in what was missed, each page of which is named once. Returns how many bytes moved.
    fn service(&mut self, misses: &[Miss]) -> Result<u64, Error>;

    /// Has the page of an address used by a copy from now on, because it does not stay where it is brought. False if that cannot be.
    fn use_a_copy(&mut self, addr: usize) -> Result<bool, Error>;

    /// How many pages have ever had a copy.
    fn copied(&self) -> usize;

    /// How many pages can be brought in for a round.
    fn room(&self) -> usize;

    /// The error of an invocation that does not get on.
    fn stuck(&self, addr: usize) -> Error;
}

/// Runs `groups` groups of `group` invocations, at most `limit` of them at a time.
pub(crate) fn replay(
    machine: &mut impl Machine,
    groups: u32,
    group: u32,
    limit: u32,
    stats: &mut DispatchStats,
    mut progress: impl FnMut(&DispatchStats),
) -> Result<(), Error> {
    let limit = limit.max(1);
    let mut fresh = 0;
    let mut again: Vec<Left> = Vec::new();
    let (mut batch, mut lanes, mut loud) = (limit, group, false);
    // What was brought in since something finished.
    let mut brought: HashSet<(usize, bool)> = HashSet::new();
    let (mut tries, mut copied) = (0, 0);
    let mut list = Vec::new();
    let mut bounces = Bounces::default();

    while fresh < groups || !again.is_empty() {
        // Invocations that were to run, and those of them that have to run again.
        let (count, ran, still);
        let outcome = if again.is_empty() {
            count = batch.min(groups - fresh);
            ran = u64::from(count) * u64::from(group);
            let outcome = machine.run(Batch {
                groups: Groups::Fresh(fresh, count),
                lanes: (0, group),
                loud,
            })?;
            if outcome.missed {
                again.extend((fresh..fresh + count).map(|group| machine.left(group)));
            }
            fresh += count;
            still = invocations(&again);
            outcome
        } else {
            // What has missed goes first: its pages are there.
            count = batch.min(u32::try_from(again.len()).unwrap_or(u32::MAX));
            let front = &mut again[..count as usize];
            // Less than a group only where one runs alone.
            let window = match front {
                [one] if lanes < group => (one.lane, lanes.min(group - one.lane)),
                _ => (0, group),
            };
            list.clear();
            list.extend(front.iter().map(|left| left.group));
            ran = invocations(front);
            let outcome = machine.run(Batch {
                groups: Groups::Again(&list),
                lanes: window,
                loud,
            })?;
            for left in &mut *front {
                *left = machine.left(left.group);
            }
            still = invocations(front);
            outcome
        };
        again.retain(|left| left.count > 0);
        stats.rounds += 1;
        stats.faults += outcome.reported;
        stats.smallest_batch = stats.smallest_batch.min(count);
        tracing::debug!(count, ran, still, faults = outcome.reported, "a round");

        if !outcome.missed {
            if lanes < group {
                lanes = lanes.saturating_mul(2).min(group);
            } else {
                batch = batch.saturating_mul(2).min(limit);
            }
            brought.clear();
            (tries, loud) = (0, false);
            progress(stats);
            continue;
        }

        let mut misses = outcome.misses;
        let lost = |miss: &Miss| brought.contains(&(page(miss), miss.write));
        // Another page has a copy: there are only so many, and room has nothing to do with it.
        let before = std::mem::replace(&mut copied, machine.copied());
        if outcome.advanced || still < ran || copied > before {
            brought.clear();
            tries = 0;
        } else if misses.iter().any(lost) {
            brought.clear();
            if count > 1 {
                batch = count / 2;
            } else if lanes > 1 {
                (batch, lanes) = (1, lanes.div_ceil(2));
            } else {
                tries += 1;
                if tries > PATIENCE {
                    return Err(machine.stuck(misses.first().map_or(0, |miss| miss.addr)));
                }
            }
        }
        if misses.is_empty() {
            if loud {
                return Err(machine.stuck(0));
            }
            // All that is missed was asked for before, and was not brought in, or is gone again.
            loud = true;
            continue;
        }
        loud = outcome.reported > misses.len() as u64;
        loud |= limit_to(&mut misses, machine.room());
        let mut stays = Vec::with_capacity(misses.len());
        for miss in misses {
            if !bounces.too_many(&miss) || !machine.use_a_copy(miss.addr)? {
                stays.push(miss);
            }
        }
        let misses = stays;
        if misses.is_empty() {
            continue;
        }
        stats.bytes_in += machine.service(&misses)?;
        bounces.brought(&misses);
        stats.serviced_pages += misses.len() as u64;
        brought.extend(misses.iter().map(|miss| (page(miss), miss.write)));
        progress(stats);
    }
    Ok(())
}

/// Pages that are missed in the round for which they were brought in. No room is too small for that: whatever was brought in with them
/// had room too. Something has touched them in between.
#[derive(Default)]
struct Bounces {
    /// What was brought in last, and whether to be written to.
    last: HashMap<usize, bool>,
    times: HashMap<usize, u32>,
}

impl Bounces {
    /// Counts a miss.
    fn too_many(&mut self, miss: &Miss) -> bool {
        let before = self.last.get(&page(miss));
        if !before.is_some_and(|&write| write || !miss.write) {
            return false;
        }
        let times = self.times.entry(page(miss)).or_default();
        *times += 1;
        *times >= BOUNCES
    }

    fn brought(&mut self, misses: &[Miss]) {
        self.last.clear();
        self.last
            .extend(misses.iter().map(|miss| (page(miss), miss.write)));
    }
}

fn invocations(left: &[Left]) -> u64 {
    left.iter().map(|left| u64::from(left.count)).sum()
}

fn page(miss: &Miss) -> usize {
    miss.addr / PAGE_BYTES
}

/// Names each page once, for all that is wanted of it, and no more pages than there is room for: those that were missed first.
/// Returns whether any was left out.
fn limit_to(misses: &mut Vec<Miss>, room: usize) -> bool {
    let mut seen: HashMap<usize, usize> = HashMap::new();
    let mut kept: Vec<Miss> = Vec::new();
    let mut left_out = false;
    for miss in misses.iter() {
        match seen.get(&page(miss)) {
            Some(&at) => {
                kept[at].write |= miss.write;
                kept[at].system |= miss.system;
            }
            None if kept.len() < room.max(1) => {
                seen.insert(page(miss), kept.len());
                kept.push(*miss);
            }
            None => left_out = true,
        }
    }
    *misses = kept;
    left_out
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;
    use crate::{Strategy, SvmError};

    const GROUP: u32 = 4;

    /// A pool of few pages, from which the one goes that came first. An invocation reads its pages one after the other, or all at once.
    struct Model {
        needs: Vec<Vec<usize>>,
        chained: bool,
        pool: VecDeque<usize>,
        pages: usize,
        /// Reports that there is room for.
        capacity: usize,
        marked: HashSet<usize>,
        missed: Vec<bool>,
        committed: Vec<u32>,
        /// A page that goes after each service: somebody touches it.
        taken_away: Option<usize>,
        /// Whether there can be copies, and of what there is one.
        copies: bool,
        copied: HashSet<usize>,
    }

    impl Model {
        fn new(needs: Vec<Vec<usize>>, pages: usize, capacity: usize, chained: bool) -> Self {
            Self {
                missed: vec![false; needs.len()],
                committed: vec![0; needs.len()],
                needs,
                chained,
                pool: VecDeque::new(),
                pages,
                capacity,
                marked: HashSet::new(),
                taken_away: None,
                copies: true,
                copied: HashSet::new(),
            }
        }

        fn replay(&mut self) -> (Result<(), Error>, DispatchStats) {
            let mut stats = DispatchStats::new(Strategy::Translated);
            let groups = u32::try_from(self.needs.len()).unwrap() / GROUP;
            let result = replay(self, groups, GROUP, 1 << 16, &mut stats, |_| {});
            (result, stats)
        }
    }

    impl Machine for Model {
        fn run(&mut self, batch: Batch<'_>) -> Result<Outcome, Error> {
            let (groups, again): (Vec<u32>, _) = match batch.groups {
                Groups::Fresh(first, count) => ((first..first + count).collect(), false),
                Groups::Again(list) => (list.to_vec(), true),
            };
            let mut outcome = Outcome::default();
            for group in groups {
                for lane in batch.lanes.0..batch.lanes.0 + batch.lanes.1 {
                    let at = (group * GROUP + lane) as usize;
                    if again && !self.missed[at] {
                        continue;
                    }
                    assert_eq!(
                        self.committed[at], 0,
                        "invocation {at} runs again after it committed"
                    );
                    self.missed[at] = false;
                    for &page in &self.needs[at] {
                        if self.pool.contains(&page) || self.copied.contains(&page) {
                            continue;
                        }
                        self.missed[at] = true;
                        outcome.missed = true;
                        if batch.loud || !self.marked.contains(&page) {
                            outcome.reported += 1;
                            if outcome.misses.len() < self.capacity {
                                self.marked.insert(page);
                                outcome.misses.push(Miss {
                                    addr: page * PAGE_BYTES,
                                    write: false,
                                    system: false,
                                });
                            }
                        }
                        if self.chained {
                            break;
                        }
                    }
                    self.committed[at] += u32::from(!self.missed[at]);
                }
            }
            Ok(outcome)
        }

        fn left(&mut self, group: u32) -> Left {
            let first = (group * GROUP) as usize;
            let of = &self.missed[first..first + GROUP as usize];
            let count = of.iter().filter(|&&missed| missed).count();
            let lane = of.iter().position(|&missed| missed).unwrap_or(0);
            Left {
                group,
                count: u32::try_from(count).unwrap(),
                lane: u32::try_from(lane).unwrap(),
            }
        }

        fn service(&mut self, misses: &[Miss]) -> Result<u64, Error> {
            assert!(misses.len() <= self.room());
            for miss in misses {
                if !self.pool.contains(&page(miss)) {
                    self.pool.push_back(page(miss));
                    self.marked.remove(&page(miss));
                }
                if self.pool.len() > self.pages {
                    self.pool.pop_front();
                }
            }
            self.pool.retain(|&page| self.taken_away != Some(page));
            Ok(0)
        }

        fn use_a_copy(&mut self, addr: usize) -> Result<bool, Error> {
            let new = self.copies && self.copied.insert(addr / PAGE_BYTES);
            assert!(new || !self.copies, "what has a copy is missed");
            Ok(new)
        }

        fn copied(&self) -> usize {
            self.copied.len()
        }

        fn room(&self) -> usize {
            self.pages
        }

        fn stuck(&self, addr: usize) -> Error {
            SvmError::Stuck {
                kernel: String::new(),
                addr,
                pages: self.pages,
            }
            .into()
        }
    }

    #[test]
    fn what_is_there_runs_once() {
        let mut model = Model::new(vec![vec![]; 64], 1, 1, false);
        let (result, stats) = model.replay();
        result.unwrap();
        assert_eq!(
            (stats.rounds, stats.faults, stats.smallest_batch),
            (1, 0, 16)
        );
        assert!(model.committed.iter().all(|&n| n == 1));
    }

    #[test]
    fn what_does_not_fit_together_runs_by_less_and_less() {
        // Each needs three pages of its own, at once, and there are three.
        let needs = (0..32).map(|i| vec![3 * i, 3 * i + 1, 3 * i + 2]).collect();
        let mut model = Model::new(needs, 3, 1000, true);
        let (result, stats) = model.replay();
        result.unwrap();
        assert_eq!(stats.smallest_batch, 1);
        assert!(model.committed.iter().all(|&n| n == 1));
    }

    #[test]
    fn what_can_never_fit_is_an_error() {
        for chained in [false, true] {
            let mut needs = vec![vec![]; 32];
            needs[17] = (0..5).collect();
            let mut model = Model::new(needs, 4, 1000, chained);
            let error = model.replay().0.unwrap_err();
            assert!(
                matches!(error, Error::Svm(SvmError::Stuck { pages: 4, .. })),
                "{error}"
            );
            assert_eq!(model.committed[17], 0);
            assert!(model.copied.is_empty());
        }
    }

    #[test]
    fn what_is_always_taken_away_is_used_by_a_copy_or_an_error() {
        for (copies, chained) in [(true, false), (true, true), (false, false)] {
            let mut model = Model::new(vec![vec![0, 1, 2]; 8], 4, 1000, chained);
            (model.taken_away, model.copies) = (Some(1), copies);
            assert_eq!(model.replay().0.is_ok(), copies);
            assert_eq!(model.copied.len(), usize::from(copies));
            assert!(model.committed.iter().all(|&n| n == u32::from(copies)));
        }
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches an invocation that is lost or runs twice, and a replay without an end.
        #[test]
        fn every_invocation_commits_once(
            mut needs in prop::collection::vec(prop::collection::btree_set(0_usize..60, 0..5), 1..80),
            pages in 5_usize..40,
            capacity in 1_usize..100,
            chained in any::<bool>(),
        ) {
            needs.resize(needs.len().next_multiple_of(GROUP as usize), Default::default());
            let needs = needs.into_iter().map(|set| set.into_iter().collect()).collect();
            let mut model = Model::new(needs, pages, capacity, chained);
            model.replay().0.unwrap();
            prop_assert!(model.committed.iter().all(|&n| n == 1));
        }
    }
}
