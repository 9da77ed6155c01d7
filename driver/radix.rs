// SPDX-License-Identifier: GPL-2.0

//! A device page table: a radix tree in two copies. Plain logic, without locks.
//!
//! The driver's copy is what counts, and is the only one that is read. What the device reads is in
//! its own memory: every node has a [`Home`] there, to which each change is written. An entry of
//! the driver's copy is a word of the caller's, not zero; the device's word for it comes along when
//! it is set.

#![forbid(unsafe_code)]

use crate::uapi::{
    HMM_GPU_PTE_LEVEL_BITS, HMM_GPU_PTE_OFFSET_MASK, HMM_GPU_PTE_REQUESTED, HMM_GPU_PTE_VALID,
};
use kernel::{alloc::Flags, prelude::*};

/// log2 of the page size in bytes.
const PAGE_SHIFT: u32 = 12;

/// Entries of a node.
pub(crate) const FANOUT: usize = 1 << HMM_GPU_PTE_LEVEL_BITS;

/// log2 of the bytes of address space that an entry at `level`, of which there are few, stands for.
const fn shift(level: u32) -> u32 {
    PAGE_SHIFT.wrapping_add(HMM_GPU_PTE_LEVEL_BITS.wrapping_mul(level))
}

/// Those bytes.
const fn span(level: u32) -> usize {
    1 << shift(level)
}

/// The number of the entry for `addr` in a node at `level`.
const fn slot(level: u32, addr: usize) -> usize {
    addr.wrapping_shr(shift(level)) % FANOUT
}

/// How many levels a table for addresses below `end` has.
pub(crate) const fn levels(end: usize) -> u32 {
    let mut levels = 1;
    while levels < 5 && span(levels) < end {
        levels += 1;
    }
    levels
}

/// Where a node is in the device's memory: room for [`FANOUT`] words, all zero when it is given to
/// a tree.
pub(crate) trait Home {
    /// What it takes to write there.
    type Store: ?Sized;

    /// The offset of the node, for the entry that leads to it. A multiple of the page size.
    fn offset(&self) -> u64;

    /// Writes the word of an entry.
    fn write(&self, store: &Self::Store, slot: usize, word: u64);

    /// Has the device see what was written before no later than what is written after.
    fn fence(store: &Self::Store);
}

enum Body<H: Home> {
    Inner(KVec<Option<KBox<Node<H>>>>),
    Leaf(KVec<u64>),
}

/// A node.
pub(crate) struct Node<H: Home> {
    home: H,
    body: Body<H>,
    /// Entries that are not empty.
    count: usize,
    /// The next one of those taken out of a tree.
    next: Option<KBox<Node<H>>>,
}

impl<H: Home> Node<H> {
    /// An empty node for `level`.
    pub(crate) fn new(home: H, level: u32, flags: Flags) -> Result<KBox<Self>> {
        let body = if level == 0 {
            Body::Leaf(KVec::from_elem(0, FANOUT, flags)?)
        } else {
            let mut children = KVec::with_capacity(FANOUT, flags)?;
            for _ in 0..FANOUT {
                children.push(None, flags)?;
            }
            Body::Inner(children)
        };
        Ok(KBox::new(
            Self {
                home,
                body,
                count: 0,
                next: None,
            },
            flags,
        )?)
    }

    /// Where the word of an entry is in the device's memory.
    fn place(&self, slot: usize) -> u64 {
        // CAST: Widens.
        self.home.offset() + (slot * size_of::<u64>()) as u64
    }

    /// The entry of the page at `addr`, which is in this leaf.
    fn entry(&self, addr: usize) -> u64 {
        match &self.body {
            Body::Leaf(entries) => entries.get(slot(0, addr)).copied().unwrap_or(0),
            Body::Inner(_) => 0,
        }
    }

    fn child(&self, slot: usize) -> Option<&Node<H>> {
        match &self.body {
            Body::Inner(children) => children.get(slot)?.as_deref(),
            Body::Leaf(_) => None,
        }
    }

    fn child_mut(&mut self, slot: usize) -> Option<&mut Node<H>> {
        match &mut self.body {
            Body::Inner(children) => children.get_mut(slot)?.as_deref_mut(),
            Body::Leaf(_) => None,
        }
    }

