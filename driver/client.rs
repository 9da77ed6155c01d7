// SPDX-License-Identifier: GPL-2.0

//! Clients: open files on `/dev/hmm_gpuN`, and their calls. `uapi.rs` is the reference for each.
//!
//! Nothing that a process can make last is done while the device is lent ([`Gate::enter`]), for
//! unbind waits for that: no copy to or from user space, and no waiting for a lock of its address
//! space.

#![forbid(unsafe_code)]

use crate::{
    devmem::DeviceMemory,
    hmm::{
        pagemap::PageMap,
        range::{Seen, Watch},
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    migration::{Progress, Request, Target},
    sys::{gate::Gate, node},
    uapi::{self, hmm_gpu_counters, hmm_gpu_migrate, hmm_gpu_query, hmm_gpu_residency},
    units,
};
use kernel::{
    ioctl::_IOC_SIZE,
    mm::{Mm, MmWithUser},
    new_mutex,
    prelude::*,
    sync::{aref::ARef, Arc, Mutex, SetOnce},
    uaccess::UserSlice,
};

/// The way to a device's memory, for as long as the device is bound.
pub(crate) type MemoryGate = Gate<PageMap<DeviceMemory>>;

/// An open file. It serves the address space that opened it.
#[pin_data]
pub(crate) struct Client {
    gate: Arc<MemoryGate>,
    mm: ARef<Mm>,
    /// Made when it is first needed: it takes the lock of the address space, for which an open of
    /// a device node must not wait, since all misc devices wait for that.
    watch: SetOnce<Pin<KBox<Watch>>>,
    /// Held to make it.
    #[pin]
    watch_lock: Mutex<()>,
}

impl node::Client for Client {
    type Device = Arc<MemoryGate>;

    fn open(gate: &Arc<MemoryGate>) -> Result<impl PinInit<Self, Error>> {
        let mm = ARef::<Mm>::from(&**current!().mm().ok_or(EINVAL)?);
        let gate = gate.clone();
        Ok(try_pin_init!(Self {
            gate,
            mm,
            watch: SetOnce::new(),
            watch_lock <- new_mutex!(()),
        }))
    }

    fn ioctl(self: Pin<&Self>, number: u32, argument: usize) -> Result {
        let current = current!();
        let mm = current
            .mm()
            .filter(|mm| mm.as_raw() == self.mm.as_raw())
            .ok_or(EPERM)?;
        // For an answer that does not depend on the arguments once the device is gone.
        drop(self.gate.enter()?);
        match number & !SIZE_BITS {
            n if n == uapi::HMM_GPU_QUERY & !SIZE_BITS => self.query(number, argument),
            n if n == uapi::HMM_GPU_MIGRATE & !SIZE_BITS => self.migrate(mm, number, argument),
            n if n == uapi::HMM_GPU_RESIDENCY & !SIZE_BITS => self.residency(mm, number, argument),
            n if n == uapi::HMM_GPU_COUNTERS & !SIZE_BITS => self.counters(number, argument),
            _ => Err(ENOTTY),
        }
    }
}

impl Client {
    /// What tells whether the address space changed.
    fn watch(&self, mm: &MmWithUser) -> Result<&Watch> {
        if self.watch.as_ref().is_none() {
            let _making = self.watch_lock.lock();
            if self.watch.as_ref().is_none() {
                self.watch
                    .populate(KBox::try_pin_init(Watch::new(mm), GFP_KERNEL_ACCOUNT)?);
            }
        }
        self.watch.as_ref().map(|watch| &**watch).ok_or(ENOMEM)
    }

    fn query(&self, number: u32, argument: usize) -> Result {
        let (query, user) = UserStructure::read::<hmm_gpu_query>(number, argument, SMALLEST_QUERY)?;
        // The fields that the driver writes may hold anything before.
        require(query.flags == 0 && query.reserved == [0; 5])?;
        let answer = self.gate.enter()?.data().describe();
        user.write(answer)
    }

    fn counters(&self, number: u32, argument: usize) -> Result {
        let (counters, user) =
            UserStructure::read::<hmm_gpu_counters>(number, argument, SMALLEST_COUNTERS)?;
        require(counters.flags == 0 && counters.reserved == [0; 6])?;
        let answer = {
            let map = self.gate.enter()?;
            map.data().counters.read(map.data().alloc.used())
        };
        user.write(answer)
    }

    fn migrate(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut migrate, user) =
            UserStructure::read::<hmm_gpu_migrate>(number, argument, SMALLEST_MIGRATE)?;
        require(migrate.flags == 0 && migrate.reserved == [0; 2])?;
        let target = match migrate.target {
            uapi::HMM_GPU_TARGET_SYSTEM => Target::System,
            uapi::HMM_GPU_TARGET_DEVICE => Target::Device,
            _ => return Err(EINVAL),
        };
        let (start, end) = range(migrate.addr, migrate.len)?;
        let mut progress = Progress::default();
        let result = Request::new(&self.gate, self.watch(mm)?, target)
            .and_then(|mut request| request.run(mm, start, end, &mut progress));
        // CAST: All widen.
        migrate.done_bytes = progress.done as u64;
        migrate.moved_bytes = progress.moved as u64;
        migrate.already_bytes = progress.already as u64;
        migrate.skipped_bytes = progress.skipped as u64;
        migrate.unmapped_bytes = progress.unmapped as u64;
        // What went wrong with the move is what the caller wants to know first.
        let written = user.write(migrate);
        result.and(written)
    }

    fn residency(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        const BATCH: usize = 512;

        let (residency, _) =
            UserStructure::read::<hmm_gpu_residency>(number, argument, SMALLEST_RESIDENCY)?;
        require(residency.flags == 0 && residency.reserved == [0; 2])?;
        let (start, end) = range(residency.addr, residency.len)?;
        let pages = (end - start) / PAGE_BYTES;
        let mut writer = UserSlice::new(
            UserPtr::from_addr(usize::try_from(residency.bytes_ptr)?),
            pages,
        )
        .writer();
        let watch = self.watch(mm)?;
        let mut seen = KVec::from_elem(Seen::default(), BATCH.min(pages), GFP_KERNEL)?;
        let mut bytes = KVec::from_elem(0u8, BATCH.min(pages), GFP_KERNEL)?;
        for at in (start..end).step_by(BATCH * PAGE_BYTES) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let count = BATCH.min((end - at) / PAGE_BYTES);
            let (seen, bytes) = (
                seen.get_mut(..count).ok_or(EINVAL)?,
                bytes.get_mut(..count).ok_or(EINVAL)?,
            );
            {
                let lock = ReadLocked::new(mm)?;
                let map = self.gate.enter()?;
                watch.look::<DeviceMemory>(&lock, at, seen)?;
                for (byte, seen) in bytes.iter_mut().zip(seen.iter()) {
                    *byte = place(&map, *seen);
                }
            }
            writer.write_slice(bytes)?;
        }
        Ok(())
    }
}

