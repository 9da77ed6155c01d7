// SPDX-License-Identifier: GPL-2.0

//! What moves, and what is counted: every migration of the driver goes through here, whether it was
//! asked for, or a CPU fault or an eviction caused it.

#![forbid(unsafe_code)]

use crate::{
    bitmap::{BLOCK_PAGES, SHARED},
    client::Seat,
    counters::{Counter, Counters},
    devmem::DeviceMemory,
    evict::make_room,
    fail::Step,
    hmm::{
        folio::{Effort, SystemFolio},
        migrate::{Collected, Entries, Grain, Select, Source},
        pagemap::{Kind, PageMap, MAX_ORDER},
        seen::Seen,
        vma::{LockedVma, ReadLocked},
        PAGE_BYTES,
    },
    phases::Phases,
    sys::{mapping::Written, trace},
    usage::Taker,
};
use core::ops::ControlFlow;
use kernel::{
    mm::{virt::flags, MmWithUser},
    prelude::*,
};

/// The most pages that one migration handles: 2 MiB of them, which share a page table.
pub(crate) const BATCH: usize = BLOCK_PAGES;

/// Why pages move to system memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// `MIGRATE` asked for it.
    Request,
    /// The CPU touched a page.
    Fault,
    /// Others need the room.
    Pressure,
    /// The device goes away.
    Evict,
}

impl Cause {
    fn traced(self) -> trace::Cause {
        match self {
            Self::Request => trace::Cause::RequestToSystem,
            Self::Fault => trace::Cause::CpuFault,
            Self::Pressure => trace::Cause::Pressure,
            Self::Evict => trace::Cause::Evict,
        }
    }
}

/// How a migration ended. In pages.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Moved.
    pub(crate) moved: usize,
    /// The page at which memory for its new place was not to be had. Nothing from there on has
    /// moved.
    pub(crate) without_memory: Option<usize>,
    /// Large folios that stay, because there was no large folio to be had for them.
    pub(crate) stuck: usize,
    /// What was to move is lost, with the device.
    pub(crate) lost: bool,
}

/// Room for the entries of a migration of [`BATCH`] pages.
pub(crate) struct Scratch {
    src: KVec<usize>,
    dst: KVec<usize>,
}

impl Scratch {
    /// Allocates it.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            src: KVec::from_elem(0, Entries::words(BATCH), GFP_KERNEL)?,
            dst: KVec::from_elem(0, Entries::words(BATCH), GFP_KERNEL)?,
        })
    }

    /// The room.
    pub(crate) fn entries(&mut self) -> Entries<'_> {
        Entries::new(&mut self.src, &mut self.dst)
    }
}

/// A folio of system memory for what is in VRAM.
pub(crate) fn new_folio(order: u32, effort: Effort) -> Result<SystemFolio> {
    Step::SystemAllocation.pass()?;
    SystemFolio::new(order, effort)
}

