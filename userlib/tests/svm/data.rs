//! Data for kernels, what they must make of it, and contexts to run them in.

use std::sync::atomic::AtomicU32;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmm_gpu::{Args, DispatchStats, Error, Kernel, Shipped, Strategy, SvmContext};

use crate::software::Software;

/// Whether there is a Vulkan device. If there is none, that is a failure, unless it was said that there is none.
pub(crate) fn has_vulkan() -> bool {
    let doctor = hmm_gpu::doctor();
    let found = doctor
        .devices
        .as_ref()
        .is_ok_and(|devices| !devices.is_empty());
    if !found && std::env::var_os("HMM_GPU_WITHOUT_VULKAN").is_some() {
        println!("left out: {doctor}");
        return false;
    }
    assert!(found, "{doctor}");
    true
}

/// One test at a time: a device of threads shows more of itself to tests that have it to themselves.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A context for each strategy, the translated one with a pool of so many pages.
pub(crate) fn contexts(pages: usize) -> Vec<SvmContext> {
    if !has_vulkan() {
        return Vec::new();
    }
    Strategy::ALL
        .into_iter()
        // What is lavapipe's.
        .filter(|&strategy| wanted().is_none() || strategy != Strategy::Native)
        .map(|strategy| context(strategy, pages))
        .collect()
}

/// The device that was asked for, by a part of its name: a real one, on a system that has no validation layers. Otherwise lavapipe.
fn wanted() -> Option<String> {
    std::env::var("HMM_GPU_VULKAN_DEVICE").ok()
}

pub(crate) fn context(strategy: Strategy, pages: usize) -> SvmContext {
    let builder = SvmContext::builder().strategy(strategy);
    let builder = match wanted() {
        Some(name) => builder.device(name),
        None => builder.validation(true),
    };
    let builder = match strategy {
        Strategy::Translated => builder.backend(Box::new(Software::new(pages))),
        _ => builder,
    };
    builder.build().unwrap()
}

/// Numbers from a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        let mixed = self.0 ^ (self.0 >> 33);
        mixed.wrapping_mul(0xff51_afd7_ed55_8ccd) ^ (mixed >> 29)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn words(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.next() as u32).collect()
    }
}

/// `saxpy`, every element checked. Whole numbers, so that there is one right answer.
pub(crate) fn saxpy(context: &SvmContext, n: usize) -> DispatchStats {
    let x: Vec<f32> = (0..n).map(|i| (i % 1000) as f32).collect();
    let mut y: Vec<f32> = (0..n).map(|i| (i % 777) as f32).collect();
    let stats = context.saxpy(3.0, &x, &mut y).unwrap();
    for (i, y) in y.into_iter().enumerate() {
        assert_eq!(
            y,
            3.0 * (i % 1000) as f32 + (i % 777) as f32,
            "{context}: element {i} of {n}"
        );
    }
    stats
}

/// A list as anyone would write it.
#[repr(C)]
pub(crate) struct Link {
    pub(crate) next: Option<Box<Link>>,
    pub(crate) value: u64,
}

/// Lists of links, each in a box of its own, and the sums of their values.
pub(crate) struct Lists {
    pub(crate) heads: Vec<Option<Box<Link>>>,
    pub(crate) expected: Vec<u64>,
}

impl Lists {
    pub(crate) fn new(lists: usize, links: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut heads: Vec<Option<Box<Link>>> = (0..lists).map(|_| None).collect();
        let mut expected = vec![0_u64; lists];
        for _ in 0..links {
            let at = random.below(lists);
            let value = random.next();
            expected[at] = expected[at].wrapping_add(value);
            let next = heads[at].take();
            heads[at] = Some(Box::new(Link { next, value }));
        }
        Self { heads, expected }
    }

    fn links(&self) -> impl Iterator<Item = &Link> {
        self.heads
            .iter()
            .flat_map(|head| std::iter::successors(head.as_deref(), |link| link.next.as_deref()))
    }

    /// Walks them, and checks the sums.
    pub(crate) fn walk(&self, context: &SvmContext) -> DispatchStats {
        let kernel = context.kernel(Shipped::List).unwrap();
        let mut sums = vec![u64::MAX; self.heads.len()];
        let mut args = Args::new()
            .read(&self.heads)
            .write(&mut sums)
            .value(self.heads.len() as u64);
        for link in self.links() {
            args = args.reach(link);
        }
        let groups = kernel.groups(self.heads.len(), 1).unwrap();
        // SAFETY: a link is what the kernel takes it for, { next, value }, and all are borrowed.
        let stats = unsafe { context.dispatch(&kernel, args, groups) }.unwrap();
        assert_eq!(sums, self.expected, "{context}");
        stats
    }
}

impl Drop for Lists {
    /// One by one, since to drop the first would drop the next within.
    fn drop(&mut self) {
        for head in &mut self.heads {
            let mut next = head.take();
            while let Some(mut link) = next {
                next = link.next.take();
            }
        }
    }
}

/// A tree as anyone would write it.
#[repr(C)]
pub(crate) struct Leaf {
    children: [Option<Box<Leaf>>; 2],
    key: u64,
    value: u64,
}

