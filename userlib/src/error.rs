//! What can go wrong, and what to do then.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use crate::{
    Accessed, Advice, AtomicOperation, Bytes, DeviceFault, Moved, Operation, Policy, TableEntry,
    Target,
};

/// What can go wrong. The text says what was attempted, with its values, what the system answered, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no device node, or none that can be used.
    #[error(
        "no device of the driver hmm_gpu: is the module loaded (`modprobe hmm_gpu`), and a GPU bound to it or a soft device made?"
    )]
    NoDevice,

    /// There is no such unit: nodes are `/dev/hmm_gpu0` to `/dev/hmm_gpu31`.
    #[error("there is no device {unit}: units are 0 to {}", crate::uapi::HMM_GPU_MAX_DEVICES - 1)]
    NoSuchUnit {
        /// The unit asked for.
        unit: u32,
    },

    /// A device node could not be opened.
    #[error("cannot open {}: {}", .path.display(), open_reason(*.errno))]
    Open {
        /// The device node.
        path: PathBuf,
        /// The system's answer.
        errno: Errno,
    },

    /// What was opened belongs to something else.
    #[error("{} is not a device of the driver hmm_gpu; `Device::list` finds those that are there", .path.display())]
    NotADevice {
        /// What was opened.
        path: PathBuf,
    },

    /// A slice without bytes lies on no page: there is nothing to do.
    #[error("the slice has no bytes, so there is no page to move")]
    NoPages,

    /// The driver is older than this library.
    #[error(
        "the driver of {} has interface {found}, this library needs {needed}: load the hmm_gpu module of the same release",
        .path.display()
    )]
    DriverTooOld {
        /// The device node.
        path: PathBuf,
        /// The driver's interface version.
        found: u32,
        /// The oldest that this library can work with.
        needed: u32,
    },

    /// The driver refused a call or did not finish it.
    #[error("{attempt} on {}: {}", .path.display(), call_reason(.attempt, *.errno))]
    Call {
        /// The device node.
        path: PathBuf,
        /// What was asked.
        attempt: Attempt,
        /// The driver's answer.
        errno: Errno,
    },

    /// The driver answered what its interface does not allow. A bug in the driver.
    #[error("{attempt} on {}: the driver answered {problem}; please report this", .path.display())]
    Answer {
        /// The device node.
        path: PathBuf,
        /// What was asked.
        attempt: Attempt,
        /// What is wrong with the answer.
        problem: &'static str,
    },

    /// A page that the device wants was not mapped for it.
    #[error("the device's {fault} was not serviced: {}", fault_reason(*.errno))]
    Fault {
        /// What the device wants.
        fault: DeviceFault,
        /// The driver's answer.
        errno: Errno,
    },

    /// Two slices that must have one length have two.
    #[error("{from} values cannot be brought to {to}: both must be as many")]
    Lengths {
        /// Values in the slice that is read.
        from: usize,
        /// Values in the slice that is written to.
        to: usize,
    },

    /// Shared virtual addressing with Vulkan.
    #[cfg(feature = "vulkan")]
    #[error(transparent)]
    Svm(#[from] crate::SvmError),

    /// There is no system memory, or no room in the address space.
    #[error("cannot have {values} values of {value_bytes} bytes: {errno}")]
    Memory {
        /// How many values.
        values: usize,
        /// Bytes of each.
        value_bytes: usize,
        /// The system's answer.
        errno: Errno,
    },
}

