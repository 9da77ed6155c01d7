// SPDX-License-Identifier: GPL-2.0

//! Device page tables: their nodes are pages of VRAM, and what a device does for its mirrors.

#![forbid(unsafe_code)]

use crate::{
    advice::Advices,
    bitmap::SHARED,
    client::MemoryGate,
    devmem::DeviceMemory,
    evict::make_room,
    fail::Step,
    hmm::{mirror::Table, pagemap::PageMap, PAGE_BYTES},
    pool::Private,
    radix::Home,
    sys::mapping::{Mapping, Written},
    usage::Taker,
};
use kernel::{prelude::*, sync::Arc};

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
    type Own = Private;
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

    fn home(
        gate: &Arc<MemoryGate>,
        map: &PageMap<Self>,
        own: Option<&Private>,
    ) -> Result<TablePage> {
        // So often is what was made room for taken by others.
        const ATTEMPTS: usize = 64;

        let memory = map.data();
        let taker = Taker::table(own.map_or(SHARED, Private::pool));
        let mut index = [0];
        let mut take = || memory.take(taker, 0, &mut index) == 1;
        let mut attempts = 0;
        let taken = loop {
            if take() {
                break true;
            }
            attempts += 1;
            if attempts > ATTEMPTS || !make_room(map, taker, 1) {
                break false;
            }
        };
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
        Step::Insertion
            .pass()
            .inspect_err(|_| self.counters.insertion_failures.add(1))
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