/// Moves all device pages of a migration that is set up to system memory, for a device `memory`. A folio that
/// was allocated for it before can be given along.
///
/// Of a device that is gone, nothing moves, but for [`Cause::Evict`]: then it has to, and is declared
/// broken there. That takes room in `lost` for a word for each page.
pub(crate) fn move_to_system(
    memory: &DeviceMemory,
    mut collected: Collected<'_, DeviceMemory>,
    cause: Cause,
    lost: &mut [usize],
    mut spare: Option<SystemFolio>,
) -> Outcome {
    // Whose the first page is that is on this device: it is counted as theirs.
    let mut first = None;
    let mut phases = Phases::new(memory, &collected, cause.traced());
    let mut outcome = Outcome::default();
    let effort = match cause {
        Cause::Fault => Effort::PageFault,
        Cause::Request | Cause::Pressure => Effort::MayFail,
        Cause::Evict => Effort::Hard,
    };
    collected.fill(|i, source, _| {
        let Source::Device { map, index, order } = source else {
            return ControlFlow::Continue(None);
        };
        let here = memory;
        let memory = map.data();
        if first.is_none() && core::ptr::eq(memory, here) {
            first = Some(memory.alloc.usage().owner(index));
        }
        // Now that its entries are gone: an execution that has begun before may use them still.
        if memory.user_of(index).is_some() {
            return ControlFlow::Continue(None);
        }
        let count = |which: fn(&Counters) -> &Counter| {
            let owner = memory.alloc.usage().owner(index);
            memory.counters.add(owner, which, 1);
        };
        let folio = match spare.take_if(|spare| spare.order() == order) {
            Some(folio) => Ok(folio),
            None => new_folio(order, effort),
        };
        let folio = match folio {
            // It stays where it is.
            Ok(_) if Step::Copy.pass().is_err() => {
                count(|it| &it.copy_failures);
                return ControlFlow::Continue(None);
            }
            folio => folio.and_then(|folio| memory.vram.read_folio(index * PAGE_BYTES, folio)),
        };
        match folio {
            // What the bus answers for a device that is gone is nobody's data.
            Ok(_) if cause != Cause::Evict && !memory.vram.was_there(index * PAGE_BYTES) => {
                outcome.lost = true;
                ControlFlow::Continue(None)
            }
            Ok(folio) => ControlFlow::Continue(Some(folio)),
            Err(_) if order > 0 => {
                count(|it| &it.large_failures);
                outcome.stuck += 1;
                ControlFlow::Continue(None)
            }
            Err(_) => {
                count(|it| &it.system_failures);
                outcome.without_memory = Some(i);
                ControlFlow::Break(())
            }
        }
    });
    let reach = outcome.without_memory.unwrap_or(collected.pages());
    phases.migration.copy_ns = phases.lap();
    let moved = collected.commit(Written::wait());
    phases.migration.pages_ns = phases.lap();
    let which: fn(&Counters) -> &Counter = match cause {
        Cause::Request => |it| &it.to_system,
        Cause::Fault => |it| &it.fault_back,
        Cause::Pressure => |it| &it.pressure,
        Cause::Evict => |it| &it.evicted,
    };
    // A page's device counts it, whichever device's client asked.
    let mut run: Option<Run<'_>> = None;
    moved.each_of_device(|map, index, order| {
        let memory = map.data();
        let owner = memory.alloc.usage().owner(index);
        if !run.as_ref().is_some_and(|run| run.is_of(memory, owner)) {
            if let Some(run) = run.replace(Run::new(memory, owner)) {
                run.count(which);
            }
        }
        if let Some(run) = &mut run {
            run.pages += 1 << order;
            run.large += usize::from(order > 0);
        }
        outcome.moved += 1 << order;
    });
    if let Some(run) = run {
        run.count(which);
    }
    // After the copy: a device that is there now was there then.
    let is_gone = |i| match moved.moved(i)? {
        Source::Device { map, .. } => Some(map.data().vram.is_gone()),
        _ => None,
    };
    if cause == Cause::Evict && (0..reach).find_map(is_gone) == Some(true) {
        outcome.lost = true;
        moved.fail(lost);
    } else {
        drop(moved);
    }
    phases.finish(&outcome, first.unwrap_or(0));
    outcome
}

/// Pages that have come to system memory of one client's on one device: most follow on one another, and are counted together.
struct Run<'a> {
    memory: &'a DeviceMemory,
    owner: i16,
    pages: usize,
    large: usize,
}

impl<'a> Run<'a> {
    fn new(memory: &'a DeviceMemory, owner: i16) -> Self {
        Self {
            memory,
            owner,
            pages: 0,
            large: 0,
        }
    }

    fn is_of(&self, memory: &DeviceMemory, owner: i16) -> bool {
        self.owner == owner && core::ptr::eq(self.memory, memory)
    }