/// The residency byte of a page, for a client of `map`.
fn place(map: &PageMap<DeviceMemory>, seen: Seen) -> u8 {
    let Some(pfn) = seen.pfn() else {
        return uapi::HMM_GPU_RESIDENT_NONE;
    };
    let place = if map.index_of(pfn).is_some() {
        uapi::HMM_GPU_RESIDENT_DEVICE
    } else if units::of_pfn(pfn).is_some() {
        uapi::HMM_GPU_RESIDENT_OTHER_DEVICE
    } else {
        uapi::HMM_GPU_RESIDENT_SYSTEM
    };
    let writable = if seen.is_writable() {
        uapi::HMM_GPU_RESIDENT_WRITABLE
    } else {
        0
    };
    place | writable
}

/// Checks the range that a caller gave: not empty, page aligned and without wrapping (`EINVAL`), in
/// user space (`EFAULT`).
fn range(addr: u64, len: u64) -> Result<(usize, usize)> {
    let (start, len) = (usize::try_from(addr)?, usize::try_from(len)?);
    require(start % PAGE_BYTES == 0 && len % PAGE_BYTES == 0 && len != 0)?;
    let end = start.checked_add(len).ok_or(EINVAL)?;
    if end > user_end() {
        return Err(EFAULT);
    }
    Ok((start, end))
}

fn require(condition: bool) -> Result {
    condition.then_some(()).ok_or(EINVAL)
}

// The sizes of version 1, in bytes. These never change.
const SMALLEST_QUERY: usize = 0x60;
const SMALLEST_MIGRATE: usize = 0x50;
const SMALLEST_RESIDENCY: usize = 0x30;
const SMALLEST_COUNTERS: usize = 0xa0;

/// The bits of a call's number that say how long the caller's structure is.
const SIZE_BITS: u32 = 0x3fff << 16;

/// Where a caller's structure is, to write the answer to.
///
/// It may be shorter or longer than the driver's: see the rules in `uapi.rs`.
struct UserStructure {
    address: UserPtr,
    size: usize,
}

impl UserStructure {
    /// Reads the structure that call `number` has at `argument`.
    fn read<T: FromBytes + IntoBytes>(
        number: u32,
        argument: usize,
        smallest: usize,
    ) -> Result<(T, Self)> {
        let this = Self {
            address: UserPtr::from_addr(argument),
            size: _IOC_SIZE(number),
        };
        require(this.size >= smallest)?;
        let mut reader = UserSlice::new(this.address, this.size).reader();
        let mut value = T::new_zeroed();
        let known = this.size.min(size_of::<T>());
        reader.read_slice(value.as_mut_bytes().get_mut(..known).unwrap_or_default())?;
        while !reader.is_empty() {
            require(reader.read::<u8>()? == 0)?;
        }
        Ok((value, this))
    }

    /// Writes as much of `value` as the caller has room for.
    fn write<T: FromBytes + IntoBytes>(&self, mut value: T) -> Result {
        let known = self.size.min(size_of::<T>());
        let bytes = value.as_mut_bytes();
        UserSlice::new(self.address, known)
            .writer()
            .write_slice(bytes.get(..known).unwrap_or_default())
    }
}
