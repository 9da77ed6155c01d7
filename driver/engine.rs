// SPDX-License-Identifier: GPL-2.0

//! What a device does through its page table: it reads, writes, and does atomic operations, and faults where
//! it has no entry that allows it.

#![forbid(unsafe_code)]

use crate::{
    client::Seat,
    counters::{Counter, Counters},
    hmm::{
        mirror::{Access, Miss},
        vma::user_end,
        PAGE_BYTES,
    },
    service::{Page, Policy, Service, WINDOW_BYTES},
    sys::mapping::Atomic,
};
use kernel::{mm::MmWithUser, prelude::*};

/// How an access of the device went.
#[derive(Default)]
pub(crate) struct Accessed {
    /// How many times a page was missing.
    pub(crate) faults: usize,
    /// Where one ended it.
    pub(crate) fault_addr: usize,
    /// What the device found there in its page table, if it was not serviced.
    pub(crate) word: u64,
}

/// A device that accesses a process's memory on behalf of it.
pub(crate) struct Engine<'a> {
    seat: Seat<'a>,
    mm: &'a MmWithUser,
    /// What is done about misses; nothing if there is none.
    policy: Option<Policy>,
    service: Option<Service<'a>>,
    pub(crate) accessed: Accessed,
}

/// What a device does with bytes at an address.
pub(crate) enum Operation<'b> {
    /// Reads them into these.
    Read(&'b mut [u8]),
    /// Writes these to them.
    Write(&'b [u8]),
}

impl Operation<'_> {
    fn len(&self) -> usize {
        match self {
            Operation::Read(to) => to.len(),
            Operation::Write(from) => from.len(),
        }
    }

    fn access(&self) -> Access {
        match self {
            Operation::Read(_) => Access::Read,
            Operation::Write(_) => Access::Write,
        }
    }
}

impl<'a> Engine<'a> {
    /// Without a `policy`, a miss is not serviced.
    pub(crate) fn new(seat: Seat<'a>, mm: &'a MmWithUser, policy: Option<Policy>) -> Self {
        Self {
            seat,
            mm,
            policy,
            service: None,
            accessed: Accessed::default(),
        }
    }

    /// It was not a miss that ended the access.
    pub(crate) fn forget_miss(&mut self) {
        self.accessed.fault_addr = 0;
        self.accessed.word = 0;
    }

    /// Does an operation on the bytes from `addr` on, of an access that goes on until `end`. Returns
    /// how many bytes were dealt with, and why not all of them. They must not wrap around.
    ///
    /// Waits for user space, in a fault: nothing may be locked or lent.
    pub(crate) fn run(
        &mut self,
        addr: usize,
        end: usize,
        mut operation: Operation<'_>,
    ) -> (usize, Result) {
        // Between the service of a fault and the access that faulted, the page may go again.
        const ATTEMPTS: usize = 256;

        let len = operation.len();
        let (mut done, mut attempts) = (0, 0);
        while done < len {
            let at = addr + done;
            let piece = (len - done).min(PAGE_BYTES - at % PAGE_BYTES);
            let result = self.piece(at, done, piece, &mut operation);
            let result = match result {
                Ok(Ok(())) => {
                    done += piece;
                    attempts = 0;
                    continue;
                }
                Ok(Err(miss)) if attempts < ATTEMPTS => {
                    attempts += 1;
                    self.miss(at, end, operation.access(), miss)
                }
                Ok(Err(_)) => Err(EBUSY),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                // What ends a call is not about the page.
                if ![ENODEV, EINTR, ERESTARTSYS, ENOMEM].contains(&error) {
                    self.accessed.fault_addr = at;
                }
                return (done, Err(error));
            }
        }
        (done, Ok(()))
    }

    /// Does an atomic operation on the word at `addr`, and returns what it was before.
    ///
    /// Waits for user space, in a fault: nothing may be locked or lent.
    pub(crate) fn atomic(&mut self, addr: usize, operation: &Atomic) -> Result<u64> {
        const ATTEMPTS: usize = 256;

        let end = addr.checked_add(operation.bytes()).ok_or(EINVAL)?;
        if end > user_end() {
            return Err(EFAULT);
        }
        for _ in 0..ATTEMPTS {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let miss = {
                let map = self.seat.gate.enter()?;
                match self.seat.mirror.atomic(&map, addr, operation)? {
                    Ok(old) => return Ok(old),
                    Err(miss) => miss,
                }
            };
            // Mapped where it lies, it is either in the device's memory, which will do, or has to be
            // taken for the device alone.
            self.miss(addr, end, Access::Write, miss)?;
            let service = self.service.as_ref().ok_or(EAGAIN)?;
            let at = service.window.get(addr % WINDOW_BYTES / PAGE_BYTES);
            if matches!(at, Some(Page::Mapped { device: true })) {
                continue;
            }
            match self.seat.mirror.exclusive(self.mm, addr, Some(operation)) {
                Ok(Some(old)) => return Ok(old),
                // It has changed since it was mapped: the next miss tells what is wrong with it, if
                // anything is.
                Err(error) if [EBUSY, EFAULT, EPERM].contains(&error) => (),
                // In sleep there is none.
                Err(error) if error == EAGAIN => {
                    let sleep = self.seat.gate.enter()?.data().sleep.clone();
                    sleep.wait()?;
                }
                result => drop(result?),
            }
        }
        Err(EBUSY)
    }

    /// Does an operation on bytes of one page.
    fn piece(
        &self,
        at: usize,
        done: usize,
        piece: usize,
        operation: &mut Operation<'_>,
    ) -> Result<core::result::Result<(), Miss>> {
        // Until it is looked at, an address is a number.
        if at >= user_end() {
            return Err(EFAULT);
        }
        let map = self.seat.gate.enter()?;
        let counters = &map.data().counters;
        let range = done..done + piece;
        let which: fn(&Counters) -> &Counter = match operation {
            Operation::Read(_) => |it| &it.device_read,
            Operation::Write(_) => |it| &it.device_written,
        };
        let result = match operation {
            Operation::Read(to) => {
                let to = to.get_mut(range).ok_or(EINVAL)?;
                self.seat.mirror.read(&map, at, to)?
            }
            Operation::Write(from) => {
                let from = from.get(range).ok_or(EINVAL)?;
                self.seat.mirror.write(&map, at, from)?
            }
        };
        if result.is_ok() {
            counters.add(self.seat.account(), which, piece);
        }
        Ok(result)
    }

    /// Services a miss at `at`, and with it those to come until `end`, as far as they are in the
    /// same window.
    fn miss(&mut self, at: usize, end: usize, access: Access, miss: Miss) -> Result {
        self.accessed.faults += 1;
        let Some(policy) = self.policy else {
            self.accessed.word = miss.word;
            return Err(EAGAIN);
        };
        let service = match &mut self.service {
            Some(service) => service,
            none => none.insert(Service::new(self.seat, self.mm, policy)?),
        };
        let base = at & !(WINDOW_BYTES - 1);
        service.new_turn()?;
        service.want(at, end.min(base.saturating_add(WINDOW_BYTES)), access);
        service.run(base)?;
        match service.window.get((at - base) / PAGE_BYTES) {
            Some(Page::Failed(error)) => Err(*error),
            _ => Ok(()),
        }
    }
}
