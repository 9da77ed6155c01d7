//! Devices.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::io::{retry_on_intr, Errno};

use crate::error::Attempt;
use crate::look::{look, room};
use crate::moving::{self, Stop};
use crate::prefetch::Completions;
use crate::sys::{File, OpenError};
use crate::uapi::{self, hmm_gpu_counters, hmm_gpu_query, hmm_gpu_residency};
use crate::{Counters, Description, Error, Moved, PageRange, Residency, Target};

/// The oldest interface that has all this library uses.
const NEEDED_VERSION: u32 = 1;

/// A device of the driver, opened.
///
/// It belongs to the process that opened it. After `fork`, the child must open its own: through the inherited one every call
/// is an error (`EPERM`). After the device is unbound every call is an error too (`ENODEV`), and what was in its VRAM is in
/// system memory. Closing it (dropping it) moves nothing.
///
/// All calls are safe and may be made from several threads at once, for any memory, also while other threads read and write
/// it: moving a page changes neither its address nor its bytes.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
    unit: u32,
    completions: Completions,
}

impl Device {
    /// The units of all devices that have a node, in order: N of `/dev/hmm_gpuN`. Opens none of them.
    pub fn list() -> Vec<u32> {
        let is_node = |unit: &u32| {
            std::fs::metadata(node(*unit))
                .is_ok_and(|metadata| metadata.file_type().is_char_device())
        };
        (0..uapi::HMM_GPU_MAX_DEVICES).filter(is_node).collect()
    }

    /// Opens `/dev/hmm_gpuN`.
    ///
    /// Errors: [`NoSuchUnit`](Error::NoSuchUnit), and those of [`open_path`](Self::open_path).
    pub fn open(unit: u32) -> Result<Self, Error> {
        if unit >= uapi::HMM_GPU_MAX_DEVICES {
            return Err(Error::NoSuchUnit { unit });
        }
        Self::open_path(node(unit))
    }

    /// Opens the first device that can be opened.
    ///
    /// Errors: [`NoDevice`](Error::NoDevice) if there is none, otherwise that of the first one.
    pub fn open_first() -> Result<Self, Error> {
        let mut refused = None;
        for unit in Self::list() {
            match Self::open(unit) {
                Ok(device) => return Ok(device),
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or(Error::NoDevice))
    }

    /// Opens a device node by its path.
    ///
    /// Errors: [`Open`](Error::Open), [`NotADevice`](Error::NotADevice) if it is something else,
    /// [`DriverTooOld`](Error::DriverTooOld), and those of [`describe`](Self::describe).
    pub fn open_path(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(OpenError::System(errno)) => return Err(Error::Open { path, errno }),
            Err(OpenError::NotADevice) => return Err(Error::NotADevice { path }),
        };
        let mut device = Self::of_file(file, path, 0);
        let description = match device.describe() {
            // Something else that takes no ioctl, or not this one.
            Err(Error::Call {
                errno: Errno::NOTTY,
                ..
            }) => return Err(Error::NotADevice { path: device.path }),
            described => described?,
        };
        device.unit = description.unit;
        tracing::info!(%description, "opened");
        Ok(device)
    }

    pub(crate) fn of_file(file: File, path: PathBuf, unit: u32) -> Self {
        Self {
            file,
            path,
            unit,
            completions: Completions::default(),
        }
    }

    /// The path it was opened by, or, where there is no node, a name in brackets.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The N of `/dev/hmm_gpuN`.
    pub fn unit(&self) -> u32 {
        self.unit
    }

    /// The file, for the driver's calls as they are.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What is known of its moves that go on by themselves.
    pub(crate) fn completions(&self) -> &Completions {
        &self.completions
    }

    /// What the device is, and how much of its VRAM is free now. The driver's `QUERY`.
    pub fn describe(&self) -> Result<Description, Error> {
        let mut answer = hmm_gpu_query::default();
        retry_on_intr(|| self.file.query(&mut answer))
            .map_err(|errno| Error::call(&self.path, Attempt::Describe, errno))?;
        check_version(&self.path, answer.version)?;
        Ok(Description::from_uapi(&self.path, &answer))
    }

    /// What the device has done since it was bound, for all processes. The driver's `COUNTERS`.
    pub fn counters(&self) -> Result<Counters, Error> {
        let mut answer = hmm_gpu_counters::default();
        retry_on_intr(|| self.file.counters(&mut answer))
            .map_err(|errno| Error::call(&self.path, Attempt::Counters, errno))?;
        Ok(Counters::from_uapi(&answer))
    }

    /// What this process has done with the device since it was opened here, and what became of the pages that it brought there. The
    /// driver's `COUNTERS` with `HMM_GPU_COUNTERS_CLIENT`.
    pub fn own_counters(&self) -> Result<Counters, Error> {
        let mut answer = hmm_gpu_counters {
            flags: uapi::HMM_GPU_COUNTERS_CLIENT,
            ..Default::default()
        };
        retry_on_intr(|| self.file.counters(&mut answer))
            .map_err(|errno| Error::call(&self.path, Attempt::Counters, errno))?;
        Ok(Counters::from_uapi(&answer))
    }

