// SPDX-License-Identifier: GPL-2.0

//! Moves that a client has queued (`PREFETCH`), and what became of them.
//!
//! A thread of the kernel's own makes them. It holds the address space as a user only while it is at one, and lets go
//! without taking it down (`mmput_async`), which could wait for what the thread itself holds up. Between two batches it looks whether
//! it still has somebody to work for: the file is open, and the process is there.

#![forbid(unsafe_code)]

use crate::{
    client::{Seat, Share},
    devmem::DeviceMemory,
    hmm::{mirror::Mirror, vma::is_left},
    migration::{Progress, Request, Target},
    sys::{bindings, work},
    uapi::{self, hmm_gpu_completion, hmm_gpu_prefetch},
};
use core::ops::Range;
use kernel::{
    fs::File,
    iov::IovIterDest,
    mm::{Mm, MmWithUser},
    new_mutex, new_work,
    prelude::*,
    static_lock_class,
    sync::{
        aref::ARef,
        atomic::{Acquire, Atomic, Release},
        poll::{PollCondVarBox, PollTable},
        Arc, Mutex,
    },
    workqueue::{impl_has_work, system_unbound, Work, WorkItem},
};

// CAST: Widens.
const MOST: usize = uapi::HMM_GPU_MAX_PREFETCHES as usize;
const RECORD: usize = size_of::<hmm_gpu_completion>();

/// A move that is queued.
pub(crate) struct Job {
    mirror: Arc<Mirror<DeviceMemory>>,
    target: Target,
    range: Range<usize>,
    answer: hmm_gpu_completion,
}

impl Job {
    /// To move `range` as the call says.
    pub(crate) fn new(
        mirror: Arc<Mirror<DeviceMemory>>,
        target: Target,
        range: Range<usize>,
        call: &hmm_gpu_prefetch,
    ) -> Self {
        Self {
            mirror,
            target,
            range,
            answer: hmm_gpu_completion {
                cookie: call.cookie,
                addr: call.addr,
                len: call.len,
                target: call.target,
                ..Default::default()
            },
        }
    }
}

/// What is known of a client's moves.
struct State {
    waiting: KVec<Job>,
    /// Has room for all there are.
    ended: KVec<hmm_gpu_completion>,
    /// Those that wait, are under way, or have ended and were not read.
    count: usize,
}

#[pin_data]
struct Queue {
    mm: ARef<Mm>,
    share: Arc<Share>,
    /// Taken for a moment only, and with nothing else held: who has it copies nothing to user space.
    #[pin]
    state: Mutex<State>,
    changed: PollCondVarBox,
    closed: Atomic<bool>,
    #[pin]
    work: Work<Self>,
}

impl_has_work! {
    impl HasWork<Self> for Queue { self.work }
}

impl WorkItem for Queue {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        while !this.closed.load(Acquire) {
            let job = this.state.lock().waiting.remove(0);
            let Ok(job) = job else {
                return;
            };
            let answer = this.make(job);
            // There is room: `add` has seen to it.
            let _ = this.state.lock().ended.push_within_capacity(answer);
            this.changed.notify_all();
        }
    }
}

impl Queue {
    /// Makes a move.
    fn make(&self, job: Job) -> hmm_gpu_completion {
        let mut progress = Progress::default();
        let error = match self.run_job(&job, &mut progress) {
            Ok(()) => 0,
            // CAST: An error is a negative number.
            Err(error) => error.to_errno().unsigned_abs(),
        };
        // CAST: All widen.
        hmm_gpu_completion {
            error,
            done_bytes: progress.done as u64,
            moved_bytes: progress.moved as u64,
            already_bytes: progress.already as u64,
            skipped_bytes: progress.skipped as u64,
            unmapped_bytes: progress.unmapped as u64,
            ..job.answer
        }
    }