    /// Clears the entries of `[start, end)`, which is inside what this node at `level` stands for.
    /// Returns how many there were. With `retired`, nodes that are empty now go there.
    fn clear(
        &mut self,
        level: u32,
        start: usize,
        end: usize,
        store: Option<&H::Store>,
        mut retired: Option<&mut Retired<H>>,
    ) -> usize {
        let mut cleared = 0;
        if self.count == 0 {
            return 0;
        }
        // The last address, since `end` may be the first of the next node.
        for slot in slot(level, start)..=slot(level, end - 1) {
            match &mut self.body {
                Body::Leaf(entries) => {
                    let Some(entry) = entries.get_mut(slot).filter(|entry| **entry != 0) else {
                        continue;
                    };
                    *entry = 0;
                    cleared += 1;
                }
                Body::Inner(children) => {
                    let Some(link) = children.get_mut(slot) else {
                        continue;
                    };
                    let Some(child) = link.as_deref_mut() else {
                        continue;
                    };
                    let first = (start & !(span(level + 1) - 1)) + slot * span(level);
                    let (from, to) = (start.max(first), end.min(first + span(level)));
                    cleared += child.clear(level - 1, from, to, store, retired.as_deref_mut());
                    let Some(retired) = retired.as_deref_mut().filter(|_| child.count == 0) else {
                        continue;
                    };
                    if let Some(child) = link.take() {
                        retired.add(child);
                    }
                }
            }
            self.count -= 1;
            if let Some(store) = store {
                self.home.write(store, slot, 0);
            }
        }
        cleared
    }

    /// Whether there is an entry of `[start, end)`, which is inside what this node at `level` stands for.
    fn has_any(&self, level: u32, start: usize, end: usize) -> bool {
        if self.count == 0 {
            return false;
        }
        // The last address, as in `clear`.
        let mut slots = slot(level, start)..=slot(level, end - 1);
        match &self.body {
            Body::Leaf(entries) => {
                slots.any(|slot| entries.get(slot).is_some_and(|entry| *entry != 0))
            }
            Body::Inner(_) => slots.any(|slot| {
                let first = (start & !(span(level + 1) - 1)) + slot * span(level);
                let (from, to) = (start.max(first), end.min(first + span(level)));
                self.child(slot)
                    .is_some_and(|child| child.has_any(level - 1, from, to))
            }),
        }
    }

    /// Takes out the nodes below this one that are empty.
    fn compact(&mut self, store: &H::Store, retired: &mut Retired<H>) {
        let Body::Inner(children) = &mut self.body else {
            return;
        };
        for (slot, link) in children.iter_mut().enumerate() {
            let Some(child) = link.as_deref_mut() else {
                continue;
            };
            child.compact(store, retired);
            if child.count > 0 {
                continue;
            }
            if let Some(child) = link.take() {
                retired.add(child);
                self.count -= 1;
                self.home.write(store, slot, 0);
            }
        }
    }
}

/// Nodes that were taken out of a tree. They have no entries.
pub(crate) struct Retired<H: Home> {
    first: Option<KBox<Node<H>>>,
    count: usize,
}

impl<H: Home> Retired<H> {
    const fn new() -> Self {
        Self {
            first: None,
            count: 0,
        }
    }

