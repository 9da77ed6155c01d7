//! The device reads and writes the process's memory.

use std::fmt;

use rustix::io::Errno;

use crate::error::Attempt;
use crate::moving::Stop;
use crate::uapi::{self, hmm_gpu_access};
use crate::{Bytes, Device, Error, Pod, TableEntry};

/// What is done where the device touches a page that its page table does not map: a device fault.
///
/// A hint in all but `None`: the bytes that are read and written are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The page is mapped for the device where it lies.
    Map,
    /// The page is moved to the device if it can be, and mapped.
    Migrate,
    /// Nothing: the access ends with `EAGAIN`. For accesses only; [`Device::fault`] and atomic operations refuse it (`EINVAL`).
    None,
}

impl Policy {
    pub(crate) fn to_uapi(self) -> u32 {
        match self {
            Policy::Map => uapi::HMM_GPU_POLICY_MAP,
            Policy::Migrate => uapi::HMM_GPU_POLICY_MIGRATE,
            Policy::None => uapi::HMM_GPU_POLICY_NONE,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Policy::Map => "map",
            Policy::Migrate => "migrate",
            Policy::None => "none",
        })
    }
}

/// What a device was asked to do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// To read it.
    Read,
    /// To write to it.
    Write,
    /// To read it, and to write that elsewhere.
    Copy {
        /// First byte of where to.
        to_addr: usize,
    },
}

/// What a device has accessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Accessed {
    /// Bytes that it came through, from the start of the range on. After a success it is the length of the range.
    pub bytes: u64,
    /// Device faults: times that its page table did not have a page. Servicing one maps those that the access comes to next,
    /// up to the next 2 MiB, too.
    pub faults: u64,
}

/// `8 MiB, 3 device faults`.
impl fmt::Display for Accessed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.faults == 1 { "" } else { "s" };
        write!(
            f,
            "{}, {} device fault{plural}",
            Bytes(self.bytes),
            self.faults
        )
    }
}

/// An access as it was asked for, for the text of an error.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub(crate) operation: Operation,
    pub(crate) addr: usize,
    pub(crate) bytes: usize,
    pub(crate) policy: Policy,
}

/// How an access ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stopped {
    stop: Stop,
    /// What it came to before.
    accessed: Accessed,
    fault_addr: Option<usize>,
    entry: TableEntry,
}

/// The device reads, writes and copies: through its page table, faulting as a GPU does where that has no entry.
///
/// A page is accessed at a time, in the order of addresses. The memory may be anywhere: in system memory, in the VRAM of this
/// device or of another one, in a mapped file. A device target of [`prefetch`](Device::prefetch) is no condition; it spares the
/// device faults.
///
/// The first argument is what the device accesses; the second of `read` and `write` is a buffer of the caller's, from or to
/// which the driver brings the bytes. Slices hold plain data ([`Pod`]). A call without bytes is none. A signal does not end a
/// call: the rest is asked for until all is done.
///
/// Errors of all of these: [`Call`](Error::Call) with the driver's `EFAULT` (nothing that a device can reach is mapped there, or
/// the buffer cannot be used), `EACCES` (the mapping does not allow it), `EAGAIN` ([`Policy::None`]: no entry), `EBUSY` (a page
/// changed place too often), `ENOSPC` (no VRAM for the device page table), `ENOMEM`, `EHWPOISON` (the memory there is broken),
/// `ENODEV`, `EPERM`, and `ENOTTY` (a driver without [`Capabilities::MIRROR`](crate::Capabilities::MIRROR)).
/// [`Error::accessed`] says how far it came, [`Error::fault_addr`] where a device fault ended it, and
/// [`Error::table_entry`] what the device found there.
impl Device {
    /// The device reads `from`, and what it has read is in `into`. The driver's `ACCESS`.
    ///
    /// Errors: as above, and [`Lengths`](Error::Lengths) if the two are not of one length.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let words: Vec<u64> = (0..1 << 20).collect();
    /// let mut seen = vec![0; words.len()];
    /// let read = device.read(&words, &mut seen, Policy::Migrate)?;
    /// println!("{read}"); // 8 MiB, 5 device faults
    /// assert_eq!(seen[4096], 4096); // the words are in VRAM now, `seen` is not
    /// # Ok(())
    /// # }
    /// ```
    pub fn read<T: Pod>(
        &self,
        from: &[T],
        into: &mut [T],
        policy: Policy,
    ) -> Result<Accessed, Error> {
        same_length(from, into)?;
        if size_of_val(from) == 0 {
            return Ok(Accessed::default());
        }
        self.read_at(
            from.as_ptr() as usize,
            bytemuck::cast_slice_mut(into),
            policy,
        )
    }

