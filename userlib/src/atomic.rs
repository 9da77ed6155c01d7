//! The device does atomic operations on words of the process's memory.

use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64};

use rustix::io::{retry_on_intr, Errno};

use crate::error::Attempt;
use crate::uapi::{self, hmm_gpu_atomic};
use crate::{Device, Error, Policy};

mod sealed {
    pub trait Sealed {
        /// Bytes of the word.
        const BYTES: u32;
    }
}

/// A word that CPUs and devices may change at the same time: [`AtomicU32`] and [`AtomicU64`], and no other.
pub trait AtomicWord: sealed::Sealed {
    /// What is in it.
    type Value: Copy + Into<u64> + TryFrom<u64>;
}

impl sealed::Sealed for AtomicU32 {
    const BYTES: u32 = 4;
}

impl AtomicWord for AtomicU32 {
    type Value = u32;
}

impl sealed::Sealed for AtomicU64 {
    const BYTES: u32 = 8;
}

impl AtomicWord for AtomicU64 {
    type Value = u64;
}

/// An atomic operation, with what it takes. Shown as a call: `fetch_add(0x1)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AtomicOperation {
    /// To add this, wrapping around.
    FetchAdd(u64),
    /// Bitwise and with this.
    FetchAnd(u64),
    /// Bitwise or with this.
    FetchOr(u64),
    /// To store this.
    Swap(u64),
    /// To store `new` if the word is `current`.
    CompareExchange {
        /// What the word must be.
        current: u64,
        /// What it then becomes.
        new: u64,
    },
}

impl AtomicOperation {
    /// The argument of the driver's call, but for the word and the policy.
    fn to_uapi(self) -> hmm_gpu_atomic {
        let (op, operand, compare) = match self {
            AtomicOperation::FetchAdd(value) => (uapi::HMM_GPU_ATOMIC_ADD, value, 0),
            AtomicOperation::FetchAnd(value) => (uapi::HMM_GPU_ATOMIC_AND, value, 0),
            AtomicOperation::FetchOr(value) => (uapi::HMM_GPU_ATOMIC_OR, value, 0),
            AtomicOperation::Swap(value) => (uapi::HMM_GPU_ATOMIC_XCHG, value, 0),
            AtomicOperation::CompareExchange { current, new } => {
                (uapi::HMM_GPU_ATOMIC_CMPXCHG, new, current)
            }
        };
        hmm_gpu_atomic {
            op,
            operand,
            compare,
            ..Default::default()
        }
    }
}

impl fmt::Display for AtomicOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AtomicOperation::FetchAdd(value) => write!(f, "fetch_add({value:#x})"),
            AtomicOperation::FetchAnd(value) => write!(f, "fetch_and({value:#x})"),
            AtomicOperation::FetchOr(value) => write!(f, "fetch_or({value:#x})"),
            AtomicOperation::Swap(value) => write!(f, "swap({value:#x})"),
            AtomicOperation::CompareExchange { current, new } => {
                write!(f, "compare_exchange({current:#x}, {new:#x})")
            }
        }
    }
}

