//! `driver/radix.rs`: a device page table in two copies, the driver's and the device's.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use proptest::prelude::*;
use proptest::sample::Index;

use crate::alloc::GFP_KERNEL;
use crate::config;
use crate::prelude::{Error, Result, EINVAL, ENOMEM, ENOSPC};
use crate::radix::{levels, walk, Home, Node, Retired, Spare, Tree, Walked, FANOUT};
use crate::stand_in::fail_allocation;
use crate::uapi::{
    HMM_GPU_PTE_OFFSET_MASK, HMM_GPU_PTE_REQUESTED, HMM_GPU_PTE_SYSTEM, HMM_GPU_PTE_VALID,
    HMM_GPU_PTE_WRITABLE,
};

const PAGE: usize = 4096;

/// The memory of a device, of which pages are given to nodes.
#[derive(Default)]
struct Vram {
    /// Words of the pages that nodes have now, as far as they are not zero.
    pages: RefCell<BTreeMap<u64, BTreeMap<usize, u64>>>,
    /// Pages that have words which the device may see later than what is written next.
    unfenced: RefCell<BTreeSet<u64>>,
    /// Where the device begins to walk, and how many levels it walks.
    root: Cell<Option<(u64, u32)>>,
}

/// Offsets of nodes are above those that the tests give to pages, so that one is never taken for the other.
const FIRST_HOME: u64 = 1 << 40;

impl Vram {
    fn home(self: &Rc<Self>) -> VramHome {
        let mut pages = self.pages.borrow_mut();
        // The lowest that is free: what was given back is used again soon.
        let offset = (FIRST_HOME..)
            .step_by(PAGE)
            .find(|offset| !pages.contains_key(offset))
            .unwrap();
        pages.insert(offset, BTreeMap::new());
        // It has just been filled with zeroes.
        self.unfenced.borrow_mut().insert(offset);
        VramHome {
            vram: Rc::clone(self),
            offset,
        }
    }

    /// Nodes that have a home now.
    fn homes(&self) -> usize {
        self.pages.borrow().len()
    }

    fn read(&self, offset: u64) -> Result<u64> {
        let (page, slot) = (offset & HMM_GPU_PTE_OFFSET_MASK, offset as usize % PAGE / 8);
        let pages = self.pages.borrow();
        let words = pages.get(&page).unwrap_or_else(|| {
            panic!("the device reads {offset:#x}, which was given back");
        });
        Ok(words.get(&slot).copied().unwrap_or(0))
    }

    fn walk(&self, addr: usize) -> Walked {
        match self.root.get() {
            Some((root, levels)) => walk(root, levels, addr, |offset| self.read(offset)).unwrap(),
            None => Walked::NoNode,
        }
    }

    /// Every node that the device can come to from the one at `offset`.
    fn reachable(&self, offset: u64, level: u32, found: &mut BTreeSet<u64>) {
        let pages = self.pages.borrow();
        let words = pages.get(&offset).unwrap_or_else(|| {
            panic!("the device comes to {offset:#x}, which was given back");
        });
        assert!(found.insert(offset), "two entries lead to {offset:#x}");
        for word in words.values().filter(|_| level > 0) {
            if word & HMM_GPU_PTE_VALID != 0 {
                self.reachable(word & HMM_GPU_PTE_OFFSET_MASK, level - 1, found);
            }
        }
    }

    /// Asserts that what the device can come to from now on is complete.
    fn assert_fenced<'a>(&self, nodes: impl IntoIterator<Item = &'a u64>) {
        let unfenced = self.unfenced.borrow();
        for node in nodes {
            assert!(
                !unfenced.contains(node),
                "the device can see {node:#x} before what is in it"
            );
        }
    }

    fn all_reachable(&self) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        if let Some((root, levels)) = self.root.get() {
            self.reachable(root, levels - 1, &mut found);
        }
        found
    }
}

/// A page of it.
struct VramHome {
    vram: Rc<Vram>,
    offset: u64,
}

impl Home for VramHome {
    type Store = Vram;

    fn offset(&self) -> u64 {
        self.offset
    }

