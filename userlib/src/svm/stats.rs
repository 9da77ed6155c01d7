//! What a dispatch did.

use std::fmt;
use std::time::Duration;

use super::Strategy;
use crate::Bytes;

/// What a dispatch did, and how long its parts took.
///
/// Shown as `translated: 128 groups in 3 rounds, 12 faults, 48 KiB in, 0 bytes out; 1.2 ms: 0.1 prepare, 0.6 run, 0.4 service, 0.1 finish`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DispatchStats {
    /// How the kernel reached memory.
    pub strategy: Strategy,
    /// Groups that were asked for.
    pub groups: u64,
    /// Submissions: one, and one for each time that something ran again, or that not all could run at once.
    pub rounds: u64,
    /// Device faults that the kernel reported.
    pub faults: u64,
    /// Pages that were serviced for them.
    pub serviced_pages: u64,
    /// Bytes that were brought to where the device uses them.
    pub bytes_in: u64,
    /// Bytes that were brought back. Of a translated dispatch none: they stay in VRAM until somebody touches them.
    pub bytes_out: u64,
    /// Pages that kernels used copies of, because something kept taking them out of VRAM.
    pub pages_by_copy: u64,
    /// The fewest groups that ran at a time because their pages did not fit.
    pub smallest_batch: u32,
    /// Time before the first submission: copies, imports.
    pub prepare: Duration,
    /// Time in submissions.
    pub run: Duration,
    /// Time in servicing faults.
    pub service: Duration,
    /// Time after the last submission: copies.
    pub finish: Duration,
}

impl DispatchStats {
    pub(crate) fn new(strategy: Strategy) -> Self {
        Self {
            strategy,
            groups: 0,
            rounds: 0,
            faults: 0,
            serviced_pages: 0,
            bytes_in: 0,
            bytes_out: 0,
            pages_by_copy: 0,
            smallest_batch: u32::MAX,
            prepare: Duration::ZERO,
            run: Duration::ZERO,
            service: Duration::ZERO,
            finish: Duration::ZERO,
        }
    }

    /// Adds up what several did.
    pub fn add(&mut self, other: &Self) {
        self.groups += other.groups;
        self.rounds += other.rounds;
        self.faults += other.faults;
        self.serviced_pages += other.serviced_pages;
        self.bytes_in += other.bytes_in;
        self.bytes_out += other.bytes_out;
        self.pages_by_copy += other.pages_by_copy;
        self.smallest_batch = self.smallest_batch.min(other.smallest_batch);
        self.prepare += other.prepare;
        self.run += other.run;
        self.service += other.service;
        self.finish += other.finish;
    }
}

impl fmt::Display for DispatchStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let plural = |n: u64| if n == 1 { "" } else { "s" };
        let by_copy = match self.pages_by_copy {
            0 => String::new(),
            pages => format!(", {pages} page{} by copy", plural(pages)),
        };
        write!(
            f,
            "{}: {} group{} in {} round{}, {} fault{}, {} in, {} out{}; {:.1} ms: {:.1} prepare, {:.1} run, {:.1} service, {:.1} finish",
            self.strategy,
            self.groups,
            plural(self.groups),
            self.rounds,
            plural(self.rounds),
            self.faults,
            plural(self.faults),
            Bytes(self.bytes_in),
            Bytes(self.bytes_out),
            by_copy,
            ms(self.prepare + self.run + self.service + self.finish),
            ms(self.prepare),
            ms(self.run),
            ms(self.service),
            ms(self.finish)
        )
    }
}
