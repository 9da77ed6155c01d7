//! A Vulkan device, with a way to the program's memory.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use super::buf::Registry;
use super::spirv::Module;
use super::{choose, DispatchStats, Grid, Kernel, Shipped, Strategy, SvmBuf, SvmError};
use crate::sys::svm::{Backend, MappedRange};
use crate::sys::vulkan::{Buffer, External, Facts, Gpu, Place};
use crate::{Device, Error, Pod};

/// Faults that a round reports at most.
pub(crate) const FAULTS: u32 = 8192;
/// Where the device reads what is nowhere: zeroes, from any place in a page on for as long as a span may be, and a value.
const NOWHERE_BYTES: usize = 4096 + 4096 + 64;
/// A word for each place of the filter of what was noted.
const FILTER_BYTES: usize = 4 * 8192;
const CONTROL_BYTES: usize = 128;
const DEADLINE_MS: u32 = 10_000;

/// Told of each round of each dispatch.
pub(crate) type Progress = dyn Fn(&DispatchStats) + Send + Sync;

/// Runs compute shaders on the program's own memory, by the pointers that it has.
///
/// One interface for devices that differ in how they reach that memory: see [`Strategy`]. Kernels are written once, with
/// `hmm_svm.glsl`. Several threads may share a context; dispatches wait for one another.
///
/// ```no_run
/// use hmm_gpu::SvmContext;
///
/// # fn main() -> Result<(), hmm_gpu::Error> {
/// let context = SvmContext::new()?;
/// println!("{context}"); // translated, on llvmpipe (LLVM 19.1.7, 256 bits)
/// let x = vec![1.0_f32; 1 << 20];
/// let mut y = vec![2.0_f32; 1 << 20];
/// println!("{}", context.saxpy(3.0, &x, &mut y)?);
/// assert_eq!(y[7], 5.0);
/// # Ok(())
/// # }
/// ```
pub struct SvmContext {
    pub(crate) work: Mutex<Work>,
    kernels: Mutex<Vec<(Shipped, Kernel)>>,
    total: Mutex<DispatchStats>,
    registry: Arc<Registry>,
    strategy: Strategy,
    pub(crate) deadline_ms: u32,
    driver: Option<Arc<Device>>,
    progress: Option<Box<Progress>>,
    pub(crate) gpu: Arc<Gpu>,
}

/// What dispatches use one after the other.
pub(crate) struct Work {
    pub(crate) control: Buffer,
    pub(crate) outcome: Buffer,
    pub(crate) nowhere: Buffer,
    pub(crate) filter: Buffer,
    pub(crate) args: Buffer,
    pub(crate) list: Buffer,
    /// A word an invocation. All zero whenever nothing is under way, unless a dispatch failed.
    pub(crate) missed: Buffer,
    pub(crate) missed_is_zero: bool,
    pub(crate) saved: Option<Buffer>,
    pub(crate) translated: Option<Translated>,
}

/// The page table that kernels walk, and the memory that it is in.
pub(crate) struct Translated {
    // First, since the memory is the backend's, where it is not Vulkan's own.
    pub(crate) memory: External,
    pub(crate) backend: Box<dyn Backend>,
}

impl Work {
    pub(super) fn new(gpu: &Arc<Gpu>, translated: Option<Translated>) -> Result<Self, Error> {
        let buffer = |name, bytes, place| Buffer::new(gpu, name, bytes, place);
        let mut work = Self {
            control: buffer("control", CONTROL_BYTES, Place::Host)?,
            outcome: buffer("outcome", 16 + 16 * FAULTS as usize, Place::Back)?,
            nowhere: buffer("nowhere", NOWHERE_BYTES, Place::Host)?,
            filter: buffer("filter", FILTER_BYTES, Place::Host)?,
            args: buffer("arguments", 256, Place::Host)?,
            list: buffer("groups", 1024, Place::Host)?,
            missed: buffer("missed", 4096, Place::Back)?,
            missed_is_zero: false,
            saved: None,
            translated,
        };
        work.nowhere.bytes_mut().fill(0);
        Ok(work)
    }

