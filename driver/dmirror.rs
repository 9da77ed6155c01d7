// SPDX-License-Identifier: GPL-2.0

//! `/dev/hmm_dmirrorN`: what `lib/test_hmm.c` offers, as `lib/test_hmm_uapi.h` says it, so that the
//! kernel's own test suite can be run on this driver. Made with the module parameter `dmirror`.
//!
//! An adapter: mirrors, migrations and device faults are those of any client. What differs is how they
//! are asked for, and how much of what they could do the suite wants (see `bench/hmm-tests`).

#![forbid(unsafe_code)]

use crate::{
    client::{Client, MemoryGate, Seat},
    devmem::DeviceMemory,
    engine::{Engine, Operation},
    evict::evict_once,
    hmm::{
        mirror::Access,
        pagemap::{Kind, PageMap},
        seen::Seen,
        vma::{user_end, ReadLocked},
        PAGE_BYTES,
    },
    migration::{Progress, Request, Target},
    service::{Page, Policy, Service, WINDOW_BYTES},
    sys::{mapping::fault_in_user, node},
    units,
};
use kernel::{
    ioctl::_IOWR,
    mm::{
        virt::{flags, VmaNew},
        MmWithUser,
    },
    page,
    prelude::*,
    sync::{
        atomic::{Atomic, Full, Relaxed},
        Arc,
    },
    time::{delay::fsleep, Delta},
    uaccess::UserSlice,
};
use zerocopy::{FromZeros, IntoBytes};

/// How many there are at most.
const UNITS: usize = 4;
/// Those from this one on are of coherent devices.
const FIRST_COHERENT: usize = 2;

static NAMES: [&CStr; UNITS] = [
    c"hmm_dmirror0",
    c"hmm_dmirror1",
    c"hmm_dmirror2",
    c"hmm_dmirror3",
];
static TAKEN: [Atomic<bool>; UNITS] = [const { Atomic::new(false) }; UNITS];

/// The number of an endpoint, taken until this is dropped.
pub(crate) struct Unit(usize);

impl Unit {
    /// The lowest that is free, if the module parameter asks for endpoints and there is one.
    pub(crate) fn take() -> Option<Self> {
        if !*crate::module_parameters::dmirror.value_ref() {
            return None;
        }
        TAKEN
            .iter()
            .position(|taken| taken.cmpxchg(false, true, Full).is_ok())
            .map(Self)
    }

    /// What its device's pages have to be.
    pub(crate) fn kind(&self) -> Kind {
        if self.0 < FIRST_COHERENT {
            Kind::Private
        } else {
            Kind::Coherent
        }
    }

    /// The name of the device node.
    pub(crate) fn name(&self) -> &'static CStr {
        NAMES.get(self.0).copied().unwrap_or_default()
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        if let Some(taken) = TAKEN.get(self.0) {
            taken.xchg(false, Full);
        }
    }
}

/// The structure of all commands (`struct hmm_dmirror_cmd`).
#[repr(C)]
#[derive(Clone, Copy, zerocopy_derive::FromBytes, zerocopy_derive::IntoBytes)]
struct Command {
    /// In: page aligned.
    addr: u64,
    /// In: where data is copied from or to.
    ptr: u64,
    /// In: not zero.
    npages: u64,
    /// Out: pages that were dealt with.
    cpages: u64,
    /// Out: how often something was missing.
    faults: u64,
}

const fn number(nr: u32) -> u32 {
    // CAST: A byte.
    _IOWR::<Command>('H' as u32, nr)
}
const READ: u32 = number(0);
const WRITE: u32 = number(1);
const MIGRATE_TO_DEV: u32 = number(2);
const MIGRATE_TO_SYS: u32 = number(3);
const SNAPSHOT: u32 = number(4);
const EXCLUSIVE: u32 = number(5);
const CHECK_EXCLUSIVE: u32 = number(6);
const RELEASE: u32 = number(7);
const FLAGS: u32 = number(8);
const READ_UNLOCKED: u32 = number(9);

/// The next allocation of a large folio fails.
const FLAG_FAIL_ALLOC: u64 = 1;

// What a snapshot says of a page.
const PROT_ERROR: u8 = 0xff;
const PROT_NONE: u8 = 0;
const PROT_READ: u8 = 0x01;
const PROT_WRITE: u8 = 0x02;
const PROT_PMD: u8 = 0x04;
const PROT_PUD: u8 = 0x08;
const PROT_ZERO: u8 = 0x10;
const PROT_PRIVATE_LOCAL: u8 = 0x20;
const PROT_COHERENT_LOCAL: u8 = 0x40;
const PROT_COHERENT_REMOTE: u8 = 0x50;

