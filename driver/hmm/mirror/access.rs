// SPDX-License-Identifier: GPL-2.0

//! What a device does to memory through a mirror's table: it reads, writes, does atomic operations, and takes
//! pages for itself.

use super::{Access, Mirror, Miss, State, Table};
use crate::{
    hmm::{
        folio::LockedFolio,
        pagemap::PageMap,
        seen::{Seen, EXCLUSIVE, VALID},
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    radix::{Leaf, FANOUT},
    sys::{
        bindings,
        mapping::{Atomic, Written},
    },
    uapi::HMM_GPU_PTE_VALID,
};
use kernel::{error::to_result, mm::MmWithUser, prelude::*};

impl<T: Table> Mirror<T> {
    /// Takes the page at `addr` for the device alone, with an entry that says so, and has `then` access
    /// it: before any CPU can have it back, so that whoever succeeds has got on.
    ///
    /// Waits for user space, in a fault: nothing may be locked or lent. Fails as
    /// [`LockedFolio::exclusive`] and [`Mirror::prepare`], with `EBUSY` if the address space kept
    /// changing, and with `EACCES` for a shadow stack.
    pub(crate) fn exclusive(
        &self,
        mm: &MmWithUser,
        addr: usize,
        operation: Option<&Atomic>,
    ) -> Result<Option<u64>> {
        const ATTEMPTS: usize = 64;

        if addr >= user_end() {
            return Err(EFAULT);
        }
        let page = addr & !(PAGE_BYTES - 1);
        for attempt in 0..ATTEMPTS {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            self.prepare(&*self.gate.enter()?, page)?;
            if attempt > 0 {
                // What the attempt before has changed is changed back, which is an invalidation, before
                // this one begins.
                let mut scratch = [Seen::default()];
                self.fault_in(mm, page, page + PAGE_BYTES, Access::Write, &mut scratch)?;
            }
            let begun = self.begin();
            let lock = ReadLocked::new(mm)?;
            if !self.is_of(lock.mm()) {
                return Err(EINVAL);
            }
            let vma = lock.find_vma(page).filter(|vma| vma.start() <= page);
            if vma.ok_or(EFAULT)?.is_shadow_stack() {
                return Err(EACCES);
            }
            // The notifier's address is the mark by which `invalidate` knows our own.
            let (_locked, pfn) = LockedFolio::exclusive(&lock, page, self.raw.get().cast())?;
            let map = self.gate.enter()?;
            let mut state = self.lock(&map)?;
            // What is zapped, or unmapped, is not locked for that. A touch of the CPU waits for the
            // folio, and its invalidation comes after this.
            // SAFETY: The notifier is registered and the lock is held.
            let retry =
                unsafe { bindings::hmm_gpu_mmu_interval_read_retry(self.raw.get(), begun.seq) };
            if retry || state.tree.missing(page) > 0 {
                continue;
            }
            // INVARIANT: Nothing has been invalidated since before the page was made exclusive. It is
            // anonymous memory, which is directly mapped, or a page of the map.
            let entry = Seen(VALID | EXCLUSIVE | pfn);
            let store = map.data().store();
            map.data().may_map()?;
            // CAST: A word.
            let words = (entry.0 as u64, self.word(&map, entry));
            state.tree.set(page, words.0, words.1, store)?;
            state.generation += 1;
            state.mapped += 1;
            Written::wait();
            drop(state);
            map.data().mapped(1);
            // Nobody gets the page back as long as its folio is locked; but who unmaps it may.
            return match operation {
                None => Ok(None),
                Some(operation) => match self.atomic(&map, addr, operation)? {
                    Ok(old) => Ok(Some(old)),
                    Err(_) => continue,
                },
            };
        }
        Err(EBUSY)
    }

    /// Whether the device has a page of `[start, end)` to itself.
    pub(crate) fn has_exclusive(&self, map: &PageMap<T>, start: usize, end: usize) -> Result<bool> {
        let state = self.lock(map)?;
        Ok((start..end)
            .step_by(PAGE_BYTES)
            .any(|addr| Seen(state.tree.get(addr) as usize).is_exclusive()))
    }

    /// The first page of `[start, end)`, all in the same 2 MiB, that has no entry for an access.
    pub(crate) fn first_missing(
        &self,
        map: &PageMap<T>,
        start: usize,
        end: usize,
        access: Access,
    ) -> Result<Option<usize>> {
        let mut state = self.lock(map)?;
        let Some(window) = state.tree.window(start) else {
            return Ok(Some(start));
        };
        Ok((start..end).step_by(PAGE_BYTES).find(|&addr| {
            let entry = Seen(window.get(addr) as usize);
            entry.pfn().is_none() || (access == Access::Write && !entry.is_writable())
        }))
    }

    /// The device does an atomic operation on the word at `addr`, and is told what it was before.
    ///
    /// It may on a page that it can write to in its own memory, and on one in system memory that it has
    /// to itself. Fails with `EINVAL` if the address is not a multiple of the word's size.
    pub(crate) fn atomic(
        &self,
        map: &PageMap<T>,
        addr: usize,
        operation: &Atomic,
    ) -> Result<core::result::Result<u64, Miss>> {
        if addr % operation.bytes() != 0 {
            return Err(EINVAL);
        }
        let mut old = 0;
        let done = self.access(map, addr, operation.bytes(), Need::Atomic, |page| {
            old = match page {
                // SAFETY: As for writing; and the word is aligned, since the address is.
                Page::System { bytes, pfn } => unsafe {
                    bindings::hmm_gpu_mark_dirty(pfn);
                    operation.run(bytes)
                },
                Page::Device { offset } => map.data().store().atomic(offset, operation)?,
            };
            Written::wait();
            Ok(())
        })?;
        Ok(done.map(|()| old))
    }

    /// The device reads at `addr`: fills `to`, which does not go beyond the page.
    pub(crate) fn read(
        &self,
        map: &PageMap<T>,
        addr: usize,
        to: &mut [u8],
    ) -> Result<core::result::Result<(), Miss>> {
        self.access(map, addr, to.len(), Need::Read, |page| match page {
            // SAFETY: Under the lock the page of an entry is valid and directly mapped, by the type
            // invariants; `access` has checked that the bytes are inside it.
            Page::System { bytes, .. } => to_result(unsafe {
                bindings::hmm_gpu_copy_mc(to.as_mut_ptr().cast(), bytes.cast(), to.len())
            }),
            Page::Device { offset } => map.data().store().read_bytes(offset, to),
        })
    }

    /// The device reads whole pages from `addr` on, until `end`, into the user's memory at `user`: as long as
    /// they are in its own memory, and what they go to is there, for nothing is faulted in. Returns how
    /// many bytes that were; what comes next is left to [`Mirror::read`].
    pub(crate) fn read_to_user(
        &self,
        map: &PageMap<T>,
        addr: usize,
        end: usize,
        user: usize,
    ) -> Result<usize> {
        // Under the lock at a time.
        const PAGES: usize = 16;

        // What one leaf has entries for.
        const WINDOW: usize = PAGE_BYTES * FANOUT;

        let state = self.lock(map)?;
        let mut leaf = None;
        for done in (0..PAGES * PAGE_BYTES).step_by(PAGE_BYTES) {
            let at = addr.saturating_add(done);
            if at >= end || end - at < PAGE_BYTES {
                return Ok(done);
            }
            if done == 0 || at % WINDOW < PAGE_BYTES {
                leaf = walk(&state, map, at)?;
            }
            let Some(leaf) = &leaf else {
                return Ok(done);
            };
            let mut read = false;
            let found = self.access_at(leaf, map, at, PAGE_BYTES, Need::Read, |page| {
                if let Page::Device { offset } = page {
                    let store = map.data().store();
                    read = store.read_to_user(offset, user.saturating_add(done), PAGE_BYTES)?;
                }
                Ok(())
            })?;
            if found.is_err() || !read {
                return Ok(done);
            }
        }
        Ok(PAGES * PAGE_BYTES)
    }

    /// The device writes at `addr` what is in `from`, which does not go beyond the page.
    pub(crate) fn write(
        &self,
        map: &PageMap<T>,
        addr: usize,
        from: &[u8],
    ) -> Result<core::result::Result<(), Miss>> {
        self.access(map, addr, from.len(), Need::Write, |page| match page {
            Page::System { bytes, pfn } => {
                // SAFETY: As for reading. Others may access the bytes too, as they may those of any
                // page of a process.
                unsafe {
                    bindings::hmm_gpu_copy(bytes.cast(), from.as_ptr().cast(), from.len());
                    bindings::hmm_gpu_mark_dirty(pfn);
                }
                Ok(())
            }
            Page::Device { offset } => {
                map.data().store().write_bytes(offset, from)?;
                Written::wait();
                Ok(())
            }
        })
    }

    /// Walks the table in the device's memory, as the device would, and has `then` access the page,
    /// under the lock.
    ///
    /// What the device found counts only if it is what the driver's own copy says, on all of the way: `EIO` otherwise. For it may have
    /// been written by who is to be told.
    fn access(
        &self,
        map: &PageMap<T>,
        addr: usize,
        len: usize,
        need: Need,
        then: impl FnOnce(Page) -> Result,
    ) -> Result<core::result::Result<(), Miss>> {
        let state = self.lock(map)?;
        match walk(&state, map, addr)? {
            Some(leaf) => self.access_at(&leaf, map, addr, len, need, then),
            None => Ok(Err(Miss { word: 0 })),
        }
    }

    /// The same, from the leaf on that the device has come to.
    fn access_at(
        &self,
        leaf: &Leaf<'_, T::Home>,
        map: &PageMap<T>,
        addr: usize,
        len: usize,
        need: Need,
        then: impl FnOnce(Page) -> Result,
    ) -> Result<core::result::Result<(), Miss>> {
        let offset = addr % PAGE_BYTES;
        if len > PAGE_BYTES - offset {
            return Err(EINVAL);
        }
        let store = map.data().store();
        let word = store.read_u64(usize::try_from(leaf.place(addr))?)?;
        // CAST: An entry is a word.
        let entry = Seen(leaf.get(addr) as usize);
        let Some(pfn) = entry.pfn() else {
            if word & HMM_GPU_PTE_VALID != 0 {
                return Err(EIO);
            }
            leaf.request(addr, store);
            return Ok(Err(Miss { word }));
        };
        if word != self.word(map, entry) {
            return Err(EIO);
        }
        let allowed = match need {
            Need::Read => true,
            Need::Write => entry.is_writable(),
            Need::Atomic => {
                entry.is_exclusive() || (entry.is_writable() && map.index_of(pfn).is_some())
            }
        };
        if !allowed {
            return Ok(Err(Miss { word }));
        }
        let page = match map.index_of(pfn) {
            Some(index) => {
                map.data().accessed(index);
                Page::Device {
                    offset: index * PAGE_BYTES + offset,
                }
            }
            None => {
                // SAFETY: System memory, by the type invariants, so it is directly mapped, and the
                // offset is inside the page.
                let bytes = unsafe { bindings::hmm_gpu_pfn_address(pfn).cast::<u8>().add(offset) };
                Page::System { bytes, pfn }
            }
        };
        then(page).map(Ok)
    }
}

/// Where the device comes to in its table, on the way to the page at `addr`.
fn walk<'a, T: Table>(
    state: &'a State<T>,
    map: &PageMap<T>,
    addr: usize,
) -> Result<Option<Leaf<'a, T::Home>>> {
    let store = map.data().store();
    state
        .tree
        .walk(addr, |place| store.read_u64(usize::try_from(place)?))
}

/// What an access of the device needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Need {
    Read,
    Write,
    Atomic,
}

/// Where the device accesses memory.
enum Page {
    /// System memory, at `bytes`, in page `pfn`.
    System { bytes: *mut u8, pfn: usize },
    /// The device's memory.
    Device { offset: usize },
}