    fn add(&mut self, mut node: KBox<Node<H>>) {
        node.next = self.first.take();
        self.first = Some(node);
        self.count += 1;
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

impl<H: Home> Drop for Retired<H> {
    fn drop(&mut self) {
        // One by one: to drop the first would drop the next within, and so on.
        while let Some(mut node) = self.first.take() {
            self.first = node.next.take();
        }
    }
}

/// Nodes for a tree to grow with, made ahead.
pub(crate) struct Spare<H: Home> {
    /// By level, the highest last.
    nodes: KVec<KBox<Node<H>>>,
}

impl<H: Home> Spare<H> {
    /// Makes nodes for the `missing` lowest levels, each with a home from `home`.
    pub(crate) fn new(
        missing: u32,
        flags: Flags,
        mut home: impl FnMut() -> Result<H>,
    ) -> Result<Self> {
        let mut nodes = KVec::new();
        for level in 0..missing {
            nodes.push(Node::new(home()?, level, flags)?, flags)?;
        }
        Ok(Self { nodes })
    }
}

/// A device page table.
pub(crate) struct Tree<H: Home> {
    levels: u32,
    root: Option<KBox<Node<H>>>,
    nodes: usize,
    entries: usize,
}

impl<H: Home> Tree<H> {
    /// An empty one, with as many levels as addresses below `end` need.
    pub(crate) const fn new(end: usize) -> Self {
        Self {
            levels: levels(end),
            root: None,
            nodes: 0,
            entries: 0,
        }
    }

    /// Gives the tree a root, made for its highest level, unless it has one. Without, the first
    /// [`Tree::grow`] does.
    pub(crate) fn plant(&mut self, root: KBox<Node<H>>, store: &H::Store) {
        if self.root.is_none() {
            H::fence(store);
            self.root = Some(root);
            self.nodes += 1;
        }
    }

    /// How many levels there are.
    pub(crate) fn levels(&self) -> u32 {
        self.levels
    }

    /// How many nodes there are.
    pub(crate) fn nodes(&self) -> usize {
        self.nodes
    }

    /// How many entries are set.
    pub(crate) fn entries(&self) -> usize {
        self.entries
    }

    /// The offset of the root, if there is one. It stays as long as the tree.
    pub(crate) fn root(&self) -> Option<u64> {
        self.root.as_ref().map(|root| root.home.offset())
    }

    /// Whether the tree has a place for the page at `addr`.
    fn covers(&self, addr: usize) -> bool {
        addr.wrapping_shr(shift(self.levels - 1)) < FANOUT
    }

    /// How many nodes are missing on the way to the entry of the page at `addr`: those of the
    /// lowest levels.
    pub(crate) fn missing(&self, addr: usize) -> u32 {
        let mut node = self.root.as_deref();
        let mut missing = self.levels;
        while let Some(found) = node {
            missing -= 1;
            node = found.child(slot(missing, addr));
        }
        missing
    }

    /// Puts nodes in place, as far as they are missing on the way to `addr`, and leaves the rest.
    /// Fails with `EINVAL` if there are not enough, or the table does not reach that far.
    pub(crate) fn grow(&mut self, addr: usize, spare: &mut Spare<H>, store: &H::Store) -> Result {
        let missing = self.missing(addr);
        // CAST: At most the number of levels.
        if !self.covers(addr) || spare.nodes.len() < missing as usize {
            return Err(EINVAL);
        }
        // From below, so that what becomes reachable is complete.
        let mut below: Option<KBox<Node<H>>> = None;
        for level in 0..missing {
            let mut node = spare.nodes.remove(0).map_err(|_| EINVAL)?;
            if let Some(child) = below.take() {
                Self::link(&mut node, level, addr, child, store);
            }
            below = Some(node);
            self.nodes += 1;
        }
        let Some(top) = below else {
            return Ok(());
        };
        H::fence(store);
        let mut level = self.levels;
        let mut place = self.root.as_deref_mut();
        while let Some(node) = place {
            level -= 1;
            if level == missing {
                Self::link(node, level, addr, top, store);
                return Ok(());
            }
            place = node.child_mut(slot(level, addr));
        }
        self.root = Some(top);
        Ok(())
    }

    /// Makes `child` the one for `addr` of `node`, which is at `level` and has none there.
    fn link(node: &mut Node<H>, level: u32, addr: usize, child: KBox<Node<H>>, store: &H::Store) {
        let slot = slot(level, addr);
        let offset = child.home.offset();
        if let Body::Inner(children) = &mut node.body {
            if let Some(place) = children.get_mut(slot) {
                *place = Some(child);
                node.count += 1;
                node.home.write(store, slot, offset | HMM_GPU_PTE_VALID);
            }
        }
    }

    fn leaf(&self, addr: usize) -> Option<&Node<H>> {
        let mut level = self.levels;
        let mut node = self.root.as_deref().filter(|_| self.covers(addr))?;
        while level > 1 {
            level -= 1;
            node = node.child(slot(level, addr))?;
        }
        Some(node)
    }

    /// The entry of the page at `addr`; zero if it is not set.
    pub(crate) fn get(&self, addr: usize) -> u64 {
        self.leaf(addr).map_or(0, |leaf| leaf.entry(addr))
    }

    /// Sets the entry of the page at `addr`, neither word being zero. Fails with `EINVAL` if a node
    /// is missing on the way. What the page holds must have been fenced.
    pub(crate) fn set(&mut self, addr: usize, entry: u64, word: u64, store: &H::Store) -> Result {
        let mut window = self.window(addr).ok_or(EINVAL)?;
        window.set(addr, entry, word, store)
    }

    /// The entries of the pages in the 2 MiB that `addr` is in, if no node is missing on the way.
    pub(crate) fn window(&mut self, addr: usize) -> Option<Window<'_, H>> {
        let covers = self.covers(addr);
        let mut level = self.levels;
        let mut leaf = self.root.as_deref_mut().filter(|_| covers)?;
        while level > 1 {
            level -= 1;
            leaf = leaf.child_mut(slot(level, addr))?;
        }
        Some(Window {
            leaf,
            entries: &mut self.entries,
        })
    }

    /// Marks the entry of the page at `addr` as requested, for the device, if there is a place for
    /// it and it is not set.
    #[cfg_attr(MODULE, allow(dead_code))]
    pub(crate) fn request(&self, addr: usize, store: &H::Store) {
        if let Some(node) = self.leaf(addr) {
            Leaf { node }.request(addr, store);
        }
    }

    /// Walks the device's copy as a device does, down to the leaf that the page at `addr` is in, if there is one: as far as it is what
    /// this one says. Where it leads elsewhere, that fails with `EIO`. `read` is given offsets of nodes of this tree only.
    pub(crate) fn walk(
        &self,
        addr: usize,
        mut read: impl FnMut(u64) -> Result<u64>,
    ) -> Result<Option<Leaf<'_, H>>> {
        let mut level = self.levels;
        let mut next = self.root.as_deref().filter(|_| self.covers(addr));
        while let Some(node) = next {
            level -= 1;
            if level == 0 {
                return Ok(Some(Leaf { node }));
            }
            let slot = slot(level, addr);
            let word = read(node.place(slot))?;
            next = node.child(slot);
            let expected = next.map(|child| child.home.offset() | HMM_GPU_PTE_VALID);
            let found = (word & HMM_GPU_PTE_VALID != 0).then_some(word);
            if found != expected {
                return Err(EIO);
            }
        }
        Ok(None)
    }

