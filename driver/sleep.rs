// SPDX-License-Identifier: GPL-2.0

//! Sleep: what is in VRAM would not survive it, so it leaves before, and none is handed out until
//! the host is awake again.

#![forbid(unsafe_code)]

use crate::{client::MemoryGate, evict::evict_once, sys::sleep::Sleeper};
use kernel::{
    new_condvar, new_mutex,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Full},
        Arc, CondVar, Mutex,
    },
    time::{delay::fsleep, Delta, Instant, Monotonic},
};

/// Whether a device's VRAM can be used.
#[pin_data]
pub(crate) struct Sleep {
    /// How often that has changed. Odd while it cannot be.
    epoch: Atomic<u64>,
    #[pin]
    lock: Mutex<()>,
    #[pin]
    awake: CondVar,
}

impl Sleep {
    /// Awake.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            epoch: Atomic::new(0),
            lock <- new_mutex!(()),
            awake <- new_condvar!(),
        })
    }

    /// Changes whenever what was in VRAM is lost.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Acquire)
    }

    /// Whether VRAM must not be used.
    pub(crate) fn is_asleep(&self) -> bool {
        self.epoch() % 2 != 0
    }

    /// Waits until VRAM can be used.
    ///
    /// Fails with `ERESTARTSYS` if a signal comes, or the host stops its processes to sleep.
    pub(crate) fn wait(&self) -> Result {
        let mut lock = self.lock.lock();
        while self.is_asleep() {
            if self.awake.wait_interruptible(&mut lock) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(())
    }

    fn fall_asleep(&self) {
        let _lock = self.lock.lock();
        if !self.is_asleep() {
            self.epoch.fetch_add(1, Full);
        }
    }

    fn wake(&self) {
        let _lock = self.lock.lock();
        if self.is_asleep() {
            self.epoch.fetch_add(1, Full);
        }
        self.awake.notify_all();
    }
}

/// Does it for the device behind a gate.
pub(crate) struct Sleepy {
    pub(crate) gate: Arc<MemoryGate>,
}

impl Sleeper for Sleepy {
    fn prepare(&self) -> Result {
        const PAUSE_MS: i64 = 10;
        const LIMIT_MS: i64 = 10_000;

        // The device went away: nothing to lose.
        let Ok(map) = self.gate.enter() else {
            return Ok(());
        };
        let memory = map.data();
        // From here on no VRAM comes into use. Device page tables are of the past, and are not
        // looked at any more.
        map.pause(true);
        memory.sleep.fall_asleep();
        let began = Instant::<Monotonic>::now();
        while map.live_folios(0..map.pages()).next().is_some() {
            if began.elapsed().as_millis() > LIMIT_MS {
                pr_err!(
                    "hmm_gpu{}: {} pages are still in VRAM, which forgets them in sleep: the host must stay awake\n",
                    memory.identity.unit,
                    map.live_folios(0..map.pages()).count()
                );
                Sleeper::wake(self);
                return Err(EBUSY);
            }
            // One may have begun just before.
            memory.settle();
            if evict_once(&map) == 0 {
                fsleep(Delta::from_millis(PAUSE_MS));
            }
        }
        Ok(())
    }

    fn wake(&self) {
        if let Ok(map) = self.gate.enter() {
            #[cfg(CONFIG_KASAN)]
            map.data().forget_poison();
            map.pause(false);
            map.data().sleep.wake();
        }
    }
}