    fn write(&self, store: &Vram, slot: usize, word: u64) {
        assert!(slot < FANOUT);
        let leads_on = word & HMM_GPU_PTE_VALID != 0 && word >= FIRST_HOME;
        let before = leads_on.then(|| store.all_reachable());
        {
            let mut pages = store.pages.borrow_mut();
            pages.get_mut(&self.offset).unwrap().insert(slot, word);
        }
        if let Some(before) = before {
            store.assert_fenced(store.all_reachable().difference(&before));
        }
        store.unfenced.borrow_mut().insert(self.offset);
    }

    fn fence(store: &Vram) {
        store.unfenced.borrow_mut().clear();
    }
}

impl Drop for VramHome {
    fn drop(&mut self) {
        self.vram.pages.borrow_mut().remove(&self.offset);
    }
}

/// A page of the process: its number at each level, the lowest first.
fn addr_of(slots: [usize; 5]) -> usize {
    let page = slots
        .iter()
        .rev()
        .fold(0, |page, slot| page * FANOUT + slot);
    page * PAGE
}

/// Addresses that have some nodes in common, and lie at the edges of others.
///
/// Boxed, as the others here: what proptest makes of nested choices is too much for the stack of a test otherwise.
fn addr() -> BoxedStrategy<usize> {
    let slot =
        prop_oneof![8 => Just(0usize), 4 => Just(1), 4 => Just(FANOUT - 1), 1 => 0..FANOUT].boxed();
    let slots = [(); 5].map(|()| slot.clone());
    slots.prop_map(addr_of).boxed()
}

#[derive(Clone, Debug)]
enum Step {
    /// Sets an entry, and makes the way to it, with so many nodes too many.
    Set(usize, u64, u32),
    /// Sets an entry if there is a way to it.
    Try(usize, u64),
    /// Sets it once more.
    Again(Index, u64),
    Request(usize),
    Clear(Part),
    Prune(Part),
    /// Takes out an empty way, to anywhere or to where something was.
    Trim(usize),
    TrimAt(Index),
    /// Takes out all nodes that are empty, if there are so many too many.
    Compact(usize),
    /// Drops what was taken out: the device does not walk it any more.
    Drop,
}

/// A part of the address space.
#[derive(Clone, Debug)]
enum Part {
    Pages(usize, usize),
    /// A node's worth around something.
    Around(Index, u32),
    /// Some pages from where something is.
    From(Index, usize),
}

fn part(addr: BoxedStrategy<usize>) -> BoxedStrategy<Part> {
    let addr = || addr.clone();
    prop_oneof![
        1 => (addr(), addr()).prop_map(|(one, other)| Part::Pages(one.min(other), one.max(other))),
        1 => (addr(), 0..3 * FANOUT).prop_map(|(addr, pages)| Part::Pages(addr, addr.saturating_add(pages * PAGE))),
        2 => (any::<Index>(), 0u32..5).prop_map(|(nth, level)| Part::Around(nth, level)),
        2 => (any::<Index>(), 1usize..4).prop_map(|(nth, pages)| Part::From(nth, pages)),
    ]
    .boxed()
}

/// Steps on a tree that has a place for addresses below `end`; a few are beyond.
fn step(end: usize) -> BoxedStrategy<Step> {
    let entry = || 1..u64::MAX;
    let addr = prop_oneof![9 => addr().prop_map(move |addr| addr % end), 1 => addr()].boxed();
    let addr = || addr.clone();
    prop_oneof![
        6 => (addr(), entry(), 0u32..3).prop_map(|(addr, entry, more)| Step::Set(addr, entry, more)),
        1 => (addr(), entry()).prop_map(|(addr, entry)| Step::Try(addr, entry)),
        1 => (any::<Index>(), entry()).prop_map(|(nth, entry)| Step::Again(nth, entry)),
        1 => addr().prop_map(Step::Request),
        3 => part(addr()).prop_map(Step::Clear),
        2 => part(addr()).prop_map(Step::Prune),
        1 => addr().prop_map(Step::Trim),
        1 => any::<Index>().prop_map(Step::TrimAt),
        1 => (0usize..12).prop_map(Step::Compact),
        1 => Just(Step::Drop),
    ]
    .boxed()
}

