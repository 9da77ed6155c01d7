//! A tree of plain pointers goes to VRAM and stays a tree: the same addresses, the same bytes.
//!
//! `mirror [N]` uses `/dev/hmm_gpuN`, or the first device there is. At each step it draws where every page of the tree is, then
//! walks all of it and compares every byte. The walk is the CPU touching pages: it brings them back, with no call and no copy in
//! this program. So each step begins by moving the tree to VRAM again.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::error::Error;
use std::process::ExitCode;

use hmm_gpu::{Device, Glyphs, PageRange, Target};

/// Nodes of the tree: nearly 64 pages of them.
const NODES: usize = 1023;
/// Nodes between one and the next that is linked: has no factor in common with their number.
const STRIDE: usize = 619;
/// Marks in a row of the picture.
const WIDTH: usize = 32;

/// A node of a search tree, 256 bytes. Its links are ordinary references: addresses.
struct Node<'a> {
    key: u64,
    smaller: Cell<Option<&'a Node<'a>>>,
    larger: Cell<Option<&'a Node<'a>>>,
    payload: [u8; 232],
}

impl<'a> Node<'a> {
    fn new(key: u64) -> Self {
        let mut payload = [0; 232];
        let mut random = Random(key);
        payload.fill_with(|| random.next().to_le_bytes()[0]);
        let (smaller, larger) = Default::default();
        Node {
            key,
            smaller,
            larger,
            payload,
        }
    }

    fn child(&self, key: u64) -> &Cell<Option<&'a Node<'a>>> {
        if key < self.key {
            &self.smaller
        } else {
            &self.larger
        }
    }

    /// Every node from here down to the one with `key`, by following pointers.
    fn path_to(&'a self, key: u64) -> impl Iterator<Item = &'a Node<'a>> {
        std::iter::successors(Some(self), move |node| match node.key == key {
            true => None,
            false => node.child(key).get(),
        })
    }

    /// Goes through all of the tree from here down, and mixes every byte into `sum`: FNV-1a.
    fn checksum(&self, sum: u64) -> u64 {
        let mix = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        let links = [&self.smaller, &self.larger].map(Cell::get);
        let mut sum = self.key.to_le_bytes().iter().fold(sum, mix);
        sum = self.payload.iter().fold(sum, mix);
        for link in links {
            let address = link.map_or(0, |node| node as *const Node as usize);
            sum = address.to_le_bytes().iter().fold(sum, mix);
            sum = link.map_or(sum, |node| node.checksum(sum));
        }
        sum
    }
}

/// Links the nodes to a tree whose root is the first. Parent and child are far apart, as in a heap that has aged.
fn link<'a>(nodes: &'a [Node<'a>]) -> &'a Node<'a> {
    let root = &nodes[0];
    for node in (1..NODES).map(|n| &nodes[n * STRIDE % NODES]) {
        if let Some(parent) = root.path_to(node.key).last() {
            parent.child(node.key).set(Some(node));
        }
    }
    root
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mirror: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let device = match std::env::args().nth(1) {
        Some(unit) => Device::open(unit.parse()?)?,
        None => Device::open_first()?,
    };
    println!("{}\n", device.describe()?);

    let mut random = Random(2018);
    let nodes: Vec<Node> = (0..NODES).map(|_| Node::new(random.next())).collect();
    let root = link(&nodes);
    let mirror = Mirror {
        device: &device,
        nodes: &nodes,
        root,
        expected: root.checksum(0),
    };

    println!("1. The CPU builds a tree in a Vec: {NODES} nodes, linked by plain pointers.");
    mirror.draw()?;
    mirror.compare()?;

    let moved = device.prefetch(&nodes, Target::Device)?;
    println!("2. The whole Vec moves to VRAM: {moved}.");
    mirror.draw()?;
    mirror.compare()?;
    println!("   Because the CPU read it, all of it came back by itself:");
    mirror.draw()?;
    println!();

    let keys = [NODES / 3, NODES / 2, NODES - 1].map(|n| nodes[n].key);
    device.prefetch(&nodes, Target::Device)?;
    let way = || keys.into_iter().flat_map(|key| root.path_to(key));
    let pages: BTreeSet<usize> = way()
        .map(|node| PageRange::of(std::slice::from_ref(node)).addr())
        .collect();
    println!("3. In VRAM again. Then the CPU looks up 3 keys, from pointer to pointer.");
    println!(
        "   {} nodes on {} pages; these come back, and what seemed to be next:",
        way().count(),
        pages.len()
    );
    mirror.draw()?;
    mirror.compare()?;

    device.prefetch(&nodes, Target::Device)?;
    let back = device.prefetch(&nodes[..NODES / 2], Target::System)?;
    println!("4. In VRAM again. Then the first half is asked back: {back}.");
    mirror.draw()?;
    mirror.compare()
}

/// The tree, and what must be true of it.
struct Mirror<'a> {
    device: &'a Device,
    nodes: &'a [Node<'a>],
    root: &'a Node<'a>,
    expected: u64,
}

impl Mirror<'_> {
    /// Draws where its pages are. Looking moves none of them.
    fn draw(&self) -> Result<(), Box<dyn Error>> {
        let residency = self.device.residency(self.nodes)?;
        let map = residency.map(WIDTH).glyphs(Glyphs::detect()).indent(6);
        println!("{map}");
        Ok(())
    }

    /// Compares every byte with what was built.
    fn compare(&self) -> Result<(), Box<dyn Error>> {
        let bytes = size_of_val(self.nodes);
        if self.root.checksum(0) != self.expected {
            return Err(format!("the {bytes} bytes of the tree are not what they were").into());
        }
        println!("   The CPU reads the whole tree: all {bytes} bytes as they were.\n");
        Ok(())
    }
}

/// SplitMix64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