    fn count(&self, which: fn(&Counters) -> &Counter) {
        let counters = &self.memory.counters;
        counters.add(self.owner, which, self.pages);
        if self.large > 0 {
            counters.add(self.owner, |it| &it.large_to_system, self.large);
        }
    }
}

/// Moves what a migration has collected (system memory, places never touched, and the VRAM of other
/// devices) to the VRAM of `map`.
///
/// `room` has a place for an index for each page of the migration.
fn move_to_device(
    map: &PageMap<DeviceMemory>,
    mut collected: Collected<'_, DeviceMemory>,
    taker: Taker,
    cause: trace::Cause,
    room: &mut [u32],
) -> Outcome {
    let memory = map.data();
    let client = taker.account();
    let count = |which: fn(&Counters) -> &Counter, n| memory.counters.add(client, which, n);
    let mut phases = Phases::new(memory, &collected, cause);
    let mut outcome = Outcome::default();
    // What the kernel has in folios of other sizes, it has split.
    let usage = memory.alloc.usage();
    let may_move = |source: &Source<'_, DeviceMemory>, is_own: bool| {
        let stays = match source {
            Source::Device {
                map: from, index, ..
            } => {
                let is_here = core::ptr::eq(*from, map) && taker.has_here(usage, *index);
                // Its entries are gone now, but an execution that has begun before may use them still.
                is_here || from.data().user_of(*index).is_some()
            }
            _ => false,
        };
        // Who maps a pool writes to what is in it, past what the kernel allows: so that is nobody else's.
        let may_come = is_own || taker.pool() == SHARED;
        !stays && may_come && [0, MAX_ORDER].contains(&source.order())
    };
    // Some of them may not move, but seldom: each is looked at once.
    let room = room.get_mut(..collected.singles()).unwrap_or_default();
    let mut taken = memory.take(taker, 0, room);
    let mut indices = room.iter().take(taken);
    collected.fill(|i, source, is_own| {
        if !may_move(&source, is_own) {
            return ControlFlow::Continue(None);
        }
        let order = source.order();
        let mut large = [0];
        let index = if order == 0 {
            indices.next()
        } else if memory.take(taker, order, &mut large) == 1 {
            taken += 1 << order;
            large.first()
        } else {
            count(|it| &it.large_failures, 1);
            outcome.stuck += 1;
            return ControlFlow::Continue(None);
        };
        let Some(&index) = index else {
            count(|it| &it.vram_failures, 1);
            outcome.without_memory = Some(i);
            return ControlFlow::Break(());
        };
        // CAST: The index of a page fits in a word.
        let index = index as usize;
        let Ok(folio) = map.init_folio(index, order) else {
            // The device goes away: the caller will see that for itself.
            memory.give_back(index, order);
            return ControlFlow::Continue(None);
        };
        let filled = Step::Copy.pass().and_then(|()| match &source {
            Source::System(from) => memory.vram.write_folio(folio, from),
            Source::Hole { .. } => memory.vram.zero_folio(folio),
            Source::Device { map, index, .. } => {
                let (from, offset) = (&map.data().vram, index * PAGE_BYTES);
                let filled = memory.vram.copy_folio(folio, from, offset)?;
                // What the bus answers for a device that is gone is nobody's data.
                from.was_there(offset).then_some(filled).ok_or(EIO)
            }
        });
        if filled.is_err() {
            count(|it| &it.copy_failures, 1);
        }
        ControlFlow::Continue(filled.ok())
    });
    // CAST: The index of a page fits in a word.
    indices.for_each(|&index| memory.give_back(index as usize, 0));
    phases.migration.copy_ns = phases.lap();
    let moved = collected.commit(Written::wait());
    phases.migration.pages_ns = phases.lap();
    let done = moved.count();
    outcome.moved = done.pages;
    let mut from_other = 0;
    moved.each_of_device(|map, index, order| {
        let from = map.data();
        let owner = from.alloc.usage().owner(index);
        from.counters.add(owner, |it| &it.to_other, 1 << order);
        from_other += 1 << order;
    });
    drop(moved);
    phases.finish(&outcome, client);
    count(|it| &it.to_device, outcome.moved);
    count(|it| &it.unused, taken.saturating_sub(outcome.moved));
    if matches!(cause, trace::Cause::DeviceFault) {
        count(|it| &it.device_fault_pages, outcome.moved);
    }
    count(|it| &it.populated, done.populated);
    count(|it| &it.from_other, from_other);
    count(|it| &it.large_to_device, done.large);
    outcome
}

