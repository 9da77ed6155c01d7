//! Device faults: pages that the device wants.

use std::fmt;

use rustix::io::Errno;

use crate::error::Attempt;
use crate::moving::Stop;
use crate::range::PAGE_BYTES;
use crate::uapi::{self, hmm_gpu_device_fault, hmm_gpu_fault};
use crate::{Device, Error, PageRange, Policy};

/// Faults that one call names at most.
const BATCH: usize = uapi::HMM_GPU_MAX_FAULTS as usize;

/// What the device wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// To read.
    Read,
    /// To write, which needs a mapping that is writable. What is shared since a `fork` is copied first.
    Write,
}

impl Access {
    fn to_uapi(self) -> u32 {
        match self {
            Access::Read => uapi::HMM_GPU_ACCESS_READ,
            Access::Write => uapi::HMM_GPU_ACCESS_WRITE,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Access::Read => "read",
            Access::Write => "write",
        })
    }
}

/// A device fault: the device wants a page that its page table does not map. Shown as `read at 0x7f1234567000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceFault {
    /// An address in the page.
    pub addr: usize,
    /// What the device wants to do there.
    pub access: Access,
}

impl DeviceFault {
    /// A fault for each page that a slice lies on.
    pub fn each_page<T>(data: &[T], access: Access) -> impl Iterator<Item = Self> + Clone {
        Self::each_page_of(PageRange::of(data), access)
    }

    /// A fault for each page of a range.
    pub fn each_page_of(range: PageRange, access: Access) -> impl Iterator<Item = Self> + Clone {
        (0..range.pages()).map(move |page| Self {
            addr: range.addr() + page * PAGE_BYTES,
            access,
        })
    }

    fn to_uapi(self) -> hmm_gpu_device_fault {
        hmm_gpu_device_fault {
            addr: self.addr as u64,
            access: self.access.to_uapi(),
            status: UNANSWERED,
        }
    }
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.access, self.addr)
    }
}

/// What became of device faults. Shown as `512 pages mapped, 500 of them in VRAM, 2 failed`.
///
/// That a page was mapped says that the device page table had the entry at one moment during the call. It may have gone since,
/// for it goes with any change of the page; then the device faults again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faulted {
    /// Pages that were mapped. A page counts once however often it was named, up to 65536 faults: longer lists are
    /// serviced in parts, and it counts in each.
    pub mapped_pages: u64,
    /// Those of them that were mapped in the device's VRAM.
    pub device_pages: u64,
    /// Pages that were not mapped, each counted once.
    pub failed_pages: u64,
    statuses: Vec<Result<(), Errno>>,
    first_failure: Option<(DeviceFault, Errno)>,
}

impl Faulted {
    /// What became of each fault, in the order in which they were given: mapped for this access, or why not.
    ///
    /// The errors are those of [`Device::read`]: `EFAULT`, `EACCES`, `EBUSY`, `ENOSPC`, `ENOMEM`, `EHWPOISON`.
    pub fn statuses(&self) -> &[Result<(), Errno>] {
        &self.statuses
    }

    /// The first fault whose page was not mapped, and why.
    pub fn first_failure(&self) -> Option<(DeviceFault, Errno)> {
        self.first_failure
    }

    /// Whether all pages were mapped.
    pub fn is_complete(&self) -> bool {
        self.first_failure.is_none()
    }

    /// An error if a page was not mapped: [`Fault`](Error::Fault), for the first of them.
    pub fn complete(&self) -> Result<(), Error> {
        match self.first_failure {
            None => Ok(()),
            Some((fault, errno)) => Err(Error::Fault { fault, errno }),
        }
    }
}

impl fmt::Display for Faulted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.mapped_pages == 1 { "" } else { "s" };
        write!(f, "{} page{plural} mapped", self.mapped_pages)?;
        if self.device_pages != 0 {
            write!(f, ", {} of them in VRAM", self.device_pages)?;
        }
        if self.failed_pages != 0 {
            write!(f, ", {} failed", self.failed_pages)?;
        }
        Ok(())
    }
}

