// SPDX-License-Identifier: GPL-2.0

//! What a device does through its page tables: it accesses memory, and faults where it has no
//! entry.

#![forbid(unsafe_code)]

use crate::{
    advice::{Advice, Advices},
    bitmap::BLOCK_PAGES,
    client::{MemoryGate, Seat},
    devmem::DeviceMemory,
    evict::make_room,
    fail::Step,
    hmm::{
        mirror::{Access, Look, Mapped, Miss, Seen, Table, Want},
        pagemap::PageMap,
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    migration::{Progress, Request, Target},
    radix::Home,
    sys::{
        mapping::{Atomic, Mapping, Written},
        sort::sort_pairs,
        trace,
    },
    uapi::{self, hmm_gpu_device_fault, HMM_GPU_PAGE_BYTES},
    usage::Taker,
};
use kernel::{
    mm::{virt::flags, MmWithUser},
    prelude::*,
    sync::Arc,
};

/// The most pages that are serviced together: 2 MiB of them, which share a leaf of the table.
pub(crate) const WINDOW: usize = BLOCK_PAGES;

/// Bytes of a window.
pub(crate) const WINDOW_BYTES: usize = WINDOW * PAGE_BYTES;

/// A page of VRAM that holds a node of a device page table. Given back when it is dropped, if the
/// device is there still.
pub(crate) struct TablePage {
    gate: Arc<MemoryGate>,
    index: usize,
}

impl Home for TablePage {
    type Store = Mapping;

    fn offset(&self) -> u64 {
        // CAST: Widens.
        (self.index * PAGE_BYTES) as u64
    }

    fn write(&self, store: &Mapping, slot: usize, word: u64) {
        // Inside, so it cannot fail.
        let _ = store.write_u64(self.index * PAGE_BYTES + slot * size_of::<u64>(), word);
    }

    fn fence(_store: &Mapping) {
        Written::wait();
    }
}

impl Drop for TablePage {
    fn drop(&mut self) {
        if let Ok(map) = self.gate.enter() {
            map.data().counters.tables_freed.add(1);
            map.data().give_back(self.index, 0);
        }
    }
}

impl Table for DeviceMemory {
    type Notes = Advices;
    type Home = TablePage;

    fn unmapped(notes: &mut Advices, start: usize, end: usize) {
        notes.forget(start, end);
    }

    fn store(&self) -> &Mapping {
        &self.vram
    }

    fn epoch(&self) -> u64 {
        self.sleep.epoch()
    }

    fn home(gate: &Arc<MemoryGate>, map: &PageMap<Self>) -> Result<TablePage> {
        let memory = map.data();
        let mut index = [0];
        let mut take = || memory.take(Taker::TABLE, 0, &mut index) == 1;
        let taken = take() || (make_room(map, Taker::TABLE, 1) && take());
        if !taken {
            memory.counters.vram_failures.add(1);
            return Err(ENOSPC);
        }
        memory.counters.tables_taken.add(1);
        let [index] = index;
        let page = TablePage {
            gate: gate.clone(),
            // CAST: The index of a page fits in a word.
            index: index as usize,
        };
        memory.vram.zero(page.index * PAGE_BYTES, PAGE_BYTES)?;
        Ok(page)
    }

    fn may_map(&self) -> Result {
        Step::Insertion.pass()
    }

    fn mapped(&self, entries: usize) {
        self.counters.mapped.add(entries);
    }

    fn accessed(&self, index: usize) {
        self.alloc.usage().touch(index);
    }

    fn invalidated(&self) {
        self.counters.invalidations.add(1);
    }
}

/// What is done about a device fault.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Policy {
    /// The page is mapped where it lies.
    Map,
    /// It is moved to the device before, if it can be.
    Migrate,
}

/// Which pages are mapped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    /// Wherever they lie.
    Anywhere,
    /// Those in the device's own memory.
    Own,
}

/// A page of a window.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    /// Nothing is asked of it.
    Idle,
    /// The device wants it.
    Wanted(Access),
    /// It has an entry for what was wanted.
    Mapped {
        /// In the device's memory.
        device: bool,
    },
    /// It has none, and this is why.
    Failed(Error),
}