    /// Whether an entry of the pages in `[start, end)` is set.
    pub(crate) fn has_any(&self, start: usize, end: usize) -> bool {
        let top = self.levels - 1;
        let end = end.min(span(top).saturating_mul(FANOUT));
        let root = self.root.as_deref().filter(|_| start < end);
        root.is_some_and(|root| root.has_any(top, start, end))
    }

    /// Clears the entries of the pages in `[start, end)` and returns how many were set. Without a
    /// `store`, the device's copy stays as it is.
    pub(crate) fn clear(&mut self, start: usize, end: usize, store: Option<&H::Store>) -> usize {
        self.clear_and(start, end, store, None)
    }

    /// As [`Tree::clear`], and takes out the nodes of the range that are empty then, but for the
    /// root. They are to be dropped where that can be done, and when no device walks the table any
    /// more that may have seen them.
    pub(crate) fn prune(
        &mut self,
        start: usize,
        end: usize,
        store: Option<&H::Store>,
    ) -> (usize, Retired<H>) {
        let mut retired = Retired::new();
        let cleared = self.clear_and(start, end, store, Some(&mut retired));
        self.nodes -= retired.count;
        (cleared, retired)
    }

    /// Takes out all nodes that are empty, but for the root, if there are more nodes than entries
    /// can account for, by `limit`.
    pub(crate) fn compact(&mut self, limit: usize, store: &H::Store) -> Retired<H> {
        let mut retired = Retired::new();
        // CAST: Widens.
        let accounted_for = self.entries * self.levels as usize;
        if self.nodes > accounted_for + limit {
            if let Some(root) = self.root.as_deref_mut() {
                root.compact(store, &mut retired);
            }
        }
        self.nodes -= retired.count;
        retired
    }

