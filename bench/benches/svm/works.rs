//! What the kernels work on, and what the CPU says of the result.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::hint::black_box;
use std::sync::mpsc::{channel, Sender};

use hmm_gpu::{Error, Graph, Link, Pod, SharedBuf, SvmBuf, SvmContext};
use hmm_gpu_bench::PAGE;

use super::Sizes;
use crate::common::Random;

/// Data with a kernel.
pub(super) trait Work {
    /// How many bytes there are.
    fn bytes(&self) -> usize;

    /// What a use is.
    fn per(&self) -> &'static str {
        "dispatch"
    }

    /// The CPU touches all of it, which brings it home.
    fn home(&mut self);

    /// Before the first use.
    fn begin(&mut self) {}

    /// A use.
    fn dispatch(&mut self, context: &SvmContext) -> Result<(), Error>;

    /// After the last one: the CPU looks at each page of the result.
    fn end(&mut self);

    /// Compares all of the result with what the CPU computes.
    fn check(&mut self) -> Result<(), String>;
}

/// Looks at each page of it.
fn touch<T: Pod>(memory: &[T]) {
    for value in memory.iter().step_by(PAGE / size_of::<T>()) {
        black_box(*value);
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(
    found: &[T],
    expected: impl Iterator<Item = T>,
) -> Result<(), String> {
    for (n, (found, expected)) in found.iter().zip(expected).enumerate() {
        if *found != expected {
            return Err(format!("element {n} is {found:?}, not {expected:?}"));
        }
    }
    Ok(())
}

/// `y = x + y`, of whole numbers.
pub(super) struct Saxpy {
    x: SharedBuf<f32>,
    y: SharedBuf<f32>,
    kept: Option<(SvmBuf<f32>, SvmBuf<f32>)>,
    uses: u32,
}

impl Saxpy {
    /// In memory of the program, or, with a context, in such as it has.
    pub(super) fn new(floats: usize, keep: Option<&SvmContext>) -> Result<Self, Error> {
        let of = |every: usize| -> Result<_, Error> {
            let mut memory = SharedBuf::zeroed(floats)?;
            for (n, value) in memory.iter_mut().enumerate() {
                *value = (n % every) as f32;
            }
            Ok(memory)
        };
        let kept = |context: &SvmContext| -> Result<_, Error> {
            Ok((context.buffer(floats)?, context.buffer(floats)?))
        };
        Ok(Self {
            x: of(13)?,
            y: of(7)?,
            kept: keep.map(kept).transpose()?,
            uses: 0,
        })
    }
}

impl Work for Saxpy {
    fn bytes(&self) -> usize {
        8 * self.x.len()
    }

    fn home(&mut self) {
        touch(&self.x);
        touch(&self.y);
    }

    fn begin(&mut self) {
        if let Some((x, y)) = &mut self.kept {
            x.copy_from_slice(&self.x);
            y.copy_from_slice(&self.y);
        }
    }

    fn dispatch(&mut self, context: &SvmContext) -> Result<(), Error> {
        self.uses += 1;
        match &mut self.kept {
            Some((x, y)) => context.saxpy(1.0, x, y)?,
            None => context.saxpy(1.0, &self.x, &mut self.y)?,
        };
        Ok(())
    }

    fn end(&mut self) {
        match &self.kept {
            Some((_, y)) => self.y.copy_from_slice(y),
            None => touch(&self.y),
        }
    }

    fn check(&mut self) -> Result<(), String> {
        let uses = self.uses as usize;
        let right = |n: usize| (n % 7 + uses * (n % 13)) as f32;
        equal(&self.y, (0..self.y.len()).map(right))
    }
}

/// `to[i] = from[index[i]]`: some words of each page that is touched, and the pages are at random.
pub(super) struct Gather {
    from: SharedBuf<u32>,
    index: SharedBuf<u32>,
    to: SharedBuf<u32>,
    kept: Option<[SvmBuf<u32>; 3]>,
}

impl Gather {
    /// Words of each page, one after the other.
    const WORDS: usize = 4;

    pub(super) fn new(
        pages: usize,
        touched: usize,
        keep: Option<&SvmContext>,
    ) -> Result<Self, Error> {
        const PAGE_WORDS: usize = PAGE / 4;

        let mut from = SharedBuf::zeroed(pages * PAGE_WORDS)?;
        for (n, word) in (0_u32..).zip(from.iter_mut()) {
            *word = n.wrapping_mul(2_654_435_761);
        }
        let mut index = SharedBuf::zeroed(touched * Self::WORDS)?;
        let mut random = Random(5);
        let order = random.order(pages);
        for (words, page) in index.chunks_mut(Self::WORDS).zip(order) {
            let first = page * PAGE_WORDS + random.below(PAGE_WORDS - Self::WORDS);
            for (n, word) in words.iter_mut().enumerate() {
                *word = (first + n) as u32;
            }
        }
        let len = index.len();
        let kept = |context: &SvmContext| -> Result<_, Error> {
            let buffer = |len| context.buffer(len);
            Ok([buffer(from.len())?, buffer(len)?, buffer(len)?])
        };
        let kept = keep.map(kept).transpose()?;
        Ok(Self {
            from,
            index,
            to: SharedBuf::zeroed(len)?,
            kept,
        })
    }
}

impl Work for Gather {
    fn bytes(&self) -> usize {
        4 * self.from.len()
    }

    fn home(&mut self) {
        touch(&self.from);
        touch(&self.index);
        self.to.fill(0);
    }

    fn begin(&mut self) {
        if let Some([from, index, _]) = &mut self.kept {
            from.copy_from_slice(&self.from);
            index.copy_from_slice(&self.index);
        }
    }

    fn dispatch(&mut self, context: &SvmContext) -> Result<(), Error> {
        match &mut self.kept {
            Some([from, index, to]) => context.gather(from, index, to)?,
            None => context.gather(&self.from, &self.index, &mut self.to)?,
        };
        Ok(())
    }

    fn end(&mut self) {
        match &self.kept {
            Some([_, _, to]) => self.to.copy_from_slice(to),
            None => touch(&self.to),
        }
    }

    fn check(&mut self) -> Result<(), String> {
        let right = self.index.iter().map(|&at| self.from[at as usize]);
        equal(&self.to, right)
    }
}

/// What consists of boxes. A thread makes it that does nothing else, so that no page of it is the Vulkan driver's too, or this thread's: such a page
/// would be waited for while a kernel uses it. That thread's heap is nobody else's as long as it lives.
pub(super) struct Boxes {
    pub(super) lists: Lists,
    pub(super) search: Search,
    _lives: Sender<()>,
}

impl Boxes {
    pub(super) fn new(sizes: &Sizes) -> Result<Self, Box<dyn StdError>> {
        let (to, from) = channel();
        let (lives, ends) = channel();
        let (lists, links, nodes) = (sizes.lists, sizes.links, sizes.nodes);
        std::thread::spawn(move || {
            let made = Search::new(nodes).map(|search| (Lists::new(lists, links), search));
            // Nobody waits for it any more, or it has come: then until nobody needs it.
            if to.send(made).is_ok() {
                let _ = ends.recv();
            }
        });
        let (lists, search) = from.recv()??;
        Ok(Self {
            lists,
            search,
            _lives: lives,
        })
    }
}

/// The sums of lists of boxes.
pub(super) struct Lists {
    heads: Vec<Option<Box<Link>>>,
    links: usize,
    sums: Vec<u64>,
}

impl Lists {
    pub(super) fn new(lists: usize, links: usize) -> Self {
        let list = |n| Link::list((0..links as u64).map(|value| value * (n + 1)));
        Self {
            heads: (0..lists as u64).map(list).collect(),
            links,
            sums: Vec::new(),
        }
    }
}

impl Work for Lists {
    fn bytes(&self) -> usize {
        self.heads.len() * (8 + self.links * size_of::<Link>())
    }

    fn home(&mut self) {
        for link in self.heads.iter().flat_map(Link::links) {
            black_box(link.value);
        }
        self.sums.clear();
    }

    fn dispatch(&mut self, context: &SvmContext) -> Result<(), Error> {
        (self.sums, _) = context.sum_lists(&self.heads)?;
        Ok(())
    }

    /// They are the CPU's.
    fn end(&mut self) {}

    fn check(&mut self) -> Result<(), String> {
        if self.sums.len() != self.heads.len() {
            return Err("there are no sums".to_owned());
        }
        let sum = |head| Link::links(head).map(|link| link.value).sum();
        equal(&self.sums, self.heads.iter().map(sum))
    }
}

/// A breadth-first search, which is a dispatch for each distance. The CPU resets all nodes before, and reads them after.
pub(super) struct Search {
    graph: Graph,
    expected: Vec<Option<u32>>,
    found: Vec<Option<u32>>,
}

impl Search {
    /// Of two edges a node, at random.
    pub(super) fn new(nodes: usize) -> Result<Self, Error> {
        let mut random = Random(3);
        let edges: Vec<(usize, usize)> = (0..2 * nodes)
            .map(|_| (random.below(nodes), random.below(nodes)))
            .collect();
        Ok(Self {
            graph: Graph::new(nodes, &edges)?,
            expected: on_the_cpu(nodes, &edges),
            found: Vec::new(),
        })
    }
}

impl Work for Search {
    fn bytes(&self) -> usize {
        // A node and its address, and four pointers to neighbours.
        self.graph.nodes() * (16 + 8 + 4 * 8)
    }

    fn per(&self) -> &'static str {
        "search"
    }

    /// A search does it.
    fn home(&mut self) {
        self.found.clear();
    }

    fn dispatch(&mut self, context: &SvmContext) -> Result<(), Error> {
        (self.found, _) = context.breadth_first(&mut self.graph, 0)?;
        Ok(())
    }

    fn end(&mut self) {}

    fn check(&mut self) -> Result<(), String> {
        if self.found.len() != self.expected.len() {
            return Err("there are no distances".to_owned());
        }
        equal(&self.found, self.expected.iter().copied())
    }
}

fn on_the_cpu(nodes: usize, edges: &[(usize, usize)]) -> Vec<Option<u32>> {
    let mut neighbours = vec![Vec::new(); nodes];
    for &(one, other) in edges {
        neighbours[one].push(other);
        neighbours[other].push(one);
    }
    let mut levels = vec![None; nodes];
    let mut queue = VecDeque::from([(0, 0)]);
    while let Some((node, level)) = queue.pop_front() {
        if levels[node].is_none() {
            levels[node] = Some(level);
            queue.extend(neighbours[node].iter().map(|&other| (other, level + 1)));
        }
    }
    levels
}