/// Services device faults on behalf of the process that calls.
pub(crate) struct Service<'a> {
    seat: Seat<'a>,
    taker: Taker,
    mm: &'a MmWithUser,
    policy: Policy,
    /// Made when something is to be moved.
    request: Option<Request<'a>>,
    /// There was no room for all.
    full: bool,
    seen: KVec<Seen>,
    /// The pages of the window, from its first address on.
    pub(crate) window: KVec<Page>,
}

impl<'a> Service<'a> {
    /// Prepares for it: memory is allocated.
    ///
    /// What it has found or put in the device's memory is not evicted to make room for more of it, until
    /// there is a new turn.
    pub(crate) fn new(seat: Seat<'a>, mm: &'a MmWithUser, policy: Policy) -> Result<Self> {
        Ok(Self {
            seat,
            taker: seat.turn()?,
            mm,
            policy,
            request: None,
            full: false,
            seen: KVec::from_elem(Seen::default(), WINDOW, GFP_KERNEL)?,
            window: KVec::from_elem(Page::Idle, WINDOW, GFP_KERNEL)?,
        })
    }

    fn trace(&self, base: usize) {
        if let Ok(map) = self.seat.gate.enter() {
            let count = |is: fn(&Page) -> bool| self.window.iter().filter(|page| is(page)).count();
            trace::device_fault(
                map.data().identity.unit,
                base,
                [
                    count(|page| matches!(page, Page::Mapped { device: true })),
                    count(|page| matches!(page, Page::Mapped { device: false })),
                    count(|page| matches!(page, Page::Failed(_))),
                ],
            );
        }
    }

    /// What was serviced before is not needed any more.
    pub(crate) fn new_turn(&mut self) -> Result {
        self.taker = self.seat.turn()?;
        Ok(())
    }

    /// Services the faults on the pages of the window at `base` that are wanted: each is `Mapped`
    /// or `Failed` after it. If this fails, with what ends a call, some are `Wanted` still.
    ///
    /// Waits for user space, in a fault: nothing may be locked or lent.
    pub(crate) fn run(&mut self, base: usize) -> Result {
        // A page that others want elsewhere comes and goes. When it has gone that often it is
        // mapped where it is, and at last that fails too.
        const MIGRATE_ATTEMPTS: usize = 4;
        const ATTEMPTS: usize = 256;

        self.count();
        self.refuse_beyond(base);
        for attempt in 0..ATTEMPTS {
            if !self.is_wanted() {
                break;
            }
            if current!().signal_pending() {
                return Err(EINTR);
            }
            // Nodes come first: what moves to the device takes VRAM too.
            if self.survey(base)? && self.prepare(base)? {
                if attempt < MIGRATE_ATTEMPTS {
                    self.migrate(base)?;
                }
                self.map(base, Where::Anywhere)?;
            }
            self.fault_in(base)?;
        }
        self.fail_wanted(EBUSY);
        self.trace(base);
        // So that nobody can have tables for nothing.
        let mapped = |page: &Page| matches!(page, Page::Mapped { .. });
        if !self.window.iter().any(mapped) {
            let map = self.seat.gate.enter()?;
            self.seat.mirror.trim(&map, base);
        }
        Ok(())
    }

    /// Has the pages of `[start, end)`, which is in one window, be what is wanted of it.
    pub(crate) fn want(&mut self, start: usize, end: usize, access: Access) {
        let base = start & !(WINDOW_BYTES - 1);
        let wanted = (start - base) / PAGE_BYTES..(end - base).div_ceil(PAGE_BYTES);
        for (i, page) in self.window.iter_mut().enumerate() {
            *page = if wanted.contains(&i) {
                Page::Wanted(access)
            } else {
                Page::Idle
            };
        }
    }

    /// Maps what is wanted in the window at `base` and is in the device's own memory. Moves nothing,
    /// and faults nothing in.
    pub(crate) fn map_own(&mut self, base: usize) -> Result {
        // It comes and goes with what others do.
        const ATTEMPTS: usize = 16;

        for _ in 0..ATTEMPTS {
            if !self.is_wanted() || !self.prepare(base)? {
                break;
            }
            self.map(base, Where::Own)?;
        }
        Ok(())
    }