/// The device does atomic operations: what CPUs and other devices do to the word happens before or after, never in between, and
/// nobody sees it half changed. Each returns what the word was before, and is ordered as
/// [`SeqCst`](std::sync::atomic::Ordering::SeqCst).
///
/// A word in the device's VRAM is changed there. In system memory the device takes the word's page for itself first: no CPU has
/// the page until one touches it, which gives it up. So further operations on the page cost no fault as long as it is the
/// device's alone, and a page that both change all the time goes back and forth.
///
/// The word must be in private memory, which is what `Box`, `Vec`, the stack, statics and [`SharedBuf`](crate::SharedBuf) are
/// made of: the kernel gives a device no other. A signal does not end a call, which is done once, or not at all and an error.
///
/// Errors of all of these: [`Call`](Error::Call) with the driver's `EOPNOTSUPP` (shared memory, or a file's), `EACCES` (the
/// mapping may not be written), `EFAULT` (nothing that a device can reach is mapped there), `EINVAL` ([`Policy::None`], which
/// these do not have), `EBUSY` (the page changed place too often: CPUs touch it all the time), `ENOSPC` (no VRAM for the device
/// page table), `ENOMEM`, `ENODEV`, `EPERM`, and `ENOTTY` (a driver without
/// [`Capabilities::ATOMIC`](crate::Capabilities::ATOMIC)).
impl Device {
    /// The device adds `value` to a word, wrapping around, and returns what it was before. The driver's `ATOMIC`.
    ///
    /// ```no_run
    /// use std::sync::atomic::{AtomicU64, Ordering};
    ///
    /// use hmm_gpu::{Device, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let counter = Box::new(AtomicU64::new(40));
    /// assert_eq!(device.fetch_add(&*counter, 1, Policy::Map)?, 40);
    /// assert_eq!(counter.fetch_add(1, Ordering::Relaxed), 41); // the CPU's touch gives the page up
    /// assert_eq!(counter.load(Ordering::Relaxed), 42);
    /// # Ok(())
    /// # }
    /// ```
    pub fn fetch_add<W: AtomicWord>(
        &self,
        word: &W,
        value: W::Value,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        self.atomic(word, AtomicOperation::FetchAdd(value.into()), policy)
    }

    /// The device does a bitwise and of a word with `value`, and returns what it was before. The driver's `ATOMIC`.
    pub fn fetch_and<W: AtomicWord>(
        &self,
        word: &W,
        value: W::Value,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        self.atomic(word, AtomicOperation::FetchAnd(value.into()), policy)
    }

    /// The device does a bitwise or of a word with `value`, and returns what it was before. The driver's `ATOMIC`.
    pub fn fetch_or<W: AtomicWord>(
        &self,
        word: &W,
        value: W::Value,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        self.atomic(word, AtomicOperation::FetchOr(value.into()), policy)
    }

    /// The device stores `value` in a word, and returns what it was before. The driver's `ATOMIC`.
    pub fn swap<W: AtomicWord>(
        &self,
        word: &W,
        value: W::Value,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        self.atomic(word, AtomicOperation::Swap(value.into()), policy)
    }

    /// The device stores `new` in a word if it is `current`, and returns what it was before: it was stored if that is `current`.
    /// The driver's `ATOMIC`.
    ///
    /// ```no_run
    /// use std::sync::atomic::{AtomicU32, Ordering};
    ///
    /// use hmm_gpu::{Device, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let lock = AtomicU32::new(0);
    /// while device.compare_exchange(&lock, 0, 1, Policy::Map)? != 0 {} // a CPU has it
    /// // ... what the lock is for ...
    /// device.swap(&lock, 0, Policy::Map)?;
    /// assert_eq!(lock.load(Ordering::Acquire), 0);
    /// # Ok(())
    /// # }
    /// ```
    pub fn compare_exchange<W: AtomicWord>(
        &self,
        word: &W,
        current: W::Value,
        new: W::Value,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        let operation = AtomicOperation::CompareExchange {
            current: current.into(),
            new: new.into(),
        };
        self.atomic(word, operation, policy)
    }

    fn atomic<W: AtomicWord>(
        &self,
        word: &W,
        operation: AtomicOperation,
        policy: Policy,
    ) -> Result<W::Value, Error> {
        let addr = ptr::from_ref(word) as usize;
        self.ask_atomic::<W>(addr, operation, policy, |argument| {
            self.file().atomic_word(argument, word)
        })
    }

    /// Asks until it is done, and tells how it ended. `call` gets the argument with all but the word's address.
    pub(crate) fn ask_atomic<W: AtomicWord>(
        &self,
        addr: usize,
        operation: AtomicOperation,
        policy: Policy,
        call: impl FnMut(&mut hmm_gpu_atomic) -> Result<(), Errno>,
    ) -> Result<W::Value, Error> {
        let attempt = |faults| Attempt::Atomic {
            operation,
            addr,
            bytes: size_of::<W>(),
            policy,
            faults,
        };
        match atomic::<W>(operation, policy, call) {
            (Ok(old), faults) => old.try_into().map_err(|_| {
                let problem = "a value that is wider than the word";
                Error::answer(self.path(), attempt(faults), problem)
            }),
            (Err(errno), faults) => Err(Error::call(self.path(), attempt(faults), errno)),
        }
    }
}

