//! Moving pages between system memory and VRAM.

use std::fmt;
use std::ops::{Add, AddAssign};

use rustix::io::Errno;

use crate::uapi::{self, hmm_gpu_migrate};
use crate::Bytes;

/// Where to move pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// To the VRAM of the device that is asked.
    Device,
    /// To system memory, from whichever device's VRAM.
    System,
}

impl Target {
    pub(crate) fn to_uapi(self) -> u32 {
        match self {
            Target::Device => uapi::HMM_GPU_TARGET_DEVICE,
            Target::System => uapi::HMM_GPU_TARGET_SYSTEM,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Target::Device => "VRAM",
            Target::System => "system memory",
        })
    }
}

/// What became of the pages of a range, in bytes. The four counts add up to what was dealt with, see [`total`](Self::total).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Moved {
    /// Moved now.
    pub moved: u64,
    /// There already; for system memory as the target also: never touched, so nowhere.
    pub already: u64,
    /// Left where they were: memory that does not move (of a file, shared, special), or pages that were pinned or busy.
    pub skipped: u64,
    /// Addresses at which nothing is mapped.
    pub unmapped: u64,
}

impl Moved {
    /// Bytes dealt with, from the start of the range on. After a success it is the length of the range.
    pub fn total(&self) -> u64 {
        self.moved + self.already + self.skipped + self.unmapped
    }

    /// Whether all of it is at the target now.
    pub fn is_complete(&self) -> bool {
        self.skipped == 0 && self.unmapped == 0
    }

    fn from_uapi(answer: &hmm_gpu_migrate) -> Self {
        Self {
            moved: answer.moved_bytes,
            already: answer.already_bytes,
            skipped: answer.skipped_bytes,
            unmapped: answer.unmapped_bytes,
        }
    }
}

impl Add for Moved {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            moved: self.moved + other.moved,
            already: self.already + other.already,
            skipped: self.skipped + other.skipped,
            unmapped: self.unmapped + other.unmapped,
        }
    }
}

impl AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl std::iter::Sum for Moved {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), Add::add)
    }
}

/// `8 MiB moved, 4 KiB there already`; counts of nothing are left out.
impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} moved", Bytes(self.moved))?;
        let others = [
            (self.already, "there already"),
            (self.skipped, "skipped"),
            (self.unmapped, "not mapped"),
        ];
        for (bytes, name) in others.into_iter().filter(|&(bytes, _)| bytes != 0) {
            write!(f, ", {} {name}", Bytes(bytes))?;
        }
        Ok(())
    }
}

/// Why a move ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The driver's error.
    Driver(Errno),
    /// An answer that the interface does not allow.
    Nonsense(&'static str),
}

/// Asks for the whole range, and again from where the driver stopped as long as only a signal was the reason.
///
/// What was counted before a stop is handed back with it.
pub(crate) fn migrate(
    addr: usize,
    bytes: usize,
    target: Target,
    mut call: impl FnMut(&mut hmm_gpu_migrate) -> Result<(), Errno>,
) -> Result<Moved, (Stop, Moved)> {
    let (addr, bytes) = (addr as u64, bytes as u64);
    let mut moved = Moved::default();
    let mut done = 0;
    loop {
        let mut argument = hmm_gpu_migrate {
            addr: addr.wrapping_add(done),
            len: bytes - done,
            target: target.to_uapi(),
            ..Default::default()
        };
        let result = call(&mut argument);
        if result == Err(Errno::FAULT) && done != 0 {
            // The first call had the whole range and did not mind it. That only holes are left is no error of the range.
            moved.unmapped += bytes - done;
            return Ok(moved);
        }
        let step = Moved::from_uapi(&argument);
        if argument.done_bytes > bytes - done {
            return Err((Stop::Nonsense("more done than asked for"), moved));
        }
        if sum(&step) != Some(argument.done_bytes) {
            return Err((Stop::Nonsense("counts that do not add up"), moved));
        }
        moved += step;
        done += argument.done_bytes;
        match result {
            Ok(()) if done == bytes => return Ok(moved),
            Ok(()) if argument.done_bytes == 0 => {
                return Err((Stop::Nonsense("nothing done and no error"), moved))
            }
            Err(Errno::INTR) if done == bytes && bytes != 0 => return Ok(moved),
            Ok(()) | Err(Errno::INTR) => tracing::trace!(done, bytes, "asks for the rest"),
            Err(errno) => return Err((Stop::Driver(errno), moved)),
        }
    }
}