/// An open file. It serves the address space that opened it.
#[pin_data]
pub(crate) struct Dmirror {
    #[pin]
    client: Client,
    fail_alloc: Atomic<bool>,
}

impl node::Client for Dmirror {
    type Device = Arc<MemoryGate>;

    fn open(gate: &Arc<MemoryGate>) -> Result<impl PinInit<Self, Error>> {
        let client = <Client as node::Client>::open(gate)?;
        Ok(try_pin_init!(Self {
            client <- client,
            fail_alloc: Atomic::new(false),
        }))
    }

    fn ioctl(self: Pin<&Self>, number: u32, argument: usize) -> Result {
        let current = current!();
        let mm = self.client.own(current)?;
        let user = || UserSlice::new(UserPtr::from_addr(argument), size_of::<Command>());
        let mut command = Command::new_zeroed();
        user().reader().read_slice(command.as_mut_bytes())?;
        let range = Range::new(&command)?;
        (command.cpages, command.faults) = (0, 0);
        let call = Call {
            dmirror: &self,
            mm,
            seat: self.client.seat(mm)?,
            range,
        };
        match number {
            READ | READ_UNLOCKED => call.read(&mut command)?,
            WRITE => call.write(&mut command)?,
            MIGRATE_TO_DEV => call.to_device(&mut command)?,
            MIGRATE_TO_SYS => call.to_system(&mut command)?,
            SNAPSHOT => call.snapshot(&mut command)?,
            EXCLUSIVE => call.exclusive(&mut command)?,
            CHECK_EXCLUSIVE => call.check_exclusive()?,
            RELEASE => call.release()?,
            FLAGS => self
                .fail_alloc
                .store(command.npages & FLAG_FAIL_ALLOC != 0, Relaxed),
            _ => return Err(EINVAL),
        }
        user().writer().write_slice(command.as_mut_bytes())
    }

    /// Pages of zeroes, in a mapping that may have such.
    fn mmap(self: Pin<&Self>, vma: &VmaNew, _file: node::OpenFile<'_, Self>) -> Result {
        self.client.own(current!())?;
        let mixed = vma.set_mixedmap();
        for address in (vma.start()..vma.end()).step_by(PAGE_BYTES) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let page = page::Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;
            mixed.vm_insert_page(address, &page)?;
        }
        Ok(())
    }
}

/// The bytes that a command is about.
struct Range {
    start: usize,
    end: usize,
}

impl Range {
    fn new(command: &Command) -> Result<Self> {
        let start = usize::try_from(command.addr)?;
        let pages = usize::try_from(command.npages)?;
        let bytes = pages.checked_mul(PAGE_BYTES).ok_or(EINVAL)?;
        let end = start.checked_add(bytes).ok_or(EINVAL)?;
        if start % PAGE_BYTES != 0 || start == end {
            return Err(EINVAL);
        }
        if end > user_end() {
            return Err(EFAULT);
        }
        Ok(Self { start, end })
    }

    fn pages(&self) -> u64 {
        // CAST: Widens.
        ((self.end - self.start) / PAGE_BYTES) as u64
    }

    /// Its pieces, none of which crosses a boundary of a window.
    fn windows(&self, from: usize) -> impl Iterator<Item = (usize, usize)> {
        let end = self.end;
        let mut at = from;
        core::iter::from_fn(move || {
            let start = at;
            at = end.min((start | (WINDOW_BYTES - 1)).saturating_add(1));
            (start < end).then_some((start, at))
        })
    }
}

/// A command under way.
struct Call<'a> {
    dmirror: &'a Dmirror,
    mm: &'a MmWithUser,
    seat: Seat<'a>,
    range: Range,
}

