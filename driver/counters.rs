// SPDX-License-Identifier: GPL-2.0

//! What a device has done, for `COUNTERS`.

#![forbid(unsafe_code)]

use crate::uapi::hmm_gpu_counters;
use core::ops::Deref;
use kernel::{
    prelude::*,
    sync::atomic::{Atomic, Relaxed},
};

/// A number that only grows.
pub(crate) struct Counter(Atomic<u64>);

impl Counter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Adds `n`.
    pub(crate) fn add(&self, n: usize) {
        // CAST: Widens.
        self.0.add(n as u64, Relaxed);
    }

    fn clear(&self) {
        self.0.store(0, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// The counters of a device. `hmm_gpu_counters` says what each counts.
pub(crate) struct Counters {
    pub(crate) allocated: Counter,
    pub(crate) freed: Counter,
    pub(crate) to_device: Counter,
    pub(crate) populated: Counter,
    pub(crate) to_system: Counter,
    pub(crate) fault_back: Counter,
    pub(crate) evicted: Counter,
    pub(crate) cpu_faults: Counter,
    pub(crate) cpu_fault_retries: Counter,
    pub(crate) skipped: Counter,
    pub(crate) vram_failures: Counter,
    pub(crate) system_failures: Counter,
    pub(crate) device_faults: Counter,
    pub(crate) mapped: Counter,
    pub(crate) invalidations: Counter,
    pub(crate) tables_taken: Counter,
    pub(crate) tables_freed: Counter,
    pub(crate) device_read: Counter,
    pub(crate) device_written: Counter,
    pub(crate) from_other: Counter,
    pub(crate) to_other: Counter,
    pub(crate) large_to_device: Counter,
    pub(crate) large_to_system: Counter,
    pub(crate) large_failures: Counter,
    pub(crate) pressure: Counter,
    pub(crate) evictions: Counter,
    pub(crate) bounces: Counter,
    pub(crate) kept: Counter,
    pub(crate) around: Counter,
    pub(crate) device_fault_pages: Counter,
    pub(crate) setup_ns: Counter,
    pub(crate) copy_ns: Counter,
    pub(crate) pages_ns: Counter,
    pub(crate) finalize_ns: Counter,
    pub(crate) copy_failures: Counter,
    pub(crate) insertion_failures: Counter,
    pub(crate) unused: Counter,
    pub(crate) faults_in_device: Counter,
    pub(crate) faults_in_system: Counter,
    pub(crate) fault_failures: Counter,
    pub(crate) cpu_fault_failures: Counter,
}

impl Counters {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self {
            allocated: Counter::new(),
            freed: Counter::new(),
            to_device: Counter::new(),
            populated: Counter::new(),
            to_system: Counter::new(),
            fault_back: Counter::new(),
            evicted: Counter::new(),
            cpu_faults: Counter::new(),
            cpu_fault_retries: Counter::new(),
            skipped: Counter::new(),
            vram_failures: Counter::new(),
            system_failures: Counter::new(),
            device_faults: Counter::new(),
            mapped: Counter::new(),
            invalidations: Counter::new(),
            tables_taken: Counter::new(),
            tables_freed: Counter::new(),
            device_read: Counter::new(),
            device_written: Counter::new(),
            from_other: Counter::new(),
            to_other: Counter::new(),
            large_to_device: Counter::new(),
            large_to_system: Counter::new(),
            large_failures: Counter::new(),
            pressure: Counter::new(),
            evictions: Counter::new(),
            bounces: Counter::new(),
            kept: Counter::new(),
            around: Counter::new(),
            device_fault_pages: Counter::new(),
            setup_ns: Counter::new(),
            copy_ns: Counter::new(),
            pages_ns: Counter::new(),
            finalize_ns: Counter::new(),
            copy_failures: Counter::new(),
            insertion_failures: Counter::new(),
            unused: Counter::new(),
            faults_in_device: Counter::new(),
            faults_in_system: Counter::new(),
            fault_failures: Counter::new(),
            cpu_fault_failures: Counter::new(),
        }
    }

    /// All zero again.
    fn clear(&self) {
        let all = [
            &self.allocated,
            &self.freed,
            &self.to_device,
            &self.populated,
            &self.to_system,
            &self.fault_back,
            &self.evicted,
            &self.cpu_faults,
            &self.cpu_fault_retries,
            &self.skipped,
            &self.vram_failures,
            &self.system_failures,
            &self.device_faults,
            &self.mapped,
            &self.invalidations,
            &self.tables_taken,
            &self.tables_freed,
            &self.device_read,
            &self.device_written,
            &self.from_other,
            &self.to_other,
            &self.large_to_device,
            &self.large_to_system,
            &self.large_failures,
            &self.pressure,
            &self.evictions,
            &self.bounces,
            &self.kept,
            &self.around,
            &self.device_fault_pages,
            &self.setup_ns,
            &self.copy_ns,
            &self.pages_ns,
            &self.finalize_ns,
            &self.copy_failures,
            &self.insertion_failures,
            &self.unused,
            &self.faults_in_device,
            &self.faults_in_system,
            &self.fault_failures,
            &self.cpu_fault_failures,
        ];
        all.into_iter().for_each(Counter::clear);
    }

    /// The pages of device page tables that were taken and not freed, at one moment: whoever reads two numbers may be stopped between
    /// them for as long as others need to change them a thousand times.
    fn table_pages(&self) -> u64 {
        const ATTEMPTS: usize = 8;

        let mut pages = 0;
        for _ in 0..ATTEMPTS {
            // In this order, so that the difference is not negative.
            let freed = self.tables_freed.get();
            pages = self.tables_taken.get().saturating_sub(freed);
            if self.tables_freed.get() == freed {
                break;
            }
        }
        pages
    }

    /// Their values now, with `live` pages of VRAM in use.
    pub(crate) fn read(&self, live: usize) -> hmm_gpu_counters {
        hmm_gpu_counters {
            flags: 0,
            // CAST: Widens.
            live_pages: live as u64,
            allocated_pages: self.allocated.get(),
            freed_pages: self.freed.get(),
            to_device_pages: self.to_device.get(),
            populated_pages: self.populated.get(),
            to_system_pages: self.to_system.get(),
            fault_back_pages: self.fault_back.get(),
            evicted_pages: self.evicted.get(),
            cpu_faults: self.cpu_faults.get(),
            cpu_fault_retries: self.cpu_fault_retries.get(),
            skipped_pages: self.skipped.get(),
            vram_failures: self.vram_failures.get(),
            system_failures: self.system_failures.get(),
            device_faults: self.device_faults.get(),
            mapped_pages: self.mapped.get(),
            invalidations: self.invalidations.get(),
            table_pages: self.table_pages(),
            device_read_bytes: self.device_read.get(),
            device_written_bytes: self.device_written.get(),
            from_other_pages: self.from_other.get(),
            to_other_pages: self.to_other.get(),
            large_to_device: self.large_to_device.get(),
            large_to_system: self.large_to_system.get(),
            large_failures: self.large_failures.get(),
            pressure_pages: self.pressure.get(),
            evictions: self.evictions.get(),
            bounces: self.bounces.get(),
            kept_pages: self.kept.get(),
            around_pages: self.around.get(),
            device_fault_pages: self.device_fault_pages.get(),
            setup_ns: self.setup_ns.get(),
            copy_ns: self.copy_ns.get(),
            pages_ns: self.pages_ns.get(),
            finalize_ns: self.finalize_ns.get(),
            copy_failures: self.copy_failures.get(),
            insertion_failures: self.insertion_failures.get(),
            unused_pages: self.unused.get(),
            table_pages_taken: self.tables_taken.get(),
            faults_in_device: self.faults_in_device.get(),
            faults_in_system: self.faults_in_system.get(),
            fault_failures: self.fault_failures.get(),
            cpu_fault_failures: self.cpu_fault_failures.get(),
            // Of the pools: see `DeviceMemory::count`.
            ..Default::default()
        }
    }
}

/// The counters of a device, and for each account those of what its client does, or what becomes of its pages.
pub(crate) struct Ledger {
    device: Counters,
    clients: KVVec<Counters>,
}

impl Ledger {
    /// For so many accounts.
    pub(crate) fn new(accounts: usize) -> Result<Self> {
        let mut clients = KVVec::with_capacity(accounts, GFP_KERNEL)?;
        for _ in 0..accounts {
            clients.push(Counters::new(), GFP_KERNEL)?;
        }
        Ok(Self {
            device: Counters::new(),
            clients,
        })
    }

    /// Those of an account.
    pub(crate) fn of(&self, account: i16) -> Option<&Counters> {
        self.clients.get(usize::try_from(account).ok()?)
    }

    /// An account has a new owner.
    pub(crate) fn begin(&self, account: i16) {
        if let Some(counters) = self.of(account) {
            counters.clear();
        }
    }

    /// Adds `n` to a counter of the device, and to that of an account.
    pub(crate) fn add(&self, account: i16, which: impl Fn(&Counters) -> &Counter, n: usize) {
        self.add_all(account, |counters| which(counters).add(n));
    }

    /// Has `add` add to counters of the device, and to those of an account.
    pub(crate) fn add_all(&self, account: i16, add: impl Fn(&Counters)) {
        add(&self.device);
        if let Some(client) = self.of(account) {
            add(client);
        }
    }
}

/// What nobody in particular has done is the device's.
impl Deref for Ledger {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        &self.device
    }
}
