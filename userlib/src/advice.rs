//! What a program says of its memory, for where the driver has it be.

use std::fmt;

use rustix::io::retry_on_intr;

use crate::uapi::{self, hmm_gpu_advise};
use crate::{Attempt, Bytes, Device, Error, PageRange, Target};

/// What is known of memory: a hint for where its pages are to be, see [`Device::advise`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// Nothing is, any more.
    Reset,
    /// Where it is best. Device faults move it there, or leave it, whatever their [`Policy`](crate::Policy) says.
    /// `None`: wherever it is used.
    Location(Option<Target>),
    /// Whether it is read much more than written: then it stays in system memory, and the device maps it for reading only,
    /// until it writes.
    ReadMostly(bool),
    /// Whether it is to stay out of VRAM, also when [`Device::prefetch`] asks (which counts it as skipped).
    NoMigrate(bool),
    /// How many bytes device faults move together, aligned to as many: a power of two from 4096 to 2 MiB. `None`: just what
    /// is named.
    Granularity(Option<usize>),
}

impl Advice {
    /// The number of the advice, and its value.
    fn to_uapi(self) -> (u32, u64) {
        match self {
            Advice::Reset => (uapi::HMM_GPU_ADVICE_RESET, 0),
            Advice::Location(location) => (
                uapi::HMM_GPU_ADVICE_LOCATION,
                match location {
                    None => uapi::HMM_GPU_LOCATION_NONE,
                    Some(Target::System) => uapi::HMM_GPU_LOCATION_SYSTEM,
                    Some(Target::Device) => uapi::HMM_GPU_LOCATION_DEVICE,
                },
            ),
            Advice::ReadMostly(yes) => (uapi::HMM_GPU_ADVICE_READ_MOSTLY, yes.into()),
            Advice::NoMigrate(yes) => (uapi::HMM_GPU_ADVICE_NO_MIGRATE, yes.into()),
            Advice::Granularity(bytes) => {
                (uapi::HMM_GPU_ADVICE_GRANULARITY, bytes.unwrap_or(0) as u64)
            }
        }
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Advice::Reset => f.write_str("no advice"),
            Advice::Location(None) => f.write_str("location: any"),
            Advice::Location(Some(target)) => write!(f, "location: {target}"),
            Advice::ReadMostly(yes) => write!(f, "read-mostly: {yes}"),
            Advice::NoMigrate(yes) => write!(f, "no-migrate: {yes}"),
            Advice::Granularity(None) => f.write_str("granularity: as named"),
            Advice::Granularity(Some(bytes)) => {
                write!(f, "granularity: {}", Bytes(*bytes as u64))
            }
        }
    }
}

impl Device {
    /// Says what is known of the memory that a slice lies on, whole pages. Moves nothing: it changes what later calls and device
    /// faults do.
    ///
    /// A hint, never needed for the result of a program. It holds for this device as opened here, until that is dropped or the
    /// memory is unmapped; a forked child has none. One advice replaces another of its own kind only.
    ///
    /// A slice without bytes is no call.
    ///
    /// Errors: [`Call`](Error::Call) with the driver's `EINVAL` (a granularity that is none), `E2BIG` (more than 1024 ranges would
    /// have advice of their own), `ENOMEM`, `ENODEV`, `EPERM`.
    ///
    /// ```no_run
    /// use hmm_gpu::{Advice, Device, Target};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let table = vec![1_u32; 1 << 20];
    /// device.advise(&table, Advice::ReadMostly(true))?;
    /// let work = vec![0_u32; 1 << 20];
    /// device.advise(&work, Advice::Location(Some(Target::Device)))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn advise<T>(&self, data: &[T], advice: Advice) -> Result<(), Error> {
        let range = PageRange::of(data);
        if range.is_empty() {
            return Ok(());
        }
        self.advise_range(range.addr(), range.bytes(), advice)
    }

    /// As [`advise`](Self::advise), for an address and a length in bytes that reach the driver as they are. The driver's `ADVISE`.
    ///
    /// Errors: those of `advise`, and `EINVAL` (not whole pages, or none), `EFAULT` (not all of it is mapped, or it leaves user
    /// space).
    pub fn advise_range(&self, addr: usize, bytes: usize, advice: Advice) -> Result<(), Error> {
        let (number, value) = advice.to_uapi();
        let mut argument = hmm_gpu_advise {
            addr: addr as u64,
            len: bytes as u64,
            advice: number,
            value,
            ..Default::default()
        };
        let attempt = Attempt::Advise {
            addr,
            bytes,
            advice,
        };
        retry_on_intr(|| self.file().advise(&mut argument))
            .map_err(|errno| Error::call(self.path(), attempt, errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_advice_has_a_number_and_a_text_of_its_own() {
        let all = [
            Advice::Reset,
            Advice::Location(None),
            Advice::Location(Some(Target::System)),
            Advice::Location(Some(Target::Device)),
            Advice::ReadMostly(false),
            Advice::ReadMostly(true),
            Advice::NoMigrate(false),
            Advice::NoMigrate(true),
            Advice::Granularity(None),
            Advice::Granularity(Some(4096)),
            Advice::Granularity(Some(2 << 20)),
        ];
        for (i, one) in all.iter().enumerate() {
            for other in &all[i + 1..] {
                assert_ne!(one.to_uapi(), other.to_uapi());
                assert_ne!(one.to_string(), other.to_string());
            }
        }
        assert_eq!(
            Advice::Granularity(Some(65536)).to_string(),
            "granularity: 64 KiB"
        );
    }
}
