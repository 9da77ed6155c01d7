// SPDX-License-Identifier: GPL-2.0

//! Clients: open files on `/dev/hmm_gpuN`, and their calls. `uapi.rs` is the reference for each.
//!
//! Nothing that a process can make last is done while the device is lent ([`Gate::enter`]), for
//! unbind waits for that: no copy to or from user space, and no waiting for a lock of its address
//! space.

#![forbid(unsafe_code)]

mod import;
mod pool;

use crate::{
    advice::{Change, Room},
    devmem::DeviceMemory,
    engine::{Engine, Operation},
    faults::Batch,
    hmm::{
        mirror::{Look, Mirror},
        pagemap::PageMap,
        seen::Seen,
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    import::Held,
    migration::{Progress, Request, Target},
    pool::Private,
    prefetch::{Job, Prefetches},
    service::{Policy, Service},
    structure::{require, UserStructure, SIZE_BITS},
    sys::{
        gate::Gate,
        mapping::{Atomic, AtomicOp},
        node,
    },
    uapi::{
        self, hmm_gpu_access, hmm_gpu_advise, hmm_gpu_atomic, hmm_gpu_counters,
        hmm_gpu_device_fault, hmm_gpu_fault, hmm_gpu_migrate, hmm_gpu_mirror, hmm_gpu_prefetch,
        hmm_gpu_query, hmm_gpu_residency, hmm_gpu_snapshot,
    },
    units,
    usage::{Account, Taker},
};
use kernel::{
    fs::File,
    iov::IovIterDest,
    mm::{virt::VmaNew, Mm, MmWithUser},
    new_mutex,
    prelude::*,
    sync::{aref::ARef, poll::PollTable, Arc, Mutex, SetOnce},
    task::CurrentTask,
    uaccess::UserSlice,
};

/// The way to a device's memory, for as long as the device is bound.
pub(crate) type MemoryGate = Gate<PageMap<DeviceMemory>>;

/// An open file. It serves the address space that opened it.
#[pin_data]
pub(crate) struct Client {
    /// Dropped first: it waits for what is under way.
    prefetches: Prefetches,
    gate: Arc<MemoryGate>,
    mm: ARef<Mm>,
    /// Made when it is first needed: it takes the lock of the address space, for which an open of
    /// a device node must not wait, since all misc devices wait for that.
    mirror: SetOnce<Arc<Mirror<DeviceMemory>>>,
    /// Held to make it.
    #[pin]
    mirror_lock: Mutex<()>,
    /// Its own, if it has one: dropped after the mirror, whose nodes are in it.
    private: SetOnce<Arc<Private>>,
    share: Arc<Share>,
    /// The device, if it is this client's own.
    _device: Option<Held>,
}

/// What a client has of the VRAM: closed when it is dropped.
pub(crate) struct Share {
    gate: Arc<MemoryGate>,
    account: Account,
}

impl Share {
    fn new(gate: Arc<MemoryGate>) -> Result<Self> {
        let account = {
            let map = gate.enter()?;
            let account = map.data().alloc.usage().open();
            if let (number, true) = account.number() {
                map.data().counters.begin(number);
            }
            account
        };
        Ok(Self { gate, account })
    }

    /// Whether the device is no longer there.
    pub(crate) fn is_gone(&self) -> bool {
        self.gate.enter().is_err()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Ok(map) = self.gate.enter() {
            map.data().alloc.usage().close(&self.account);
        }
    }
}

/// What a call that moves or maps pages does so with.
#[derive(Clone, Copy)]
pub(crate) struct Seat<'a> {
    pub(crate) gate: &'a MemoryGate,
    pub(crate) mirror: &'a Mirror<DeviceMemory>,
    account: &'a Account,
}

impl<'a> Seat<'a> {
    /// For a client that has a share of the VRAM, and a mirror.
    pub(crate) fn new(share: &'a Share, mirror: &'a Mirror<DeviceMemory>) -> Self {
        Self {
            gate: &share.gate,
            mirror,
            account: &share.account,
        }
    }