/// What was asked of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Attempt {
    /// To describe the device.
    Describe,
    /// To tell what it has done.
    Counters,
    /// To tell where pages are.
    Residency {
        /// First byte of the range.
        addr: usize,
        /// Its length in bytes.
        bytes: usize,
    },
    /// To move pages.
    Move {
        /// First byte of the range.
        addr: usize,
        /// Its length in bytes.
        bytes: usize,
        /// Where to.
        target: Target,
        /// How far it came: this is done and stays so.
        moved: Moved,
    },
    /// To queue a move.
    Queue {
        /// First byte of the range.
        addr: usize,
        /// Its length in bytes.
        bytes: usize,
        /// Where to.
        target: Target,
    },
    /// To describe the device page table.
    Mirror,
    /// To let the device access memory.
    Access {
        /// What it was to do.
        operation: Operation,
        /// First byte of the range; of a copy, of the one that is read.
        addr: usize,
        /// Its length in bytes.
        bytes: usize,
        /// What was to be done with device faults.
        policy: Policy,
        /// How far it came.
        accessed: Accessed,
        /// Where a device fault ended it.
        fault_addr: Option<usize>,
        /// With `EAGAIN`, what the device found there.
        entry: TableEntry,
    },
    /// To let the device do an atomic operation.
    Atomic {
        /// What it was to do.
        operation: AtomicOperation,
        /// Where the word is.
        addr: usize,
        /// Bytes of the word.
        bytes: usize,
        /// What was to be done with device faults.
        policy: Policy,
        /// How many there were.
        faults: u64,
    },
    /// To service device faults.
    Fault {
        /// How many.
        faults: usize,
        /// How.
        policy: Policy,
        /// Pages that were mapped before it ended.
        mapped_pages: u64,
    },
    /// To say what is known of memory.
    Advise {
        /// First byte of the range.
        addr: usize,
        /// Its length in bytes.
        bytes: usize,
        /// What is.
        advice: Advice,
    },
    /// To make a private pool.
    CreatePool {
        /// Its size.
        bytes: usize,
    },
    /// To make a device of a dma-buf.
    Import {
        /// How much of it.
        bytes: usize,
    },
    /// To begin an execution.
    BeginExecution {
        /// How long others wait for it.
        deadline: Duration,
    },
    /// To end one, or tell what has become of it.
    EndExecution,
    /// To tell what is at each page.
    Snapshot {
        /// First byte of the range.
        addr: usize,
        /// Its length in bytes.
        bytes: usize,
    },
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Attempt::Describe => f.write_str("describing the device"),
            Attempt::Counters => f.write_str("reading the counters"),
            Attempt::Residency { addr, bytes } => {
                write!(f, "looking where {} at {addr:#x} are", exact(bytes))
            }
            Attempt::Move {
                addr,
                bytes,
                target,
                ..
            } => {
                write!(f, "moving {} at {addr:#x} to {target}", exact(bytes))
            }
            Attempt::Queue {
                addr,
                bytes,
                target,
            } => write!(
                f,
                "queueing a move of {} at {addr:#x} to {target}",
                exact(bytes)
            ),
            Attempt::Mirror => f.write_str("describing the device page table"),
            Attempt::Access {
                operation,
                addr,
                bytes,
                policy,
                ..
            } => {
                let bytes = exact(bytes);
                match operation {
                    Operation::Read => write!(f, "the device's reading {bytes} at {addr:#x}"),
                    Operation::Write => write!(f, "the device's writing {bytes} at {addr:#x}"),
                    Operation::Copy { to_addr } => {
                        write!(
                            f,
                            "the device's copying {bytes} at {addr:#x} to {to_addr:#x}"
                        )
                    }
                }?;
                write!(f, " (policy {policy})")
            }
            Attempt::Atomic {
                operation,
                addr,
                bytes,
                policy,
                ..
            } => write!(
                f,
                "the device's {operation} on {} at {addr:#x} (policy {policy})",
                exact(bytes)
            ),
            Attempt::Fault { faults, policy, .. } => {
                let plural = if faults == 1 { "" } else { "s" };
                write!(
                    f,
                    "servicing {faults} device fault{plural} (policy {policy})"
                )
            }
            Attempt::Advise {
                addr,
                bytes,
                advice,
            } => {
                write!(f, "advising of {} at {addr:#x} ({advice})", exact(bytes))
            }
            Attempt::CreatePool { bytes } => {
                write!(f, "making a private pool of {}", exact(bytes))
            }
            Attempt::Import { bytes } => {
                write!(f, "making a device of {} of a dma-buf", exact(bytes))
            }
            Attempt::BeginExecution { deadline } => {
                write!(f, "beginning an execution (deadline {deadline:?})")
            }
            Attempt::EndExecution => f.write_str("ending an execution"),
            Attempt::Snapshot { addr, bytes } => {
                write!(f, "looking what {} at {addr:#x} are", exact(bytes))
            }
        }
    }
}