    fn run_job(&self, job: &Job, progress: &mut Progress) -> Result {
        let mm = self.mm.mmget_not_zero().ok_or(ECANCELED)?;
        let mm = MmWithUser::into_mmput_async(mm);
        let is_over = |mm: &MmWithUser| self.closed.load(Acquire) || is_left(mm);
        let mut request = Request::new(Seat::new(&self.share, &job.mirror), job.target)?;
        request.end_when(&is_over);
        match request.run(&mm, job.range.start, job.range.end, progress) {
            Err(error) if error == EINTR => Err(ECANCELED),
            result => result,
        }
    }
}

/// The moves of a client. Dropping it ends them.
pub(crate) struct Prefetches(Arc<Queue>);

impl Prefetches {
    /// None yet, of the address space `mm`.
    pub(crate) fn new(mm: ARef<Mm>, share: Arc<Share>) -> Result<Self> {
        let changed = PollCondVarBox::new(c"hmm_gpu prefetches", static_lock_class!())?;
        let queue = Arc::pin_init(
            pin_init!(Queue {
                mm,
                share,
                state <- new_mutex!(State {
                    waiting: KVec::new(),
                    ended: KVec::new(),
                    count: 0,
                }),
                changed,
                closed: Atomic::new(false),
                work <- new_work!(),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        Ok(Self(queue))
    }

    /// Queues a move. Fails with `EAGAIN` if there are too many.
    pub(crate) fn add(&self, job: Job) -> Result {
        let mut state = self.0.state.lock();
        if state.count == MOST {
            return Err(EAGAIN);
        }
        let more = state.count + 1 - state.ended.len();
        state.ended.reserve(more, GFP_KERNEL_ACCOUNT)?;
        state.waiting.push(job, GFP_KERNEL_ACCOUNT)?;
        state.count += 1;
        drop(state);
        // If that fails it is queued already, and begins after this.
        let _ = system_unbound().enqueue(self.0.clone());
        Ok(())
    }

    /// Hands out what has ended, and waits for the first if there is any to wait for, and it may.
    pub(crate) fn read(&self, to: &mut IovIterDest<'_>, may_wait: bool) -> Result<usize> {
        if to.len() < RECORD {
            return Err(EINVAL);
        }
        let mut read = 0;
        while to.len() >= RECORD {
            let mut answer = match self.next(may_wait && read == 0) {
                Ok(Some(answer)) => answer,
                Err(error) if read == 0 => return Err(error),
                _ => break,
            };
            // Not under the lock: the buffer may be anything.
            let copied = to.copy_to_iter(answer.as_mut_bytes());
            let mut state = self.0.state.lock();
            if copied < RECORD {
                // There is room for it.
                let _ = state.ended.insert_within_capacity(0, answer);
                drop(state);
                self.0.changed.notify_all();
                return if read > 0 { Ok(read) } else { Err(EFAULT) };
            }
            state.count -= 1;
            let none = state.count == 0;
            drop(state);
            if none {
                // Who else waits for one waits for nothing now.
                self.0.changed.notify_all();
            }
            read += RECORD;
        }
        Ok(read)
    }

    /// The next one that has ended; nothing if there are none at all.
    fn next(&self, may_wait: bool) -> Result<Option<hmm_gpu_completion>> {
        let mut state = self.0.state.lock();
        loop {
            if let Ok(answer) = state.ended.remove(0) {
                return Ok(Some(answer));
            }
            if state.count == 0 {
                return Ok(None);
            }
            if !may_wait {
                return Err(EAGAIN);
            }
            if self.0.changed.wait_interruptible(&mut state) {
                return Err(ERESTARTSYS);
            }
        }
    }

    /// Has `table` wait for what changes, and says what there is.
    pub(crate) fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.0.changed);
        let mut there = 0;
        if !self.0.state.lock().ended.is_empty() {
            there |= bindings::POLLIN | bindings::POLLRDNORM;
        }
        if self.0.share.is_gone() {
            there |= bindings::POLLHUP | bindings::POLLERR;
        }
        there
    }
}

impl Drop for Prefetches {
    fn drop(&mut self) {
        self.0.closed.store(true, Release);
        work::flush(&self.0);
    }
}