    /// The number of the client's account.
    pub(crate) fn account(&self) -> i16 {
        self.account.number().0
    }

    /// A new turn to take VRAM.
    pub(crate) fn turn(&self) -> Result<Taker> {
        Ok(self.gate.enter()?.data().alloc.usage().turn(self.account))
    }
}

impl node::Client for Client {
    type Device = Arc<MemoryGate>;

    fn open(gate: &Arc<MemoryGate>) -> Result<impl PinInit<Self, Error>> {
        Self::new(gate, None)
    }

    fn ioctl(self: Pin<&Self>, number: u32, argument: usize) -> Result {
        let current = current!();
        let mm = self.own(current)?;
        match number & !SIZE_BITS {
            n if n == uapi::HMM_GPU_QUERY & !SIZE_BITS => self.query(number, argument),
            n if n == uapi::HMM_GPU_MIGRATE & !SIZE_BITS => self.migrate(mm, number, argument),
            n if n == uapi::HMM_GPU_RESIDENCY & !SIZE_BITS => self.residency(mm, number, argument),
            n if n == uapi::HMM_GPU_COUNTERS & !SIZE_BITS => self.counters(number, argument),
            n if n == uapi::HMM_GPU_MIRROR & !SIZE_BITS => self.describe(mm, number, argument),
            n if n == uapi::HMM_GPU_ACCESS & !SIZE_BITS => self.access(mm, number, argument),
            n if n == uapi::HMM_GPU_FAULT & !SIZE_BITS => self.fault(mm, number, argument),
            n if n == uapi::HMM_GPU_SNAPSHOT & !SIZE_BITS => self.snapshot(mm, number, argument),
            n if n == uapi::HMM_GPU_ATOMIC & !SIZE_BITS => self.atomic(mm, number, argument),
            n if n == uapi::HMM_GPU_ADVISE & !SIZE_BITS => self.advise(mm, number, argument),
            n if n == uapi::HMM_GPU_POOL & !SIZE_BITS => self.make_pool(mm, number, argument),
            n if n == uapi::HMM_GPU_EXECUTE & !SIZE_BITS => self.execute(mm, number, argument),
            n if n == uapi::HMM_GPU_PREFETCH & !SIZE_BITS => self.prefetch(mm, number, argument),
            n if n == uapi::HMM_GPU_IMPORT & !SIZE_BITS => self.import(mm, number, argument),
            _ => Err(ENOTTY),
        }
    }

    fn read(self: Pin<&Self>, to: &mut IovIterDest<'_>, may_wait: bool) -> Result<usize> {
        let gone = match self.own(current!()) {
            Err(error) if error == EPERM => return Err(error),
            result => result.is_err(),
        };
        match self.prefetches.read(to, may_wait) {
            Ok(0) if gone => Err(ENODEV),
            result => result,
        }
    }

    fn poll(self: Pin<&Self>, file: &File, table: &PollTable<'_>) -> u32 {
        self.prefetches.poll(file, table)
    }

    fn mmap(self: Pin<&Self>, vma: &VmaNew, file: node::OpenFile<'_, Self>) -> Result {
        self.map_pool(vma, &file)
    }
}

impl Client {
    /// One of the device behind `gate`, for the address space of the calling task.
    fn new(gate: &Arc<MemoryGate>, device: Option<Held>) -> Result<impl PinInit<Self, Error>> {
        let mm = ARef::<Mm>::from(&**current!().mm().ok_or(EINVAL)?);
        let gate = gate.clone();
        let share = Arc::new(Share::new(gate.clone())?, GFP_KERNEL_ACCOUNT)?;
        Ok(try_pin_init!(Self {
            prefetches: Prefetches::new(mm.clone(), share.clone())?,
            gate,
            mm,
            mirror: SetOnce::new(),
            mirror_lock <- new_mutex!(()),
            private: SetOnce::new(),
            share,
            _device: device,
        }))
    }

