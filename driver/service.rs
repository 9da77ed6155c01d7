// SPDX-License-Identifier: GPL-2.0

//! Device faults are serviced: what a device wants is moved, mapped, faulted in, or refused, 2 MiB at a time.

#![forbid(unsafe_code)]

use crate::{
    advice::Advice,
    bitmap::BLOCK_PAGES,
    client::Seat,
    counters::{Counter, Counters},
    hmm::{
        mirror::{Access, Look, Mapped, Want},
        seen::Seen,
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    migration::{Progress, Request, Target},
    sys::trace,
    usage::Taker,
};
use kernel::{
    mm::{virt::flags, MmWithUser},
    prelude::*,
};

/// The most pages that are serviced together: 2 MiB of them, which share a leaf of the table.
pub(crate) const WINDOW: usize = BLOCK_PAGES;

/// Bytes of a window.
pub(crate) const WINDOW_BYTES: usize = WINDOW * PAGE_BYTES;
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
    /// How often a page of the window was not there after a second of asking for it.
    busy: usize,
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
            busy: 0,
            seen: KVec::from_elem(Seen::default(), WINDOW, GFP_KERNEL)?,
            window: KVec::from_elem(Page::Idle, WINDOW, GFP_KERNEL)?,
        })
    }

    /// Counts and traces what has become of the faults.
    fn tell(&self, base: usize) {
        if let Ok(map) = self.seat.gate.enter() {
            let count = |is: fn(&Page) -> bool| self.window.iter().filter(|page| is(page)).count();
            let pages = [
                count(|page| matches!(page, Page::Mapped { device: true })),
                count(|page| matches!(page, Page::Mapped { device: false })),
                count(|page| matches!(page, Page::Failed(_) | Page::Wanted(_))),
            ];
            let which: [fn(&Counters) -> &Counter; 3] = [
                |it| &it.faults_in_device,
                |it| &it.faults_in_system,
                |it| &it.fault_failures,
            ];
            for (which, pages) in which.into_iter().zip(pages) {
                map.data().counters.add(self.seat.account(), which, pages);
            }
            trace::device_fault(map.data().identity.unit, base, pages);
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
        self.count();
        let result = self.run_all(base);
        self.tell(base);
        result?;
        // So that nobody can have tables for nothing.
        let mapped = |page: &Page| matches!(page, Page::Mapped { .. });
        if !self.window.iter().any(mapped) {
            let map = self.seat.gate.enter()?;
            self.seat.mirror.trim(&map, base);
        }
        Ok(())
    }

    fn run_all(&mut self, base: usize) -> Result {
        // A page that others want elsewhere comes and goes. When it has gone that often it is
        // mapped where it is, and at last that fails too.
        const MIGRATE_ATTEMPTS: usize = 4;
        const ATTEMPTS: usize = 256;

        self.busy = 0;
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
            let account = self.seat.account();
            map.data()
                .counters
                .add(account, |it| &it.device_faults, count);
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
        memory
            .counters
            .add(self.seat.account(), |it| &it.kept, stay);
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
        // The second may have passed without anything that changed, where a processor does not get to run.
        const SECONDS: usize = 4;

        if error == EINTR {
            return Err(error);
        }
        if !alone {
            return Ok(());
        }
        if error == EBUSY && self.busy < SECONDS {
            self.busy += 1;
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