    /// The device writes `from` to `to`. The driver's `ACCESS`.
    ///
    /// Errors: as above, and [`Lengths`](Error::Lengths) if the two are not of one length.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Policy, SharedBuf};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let mut words = SharedBuf::<u32>::zeroed(1 << 20)?;
    /// device.write(&mut words[..3], &[1, 2, 3], Policy::Migrate)?;
    /// assert_eq!(words[..4], [1, 2, 3, 0]); // the CPU's touch brings the page back
    /// # Ok(())
    /// # }
    /// ```
    pub fn write<T: Pod>(
        &self,
        to: &mut [T],
        from: &[T],
        policy: Policy,
    ) -> Result<Accessed, Error> {
        same_length(from, to)?;
        if size_of_val(from) == 0 {
            return Ok(Accessed::default());
        }
        let ask = Ask {
            operation: Operation::Write,
            addr: to.as_ptr() as usize,
            bytes: size_of_val(to),
            policy,
        };
        let (to, from) = (bytemuck::cast_slice_mut(to), bytemuck::cast_slice(from));
        self.access(ask, |argument, done| {
            self.file()
                .access_write(argument, &mut to[done..], &from[done..])
        })
    }

    /// The device reads `from` and writes it to `to`; no byte of it passes through the CPU's hands. The driver's `ACCESS`.
    ///
    /// Errors: as above, and [`Lengths`](Error::Lengths) if the two are not of one length.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Policy, SharedBuf};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let words: Vec<u32> = (0..1 << 20).collect();
    /// let mut copy = SharedBuf::zeroed(words.len())?;
    /// device.copy(&words, &mut copy, Policy::Migrate)?;
    /// assert_eq!(*copy, words);
    /// # Ok(())
    /// # }
    /// ```
    pub fn copy<T: Pod>(
        &self,
        from: &[T],
        to: &mut [T],
        policy: Policy,
    ) -> Result<Accessed, Error> {
        same_length(from, to)?;
        if size_of_val(from) == 0 {
            return Ok(Accessed::default());
        }
        let ask = Ask {
            operation: Operation::Copy {
                to_addr: to.as_ptr() as usize,
            },
            addr: from.as_ptr() as usize,
            bytes: size_of_val(from),
            policy,
        };
        let (from, to) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
        self.access(ask, |argument, done| {
            self.file()
                .access_copy(argument, &from[done..], &mut to[done..])
        })
    }

    /// As [`read`](Self::read), of any address, which reaches the driver as it is: also of memory that is not plain data, or
    /// not this program's. Without bytes it is `EINVAL`.
    ///
    /// Safe for every address. The device reads through its page table, which maps only what the process itself may read, and
    /// only memory: what is not there is `EFAULT` or `EACCES`, and nothing happens by reading it but what a page fault does.
    /// The driver reads, not this program, so that bytes without a value (padding) come as those that are there, and memory
    /// that others write meanwhile comes as it was at some moments during the call. What this program has written to memory
    /// whose address it never gave away, the compiler may keep to itself.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let names: Vec<String> = vec!["Ada".into(), "Grace".into()];
    /// let mut seen = [0; 5];
    /// device.read_at(names[1].as_ptr() as usize, &mut seen, Policy::Map)?; // from pointer to pointer
    /// assert_eq!(&seen, b"Grace");
    /// # Ok(())
    /// # }
    /// ```
    pub fn read_at(&self, addr: usize, into: &mut [u8], policy: Policy) -> Result<Accessed, Error> {
        let ask = Ask {
            operation: Operation::Read,
            addr,
            bytes: into.len(),
            policy,
        };
        self.access(ask, |argument, done| {
            self.file().access_read(argument, &mut into[done..])
        })
    }