    /// Makes room for a dispatch.
    pub(crate) fn make_room(
        &mut self,
        gpu: &Arc<Gpu>,
        kernel: &Kernel,
        groups: u32,
        args: usize,
    ) -> Result<(), Error> {
        let grow = |buffer: &mut Buffer, name, bytes: usize, place| {
            let grown = buffer.len() < bytes;
            if grown {
                *buffer = Buffer::new(gpu, name, bytes, place)?;
            }
            Ok::<_, Error>(grown)
        };
        grow(&mut self.args, "arguments", args, Place::Host)?;
        if kernel.mode() == Strategy::Native.mode() {
            return Ok(());
        }
        let invocations = groups as usize * kernel.group() as usize;
        grow(&mut self.list, "groups", 4 * groups as usize, Place::Host)?;
        if grow(&mut self.missed, "missed", 4 * invocations, Place::Back)? || !self.missed_is_zero {
            self.missed.bytes_mut().fill(0);
            self.missed_is_zero = true;
        }
        let bytes = 16 * invocations;
        if kernel.saves() && self.saved.as_ref().is_none_or(|saved| saved.len() < bytes) {
            self.saved = Some(Buffer::new(gpu, "saved", bytes, Place::Device)?);
        }
        Ok(())
    }
}

impl SvmContext {
    /// The best there is: see [`SvmBuilder::build`].
    pub fn new() -> Result<Self, Error> {
        Self::builder().build()
    }

    /// To say which device, which strategy, and more.
    pub fn builder() -> SvmBuilder {
        SvmBuilder::default()
    }

    /// How its kernels reach memory.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// The name of its Vulkan device.
    pub fn device_name(&self) -> &str {
        &self.gpu.facts.name
    }

    /// The driver's device that its pages are on, for hints ([`Device::prefetch`], [`Device::advise`]): of a translated context
    /// that was not given a backend.
    pub fn driver(&self) -> Option<&Device> {
        self.driver.as_deref()
    }

    /// What all its dispatches did, those that did not fail.
    pub fn stats(&self) -> DispatchStats {
        *self.total.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What Vulkan's validation layers have said in this process, if [they were asked for](SvmBuilder::validation). Nothing, if all is well.
    pub fn validation_messages(&self) -> Vec<String> {
        self.gpu.messages()
    }

    /// A kernel that comes with the library. The first time, the device's driver compiles it, which may take a while.
    ///
    /// Errors: [`Lacks`](SvmError::Lacks) if it needs what the device does not have.
    pub fn kernel(&self, shipped: Shipped) -> Result<Kernel, Error> {
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernel)) = kernels.iter().find(|(of, _)| *of == shipped) {
            return Ok(kernel.clone());
        }
        let kernel = self.make_shipped(shipped)?;
        kernels.push((shipped, kernel.clone()));
        Ok(kernel)
    }

    /// What has to be known of a kernel, if the device can run it.
    pub(crate) fn look_at(&self, words: &[u32]) -> Result<Module, Error> {
        let module = Module::parse(words)?;
        let facts = &self.gpu.facts;
        let lacks = |what: &str| SvmError::Lacks {
            device: facts.name.clone(),
            what: what.to_owned(),
        };
        if module.atomic64 && !facts.atomic64 {
            return Err(lacks("atomic operations on 64 bits (shaderBufferInt64Atomics)").into());
        }
        if module.float64 && !facts.float64 {
            return Err(lacks("floats of 64 bits (shaderFloat64)").into());
        }
        Ok(module)
    }

    /// `len` values, all zero, in memory that the device reaches where it is, with any strategy but
    /// [`Translated`](Strategy::Translated): no bytes of it are copied for a dispatch.
    ///
    /// Errors: [`Vulkan`](SvmError::Vulkan) if there is no memory for it.
    pub fn buffer<T: Pod>(&self, len: usize) -> Result<SvmBuf<T>, Error> {
        SvmBuf::new(&self.gpu, &self.registry, len)
    }

    pub(crate) fn mapped_ranges(&self) -> Vec<MappedRange> {
        self.registry.ranges()
    }

    pub(crate) fn report(&self, stats: &DispatchStats) {
        if let Some(progress) = &self.progress {
            progress(stats);
        }
    }

    pub(crate) fn count(&self, stats: &DispatchStats) {
        self.total
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(stats);
    }

    pub(crate) fn assemble(
        gpu: Arc<Gpu>,
        strategy: Strategy,
        translated: Option<Translated>,
        driver: Option<Arc<Device>>,
        builder: SvmBuilder,
    ) -> Result<Self, Error> {
        let context = Self {
            work: Mutex::new(Work::new(&gpu, translated)?),
            kernels: Mutex::default(),
            total: Mutex::new(DispatchStats::new(strategy)),
            registry: Arc::default(),
            strategy,
            deadline_ms: builder.deadline(),
            driver,
            progress: builder.progress,
            gpu,
        };
        tracing::info!(%context, "a context");
        Ok(context)
    }
}

impl fmt::Display for SvmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, on {}", self.strategy, self.device_name())
    }
}

impl fmt::Debug for SvmContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvmContext")
            .field("strategy", &self.strategy)
            .field("gpu", &self.gpu)
            .finish_non_exhaustive()
    }
}