/// The word that the device gets for an entry: of a page in VRAM below all nodes, or elsewhere.
fn word_of(entry: u64) -> u64 {
    let flags = match entry % 3 {
        0 => HMM_GPU_PTE_SYSTEM,
        _ => (entry << 12) & (FIRST_HOME - 1) & HMM_GPU_PTE_OFFSET_MASK,
    };
    flags | entry & HMM_GPU_PTE_WRITABLE | HMM_GPU_PTE_VALID
}

/// The tree, the device, and what the entries and the nodes should be.
struct Tried {
    tree: Tree<VramHome>,
    vram: Rc<Vram>,
    entries: BTreeMap<usize, u64>,
    /// The nodes of the tree, each by its level and the first address that it stands for.
    nodes: BTreeSet<(u32, usize)>,
    /// What was taken out, and may still be walked.
    retired: Vec<Retired<VramHome>>,
    requested: BTreeSet<usize>,
    /// Every address that was ever named.
    named: BTreeSet<usize>,
    /// Addresses that the tree has a place for.
    end: usize,
}

impl Tried {
    /// For addresses below `end`.
    fn new(end: usize) -> Self {
        let tree = Tree::new(end);
        Self {
            end: 1 << (12 + 9 * tree.levels()),
            tree,
            vram: Rc::default(),
            entries: BTreeMap::new(),
            nodes: BTreeSet::new(),
            retired: vec![],
            requested: BTreeSet::new(),
            named: BTreeSet::new(),
        }
    }

    /// As the driver does: makes what is missing, then grows, then sets.
    fn set(&mut self, addr: usize, entry: u64, more: u32) {
        self.named.insert(addr);
        let missing = self.tree.missing(addr);
        let count = (missing + more).min(self.tree.levels());
        let homes = self.vram.homes();
        let mut spare = Spare::new(count, GFP_KERNEL, || Ok(self.vram.home())).unwrap();
        assert_eq!(self.vram.homes(), homes + count as usize);
        let grown = self.grow(addr, &mut spare);
        drop(spare);
        if addr >= self.end {
            assert_eq!(grown, Err(EINVAL));
            assert_eq!(self.vram.homes(), homes);
        } else {
            assert_eq!(grown, Ok(()));
            assert_eq!(
                self.vram.homes(),
                homes + missing as usize,
                "what is spare goes"
            );
            assert_eq!(self.tree.missing(addr), 0);
            let levels = 0..self.tree.levels();
            self.nodes.extend(levels.map(|level| node_of(level, addr)));
        }
        self.try_set(addr, entry);
    }

    fn grow(&mut self, addr: usize, spare: &mut Spare<VramHome>) -> Result {
        let grown = self.tree.grow(addr, spare, &self.vram);
        let root = self.tree.root().map(|root| (root, self.tree.levels()));
        if self.vram.root.replace(root).is_none() {
            self.vram.assert_fenced(&self.vram.all_reachable());
        }
        grown
    }

    fn try_set(&mut self, addr: usize, entry: u64) {
        self.named.insert(addr);
        let can = addr < self.end && self.tree.missing(addr) == 0;
        let set = self.tree.set(addr, entry, word_of(entry), &self.vram);
        assert_eq!(set, if can { Ok(()) } else { Err(EINVAL) });
        if can {
            self.entries.insert(addr, entry);
            assert_eq!(self.vram.walk(addr), Walked::Entry(word_of(entry)));
        }
    }

    fn request(&mut self, addr: usize) {
        self.named.insert(addr);
        self.tree.request(addr, &self.vram);
        if addr < self.end && self.tree.missing(addr) == 0 && !self.entries.contains_key(&addr) {
            self.requested.insert(addr);
            assert_eq!(self.vram.walk(addr), Walked::Entry(HMM_GPU_PTE_REQUESTED));
        }
    }

