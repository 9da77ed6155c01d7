//! Kernels: compute shaders that use `hmm_svm.glsl`.

use std::fmt;
use std::sync::Arc;

use super::spirv::Module;
use super::{SvmContext, SvmError};
use crate::sys::vulkan::Pipeline;
use crate::Error;

/// A kernel that comes with the library. The source of each is in `shaders/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Shipped {
    /// `y[i] = a * x[i] + y[i]`, of `f32`.
    Saxpy,
    /// The sum of `u32`, as a `u64`.
    Reduce,
    /// How often each lowest byte is among `u32`, with atomics.
    Histogram,
    /// The sums of linked lists.
    List,
    /// Looks up keys in a binary search tree.
    Tree,
    /// A step of a breadth-first search.
    Bfs,
    /// `to[i] = from[index[i]]`, of `u32`.
    Gather,
}

impl Shipped {
    /// All of them.
    pub const ALL: [Shipped; 7] = [
        Shipped::Saxpy,
        Shipped::Reduce,
        Shipped::Histogram,
        Shipped::List,
        Shipped::Tree,
        Shipped::Bfs,
        Shipped::Gather,
    ];

    /// Its name: that of its source, `shaders/NAME.comp`.
    pub fn name(self) -> &'static str {
        match self {
            Shipped::Saxpy => "saxpy",
            Shipped::Reduce => "reduce",
            Shipped::Histogram => "histogram",
            Shipped::List => "list",
            Shipped::Tree => "tree",
            Shipped::Bfs => "bfs",
            Shipped::Gather => "gather",
        }
    }

    /// It as SPIR-V.
    pub fn spirv(self) -> &'static [u8] {
        match self {
            Shipped::Saxpy => include_bytes!("../../shaders/saxpy.spv"),
            Shipped::Reduce => include_bytes!("../../shaders/reduce.spv"),
            Shipped::Histogram => include_bytes!("../../shaders/histogram.spv"),
            Shipped::List => include_bytes!("../../shaders/list.spv"),
            Shipped::Tree => include_bytes!("../../shaders/tree.spv"),
            Shipped::Bfs => include_bytes!("../../shaders/bfs.spv"),
            Shipped::Gather => include_bytes!("../../shaders/gather.spv"),
        }
    }

    /// How many items an invocation takes.
    pub(crate) fn items(self) -> u32 {
        match self {
            Shipped::Saxpy | Shipped::Reduce | Shipped::Histogram => 16,
            _ => 1,
        }
    }
}

/// How many groups run: in one dimension, or three.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid([u32; 3]);

impl Grid {
    pub(crate) fn x(self) -> u32 {
        self.0[0].max(1)
    }

    pub(crate) fn y(self) -> u32 {
        self.0[1].max(1)
    }
}

impl From<u32> for Grid {
    fn from(groups: u32) -> Self {
        Self([groups, 1, 1])
    }
}

impl From<[u32; 3]> for Grid {
    fn from(groups: [u32; 3]) -> Self {
        Self(groups)
    }
}

/// A compute shader, ready to run in the context that made it.
#[derive(Clone)]
pub struct Kernel {
    name: Arc<str>,
    module: Module,
    mode: u32,
    pub(crate) pipeline: Arc<Pipeline>,
}

impl Kernel {
    pub(crate) fn new(name: &str, module: Module, mode: u32, pipeline: Pipeline) -> Self {
        Self {
            name: name.into(),
            module,
            mode,
            pipeline: Arc::new(pipeline),
        }
    }

    /// What it is called in errors and logs.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Invocations of a group.
    pub fn group(&self) -> u32 {
        self.module.group
    }

    /// How many groups it takes for so many items, if an invocation does `each` of them.
    ///
    /// Errors: [`TooMany`](SvmError::TooMany).
    pub fn groups(&self, items: usize, each: u32) -> Result<u32, Error> {
        let of_a_group = u64::from(each.max(1)) * u64::from(self.group());
        let groups = (items as u64).div_ceil(of_a_group);
        u32::try_from(groups).map_err(|_| self.too_many(groups))
    }

    /// How it translates addresses.
    pub(crate) fn mode(&self) -> u32 {
        self.mode
    }

    pub(crate) fn saves(&self) -> bool {
        self.module.saves
    }

    /// How many groups a grid has, if they can be counted: invocations have numbers of 32 bits.
    pub(crate) fn check(&self, grid: Grid) -> Result<u32, Error> {
        let groups = grid
            .0
            .iter()
            .fold(1_u64, |all, &n| all.saturating_mul(u64::from(n)));
        u32::try_from(groups)
            .ok()
            .filter(|groups| groups.checked_mul(self.group()).is_some())
            .ok_or_else(|| self.too_many(groups))
    }

    fn too_many(&self, groups: u64) -> Error {
        SvmError::TooMany {
            groups,
            group: self.group(),
        }
        .into()
    }

    pub(crate) fn belongs_to(&self, context: &SvmContext) -> Result<(), Error> {
        if Arc::ptr_eq(&self.pipeline.gpu, &context.gpu) {
            return Ok(());
        }
        Err(SvmError::Foreign {
            kernel: self.name.to_string(),
        }
        .into())
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("name", &self.name)
            .field("module", &self.module)
            .finish()
    }
}