/// Asks once more as long as only a signal was the reason. Returns what the word was, and how many device faults there were.
fn atomic<W: AtomicWord>(
    operation: AtomicOperation,
    policy: Policy,
    mut call: impl FnMut(&mut hmm_gpu_atomic) -> Result<(), Errno>,
) -> (Result<u64, Errno>, u64) {
    let mut faults = 0_u64;
    let result = retry_on_intr(|| {
        let mut argument = hmm_gpu_atomic {
            bytes: W::BYTES,
            policy: policy.to_uapi(),
            ..operation.to_uapi()
        };
        let result = call(&mut argument);
        faults = faults.saturating_add(argument.faults);
        result.map(|()| argument.old)
    });
    (result, faults)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    #[test]
    fn what_is_asked_reaches_the_driver_as_it_is() {
        use AtomicOperation as Op;
        let exchange = Op::CompareExchange { current: 5, new: 6 };
        for (operation, op, operand, compare) in [
            (Op::FetchAdd(1), 0, 1, 0),
            (Op::FetchAnd(u64::MAX), 1, u64::MAX, 0),
            (Op::FetchOr(3), 2, 3, 0),
            (Op::Swap(4), 3, 4, 0),
            (exchange, 4, 6, 5),
        ] {
            for (policy, number) in [(Policy::Map, 0), (Policy::Migrate, 1), (Policy::None, 2)] {
                let expected = |bytes| hmm_gpu_atomic {
                    op,
                    operand,
                    compare,
                    bytes,
                    policy: number,
                    ..Default::default()
                };
                let (mut narrow, mut wide) = Default::default();
                let keep = |argument: &mut hmm_gpu_atomic, into: &mut hmm_gpu_atomic| {
                    *into = *argument;
                    Ok(())
                };
                let _ = atomic::<AtomicU32>(operation, policy, |it| keep(it, &mut narrow));
                let _ = atomic::<AtomicU64>(operation, policy, |it| keep(it, &mut wide));
                for (asked, bytes) in [(narrow, 4), (wide, 8)] {
                    let (asked, expected) = (bytemuck::bytes_of(&asked), expected(bytes));
                    assert_eq!(asked, bytemuck::bytes_of(&expected));
                }
            }
        }
    }

    #[test]
    fn an_operation_is_shown_as_a_call() {
        assert_eq!(AtomicOperation::FetchAdd(1).to_string(), "fetch_add(0x1)");
        let exchange = AtomicOperation::CompareExchange {
            current: 0,
            new: 0xff,
        };
        assert_eq!(exchange.to_string(), "compare_exchange(0x0, 0xff)");
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches a signal that ends a call, an operation that is done again after it was done, and faults that are not counted.
        #[test]
        fn signals_only_interrupt(signals in 0usize..10, end in prop::option::of(any::<u64>())) {
            let mut calls = 0;
            let (result, faults) = atomic::<AtomicU64>(AtomicOperation::Swap(7), Policy::Map, |argument| {
                calls += 1;
                argument.faults = 2;
                if calls <= signals {
                    // Nothing that a call before has left.
                    argument.old = 99;
                    return Err(Errno::INTR);
                }
                assert_eq!((argument.op, argument.operand, argument.old), (3, 7, 0));
                argument.old = end.unwrap_or(88);
                end.map(drop).ok_or(Errno::BUSY)
            });
            prop_assert_eq!((calls, faults), (signals + 1, 2 * (signals as u64 + 1)));
            prop_assert_eq!(result, end.ok_or(Errno::BUSY));
        }
    }
}