impl Device {
    /// Services device faults, as a GPU's driver does for its device: maps the pages for the device where they lie, or moves
    /// them to its VRAM first. The driver's `FAULT`.
    ///
    /// They may come in any order, and name a page more than once: then it is mapped for all that is asked of it, or for none.
    /// What goes wrong with one is told in the answer and keeps none of the others from being serviced. More than 65536 of
    /// them are serviced in parts of so many. None are no call. A signal does not end it.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EINVAL` ([`Policy::None`]), `ENOMEM`, `ENODEV`, `EPERM`, and `ENOTTY` (a
    /// driver without [`Capabilities::MIRROR`](crate::Capabilities::MIRROR)); [`Memory`](Error::Memory).
    ///
    /// ```no_run
    /// use hmm_gpu::{Access, Device, DeviceFault, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let data = vec![7u8; 16 << 20];
    /// let faults: Vec<_> = DeviceFault::each_page(&data, Access::Read).collect();
    /// let faulted = device.fault(&faults, Policy::Migrate)?;
    /// println!("{faulted}"); // 4097 pages mapped, 4097 of them in VRAM
    /// faulted.complete()?; // a page that was not mapped is an error here
    /// # Ok(())
    /// # }
    /// ```
    pub fn fault(&self, faults: &[DeviceFault], policy: Policy) -> Result<Faulted, Error> {
        if faults.is_empty() {
            return Ok(Faulted::default());
        }
        let attempt = |faulted: &Faulted| Attempt::Fault {
            faults: faults.len(),
            policy,
            mapped_pages: faulted.mapped_pages,
        };
        let call = |argument: &mut hmm_gpu_fault, named: &mut [hmm_gpu_device_fault]| {
            self.file().fault(argument, named)
        };
        match service(faults, BATCH, policy, call) {
            Ok(faulted) => {
                tracing::debug!(path = %self.path().display(), faults = faults.len(), %policy, %faulted, "serviced");
                Ok(faulted)
            }
            Err(Stopped::Memory(error)) => Err(error),
            Err(Stopped::Call(Stop::Driver(errno), faulted)) => {
                Err(Error::call(self.path(), attempt(&faulted), errno))
            }
            Err(Stopped::Call(Stop::Nonsense(problem), faulted)) => {
                Err(Error::answer(self.path(), attempt(&faulted), problem))
            }
        }
    }
}

/// What a status is before the driver has written one, and after a call that did not come to it.
// CAST: error numbers are positive.
const UNANSWERED: u32 = Errno::CANCELED.raw_os_error() as u32;

/// Why servicing ended early.
#[derive(Debug)]
enum Stopped {
    Memory(Error),
    /// With what was counted before.
    Call(Stop, Faulted),
}

/// Names all faults to the driver, a batch of so many after the other, and those again that a signal kept it from.
fn service(
    faults: &[DeviceFault],
    batch: usize,
    policy: Policy,
    mut call: impl FnMut(&mut hmm_gpu_fault, &mut [hmm_gpu_device_fault]) -> Result<(), Errno>,
) -> Result<Faulted, Stopped> {
    let mut faulted = Faulted {
        statuses: room(faults.len())?,
        ..Default::default()
    };
    let mut named = room(faults.len().min(batch))?;
    // Which fault each of the named ones is.
    let mut numbers: Vec<usize> = room(faults.len().min(batch))?;
    faulted.statuses.resize(faults.len(), Err(Errno::CANCELED));
    for first in (0..faults.len()).step_by(batch) {
        let end = faults.len().min(first + batch);
        named.extend(faults[first..end].iter().map(|fault| fault.to_uapi()));
        numbers.extend(first..end);
        while !named.is_empty() {
            if let Err(stop) = ask(&mut faulted, &mut named, &mut numbers, policy, &mut call) {
                return Err(Stopped::Call(stop, faulted));
            }
        }
    }
    count_failures(&mut faulted, faults)?;
    Ok(faulted)
}

/// Names faults to the driver, once. Leaves those in `named` and `numbers` that are to be named again.
fn ask(
    faulted: &mut Faulted,
    named: &mut Vec<hmm_gpu_device_fault>,
    numbers: &mut Vec<usize>,
    policy: Policy,
    call: &mut impl FnMut(&mut hmm_gpu_fault, &mut [hmm_gpu_device_fault]) -> Result<(), Errno>,
) -> Result<(), Stop> {
    let count = u32::try_from(named.len()).unwrap_or(u32::MAX);
    let mut argument = hmm_gpu_fault {
        count,
        policy: policy.to_uapi(),
        ..Default::default()
    };
    let result = call(&mut argument, named);
    let (mapped, device) = (argument.mapped_pages, argument.device_pages);
    if mapped > u64::from(count) || device > mapped {
        return Err(Stop::Nonsense("more pages than were asked for"));
    }
    faulted.mapped_pages += mapped;
    faulted.device_pages += device;
    let interrupted = match result {
        Ok(()) => false,
        Err(Errno::INTR) => true,
        Err(errno) => return Err(Stop::Driver(errno)),
    };
    let mut left = 0;
    for at in 0..named.len() {
        let (fault, number) = (named[at], numbers[at]);
        let again = fault.status == UNANSWERED;
        if again && !interrupted {
            return Err(Stop::Nonsense("no status for a fault"));
        }
        if again {
            (named[left], numbers[left]) = (fault, number);
            left += 1;
        } else {
            faulted.statuses[number] = status(fault.status)?;
        }
    }
    named.truncate(left);
    numbers.truncate(left);
    Ok(())
}