/// Looks up keys in a tree, half of which are in it.
pub(crate) fn tree(context: &SvmContext, n: usize) -> DispatchStats {
    let mut random = Random(5);
    let mut root: Option<Box<Leaf>> = None;
    let mut keys = Vec::new();
    let mut expected = Vec::new();
    for i in 0..n {
        let key = random.next() | 1;
        keys.extend([key, key & !1]);
        expected.extend([i as u64, u64::MAX]);
        let mut place = &mut root;
        while let Some(leaf) = place {
            place = &mut leaf.children[usize::from(key >= leaf.key)];
        }
        *place = Some(Box::new(Leaf {
            children: [None, None],
            key,
            value: i as u64,
        }));
    }
    let mut values = vec![7_u64; keys.len()];
    let kernel = context.kernel(Shipped::Tree).unwrap();
    let pointer: *const Leaf = root.as_deref().unwrap();
    let mut args = Args::new()
        .pointer(pointer)
        .read(&keys)
        .write(&mut values)
        .value(keys.len() as u64);
    let mut left = vec![root.as_deref().unwrap()];
    while let Some(leaf) = left.pop() {
        args = args.reach(leaf);
        left.extend(leaf.children.iter().filter_map(Option::as_deref));
    }
    let groups = kernel.groups(keys.len(), 1).unwrap();
    // SAFETY: a leaf is what the kernel takes it for, { left, right, key, value }, and all are borrowed.
    let stats = unsafe { context.dispatch(&kernel, args, groups) }.unwrap();
    assert_eq!(values, expected, "{context}");
    stats
}

/// A node of a graph.
#[repr(C)]
struct Node {
    neighbours: *const *const Node,
    degree: u32,
    level: AtomicU32,
}

/// A breadth-first search, compared with one of the CPU's.
pub(crate) fn bfs(context: &SvmContext, n: usize) {
    let mut random = Random(11);
    let edges: Vec<Vec<usize>> = (0..n)
        .map(|_| (0..1 + random.below(4)).map(|_| random.below(n)).collect())
        .collect();
    let mut levels = vec![u32::MAX; n];
    levels[0] = 0;
    for level in 1.. {
        let before = levels.clone();
        for (node, edges) in edges.iter().enumerate() {
            if before[node] == u32::MAX && edges.iter().any(|&to| before[to] == level - 1) {
                levels[node] = level;
            }
        }
        if before == levels {
            break;
        }
    }
    let mut nodes: Vec<Box<Node>> = (0..n)
        .map(|i| {
            Box::new(Node {
                neighbours: std::ptr::null(),
                degree: 0,
                level: AtomicU32::new(if i == 0 { 0 } else { u32::MAX }),
            })
        })
        .collect();
    let pointers: Vec<*mut Node> = nodes.iter_mut().map(|node| &raw mut **node).collect();
    let neighbours: Vec<Vec<*const Node>> = edges
        .iter()
        .map(|edges| edges.iter().map(|&to| pointers[to].cast_const()).collect())
        .collect();
    for (node, neighbours) in nodes.iter_mut().zip(&neighbours) {
        node.neighbours = neighbours.as_ptr();
        node.degree = neighbours.len() as u32;
    }
    let kernel = context.kernel(Shipped::Bfs).unwrap();
    for level in 1_u32.. {
        let mut reached = vec![0_u32];
        let mut args = Args::new()
            .read(&pointers)
            .write(&mut reached)
            .value(n as u64)
            .value(level);
        for node in &mut nodes {
            args = args.reach_mut(&mut **node);
        }
        for neighbours in &neighbours {
            args = args.reach(&neighbours[..]);
        }
        // SAFETY: a node is what the kernel takes it for, { neighbours, degree, level }, and all are borrowed.
        unsafe { context.dispatch(&kernel, args, kernel.groups(n, 1).unwrap()) }.unwrap();
        let now = levels.iter().filter(|&&of| of == level).count();
        assert_eq!(
            reached[0] as usize, now,
            "{context}: nodes of level {level}"
        );
        if now == 0 {
            break;
        }
    }
    let found: Vec<u32> = nodes.iter_mut().map(|node| *node.level.get_mut()).collect();
    assert_eq!(found, levels, "{context}");
}

/// Counts, sums and gathers, each compared with the CPU's.
pub(crate) fn words(context: &SvmContext, n: usize) {
    let mut random = Random(7);
    let words = random.words(n);
    let mut counts = Box::new([1_u32; 256]);
    let mut expected = [1_u32; 256];
    for word in &words {
        expected[(word & 255) as usize] += 1;
    }
    context.histogram(&words, &mut counts).unwrap();
    assert_eq!(*counts, expected, "{context}");

    let sum: u64 = words.iter().map(|&word| u64::from(word)).sum();
    assert_eq!(context.sum(&words).unwrap().0, sum, "{context}");

    let index: Vec<u32> = (0..n / 3).map(|_| random.below(n + 2) as u32).collect();
    let mut to = vec![9; index.len()];
    context.gather(&words, &index, &mut to).unwrap();
    let expected: Vec<u32> = index
        .iter()
        .map(|&i| words.get(i as usize).copied().unwrap_or(0))
        .collect();
    assert_eq!(to, expected, "{context}");
}

/// A kernel made for a test, from `userlib/tests/svm/NAME.comp`.
pub(crate) fn compiled(context: &SvmContext, name: &str) -> Result<Kernel, Error> {
    let spirv = crate::shaders::compile(&format!("userlib/tests/svm/{name}.comp"));
    // SAFETY: `compile` has it checked.
    unsafe { context.kernel_from_spirv(name, &spirv) }
}
