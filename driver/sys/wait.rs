// SPDX-License-Identifier: GPL-2.0

//! Waiting for a word to change, for a time that is bounded.
//!
//! C header: `include/linux/wait.h`.

use crate::sys::bindings;
use kernel::{
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full},
    types::Opaque,
};

/// A word, and those who wait for it to change.
///
/// # Invariants
///
/// `queue` is initialised.
#[pin_data]
pub(crate) struct WaitWord {
    word: Atomic<u32>,
    #[pin]
    queue: Opaque<bindings::wait_queue_head>,
}

// SAFETY: The queue has a lock of its own.
unsafe impl Send for WaitWord {}
// SAFETY: As above.
unsafe impl Sync for WaitWord {}

/// What may end a wait before its time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// That the task is killed.
    Killed,
    /// Nothing.
    Over,
}

impl WaitWord {
    /// With this value.
    pub(crate) fn new(value: u32) -> impl PinInit<Self> {
        pin_init!(Self {
            word: Atomic::new(value),
            // INVARIANT: Initialised here, and pinned.
            queue <- Opaque::ffi_init(|queue| {
                // SAFETY: `queue` is ours to initialise.
                unsafe { bindings::hmm_gpu_init_waitqueue(queue) }
            }),
        })
    }

    /// The value.
    pub(crate) fn get(&self) -> u32 {
        self.word.load(Acquire)
    }

    /// Changes the value, if it is `from`, and wakes those who wait. Returns whether it was.
    pub(crate) fn change(&self, from: u32, to: u32) -> bool {
        let changed = self.word.cmpxchg(from, to, Full).is_ok();
        if changed {
            // SAFETY: Initialised, by the type invariants.
            unsafe { bindings::hmm_gpu_wake_all(self.queue.get()) };
        }
        changed
    }

    /// Waits as long as the value is `value`, for `ns` nanoseconds at most. Fails with `EINTR` if the task was killed.
    pub(crate) fn wait_while(&self, value: u32, ns: u64, until: Until) -> Result {
        // SAFETY: Initialised, by the type invariants, and the word is valid as long as `self` is.
        let killed = unsafe {
            bindings::hmm_gpu_wait_while(
                self.queue.get(),
                self.word.as_ptr(),
                value,
                ns,
                until == Until::Killed,
            )
        };
        if killed {
            return Err(EINTR);
        }
        Ok(())
    }
}