    fn pages(&self, part: &Part) -> Option<(usize, usize)> {
        let nth = |nth: &Index| {
            let nth = nth.index(self.entries.len().max(1));
            self.entries.keys().nth(nth).copied()
        };
        match part {
            Part::Pages(start, end) => Some((*start, *end)),
            Part::Around(which, level) => nth(which).map(|addr| {
                let (_, first) = node_of(*level, addr);
                (first, first + node_span(*level))
            }),
            Part::From(which, pages) => nth(which).map(|addr| (addr, addr + pages * PAGE)),
        }
    }

    /// Takes the entries out of the model and says how many there were.
    fn forget(&mut self, start: usize, end: usize) -> usize {
        let before = self.entries.len();
        self.entries.retain(|addr, _| !(start..end).contains(addr));
        before - self.entries.len()
    }

    fn clear(&mut self, start: usize, end: usize) {
        let expected = self.forget(start, end);
        let cleared = self.tree.clear(start, end, Some(&self.vram));
        assert_eq!(cleared, expected);
    }

    /// Takes the nodes that overlap the range and that nothing hangs on out of the model, and says how many.
    fn take_empty(&mut self, start: usize, end: usize) -> usize {
        let before = self.nodes.len();
        for level in 0..self.tree.levels() - 1 {
            let nodes = self.nodes.clone();
            self.nodes.retain(|&(at, first)| {
                let last = first + (node_span(at) - 1);
                at != level
                    || last < start
                    || end <= first
                    || match level {
                        0 => self.entries.range(first..=last).next().is_some(),
                        _ => nodes
                            .range((level - 1, first)..=(level - 1, last))
                            .next()
                            .is_some(),
                    }
            });
        }
        before - self.nodes.len()
    }

    /// Keeps what was taken out, which the device may be walking still: it finds nothing there that is valid.
    fn keep(&mut self, retired: Retired<VramHome>, expected: usize) {
        assert_eq!(retired.count(), expected);
        self.retired.push(retired);
        let reachable = self.vram.all_reachable();
        for (node, words) in &*self.vram.pages.borrow() {
            let valid = words.values().any(|word| word & HMM_GPU_PTE_VALID != 0);
            assert!(
                reachable.contains(node) || !valid,
                "{node:#x} was taken out with something in it"
            );
        }
    }

    fn prune(&mut self, start: usize, end: usize) {
        let expected = self.forget(start, end);
        let nodes = match start < end {
            true => self.take_empty(start, end),
            false => 0,
        };
        let (cleared, retired) = self.tree.prune(start, end, Some(&self.vram));
        assert_eq!(cleared, expected);
        self.keep(retired, nodes);
    }

    fn trim(&mut self, addr: usize) {
        let (_, first) = node_of(0, addr);
        let there = self.nodes.contains(&(0, first));
        let used = self
            .entries
            .range(first..first + node_span(0))
            .next()
            .is_some();
        let nodes = match there && !used {
            true => self.take_empty(addr, addr + PAGE),
            false => 0,
        };
        let retired = self.tree.trim(addr, &self.vram);
        self.keep(retired, nodes);
    }

    fn compact(&mut self, limit: usize) {
        let accounted_for = self.entries.len() * self.tree.levels() as usize;
        let nodes = match self.nodes.len() > accounted_for + limit {
            true => self.take_empty(0, usize::MAX),
            false => 0,
        };
        let retired = self.tree.compact(limit, &self.vram);
        self.keep(retired, nodes);
    }

    fn drop_retired(&mut self) {
        let homes = self.vram.homes();
        let count: usize = self.retired.iter().map(Retired::count).sum();
        self.retired.clear();
        assert_eq!(self.vram.homes(), homes - count);
        // Walks over what was given back would panic.
        self.vram.all_reachable();
    }

