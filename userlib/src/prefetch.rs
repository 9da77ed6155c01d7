//! Moves that go on by themselves.

use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::{retry_on_intr, Errno};

use crate::sys::File;
use crate::uapi::{hmm_gpu_completion, hmm_gpu_prefetch};
use crate::{Attempt, Device, Error, Moved, PageRange, Target};

/// What is known of the moves of an open device.
#[derive(Debug, Default)]
pub(crate) struct Completions {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The last cookie that was given.
    last: u64,
    /// Somebody is at the file, which hands out each completion once.
    reading: bool,
    /// Read, and not asked for yet.
    ended: HashMap<u64, hmm_gpu_completion>,
    /// Nobody will ask for these.
    forgotten: HashSet<u64>,
}

impl Completions {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cookie(&self) -> u64 {
        let mut state = self.lock();
        state.last += 1;
        state.last
    }

    /// Whether a move has ended. If not, waits for that if `may_wait`, and reads what there is otherwise.
    fn has_ended(&self, file: &File, cookie: u64, may_wait: bool) -> Result<bool, Errno> {
        let mut state = self.lock();
        loop {
            if state.ended.contains_key(&cookie) {
                return Ok(true);
            }
            if state.reading {
                if !may_wait {
                    return Ok(false);
                }
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.reading = true;
            drop(state);
            let mut room = [hmm_gpu_completion::default(); 16];
            let read = match may_wait || file.is_readable() {
                true => retry_on_intr(|| file.completions(&mut room)),
                false => Err(Errno::AGAIN),
            };
            state = self.lock();
            state.reading = false;
            self.changed.notify_all();
            match read {
                // Somebody else reads the file, and has it.
                Ok(0) => return Err(Errno::NOMSG),
                Ok(count) => {
                    for completion in room.iter().take(count) {
                        if !state.forgotten.remove(&completion.cookie) {
                            state.ended.insert(completion.cookie, *completion);
                        }
                    }
                }
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
    }

    fn take(&self, cookie: u64) -> Option<hmm_gpu_completion> {
        self.lock().ended.remove(&cookie)
    }

    fn forget(&self, cookie: u64) {
        let mut state = self.lock();
        if state.ended.remove(&cookie).is_none() {
            state.forgotten.insert(cookie);
        }
    }
}

/// A move that goes on by itself, see [`Device::prefetch_async`]. Dropping it does not end the move.
#[derive(Debug)]
#[must_use = "it says how the move ended"]
pub struct Prefetch<'d> {
    device: &'d Device,
    cookie: u64,
    addr: usize,
    bytes: usize,
    target: Target,
    taken: bool,
}

impl Prefetch<'_> {
    /// Whether it has ended. Does not wait.
    ///
    /// The device itself (`as_fd`) is readable for `poll` and its like when a move has ended whose handle was not asked since.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EPERM` (asked by another process), `ENOMSG` (somebody has read the file
    /// past this library).
    pub fn is_done(&self) -> Result<bool, Error> {
        self.ask(false)
    }

    /// Waits for its end, and says how it ended, as [`Device::prefetch`] does.
    ///
    /// Errors: those of `prefetch`, `ECANCELED` (the process was ending), and those of [`is_done`](Self::is_done).
    pub fn wait(mut self) -> Result<Moved, Error> {
        self.ask(true)?;
        self.taken = true;
        let Some(completion) = self.device.completions().take(self.cookie) else {
            return Err(self.error(Errno::NOMSG, Moved::default()));
        };
        let moved = Moved {
            moved: completion.moved_bytes,
            already: completion.already_bytes,
            skipped: completion.skipped_bytes,
            unmapped: completion.unmapped_bytes,
        };
        match i32::try_from(completion.error) {
            Ok(0) => Ok(moved),
            Ok(errno) => Err(self.error(Errno::from_raw_os_error(errno), moved)),
            Err(_) => Err(Error::answer(
                self.device.path(),
                self.attempt(moved),
                "an error that is none",
            )),
        }
    }

    fn ask(&self, may_wait: bool) -> Result<bool, Error> {
        self.device
            .completions()
            .has_ended(self.device.file(), self.cookie, may_wait)
            .map_err(|errno| self.error(errno, Moved::default()))
    }

    fn attempt(&self, moved: Moved) -> Attempt {
        Attempt::Move {
            addr: self.addr,
            bytes: self.bytes,
            target: self.target,
            moved,
        }
    }

    fn error(&self, errno: Errno, moved: Moved) -> Error {
        Error::call(self.device.path(), self.attempt(moved), errno)
    }
}

impl Drop for Prefetch<'_> {
    fn drop(&mut self) {
        if !self.taken {
            self.device.completions().forget(self.cookie);
        }
    }
}

impl Device {
    /// As [`prefetch`](Self::prefetch), but returns at once: the pages move while the program goes on. Moves of a device as opened
    /// here are made one after the other, in the order of these calls; at most 64 at a time.
    ///
    /// The slice is not borrowed for as long as that takes: whatever is at its addresses by then moves, which changes no byte.
    ///
    /// Errors: [`NoPages`](Error::NoPages) for a slice without bytes, [`Call`](Error::Call) with the driver's `EAGAIN` (64 are under
    /// way: wait for one), `ENOMEM`, `ENODEV`, `EPERM`.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Target};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let (now, next) = (vec![1_u32; 1 << 20], vec![2_u32; 1 << 20]);
    /// let coming = device.prefetch_async(&next, Target::Device)?;
    /// let sum: u32 = now.iter().sum(); // meanwhile
    /// println!("{sum}; {}", coming.wait()?); // 4194304; 4 MiB moved
    /// # Ok(())
    /// # }
    /// ```
    pub fn prefetch_async<T>(&self, data: &[T], target: Target) -> Result<Prefetch<'_>, Error> {
        let range = PageRange::of(data);
        if range.is_empty() {
            return Err(Error::NoPages);
        }
        self.prefetch_range_async(range.addr(), range.bytes(), target)
    }

    /// As [`prefetch_async`](Self::prefetch_async), for an address and a length in bytes that reach the driver as they are. The
    /// driver's `PREFETCH`.
    ///
    /// Errors: those of `prefetch_async`, and `EINVAL` (not whole pages, or none), `EFAULT` (it leaves user space).
    pub fn prefetch_range_async(
        &self,
        addr: usize,
        bytes: usize,
        target: Target,
    ) -> Result<Prefetch<'_>, Error> {
        let cookie = self.completions().cookie();
        let call = || {
            let mut argument = hmm_gpu_prefetch {
                addr: addr as u64,
                len: bytes as u64,
                cookie,
                target: target.to_uapi(),
                ..Default::default()
            };
            retry_on_intr(|| self.file().prefetch(&mut argument))
        };
        let mut result = call();
        if result == Err(Errno::AGAIN) {
            // What has ended counts until it is read.
            let read = self.completions().has_ended(self.file(), cookie, false);
            result = read.and_then(|_| call());
        }
        let attempt = Attempt::Queue {
            addr,
            bytes,
            target,
        };
        result.map_err(|errno| Error::call(self.path(), attempt, errno))?;
        Ok(Prefetch {
            device: self,
            cookie,
            addr,
            bytes,
            target,
            taken: false,
        })
    }
}