impl Error {
    /// The system's or the driver's error number, if there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Open { errno, .. }
            | Error::Call { errno, .. }
            | Error::Fault { errno, .. }
            | Error::Memory { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// What was asked of the driver, if it is the driver that refused it, did not finish it, or answered wrongly.
    pub fn attempt(&self) -> Option<&Attempt> {
        match self {
            Error::Call { attempt, .. } | Error::Answer { attempt, .. } => Some(attempt),
            _ => None,
        }
    }

    /// How far a move came before it failed. What was moved stays moved.
    pub fn moved(&self) -> Option<Moved> {
        match self.attempt()? {
            Attempt::Move { moved, .. } => Some(*moved),
            _ => None,
        }
    }

    /// How far an access of the device came before it failed. What was written stays written.
    pub fn accessed(&self) -> Option<Accessed> {
        match self.attempt()? {
            Attempt::Access { accessed, .. } => Some(*accessed),
            _ => None,
        }
    }

    /// Where a device fault ended an access, or was not serviced.
    pub fn fault_addr(&self) -> Option<usize> {
        match self {
            Error::Fault { fault, .. } => Some(fault.addr),
            _ => match self.attempt()? {
                Attempt::Access { fault_addr, .. } => *fault_addr,
                _ => None,
            },
        }
    }

    /// What the device found in its page table where an access with [`Policy::None`] ended (`EAGAIN`).
    pub fn table_entry(&self) -> Option<TableEntry> {
        match self {
            Error::Call {
                attempt: Attempt::Access { entry, .. },
                errno: Errno::AGAIN,
                ..
            } => Some(*entry),
            _ => None,
        }
    }

    pub(crate) fn call(path: &Path, attempt: Attempt, errno: Errno) -> Self {
        tracing::debug!(path = %path.display(), %attempt, %errno, "refused");
        Error::Call {
            path: path.to_owned(),
            attempt,
            errno,
        }
    }

    pub(crate) fn answer(path: &Path, attempt: Attempt, problem: &'static str) -> Self {
        tracing::error!(path = %path.display(), %attempt, problem, "the driver breaks its interface");
        Error::Answer {
            path: path.to_owned(),
            attempt,
            problem,
        }
    }
}

/// Keeps the error number, so that programs that speak `io::Error` can go on with it.
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        let kind = error
            .errno()
            .map_or(std::io::ErrorKind::Other, |errno| errno.kind());
        std::io::Error::new(kind, error)
    }
}

/// A length that was given: its number too where the short form does not give all of it.
fn exact(bytes: usize) -> String {
    let short = Bytes(bytes as u64).to_string();
    if bytes < 1024 || (bytes % 1024 == 0 && !short.contains('.')) {
        short
    } else {
        format!("{short} ({bytes:#x})")
    }
}

fn open_reason(errno: Errno) -> String {
    let todo = match errno {
        Errno::NOENT | Errno::NXIO => {
            "there is no such device; is the module loaded and the device bound?"
        }
        Errno::NODEV => "the device has been unbound",
        Errno::ACCESS | Errno::PERM => "you may not; the node is for the group `render`",
        Errno::MFILE | Errno::NFILE => "too many files are open",
        _ => "the system does not say more",
    };
    format!("{todo} ({errno})")
}

fn call_reason(attempt: &Attempt, errno: Errno) -> String {
    let Some((why, todo)) = attempt_reason(attempt, errno).or_else(|| common_reason(errno)) else {
        return format!("{errno}{}", progress(attempt));
    };
    format!("{why}{}; {todo} ({errno})", progress(attempt))
}

fn fault_reason(errno: Errno) -> String {
    match service_reason(errno).or_else(|| common_reason(errno)) {
        Some((why, todo)) => format!("{why}; {todo} ({errno})"),
        None => errno.to_string(),
    }
}

/// Why, and what to do then.
type Reason = (&'static str, &'static str);