    fn is_wanted(&self) -> bool {
        let wanted = |page: &Page| matches!(page, Page::Wanted(_));
        self.window.iter().any(wanted)
    }

    /// Looks at the mappings of what is wanted: refuses shadow stacks, and returns whether there is
    /// anything that may be mapped.
    fn survey(&mut self, base: usize) -> Result<bool> {
        let lock = ReadLocked::new(self.mm)?;
        let mut may_be_mapped = false;
        let mut from = 0;
        while let Some((first, end, _)) = self.next_run(from) {
            let at = base + first * PAGE_BYTES;
            let stop = base + end * PAGE_BYTES;
            let Some(vma) = lock.find_vma(at).filter(|vma| vma.start() < stop) else {
                from = end;
                continue;
            };
            let covered = (vma.start().max(at) - base) / PAGE_BYTES
                ..(vma.end().min(stop) - base) / PAGE_BYTES;
            from = covered.end;
            if vma.is_shadow_stack() {
                for page in self.window.get_mut(covered).unwrap_or_default() {
                    *page = Page::Failed(EACCES);
                }
            } else if vma.flags() & flags::READ != 0 {
                may_be_mapped = true;
            }
        }
        Ok(may_be_mapped)
    }

    /// Has the device page table have nodes for the window. Returns whether there is anything wanted
    /// still.
    fn prepare(&mut self, base: usize) -> Result<bool> {
        let map = self.seat.gate.enter()?;
        let result = self.seat.mirror.prepare(&map, base);
        let sleep = map.data().sleep.clone();
        drop(map);
        match result {
            Ok(()) => Ok(true),
            Err(error) if error == EAGAIN => sleep.wait().map(|()| true),
            Err(error) if error == ENODEV => Err(error),
            Err(error) => {
                self.fail_wanted(error);
                Ok(false)
            }
        }
    }

    fn count(&self) {
        if let Ok(map) = self.seat.gate.enter() {
            let wanted = |page: &&Page| matches!(page, Page::Wanted(_));
            let count = self.window.iter().filter(wanted).count();
            map.data().counters.device_faults.add(count);
        }
    }

    fn refuse_beyond(&mut self, base: usize) {
        let inside = user_end().saturating_sub(base) / PAGE_BYTES;
        for page in self.window.iter_mut().skip(inside) {
            if let Page::Wanted(_) = page {
                *page = Page::Failed(EFAULT);
            }
        }
    }

    fn fail_wanted(&mut self, error: Error) {
        for page in self.window.iter_mut() {
            if let Page::Wanted(_) = page {
                *page = Page::Failed(error);
            }
        }
    }

    /// The next pages from `from` on that are wanted for the same: the first, the one after the
    /// last, and for what.
    fn next_run(&self, from: usize) -> Option<(usize, usize, Access)> {
        let mut pages = self.window.iter().enumerate().skip(from);
        let (first, access) = pages.find_map(|(i, page)| match page {
            Page::Wanted(access) => Some((i, *access)),
            _ => None,
        })?;
        let same = |page: &&Page| **page == Page::Wanted(access);
        let count = self.window.iter().skip(first).take_while(same).count();
        Some((first, first + count, access))
    }

    /// What is advised of the page at `addr`, and where in the window that ends.
    fn advice(&self, base: usize, i: usize) -> (Advice, usize) {
        let at = base + i * PAGE_BYTES;
        let (advice, until) = self.seat.mirror.notes(|notes| notes.at(at));
        (advice, WINDOW.min((until - base) / PAGE_BYTES))
    }