/// Where pages are to go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// System memory.
    System,
    /// The device's VRAM.
    Device,
}

/// How far a request has come, in bytes. The last four add up to the first.
#[derive(Clone, Copy, Default)]
pub(crate) struct Progress {
    pub(crate) done: usize,
    pub(crate) moved: usize,
    pub(crate) already: usize,
    pub(crate) skipped: usize,
    pub(crate) unmapped: usize,
}

/// A request to move the pages of a range, of a process that asks for its own.
pub(crate) struct Request<'a> {
    seat: Seat<'a>,
    /// Whether to end it, asked between two batches.
    is_over: &'a dyn Fn(&MmWithUser) -> bool,
    taker: Taker,
    /// Of what goes to the device.
    cause: trace::Cause,
    target: Target,
    /// What is on another device stays there.
    only_system: bool,
    /// For tests: the next folio of 2 MiB cannot be had.
    fail_large: bool,
    scratch: Scratch,
    indices: KVec<u32>,
    seen: KVec<Seen>,
}

impl<'a> Request<'a> {
    /// Prepares a request, for which memory is allocated. What it has moved to the device is not evicted
    /// to make room for more of it.
    pub(crate) fn new(seat: Seat<'a>, target: Target) -> Result<Self> {
        Ok(Self {
            seat,
            is_over: &signalled,
            taker: seat.turn()?,
            cause: trace::Cause::RequestToDevice,
            target,
            only_system: false,
            fail_large: false,
            scratch: Scratch::new()?,
            indices: KVec::from_elem(0, BATCH, GFP_KERNEL)?,
            seen: KVec::from_elem(Seen::default(), BATCH, GFP_KERNEL)?,
        })
    }

    /// It is for device faults, in this turn.
    pub(crate) fn for_faults(&mut self, taker: Taker) {
        self.taker = taker;
        self.cause = trace::Cause::DeviceFault;
    }

    /// Has it end when `is_over` says so, not when a signal comes.
    pub(crate) fn end_when(&mut self, is_over: &'a dyn Fn(&MmWithUser) -> bool) {
        self.is_over = is_over;
    }

    /// Has what is on another device stay there.
    pub(crate) fn only_system(&mut self) {
        self.only_system = true;
    }

    /// For tests: the next folio of 2 MiB that is wanted cannot be had.
    pub(crate) fn fail_large(&mut self) {
        self.fail_large = true;
    }