/// What an error means of any call.
fn common_reason(errno: Errno) -> Option<Reason> {
    Some(match errno {
        Errno::NOSPC => (
            "no VRAM left",
            "move other memory back with `Target::System`, or use another device",
        ),
        Errno::NOMEM => ("no system memory left", "free some, then repeat the call"),
        Errno::FAULT => (
            "nothing is mapped there, or it is outside of user space",
            "check address and length",
        ),
        Errno::INVAL => (
            "the driver does not take these values",
            "address and length are whole pages, at least one",
        ),
        Errno::PERM => (
            "this file was opened by another process",
            "open the device again after `fork` and `execve`",
        ),
        Errno::NODEV => (
            "the device has been unbound",
            "what was in its VRAM is in system memory now; open another device",
        ),
        Errno::BUSY => (
            "the pages kept changing",
            "repeat the call when less is going on",
        ),
        Errno::INTR => ("a signal came", "repeat the call"),
        Errno::NOTTY => (
            "the driver has no such call",
            "load the hmm_gpu module of the same release",
        ),
        _ => return None,
    })
}

fn pool_reason(errno: Errno) -> Option<Reason> {
    Some(match errno {
        Errno::INVAL => (
            "the size is none that a pool can have",
            "it is a multiple of 2 MiB, not zero",
        ),
        Errno::EXIST => ("there is one", "use it, or open the device again"),
        Errno::BUSY => (
            "memory of this device is in VRAM already",
            "make the pool right after opening the device",
        ),
        Errno::NOSPC => (
            "private pools may not have so much, or no room could be made in one piece",
            "ask for less, or see the module parameter `pool_share`",
        ),
        Errno::OPNOTSUPP => (
            "the CPU reaches all of this device's VRAM",
            "use another device",
        ),
        _ => return None,
    })
}

fn import_reason(errno: Errno) -> Option<Reason> {
    Some(match errno {
        Errno::INVAL => (
            "it is no dma-buf, or too short, or the size is none that VRAM can have",
            "the size is a multiple of 2 MiB, not zero, and not more than the dma-buf has",
        ),
        Errno::ACCESS => (
            "the dma-buf may not be written to",
            "export it for reading and writing",
        ),
        Errno::BUSY => (
            "it is such a device already, or was until a moment ago",
            "drop the other device, and wait a moment",
        ),
        Errno::OPNOTSUPP => (
            "the driver takes none, or not of this exporter (which must have `vmap`), or not through this device",
            "see the module parameter `import_mib`, and use a device with pools",
        ),
        Errno::NOSPC => (
            "clients may not give so much together, or not so many",
            "give less, or see the module parameter `import_mib`",
        ),
        _ => return None,
    })
}

fn execution_reason(errno: Errno) -> Option<Reason> {
    Some(match errno {
        Errno::INVAL => (
            "nobody waits for that long",
            "the deadline is a millisecond at least and 10 seconds at most",
        ),
        Errno::NXIO => ("there is no pool", "make one with `Device::create_pool`"),
        Errno::BUSY => ("one runs", "end it first"),
        _ => return None,
    })
}

/// What an error means of this call only.
fn attempt_reason(attempt: &Attempt, errno: Errno) -> Option<Reason> {
    match (attempt, errno) {
        (Attempt::CreatePool { .. }, _) => pool_reason(errno),
        (Attempt::Import { .. }, _) => import_reason(errno),
        (Attempt::BeginExecution { .. }, _) => execution_reason(errno),
        (
            Attempt::Access {
                fault_addr: None, ..
            },
            Errno::FAULT,
        ) => Some((
            "the buffer cannot be read or written, or the range leaves user space",
            "check addresses and length",
        )),
        (Attempt::Access { .. }, Errno::INVAL) => Some((
            "the driver does not take these values",
            "there must be a byte at least, the range must not wrap around, and a copy's ranges must not overlap",
        )),
        (Attempt::Access { .. }, errno) => service_reason(errno),
        (Attempt::Atomic { .. }, Errno::OPNOTSUPP) => Some((
            "the page is shared or a file's, and the kernel gives such to no device",
            "use private memory (`Box`, `Vec`, `SharedBuf`)",
        )),
        (Attempt::Atomic { .. }, Errno::INVAL) => Some((
            "the driver does not take these values",
            "use `Policy::Map` or `Policy::Migrate`, a multiple of the word's size for its address, and values as wide",
        )),
        (Attempt::Atomic { .. }, errno) => service_reason(errno),
        (Attempt::Fault { .. }, Errno::INVAL) => Some((
            "the driver does not take these values",
            "use `Policy::Map` or `Policy::Migrate`",
        )),
        (Attempt::Advise { .. }, Errno::TOOBIG) => Some((
            "more than 1024 ranges would have advice of their own",
            "advise of fewer and larger ones, or reset some",
        )),
        (Attempt::Advise { .. }, Errno::INVAL) => Some((
            "the driver does not take these values",
            "address and length are whole pages, and a granularity is a power of two from 4096 to 2 MiB",
        )),
        (Attempt::Queue { .. }, Errno::AGAIN) => Some((
            "as many moves are under way as a device takes",
            "wait for one of them",
        )),
        (Attempt::Move { .. }, Errno::CANCELED) => {
            Some(("the process was ending", "move what is needed anew"))
        }
        (Attempt::Move { .. }, Errno::NOMSG) => Some((
            "its end was read from the file by somebody else",
            "leave the reading of the device's file to `Prefetch`",
        )),
        (Attempt::Mirror, Errno::NOSPC) => service_reason(errno),
        _ => None,
    }
}