    /// Moves what is wanted to the device, as far as it can be, if that is the policy or is advised.
    fn migrate(&mut self, base: usize) -> Result {
        let mut from = 0;
        while let Some((first, end, _)) = self.next_run(from) {
            let (advice, until) = self.advice(base, first);
            let end = end.min(until);
            from = end;
            if self.full || !advice.may_go(self.policy == Policy::Migrate) {
                continue;
            }
            let mut go = end;
            if advice.location.is_none() {
                let stay;
                (go, stay) = self.bouncing(base, first, end)?;
                from = go + stay;
            }
            if go == first {
                continue;
            }
            let pages = 1 << advice.granularity.unwrap_or(0);
            let start = base + first / pages * pages * PAGE_BYTES;
            let stop = base + go.next_multiple_of(pages) * PAGE_BYTES;
            let request = match &mut self.request {
                Some(request) => request,
                none => none.insert(Request::new(self.seat, Target::Device)?),
            };
            request.for_faults(self.taker);
            let mut progress = Progress::default();
            match request.run(self.mm, start, stop, &mut progress) {
                Err(error) if error == EINTR || error == ENODEV => return Err(error),
                // It is a wish. What cannot be moved is mapped where it lies.
                Err(error) if error == ENOSPC => self.full = true,
                _ => (),
            }
        }
        Ok(())
    }

    /// Of pages that are wanted, where those that bounce begin, and how many those are: they stay.
    fn bouncing(&self, base: usize, first: usize, end: usize) -> Result<(usize, usize)> {
        let map = self.seat.gate.enter()?;
        let memory = map.data();
        let space = self.mm.as_raw().addr();
        let at = |i: usize| base + i * PAGE_BYTES;
        let may_go = |i: &usize| memory.bounces.may_go(space, at(*i));
        let go = first + (first..end).take_while(may_go).count();
        if go == end {
            return Ok((end, 0));
        }
        let stay = 1 + (go + 1..end).take_while(|i| !may_go(i)).count();
        memory.counters.kept.add(stay);
        for i in go..go + stay {
            trace::bounce(memory.identity.unit, at(i), true);
        }
        Ok((go, stay))
    }

    /// Makes entries for what is there for what is wanted of it.
    fn map(&mut self, base: usize, which: Where) -> Result {
        let Some((first, _, _)) = self.next_run(0) else {
            return Ok(());
        };
        let wanted = |page: &Page| matches!(page, Page::Wanted(_));
        let last = self.window.iter().rposition(wanted).unwrap_or(first);
        let pages = self.window.get_mut(first..=last).ok_or(EINVAL)?;
        let seen = self.seen.get_mut(..pages.len()).ok_or(EINVAL)?;
        let pages = core::cell::Cell::from_mut(pages).as_slice_of_cells();
        // Not to be asked for under the mirror's lock.
        let mut read_mostly = [false; WINDOW];
        let mut at = first;
        while at <= last {
            let (advice, until) = self.seat.mirror.notes(|notes| {
                let (advice, until) = notes.at(base + at * PAGE_BYTES);
                (advice, WINDOW.min((until - base) / PAGE_BYTES))
            });
            let run = read_mostly.get_mut(at..until).unwrap_or_default();
            run.fill(advice.read_mostly);
            at = until;
        }
        let begun = self.seat.mirror.begin();
        let lock = ReadLocked::new(self.mm)?;
        let map = self.seat.gate.enter()?;
        let own = |seen: Seen| seen.pfn().and_then(|pfn| map.index_of(pfn));
        let (usage, taker) = (map.data().alloc.usage(), self.taker);
        let want = |i: usize, access| Want {
            access,
            no_more: read_mostly.get(first + i).copied().unwrap_or(false),
        };
        let result = self.seat.mirror.map(
            Look {
                begun: &begun,
                lock: &lock,
                map: &map,
            },
            base + first * PAGE_BYTES,
            seen,
            |i, seen| match pages.get(i)?.get() {
                Page::Wanted(access) => match own(seen) {
                    Some(index) => {
                        usage.need(index, taker);
                        Some(want(i, access))
                    }
                    None => (which == Where::Anywhere).then(|| want(i, access)),
                },
                _ => None,
            },
            |i, mapped| {
                if let Some(page) = pages.get(i) {
                    page.set(match mapped {
                        Mapped::Device => Page::Mapped { device: true },
                        Mapped::System => Page::Mapped { device: false },
                        Mapped::Never => Page::Failed(EFAULT),
                    });
                }
            },
        );
        match result {
            // The address space kept changing: that is one attempt.
            Err(error) if error == EBUSY => Ok(()),
            result => result,
        }
    }

