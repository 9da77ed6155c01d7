//! Kernels that come with the library, where Rust's types say all that they need; and pipelines.

use crate::svm::context::Translated;
use crate::svm::spirv::{self, Module};
use crate::svm::{Args, DispatchStats, Graph, Kernel, Link, Shipped, SvmContext};
use crate::sys::svm::driver::Driver;
use crate::sys::svm::Backend;
use crate::sys::vulkan::{External, Gpu, Pipeline};
use crate::{Device, Error, SharedBuf};

use std::sync::Arc;

impl SvmContext {
    /// A kernel of a program's own: a compute shader as SPIR-V, of an entry point `main`, that includes `hmm_svm.glsl`. `name` is for errors.
    ///
    /// Errors: [`NotAKernel`](crate::SvmError::NotAKernel), [`Lacks`](crate::SvmError::Lacks), [`Vulkan`](crate::SvmError::Vulkan).
    ///
    /// # Safety
    ///
    /// It is valid SPIR-V for Vulkan 1.2: `spirv-val --target-env vulkan1.2` finds nothing. Vulkan does with other what it will.
    pub unsafe fn kernel_from_spirv(&self, name: &str, spirv: &[u8]) -> Result<Kernel, Error> {
        let words = spirv::words(spirv)?;
        let module = self.look_at(&words)?;
        // SAFETY: the caller's promise.
        unsafe { self.make(name, module, &words) }
    }

    /// A kernel that comes with the library.
    pub(crate) fn make_shipped(&self, shipped: Shipped) -> Result<Kernel, Error> {
        let words = spirv::words(shipped.spirv())?;
        let module = self.look_at(&words)?;
        // SAFETY: the tests hold what is shipped against its source, and have `spirv-val` check it.
        unsafe { self.make(shipped.name(), module, &words) }
    }

    /// # Safety
    ///
    /// The module is valid.
    unsafe fn make(&self, name: &str, module: Module, words: &[u32]) -> Result<Kernel, Error> {
        let mode = self.strategy().mode();
        // SAFETY: the caller's promise; what it asks for has been looked at.
        let pipeline = unsafe { Pipeline::new(&self.gpu, words, mode) }?;
        let kernel = Kernel::new(name, module, mode, pipeline);
        self.warm(&kernel)?;
        Ok(kernel)
    }

    fn of_items(
        &self,
        shipped: Shipped,
        items: usize,
        args: Args<'_>,
    ) -> Result<DispatchStats, Error> {
        let kernel = self.kernel(shipped)?;
        let groups = kernel.groups(items, shipped.items())?;
        // SAFETY: each caller below borrows what the kernel touches, as it does, and says how long it is. What pointers lead to is in `Link` and
        // `Graph`, which are borrowed too, and whose layout is the kernel's.
        unsafe { self.dispatch(&kernel, args, groups) }
    }

    /// `y[i] = a * x[i] + y[i]`.
    ///
    /// Errors: [`Lengths`](Error::Lengths), and those of a dispatch.
    pub fn saxpy(&self, a: f32, x: &[f32], y: &mut [f32]) -> Result<DispatchStats, Error> {
        same_length(x.len(), y.len())?;
        let count = y.len();
        let args = Args::new().read(x).write(y).value(count as u64).value(a);
        self.of_items(Shipped::Saxpy, count, args)
    }

    /// The sum.
    ///
    /// Errors: those of a dispatch.
    pub fn sum(&self, words: &[u32]) -> Result<(u64, DispatchStats), Error> {
        // On the heap: the stack of who dispatches must not move to VRAM.
        let mut sum = vec![0_u64];
        let args = Args::new()
            .read(words)
            .write(&mut sum)
            .value(words.len() as u64);
        let stats = self.of_items(Shipped::Reduce, words.len(), args)?;
        Ok((sum[0], stats))
    }