    /// Compares all that can be seen from outside with what it should be.
    fn check(&self) {
        let tree = &self.tree;
        assert_eq!(tree.entries(), self.entries.len());
        assert_eq!(tree.nodes(), self.nodes.len());
        let retired: usize = self.retired.iter().map(Retired::count).sum();
        assert_eq!(
            tree.nodes() + retired,
            self.vram.homes(),
            "a node is lost, or counted twice"
        );
        for &addr in &self.named {
            let there =
                (0..tree.levels()).filter(|&level| self.nodes.contains(&node_of(level, addr)));
            if addr < self.end {
                assert_eq!(
                    tree.missing(addr) as usize,
                    tree.levels() as usize - there.count(),
                    "nodes on the way to {addr:#x}"
                );
            }
            let entry = self.entries.get(&addr).copied();
            assert_eq!(
                tree.get(addr),
                entry.unwrap_or(0),
                "the driver's copy at {addr:#x}"
            );
            if addr >= self.end {
                continue;
            }
            match (self.vram.walk(addr), entry) {
                (Walked::Entry(word), Some(entry)) => assert_eq!(word, word_of(entry)),
                (Walked::Entry(HMM_GPU_PTE_REQUESTED), None) => {
                    assert!(
                        self.requested.contains(&addr),
                        "{addr:#x} was never requested"
                    );
                }
                (Walked::Entry(word), None) => assert_eq!(word, 0, "{addr:#x} is not set"),
                (Walked::NoNode, None) => assert_ne!(tree.missing(addr), 0),
                (Walked::NoNode, Some(_)) => panic!("the device has no node for {addr:#x}"),
            }
        }
        // What is not named has no entry either.
        let mut valid = 0;
        let reachable = self.vram.all_reachable();
        if let Some((root, levels)) = self.vram.root.get() {
            self.count_valid(root, levels - 1, &mut valid);
        }
        assert_eq!(valid, self.entries.len());
        assert_eq!(
            reachable.len(),
            tree.nodes(),
            "a node that nothing leads to is left"
        );
    }

    fn count_valid(&self, node: u64, level: u32, valid: &mut usize) {
        let words = self.vram.pages.borrow()[&node].clone();
        for word in words.into_values() {
            if word & HMM_GPU_PTE_VALID != 0 && level == 0 {
                *valid += 1;
            } else if word & HMM_GPU_PTE_VALID != 0 {
                self.count_valid(word & HMM_GPU_PTE_OFFSET_MASK, level - 1, valid);
            }
        }
    }
}

/// Bytes of address space that a node at `level` stands for.
fn node_span(level: u32) -> usize {
    PAGE << (9 * (level + 1))
}

/// The node at `level` that stands for `addr`: its level, and the first address that it stands for.
fn node_of(level: u32, addr: usize) -> (u32, usize) {
    (level, addr & !(node_span(level) - 1))
}

/// The ends of address spaces that have 1 to 5 levels.
fn ends() -> impl Strategy<Value = usize> {
    prop_oneof![
        4 => Just(1usize << 47),
        2 => Just(1usize << 56),
        1 => Just(1usize << 21),
        1 => Just((1usize << 21) + 1),
        1 => Just(1usize << 39),
    ]
}