    /// Faults in what is not there for what is wanted of it.
    fn fault_in(&mut self, base: usize) -> Result {
        let mut from = 0;
        while let Some((first, end, access)) = self.next_run(from) {
            from = end;
            let at = |i: usize| base + i * PAGE_BYTES;
            let result = self.fault_in_pages(at(first), at(end), access);
            let Err(error) = result else {
                continue;
            };
            self.not_in(at(first), first, end - first == 1, error)?;
            if end - first == 1 {
                continue;
            }
            // One of them cannot be had. Which one?
            for i in first..end {
                if current!().signal_pending() {
                    return Err(EINTR);
                }
                if let Err(error) = self.fault_in_pages(at(i), at(i + 1), access) {
                    self.not_in(at(i), i, true, error)?;
                }
            }
        }
        Ok(())
    }

    fn fault_in_pages(&mut self, start: usize, end: usize, access: Access) -> Result {
        self.seat
            .mirror
            .fault_in(self.mm, start, end, access, &mut self.seen)
    }

    /// Faulting in page `i`, at `addr`, has failed; `alone` if it was asked for alone.
    fn not_in(&mut self, addr: usize, i: usize, alone: bool, error: Error) -> Result {
        if error == EINTR {
            return Err(error);
        }
        if !alone {
            return Ok(());
        }
        let error = if error == EPERM || (error == EFAULT && self.is_forbidden(addr)?) {
            EACCES
        } else {
            error
        };
        if let Some(page) = self.window.get_mut(i) {
            *page = Page::Failed(error);
        }
        Ok(())
    }

    /// Whether something is mapped at `addr` that must not be read.
    fn is_forbidden(&self, addr: usize) -> Result<bool> {
        let lock = ReadLocked::new(self.mm)?;
        let vma = lock.find_vma(addr).filter(|vma| vma.start() <= addr);
        Ok(vma.is_some_and(|vma| vma.flags() & flags::READ == 0))
    }
}

/// Device faults that are serviced together.
pub(crate) struct Batch<'b> {
    faults: &'b mut [hmm_gpu_device_fault],
    /// Page number and index of each, sorted.
    order: KVVec<[u64; 2]>,
    /// Pages that were mapped.
    pub(crate) mapped: usize,
    /// Those of them that are in the device's memory.
    pub(crate) device: usize,
    /// Pages that were not.
    pub(crate) failed: usize,
}

impl<'b> Batch<'b> {
    /// Sorts the faults. Fails with `EINVAL` if one wants what there is not.
    pub(crate) fn new(faults: &'b mut [hmm_gpu_device_fault]) -> Result<Self> {
        let mut order = KVVec::with_capacity(faults.len(), GFP_KERNEL_ACCOUNT)?;
        for (i, fault) in (0u64..).zip(faults.iter_mut()) {
            access_of(fault)?;
            fault.status = kernel::bindings::ECANCELED;
            order.push([fault.addr / HMM_GPU_PAGE_BYTES, i], GFP_KERNEL_ACCOUNT)?;
        }
        sort_pairs(&mut order);
        Ok(Self {
            faults,
            order,
            mapped: 0,
            device: 0,
            failed: 0,
        })
    }

