//! Graphs, as the kernel `bfs` walks them.

use super::{Args, SvmError};
use crate::Error;

/// No level: not reached.
const NONE: u32 = u32::MAX;
/// Invocations of a group of the kernel, which has one for each node.
const GROUP: u32 = 64;

/// A graph whose edges are pointers: for [`SvmContext::breadth_first`](crate::SvmContext::breadth_first). Each node is in a box of its own.
///
/// ```
/// # fn main() -> Result<(), hmm_gpu::Error> {
/// let graph = hmm_gpu::Graph::new(4, &[(0, 1), (1, 2)])?; // node 3 is alone
/// assert_eq!(graph.nodes(), 4);
/// assert!(hmm_gpu::Graph::new(4, &[(0, 4)]).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Graph {
    // A box each, as nodes of a graph are that grows: its edges are what holds it together.
    #[allow(clippy::vec_box)]
    nodes: Vec<Box<Node>>,
    // By node: the addresses of its neighbours. `Node::neighbours` is where they begin.
    neighbours: Vec<Box<[usize]>>,
    /// The address of each node.
    addresses: Vec<usize>,
}

/// What the shader takes a node for. Its pointers are addresses here: nothing but the kernel follows them.
#[repr(C)]
#[derive(Debug)]
struct Node {
    neighbours: usize,
    degree: u32,
    level: u32,
}

const _: () = assert!(size_of::<Node>() == 16 && std::mem::offset_of!(Node, level) == 12);

impl Graph {
    /// A graph of so many nodes, with these edges. An edge leads both ways; one that is named twice is one.
    ///
    /// Errors: [`NoSuchNode`](SvmError::NoSuchNode), and [`TooMany`](SvmError::TooMany) nodes: more than 32 bits count.
    pub fn new(nodes: usize, edges: &[(usize, usize)]) -> Result<Self, Error> {
        if u32::try_from(nodes).is_err() {
            let groups = (nodes as u64).div_ceil(GROUP.into());
            return Err(SvmError::TooMany {
                groups,
                group: GROUP,
            }
            .into());
        }
        let mut of_nodes: Vec<Vec<usize>> = vec![Vec::new(); nodes];
        for &(from, to) in edges {
            for (one, other) in [(from, to), (to, from)] {
                let no_node = SvmError::NoSuchNode { node: one, nodes };
                of_nodes.get_mut(one).ok_or(no_node)?.push(other);
            }
        }
        let mut graph = Self::default();
        for _ in 0..nodes {
            let mut node = Box::new(Node {
                neighbours: 0,
                degree: 0,
                level: NONE,
            });
            graph.addresses.push(address(&mut *node));
            graph.nodes.push(node);
        }
        for (node, mut others) in graph.nodes.iter_mut().zip(of_nodes) {
            others.sort_unstable();
            others.dedup();
            let mut pointers: Box<[usize]> =
                others.iter().map(|&other| graph.addresses[other]).collect();
            node.neighbours = address(pointers.as_mut_ptr());
            // No more than there are nodes.
            node.degree = u32::try_from(pointers.len()).unwrap_or(u32::MAX);
            graph.neighbours.push(pointers);
        }
        Ok(graph)
    }

    /// How many nodes it has.
    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Forgets all levels, and gives level 0 to a node.
    pub(crate) fn begin(&mut self, from: usize) -> Result<(), Error> {
        let nodes = self.nodes.len();
        for node in &mut self.nodes {
            node.level = NONE;
        }
        let first = self.nodes.get_mut(from);
        first
            .ok_or(SvmError::NoSuchNode { node: from, nodes })?
            .level = 0;
        Ok(())
    }

    /// What the kernel needs to give nodes their level, if it is this one. It says how many got it.
    pub(crate) fn step<'a>(&'a mut self, level: u32, reached: &'a mut [u32]) -> Args<'a> {
        let mut args = Args::new()
            .read(&self.addresses)
            .write(reached)
            .value(self.addresses.len() as u64)
            .value(level);
        for node in &mut self.nodes {
            args = args.reach_mut(&mut **node);
        }
        for neighbours in &self.neighbours {
            args = args.reach(&neighbours[..]);
        }
        args
    }

    /// The level of each node.
    pub(crate) fn levels(&self) -> Vec<Option<u32>> {
        let levels = self.nodes.iter().map(|node| node.level);
        levels
            .map(|level| (level != NONE).then_some(level))
            .collect()
    }
}

/// An address that the kernel will follow.
fn address<T>(pointer: *mut T) -> usize {
    pointer.expose_provenance()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_pointers_both_ways() {
        let graph = Graph::new(3, &[(0, 2), (2, 0), (1, 1)]).unwrap();
        let at = &graph.addresses;
        let neighbours: Vec<&[usize]> = graph.neighbours.iter().map(|of| &of[..]).collect();
        assert_eq!(neighbours, [&[at[2]][..], &[at[1]], &[at[0]]]);
        for (node, neighbours) in graph.nodes.iter().zip(&graph.neighbours) {
            assert_eq!(node.neighbours, neighbours.as_ptr().addr());
            assert_eq!(node.degree as usize, neighbours.len());
        }
    }

    #[test]
    fn a_node_that_is_not_there_is_named() {
        for edge in [(0, 5), (5, 0)] {
            let error = Graph::new(5, &[edge]).unwrap_err();
            assert_eq!(
                error.to_string(),
                "there is no node 5 in the graph: it has 5, counted from 0"
            );
        }
        let error = Graph::default().begin(0).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Svm(SvmError::NoSuchNode { node: 0, nodes: 0 })
            ),
            "{error}"
        );
    }
}