    /// Asks until all is done, and tells how it ended. `call` gets the argument with all but its operation and its other
    /// address, and how many bytes are done already.
    pub(crate) fn access(
        &self,
        ask: Ask,
        call: impl FnMut(&mut hmm_gpu_access, usize) -> Result<(), Errno>,
    ) -> Result<Accessed, Error> {
        let Ask {
            operation,
            addr,
            bytes,
            policy,
        } = ask;
        let stopped = match access(addr, bytes, policy, call) {
            Ok(accessed) => {
                tracing::trace!(path = %self.path().display(), ?ask, %accessed, "accessed");
                return Ok(accessed);
            }
            Err(stopped) => stopped,
        };
        let attempt = Attempt::Access {
            operation,
            addr,
            bytes,
            policy,
            accessed: stopped.accessed,
            fault_addr: stopped.fault_addr,
            entry: stopped.entry,
        };
        Err(match stopped.stop {
            Stop::Driver(errno) => Error::call(self.path(), attempt, errno),
            Stop::Nonsense(problem) => Error::answer(self.path(), attempt, problem),
        })
    }
}

fn same_length<T>(from: &[T], to: &[T]) -> Result<(), Error> {
    if from.len() != to.len() {
        return Err(Error::Lengths {
            from: from.len(),
            to: to.len(),
        });
    }
    Ok(())
}