    /// Moves the pages that a slice lies on, whole pages: what lies beside it on its first and last page moves too.
    ///
    /// A hint of where the memory will be used next. It is never needed for the result of a program: a page in VRAM comes back
    /// by itself when the CPU touches it. Private anonymous memory moves, which is what `Box`, `Vec`, the stack and
    /// [`SharedBuf`](crate::SharedBuf) are made of; anything else is skipped and counted as such. Memory that was never
    /// touched becomes zeroed VRAM at a device target.
    ///
    /// A slice without bytes is no call. A signal does not end it: the rest is asked for until all is done.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `ENOSPC` (no VRAM), `ENOMEM` (no system memory), `ENODEV` (unbound),
    /// `EPERM` (opened by another process); [`Error::moved`] says how far it came. What was moved stays moved.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Place, Target};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let words: Vec<u64> = (0..1 << 20).collect();
    /// let moved = device.prefetch(&words, Target::Device)?;
    /// println!("{moved}"); // 8 MiB moved
    /// assert_eq!(words[4096], 4096); // the CPU touches a page, and it comes back
    /// # Ok(())
    /// # }
    /// ```
    pub fn prefetch<T>(&self, data: &[T], target: Target) -> Result<Moved, Error> {
        let range = PageRange::of(data);
        if range.is_empty() {
            return Ok(Moved::default());
        }
        self.prefetch_range(range.addr(), range.bytes(), target)
    }

    /// As [`prefetch`](Self::prefetch), for an address and a length in bytes that reach the driver as they are. The driver's
    /// `MIGRATE`.
    ///
    /// The range may span several mappings and holes.
    ///
    /// Errors: those of `prefetch`, and `EINVAL` (not whole pages, or none), `EFAULT` (nothing is mapped there, or it leaves
    /// user space).
    pub fn prefetch_range(
        &self,
        addr: usize,
        bytes: usize,
        target: Target,
    ) -> Result<Moved, Error> {
        let attempt = |moved| Attempt::Move {
            addr,
            bytes,
            target,
            moved,
        };
        match moving::migrate(addr, bytes, target, |argument| self.file.migrate(argument)) {
            Ok(moved) => {
                tracing::debug!(path = %self.path.display(), addr, bytes, %target, %moved, "moved");
                Ok(moved)
            }
            Err((Stop::Driver(errno), moved)) => {
                Err(Error::call(&self.path, attempt(moved), errno))
            }
            Err((Stop::Nonsense(problem), moved)) => {
                Err(Error::answer(&self.path, attempt(moved), problem))
            }
        }
    }

    /// Where the pages are that a slice lies on. Moves nothing, and populates nothing.
    ///
    /// A slice without bytes has no pages and is no call.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EBUSY` (the address space kept changing), `ENOMEM`, `ENODEV`, `EPERM`;
    /// [`Memory`](Error::Memory) if there is no room for the answer, one byte a page.
    pub fn residency<T>(&self, data: &[T]) -> Result<Residency, Error> {
        let range = PageRange::of(data);
        if range.is_empty() {
            return self.decode(range.addr(), 0, &[]);
        }
        self.residency_range(range.addr(), range.bytes())
    }

    /// As [`residency`](Self::residency), for an address and a length in bytes that reach the driver as they are, in pieces
    /// of 64 MiB. The driver's `RESIDENCY`.
    ///
    /// Errors: those of `residency`, and `EINVAL` (not whole pages, or none), `EFAULT` (it leaves user space).
    pub fn residency_range(&self, addr: usize, bytes: usize) -> Result<Residency, Error> {
        let mut places = room::<u8>(bytes)?;
        look(addr, bytes, &mut places, |addr, len, piece| {
            let mut argument = hmm_gpu_residency {
                addr,
                len,
                ..Default::default()
            };
            self.file.residency(&mut argument, piece)
        })
        .map_err(|errno| Error::call(&self.path, Attempt::Residency { addr, bytes }, errno))?;
        self.decode(addr, bytes, &places)
    }

    fn decode(&self, addr: usize, bytes: usize, places: &[u8]) -> Result<Residency, Error> {
        let attempt = Attempt::Residency { addr, bytes };
        Residency::from_uapi(addr, places).ok_or_else(|| {
            Error::answer(
                &self.path,
                attempt,
                "a place that its interface does not have",
            )
        })
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The device node of a unit.
fn node(unit: u32) -> PathBuf {
    format!("/dev/hmm_gpu{unit}").into()
}

fn check_version(path: &Path, found: u32) -> Result<(), Error> {
    if found < NEEDED_VERSION {
        return Err(Error::DriverTooOld {
            path: path.to_owned(),
            found,
            needed: NEEDED_VERSION,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_can_be_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<Device>();
    }

    #[test]
    fn a_unit_that_cannot_be_is_refused() {
        assert!(matches!(
            Device::open(32),
            Err(Error::NoSuchUnit { unit: 32 })
        ));
        assert!(matches!(
            Device::open(u32::MAX),
            Err(Error::NoSuchUnit { .. })
        ));
    }

    #[test]
    fn what_is_not_a_device_is_named() {
        let error = Device::open_path("/dev/null").unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/dev/null is not a device of the driver hmm_gpu"),
            "{error}"
        );
        let error = Device::open_path("/nonexistent/hmm_gpu0").unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOENT));
        assert!(
            error
                .to_string()
                .starts_with("cannot open /nonexistent/hmm_gpu0: "),
            "{error}"
        );
    }

    #[test]
    fn a_newer_driver_is_taken_and_an_older_one_refused() {
        let path = Path::new("/dev/hmm_gpu0");
        assert!(check_version(path, NEEDED_VERSION).is_ok());
        assert!(check_version(path, u32::MAX).is_ok());
        assert!(matches!(
            check_version(path, 0),
            Err(Error::DriverTooOld { found: 0, .. })
        ));
    }
}