/// The total of counts that nobody has checked yet.
fn sum(counts: &Moved) -> Option<u64> {
    counts
        .moved
        .checked_add(counts.already)?
        .checked_add(counts.skipped)?
        .checked_add(counts.unmapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDR: usize = 0x7f00_0000_0000;

    /// A driver that deals with `steps` of (done, moved, error), one a call, and skips what it does not move.
    fn driver<'a>(
        steps: &'a [(u64, u64, Option<Errno>)],
        asked: &'a mut Vec<(u64, u64)>,
    ) -> impl FnMut(&mut hmm_gpu_migrate) -> Result<(), Errno> + 'a {
        let mut steps = steps.iter();
        move |argument| {
            asked.push((argument.addr - ADDR as u64, argument.len));
            let &(done, moved, error) = steps.next().unwrap();
            argument.done_bytes = done;
            argument.moved_bytes = moved;
            argument.skipped_bytes = done - moved;
            error.map_or(Ok(()), Err)
        }
    }

    #[test]
    fn a_move_that_succeeds_is_one_call() {
        let mut asked = vec![];
        let moved = migrate(
            ADDR,
            0x4000,
            Target::Device,
            driver(&[(0x4000, 0x3000, None)], &mut asked),
        )
        .unwrap();
        assert_eq!(
            moved,
            Moved {
                moved: 0x3000,
                skipped: 0x1000,
                ..Default::default()
            }
        );
        assert_eq!(asked, [(0, 0x4000)]);
    }

    #[test]
    fn a_signal_only_interrupts() {
        let mut asked = vec![];
        let steps = [
            (0x1000, 0x1000, Some(Errno::INTR)),
            (0, 0, Some(Errno::INTR)),
            (0x3000, 0x3000, None),
        ];
        let moved = migrate(ADDR, 0x4000, Target::Device, driver(&steps, &mut asked)).unwrap();
        assert_eq!(moved.moved, 0x4000);
        assert_eq!(asked, [(0, 0x4000), (0x1000, 0x3000), (0x1000, 0x3000)]);
    }

    #[test]
    fn an_error_reports_how_far_it_came() {
        let mut asked = vec![];
        let steps = [
            (0x1000, 0x1000, Some(Errno::INTR)),
            (0x2000, 0x1000, Some(Errno::NOSPC)),
        ];
        let (stop, moved) =
            migrate(ADDR, 0x4000, Target::Device, driver(&steps, &mut asked)).unwrap_err();
        assert_eq!(stop, Stop::Driver(Errno::NOSPC));
        assert_eq!(
            moved,
            Moved {
                moved: 0x2000,
                skipped: 0x1000,
                ..Default::default()
            }
        );
    }

    #[test]
    fn holes_left_over_after_a_signal_are_no_error() {
        let mut asked = vec![];
        let steps = [
            (0x1000, 0x1000, Some(Errno::INTR)),
            (0, 0, Some(Errno::FAULT)),
        ];
        let moved = migrate(ADDR, 0x4000, Target::Device, driver(&steps, &mut asked)).unwrap();
        assert_eq!(
            moved,
            Moved {
                moved: 0x1000,
                unmapped: 0x3000,
                ..Default::default()
            }
        );
        let (stop, _) = migrate(
            ADDR,
            0x4000,
            Target::Device,
            driver(&[(0, 0, Some(Errno::FAULT))], &mut asked),
        )
        .unwrap_err();
        assert_eq!(stop, Stop::Driver(Errno::FAULT));
    }

    #[test]
    fn what_is_asked_reaches_the_driver_as_it_is() {
        let mut seen = None;
        let refuse = |argument: &mut hmm_gpu_migrate| {
            seen = Some((argument.addr, argument.len, argument.target));
            Err(Errno::INVAL)
        };
        let stopped = migrate(usize::MAX - 2, 0, Target::System, refuse).unwrap_err();
        assert_eq!(stopped, (Stop::Driver(Errno::INVAL), Moved::default()));
        assert_eq!(seen, Some((u64::MAX - 2, 0, uapi::HMM_GPU_TARGET_SYSTEM)));
    }

    #[test]
    fn a_driver_that_breaks_its_word_is_not_believed() {
        for (done, moved) in [(0x5000, 0x5000), (0x1000, 0x2000), (0, 0)] {
            let lie = |argument: &mut hmm_gpu_migrate| {
                argument.done_bytes = done;
                argument.moved_bytes = moved;
                Ok(())
            };
            let (stop, moved) = migrate(ADDR, 0x4000, Target::Device, lie).unwrap_err();
            assert!(matches!(stop, Stop::Nonsense(_)), "{stop:?}");
            assert_eq!(moved, Moved::default());
        }
        let overflow = |argument: &mut hmm_gpu_migrate| {
            argument.moved_bytes = u64::MAX;
            argument.already_bytes = 1;
            Ok(())
        };
        assert!(migrate(ADDR, 0x4000, Target::Device, overflow).is_err());
    }

    #[test]
    fn counts_are_shown_without_those_of_nothing() {
        assert_eq!(Moved::default().to_string(), "0 bytes moved");
        let moved = Moved {
            moved: 8 << 20,
            already: 4096,
            skipped: 0,
            unmapped: 8192,
        };
        assert_eq!(
            moved.to_string(),
            "8 MiB moved, 4 KiB there already, 8 KiB not mapped"
        );
        assert_eq!(moved.total(), (8 << 20) + 4096 + 8192);
        assert!(!moved.is_complete());
        assert_eq!([moved, moved].into_iter().sum::<Moved>(), moved + moved);
    }
}
