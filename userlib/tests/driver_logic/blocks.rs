//! `driver/bitmap.rs`: pages of VRAM are taken and given back.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::alloc::GFP_KERNEL;
use crate::bitmap::{Blocks, BLOCK_PAGES, SHARED};
use crate::config;
use crate::prelude::{KVec, ENOMEM};
use crate::stand_in::fail_allocation;

/// log2 of [`BLOCK_PAGES`].
const BLOCK_ORDER: u32 = BLOCK_PAGES.ilog2();

#[derive(Clone, Debug)]
enum Step {
    Add(usize),
    Take { order: u32, count: usize },
    Node,
    GiveBack(prop::sample::Index),
}

fn step(blocks: usize) -> impl Strategy<Value = Step> {
    // A whole block and a single page are what the driver asks for most.
    let order = prop_oneof![Just(0), Just(BLOCK_ORDER), 0..=BLOCK_ORDER];
    let count = prop_oneof![1usize..8, 1usize..600];
    prop_oneof![
        1 => (0..blocks).prop_map(Step::Add),
        4 => (order, count).prop_map(|(order, count)| Step::Take { order, count }),
        2 => Just(Step::Node),
        4 => any::<prop::sample::Index>().prop_map(Step::GiveBack),
    ]
}

/// The blocks, and every page of them with whether it can be taken.
struct Tried {
    blocks: Blocks,
    here: BTreeSet<usize>,
    used: BTreeSet<usize>,
    /// Those that were taken for nodes.
    nodes: BTreeSet<usize>,
    /// What was taken: the first page, and how many as a power of two.
    runs: Vec<(usize, u32)>,
}

impl Tried {
    fn new(count: usize) -> Self {
        Self {
            blocks: Blocks::new(count).unwrap(),
            here: BTreeSet::new(),
            used: BTreeSet::new(),
            nodes: BTreeSet::new(),
            runs: vec![],
        }
    }

    fn add(&mut self, block: usize) {
        self.blocks.add(block);
        self.here.insert(block);
    }

    /// Whether a run could be had: looks at each place where one may begin.
    fn has_room(&self, order: u32) -> bool {
        let run = 1 << order;
        self.here.iter().any(|block| {
            let first = block * BLOCK_PAGES;
            (first..first + BLOCK_PAGES)
                .step_by(run)
                .any(|start| self.used.range(start..start + run).next().is_none())
        })
    }

    fn has_nodes(&self, block: usize) -> bool {
        self.nodes.iter().any(|page| page / BLOCK_PAGES == block)
    }

    /// Takes pages as the driver does: first where no nodes are.
    fn take(&mut self, order: u32, count: usize) {
        let mut indices = vec![u32::MAX; count];
        let alone = self.blocks.take(SHARED, order, false, &mut indices);
        assert!(alone <= count);
        for &start in &indices[..alone] {
            assert!(!self.has_nodes(start as usize / BLOCK_PAGES));
        }
        let got = alone + self.blocks.take(SHARED, order, true, &mut indices[alone..]);
        assert!(got <= count);
        for &start in &indices[..got] {
            let (start, run) = (start as usize, 1 << order);
            assert_eq!(start % run, 0, "a run of {run} at {start} is not aligned");
            assert!(
                self.here.contains(&(start / BLOCK_PAGES)),
                "block of {start} is not here"
            );
            for page in start..start + run {
                assert!(self.used.insert(page), "page {page} is given twice");
            }
            self.runs.push((start, order));
        }
        if got < count {
            assert!(
                !self.has_room(order),
                "{got} of {count} runs of order {order}, and room for more"
            );
            assert!(indices[got..].iter().all(|&index| index == u32::MAX));
        }
        assert_eq!(self.blocks.used(), self.used.len());
    }