    /// The address space of the calling task, if it is the file's own (`EPERM`) and the device is
    /// there (`ENODEV`): so that these answers do not depend on a call's arguments.
    pub(crate) fn own<'a>(&self, current: &'a CurrentTask) -> Result<&'a MmWithUser> {
        let mm = current
            .mm()
            .filter(|mm| mm.as_raw() == self.mm.as_raw())
            .ok_or(EPERM)?;
        self.gate.enter()?;
        Ok(mm)
    }

    /// The mirror of the address space.
    pub(crate) fn mirror(&self, mm: &MmWithUser) -> Result<&Mirror<DeviceMemory>> {
        if self.mirror.as_ref().is_none() {
            let _making = self.mirror_lock.lock();
            if self.mirror.as_ref().is_none() {
                let mirror = Mirror::new(mm, self.gate.clone());
                self.mirror
                    .populate(Arc::pin_init(mirror, GFP_KERNEL_ACCOUNT)?);
            }
        }
        self.mirror.as_ref().map(|mirror| &**mirror).ok_or(ENOMEM)
    }

    /// What its calls do their work with.
    pub(crate) fn seat(&self, mm: &MmWithUser) -> Result<Seat<'_>> {
        Ok(Seat::new(&self.share, self.mirror(mm)?))
    }

    fn query(&self, number: u32, argument: usize) -> Result {
        let (query, user) = UserStructure::read::<hmm_gpu_query>(number, argument, SMALLEST_QUERY)?;
        // The fields that the driver writes may hold anything before.
        require(query.flags == 0 && query.reserved == [0; 5])?;
        let answer = {
            let map = self.gate.enter()?;
            map.data().return_blocks();
            map.data().describe(map.kind())
        };
        user.write(answer)
    }

    fn counters(&self, number: u32, argument: usize) -> Result {
        let (counters, user) =
            UserStructure::read::<hmm_gpu_counters>(number, argument, SMALLEST_COUNTERS)?;
        require(counters.flags & !uapi::HMM_GPU_COUNTERS_CLIENT == 0)?;
        let answer = {
            let map = self.gate.enter()?;
            match counters.flags {
                0 => map.data().count(),
                _ => self.own_counters(&map)?,
            }
        };
        user.write(answer)
    }

    /// What this client has done. What its mirror did is known there.
    fn own_counters(&self, map: &PageMap<DeviceMemory>) -> Result<hmm_gpu_counters> {
        let (memory, (account, _)) = (map.data(), self.share.account.number());
        let live = memory.alloc.usage().used_by(account);
        let counters = memory.counters.of(account).ok_or(EINVAL)?;
        let mut answer = counters.read(live);
        if let Some(mirror) = self.mirror.as_ref() {
            let shape = mirror.shape(map)?;
            // CAST: Widens.
            answer.table_pages = shape.nodes as u64;
            answer.mapped_pages = shape.mapped;
            answer.invalidations = shape.invalidations;
        }
        Ok(answer)
    }

    fn migrate(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut migrate, user) =
            UserStructure::read::<hmm_gpu_migrate>(number, argument, SMALLEST_MIGRATE)?;
        require(migrate.flags == 0 && migrate.reserved == [0; 2])?;
        let target = target(migrate.target)?;
        let (start, end) = range(migrate.addr, migrate.len)?;
        let mut progress = Progress::default();
        let result = Request::new(self.seat(mm)?, target)
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

    fn prefetch(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (prefetch, _) =
            UserStructure::read::<hmm_gpu_prefetch>(number, argument, SMALLEST_PREFETCH)?;
        require(prefetch.flags == 0 && prefetch.reserved == [0; 2])?;
        let target = target(prefetch.target)?;
        let (start, end) = range(prefetch.addr, prefetch.len)?;
        self.mirror(mm)?;
        let mirror = self.mirror.as_ref().ok_or(ENOMEM)?.clone();
        let job = Job::new(mirror, target, start..end, &prefetch);
        self.prefetches.add(job)
    }

    fn residency(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (residency, _) =
            UserStructure::read::<hmm_gpu_residency>(number, argument, SMALLEST_RESIDENCY)?;
        require(residency.flags == 0 && residency.reserved == [0; 2])?;
        // Before its lock is taken: making one takes it for writing.
        let mirror = self.mirror(mm)?;
        self.look(
            residency.addr,
            residency.len,
            residency.bytes_ptr,
            |at, seen, answers| {
                let lock = ReadLocked::new(mm)?;
                let map = self.gate.enter()?;
                mirror.look(&lock, at, seen)?;
                for (answer, seen) in answers.iter_mut().zip(seen.iter()) {
                    *answer = place(&map, *seen);
                }
                Ok(())
            },
        )
    }

    fn snapshot(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (snapshot, _) =
            UserStructure::read::<hmm_gpu_snapshot>(number, argument, SMALLEST_SNAPSHOT)?;
        require(snapshot.flags == 0 && snapshot.reserved == [0; 2])?;
        self.look(
            snapshot.addr,
            snapshot.len,
            snapshot.entries_ptr,
            |at, seen, answers| self.snapshot_batch(mm, at, seen, answers),
        )
    }

    /// Takes a snapshot of the pages from `at` on.
    fn snapshot_batch(
        &self,
        mm: &MmWithUser,
        at: usize,
        seen: &mut [Seen],
        answers: &mut [u64],
    ) -> Result {
        const ATTEMPTS: usize = 64;

        let mirror = self.mirror(mm)?;
        for _ in 0..ATTEMPTS {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let begun = mirror.begin();
            let lock = ReadLocked::new(mm)?;
            let map = self.gate.enter()?;
            let visit = |i: usize, seen, entry| {
                if let Some(answer) = answers.get_mut(i) {
                    *answer = snapshot_entry(&map, seen, entry);
                }
            };
            let look = Look {
                begun: &begun,
                lock: &lock,
                map: &map,
            };
            match mirror.snapshot(look, at, seen, visit) {
                Err(error) if error == EBUSY => continue,
                result => return result,
            }
        }
        Err(EBUSY)
    }

    /// Has `look` look at the pages of `[addr, addr + len)`, up to 512 at a time, and writes its
    /// answers for them to the array at `user`. It is given the first address, and places for what
    /// is seen and for the answers.
    fn look<A: Copy + Default + FromBytes + IntoBytes>(
        &self,
        addr: u64,
        len: u64,
        user: u64,
        look: impl Fn(usize, &mut [Seen], &mut [A]) -> Result,
    ) -> Result {
        const BATCH: usize = 512;

        let (start, end) = range(addr, len)?;
        let pages = (end - start) / PAGE_BYTES;
        let bytes = pages.checked_mul(size_of::<A>()).ok_or(EINVAL)?;
        let mut writer = UserSlice::new(UserPtr::from_addr(usize::try_from(user)?), bytes).writer();
        let mut seen = KVec::from_elem(Seen::default(), BATCH.min(pages), GFP_KERNEL)?;
        let mut answers = KVec::from_elem(A::default(), BATCH.min(pages), GFP_KERNEL)?;
        for at in (start..end).step_by(BATCH * PAGE_BYTES) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let count = BATCH.min((end - at) / PAGE_BYTES);
            let (seen, answers) = (
                seen.get_mut(..count).ok_or(EINVAL)?,
                answers.get_mut(..count).ok_or(EINVAL)?,
            );
            look(at, seen, answers)?;
            writer.write_slice(answers.as_mut_bytes())?;
        }
        Ok(())
    }

    fn describe(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut mirror, user) =
            UserStructure::read::<hmm_gpu_mirror>(number, argument, SMALLEST_MIRROR)?;
        require(mirror.flags == 0 && mirror.reserved == [0; 5])?;
        let made = self.mirror(mm)?;
        let shape = loop {
            let map = self.gate.enter()?;
            let root = made.root(&map);
            let sleep = map.data().sleep.clone();
            match root {
                Ok(()) => break made.shape(&map)?,
                Err(error) if error == EAGAIN => {
                    drop(map);
                    sleep.wait()?;
                }
                Err(error) => return Err(error),
            }
        };
        mirror.levels = shape.levels;
        mirror.root_offset = shape.root.ok_or(EBUSY)?;
        // CAST: All widen.
        mirror.nodes = shape.nodes as u64;
        mirror.entries = shape.entries as u64;
        mirror.invalidations = shape.invalidations;
        user.write(mirror)
    }

    fn access(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut access, user) =
            UserStructure::read::<hmm_gpu_access>(number, argument, SMALLEST_ACCESS)?;
        require(access.flags == 0 && access.reserved == [0; 2])?;
        let policy = match access.policy {
            uapi::HMM_GPU_POLICY_NONE => None,
            policy => Some(self::policy(policy)?),
        };
        let (addr, len) = (usize::try_from(access.addr)?, usize::try_from(access.len)?);
        let buffer = usize::try_from(access.buffer_ptr)?;
        let to = usize::try_from(access.to_addr)?;
        require(len != 0)?;
        addr.checked_add(len).ok_or(EINVAL)?;
        let mut engine = Engine::new(self.seat(mm)?, mm, policy);
        let (done, result) = match access.op {
            uapi::HMM_GPU_OP_READ | uapi::HMM_GPU_OP_WRITE => {
                require(access.to_addr == 0)?;
                buffer.checked_add(len).ok_or(EINVAL)?;
                let read = access.op == uapi::HMM_GPU_OP_READ;
                in_pieces(len, |done, bytes| {
                    let user = UserSlice::new(UserPtr::from_addr(buffer + done), bytes.len());
                    if read {
                        let (read, result) =
                            engine.run(addr + done, addr + len, Operation::Read(bytes));
                        let bytes = bytes.get(..read).unwrap_or_default();
                        // What was read and did not arrive is not done.
                        match user.writer().write_slice(bytes) {
                            Ok(()) => (read, result),
                            Err(error) => {
                                engine.forget_miss();
                                (0, Err(error))
                            }
                        }
                    } else {
                        match user.reader().read_slice(bytes) {
                            Ok(()) => engine.run(addr + done, addr + len, Operation::Write(bytes)),
                            Err(error) => (0, Err(error)),
                        }
                    }
                })?
            }
            uapi::HMM_GPU_OP_COPY => {
                require(access.buffer_ptr == 0)?;
                let end = to.checked_add(len).ok_or(EINVAL)?;
                require(end <= addr || addr + len <= to)?;
                in_pieces(len, |done, bytes| {
                    let (read, result) =
                        engine.run(addr + done, addr + len, Operation::Read(bytes));
                    let bytes = bytes.get(..read).unwrap_or_default();
                    match engine.run(to + done, end, Operation::Write(bytes)) {
                        (written, Ok(())) => (written, result),
                        stopped => stopped,
                    }
                })?
            }
            _ => return Err(EINVAL),
        };
        // CAST: All widen.
        access.done_bytes = done as u64;
        access.faults = engine.accessed.faults as u64;
        access.fault_addr = engine.accessed.fault_addr as u64;
        access.entry = engine.accessed.word;
        let written = user.write(access);
        result.and(written)
    }

    fn atomic(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut atomic, user) =
            UserStructure::read::<hmm_gpu_atomic>(number, argument, SMALLEST_ATOMIC)?;
        require(atomic.flags == 0 && atomic.reserved == [0; 3])?;
        let policy = policy(atomic.policy)?;
        let op = match atomic.op {
            uapi::HMM_GPU_ATOMIC_ADD => AtomicOp::Add,
            uapi::HMM_GPU_ATOMIC_AND => AtomicOp::And,
            uapi::HMM_GPU_ATOMIC_OR => AtomicOp::Or,
            uapi::HMM_GPU_ATOMIC_XCHG => AtomicOp::Exchange,
            uapi::HMM_GPU_ATOMIC_CMPXCHG => AtomicOp::CompareExchange,
            _ => return Err(EINVAL),
        };
        let wide = match atomic.bytes {
            4 => false,
            8 => true,
            _ => return Err(EINVAL),
        };
        let most = if wide { u64::MAX } else { u32::MAX.into() };
        require(atomic.operand <= most && atomic.compare <= most)?;
        require(op == AtomicOp::CompareExchange || atomic.compare == 0)?;
        let operation = Atomic {
            op,
            wide,
            operand: atomic.operand,
            compare: atomic.compare,
        };
        let addr = usize::try_from(atomic.addr)?;
        require(addr % operation.bytes() == 0)?;
        let mut engine = Engine::new(self.seat(mm)?, mm, Some(policy));
        let result = engine.atomic(addr, &operation);
        if let Ok(old) = result {
            atomic.old = old;
        }
        // CAST: Widens.
        atomic.faults = engine.accessed.faults as u64;
        let written = user.write(atomic);
        result.map(drop).and(written)
    }

    fn advise(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (advise, _) = UserStructure::read::<hmm_gpu_advise>(number, argument, SMALLEST_ADVISE)?;
        require(advise.flags == 0 && advise.reserved == [0; 2])?;
        let change = Change::new(advise.advice, advise.value)?;
        let (start, end) = range(advise.addr, advise.len)?;
        let mirror = self.mirror(mm)?;
        let mut room = Room::new()?;
        // Held while the advice is changed, so that nothing is unmapped meanwhile.
        let lock = ReadLocked::new(mm)?;
        let mut at = start;
        while at < end {
            let vma = lock.find_vma(at).filter(|vma| vma.start() <= at);
            at = vma.ok_or(EFAULT)?.end();
        }
        mirror.notes(|notes| notes.change(start, end, change, &mut room))
    }

    fn fault(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut fault, user) =
            UserStructure::read::<hmm_gpu_fault>(number, argument, SMALLEST_FAULT)?;
        require(fault.flags == 0 && fault.reserved == [0; 2])?;
        let policy = policy(fault.policy)?;
        require(fault.count != 0 && fault.count <= uapi::HMM_GPU_MAX_FAULTS)?;
        // CAST: Widens.
        let count = fault.count as usize;
        let array = UserSlice::new(
            UserPtr::from_addr(usize::try_from(fault.faults_ptr)?),
            count * size_of::<hmm_gpu_device_fault>(),
        );
        let (mut reader, mut writer) = array.reader_writer();
        let mut faults =
            KVVec::from_elem(hmm_gpu_device_fault::default(), count, GFP_KERNEL_ACCOUNT)?;
        reader.read_slice(faults.as_mut_bytes())?;
        let mut service = Service::new(self.seat(mm)?, mm, policy)?;
        let mut batch = Batch::new(&mut faults)?;
        let result = batch.run(&mut service);
        // CAST: All widen.
        fault.mapped_pages = batch.mapped as u64;
        fault.device_pages = batch.device as u64;
        fault.failed_pages = batch.failed as u64;
        let written = writer
            .write_slice(faults.as_mut_bytes())
            .and_then(|()| user.write(fault));
        result.and(written)
    }
}