    /// Moves the pages of `[start, end)`, both page aligned. Whatever it returns, `progress` says
    /// how far it came.
    pub(crate) fn run(
        &mut self,
        mm: &MmWithUser,
        start: usize,
        end: usize,
        progress: &mut Progress,
    ) -> Result {
        // So often is what was made room for taken by others, before the request goes on without.
        const ATTEMPTS: usize = 64;

        let (mut attempts, mut claimed) = (0, false);
        // A mapping in which ksmd may be at work.
        let mut merging = false;
        while start + progress.done < end {
            if (self.is_over)(mm) {
                return Err(EINTR);
            }
            let at = start + progress.done;
            // Taken anew for every batch, so that who wants to change the address space, or to
            // unbind the device, waits for one batch at most. In this order: a hostile process can
            // make others wait for its own mmap lock.
            let lock = match core::mem::take(&mut merging) {
                false => ReadLocked::new(mm)?,
                true => ReadLocked::alone(mm, at)?,
            };
            let map = self.seat.gate.enter()?;
            let (vma, stop) = next_batch(&lock, at, end);
            let Some(vma) = vma else {
                progress.unmapped += stop - at;
                progress.done += stop - at;
                continue;
            };
            let (advice, until) = self.seat.mirror.notes(|notes| notes.at(at));
            let stop = stop.min(until);
            if self.target == Target::Device && advice.no_migrate {
                let skipped = (stop - at) / PAGE_BYTES;
                map.data()
                    .counters
                    .add(self.seat.account(), |it| &it.skipped, skipped);
                progress.skipped += stop - at;
                progress.done += stop - at;
                continue;
            }
            let lacks = self.lacks(&map, &lock, vma, at, stop);
            if lacks > 0 && attempts < ATTEMPTS {
                drop(lock);
                if !claimed {
                    drop(map);
                    self.claim(mm, stop, end)?;
                    claimed = true;
                } else if make_room(&map, self.taker, lacks) {
                    attempts += 1;
                } else {
                    attempts = ATTEMPTS;
                }
                continue;
            }
            if self.target == Target::Device && vma.may_merge() && !lock.is_alone() {
                merging = true;
                continue;
            }
            match self.batch(&map, &lock, vma, at, stop, progress) {
                // Others were faster.
                Err(error) if error == ENOSPC && attempts < ATTEMPTS => attempts += 1,
                result => {
                    result?;
                    attempts = 0;
                }
            }
        }
        if progress.unmapped == progress.done {
            return Err(EFAULT);
        }
        Ok(())
    }

    /// Has what is in VRAM already of `[start, end)` not be evicted in this turn.
    fn claim(&mut self, mm: &MmWithUser, start: usize, end: usize) -> Result {
        let mut at = start;
        while at < end {
            if (self.is_over)(mm) {
                return Err(EINTR);
            }
            let lock = ReadLocked::new(mm)?;
            let map = self.seat.gate.enter()?;
            let (vma, stop) = next_batch(&lock, at, end);
            if vma.is_some_and(|vma| self.may_move(vma)) {
                self.find(&map, &lock, at, (stop - at) / PAGE_BYTES);
            }
            at = stop;
        }
        Ok(())
    }

    /// How many pages of VRAM have to be free for `[start, end)` to come to the device, of which there are
    /// less.
    fn lacks(
        &mut self,
        map: &PageMap<DeviceMemory>,
        lock: &ReadLocked<'_>,
        vma: LockedVma<'_>,
        start: usize,
        end: usize,
    ) -> usize {
        let pages = (end - start) / PAGE_BYTES;
        let free = map.data().alloc.free_in(self.taker.pool());
        if self.target == Target::System || free >= pages || !self.may_move(vma) {
            return 0;
        }
        let missing = pages - self.find(map, lock, start, pages).at_target.min(pages);
        if missing > free {
            missing
        } else {
            0
        }
    }

    /// Whether there may be something in a mapping that can be moved.
    fn may_move(&self, vma: LockedVma<'_>) -> bool {
        // What nobody may access is not populated: a heap or a stack has such ranges, large and
        // empty.
        let accessible = vma.flags() & (flags::READ | flags::WRITE | flags::EXEC) != 0;
        // A private mapping of a file has anonymous pages where it was written to.
        let may_have = vma.is_anonymous() || vma.flags() & flags::SHARED == 0;
        may_have && (accessible || self.target == Target::System)
    }