    /// Takes out the nodes on the way to the page at `addr` that are empty, but for the root.
    pub(crate) fn trim(&mut self, addr: usize, store: &H::Store) -> Retired<H> {
        let empty = self.leaf(addr).is_some_and(|leaf| leaf.count == 0);
        if empty {
            self.prune(addr, addr + 1, Some(store)).1
        } else {
            Retired::new()
        }
    }

    fn clear_and(
        &mut self,
        start: usize,
        end: usize,
        store: Option<&H::Store>,
        retired: Option<&mut Retired<H>>,
    ) -> usize {
        let top = self.levels - 1;
        let end = end.min(span(top).saturating_mul(FANOUT));
        if start >= end {
            return 0;
        }
        // Of one leaf, as most are: the nodes above it do not change.
        let of_one = retired.is_none() && start / span(1) == (end - 1) / span(1);
        let (node, level) = if of_one {
            (self.window(start).map(|window| window.leaf), 0)
        } else {
            (self.root.as_deref_mut(), top)
        };
        let cleared = node.map_or(0, |node| node.clear(level, start, end, store, retired));
        self.entries -= cleared;
        cleared
    }
}

/// Entries that are next to each other: the way to them is walked once. Only the last bits of an address
/// count.
pub(crate) struct Window<'a, H: Home> {
    leaf: &'a mut Node<H>,
    entries: &'a mut usize,
}

impl<H: Home> Window<'_, H> {
    /// See [`Tree::get`].
    pub(crate) fn get(&self, addr: usize) -> u64 {
        self.leaf.entry(addr)
    }

    /// See [`Tree::set`].
    pub(crate) fn set(&mut self, addr: usize, entry: u64, word: u64, store: &H::Store) -> Result {
        let slot = slot(0, addr);
        let Body::Leaf(entries) = &mut self.leaf.body else {
            return Err(EINVAL);
        };
        let place = entries.get_mut(slot).ok_or(EINVAL)?;
        let new = *place == 0;
        *place = entry;
        self.leaf.home.write(store, slot, word);
        if new {
            self.leaf.count += 1;
            *self.entries += 1;
        }
        Ok(())
    }
}

/// Where a device has come to in a table: the entries of 2 MiB. Only the last bits of an address count.
pub(crate) struct Leaf<'a, H: Home> {
    node: &'a Node<H>,
}

impl<H: Home> Leaf<'_, H> {
    /// Where the device's word for the page at `addr` is, in its memory.
    pub(crate) fn place(&self, addr: usize) -> u64 {
        self.node.place(slot(0, addr))
    }

    /// See [`Tree::get`].
    pub(crate) fn get(&self, addr: usize) -> u64 {
        self.node.entry(addr)
    }

    /// See [`Tree::request`].
    pub(crate) fn request(&self, addr: usize, store: &H::Store) {
        if self.get(addr) == 0 {
            let word = HMM_GPU_PTE_REQUESTED;
            self.node.home.write(store, slot(0, addr), word);
        }
    }
}

/// What a device finds that walks a table.
#[cfg_attr(MODULE, allow(dead_code))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Walked {
    /// A node is missing on the way.
    NoNode,
    /// The entry of the page, valid or not.
    Entry(u64),
}

/// Walks a table as a device does: from the root at offset `root`, reading words by `read`, which
/// is given their offsets in bytes. Believes what it reads: for who is the device.
#[cfg_attr(MODULE, allow(dead_code))]
pub(crate) fn walk(
    root: u64,
    levels: u32,
    addr: usize,
    mut read: impl FnMut(u64) -> Result<u64>,
) -> Result<Walked> {
    let mut node = root;
    for level in (0..levels).rev() {
        // CAST: Widens.
        let word = read(node + (slot(level, addr) * size_of::<u64>()) as u64)?;
        if level == 0 {
            return Ok(Walked::Entry(word));
        }
        if word & HMM_GPU_PTE_VALID == 0 {
            return Ok(Walked::NoNode);
        }
        node = word & HMM_GPU_PTE_OFFSET_MASK;
    }
    Ok(Walked::NoNode)
}