    /// Services them, a window at a time, and writes the status of each.
    pub(crate) fn run(&mut self, service: &mut Service<'_>) -> Result {
        let mut rest: &[[u64; 2]] = &self.order;
        while let Some([page, _]) = rest.first() {
            // CAST: Widens.
            let first = page / WINDOW as u64 * WINDOW as u64;
            let count = rest.partition_point(|[page, _]| page - first < WINDOW as u64);
            let (these, others) = rest.split_at_checked(count).ok_or(EINVAL)?;
            rest = others;
            // CAST: All lossless: less than `WINDOW`, and an index into a slice.
            let places = || {
                these
                    .iter()
                    .map(|[page, i]| ((page - first) as usize, *i as usize))
            };

            service
                .window
                .iter_mut()
                .for_each(|page| *page = Page::Idle);
            for (place, i) in places() {
                let access = access_of(self.faults.get(i).ok_or(EINVAL)?)?;
                let page = service.window.get_mut(place).ok_or(EINVAL)?;
                if *page != Page::Wanted(Access::Write) {
                    *page = Page::Wanted(access);
                }
            }
            // CAST: A word. The number came from an address.
            let result = service.run(first as usize * PAGE_BYTES);
            for (place, i) in places() {
                if let Some(fault) = self.faults.get_mut(i) {
                    match service.window.get(place) {
                        Some(Page::Mapped { .. }) => fault.status = 0,
                        // CAST: An error is a negative number.
                        Some(Page::Failed(error)) => fault.status = error.to_errno().unsigned_abs(),
                        _ => (),
                    }
                }
            }
            for page in service.window.iter() {
                match page {
                    Page::Mapped { device } => {
                        self.mapped += 1;
                        self.device += usize::from(*device);
                    }
                    Page::Failed(_) | Page::Wanted(_) => self.failed += 1,
                    Page::Idle => (),
                }
            }
            result?;
        }
        Ok(())
    }
}

/// What a fault wants its page for.
fn access_of(fault: &hmm_gpu_device_fault) -> Result<Access> {
    match fault.access {
        uapi::HMM_GPU_ACCESS_READ => Ok(Access::Read),
        uapi::HMM_GPU_ACCESS_WRITE => Ok(Access::Write),
        _ => Err(EINVAL),
    }
}

/// How an access of the device went.
#[derive(Default)]
pub(crate) struct Accessed {
    /// How many times a page was missing.
    pub(crate) faults: usize,
    /// Where one ended it.
    pub(crate) fault_addr: usize,
    /// What the device found there in its page table, if it was not serviced.
    pub(crate) word: u64,
}

/// A device that accesses a process's memory on behalf of it.
pub(crate) struct Engine<'a> {
    seat: Seat<'a>,
    mm: &'a MmWithUser,
    /// What is done about misses; nothing if there is none.
    policy: Option<Policy>,
    service: Option<Service<'a>>,
    pub(crate) accessed: Accessed,
}

/// What a device does with bytes at an address.
pub(crate) enum Operation<'b> {
    /// Reads them into these.
    Read(&'b mut [u8]),
    /// Writes these to them.
    Write(&'b [u8]),
}

impl Operation<'_> {
    fn len(&self) -> usize {
        match self {
            Operation::Read(to) => to.len(),
            Operation::Write(from) => from.len(),
        }
    }

    fn access(&self) -> Access {
        match self {
            Operation::Read(_) => Access::Read,
            Operation::Write(_) => Access::Write,
        }
    }
}

impl<'a> Engine<'a> {
    /// Without a `policy`, a miss is not serviced.
    pub(crate) fn new(seat: Seat<'a>, mm: &'a MmWithUser, policy: Option<Policy>) -> Self {
        Self {
            seat,
            mm,
            policy,
            service: None,
            accessed: Accessed::default(),
        }
    }

    /// It was not a miss that ended the access.
    pub(crate) fn forget_miss(&mut self) {
        self.accessed.fault_addr = 0;
        self.accessed.word = 0;
    }

    /// Does an operation on the bytes from `addr` on, of an access that goes on until `end`. Returns
    /// how many bytes were dealt with, and why not all of them. They must not wrap around.
    ///
    /// Waits for user space, in a fault: nothing may be locked or lent.
    pub(crate) fn run(
        &mut self,
        addr: usize,
        end: usize,
        mut operation: Operation<'_>,
    ) -> (usize, Result) {
        // Between the service of a fault and the access that faulted, the page may go again.
        const ATTEMPTS: usize = 256;

        let len = operation.len();
        let (mut done, mut attempts) = (0, 0);
        while done < len {
            let at = addr + done;
            let piece = (len - done).min(PAGE_BYTES - at % PAGE_BYTES);
            let result = self.piece(at, done, piece, &mut operation);
            let result = match result {
                Ok(Ok(())) => {
                    done += piece;
                    attempts = 0;
                    continue;
                }
                Ok(Err(miss)) if attempts < ATTEMPTS => {
                    attempts += 1;
                    self.miss(at, end, operation.access(), miss)
                }
                Ok(Err(_)) => Err(EBUSY),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                // What ends a call is not about the page.
                if ![ENODEV, EINTR, ERESTARTSYS, ENOMEM].contains(&error) {
                    self.accessed.fault_addr = at;
                }
                return (done, Err(error));
            }
        }
        (done, Ok(()))
    }