    /// Takes a page for a node: where others are, if there is room.
    fn take_node(&mut self) {
        let Some(page) = self.blocks.take_node(SHARED) else {
            assert!(!self.has_room(0), "no node, and there is room");
            return;
        };
        let page = page as usize;
        assert!(self.used.insert(page), "page {page} is given twice");
        let block = page / BLOCK_PAGES;
        assert!(self.here.contains(&block));
        let has_room = |block: &usize| {
            self.used
                .range(block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES)
                .count()
                < BLOCK_PAGES
        };
        if !self.has_nodes(block) {
            let beside = self
                .here
                .iter()
                .find(|it| self.has_nodes(**it) && has_room(it));
            assert_eq!(beside, None, "a node in block {block}, which had none");
        }
        self.nodes.insert(page);
        self.runs.push((page, 0));
        assert_eq!(self.blocks.used(), self.used.len());
    }

    fn give_back(&mut self, run: usize) {
        let (start, order) = self.runs.swap_remove(run);
        self.blocks.give_back(start, order);
        for page in start..start + (1 << order) {
            self.used.remove(&page);
            self.nodes.remove(&page);
        }
        assert_eq!(self.blocks.used(), self.used.len());
    }
}

proptest! {
    #![proptest_config(config())]

    /// Catches a page that is given twice, a run that is not aligned, VRAM that is lost when it is given back, and blocks that
    /// have room and are not found.
    #[test]
    fn blocks_do_what_a_set_of_pages_does(
        (count, steps) in (1usize..5).prop_flat_map(|count| {
            (Just(count), prop::collection::vec(step(count), 1..60))
        }),
    ) {
        let mut tried = Tried::new(count);
        for step in steps {
            match step {
                Step::Add(block) => tried.add(block),
                Step::Take { order, count } => tried.take(order, count),
                Step::Node => tried.take_node(),
                Step::GiveBack(run) if !tried.runs.is_empty() => {
                    tried.give_back(run.index(tried.runs.len()));
                }
                Step::GiveBack(_) => (),
            }
        }

        // All of it comes back: each block is whole again.
        while !tried.runs.is_empty() {
            tried.give_back(0);
        }
        prop_assert_eq!(tried.blocks.used(), 0);
        (0..count).for_each(|block| tried.add(block));
        tried.take(BLOCK_ORDER, count);
        prop_assert_eq!(tried.runs.len(), count);
        tried.take(0, 1);
        prop_assert_eq!(tried.runs.len(), count, "a page beyond the last block");
    }
}

/// Catches blocks that are opened while others have room for what is asked: then whole blocks are never left for huge pages.
#[test]
fn single_pages_fill_a_block_before_the_next() {
    let mut tried = Tried::new(3);
    (0..3).for_each(|block| tried.add(block));
    for taken in 1..=3 * BLOCK_PAGES {
        tried.take(0, 1);
        let opened: BTreeSet<_> = tried.used.iter().map(|page| page / BLOCK_PAGES).collect();
        assert_eq!(opened.len(), taken.div_ceil(BLOCK_PAGES));
    }
}

/// Catches nodes that are spread over the blocks: none of those could become a private pool.
#[test]
fn nodes_stay_together() {
    let mut tried = Tried::new(4);
    (0..4).for_each(|block| tried.add(block));
    for _ in 0..BLOCK_PAGES / 2 {
        tried.take_node();
        tried.take(0, 5);
        tried.give_back(0);
        let last = tried.runs.len() - 1;
        tried.give_back(last);
    }
    let blocks: BTreeSet<_> = tried.nodes.iter().map(|page| page / BLOCK_PAGES).collect();
    assert_eq!(blocks.len(), 1, "nodes are at {:?}", tried.nodes);
}

/// Catches a failure that is ignored: then a list has no room for a block, and its pages are lost.
#[test]
fn blocks_without_memory_are_an_error() {
    for count in 0..3 {
        fail_allocation(Some(count));
        assert_eq!(Blocks::new(7).err(), Some(ENOMEM));
    }
    fail_allocation(None);
    assert!(Blocks::new(0).is_ok());
}

/// Catches an index that is believed, and a block whose pages are given before it was added: they are no memory yet.
#[test]
fn blocks_that_are_not_there_are_ignored() {
    let mut tried = Tried::new(2);
    tried.blocks.add(2);
    tried.blocks.give_back(2 * BLOCK_PAGES, 0);
    tried.blocks.give_back(BLOCK_PAGES, 0);
    tried.take(0, 1);
    assert_eq!(tried.runs.len(), 0);
}