/// Where a call moves to.
fn target(number: u32) -> Result<Target> {
    match number {
        uapi::HMM_GPU_TARGET_SYSTEM => Ok(Target::System),
        uapi::HMM_GPU_TARGET_DEVICE => Ok(Target::Device),
        _ => Err(EINVAL),
    }
}

/// The policy of a call that services faults.
fn policy(number: u32) -> Result<Policy> {
    match number {
        uapi::HMM_GPU_POLICY_MAP => Ok(Policy::Map),
        uapi::HMM_GPU_POLICY_MIGRATE => Ok(Policy::Migrate),
        _ => Err(EINVAL),
    }
}

/// Does something with `len` bytes, in pieces for which there is a buffer here. `piece` is given how
/// much was done before, and the buffer; it returns how much it has done, and why not all.
///
/// Returns how much was done in all, and why not all. Fails if there is no memory for the buffer.
pub(crate) fn in_pieces(
    len: usize,
    mut piece: impl FnMut(usize, &mut [u8]) -> (usize, Result),
) -> Result<(usize, Result)> {
    const PIECE: usize = 4 * PAGE_BYTES;

    // Words are faster to fill than bytes.
    let words = len.min(PIECE).div_ceil(size_of::<u64>());
    let mut buffer = KVec::from_elem(0u64, words, GFP_KERNEL_ACCOUNT)?;
    let buffer = buffer.as_mut_bytes();
    let mut done = 0;
    while done < len {
        if current!().signal_pending() {
            return Ok((done, Err(EINTR)));
        }
        let count = (len - done).min(PIECE);
        let (dealt_with, result) = piece(done, buffer.get_mut(..count).unwrap_or_default());
        done += dealt_with;
        if result.is_err() {
            return Ok((done, result));
        }
    }
    Ok((done, Ok(())))
}

