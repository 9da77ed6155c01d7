//! Memory made to be used from both sides.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

use crate::range::PAGE_BYTES;
use crate::sys::mapping::Mapping;
use crate::{
    Access, Device, DeviceFault, Error, Faulted, Moved, PageRange, Policy, Residency, Snapshot,
    Target,
};

/// Bytes of a huge page.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Where a [`SharedBuf`] begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Alignment {
    /// At a page.
    #[default]
    Page,
    /// At a multiple of 2 MiB, and the kernel is asked for huge pages (`madvise(MADV_HUGEPAGE)`). It may have none.
    HugePage,
}

/// A slice in pages of its own, for memory that both sides use. It begins as zeroes, and derefs to `[T]`.
///
/// Any slice of ordinary memory can be moved, see [`Device::prefetch`]. What this adds: nothing else lies on its pages, so
/// nothing else moves with it and no neighbour's touch brings it back; and its values are plain data
/// ([`Pod`]: no padding, every bit pattern valid), which a device can read and write.
///
/// It owns private anonymous memory: populated when first touched, copied on write after `fork`, and unmapped (in system
/// memory as well as in VRAM) when dropped.
///
/// ```no_run
/// use hmm_gpu::{Device, Place, SharedBuf};
///
/// # fn main() -> Result<(), hmm_gpu::Error> {
/// let device = Device::open_first()?;
/// let mut words = SharedBuf::<u32>::zeroed(1 << 20)?;
/// words[7] = 7;
/// words.to_device(&device)?;
/// assert!(words.residency(&device)?.all(Place::Device));
/// assert_eq!(words[7], 7); // the CPU's touch brings this page back, and only this one
/// # Ok(())
/// # }
/// ```
pub struct SharedBuf<T: Pod> {
    pages: Mapping<T>,
}

impl<T: Pod> SharedBuf<T> {
    /// `len` values, all zero, beginning at a page. No memory is taken before they are touched or moved.
    ///
    /// Errors: [`Memory`](Error::Memory).
    pub fn zeroed(len: usize) -> Result<Self, Error> {
        Self::zeroed_at(len, Alignment::Page)
    }

    /// As [`zeroed`](Self::zeroed), beginning where `alignment` says.
    pub fn zeroed_at(len: usize, alignment: Alignment) -> Result<Self, Error> {
        let align = match alignment {
            Alignment::Page => PAGE_BYTES,
            Alignment::HugePage => HUGE_PAGE_BYTES,
        };
        let mut pages = Mapping::new(len, align).map_err(|errno| Error::Memory {
            values: len,
            value_bytes: size_of::<T>(),
            errno,
        })?;
        if alignment == Alignment::HugePage {
            pages.prefer_huge_pages();
        }
        Ok(Self { pages })
    }

    /// A copy of `values`.
    ///
    /// Errors: [`Memory`](Error::Memory).
    pub fn from_slice(values: &[T]) -> Result<Self, Error> {
        let mut buf = Self::zeroed(values.len())?;
        buf.copy_from_slice(values);
        Ok(buf)
    }

    /// The pages it owns.
    pub fn range(&self) -> PageRange {
        PageRange::of(self)
    }

    /// Moves it to a device's VRAM: [`Device::prefetch`] with [`Target::Device`].
    pub fn to_device(&self, device: &Device) -> Result<Moved, Error> {
        device.prefetch(self, Target::Device)
    }

    /// Moves it to system memory, from whichever device's VRAM: [`Device::prefetch`] with [`Target::System`].
    pub fn to_system(&self, device: &Device) -> Result<Moved, Error> {
        device.prefetch(self, Target::System)
    }

    /// Where its pages are: [`Device::residency`].
    pub fn residency(&self, device: &Device) -> Result<Residency, Error> {
        device.residency(self)
    }

    /// What is at its pages, and what the device page table has for them: [`Device::snapshot`].
    pub fn snapshot(&self, device: &Device) -> Result<Snapshot, Error> {
        device.snapshot(self)
    }

    /// Maps all of it for the device, so that the device does not fault on it: [`Device::fault`] for each of its pages, and an
    /// error if one was not mapped.
    pub fn map_for(
        &self,
        device: &Device,
        access: Access,
        policy: Policy,
    ) -> Result<Faulted, Error> {
        let faults: Vec<_> = DeviceFault::each_page(self, access).collect();
        let faulted = device.fault(&faults, policy)?;
        faulted.complete()?;
        Ok(faulted)
    }
}

impl<T: Pod> Deref for SharedBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.pages.as_slice()
    }
}

impl<T: Pod> DerefMut for SharedBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.pages.as_mut_slice()
    }
}

impl<T: Pod> AsRef<[T]> for SharedBuf<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T: Pod> AsMut<[T]> for SharedBuf<T> {
    fn as_mut(&mut self) -> &mut [T] {
        self
    }
}

/// Where it is and how long, not what is in it: to read it would bring it back.
impl<T: Pod> fmt::Debug for SharedBuf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedBuf")
            .field("ptr", &self.as_ptr())
            .field("len", &self.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_slice_of_zeroes_that_keeps_what_is_written() {
        let mut buf = SharedBuf::<u32>::zeroed(10_000).unwrap();
        assert!(buf.iter().all(|&value| value == 0));
        buf.iter_mut().zip(0..).for_each(|(value, n)| *value = n);
        assert_eq!(buf[9_999], 9_999);
        assert_eq!(buf.range().addr(), buf.as_ptr() as usize);
        assert_eq!(buf.range().pages(), 10);
    }

    #[test]
    fn a_copy_is_equal_and_apart() {
        let values = [1u64, 2, 3];
        let mut buf = SharedBuf::from_slice(&values).unwrap();
        assert_eq!(*buf, values);
        buf[0] = 9;
        assert_eq!(values[0], 1);
    }

    #[test]
    fn huge_page_alignment_is_kept() {
        for len in [1, HUGE_PAGE_BYTES + 1] {
            let buf = SharedBuf::<u8>::zeroed_at(len, Alignment::HugePage).unwrap();
            assert_eq!(buf.as_ptr() as usize % HUGE_PAGE_BYTES, 0);
            assert_eq!(buf.len(), len);
        }
    }

    #[test]
    fn it_goes_to_other_threads_as_its_values_do() {
        fn both<T: Send + Sync>() {}
        both::<SharedBuf<u64>>();
        let buf = SharedBuf::from_slice(&[5u8; 5000]).unwrap();
        std::thread::spawn(move || assert!(buf.iter().all(|&value| value == 5)))
            .join()
            .unwrap();
    }

    #[test]
    fn too_many_values_are_an_error_that_says_so() {
        let error = SharedBuf::<u64>::zeroed(usize::MAX).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot have 18446744073709551615 values of 8 bytes"),
            "{error}"
        );
    }

    #[test]
    fn values_without_bytes_need_no_memory() {
        assert!(SharedBuf::<u64>::zeroed(0).unwrap().is_empty());
        assert_eq!(SharedBuf::<()>::zeroed(3).unwrap().len(), 3);
        assert!(SharedBuf::<()>::zeroed(3).unwrap().range().is_empty());
    }

    #[test]
    fn showing_it_reads_nothing_of_it() {
        let shown = format!("{:?}", SharedBuf::<u8>::zeroed(3).unwrap());
        assert!(
            shown.starts_with("SharedBuf { ptr: 0x") && shown.ends_with(", len: 3 }"),
            "{shown}"
        );
    }
}
