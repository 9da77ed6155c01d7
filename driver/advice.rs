// SPDX-License-Identifier: GPL-2.0

//! Advice: what a client says of ranges of its address space. It changes where pages are, never what they
//! hold.

#![forbid(unsafe_code)]

use crate::{hmm::PAGE_BYTES, migration::Target, uapi};
use kernel::prelude::*;

/// Ranges with advice that a client may have.
const MOST: usize = 1024;

/// What is advised of a range.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Advice {
    /// Where it is best.
    pub(crate) location: Option<Target>,
    /// It stays in system memory, and reading devices map it for reading only.
    pub(crate) read_mostly: bool,
    /// It does not go to the device, whoever asks.
    pub(crate) no_migrate: bool,
    /// log2 of how many pages device faults move together, if not those named.
    pub(crate) granularity: Option<u32>,
}

impl Advice {
    /// Whether device faults are to move it: if their policy says so, unless there is other advice.
    pub(crate) fn may_go(self, policy: bool) -> bool {
        if self.no_migrate || self.read_mostly {
            return false;
        }
        match self.location {
            None => policy,
            Some(location) => location == Target::Device,
        }
    }
}

/// One change of advice.
#[derive(Clone, Copy)]
pub(crate) enum Change {
    /// None is left.
    Reset,
    Location(Option<Target>),
    ReadMostly(bool),
    NoMigrate(bool),
    Granularity(Option<u32>),
}

impl Change {
    /// The one that a caller names. Fails with `EINVAL` if there is no such.
    pub(crate) fn new(advice: u32, value: u64) -> Result<Self> {
        let switch = match value {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(EINVAL),
        };
        Ok(match advice {
            uapi::HMM_GPU_ADVICE_RESET if value == 0 => Self::Reset,
            uapi::HMM_GPU_ADVICE_LOCATION => Self::Location(match value {
                uapi::HMM_GPU_LOCATION_NONE => None,
                uapi::HMM_GPU_LOCATION_SYSTEM => Some(Target::System),
                uapi::HMM_GPU_LOCATION_DEVICE => Some(Target::Device),
                _ => return Err(EINVAL),
            }),
            uapi::HMM_GPU_ADVICE_READ_MOSTLY => Self::ReadMostly(switch?),
            uapi::HMM_GPU_ADVICE_NO_MIGRATE => Self::NoMigrate(switch?),
            uapi::HMM_GPU_ADVICE_GRANULARITY => Self::Granularity(match value {
                0 => None,
                bytes => {
                    let pages = usize::try_from(bytes)? / PAGE_BYTES;
                    let fits = pages.is_power_of_two()
                        && pages <= crate::bitmap::BLOCK_PAGES
                        && bytes % uapi::HMM_GPU_PAGE_BYTES == 0;
                    Some(fits.then(|| pages.ilog2()).ok_or(EINVAL)?)
                }
            }),
            _ => return Err(EINVAL),
        })
    }

    fn apply(self, advice: &mut Advice) {
        match self {
            Self::Reset => *advice = Advice::default(),
            Self::Location(location) => advice.location = location,
            Self::ReadMostly(read_mostly) => advice.read_mostly = read_mostly,
            Self::NoMigrate(no_migrate) => advice.no_migrate = no_migrate,
            Self::Granularity(granularity) => advice.granularity = granularity,
        }
    }
}

/// `[start, end)`, in bytes, and what is advised of it.
#[derive(Clone, Copy)]
struct Range {
    start: usize,
    end: usize,
    advice: Advice,
}

/// Room for changed advice, allocated before.
pub(crate) struct Room(KVVec<Range>);

impl Room {
    /// As much as there can be need for, and one for a hole in each range.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(KVVec::with_capacity(2 * MOST, GFP_KERNEL_ACCOUNT)?))
    }
}

/// The advice of a client: ranges in their order, none of which meets another.
#[derive(Default)]
pub(crate) struct Advices {
    ranges: KVVec<Range>,
}

impl Advices {
    /// What is advised of the page at `addr`, and where that ends.
    pub(crate) fn at(&self, addr: usize) -> (Advice, usize) {
        let next = self.ranges.partition_point(|range| range.end <= addr);
        match self.ranges.get(next) {
            Some(range) if range.start <= addr => (range.advice, range.end),
            Some(range) => (Advice::default(), range.start),
            None => (Advice::default(), usize::MAX),
        }
    }

    /// Changes what is advised of `[start, end)`, in `room`, where what was there before is left. Fails with
    /// `E2BIG`, and changes nothing, if that made too many ranges.
    pub(crate) fn change(
        &mut self,
        start: usize,
        end: usize,
        change: Change,
        room: &mut Room,
    ) -> Result {
        // Holes may have made more.
        let most = MOST.max(self.ranges.len());
        let mut add = |range: Range| -> Result {
            if range.start >= range.end || range.advice == Advice::default() {
                return Ok(());
            }
            if let Some(last) = room.0.last_mut() {
                if last.end == range.start && last.advice == range.advice {
                    last.end = range.end;
                    return Ok(());
                }
            }
            if room.0.len() == most {
                return Err(E2BIG);
            }
            room.0.push_within_capacity(range).map_err(|_| E2BIG)
        };
        let before = self.ranges.iter().take_while(|range| range.start < start);
        for range in before {
            add(Range {
                end: range.end.min(start),
                ..*range
            })?;
        }
        let mut at = start;
        while at < end {
            let (mut advice, stop) = self.at(at);
            change.apply(&mut advice);
            let stop = stop.min(end);
            add(Range {
                start: at,
                end: stop,
                advice,
            })?;
            at = stop;
        }
        for range in self.ranges.iter().filter(|range| range.end > end) {
            add(Range {
                start: range.start.max(end),
                ..*range
            })?;
        }
        core::mem::swap(&mut self.ranges, &mut room.0);
        Ok(())
    }

    /// Drops what is advised of `[start, end)`. Allocates nothing: if a range has a hole then, and there is no
    /// room for what is behind it, that is dropped too.
    pub(crate) fn forget(&mut self, start: usize, end: usize) {
        let around = |range: &&mut Range| range.start < start && range.end > end;
        let hole = self.ranges.iter_mut().enumerate().find_map(|(i, range)| {
            let behind = around(&range).then_some(Range {
                start: end,
                ..*range
            })?;
            range.end = start;
            Some((i, behind))
        });
        if let Some((i, behind)) = hole {
            let _ = self.ranges.insert_within_capacity(i + 1, behind);
            return;
        }
        self.ranges.retain(|range| {
            if range.end > start && range.start < end {
                if range.start < start {
                    range.end = start;
                } else {
                    range.start = end;
                }
            }
            range.start < range.end
        });
    }
}
