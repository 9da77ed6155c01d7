// SPDX-License-Identifier: GPL-2.0

//! Executions: a stretch of time in which a client's GPU work may use what its page table said at some time in it.
//!
//! Who needs it to be over waits, until its deadline at most. Then it is *lost*, and nobody waits for it any more.
//! `Documentation/pools.md` has the rule, and the argument for it.

#![forbid(unsafe_code)]

use crate::sys::wait::{Until, WaitWord};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Relaxed, Release},
        Mutex,
    },
    time::{Instant, Monotonic},
};

const IDLE: u32 = 0;
const RUNNING: u32 = 1;
const LOST: u32 = 2;

/// What has become of an execution.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// Somebody could not wait for it.
    Lost,
}

/// How a wait for an execution ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// It was over, or is.
    Over,
    /// It is lost since.
    Lost,
    /// The task was killed, and it runs still.
    Killed,
}

/// The execution of a pool, one after the other.
#[pin_data]
pub(crate) struct Execution {
    #[pin]
    state: WaitWord,
    /// In nanoseconds since `began`.
    deadline: Atomic<u64>,
    began: Instant<Monotonic>,
    #[pin]
    turn: Mutex<Turn>,
}

/// What is changed by one at a time.
struct Turn {
    /// Of the one that runs, or ran last.
    id: u64,
    /// There will be none any more.
    closed: bool,
}

impl Execution {
    /// None runs.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- WaitWord::new(IDLE),
            deadline: Atomic::new(0),
            began: Instant::now(),
            turn <- new_mutex!(Turn { id: 0, closed: false }),
        })
    }

    /// Begins one that others wait for until `ms` milliseconds from now, and returns its number. `start` is called before, and has
    /// what it is given be called at the moment from which on others see it.
    ///
    /// Fails with `EBUSY` if one runs, and with `ENODEV` when there can be none any more.
    pub(crate) fn begin(&self, ms: u32, start: impl FnOnce(&dyn Fn())) -> Result<u64> {
        let mut turn = self.turn.lock();
        if turn.closed {
            return Err(ENODEV);
        }
        if self.state.get() != IDLE {
            return Err(EBUSY);
        }
        self.deadline
            .store(self.now() + u64::from(ms) * 1_000_000, Release);
        start(&|| {
            self.state.change(IDLE, RUNNING);
        });
        turn.id += 1;
        Ok(turn.id)
    }

    /// Ends execution `id`, and returns what had become of it. `settle` is called when nobody waits for it any more.
    ///
    /// Fails with `ESRCH` if there is none with that number.
    pub(crate) fn end(&self, id: u64, settle: impl FnOnce()) -> Result<State> {
        let turn = self.turn.lock();
        let state = self.state_of(&turn, id)?;
        self.stop();
        settle();
        Ok(state)
    }

    /// What has become of execution `id`.
    pub(crate) fn query(&self, id: u64) -> Result<State> {
        self.state_of(&self.turn.lock(), id)
    }

    fn state_of(&self, turn: &Turn, id: u64) -> Result<State> {
        match self.state.get() {
            RUNNING if id == turn.id => Ok(State::Running),
            LOST if id == turn.id => Ok(State::Lost),
            _ => Err(ESRCH),
        }
    }

    fn stop(&self) {
        // It may be lost between the two, not found again.
        let _ = self.state.change(RUNNING, IDLE) || self.state.change(LOST, IDLE);
    }

    /// Has there be no other. One that runs goes on.
    pub(crate) fn close(&self) {
        self.turn.lock().closed = true;
    }

    /// As above, and ends the one that runs.
    pub(crate) fn abandon(&self) {
        self.close();
        self.stop();
    }

    /// Whether one runs that others have to wait for.
    pub(crate) fn is_running(&self) -> bool {
        self.state.get() == RUNNING
    }

    /// Whether one was begun and has not ended, lost or not.
    pub(crate) fn is_on(&self) -> bool {
        self.state.get() != IDLE
    }

    /// Waits until none runs, which is until the deadline of the one that does: then that is lost.
    pub(crate) fn wait(&self, until: Until) -> Waited {
        while self.is_running() {
            let deadline = self.deadline.load(Acquire);
            let left = deadline.saturating_sub(self.now());
            if left == 0 {
                return if self.lose() {
                    Waited::Lost
                } else {
                    Waited::Over
                };
            }
            if self.state.wait_while(RUNNING, left, until).is_err() {
                return Waited::Killed;
            }
        }
        Waited::Over
    }

    /// Nobody waits for it any more, since somebody has not. Returns whether it was running.
    pub(crate) fn lose(&self) -> bool {
        self.state.change(RUNNING, LOST)
    }

    fn now(&self) -> u64 {
        // CAST: Not negative.
        self.began.elapsed().as_nanos() as u64
    }
}

/// Numbers of all executions of a device, for its counters.
pub(crate) struct Tally {
    pub(crate) begun: Atomic<u64>,
    pub(crate) lost: Atomic<u64>,
}

impl Tally {
    /// None.
    pub(crate) const fn new() -> Self {
        Self {
            begun: Atomic::new(0),
            lost: Atomic::new(0),
        }
    }

    /// One more is lost, if so.
    pub(crate) fn lost(&self, lost: bool) {
        if lost {
            self.lost.add(1, Relaxed);
        }
    }
}
