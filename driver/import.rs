// SPDX-License-Identifier: GPL-2.0

//! Devices that clients make: of a dma-buf, which is VRAM that a client has from another driver (Vulkan's, for one) and gives to this
//! one. All of it is that client's private pool, for its exporter shows it to whoever has the dma-buf: so there is no node, and the
//! client's file is the only one.
//!
//! Such a device goes when its file is closed, on a thread of the kernel's own, since a process that exits waits for nothing; and before
//! that with the device that it was made through, which waits for it.

#![forbid(unsafe_code)]

use crate::{
    alloc::BLOCK_BYTES,
    client::MemoryGate,
    gpu::Gpu,
    hmm::pagemap::{Form, Kind},
    sleep::Sleepy,
    soft::SoftGpu,
    sys::{dma_buf::Exported, sleep::SleepNotifier, work},
    uapi::HMM_GPU_MAX_IMPORTS,
    units::Unit,
    vram::Vram,
};
use kernel::{
    faux, impl_has_work, new_mutex, new_work,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full, Relaxed, Release},
        Arc, Mutex,
    },
    workqueue::{system_long, Work, WorkItem},
};

/// What all of them have: their number << 32 | blocks of 2 MiB.
static TAKEN: Atomic<u64> = Atomic::new(0);

/// Whether a device that has this memory lets clients do this.
pub(crate) fn may(vram: &Vram, kind: Kind) -> bool {
    kind == Kind::Private
        && !vram.is_imported()
        && *crate::module_parameters::import_mib.value_ref() != 0
}

/// A part of what may be imported.
struct Quota(u64);

impl Quota {
    /// Takes one device, and so many bytes. `ENOSPC`.
    fn take(bytes: u64) -> Result<Self> {
        let limit = u64::from(crate::module_parameters::import_mib.value()) << 20;
        if bytes > limit {
            return Err(ENOSPC);
        }
        // So it fits 32 bits.
        let more = 1 << 32 | bytes / BLOCK_BYTES;
        let mut before = TAKEN.load(Relaxed);
        loop {
            let after = before.checked_add(more).ok_or(ENOSPC)?;
            let (count, blocks) = (after >> 32, after & u64::from(u32::MAX));
            if count > u64::from(HMM_GPU_MAX_IMPORTS) || blocks > limit / BLOCK_BYTES {
                return Err(ENOSPC);
            }
            match TAKEN.cmpxchg(before, after, Full) {
                Ok(_) => return Ok(Self(more)),
                Err(now) => before = now,
            }
        }
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        let _ = TAKEN.fetch_sub(self.0, Full);
    }
}

/// The dma-bufs that are devices, by what tells them apart; 0 is none.
static MARKS: [Atomic<u64>; HMM_GPU_MAX_IMPORTS as usize] =
    [const { Atomic::new(0) }; HMM_GPU_MAX_IMPORTS as usize];