fn pages_of(blocks: &mut Blocks, pool: u16, count: usize) -> BTreeSet<usize> {
    let mut indices = vec![0; count];
    let got = blocks.take(pool, 0, true, &mut indices);
    indices[..got].iter().map(|&index| index as usize).collect()
}

fn room(count: usize) -> KVec<u32> {
    KVec::with_capacity(count, GFP_KERNEL).unwrap()
}

/// Catches pages of one pool that are given to another, or lost, when a block changes hands with some in use.
#[test]
fn a_block_has_its_pages_in_its_pool_only() {
    const OWN: u16 = 3;
    let mut blocks = Blocks::new(4).unwrap();
    (0..4).for_each(|block| blocks.add(block));
    let before = pages_of(&mut blocks, SHARED, 4 * BLOCK_PAGES);
    assert_eq!(before.len(), 4 * BLOCK_PAGES);
    // All but a page of each.
    let stay = |page: &usize| page % BLOCK_PAGES == 7;
    before
        .iter()
        .filter(|page| !stay(page))
        .for_each(|page| blocks.give_back(*page, 0));
    assert!(blocks.give(1, 2, OWN, room(2)).is_ok());
    assert!(
        blocks.give(2, 2, OWN, room(2)).is_err(),
        "one of them is taken"
    );
    assert!(
        blocks.give(0, 1, OWN, room(1)).is_err(),
        "the pool has blocks"
    );
    assert!(
        blocks.give(3, 2, OWN + 1, room(2)).is_err(),
        "there is no fifth"
    );
    assert_eq!(
        (blocks.used_in(OWN), blocks.free_in(OWN)),
        (2, 2 * BLOCK_PAGES - 2)
    );
    let own = pages_of(&mut blocks, OWN, 3 * BLOCK_PAGES);
    assert_eq!(own.len(), 2 * BLOCK_PAGES - 2);
    assert!(own
        .iter()
        .all(|page| (BLOCK_PAGES..3 * BLOCK_PAGES).contains(page) && !stay(page)));
    let others = pages_of(&mut blocks, SHARED, 4 * BLOCK_PAGES);
    assert_eq!(others.len(), 2 * BLOCK_PAGES - 2);
    assert!(others.is_disjoint(&own));
    // One block goes back, with what is in use.
    blocks.take_back(1);
    assert_eq!(blocks.used(), 4 * BLOCK_PAGES);
    own.iter().for_each(|page| blocks.give_back(*page, 0));
    let again = pages_of(&mut blocks, SHARED, 4 * BLOCK_PAGES);
    assert_eq!(again.len(), BLOCK_PAGES - 1);
    assert!(again.iter().all(|page| page / BLOCK_PAGES == 1));
}

/// Catches a page that is taken again although it is held back, and one that never is.
#[test]
fn what_is_held_back_is_taken_after_its_release() {
    const OWN: u16 = 64;
    let mut blocks = Blocks::new(2).unwrap();
    (0..2).for_each(|block| blocks.add(block));
    assert!(blocks.give(0, 1, OWN, room(1)).is_ok());
    let all = pages_of(&mut blocks, OWN, BLOCK_PAGES);
    blocks.set_holds(OWN, true);
    all.iter()
        .take(200)
        .for_each(|page| blocks.give_back(*page, 0));
    assert_eq!((blocks.held_in(OWN), blocks.free_in(OWN)), (200, 0));
    assert_eq!(blocks.used(), BLOCK_PAGES - 200);
    assert!(pages_of(&mut blocks, OWN, 1).is_empty());
    blocks.set_holds(OWN, false);
    blocks.release(0);
    assert_eq!((blocks.held_in(OWN), blocks.free_in(OWN)), (0, 200));
    let free = blocks.take_all(0);
    assert!(pages_of(&mut blocks, OWN, 1).is_empty());
    blocks.put_all(0, &free);
    let again = pages_of(&mut blocks, OWN, BLOCK_PAGES);
    assert_eq!(again, all.into_iter().take(200).collect());
    assert_eq!(blocks.used(), BLOCK_PAGES);
}
