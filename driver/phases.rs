// SPDX-License-Identifier: GPL-2.0

//! What a migration takes, phase by phase: counted, and traced.

#![forbid(unsafe_code)]

use crate::{
    counters::{Counter, Counters},
    devmem::DeviceMemory,
    hmm::migrate::Collected,
    migration::Outcome,
    sys::trace,
};
use kernel::time::{Instant, Monotonic};

/// What a migration takes, phase by phase, for the counters of a device and the trace.
pub(crate) struct Phases<'a> {
    memory: &'a DeviceMemory,
    /// Whose it is.
    account: i16,
    last: Instant<Monotonic>,
    pub(crate) migration: trace::Migration,
}

impl<'a> Phases<'a> {
    /// It has been set up.
    pub(crate) fn new(
        memory: &'a DeviceMemory,
        collected: &Collected<'_, DeviceMemory>,
        cause: trace::Cause,
        account: i16,
    ) -> Self {
        // CAST: All widen.
        let mut this = Self {
            memory,
            account,
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

    /// It has come to an end.
    pub(crate) fn finish(mut self, outcome: &Outcome) {
        self.migration.finalize_ns = self.lap();
        // CAST: All widen.
        self.migration.moved = outcome.moved as u64;
        self.migration.stuck = outcome.stuck as u64;
        self.migration.no_memory = outcome.without_memory.is_some();
        let (counters, migration) = (&self.memory.counters, &self.migration);
        // CAST: A word.
        let count =
            |which: fn(&Counters) -> &Counter, ns| counters.add(self.account, which, ns as usize);
        count(|it| &it.setup_ns, migration.setup_ns);
        count(|it| &it.copy_ns, migration.copy_ns);
        count(|it| &it.pages_ns, migration.pages_ns);
        count(|it| &it.finalize_ns, migration.finalize_ns);
        trace::migrate(migration);
    }
}