/// That a dma-buf is a device: at its beginning and its end it is zeroed, which must not happen to what is another's.
struct Mark(&'static Atomic<u64>);

impl Mark {
    /// Makes one. `EBUSY`, if there is one, or somebody makes one at this moment.
    fn make(id: u64) -> Result<Self> {
        let free = |mark: &&Atomic<u64>| mark.cmpxchg(0, id, Full).is_ok();
        let this = Self(MARKS.iter().find(free).ok_or(ENOSPC)?);
        if MARKS.iter().filter(|mark| mark.load(Acquire) == id).count() > 1 {
            return Err(EBUSY);
        }
        Ok(this)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.0.xchg(0, Full);
    }
}

/// All of a device. Dropped in this order.
struct Parts {
    _sleep: Pin<KBox<SleepNotifier<Sleepy>>>,
    _gpu: SoftGpu,
    _mark: Mark,
    _quota: Quota,
}

/// A device that a client has made.
#[pin_data]
pub(crate) struct Imported {
    gate: Arc<MemoryGate>,
    unit: u32,
    /// None once it goes.
    #[pin]
    parts: Mutex<Option<Parts>>,
    /// Nothing of it is left.
    gone: Atomic<bool>,
    #[pin]
    work: Work<Self>,
}

impl_has_work! {
    impl HasWork<Self> for Imported { self.work }
}

impl Imported {
    fn new(dma_buf: i32, bytes: u64) -> Result<Arc<Self>> {
        let quota = Quota::take(bytes)?;
        let exported = Exported::new(dma_buf, usize::try_from(bytes)?)?;
        let mark = Mark::make(exported.id())?;
        let vram = Vram::DmaBuf(exported);
        let unit = Unit::take()?;
        let host = faux::Registration::new(unit.name(), None)?;
        let number = unit.number();
        let gpu = Gpu::new(unit, host, Form::Add, (0, 0), vram, None)?;
        let gate = gpu.gate().clone();
        let sleepy = Sleepy { gate: gate.clone() };
        let parts = Parts {
            // What its exporter does with it in sleep is not known here.
            _sleep: KBox::try_pin_init(SleepNotifier::new(sleepy), GFP_KERNEL)?,
            _gpu: gpu,
            _mark: mark,
            _quota: quota,
        };
        Arc::pin_init(
            pin_init!(Self {
                gate,
                unit: number,
                parts <- new_mutex!(Some(parts)),
                gone: Atomic::new(false),
                work <- new_work!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Takes it down, unless somebody does.
    fn take_down(&self) {
        let parts = self.parts.lock().take();
        // Not under the lock: it takes long.
        if let Some(parts) = parts {
            drop(parts);
            self.gone.store(true, Release);
        }
    }
}

impl WorkItem for Imported {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.take_down();
    }
}

/// The devices that the clients of one device have made.
#[pin_data]
pub(crate) struct Imports {
    /// None once there may be no more.
    #[pin]
    all: Mutex<Option<KVec<Arc<Imported>>>>,
}

impl Imports {
    /// None.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            all <- new_mutex!(Some(KVec::new())),
        })
    }

    /// Adds one. Returns those that have gone by now, whose work is to be waited for, which is not long: but by nobody who has locks, or has
    /// been lent a device, as that work has locks like these.
    fn add(&self, import: Arc<Imported>) -> Result<KVec<Arc<Imported>>> {
        let mut gone = KVec::new();
        let mut all = self.all.lock();
        let all = (*all).as_mut().ok_or(ENODEV)?;
        all.push(import, GFP_KERNEL)?;
        // What cannot be told of stays.
        all.retain(|it| !it.gone.load(Acquire) || gone.push(it.clone(), GFP_KERNEL).is_err());
        Ok(gone)
    }

    /// All of them go, and there will be no more.
    pub(crate) fn close(&self) {
        let all = self.all.lock().take();
        for import in all.iter().flatten() {
            import.take_down();
            // Or its work does, or has: nothing has it wait again, now that the parts are taken.
            work::flush(import);
        }
    }
}

/// A device of the client that has this: it goes when this is dropped.
pub(crate) struct Held(Arc<Imported>);

impl Held {
    /// Makes one through the device behind `gate`: `bytes` of the dma-buf that a file descriptor of this process is.
    ///
    /// Fails as `HMM_GPU_IMPORT` says.
    pub(crate) fn new(gate: &MemoryGate, dma_buf: i32, bytes: u64) -> Result<Self> {
        {
            let map = gate.enter()?;
            if !may(&map.data().vram, map.kind()) {
                return Err(EOPNOTSUPP);
            }
        }
        // The gate is open to others meanwhile: an exporter may take its time.
        let import = Imported::new(dma_buf, bytes)?;
        let gone = gate.enter()?.data().imports.add(import.clone())?;
        gone.iter().for_each(work::flush);
        Ok(Self(import))
    }

    /// The way to its memory.
    pub(crate) fn gate(&self) -> &Arc<MemoryGate> {
        &self.0.gate
    }

    /// Its number.
    pub(crate) fn unit(&self) -> u32 {
        self.0.unit
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let parts = self.0.parts.lock();
        // Under the lock: once the parts are taken, the module may go as soon as its work has been waited for.
        if parts.is_some() {
            let _ = system_long().enqueue(self.0.clone());
        }
    }
}