    /// Does an atomic operation on the word at `addr`, and returns what it was before.
    ///
    /// Waits for user space, in a fault: nothing may be locked or lent.
    pub(crate) fn atomic(&mut self, addr: usize, operation: &Atomic) -> Result<u64> {
        const ATTEMPTS: usize = 256;

        let end = addr.checked_add(operation.bytes()).ok_or(EINVAL)?;
        if end > user_end() {
            return Err(EFAULT);
        }
        for _ in 0..ATTEMPTS {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let miss = {
                let map = self.seat.gate.enter()?;
                match self.seat.mirror.atomic(&map, addr, operation)? {
                    Ok(old) => return Ok(old),
                    Err(miss) => miss,
                }
            };
            // Mapped where it lies, it is either in the device's memory, which will do, or has to be
            // taken for the device alone.
            self.miss(addr, end, Access::Write, miss)?;
            let service = self.service.as_ref().ok_or(EAGAIN)?;
            let at = service.window.get(addr % WINDOW_BYTES / PAGE_BYTES);
            if matches!(at, Some(Page::Mapped { device: true })) {
                continue;
            }
            match self.seat.mirror.exclusive(self.mm, addr, Some(operation)) {
                Ok(Some(old)) => return Ok(old),
                // It has changed since it was mapped: the next miss tells what is wrong with it, if
                // anything is.
                Err(error) if [EBUSY, EFAULT, EPERM].contains(&error) => (),
                // In sleep there is none.
                Err(error) if error == EAGAIN => {
                    let sleep = self.seat.gate.enter()?.data().sleep.clone();
                    sleep.wait()?;
                }
                result => drop(result?),
            }
        }
        Err(EBUSY)
    }

    /// Does an operation on bytes of one page.
    fn piece(
        &self,
        at: usize,
        done: usize,
        piece: usize,
        operation: &mut Operation<'_>,
    ) -> Result<core::result::Result<(), Miss>> {
        // Until it is looked at, an address is a number.
        if at >= user_end() {
            return Err(EFAULT);
        }
        let map = self.seat.gate.enter()?;
        let counters = &map.data().counters;
        let range = done..done + piece;
        let (result, counter) = match operation {
            Operation::Read(to) => {
                let to = to.get_mut(range).ok_or(EINVAL)?;
                (self.seat.mirror.read(&map, at, to)?, &counters.device_read)
            }
            Operation::Write(from) => {
                let from = from.get(range).ok_or(EINVAL)?;
                (
                    self.seat.mirror.write(&map, at, from)?,
                    &counters.device_written,
                )
            }
        };
        if result.is_ok() {
            counter.add(piece);
        }
        Ok(result)
    }

    /// Services a miss at `at`, and with it those to come until `end`, as far as they are in the
    /// same window.
    fn miss(&mut self, at: usize, end: usize, access: Access, miss: Miss) -> Result {
        self.accessed.faults += 1;
        let Some(policy) = self.policy else {
            self.accessed.word = miss.word;
            return Err(EAGAIN);
        };
        let service = match &mut self.service {
            Some(service) => service,
            none => none.insert(Service::new(self.seat, self.mm, policy)?),
        };
        let base = at & !(WINDOW_BYTES - 1);
        service.new_turn()?;
        service.want(at, end.min(base.saturating_add(WINDOW_BYTES)), access);
        service.run(base)?;
        match service.window.get((at - base) / PAGE_BYTES) {
            Some(Page::Failed(error)) => Err(*error),
            _ => Ok(()),
        }
    }
}