proptest! {
    #![proptest_config(config())]

    /// Catches an entry that one copy has and the other has not, a node that is lost or that the device comes to after it was
    /// given back, and a node that the device can see before what is in it.
    #[test]
    fn both_copies_are_what_a_map_would_be(
        (end, steps) in ends().prop_flat_map(|end| {
            (Just(end), prop::collection::vec(step(Tried::new(end).end), 1..80))
        }),
    ) {
        let mut tried = Tried::new(end);
        for step in steps {
            match step {
                Step::Set(addr, entry, more) => tried.set(addr, entry, more),
                Step::Try(addr, entry) => tried.try_set(addr, entry),
                Step::Again(nth, entry) => {
                    if let Some((addr, _)) = tried.pages(&Part::From(nth, 1)) {
                        tried.try_set(addr, entry);
                    }
                }
                Step::Request(addr) => tried.request(addr),
                Step::Clear(part) => {
                    if let Some((start, end)) = tried.pages(&part) {
                        tried.clear(start, end);
                    }
                }
                Step::Prune(part) => {
                    if let Some((start, end)) = tried.pages(&part) {
                        tried.prune(start, end);
                    }
                }
                Step::Trim(addr) => tried.trim(addr),
                Step::TrimAt(nth) => {
                    let nth = nth.index(tried.named.len().max(1));
                    if let Some(&addr) = tried.named.iter().nth(nth) {
                        tried.trim(addr);
                    }
                }
                Step::Compact(limit) => tried.compact(limit),
                Step::Drop => tried.drop_retired(),
            }
            tried.check();
        }

        let vram = Rc::clone(&tried.vram);
        let root = tried.tree.root();
        tried.prune(0, usize::MAX);
        tried.check();
        tried.drop_retired();
        tried.check();
        prop_assert_eq!(tried.tree.root(), root, "the root stays as long as the tree");
        prop_assert_eq!(tried.tree.nodes(), usize::from(root.is_some()));
        drop(tried);
        prop_assert_eq!(vram.homes(), 0, "homes are left when the tree has gone");
    }

    /// Catches a tree that keeps what it was given when it goes, and one that takes along what was taken out of it.
    #[test]
    fn a_tree_gives_all_of_it_back(
        addrs in prop::collection::vec(addr(), 1..30),
        (start, end) in (addr(), addr()),
    ) {
        let mut tried = Tried::new(1 << 56);
        for addr in addrs {
            tried.set(addr, 7, 0);
        }
        tried.clear(0, start.min(end));
        tried.prune(start.min(end), start.max(end));
        let vram = Rc::clone(&tried.vram);
        prop_assert_ne!(vram.homes(), 0);
        let retired = std::mem::take(&mut tried.retired);
        drop(tried);
        prop_assert_eq!(vram.homes(), retired.iter().map(Retired::count).sum::<usize>());
        drop(retired);
        prop_assert_eq!(vram.homes(), 0);
    }

    /// Catches a failed allocation that loses a node's home, or that is not told.
    #[test]
    fn nodes_without_memory_lose_nothing(missing in 1u32..6, fails in 0usize..24) {
        let vram = Rc::<Vram>::default();
        fail_allocation(Some(fails));
        let spare = Spare::new(missing, GFP_KERNEL, || Ok(vram.home()));
        fail_allocation(None);
        match spare {
            Err(error) => {
                prop_assert_eq!(error, ENOMEM);
                prop_assert_eq!(vram.homes(), 0);
            }
            Ok(spare) => {
                prop_assert_eq!(vram.homes(), missing as usize);
                drop(spare);
                prop_assert_eq!(vram.homes(), 0);
            }
        }
    }

    /// Catches VRAM that is lost when there is not enough of it.
    #[test]
    fn nodes_without_vram_lose_nothing(missing in 1u32..6, has in 0u32..5) {
        let vram = Rc::<Vram>::default();
        let mut left = has;
        let spare = Spare::new(missing, GFP_KERNEL, || {
            left = left.checked_sub(1).ok_or(ENOSPC)?;
            Ok(vram.home())
        });
        prop_assert_eq!(spare.as_ref().err(), (has < missing).then_some(&ENOSPC));
        drop(spare);
        prop_assert_eq!(vram.homes(), 0);
    }
}

/// Catches a table that does not reach the end of the address space, or has a level too many.
#[test]
fn there_are_as_many_levels_as_addresses_need() {
    let cases = [
        (PAGE, 1),
        (1 << 21, 1),
        ((1 << 21) + 1, 2),
        (1 << 30, 2),
        (1 << 39, 3),
        ((1 << 47) - PAGE, 4),
        (1 << 48, 4),
        ((1 << 48) + 1, 5),
        ((1 << 56) - PAGE, 5),
    ];
    for (end, expected) in cases {
        assert_eq!(levels(end), expected, "{end:#x}");
        assert_eq!(Tree::<VramHome>::new(end).levels(), expected);
    }
}