/// What `SNAPSHOT` says of a page, for a client of `map`.
fn snapshot_entry(map: &PageMap<DeviceMemory>, seen: Seen, entry: Option<Seen>) -> u64 {
    let flag = |condition: bool, bits: u64| if condition { bits } else { 0 };
    let mut word = 0;
    if let Some(pfn) = seen.pfn() {
        let index = map.index_of(pfn);
        word |= uapi::HMM_GPU_SNAPSHOT_VALID
            | flag(seen.is_writable(), uapi::HMM_GPU_SNAPSHOT_WRITABLE)
            | flag(seen.is_zero_page(), uapi::HMM_GPU_SNAPSHOT_ZERO)
            // CAST: Five bits.
            | (seen.order() as u64) << uapi::HMM_GPU_SNAPSHOT_ORDER_SHIFT;
        if let Some(index) = index {
            // CAST: Widens.
            word |=
                uapi::HMM_GPU_SNAPSHOT_DEVICE | (index as u64) << uapi::HMM_GPU_SNAPSHOT_PAGE_SHIFT;
        } else {
            let other = units::of_pfn(pfn).is_some();
            word |= flag(other, uapi::HMM_GPU_SNAPSHOT_OTHER_DEVICE);
        }
    }
    if entry.is_some_and(Seen::is_exclusive) {
        // No CPU maps the page: that is what makes the entry true.
        word |= uapi::HMM_GPU_SNAPSHOT_MIRRORED
            | uapi::HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE
            | flag(seen.pfn().is_none(), uapi::HMM_GPU_SNAPSHOT_MIRROR_CURRENT);
    } else if let Some(entry) = entry {
        // An entry that allows less than the page does is as good; one that allows more is not.
        let current = entry.pfn() == seen.pfn() && (seen.is_writable() || !entry.is_writable());
        word |= uapi::HMM_GPU_SNAPSHOT_MIRRORED
            | flag(entry.is_writable(), uapi::HMM_GPU_SNAPSHOT_MIRROR_WRITABLE)
            | flag(current, uapi::HMM_GPU_SNAPSHOT_MIRROR_CURRENT);
    }
    word
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

// The sizes of version 1, in bytes. These never change.
const SMALLEST_QUERY: usize = 0x60;
const SMALLEST_MIGRATE: usize = 0x50;
const SMALLEST_RESIDENCY: usize = 0x30;
const SMALLEST_COUNTERS: usize = 0xa0;
// Those of version 2.
const SMALLEST_MIRROR: usize = 0x50;
const SMALLEST_ACCESS: usize = 0x60;
const SMALLEST_FAULT: usize = 0x40;
const SMALLEST_SNAPSHOT: usize = 0x30;
// That of version 3.
const SMALLEST_ATOMIC: usize = 0x50;
// That of version 4.
const SMALLEST_ADVISE: usize = 0x30;
// That of version 5.
const SMALLEST_PREFETCH: usize = 0x30;