/// Says what a [`SvmContext`] is to be.
#[derive(Default)]
pub struct SvmBuilder {
    pub(crate) device: Option<String>,
    pub(crate) strategy: Option<Strategy>,
    pub(crate) validation: bool,
    pub(crate) shares_page_tables: bool,
    pub(crate) driver: Option<Device>,
    pub(crate) backend: Option<Box<dyn Backend>>,
    pub(crate) pool_bytes: Option<usize>,
    pub(crate) exported: bool,
    pub(crate) deadline_ms: Option<u32>,
    pub(crate) progress: Option<Box<Progress>>,
}

impl SvmBuilder {
    /// The Vulkan device: by a part of its name, without regard to case. Otherwise the first that can be used.
    pub fn device(self, name: impl Into<String>) -> Self {
        Self {
            device: Some(name.into()),
            ..self
        }
    }

    /// The strategy. Otherwise the first of [`Strategy::ALL`] that is available.
    pub fn strategy(self, strategy: Strategy) -> Self {
        Self {
            strategy: Some(strategy),
            ..self
        }
    }

    /// Whether Vulkan's validation layers check what this library does, core and synchronization. They must be installed.
    pub fn validation(self, validation: bool) -> Self {
        Self { validation, ..self }
    }

    /// Says that the Vulkan device shares this process's page tables (ATS, or CXL with coherent memory), which no Vulkan driver tells. It is
    /// tried once, with two words; on a device that does not, that may lose the device. Lavapipe is known to.
    pub fn shares_page_tables(self, shares: bool) -> Self {
        Self {
            shares_page_tables: shares,
            ..self
        }
    }

    /// The driver's device, for the strategy [`Translated`](Strategy::Translated): opened for this, since its pool has to be made
    /// before anything else is asked of it. Otherwise the first that can be opened.
    pub fn driver(self, driver: Device) -> Self {
        Self {
            driver: Some(driver),
            ..self
        }
    }

    /// Bytes of VRAM for the strategy [`Translated`](Strategy::Translated): a multiple of 2 MiB. Otherwise half of what is free.
    pub fn pool_bytes(self, bytes: usize) -> Self {
        Self {
            pool_bytes: Some(bytes),
            ..self
        }
    }

    /// Has the VRAM for the strategy [`Translated`](Strategy::Translated) be memory of the Vulkan device itself, which Vulkan exports as a dma-buf
    /// and the driver takes for VRAM ([`Device::import_dma_buf`]), through the device given or the first that can be opened. So the pages are in
    /// the memory of a GPU whose own driver stays loaded. Its size is that of [`pool_bytes`](Self::pool_bytes), 16 MiB if that is not said.
    pub fn exported(self, exported: bool) -> Self {
        Self { exported, ..self }
    }

    /// Who keeps the device page table, in the driver's place.
    pub fn backend(self, backend: Box<dyn Backend>) -> Self {
        Self {
            backend: Some(backend),
            ..self
        }
    }

    /// How long a submission may keep others from its pages, in milliseconds, 1 to 10000 (which is what it is otherwise).
    pub fn deadline_ms(self, deadline_ms: u32) -> Self {
        Self {
            deadline_ms: Some(deadline_ms),
            ..self
        }
    }

    /// Calls a function after each round of each dispatch, with what has been done of it.
    pub fn progress(self, progress: impl Fn(&DispatchStats) + Send + Sync + 'static) -> Self {
        Self {
            progress: Some(Box::new(progress)),
            ..self
        }
    }

    pub(crate) fn deadline(&self) -> u32 {
        self.deadline_ms.unwrap_or(DEADLINE_MS)
    }

    /// Opens the device.
    ///
    /// Errors: [`NoLoader`](SvmError::NoLoader), [`NoSuchDevice`](SvmError::NoSuchDevice), [`Lacks`](SvmError::Lacks),
    /// [`Unavailable`](SvmError::Unavailable) for a strategy that was asked for, [`Vulkan`](SvmError::Vulkan), and for a translated
    /// context those of the driver.
    pub fn build(self) -> Result<SvmContext, Error> {
        choose::build(self)
    }
}

impl fmt::Debug for SvmBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvmBuilder")
            .field("device", &self.device)
            .field("strategy", &self.strategy)
            .finish_non_exhaustive()
    }
}

/// Whether a Vulkan device is the one that was named.
pub(crate) fn is_named(facts: &Facts, wanted: &str) -> bool {
    facts.name.to_lowercase().contains(&wanted.to_lowercase())
}

// What is dispatched in parts has to fit a `u32`.
const _: () = assert!(size_of::<Grid>() == 12);