/// Catches a tree that takes what it cannot use, or is changed by what fails.
#[test]
fn a_way_that_cannot_be_made_changes_nothing() {
    let mut tried = Tried::new(1 << 47);
    tried.set(0, 1, 0);
    let far = addr_of([0, 0, 0, 1, 0]);
    assert_eq!(tried.tree.missing(far), 3);
    let mut spare = Spare::new(2, GFP_KERNEL, || Ok(tried.vram.home())).unwrap();
    assert_eq!(tried.grow(far, &mut spare), Err(EINVAL));
    drop(spare);
    tried.named.insert(far);
    tried.check();
    // Beyond the end.
    let mut spare = Spare::new(4, GFP_KERNEL, || Ok(tried.vram.home())).unwrap();
    assert_eq!(tried.grow(1 << 48, &mut spare), Err(EINVAL));
    drop(spare);
    tried.check();
}

/// Catches a root that is replaced, as who walks the table knows where it is, and one that can be seen before what is in it.
#[test]
fn a_planted_root_stays() {
    let mut tried = Tried::new(1 << 47);
    let root = |vram: &Rc<Vram>| Node::new(vram.home(), 3, GFP_KERNEL).unwrap();
    tried.tree.plant(root(&tried.vram), &tried.vram);
    let planted = tried.tree.root();
    assert!(planted.is_some());
    tried.vram.root.set(planted.map(|root| (root, 4)));
    tried.vram.assert_fenced(&tried.vram.all_reachable());
    tried.nodes.insert(node_of(3, 0));
    tried.check();
    tried.tree.plant(root(&tried.vram), &tried.vram);
    assert_eq!(tried.tree.root(), planted);
    assert_eq!(tried.vram.homes(), 1, "the other root goes");
    assert_eq!(tried.tree.missing(0), 3);
    tried.set(0, 1, 0);
    tried.check();
    assert_eq!(tried.tree.root(), planted);
}

/// Catches a walk that believes the device's memory: whatever is in it, a walk ends, and reads whole words.
#[test]
fn a_walk_ends_whatever_it_reads() {
    let addr = addr_of([1, 2, 3, 4, 0]);
    let mut reads = vec![];
    let walked = walk(0, 4, addr, |offset| {
        reads.push(offset);
        Ok(u64::MAX)
    });
    assert_eq!(walked, Ok(Walked::Entry(u64::MAX)));
    let node = HMM_GPU_PTE_OFFSET_MASK;
    assert_eq!(reads, [4 * 8, node + 3 * 8, node + 2 * 8, node + 8]);
    let fails = walk(0, 4, addr, |_| Err::<u64, Error>(EINVAL));
    assert_eq!(fails, Err(EINVAL));
    let nothing = walk(0, 4, addr, |_| Ok(!HMM_GPU_PTE_VALID));
    assert_eq!(nothing, Ok(Walked::NoNode));
}

/// Catches a write to VRAM that has gone: without a store, the device's copy stays as it was.
#[test]
fn entries_are_cleared_without_the_device() {
    let mut tried = Tried::new(1 << 47);
    let addrs = [0, PAGE, 1 << 21, 1 << 30].map(|addr| addr + (1 << 40));
    for addr in addrs {
        tried.set(addr, 5, 0);
    }
    let words = tried.vram.pages.borrow().clone();
    let (nodes, one) = (tried.tree.nodes(), addrs[3]);
    assert_eq!(tried.tree.clear(one, one + PAGE, None), 1);
    assert_eq!(tried.tree.nodes(), nodes);
    let (cleared, retired) = tried.tree.prune(0, usize::MAX, None);
    assert_eq!((cleared, retired.count()), (addrs.len() - 1, nodes - 1));
    assert_eq!(*tried.vram.pages.borrow(), words);
    assert_eq!(tried.tree.entries(), 0);
    assert!(addrs.iter().all(|&addr| tried.tree.get(addr) == 0));
    let vram = Rc::clone(&tried.vram);
    drop(tried);
    drop(retired);
    assert_eq!(vram.homes(), 0);
}

/// Room for a node that nobody looks at.
struct Nowhere;

impl Home for Nowhere {
    type Store = ();

    fn offset(&self) -> u64 {
        0
    }

    fn write(&self, (): &(), _: usize, _: u64) {}

    fn fence((): &()) {}
}

