//! What a device has done.

use std::ops::Sub;

use crate::uapi::hmm_gpu_counters;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a device has done since it was bound, for all processes, in pages unless a field says otherwise.
        ///
        /// All but `live_pages`, `table_pages`, `private_pages` and `quarantined_pages` only grow, so `after - before` is what happened in between:
        ///
        /// ```no_run
        /// # fn main() -> Result<(), hmm_gpu::Error> {
        /// # let device = hmm_gpu::Device::open(0)?;
        /// let before = device.counters()?;
        /// // ... work ...
        /// let work = device.counters()? - before;
        /// println!("{} pages came back by CPU touch", work.fault_back_pages);
        /// # Ok(())
        /// # }
        /// ```
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Counters {
            /// Pages of VRAM in use now. A difference keeps the minuend's: it is a level, not a sum.
            pub live_pages: u64,
            /// Pages of VRAM that device page tables use now: part of `live_pages`, and a level too.
            pub table_pages: u64,
            /// Pages in private pools, used or not. A level too.
            pub private_pages: u64,
            /// Those of them that are free and cannot be used: given back while an execution was on, or of a pool that is gone with
            /// something in it that is pinned. A level too.
            pub quarantined_pages: u64,
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub(crate) fn from_uapi(answer: &hmm_gpu_counters) -> Self {
                Self {
                    live_pages: answer.live_pages,
                    table_pages: answer.table_pages,
                    private_pages: answer.private_pages,
                    quarantined_pages: answer.quarantined_pages,
                    $($name: answer.$name,)*
                }
            }

            /// Every counter with its name, the levels first.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [
                    ("live_pages", self.live_pages),
                    ("table_pages", self.table_pages),
                    ("private_pages", self.private_pages),
                    ("quarantined_pages", self.quarantined_pages),
                    $((stringify!($name), self.$name),)*
                ]
                .into_iter()
            }
        }

        /// What was done between two looks. 0 where the second is the smaller: the device was bound anew.
        impl Sub for Counters {
            type Output = Self;

            fn sub(self, before: Self) -> Self {
                Self {
                    live_pages: self.live_pages,
                    table_pages: self.table_pages,
                    private_pages: self.private_pages,
                    quarantined_pages: self.quarantined_pages,
                    $($name: self.$name.saturating_sub(before.$name),)*
                }
            }
        }
    };
}

counters! {
    /// Pages of VRAM taken into use: `freed_pages + live_pages` whenever nothing is under way.
    allocated_pages,
    /// Pages of VRAM given back, for whatever reason.
    freed_pages,
    /// Moved to the device on request.
    to_device_pages,
    /// Those of them that were never touched before, and arrived as zeroes.
    populated_pages,
    /// Moved to the system on request.
    to_system_pages,
    /// Moved to the system because the CPU touched them.
    fault_back_pages,
    /// Moved to the system because the device went away.
    evicted_pages,
    /// CPU faults on pages of the device, in faults.
    cpu_faults,
    /// CPU faults that found the page busy and were taken again, in faults.
    cpu_fault_retries,
    /// Left where they were by a request: what [`Moved::skipped`](crate::Moved::skipped) counts.
    skipped_pages,
    /// Moves that found no VRAM, in moves.
    vram_failures,
    /// Moves that found no system memory, in moves.
    system_failures,
    /// Device faults serviced: misses of accesses, and pages named by [`Device::fault`](crate::Device::fault).
    device_faults,
    /// Entries written to device page tables, in entries.
    mapped_pages,
    /// Changes of an address space that found the range in a device page table, in changes.
    invalidations,
    /// Bytes that the device read at process addresses.
    device_read_bytes,
    /// Bytes that the device wrote at process addresses.
    device_written_bytes,
    /// Those of `to_device_pages` that were in the VRAM of another device.
    from_other_pages,
    /// Moved to another device on request.
    to_other_pages,
    /// Folios of 2 MiB that moved to the device whole, on request, in folios. Their pages are part of `to_device_pages`.
    large_to_device,
    /// Folios of 2 MiB that moved to the system whole, for whatever reason, in folios.
    large_to_system,
    /// Folios of 2 MiB for which there was none on the other side, so that their pages move one by one, in folios.
    large_failures,
    /// Moved to the system because others needed the room.
    pressure_pages,
    /// Blocks of 2 MiB from which pages were moved for that, in blocks.
    evictions,
    /// CPU faults on pages that had gone to the device for a device fault just before, in faults.
    bounces,
    /// Pages that a device fault was to move and that stayed, because they bounce.
    kept_pages,
    /// Those of `fault_back_pages` that came along with what was touched.
    around_pages,
    /// Those of `to_device_pages` that moved for device faults.
    device_fault_pages,
    /// Time in which migrations were set up, in nanoseconds.
    setup_ns,
    /// Time in which the new places of pages were allocated and written, in nanoseconds.
    copy_ns,
    /// Time in which the kernel moved what it knows of a page, in nanoseconds.
    pages_ns,
    /// Time in which pages were mapped again and unlocked, in nanoseconds.
    finalize_ns,
    /// Folios that stayed because their bytes could not be copied, in folios.
    copy_failures,
    /// Entries of device page tables that could not be made, in entries.
    insertion_failures,
    /// Pages of VRAM that were taken for a move that did not come off.
    unused_pages,
    /// Pages of VRAM that were taken for device page tables.
    table_pages_taken,
    /// Device faults after which the page was mapped in VRAM, in faults.
    faults_in_device,
    /// Device faults after which the page was mapped in system memory, in faults.
    faults_in_system,
    /// Device faults after which the page was not mapped, in faults.
    fault_failures,
    /// CPU faults that ended with an error, in faults.
    cpu_fault_failures,
    /// Executions that were begun.
    executions,
    /// Those of them that were lost.
    executions_lost,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure whose every word is its own position, so that no two fields can be taken for each other.
    fn numbered() -> hmm_gpu_counters {
        let words: Vec<u64> = (0..size_of::<hmm_gpu_counters>() as u64 / 8).collect();
        bytemuck::pod_read_unaligned(bytemuck::cast_slice(&words))
    }

    #[test]
    fn every_counter_is_decoded_and_in_its_place() {
        let mut decoded: Vec<(u64, &str)> = Counters::from_uapi(&numbered())
            .iter()
            .map(|(name, value)| (value, name))
            .collect();
        decoded.sort_unstable();
        // Word 0 is `flags`; none is reserved.
        let fields = size_of::<hmm_gpu_counters>() as u64 / 8;
        let words: Vec<u64> = decoded.iter().map(|&(word, _)| word).collect();
        assert_eq!(words, (1..fields).collect::<Vec<_>>());
        let offset = std::mem::offset_of!(hmm_gpu_counters, table_pages) as u64 / 8;
        assert!(decoded.contains(&(offset, "table_pages")));
    }

    #[test]
    fn a_difference_is_what_happened_in_between() {
        let before = Counters {
            live_pages: 9,
            to_device_pages: 10,
            freed_pages: 7,
            ..Default::default()
        };
        let after = Counters {
            live_pages: 3,
            to_device_pages: 15,
            freed_pages: 0,
            ..Default::default()
        };
        let work = after - before;
        assert_eq!(
            work,
            Counters {
                live_pages: 3,
                to_device_pages: 5,
                freed_pages: 0,
                ..Default::default()
            }
        );
    }
}
