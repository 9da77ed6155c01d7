//! The driver's calls as they are, and the memory maps behind [`SharedBuf`](crate::SharedBuf).
//!
//! All unsafe code of the crate is in this module. Programs want [`Device`](crate::Device); this level is for tests of the
//! driver and for bindings: [`File`] passes a structure to the driver exactly as it is given, once, and hands back the
//! driver's own error.

mod access;
mod atomic;
pub(crate) mod mapping;
pub(crate) mod pool;
#[cfg(feature = "vulkan")]
pub(crate) mod reach;
#[cfg(feature = "vulkan")]
pub(crate) mod svm;
#[cfg(feature = "vulkan")]
pub(crate) mod vulkan;

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{self, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};

use crate::{uapi, AtomicWord};

/// An open file on `/dev/hmm_gpuN`, or on a device that has no node.
///
/// # Invariants
///
/// The descriptor is of a character device that, as far as `/sys` can tell, belongs to the driver, or came from the driver.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
}

/// Why a path could not be opened as a device of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenError {
    /// The system's error.
    System(Errno),
    /// It opened, but it is something else.
    NotADevice,
}

impl File {
    /// Opens a device node, for reading and writing and not to be inherited by `execve`.
    ///
    /// An ioctl number means something else to every driver. So what was opened is looked at before the first call.
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        let fd = rustix::io::retry_on_intr(|| {
            fs::open(
                path,
                OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOCTTY,
                Mode::empty(),
            )
        })
        .map_err(OpenError::System)?;
        let stat = fs::fstat(&fd).map_err(OpenError::System)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
            return Err(OpenError::NotADevice);
        }
        let (major, minor) = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
        match std::fs::read_to_string(format!("/sys/dev/char/{major}:{minor}/uevent")) {
            Ok(uevent) if !names_the_driver(&uevent) => Err(OpenError::NotADevice),
            // A container may have no /sys. Then the driver's answer to the first call tells.
            _ => Ok(Self { fd }),
        }
    }

    /// `QUERY`.
    pub fn query(&self, argument: &mut uapi::hmm_gpu_query) -> Result<(), Errno> {
        // SAFETY: the number carries the size of the structure (checked in `uapi`), which is all that the driver reads and
        // writes; any bit pattern is a valid one (`Pod`).
        unsafe {
            self.call(
                uapi::HMM_GPU_QUERY,
                (argument as *mut uapi::hmm_gpu_query).cast(),
            )
        }
    }

    /// `MIGRATE`. Safe for any argument: the driver checks it, and moving pages changes neither addresses nor bytes.
    pub fn migrate(&self, argument: &mut uapi::hmm_gpu_migrate) -> Result<(), Errno> {
        // SAFETY: as in `query`. Of the memory that the range names only its place changes.
        unsafe {
            self.call(
                uapi::HMM_GPU_MIGRATE,
                (argument as *mut uapi::hmm_gpu_migrate).cast(),
            )
        }
    }

    /// `PREFETCH`. Safe for any argument, as `MIGRATE` is.
    pub fn prefetch(&self, argument: &mut uapi::hmm_gpu_prefetch) -> Result<(), Errno> {
        // SAFETY: as in `query`. Of the memory that the range names only its place changes, later.
        unsafe {
            self.call(
                uapi::HMM_GPU_PREFETCH,
                (argument as *mut uapi::hmm_gpu_prefetch).cast(),
            )
        }
    }

    /// Reads what has become of moves that were queued (`read(2)`), waits for the first, and returns how many there were: none if none
    /// are queued.
    pub fn completions(&self, room: &mut [uapi::hmm_gpu_completion]) -> Result<usize, Errno> {
        let bytes = rustix::io::read(&self.fd, bytemuck::cast_slice_mut::<_, u8>(room))?;
        Ok(bytes / size_of::<uapi::hmm_gpu_completion>())
    }

    /// Whether there is something to read now (`poll(2)`).
    pub fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let polled = poll(&mut fds, Some(&Timespec::default()));
        polled.is_ok() && fds[0].revents().contains(PollFlags::IN)
    }

    /// `ADVISE`. Safe for any argument, as `MIGRATE` is.
    pub fn advise(&self, argument: &mut uapi::hmm_gpu_advise) -> Result<(), Errno> {
        // SAFETY: as in `query`. Of the memory that the range names at most its place changes, later.
        unsafe {
            self.call(
                uapi::HMM_GPU_ADVISE,
                (argument as *mut uapi::hmm_gpu_advise).cast(),
            )
        }
    }

    /// `COUNTERS`.
    pub fn counters(&self, argument: &mut uapi::hmm_gpu_counters) -> Result<(), Errno> {
        // SAFETY: as in `query`.
        unsafe {
            self.call(
                uapi::HMM_GPU_COUNTERS,
                (argument as *mut uapi::hmm_gpu_counters).cast(),
            )
        }
    }

    /// `RESIDENCY`, into `bytes`: the `bytes_ptr` of the argument is set here.
    ///
    /// Answers `EINVAL` without a call if `bytes` has not one byte for each page that `len` begins.
    pub fn residency(
        &self,
        argument: &mut uapi::hmm_gpu_residency,
        bytes: &mut [u8],
    ) -> Result<(), Errno> {
        if (bytes.len() as u64) < argument.len.div_ceil(uapi::HMM_GPU_PAGE_BYTES) {
            return Err(Errno::INVAL);
        }
        argument.bytes_ptr = bytes.as_mut_ptr() as u64;
        // SAFETY: as in `query`. The driver also writes `len / HMM_GPU_PAGE_BYTES` bytes at `bytes_ptr`, which is inside
        // `bytes` by the check above.
        unsafe {
            self.call(
                uapi::HMM_GPU_RESIDENCY,
                (argument as *mut uapi::hmm_gpu_residency).cast(),
            )
        }
    }

    /// `MIRROR`.
    pub fn mirror(&self, argument: &mut uapi::hmm_gpu_mirror) -> Result<(), Errno> {
        // SAFETY: as in `query`.
        unsafe {
            self.call(
                uapi::HMM_GPU_MIRROR,
                (argument as *mut uapi::hmm_gpu_mirror).cast(),
            )
        }
    }

    /// `ACCESS` that reads into `into`: `op` and `buffer_ptr` of the argument are set here.
    ///
    /// Safe for any address: the driver reads only what the process may read, and reading changes nothing but the place of
    /// pages. Answers `EINVAL` without a call if `into` is shorter than `len`.
    pub fn access_read(
        &self,
        argument: &mut uapi::hmm_gpu_access,
        into: &mut [u8],
    ) -> Result<(), Errno> {
        if (into.len() as u64) < argument.len {
            return Err(Errno::INVAL);
        }
        argument.op = uapi::HMM_GPU_OP_READ;
        argument.buffer_ptr = into.as_mut_ptr() as u64;
        // SAFETY: a read writes `len` bytes at `buffer_ptr` and nothing else, which are in `into` by the check above. Should
        // what it reads lie in `into` too, then it reads bytes of it before or after they are written.
        unsafe { self.access(argument) }
    }

    /// `ACCESS` that writes `from` to `to`: `op`, `buffer_ptr`, `addr` and `len` of the argument are set here.
    ///
    /// Answers `EINVAL` without a call if the two are not of one length.
    pub fn access_write(
        &self,
        argument: &mut uapi::hmm_gpu_access,
        to: &mut [u8],
        from: &[u8],
    ) -> Result<(), Errno> {
        if from.len() != to.len() {
            return Err(Errno::INVAL);
        }
        argument.op = uapi::HMM_GPU_OP_WRITE;
        argument.buffer_ptr = from.as_ptr() as u64;
        argument.addr = to.as_mut_ptr() as u64;
        argument.len = to.len() as u64;
        // SAFETY: a write writes `len` bytes at `addr` and nothing else, which is `to`.
        unsafe { self.access(argument) }
    }

    /// `ACCESS` that copies `from` to `to`: `op`, `addr`, `to_addr` and `len` of the argument are set here.
    ///
    /// Answers `EINVAL` without a call if the two are not of one length.
    pub fn access_copy(
        &self,
        argument: &mut uapi::hmm_gpu_access,
        from: &[u8],
        to: &mut [u8],
    ) -> Result<(), Errno> {
        if from.len() != to.len() {
            return Err(Errno::INVAL);
        }
        argument.op = uapi::HMM_GPU_OP_COPY;
        argument.addr = from.as_ptr() as u64;
        argument.to_addr = to.as_mut_ptr() as u64;
        argument.len = to.len() as u64;
        // SAFETY: a copy writes `len` bytes at `to_addr` and nothing else, which is `to`.
        unsafe { self.access(argument) }
    }

    /// `ACCESS` as it is.
    ///
    /// # Safety
    ///
    /// What the argument lets the driver write must be this process's to change: `len` bytes at `buffer_ptr` for a read, at
    /// `addr` for a write, at `to_addr` for a copy. An address that cannot be written is safe: the driver answers an error.
    pub unsafe fn access(&self, argument: &mut uapi::hmm_gpu_access) -> Result<(), Errno> {
        // SAFETY: as in `query`, and for the rest the caller's promise.
        unsafe {
            self.call(
                uapi::HMM_GPU_ACCESS,
                (argument as *mut uapi::hmm_gpu_access).cast(),
            )
        }
    }

    /// `FAULT` for the first `count` of `faults`, into which it writes what became of them: the `faults_ptr` of the argument is
    /// set here. Safe for any address: the driver maps for its device what the process has mapped.
    ///
    /// Answers `EINVAL` without a call if there are not so many.
    pub fn fault(
        &self,
        argument: &mut uapi::hmm_gpu_fault,
        faults: &mut [uapi::hmm_gpu_device_fault],
    ) -> Result<(), Errno> {
        if (faults.len() as u64) < u64::from(argument.count) {
            return Err(Errno::INVAL);
        }
        argument.faults_ptr = faults.as_mut_ptr() as u64;
        // SAFETY: as in `query`. The driver also writes to the `count` structures at `faults_ptr`, which are in `faults` by the
        // check above.
        unsafe {
            self.call(
                uapi::HMM_GPU_FAULT,
                (argument as *mut uapi::hmm_gpu_fault).cast(),
            )
        }
    }

    /// `SNAPSHOT`, into `entries`: the `entries_ptr` of the argument is set here.
    ///
    /// Answers `EINVAL` without a call if `entries` has not one word for each page that `len` begins.
    pub fn snapshot(
        &self,
        argument: &mut uapi::hmm_gpu_snapshot,
        entries: &mut [u64],
    ) -> Result<(), Errno> {
        if (entries.len() as u64) < argument.len.div_ceil(uapi::HMM_GPU_PAGE_BYTES) {
            return Err(Errno::INVAL);
        }
        argument.entries_ptr = entries.as_mut_ptr() as u64;
        // SAFETY: as in `query`. The driver also writes `len / HMM_GPU_PAGE_BYTES` words at `entries_ptr`, which is inside
        // `entries` by the check above.
        unsafe {
            self.call(
                uapi::HMM_GPU_SNAPSHOT,
                (argument as *mut uapi::hmm_gpu_snapshot).cast(),
            )
        }
    }

    /// `ATOMIC` on a word: `addr` of the argument is set here, and `bytes`.
    pub fn atomic_word<W: AtomicWord>(
        &self,
        argument: &mut uapi::hmm_gpu_atomic,
        word: &W,
    ) -> Result<(), Errno> {
        argument.addr = std::ptr::from_ref(word) as u64;
        argument.bytes = W::BYTES;
        // SAFETY: the word, all of it, is shared by who changes it atomically, and any bits are a value of it.
        unsafe { self.atomic(argument) }
    }

    /// `ATOMIC` as it is.
    ///
    /// # Safety
    ///
    /// The `bytes` bytes at `addr` must be this process's to change, in one piece, to what the argument says. An address that
    /// cannot be written is safe: the driver answers an error.
    pub unsafe fn atomic(&self, argument: &mut uapi::hmm_gpu_atomic) -> Result<(), Errno> {
        // SAFETY: as in `query`, and for the rest the caller's promise.
        unsafe {
            self.call(
                uapi::HMM_GPU_ATOMIC,
                (argument as *mut uapi::hmm_gpu_atomic).cast(),
            )
        }
    }

    /// Any call with any argument, for tests of what the driver refuses. Made once, also if a signal interrupts it.
    ///
    /// # Safety
    ///
    /// If the driver takes `number`, then what it may write through `argument`, and through pointers in what `argument` points
    /// to, must be this process's to change. An address that cannot be written (null, say) is safe: the driver answers `EFAULT`.
    pub unsafe fn call(&self, number: u32, argument: *mut c_void) -> Result<(), Errno> {
        let call = Call { number, argument };
        // SAFETY: the descriptor is of this driver (invariant), and what it may write is the caller's promise.
        unsafe { rustix::ioctl::ioctl(&self.fd, call) }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether a device's `uevent` file in `/sys` is that of one of the driver's nodes.
fn names_the_driver(uevent: &str) -> bool {
    uevent
        .lines()
        .filter_map(|line| line.strip_prefix("DEVNAME="))
        .filter_map(|name| name.strip_prefix("hmm_gpu"))
        .any(|unit| unit.parse::<u32>().is_ok())
}

/// One ioctl.
struct Call {
    number: u32,
    argument: *mut c_void,
}

// SAFETY: number and pointer are passed on as they are, the output is not looked at, and the kernel may change what the
// pointer points to (`IS_MUTATING`).
unsafe impl Ioctl for Call {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        // CAST: rustix's type has 32 bits or more, by its backend; on the way to the kernel only 32 count.
        self.number as Opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        self.argument
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_of_the_driver_is_told_from_others_by_its_name() {
        assert!(names_the_driver("MAJOR=10\nMINOR=120\nDEVNAME=hmm_gpu0\n"));
        assert!(names_the_driver(
            "MAJOR=10\nMINOR=99\nDEVNAME=hmm_gpu31\nDEVMODE=0660\n"
        ));
        assert!(!names_the_driver(
            "MAJOR=1\nMINOR=3\nDEVNAME=null\nDEVMODE=0666\n"
        ));
        assert!(!names_the_driver(
            "MAJOR=10\nMINOR=3\nDEVNAME=hmm_gpu_else\n"
        ));
        assert!(!names_the_driver("MAJOR=10\nMINOR=3\n"));
    }

    #[test]
    fn what_is_no_device_at_all_is_refused_before_any_call() {
        let file =
            std::env::temp_dir().join(format!("hmm-gpu-not-a-device-{}", std::process::id()));
        std::fs::write(&file, b"").unwrap();
        assert_eq!(File::open(&file).unwrap_err(), OpenError::NotADevice);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(
            File::open(&file).unwrap_err(),
            OpenError::System(Errno::NOENT)
        );
    }
}