/// Decodes a status.
fn status(status: u32) -> Result<Result<(), Errno>, Stop> {
    match i32::try_from(status) {
        Ok(0) => Ok(Ok(())),
        Ok(errno @ 1..4096) => Ok(Err(Errno::from_raw_os_error(errno))),
        _ => Err(Stop::Nonsense("a status that is no error number")),
    }
}

/// Counts pages, not faults, also where a page was named to two calls.
fn count_failures(faulted: &mut Faulted, faults: &[DeviceFault]) -> Result<(), Stopped> {
    let failures = || {
        faults
            .iter()
            .zip(&faulted.statuses)
            .filter_map(|(fault, status)| Some((*fault, status.err()?)))
    };
    let first = failures().next();
    let mut pages = room(failures().count())?;
    pages.extend(failures().map(|(fault, _)| fault.addr / PAGE_BYTES));
    pages.sort_unstable();
    pages.dedup();
    faulted.first_failure = first;
    faulted.failed_pages = pages.len() as u64;
    Ok(())
}

/// A list without values yet.
fn room<T>(values: usize) -> Result<Vec<T>, Stopped> {
    let mut list = Vec::new();
    match list.try_reserve_exact(values) {
        Ok(()) => Ok(list),
        Err(_) => Err(Stopped::Memory(Error::Memory {
            values,
            value_bytes: size_of::<T>(),
            errno: Errno::NOMEM,
        })),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    const ADDR: usize = 0x7f00_0000_0000;

    fn fault(page: usize, access: Access) -> DeviceFault {
        DeviceFault {
            addr: ADDR + page * PAGE_BYTES + page % 7,
            access,
        }
    }

    /// What the driver below makes of a page: in VRAM, in system memory, or refused.
    fn answer(addr: u64) -> (u32, bool) {
        match addr / PAGE_BYTES as u64 % 4 {
            3 => (Errno::ACCESS.raw_os_error() as u32, false),
            page => (0, page % 2 == 0),
        }
    }

    /// A driver that answers the first `upto` faults.
    fn serve(argument: &mut hmm_gpu_fault, named: &mut [hmm_gpu_device_fault], upto: usize) {
        let mut pages = BTreeSet::new();
        for fault in &mut named[..upto] {
            let (status, device) = answer(fault.addr);
            fault.status = status;
            if !pages.insert(fault.addr / PAGE_BYTES as u64) {
                continue;
            }
            argument.mapped_pages += u64::from(status == 0);
            argument.device_pages += u64::from(device);
            argument.failed_pages += u64::from(status != 0);
        }
    }

    #[test]
    fn each_fault_has_its_own_answer() {
        let faults: Vec<_> = [5, 4, 3, 2, 7]
            .map(|page| fault(page, Access::Write))
            .into();
        let faulted = service(&faults, BATCH, Policy::Migrate, |argument, named| {
            assert_eq!(
                (argument.count, argument.policy),
                (5, uapi::HMM_GPU_POLICY_MIGRATE)
            );
            assert!(named
                .iter()
                .all(|fault| fault.access == uapi::HMM_GPU_ACCESS_WRITE));
            serve(argument, named, 5);
            Ok(())
        })
        .unwrap();
        let refused = Err(Errno::ACCESS);
        assert_eq!(
            faulted.statuses(),
            [Ok(()), Ok(()), refused, Ok(()), refused]
        );
        assert_eq!(faulted.first_failure(), Some((faults[2], Errno::ACCESS)));
        assert_eq!(
            faulted.to_string(),
            "3 pages mapped, 2 of them in VRAM, 2 failed"
        );
        let error = faulted.complete().unwrap_err();
        assert_eq!(
            (error.errno(), error.fault_addr()),
            (Some(Errno::ACCESS), Some(faults[2].addr))
        );
    }

    #[test]
    fn a_page_named_twice_fails_once() {
        let faults: Vec<_> = [3, 3, 0].map(|page| fault(page, Access::Read)).into();
        let serve_all = |argument: &mut hmm_gpu_fault, named: &mut [_]| {
            serve(argument, named, named.len());
            Ok(())
        };
        for batch in [1, 3] {
            let faulted = service(&faults, batch, Policy::Map, serve_all).unwrap();
            assert_eq!((faulted.mapped_pages, faulted.failed_pages), (1, 1));
            assert!(!faulted.is_complete());
        }
        let faulted = service(&faults[2..], 1, Policy::Map, serve_all).unwrap();
        assert!(faulted.is_complete() && faulted.complete().is_ok());
        assert_eq!(faulted.to_string(), "1 page mapped, 1 of them in VRAM");
    }

    #[test]
    fn an_error_ends_it_with_what_was_mapped() {
        let faults: Vec<_> = (0..8).map(|page| fault(page, Access::Read)).collect();
        let mut calls = 0;
        let stopped = service(&faults, 3, Policy::Map, |argument, named| {
            calls += 1;
            let upto = named.len().min(2);
            serve(argument, named, upto);
            Err([Errno::INTR, Errno::NOMEM][calls / 3])
        });
        let Err(Stopped::Call(stop, faulted)) = stopped else {
            panic!("{stopped:?}")
        };
        assert_eq!(stop, Stop::Driver(Errno::NOMEM));
        assert_eq!(calls, 3);
        // Pages 0 and 1, then 2, then 3 and 4, of which the driver may not map one.
        assert_eq!(faulted.mapped_pages, 4);
    }

    #[test]
    fn a_driver_that_breaks_its_word_is_not_believed() {
        let faults = [fault(0, Access::Read), fault(1, Access::Read)];
        type Lie = fn(&mut hmm_gpu_fault, &mut [hmm_gpu_device_fault]);
        let lies: [Lie; 5] = [
            |argument, _| argument.mapped_pages = 3,
            |argument, _| argument.device_pages = 1,
            // Says nothing of the second.
            |_, named| named[0].status = 0,
            |_, named| named.iter_mut().for_each(|fault| fault.status = 4096),
            |_, named| {
                named
                    .iter_mut()
                    .for_each(|fault| fault.status = -14i32 as u32)
            },
        ];
        for (number, lie) in lies.into_iter().enumerate() {
            let stopped = service(&faults, BATCH, Policy::Map, |argument, named| {
                lie(argument, named);
                Ok(())
            });
            assert!(
                matches!(stopped, Err(Stopped::Call(Stop::Nonsense(_), _))),
                "{number}: {stopped:?}"
            );
        }
    }

    #[test]
    fn a_slice_faults_on_each_of_its_pages() {
        let data = vec![0u8; 3 * PAGE_BYTES];
        let faults: Vec<_> = DeviceFault::each_page(&data, Access::Write).collect();
        let range = PageRange::of(&data);
        assert_eq!(faults.len(), range.pages());
        assert_eq!(faults[0].addr, range.addr());
        assert_eq!(faults[1].addr, range.addr() + PAGE_BYTES);
        assert_eq!(
            faults[0].to_string(),
            format!("write at {:#x}", range.addr())
        );
        assert_eq!(DeviceFault::each_page::<u8>(&[], Access::Read).count(), 0);
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches a fault that gets another's answer, is named again after its answer, or is never named: wherever batches end
        /// and signals come.
        #[test]
        fn batches_and_signals_change_no_answer(
            pages in prop::collection::vec((0usize..64, any::<bool>()), 0..200),
            batch in 1usize..80,
            mut signals in prop::collection::vec(0usize..80, 0..20),
        ) {
            let faults: Vec<_> = pages
                .iter()
                .map(|&(page, write)| fault(page, if write { Access::Write } else { Access::Read }))
                .collect();
            let mut answered = vec![];
            let faulted = service(&faults, batch, Policy::Map, |argument, named| {
                assert!(named.len() <= batch && argument.count as usize == named.len());
                assert!(named.iter().all(|fault| fault.status == UNANSWERED));
                let upto = signals.pop().filter(|&upto| upto <= named.len());
                serve(argument, named, upto.unwrap_or(named.len()));
                answered.extend(named[..upto.unwrap_or(named.len())].iter().map(|fault| (fault.addr, fault.access)));
                upto.map_or(Ok(()), |_| Err(Errno::INTR))
            })
            .unwrap();

            let named: Vec<_> = faults.iter().map(|fault| (fault.addr as u64, fault.access.to_uapi())).collect();
            prop_assert_eq!(answered, named);
            for (fault, status) in faults.iter().zip(faulted.statuses()) {
                let expected = answer(fault.addr as u64).0;
                prop_assert_eq!(status.err().map_or(0, |errno| errno.raw_os_error() as u32), expected);
            }
            let failed: BTreeSet<_> = faults
                .iter()
                .map(|fault| fault.addr)
                .filter(|&addr| answer(addr as u64).0 != 0)
                .collect();
            prop_assert_eq!(faulted.failed_pages, failed.len() as u64);
            let first = faults.iter().find(|fault| answer(fault.addr as u64).0 != 0);
            prop_assert_eq!(faulted.first_failure().map(|(fault, _)| fault), first.copied());
        }
    }
}
