// SPDX-License-Identifier: GPL-2.0

//! What a migration takes, phase by phase: counted, and traced.

#![forbid(unsafe_code)]

use crate::{devmem::DeviceMemory, hmm::migrate::Collected, migration::Outcome, sys::trace};
use kernel::time::{Instant, Monotonic};

/// What a migration takes, phase by phase, for the counters of a device and the trace.
pub(crate) struct Phases<'a> {
    memory: &'a DeviceMemory,
    last: Instant<Monotonic>,
    pub(crate) migration: trace::Migration,
}

impl<'a> Phases<'a> {
    /// It has been set up.
    pub(crate) fn new(
        memory: &'a DeviceMemory,
        collected: &Collected<'_, DeviceMemory>,
        cause: trace::Cause,
    ) -> Self {
        // CAST: All widen.
        let mut this = Self {
            memory,
            last: collected.began(),
            migration: trace::Migration {
                unit: memory.identity.unit,
                cause: cause.into_raw(),
                addr: collected.addr() as u64,
                pages: collected.pages() as u64,
                ..Default::default()
            },
        };
        this.migration.setup_ns = this.lap();
        this
    }

    /// Nanoseconds since the phase before.
    pub(crate) fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let took = now - self.last;
        self.last = now;
        // CAST: Time does not go back.
        took.as_nanos() as u64
    }

    /// It has come to an end. `account` is whose it was.
    pub(crate) fn finish(mut self, outcome: &Outcome, account: i16) {
        self.migration.finalize_ns = self.lap();
        // CAST: All widen.
        self.migration.moved = outcome.moved as u64;
        self.migration.stuck = outcome.stuck as u64;
        self.migration.no_memory = outcome.without_memory.is_some();
        let migration = &self.migration;
        self.memory.counters.add_all(account, |counters| {
            // CAST: A word.
            counters.setup_ns.add(migration.setup_ns as usize);
            counters.copy_ns.add(migration.copy_ns as usize);
            counters.pages_ns.add(migration.pages_ns as usize);
            counters.finalize_ns.add(migration.finalize_ns as usize);
        });
        trace::migrate(migration);
    }
}