    /// Adds to each of the counts how many of the words have it as their lowest byte.
    ///
    /// Errors: those of a dispatch.
    pub fn histogram(
        &self,
        words: &[u32],
        counts: &mut [u32; 256],
    ) -> Result<DispatchStats, Error> {
        let args = Args::new()
            .read(words)
            .write(counts)
            .value(words.len() as u64);
        self.of_items(Shipped::Histogram, words.len(), args)
    }

    /// `to[i] = from[index[i]]`, or 0 where there is no such element.
    ///
    /// Errors: [`Lengths`](Error::Lengths), and those of a dispatch.
    pub fn gather(
        &self,
        from: &[u32],
        index: &[u32],
        to: &mut [u32],
    ) -> Result<DispatchStats, Error> {
        same_length(index.len(), to.len())?;
        let count = to.len();
        let args = Args::new()
            .read(from)
            .read(index)
            .write(to)
            .value(count as u64)
            .value(from.len() as u64);
        self.of_items(Shipped::Gather, count, args)
    }

    /// The sum of each list's values, wrapping around.
    ///
    /// Errors: those of a dispatch.
    pub fn sum_lists(
        &self,
        heads: &[Option<Box<Link>>],
    ) -> Result<(Vec<u64>, DispatchStats), Error> {
        // On pages of their own: what this thread touches meanwhile must not lie beside them.
        let mut sums = SharedBuf::<u64>::zeroed(heads.len())?;
        let mut args = Args::new()
            .read(heads)
            .write(&mut sums)
            .value(heads.len() as u64);
        // Only where they must be named: to look for them is to touch them.
        if self.strategy().needs_names() {
            for link in heads.iter().flat_map(Link::links) {
                args = args.reach(link);
            }
        }
        let stats = self.of_items(Shipped::List, heads.len(), args)?;
        Ok((sums.to_vec(), stats))
    }

    /// How far each node is from one of them, in edges; none if no edges lead there. One dispatch a level, until no node gets it.
    ///
    /// Errors: [`NoSuchNode`](crate::SvmError::NoSuchNode), and those of a dispatch.
    pub fn breadth_first(
        &self,
        graph: &mut Graph,
        from: usize,
    ) -> Result<(Vec<Option<u32>>, DispatchStats), Error> {
        graph.begin(from)?;
        let mut all = DispatchStats::new(self.strategy());
        for level in 1.. {
            let mut reached = SharedBuf::<u32>::zeroed(1)?;
            let nodes = graph.nodes();
            let args = graph.step(level, &mut reached);
            all.add(&self.of_items(Shipped::Bfs, nodes, args)?);
            if reached[0] == 0 {
                break;
            }
        }
        Ok((graph.levels(), all))
    }
}

fn same_length(from: usize, to: usize) -> Result<(), Error> {
    if from == to {
        Ok(())
    } else {
        Err(Error::Lengths { from, to })
    }
}

impl Translated {
    /// Imports the memory of a backend.
    pub(crate) fn new(gpu: &Arc<Gpu>, backend: Box<dyn Backend>) -> Result<Self, Error> {
        let memory = backend.memory();
        // SAFETY: the memory stays as long as the backend (its promise), which is dropped after what is imported.
        let memory = unsafe { External::import(gpu, memory.start, memory.bytes) }?;
        Ok(Self { memory, backend })
    }

    /// Has memory of the Vulkan device be VRAM of the driver, which is asked for that through one of its devices. Returns the new device, too.
    pub(crate) fn exported(
        gpu: &Arc<Gpu>,
        through: &Device,
        bytes: usize,
        deadline_ms: u32,
    ) -> Result<(Self, Arc<Device>), Error> {
        let (memory, dma_buf) = External::export(gpu, bytes)?;
        let device = Arc::new(through.import_dma_buf(dma_buf, bytes)?);
        let backend = Box::new(Driver::given(&device, bytes, deadline_ms));
        Ok((Self { memory, backend }, device))
    }
}