impl Call<'_> {
    fn gate(&self) -> &MemoryGate {
        self.seat.gate
    }

    fn service(&self) -> Result<Service<'_>> {
        Service::new(self.seat, self.mm, Policy::Map)
    }

    /// The device reads the range, or writes to it. What is missing is faulted in with all that
    /// follows, which is one fault, before anything of it is copied.
    fn read(&self, command: &mut Command) -> Result {
        self.with_faults(command, Access::Read, |at, end, user| {
            self.copy_out(at, end, user)
        })
    }

    fn write(&self, command: &mut Command) -> Result {
        self.with_faults(command, Access::Write, |at, end, user| {
            self.copy_in(at, end, user)
        })
    }

    /// Has `copy` copy between the range and the user's memory, from the first address given on: it
    /// returns how many bytes it has, and why not all.
    fn with_faults(
        &self,
        command: &mut Command,
        access: Access,
        copy: impl Fn(usize, usize, usize) -> (usize, Result),
    ) -> Result {
        // What others take away again and again is given up at last.
        const ATTEMPTS: usize = 64;

        let user = usize::try_from(command.ptr)?;
        let (mut at, mut attempts) = (self.range.start, 0);
        let mut service = None;
        while at < self.range.end {
            if let Some(missing) = self.first_missing(at, access)? {
                if attempts == ATTEMPTS {
                    return Err(EBUSY);
                }
                attempts += 1;
                let service = match &mut service {
                    Some(service) => service,
                    none => none.insert(self.service()?),
                };
                self.fault(service, missing, access)?;
                command.faults += 1;
                continue;
            }
            let (done, result) = copy(at, self.range.end, user + (at - self.range.start));
            at += done;
            match result {
                // Gone again.
                Err(error) if error == EAGAIN => (),
                result => result?,
            }
        }
        command.cpages = self.range.pages();
        Ok(())
    }

    /// The first page from `from` on that has no entry for an access.
    fn first_missing(&self, from: usize, access: Access) -> Result<Option<usize>> {
        for (start, end) in self.range.windows(from) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let map = self.gate().enter()?;
            let missing = self.seat.mirror.first_missing(&map, start, end, access)?;
            if missing.is_some() {
                return Ok(missing);
            }
        }
        Ok(None)
    }

    /// Has all from `from` on have entries for an access.
    fn fault(&self, service: &mut Service<'_>, from: usize, access: Access) -> Result {
        for (start, end) in self.range.windows(from) {
            service.want(start, end, access);
            service.run(start & !(WINDOW_BYTES - 1))?;
            let failed = service
                .window
                .iter()
                .enumerate()
                .find_map(|(i, page)| match page {
                    Page::Failed(error) => Some((i, *error)),
                    _ => None,
                });
            let Some((i, error)) = failed else {
                continue;
            };
            if error != EACCES {
                return Err(error);
            }
            // As `hmm_range_fault` has it: one error for what cannot be read, one for what can.
            let addr = (start & !(WINDOW_BYTES - 1)) + i * PAGE_BYTES;
            let lock = ReadLocked::new(self.mm)?;
            let vma = lock.find_vma(addr).filter(|vma| vma.start() <= addr);
            let readable = vma.is_some_and(|vma| vma.flags() & flags::READ != 0);
            return Err(if readable { EPERM } else { EFAULT });
        }
        Ok(())
    }

    /// The device reads `[at, end)`, which is copied to `user`, as far as there are entries.
    fn copy_out(&self, at: usize, end: usize, user: usize) -> (usize, Result) {
        let done = match self.copy_out_at_once(at, end, user) {
            Ok(done) => done,
            Err(error) => return (0, Err(error)),
        };
        if at + done == end {
            return (done, Ok(()));
        }
        let (rest, result) = self.copy_out_buffered(at + done, end, user + done);
        (done + rest, result)
    }

    /// The same, without a buffer between, as long as that can be done. Returns how far it came.
    fn copy_out_at_once(&self, at: usize, end: usize, user: usize) -> Result<usize> {
        // So much of the user's memory is faulted in at a time, where it is not there.
        const PIECE: usize = 16 * PAGE_BYTES;

        let (mut done, mut faulted_in) = (0, false);
        while at + done < end {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let read = {
                let map = self.gate().enter()?;
                let mirror = self.seat.mirror;
                let read = mirror.read_to_user(&map, at + done, end, user + done)?;
                map.data().counters.device_read.add(read);
                read
            };
            done += read;
            if read > 0 {
                faulted_in = false;
                continue;
            }
            let piece = PIECE.min(end - at - done);
            if faulted_in || !fault_in_user(user + done, piece) {
                break;
            }
            faulted_in = true;
        }
        Ok(done)
    }

    fn copy_out_buffered(&self, at: usize, end: usize, user: usize) -> (usize, Result) {
        self.in_pieces(at, end, |engine, from, bytes| {
            let (done, result) = engine.run(from, end, Operation::Read(bytes));
            let bytes = bytes.get(..done).unwrap_or_default();
            let to = UserSlice::new(UserPtr::from_addr(user + (from - at)), bytes.len());
            match to.writer().write_slice(bytes) {
                Ok(()) => (done, result),
                Err(error) => (0, Err(error)),
            }
        })
    }

    fn copy_in(&self, at: usize, end: usize, user: usize) -> (usize, Result) {
        self.in_pieces(at, end, |engine, to, bytes| {
            let from = UserSlice::new(UserPtr::from_addr(user + (to - at)), bytes.len());
            match from.reader().read_slice(bytes) {
                Ok(()) => engine.run(to, end, Operation::Write(bytes)),
                Err(error) => (0, Err(error)),
            }
        })
    }

    fn in_pieces(
        &self,
        at: usize,
        end: usize,
        mut piece: impl FnMut(&mut Engine<'_>, usize, &mut [u8]) -> (usize, Result),
    ) -> (usize, Result) {
        let mut engine = Engine::new(self.seat, self.mm, None);
        let result =
            crate::client::in_pieces(end - at, |done, bytes| piece(&mut engine, at + done, bytes));
        result.unwrap_or_else(|error| (0, Err(error)))
    }

    /// What the device's page table has of the range, all of it, is copied to the user. Nothing is
    /// faulted in.
    fn read_back(&self, command: &mut Command) -> Result {
        if self
            .first_missing(self.range.start, Access::Read)?
            .is_some()
        {
            return Err(ENOENT);
        }
        let user = usize::try_from(command.ptr)?;
        let (_, result) = self.copy_out(self.range.start, self.range.end, user);
        match result {
            Err(error) if error == EAGAIN => Err(ENOENT),
            Err(error) => Err(error),
            Ok(()) => {
                command.cpages = self.range.pages();
                Ok(())
            }
        }
    }

    /// Moves the range, a mapping and a window at a time.
    fn migrate(
        &self,
        target: Target,
        mut then: impl FnMut(usize, usize, Progress) -> Result,
    ) -> Result {
        // A page that somebody holds for a moment stays. In all, that often is it tried again.
        const ATTEMPTS: usize = 64;
        const PAUSE_US: i64 = 500;
        const LONGEST_PAUSE_US: i64 = 16_000;

        let mut request = Request::new(self.seat, target)?;
        // The C module's devices are strangers to each other.
        request.only_system();
        if self.dmirror.fail_alloc.xchg(false, Full) {
            request.fail_large();
        }
        let (mut at, mut attempts) = (self.range.start, ATTEMPTS);
        while at < self.range.end {
            let window = (at | (WINDOW_BYTES - 1)).saturating_add(1);
            let end = {
                let lock = ReadLocked::new(self.mm)?;
                let vma = lock.find_vma(at).filter(|vma| vma.start() <= at);
                let vma = vma.ok_or(EINVAL)?;
                if vma.flags() & flags::READ == 0 || !vma.may_migrate() {
                    return Err(EINVAL);
                }
                self.range.end.min(window).min(vma.end())
            };
            let (mut moved, mut pause) = (0, PAUSE_US);
            loop {
                let mut progress = Progress::default();
                match request.run(self.mm, at, end, &mut progress) {
                    // What does not fit stays. Gone by now is nothing to move.
                    Err(error) if error == ENOSPC || error == EFAULT => (),
                    result => result?,
                }
                moved += progress.moved;
                if progress.skipped == 0 || attempts == 0 {
                    progress.moved = moved;
                    then(at, end, progress)?;
                    break;
                }
                attempts -= 1;
                fsleep(Delta::from_micros(pause));
                pause = LONGEST_PAUSE_US.min(pause * 2);
            }
            at = end;
        }
        Ok(())
    }

    /// Moves the range to the device, maps there what is on it, and reads it back.
    fn to_device(&self, command: &mut Command) -> Result {
        // The kernel may have a page in its hands, or take it, before all is read.
        const ATTEMPTS: usize = 8;

        let mut service = self.service()?;
        for attempt in 1.. {
            self.migrate(Target::Device, |start, end, _| {
                service.want(start, end, Access::Read);
                service.map_own(start & !(WINDOW_BYTES - 1))
            })?;
            match self.read_back(command) {
                Err(error) if error == ENOENT && attempt < ATTEMPTS => (),
                result => return result,
            }
        }
        Err(ENOENT)
    }

    fn to_system(&self, command: &mut Command) -> Result {
        self.migrate(Target::System, |_, _, progress| {
            // CAST: Widens.
            command.cpages += (progress.moved / PAGE_BYTES) as u64;
            Ok(())
        })
    }

    fn snapshot(&self, command: &mut Command) -> Result {
        const BATCH: usize = WINDOW_BYTES / PAGE_BYTES;

        let count = usize::try_from(self.range.pages())?;
        let batch = BATCH.min(count);
        let mut seen = KVec::from_elem(Seen::default(), batch, GFP_KERNEL_ACCOUNT)?;
        let mut answers = KVec::from_elem(0u8, batch, GFP_KERNEL_ACCOUNT)?;
        let user = UserPtr::from_addr(usize::try_from(command.ptr)?);
        let mut writer = UserSlice::new(user, count).writer();
        for (start, end) in self.range.windows(self.range.start) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let count = (end - start) / PAGE_BYTES;
            let seen = seen.get_mut(..count).ok_or(EINVAL)?;
            let answers = answers.get_mut(..count).ok_or(EINVAL)?;
            {
                let lock = ReadLocked::new(self.mm)?;
                let map = self.gate().enter()?;
                self.seat.mirror.look(&lock, start, seen)?;
                protections(&map, seen, answers);
            }
            writer.write_slice(answers)?;
            // CAST: Widens.
            command.cpages += count as u64;
        }
        Ok(())
    }

    /// The device takes the pages for itself, and reads them.
    fn exclusive(&self, command: &mut Command) -> Result {
        for addr in (self.range.start..self.range.end).step_by(PAGE_BYTES) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            self.seat.mirror.exclusive(self.mm, addr, None)?;
        }
        self.read_back(command)
    }

    fn check_exclusive(&self) -> Result {
        for (start, end) in self.range.windows(self.range.start) {
            if current!().signal_pending() {
                return Err(EINTR);
            }
            let map = self.gate().enter()?;
            if self.seat.mirror.has_exclusive(&map, start, end)? {
                return Err(EPERM);
            }
        }
        Ok(())
    }

    /// All that is on the device leaves it.
    fn release(&self) -> Result {
        const ATTEMPTS: usize = 1000;
        const PAUSE_MS: i64 = 1;

        for _ in 0..ATTEMPTS {
            let map = self.gate().enter()?;
            if map.live_folios(0..map.pages()).next().is_none() {
                return Ok(());
            }
            let moved = evict_once(&map);
            drop(map);
            if current!().signal_pending() {
                return Err(EINTR);
            }
            if moved == 0 {
                fsleep(Delta::from_millis(PAUSE_MS));
            }
        }
        Err(EBUSY)
    }
}