    /// Moves the pages of `[start, end)`, which is inside `vma` and one batch.
    fn batch(
        &mut self,
        map: &PageMap<DeviceMemory>,
        lock: &ReadLocked<'_>,
        vma: LockedVma<'_>,
        start: usize,
        end: usize,
        progress: &mut Progress,
    ) -> Result {
        let kind = map.kind();
        let select = match (self.target, kind) {
            (Target::Device, _) => Select::System,
            (Target::System, Kind::Private) => Select::Device,
            (Target::System, Kind::Coherent) => Select::Coherent,
        };
        let mut outcome = self.move_selected(map, lock, vma, start, end, select);
        let pages = outcome.without_memory.unwrap_or((end - start) / PAGE_BYTES);
        let mut found = Found::default();
        if outcome.moved < pages {
            found = self.find(map, lock, start, pages);
        }
        // A second time, because it is seldom, and would have what is here already be collected too.
        if self.target == Target::Device && found.other > 0 && !self.only_system {
            let stop = start + pages * PAGE_BYTES;
            let more = self.move_selected(map, lock, vma, start, stop, Select::Device);
            // Others may have moved some back between the two.
            outcome.moved = pages.min(outcome.moved + more.moved);
            // What did not fit is among what is skipped.
            outcome.without_memory = outcome.without_memory.or(more.without_memory);
            found = self.find(map, lock, start, pages);
        }
        let already = found
            .at_target
            .saturating_sub(outcome.moved)
            .min(pages.saturating_sub(outcome.moved));
        let skipped = pages.saturating_sub(outcome.moved + already);
        map.data()
            .counters
            .add(self.seat.account(), |it| &it.skipped, skipped);
        progress.done += pages * PAGE_BYTES;
        progress.moved += outcome.moved * PAGE_BYTES;
        progress.already += already * PAGE_BYTES;
        progress.skipped += skipped * PAGE_BYTES;
        match (outcome.without_memory, self.target) {
            (None, _) => Ok(()),
            (Some(_), Target::Device) => Err(ENOSPC),
            (Some(_), Target::System) => Err(ENOMEM),
        }
    }

    /// Moves those pages of `[start, end)` that are in what is selected.
    ///
    /// What is on the device already, before and after what is not, is left out: to collect a range is to invalidate all that
    /// devices know of it (`mmu_notifier_invalidate_range_start` in `migrate_vma_collect`), whatever it finds there.
    ///
    /// Pages that KSM has merged are not collected at all. `migrate_vma_collect_pmd` puts a migration entry
    /// in the place of each page before it knows that the reverse map has that place, and takes it away by
    /// the reverse map; KSM's has no place where ksmd has not been since a fork, or since it last found the
    /// page missing. Such an entry stays for ever, and who touches it spins (7.3). The mapping need not be
    /// one that may be merged: what is swapped in is as it was.
    ///
    /// So that none comes between the look and the migration, the lock is held for writing where one may:
    /// ksmd puts a merged page into its place first, and tells the reverse map later, without the lock
    /// (`try_to_merge_with_ksm_page`, `stable_tree_append`); a fault brings one back from the swap.
    fn move_selected(
        &mut self,
        map: &PageMap<DeviceMemory>,
        lock: &ReadLocked<'_>,
        vma: LockedVma<'_>,
        start: usize,
        end: usize,
        select: Select,
    ) -> Outcome {
        if !self.may_move(vma) {
            return Outcome::default();
        }
        if select != Select::System {
            return self.move_run(map, vma, start, end, select);
        }
        let mut outcome = Outcome::default();
        let mut at = start;
        while at < end {
            let pages = (end - at) / PAGE_BYTES;
            let Some(seen) = self.seen.get_mut(..pages) else {
                break;
            };
            if self.seat.mirror.look(lock, at, seen).is_err() {
                break;
            }
            let is_here = |seen: &Seen| seen.pfn().and_then(|pfn| map.index_of(pfn)).is_some();
            let stays = |seen: &&Seen| seen.is_merged() || is_here(seen);
            let staying = seen.iter().take_while(stays).count();
            let rest = seen.iter().skip(staying);
            let others = rest.clone().take_while(|seen| !seen.is_merged()).count();
            // What is here at the end stays out of it too.
            let last = rest.take(others).rposition(|seen| !is_here(seen));
            let others = last.map_or(0, |last| last + 1);
            at += staying * PAGE_BYTES;
            if others == 0 {
                break;
            }
            let run = self.move_run(map, vma, at, at + others * PAGE_BYTES, select);
            outcome.moved += run.moved;
            outcome.stuck += run.stuck;
            if let Some(i) = run.without_memory {
                outcome.without_memory = Some((at - start) / PAGE_BYTES + i);
                break;
            }
            at += others * PAGE_BYTES;
        }
        outcome
    }

