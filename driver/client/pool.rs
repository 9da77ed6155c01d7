// SPDX-License-Identifier: GPL-2.0

//! A client's pool: it is made, mapped, and used by the GPU.

#![forbid(unsafe_code)]

use super::Client;
use crate::{
    alloc::BLOCK_BYTES,
    execution::State,
    hmm::{mirror::Own, vma::ReadLocked, PAGE_BYTES},
    pool::Private,
    structure::{require, UserStructure},
    sys::{
        node::OpenFile,
        user_map::{Pager, Place, Placed, Zap},
    },
    uapi::{self, hmm_gpu_execute, hmm_gpu_pool},
};
use kernel::{
    mm::{virt::VmaNew, Mm, MmWithUser},
    prelude::*,
    sync::{atomic::Relaxed, Arc},
};

// The sizes of version 5, in bytes. These never change.
const SMALLEST_POOL: usize = 0x30;
const SMALLEST_EXECUTE: usize = 0x30;

impl Client {
    /// `POOL`.
    pub(super) fn make_pool(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut pool, user) =
            UserStructure::read::<hmm_gpu_pool>(number, argument, SMALLEST_POOL)?;
        require(pool.flags == 0 && pool.reserved == [0; 3])?;
        require(pool.bytes != 0 && pool.bytes % BLOCK_BYTES == 0)?;
        // CAST: Widens.
        pool.offset = self.own_pool(mm, pool.bytes)?.offset() as u64;
        user.write(pool)
    }

    /// Makes the client's pool.
    pub(super) fn own_pool(&self, mm: &MmWithUser, bytes: u64) -> Result<Arc<Private>> {
        let mirror = self.mirror(mm)?;
        let _making = self.mirror_lock.try_lock().ok_or(EBUSY)?;
        if self.private.as_ref().is_some() {
            return Err(EEXIST);
        }
        let account = &self.share.account;
        let made = Private::new(&self.gate, account, bytes)?;
        let made = Arc::new(made, GFP_KERNEL_ACCOUNT)?;
        if let Err(error) = mirror.set_own(made.clone()) {
            let map = self.gate.enter()?;
            // What it has taken meanwhile is its own, wherever it is.
            map.data().alloc.usage().leave_pool(account);
            return Err(error);
        }
        self.private.populate(made.clone());
        Ok(made)
    }

    /// `EXECUTE`.
    pub(super) fn execute(&self, mm: &MmWithUser, number: u32, argument: usize) -> Result {
        let (mut execute, user) =
            UserStructure::read::<hmm_gpu_execute>(number, argument, SMALLEST_EXECUTE)?;
        require(execute.flags == 0 && execute.reserved == [0; 3])?;
        let begins = execute.op == uapi::HMM_GPU_EXECUTE_BEGIN;
        let deadlines = if begins {
            1..=uapi::HMM_GPU_MAX_DEADLINE_MS
        } else {
            0..=0
        };
        require(deadlines.contains(&execute.deadline_ms))?;
        let pool = || self.private.as_ref().ok_or(ENXIO);
        let state = match execute.op {
            uapi::HMM_GPU_EXECUTE_BEGIN => {
                execute.id = self.begin(mm, pool()?, execute.deadline_ms)?;
                uapi::HMM_GPU_EXECUTION_RUNNING
            }
            uapi::HMM_GPU_EXECUTE_END => {
                let pool = pool()?;
                let map = self.gate.enter()?;
                let settle = || pool.hold(map.data(), false);
                match pool.execution().end(execute.id, settle)? {
                    State::Running => uapi::HMM_GPU_EXECUTION_ENDED,
                    State::Lost => uapi::HMM_GPU_EXECUTION_LOST,
                }
            }
            uapi::HMM_GPU_EXECUTE_QUERY => match pool()?.execution().query(execute.id)? {
                State::Running => uapi::HMM_GPU_EXECUTION_RUNNING,
                State::Lost => uapi::HMM_GPU_EXECUTION_LOST,
            },
            _ => return Err(EINVAL),
        };
        execute.state = state;
        let written = user.write(execute);
        if begins && written.is_err() {
            // Nobody knows of it.
            if let (Ok(pool), Ok(map)) = (pool(), self.gate.enter()) {
                let _ = pool
                    .execution()
                    .end(execute.id, || pool.hold(map.data(), false));
            }
        }
        written
    }

    /// Begins an execution, when nobody changes the address space who holds its lock: so such a one waits for one at most.
    fn begin(&self, mm: &MmWithUser, pool: &Private, deadline_ms: u32) -> Result<u64> {
        let mirror = self.mirror(mm)?;
        loop {
            let _lock = ReadLocked::new(mm)?;
            let map = self.gate.enter()?;
            let memory = map.data();
            if memory.sleep.is_asleep() {
                let sleep = memory.sleep.clone();
                drop((map, _lock));
                sleep.wait()?;
                continue;
            }
            return pool.execution().begin(deadline_ms, |run| {
                pool.hold(memory, true);
                // Who has taken an entry away before finds none running; whose entry is there still, one that is.
                mirror.begin_use(run);
                memory.tally.begun.add(1, Relaxed);
            });
        }
    }

    /// `mmap`: a part of the pool.
    pub(super) fn map_pool(&self, vma: &VmaNew, file: &OpenFile<'_, Self>) -> Result {
        self.own(current!())?;
        let pool = self.private.as_ref().ok_or(ENXIO)?;
        let pages = (vma.end() - vma.start()) / PAGE_BYTES;
        let first = file.first_page(vma);
        let own = pool.pages();
        let inside = own.contains(&first) && pages <= own.end - first;
        if !inside {
            return Err(ENXIO);
        }
        let map = self.gate.enter()?;
        file.map(vma, map.data().vram.what()?)?;
        pool.mapped(map.data(), || {
            Ok(Arc::new(Zap::new(file.file())?, GFP_KERNEL_ACCOUNT)?)
        })
    }
}

impl Pager for Client {
    fn page(&self, mm: &Mm, page: usize, place: Place<'_>) -> Result<Placed> {
        let pool = self.private.as_ref().ok_or(ENXIO)?;
        if mm.as_raw() != self.mm.as_raw() || !pool.pages().contains(&page) {
            return Err(EPERM);
        }
        let map = self.gate.enter()?;
        map.data().vram.map(page * PAGE_BYTES, place)
    }
}