/// What a snapshot says of pages, for a client of `map`.
fn protections(map: &PageMap<DeviceMemory>, seen: &[Seen], answers: &mut [u8]) {
    // Of the device's own pages, of which most are like the one before: what is said of one with which flags.
    let mut known: Option<(usize, u8)> = None;
    for (answer, seen) in answers.iter_mut().zip(seen.iter()) {
        let is_local = seen.pfn().is_some_and(|pfn| map.index_of(pfn).is_some());
        *answer = match known {
            Some((flags, answer)) if is_local && flags == seen.flags() => answer,
            _ => protection(map, *seen),
        };
        if is_local {
            known = Some((seen.flags(), *answer));
        }
    }
}

/// What a snapshot says of a page, for a client of `map`.
fn protection(map: &PageMap<DeviceMemory>, seen: Seen) -> u8 {
    const PMD_ORDER: usize = 9;
    const PUD_ORDER: usize = 18;

    if seen.is_hidden() {
        return PROT_ERROR;
    }
    let Some(pfn) = seen.pfn() else {
        return PROT_NONE;
    };
    let place = if map.index_of(pfn).is_some() {
        match map.kind() {
            Kind::Private => PROT_PRIVATE_LOCAL,
            Kind::Coherent => PROT_COHERENT_LOCAL,
        }
    } else if units::of_pfn(pfn).is_some() {
        match seen.is_private() {
            // To the C module, whose devices are strangers to each other, it is not there.
            true => return PROT_NONE,
            false => PROT_COHERENT_REMOTE,
        }
    } else if seen.is_zero_page() {
        PROT_ZERO
    } else {
        PROT_NONE
    };
    let access = if seen.is_writable() {
        PROT_WRITE
    } else {
        PROT_READ
    };
    let size = match seen.order() {
        PMD_ORDER => PROT_PMD,
        PUD_ORDER => PROT_PUD,
        _ => 0,
    };
    place | access | size
}
