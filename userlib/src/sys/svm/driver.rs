//! The driver as the one who keeps the device page table: a private pool, executions, and the faults that it services.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::{retry_on_intr, Errno};

use crate::error::Attempt;
use crate::range::PAGE_BYTES;
use crate::svm::{Miss, SvmError};
use crate::sys::svm::{Backend, PoolMemory, TableRoot};
use crate::uapi::{self, hmm_gpu_execute};
use crate::{Access, Capabilities, Device, DeviceFault, Error, Policy, Pool, Target};

/// What a pool must be a multiple of.
const BLOCK_BYTES: u64 = 2 << 20;
/// How often a page may turn out to be in system memory, or to have changed meanwhile, before it is taken for one that stays.
const TRIES: u32 = 12;

/// The VRAM that a context has.
enum Vram {
    /// A pool, mapped.
    Pool(Pool),
    /// All of the VRAM of a device that was made for it: so many bytes.
    Given(usize),
}

impl Vram {
    fn bytes(&self) -> usize {
        match self {
            Vram::Pool(pool) => pool.bytes(),
            Vram::Given(bytes) => *bytes,
        }
    }
}

/// The driver, for one context.
pub(crate) struct Driver {
    // First: it is the device's.
    vram: Vram,
    device: Arc<Device>,
    deadline_ms: u32,
    running: Option<u64>,
    tries: HashMap<usize, u32>,
}

/// Whether the driver has a device with pools, or why not.
pub(crate) fn usable(device: Option<&Device>) -> Result<(), String> {
    let look = |device: &Device| {
        let description = device.describe().map_err(|error| error.to_string())?;
        if description.capabilities.contains(Capabilities::POOL) {
            return Ok(());
        }
        Err(format!("{description}: no pools"))
    };
    match device {
        Some(device) => look(device),
        None => Device::open_first()
            .map_err(|error| error.to_string())
            .and_then(|device| look(&device)),
    }
}

impl Driver {
    /// Makes a pool: of half of the VRAM that is free, if it is not said how large.
    pub(crate) fn new(
        device: &Arc<Device>,
        bytes: Option<usize>,
        deadline_ms: u32,
    ) -> Result<Self, Error> {
        let free = device.describe()?.vram_free_bytes / 2;
        let half = usize::try_from((free & !(BLOCK_BYTES - 1)).max(BLOCK_BYTES));
        let bytes = bytes.unwrap_or(half.unwrap_or(usize::MAX));
        let pool = Vram::Pool(device.create_pool(bytes)?);
        Ok(Self::with(device, pool, deadline_ms))
    }

    /// For a device that was made of memory of Vulkan's own, of so many bytes.
    pub(crate) fn given(device: &Arc<Device>, bytes: usize, deadline_ms: u32) -> Self {
        Self::with(device, Vram::Given(bytes), deadline_ms)
    }

    fn with(device: &Arc<Device>, vram: Vram, deadline_ms: u32) -> Self {
        Self {
            vram,
            device: Arc::clone(device),
            deadline_ms,
            running: None,
            tries: HashMap::new(),
        }
    }

    fn execute(&self, mut argument: hmm_gpu_execute) -> Result<hmm_gpu_execute, Error> {
        let deadline = Duration::from_millis(self.deadline_ms.into());
        let attempt = match argument.op {
            uapi::HMM_GPU_EXECUTE_BEGIN => Attempt::BeginExecution { deadline },
            _ => Attempt::EndExecution,
        };
        retry_on_intr(|| self.device.file().execute(&mut argument))
            .map_err(|errno| Error::call(self.device.path(), attempt, errno))?;
        Ok(argument)
    }

    /// Has the device's page table map what was missed. Returns how many pages are in VRAM of those.
    fn fault(&mut self, misses: &[Miss]) -> Result<u64, Error> {
        let wanted: Vec<DeviceFault> = misses
            .iter()
            .map(|miss| DeviceFault {
                addr: miss.addr,
                access: if miss.write {
                    Access::Write
                } else {
                    Access::Read
                },
            })
            .collect();
        let faulted = self.device.fault(&wanted, Policy::Migrate)?;
        for (fault, status) in wanted.iter().zip(faulted.statuses()) {
            match *status {
                Ok(()) => {}
                // It changed meanwhile, or there was no room beside the others: it is missed again.
                Err(errno @ (Errno::BUSY | Errno::NOSPC)) => self.try_again(
                    fault.addr,
                    Error::Fault {
                        fault: *fault,
                        errno,
                    },
                )?,
                Err(errno) => {
                    return Err(Error::Fault {
                        fault: *fault,
                        errno,
                    })
                }
            }
        }
        Ok(faulted.device_pages)
    }