/// A tree with an entry in each of so many leaves.
fn many_leaves(leaves: usize) -> Tree<Nowhere> {
    let mut tree = Tree::new(1 << 47);
    for addr in (0..leaves).map(|leaf| leaf << 21) {
        let missing = tree.missing(addr);
        let mut spare = Spare::new(missing, GFP_KERNEL, || Ok(Nowhere)).unwrap();
        tree.grow(addr, &mut spare, &()).unwrap();
        tree.set(addr, 1, 1, &()).unwrap();
    }
    tree
}

/// Catches nodes that are dropped one within the other: a kernel's stack ends after 16 KiB.
#[test]
fn what_was_taken_out_is_dropped_on_a_small_stack() {
    const LEAVES: usize = 4096;
    let drop_many = || {
        let mut tree = many_leaves(LEAVES);
        let nodes = tree.nodes();
        let (cleared, retired) = tree.prune(0, usize::MAX, None);
        assert_eq!((cleared, retired.count()), (LEAVES, nodes - 1));
        drop(retired);

        let mut tree = many_leaves(LEAVES);
        assert_eq!(tree.clear(0, usize::MAX, None), LEAVES);
        assert_eq!(tree.nodes(), nodes);
        let retired = tree.compact(0, &());
        assert_eq!(retired.count(), nodes - 1);
        drop(retired);
        // With all its nodes.
        drop(many_leaves(LEAVES));
    };
    std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(drop_many)
        .unwrap()
        .join()
        .unwrap();
}

/// Catches empty nodes that are taken out while there are few of them, which the next to come would have to make again, and
/// those that are left when there are too many.
#[test]
fn empty_nodes_are_taken_out_when_there_are_too_many() {
    const LEAVES: usize = 100;
    let mut tree = many_leaves(LEAVES);
    assert_eq!(tree.clear(PAGE, usize::MAX, Some(&())), LEAVES - 1);
    // Four levels for the entry that is left, and the empty leaves.
    assert_eq!(tree.nodes(), 4 + LEAVES - 1);
    assert_eq!(tree.compact(LEAVES - 1, &()).count(), 0);
    assert_eq!(tree.compact(LEAVES - 2, &()).count(), LEAVES - 1);
    assert_eq!(tree.nodes(), 4);
    assert_eq!(tree.get(0), 1);
    assert_eq!(tree.compact(0, &()).count(), 0);
}

/// Catches entries that are looked for in another node than theirs, and new ones that are not counted.
#[test]
fn the_entries_of_a_window_are_those_of_the_tree() {
    let mut tree = many_leaves(2);
    let entries = tree.entries();
    let mut window = tree.window(PAGE).unwrap();
    assert_eq!((window.get(0), window.get(PAGE)), (1, 0));
    window.set(0, 5, HMM_GPU_PTE_VALID, &()).unwrap();
    window.set(PAGE, 7, HMM_GPU_PTE_VALID, &()).unwrap();
    assert_eq!((window.get(0), window.get(PAGE)), (5, 7));
    assert_eq!((tree.get(0), tree.get(PAGE)), (5, 7));
    assert_eq!(tree.entries(), entries + 1);
    assert!(tree.window(1 << 46).is_none());
}

/// Catches a way that was made for nothing and stays, or that takes more along than what it leaves empty.
#[test]
fn a_way_that_was_made_for_nothing_is_taken_out() {
    let mut tried = Tried::new(1 << 47);
    tried.set(0, 1, 0);
    let (near, far) = (addr_of([0, 1, 0, 0, 0]), addr_of([0, 0, 0, 1, 0]));
    for (addr, made) in [(near, 1), (far, 3)] {
        tried.set(addr, 1, 0);
        tried.trim(addr);
        assert_eq!(tried.tree.missing(addr), 0, "something is there");
        tried.clear(addr, addr + PAGE);
        assert_eq!(
            tried.tree.missing(addr),
            0,
            "who comes to it next finds a way"
        );
        tried.trim(addr + PAGE);
        assert_eq!(tried.tree.missing(addr), made);
        tried.trim(addr);
        tried.check();
    }
    tried.trim(0);
    assert_eq!(tried.tree.get(0), 1);
    tried.drop_retired();
    tried.check();
}