/// Asks for the whole range, and again from where the driver stopped as long as only a signal was the reason.
fn access(
    addr: usize,
    bytes: usize,
    policy: Policy,
    mut call: impl FnMut(&mut hmm_gpu_access, usize) -> Result<(), Errno>,
) -> Result<Accessed, Stopped> {
    let mut accessed = Accessed::default();
    let mut done = 0;
    loop {
        let mut argument = hmm_gpu_access {
            policy: policy.to_uapi(),
            addr: (addr as u64).wrapping_add(done as u64),
            len: (bytes - done) as u64,
            ..Default::default()
        };
        let result = call(&mut argument, done);
        let step = usize::try_from(argument.done_bytes)
            .ok()
            .filter(|step| *step <= bytes - done);
        if let Some(step) = step {
            done += step;
            accessed.bytes += step as u64;
            accessed.faults = accessed.faults.saturating_add(argument.faults);
        }
        let stop = match (result, step) {
            (_, None) => Stop::Nonsense("more done than asked for"),
            (Ok(()), _) if done == bytes => return Ok(accessed),
            (Ok(()), Some(0)) => Stop::Nonsense("nothing done and no error"),
            (Err(Errno::INTR), _) if done == bytes && bytes != 0 => return Ok(accessed),
            (Ok(()) | Err(Errno::INTR), _) => {
                tracing::trace!(done, bytes, "asks for the rest");
                continue;
            }
            (Err(errno), _) => Stop::Driver(errno),
        };
        return Err(Stopped {
            stop,
            accessed,
            fault_addr: usize::try_from(argument.fault_addr)
                .ok()
                .filter(|&addr| addr != 0),
            entry: TableEntry::from_bits(argument.entry),
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    const ADDR: usize = 0x7f00_0000_0123;

    /// A driver that gets `steps` of (done, faults, error) far, one a call.
    fn driver<'a>(
        steps: &'a [(u64, u64, Option<Errno>)],
        asked: &'a mut Vec<(u64, u64)>,
    ) -> impl FnMut(&mut hmm_gpu_access, usize) -> Result<(), Errno> + 'a {
        let mut steps = steps.iter();
        move |argument, done| {
            assert_eq!(argument.addr, (ADDR + done) as u64);
            asked.push((argument.addr - ADDR as u64, argument.len));
            let &(done, faults, error) = steps.next().unwrap();
            argument.done_bytes = done;
            argument.faults = faults;
            if error.is_some() {
                argument.fault_addr = argument.addr + done;
                argument.entry = uapi::HMM_GPU_PTE_REQUESTED;
            }
            error.map_or(Ok(()), Err)
        }
    }

    #[test]
    fn a_signal_only_interrupts() {
        let mut asked = vec![];
        let steps = [
            (1000, 1, Some(Errno::INTR)),
            (0, 0, Some(Errno::INTR)),
            (4000, 2, None),
        ];
        let accessed = access(ADDR, 5000, Policy::Map, driver(&steps, &mut asked)).unwrap();
        let expected = Accessed {
            bytes: 5000,
            faults: 3,
        };
        assert_eq!(accessed, expected);
        assert_eq!(asked, [(0, 5000), (1000, 4000), (1000, 4000)]);
        let last = [(5000, 1, Some(Errno::INTR))];
        assert!(access(ADDR, 5000, Policy::Map, driver(&last, &mut asked)).is_ok());
    }

    #[test]
    fn an_error_reports_how_far_it_came_and_what_was_there() {
        let mut asked = vec![];
        let steps = [(1000, 1, Some(Errno::INTR)), (500, 1, Some(Errno::AGAIN))];
        let stopped = access(ADDR, 5000, Policy::None, driver(&steps, &mut asked)).unwrap_err();
        let expected = Stopped {
            stop: Stop::Driver(Errno::AGAIN),
            accessed: Accessed {
                bytes: 1500,
                faults: 2,
            },
            fault_addr: Some(ADDR + 1500),
            entry: TableEntry::from_bits(uapi::HMM_GPU_PTE_REQUESTED),
        };
        assert_eq!(stopped, expected);
    }

    #[test]
    fn what_is_asked_reaches_the_driver_as_it_is() {
        for (policy, number) in [(Policy::Map, 0), (Policy::Migrate, 1), (Policy::None, 2)] {
            let mut seen = None;
            let refuse = |argument: &mut hmm_gpu_access, done: usize| {
                seen = Some((argument.addr, argument.len, argument.policy, done));
                Err(Errno::INVAL)
            };
            let stopped = access(usize::MAX - 2, 0, policy, refuse).unwrap_err();
            assert_eq!(stopped.stop, Stop::Driver(Errno::INVAL));
            assert_eq!(seen, Some((u64::MAX - 2, 0, number, 0)));
        }
    }

    #[test]
    fn a_driver_that_breaks_its_word_is_not_believed() {
        for done in [5001, u64::MAX, 0] {
            let lie = |argument: &mut hmm_gpu_access, _: usize| {
                argument.done_bytes = done;
                argument.faults = u64::MAX;
                Ok(())
            };
            let stopped = access(ADDR, 5000, Policy::Map, lie).unwrap_err();
            assert!(matches!(stopped.stop, Stop::Nonsense(_)), "{stopped:?}");
            assert_eq!(stopped.accessed.bytes, 0);
        }
    }

    #[test]
    fn an_access_is_shown_with_its_faults() {
        let shown = |bytes, faults| Accessed { bytes, faults }.to_string();
        assert_eq!(shown(8 << 20, 3), "8 MiB, 3 device faults");
        assert_eq!(shown(17, 1), "17 bytes, 1 device fault");
    }

    #[test]
    fn slices_of_two_lengths_are_refused() {
        assert!(same_length(&[1, 2], &[3, 4]).is_ok());
        assert!(matches!(
            same_length(&[1, 2], &[3]),
            Err(Error::Lengths { from: 2, to: 1 })
        ));
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches bytes that are left out or accessed twice where signals come, and a length that is not what was done.
        #[test]
        fn signals_leave_no_byte_out(
            bytes in 1usize..100_000,
            steps in prop::collection::vec(0u64..30_000, 0..10),
            fails in any::<bool>(),
        ) {
            let (mut steps, mut done_to) = (steps.into_iter(), 0);
            let result = access(ADDR, bytes, Policy::Map, |argument, done| {
                assert_eq!((argument.addr, done as u64), ((ADDR + done) as u64, done_to));
                assert_eq!(done_to + argument.len, bytes as u64);
                let step = steps.next();
                argument.done_bytes = match step {
                    Some(step) => step.min(argument.len),
                    None if fails => argument.len / 2,
                    None => argument.len,
                };
                argument.faults = 1;
                done_to += argument.done_bytes;
                match step {
                    Some(_) => Err(Errno::INTR),
                    None if fails => Err(Errno::FAULT),
                    None => Ok(()),
                }
            });
            match result {
                Ok(accessed) => prop_assert_eq!((accessed.bytes, done_to), (bytes as u64, bytes as u64)),
                Err(stopped) => {
                    prop_assert!(fails && stopped.stop == Stop::Driver(Errno::FAULT));
                    prop_assert_eq!(stopped.accessed.bytes, done_to);
                }
            }
        }
    }
}
