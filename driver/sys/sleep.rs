// SPDX-License-Identifier: GPL-2.0

//! Being told when the host goes to sleep, and when it wakes.
//!
//! C header: `include/linux/suspend.h`.

use crate::sys::bindings;
use kernel::{container_of, error::to_result, prelude::*, types::Opaque};

/// Something that is told.
pub(crate) trait Sleeper: Send + Sync + 'static {
    /// The host goes to sleep: processes run still, devices work. An error makes the host stay
    /// awake; then [`Sleeper::wake`] is not called.
    fn prepare(&self) -> Result;

    /// The host is awake, or has stayed so: processes run, devices work.
    fn wake(&self);
}

/// Tells a [`Sleeper`] (`register_pm_notifier`), until it is dropped.
///
/// # Invariants
///
/// `block` is registered.
#[pin_data(PinnedDrop)]
pub(crate) struct SleepNotifier<S: Sleeper> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    sleeper: S,
}

// SAFETY: The C structure is the kernel's, under its own lock; `S` is `Send`.
unsafe impl<S: Sleeper> Send for SleepNotifier<S> {}
// SAFETY: As above.
unsafe impl<S: Sleeper> Sync for SleepNotifier<S> {}

impl<S: Sleeper> SleepNotifier<S> {
    /// Begins to tell `sleeper`.
    pub(crate) fn new(sleeper: S) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            // Before the registration, which is the moment from which on it is called.
            sleeper,
            // INVARIANT: Registered if this returns `Ok`.
            block <- Opaque::try_ffi_init(|block: *mut bindings::notifier_block| {
                // SAFETY: `block` is ours to initialise, and pinned until `drop` has unregistered
                // it.
                unsafe {
                    block.write(bindings::notifier_block {
                        notifier_call: Some(Self::call),
                        ..Default::default()
                    });
                    to_result(bindings::register_pm_notifier(block))
                }
            }),
        })
    }

    /// # Safety
    ///
    /// Called by the kernel as `notifier_block::notifier_call`, for the block of a `Self`.
    unsafe extern "C" fn call(
        block: *mut bindings::notifier_block,
        action: c_ulong,
        _data: *mut c_void,
    ) -> c_int {
        let block = block.cast::<Opaque<bindings::notifier_block>>();
        // SAFETY: The block is in a `Self`, which unregisters it before it goes.
        let this = unsafe { &*container_of!(block, Self, block) };
        // CAST: Small numbers.
        match action as u32 {
            bindings::PM_HIBERNATION_PREPARE
            | bindings::PM_SUSPEND_PREPARE
            | bindings::PM_RESTORE_PREPARE => match this.sleeper.prepare() {
                Ok(()) => bindings::NOTIFY_OK as c_int,
                // SAFETY: Always fine to call.
                Err(error) => unsafe { bindings::hmm_gpu_notifier_from_errno(error.to_errno()) },
            },
            _ => {
                this.sleeper.wake();
                bindings::NOTIFY_OK as c_int
            }
        }
    }
}

#[pinned_drop]
impl<S: Sleeper> PinnedDrop for SleepNotifier<S> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: Registered, by the type invariants. Waits for a call that runs.
        unsafe { bindings::unregister_pm_notifier(self.block.get()) };
    }
}