    /// Moves those pages of `[start, end)` that are in what is selected, none of which KSM has merged.
    fn move_run(
        &mut self,
        map: &PageMap<DeviceMemory>,
        vma: LockedVma<'_>,
        start: usize,
        end: usize,
        select: Select,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        // On the device as in system memory: who wants no large pages (`MADV_NOHUGEPAGE`) gets none.
        // What is large there comes back as it is. Device-coherent folios are of a page: the kernel
        // does not collect others.
        let unwanted = vma.flags() & flags::NOHUGEPAGE != 0 && self.target == Target::Device;
        let small =
            unwanted || map.kind() == Kind::Coherent || core::mem::take(&mut self.fail_large);
        let first = if small { Grain::Page } else { Grain::Large };
        for grain in [first, Grain::Page] {
            let entries = self.scratch.entries();
            outcome = match Collected::range(vma, start, end, select, grain, entries) {
                Ok(collected) if self.target == Target::Device => {
                    move_to_device(map, collected, self.taker, self.cause, &mut self.indices)
                }
                Ok(collected) => {
                    move_to_system(map.data(), collected, Cause::Request, &mut [], None)
                }
                // A mapping that the kernel does not migrate.
                Err(_) => Outcome::default(),
            };
            // A range is one large folio, or has none. Nothing has moved if that is stuck: its pages
            // may, one by one.
            if outcome.stuck == 0 {
                break;
            }
        }
        outcome
    }

    /// Where `pages` pages from `start` on are now.
    fn find(
        &mut self,
        map: &PageMap<DeviceMemory>,
        lock: &ReadLocked<'_>,
        start: usize,
        pages: usize,
    ) -> Found {
        let mut found = Found::default();
        let Some(seen) = self.seen.get_mut(..pages) else {
            return found;
        };
        if self.seat.mirror.look(lock, start, seen).is_err() {
            return found;
        }
        for seen in seen.iter() {
            let pfn = seen.pfn();
            let usage = map.data().alloc.usage();
            let index = pfn.and_then(|pfn| map.index_of(pfn));
            let index = index.filter(|index| self.taker.has_here(usage, *index));
            let here = index.is_some();
            if let Some(index) = index.filter(|_| self.target == Target::Device) {
                // So that it is not evicted for the rest.
                usage.need(index, self.taker);
            }
            let other = !here && pfn.is_some_and(|pfn| crate::units::of_pfn(pfn).is_some());
            found.other += usize::from(other);
            found.at_target += usize::from(match self.target {
                Target::Device => here,
                // What cannot be seen is not said to be there.
                Target::System => !here && !other && !seen.is_hidden(),
            });
        }
        found
    }
}

/// Whether a signal has come.
fn signalled(_: &MmWithUser) -> bool {
    current!().signal_pending()
}

/// The mapping at `at`, if there is one, and where the batch, or the gap, that begins there ends.
fn next_batch<'a>(
    lock: &'a ReadLocked<'_>,
    at: usize,
    end: usize,
) -> (Option<LockedVma<'a>>, usize) {
    match lock.find_vma(at).filter(|vma| vma.start() < end) {
        Some(vma) if vma.start() <= at => {
            let boundary = (at | (BATCH * PAGE_BYTES - 1)) + 1;
            (Some(vma), end.min(vma.end()).min(boundary))
        }
        next => (None, next.map_or(end, |vma| vma.start())),
    }
}

/// Where the pages of a range are.
#[derive(Default)]
struct Found {
    at_target: usize,
    /// On a device that is not the client's, or not in its pool.
    other: usize,
}