    /// Counts a page that did not come, until it is given up.
    fn try_again(&mut self, addr: usize, error: Error) -> Result<(), Error> {
        let tries = self.tries.entry(addr / PAGE_BYTES).or_default();
        *tries += 1;
        if *tries > TRIES {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis((*tries / 4).into()));
        Ok(())
    }

    /// A page that is mapped in system memory: it bounced, was in somebody's hands, is shared since a fork, or never goes.
    fn bring(&mut self, miss: &Miss) -> Result<(), Error> {
        let not = |addr| Error::from(SvmError::not_in_vram(addr));
        self.try_again(miss.addr, not(miss.addr))?;
        // What is shared after a fork becomes the process's own by being wanted for writing. What may not be written to stays shared.
        let own = DeviceFault {
            addr: miss.addr,
            access: Access::Write,
        };
        let faulted = self.device.fault(&[own], Policy::Map)?;
        match faulted.statuses() {
            [Err(Errno::ACCESS)] if !miss.write => return Err(not(miss.addr)),
            [Err(errno)] if !matches!(*errno, Errno::BUSY | Errno::NOSPC) => {
                return Err(Error::Fault {
                    fault: own,
                    errno: *errno,
                })
            }
            _ => {}
        }
        // A request moves also what bounces.
        self.device
            .prefetch_range(miss.addr & !(PAGE_BYTES - 1), PAGE_BYTES, Target::Device)?;
        Ok(())
    }
}

// SAFETY: the pool is mapped until it is dropped, with this; what was given is Vulkan's own memory. The driver holds what an execution can reach until its end, and has
// nothing in the table without `SYSTEM` that is elsewhere than in the pool.
unsafe impl Backend for Driver {
    fn memory(&self) -> PoolMemory {
        let (start, offset) = match &self.vram {
            Vram::Pool(pool) => (NonNull::new(pool.as_ptr()), pool.offset()),
            Vram::Given(_) => (None, 0),
        };
        PoolMemory {
            start: start.unwrap_or(NonNull::dangling()),
            bytes: self.vram.bytes(),
            offset,
        }
    }

    fn room(&self) -> usize {
        // The other half for what the rest of a round has already, and for nodes.
        (self.vram.bytes() / PAGE_BYTES / 2).max(1)
    }

    fn table(&mut self) -> Result<TableRoot, Error> {
        let mirror = self.device.mirror()?;
        Ok(TableRoot {
            offset: mirror.root_offset,
            levels: mirror.levels,
        })
    }

    fn begin(&mut self) -> Result<(), Error> {
        // Once it has begun no room is made: the root of the table must be there, if the pool is full of pages.
        self.device.mirror()?;
        let begun = self.execute(hmm_gpu_execute {
            op: uapi::HMM_GPU_EXECUTE_BEGIN,
            deadline_ms: self.deadline_ms,
            ..Default::default()
        })?;
        self.running = Some(begun.id);
        Ok(())
    }

    fn end(&mut self) -> Result<bool, Error> {
        let Some(id) = self.running.take() else {
            return Ok(true);
        };
        let ended = self.execute(hmm_gpu_execute {
            op: uapi::HMM_GPU_EXECUTE_END,
            id,
            ..Default::default()
        })?;
        Ok(ended.state == uapi::HMM_GPU_EXECUTION_ENDED)
    }

    fn service(&mut self, misses: &[Miss]) -> Result<u64, Error> {
        let (stuck, wanted): (Vec<Miss>, Vec<Miss>) = misses.iter().partition(|miss| miss.system);
        let mut pages = 0;
        if !stuck.is_empty() {
            for miss in &stuck {
                self.bring(miss)?;
            }
            pages += self.fault(&stuck)?;
        }
        if !wanted.is_empty() {
            pages += self.fault(&wanted)?;
        }
        Ok(pages * PAGE_BYTES as u64)
    }

    fn done(&mut self) {
        // A page that CPU and kernels use by turns is not one that never comes.
        self.tries.clear();
    }
}