/// What an error means of a device fault.
fn service_reason(errno: Errno) -> Option<Reason> {
    Some(match errno {
        Errno::FAULT => (
            "nothing is mapped there, or nothing that a device can reach",
            "check address and length",
        ),
        Errno::ACCESS => (
            "the mapping there does not allow it",
            "the device may do what the process may: see `mprotect`",
        ),
        Errno::AGAIN => (
            "the device page table has no entry for it",
            "service it with `Device::fault` and repeat the call, or use `Policy::Map` or `Policy::Migrate`",
        ),
        Errno::BUSY => (
            "the page kept changing its place",
            "repeat the call when less is going on",
        ),
        Errno::NOSPC => (
            "no VRAM left for the device page table",
            "move memory back with `Target::System`, or use another device",
        ),
        Errno::HWPOISON => (
            "the memory there is broken, and what was in it is lost",
            "map new memory there",
        ),
        Errno::CANCELED => (
            "the call ended before it came to this one",
            "name it again",
        ),
        _ => return None,
    })
}

/// How far it came, and where it ended.
fn progress(attempt: &Attempt) -> String {
    match attempt {
        Attempt::Move { moved, .. } => format!(" ({moved} before that)"),
        Attempt::Access {
            accessed,
            fault_addr,
            entry,
            ..
        } => {
            let at = fault_addr.map_or(String::new(), |addr| format!(" at {addr:#x}"));
            let found = match entry.bits() {
                0 => String::new(),
                _ => format!("found {entry}; "),
            };
            format!("{at} ({found}{accessed} before that)")
        }
        Attempt::Atomic { faults, .. } => {
            let plural = if *faults == 1 { "" } else { "s" };
            format!(" ({faults} device fault{plural} before that)")
        }
        Attempt::Fault { mapped_pages, .. } => {
            let plural = if *mapped_pages == 1 { "" } else { "s" };
            format!(" ({mapped_pages} page{plural} mapped before that)")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moving(moved: Moved, errno: Errno) -> Error {
        let (addr, bytes) = (0x7f12_3456_7000, 16 << 20);
        let attempt = Attempt::Move {
            addr,
            bytes,
            target: Target::Device,
            moved,
        };
        Error::Call {
            path: "/dev/hmm_gpu0".into(),
            attempt,
            errno,
        }
    }

    #[test]
    fn a_full_device_is_told_with_the_progress_and_a_way_out() {
        let error = moving(
            Moved {
                moved: 8 << 20,
                already: 4096,
                ..Default::default()
            },
            Errno::NOSPC,
        );
        assert_eq!(
            error.to_string(),
            "moving 16 MiB at 0x7f1234567000 to VRAM on /dev/hmm_gpu0: no VRAM left (8 MiB moved, 4 KiB there already \
             before that); move other memory back with `Target::System`, or use another device (No space left on device \
             (os error 28))"
        );
        assert_eq!(error.errno(), Some(Errno::NOSPC));
        assert_eq!(error.moved().map(|moved| moved.moved), Some(8 << 20));
    }

    #[test]
    fn a_file_of_another_process_is_told_as_such() {
        let text = moving(Moved::default(), Errno::PERM).to_string();
        assert!(
            text.contains("this file was opened by another process"),
            "{text}"
        );
        assert!(
            text.contains("open the device again after `fork` and `execve`"),
            "{text}"
        );
    }

    #[test]
    fn every_documented_error_says_what_to_do() {
        use Errno as E;
        let documented = [
            E::INVAL,
            E::FAULT,
            E::NOSPC,
            E::NOMEM,
            E::INTR,
            E::NODEV,
            E::PERM,
            E::BUSY,
            E::NOTTY,
        ];
        for errno in documented {
            let text =
                Error::call(Path::new("/dev/hmm_gpu1"), Attempt::Counters, errno).to_string();
            assert!(
                text.starts_with("reading the counters on /dev/hmm_gpu1: "),
                "{text}"
            );
            assert!(text.contains("; "), "{text}");
            assert!(text.contains("(os error "), "{text}");
        }
    }

    fn accessing(errno: Errno, fault_addr: Option<usize>, entry: u64) -> Error {
        let attempt = Attempt::Access {
            operation: Operation::Write,
            addr: 0x7f12_3456_7000,
            bytes: 16 << 20,
            policy: Policy::None,
            accessed: Accessed {
                bytes: 8 << 20,
                faults: 2,
            },
            fault_addr,
            entry: TableEntry::from_bits(entry),
        };
        Error::call(Path::new("/dev/hmm_gpu0"), attempt, errno)
    }

    #[test]
    fn a_miss_is_told_with_its_address_and_what_the_device_found() {
        let requested = crate::uapi::HMM_GPU_PTE_REQUESTED;
        let error = accessing(Errno::AGAIN, Some(0x7f12_34d6_7000), requested);
        assert_eq!(
            error.to_string(),
            "the device's writing 16 MiB at 0x7f1234567000 (policy none) on /dev/hmm_gpu0: the device page table has no entry \
             for it at 0x7f1234d67000 (found nothing, requested; 8 MiB, 2 device faults before that); service it with \
             `Device::fault` and repeat the call, or use `Policy::Map` or `Policy::Migrate` (Resource temporarily unavailable \
             (os error 11))"
        );
        assert_eq!(error.fault_addr(), Some(0x7f12_34d6_7000));
        assert_eq!(
            error.accessed().map(|accessed| accessed.bytes),
            Some(8 << 20)
        );
        assert!(error.table_entry().is_some_and(TableEntry::is_requested));
        assert_eq!(error.moved(), None);
        // Only a miss that was not serviced has an entry to tell of.
        assert_eq!(accessing(Errno::BUSY, Some(1), 0).table_entry(), None);
    }

    #[test]
    fn a_buffer_that_cannot_be_used_is_told_from_a_bad_address() {
        let (buffer, addr) = (
            accessing(Errno::FAULT, None, 0).to_string(),
            accessing(Errno::FAULT, Some(0x5000), 0).to_string(),
        );
        assert!(
            buffer.contains("the buffer cannot be read or written"),
            "{buffer}"
        );
        assert!(
            addr.contains("nothing is mapped there, or nothing that a device can reach at 0x5000"),
            "{addr}"
        );
    }

    #[test]
    fn what_a_copy_and_a_list_of_faults_were_to_do_is_told() {
        let copy = Attempt::Access {
            operation: Operation::Copy { to_addr: 0x9000 },
            addr: 0x5000,
            bytes: 17,
            policy: Policy::Migrate,
            accessed: Accessed::default(),
            fault_addr: None,
            entry: TableEntry::default(),
        };
        assert_eq!(
            copy.to_string(),
            "the device's copying 17 bytes at 0x5000 to 0x9000 (policy migrate)"
        );
        let faults = Attempt::Fault {
            faults: 3,
            policy: Policy::Map,
            mapped_pages: 1,
        };
        let error = Error::call(Path::new("/dev/hmm_gpu0"), faults, Errno::NODEV).to_string();
        assert!(
            error.starts_with(
                "servicing 3 device faults (policy map) on /dev/hmm_gpu0: the device has been unbound (1 page mapped before \
                 that); "
            ),
            "{error}"
        );
    }

    #[test]
    fn a_fault_that_was_not_serviced_says_why_and_what_to_do() {
        use Errno as E;
        let fault = DeviceFault {
            addr: 0x5000,
            access: crate::Access::Write,
        };
        let text = |errno| Error::Fault { fault, errno }.to_string();
        assert_eq!(
            text(E::ACCESS),
            "the device's write at 0x5000 was not serviced: the mapping there does not allow it; the device may do what the \
             process may: see `mprotect` (Permission denied (os error 13))"
        );
        for errno in [
            E::FAULT,
            E::ACCESS,
            E::BUSY,
            E::NOSPC,
            E::NOMEM,
            E::HWPOISON,
            E::CANCELED,
        ] {
            assert!(text(errno).contains("; "), "{}", text(errno));
        }
    }

    #[test]
    fn every_documented_error_of_an_access_says_what_to_do() {
        use Errno as E;
        let documented = [
            E::INVAL,
            E::FAULT,
            E::ACCESS,
            E::AGAIN,
            E::BUSY,
            E::NOSPC,
            E::NOMEM,
            E::HWPOISON,
            E::INTR,
            E::NODEV,
            E::PERM,
        ];
        let texts = documented.map(|errno| {
            let text = accessing(errno, Some(0x5000), 0).to_string();
            assert!(text.contains("; ") && text.contains("(os error "), "{text}");
            text
        });
        let apart: std::collections::BTreeSet<&String> = texts.iter().collect();
        assert_eq!(apart.len(), documented.len());
    }

    #[test]
    fn every_documented_error_of_an_atomic_operation_says_what_to_do() {
        use Errno as E;
        let documented = [
            E::INVAL,
            E::FAULT,
            E::ACCESS,
            E::OPNOTSUPP,
            E::BUSY,
            E::NOSPC,
            E::NOMEM,
            E::NODEV,
            E::PERM,
            E::NOTTY,
        ];
        let texts = documented.map(|errno| {
            let attempt = Attempt::Atomic {
                operation: AtomicOperation::FetchAdd(1),
                addr: 0x7f12_3456_7008,
                bytes: 8,
                policy: Policy::Map,
                faults: 2,
            };
            let text = Error::call(Path::new("/dev/hmm_gpu0"), attempt, errno).to_string();
            assert!(text.contains("; ") && text.contains("(os error "), "{text}");
            text
        });
        assert_eq!(
            texts[3],
            "the device's fetch_add(0x1) on 8 bytes at 0x7f1234567008 (policy map) on /dev/hmm_gpu0: the page is shared or a \
             file's, and the kernel gives such to no device (2 device faults before that); use private memory (`Box`, `Vec`, \
             `SharedBuf`) (Operation not supported (os error 95))"
        );
        let apart: std::collections::BTreeSet<&String> = texts.iter().collect();
        assert_eq!(apart.len(), documented.len());
    }

    #[test]
    fn lengths_that_a_short_form_hides_are_given_in_full() {
        assert_eq!(exact(4096), "4 KiB");
        assert_eq!(exact(17), "17 bytes");
        assert_eq!(exact(4097), "4 KiB (0x1001)");
        assert_eq!(exact((6 << 20) + (1 << 19)), "6.5 MiB (0x680000)");
    }

    #[test]
    fn errors_before_any_call_name_the_device() {
        let path = || PathBuf::from("/dev/hmm_gpu3");
        let text = Error::Open {
            path: path(),
            errno: Errno::ACCESS,
        }
        .to_string();
        assert!(
            text.contains("/dev/hmm_gpu3") && text.contains("group `render`"),
            "{text}"
        );
        let text = Error::DriverTooOld {
            path: path(),
            found: 0,
            needed: 1,
        }
        .to_string();
        assert!(
            text.contains("/dev/hmm_gpu3 has interface 0, this library needs 1"),
            "{text}"
        );
        assert_eq!(
            Error::NoSuchUnit { unit: 32 }.to_string(),
            "there is no device 32: units are 0 to 31"
        );
    }

    #[test]
    fn an_io_error_keeps_the_kind_and_the_text() {
        let error = std::io::Error::from(moving(Moved::default(), Errno::NOSPC));
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("/dev/hmm_gpu0"));
    }
}
