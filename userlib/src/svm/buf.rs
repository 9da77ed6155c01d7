//! Memory that Vulkan has, where the program has it too.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;

use super::SvmError;
use crate::sys::svm::MappedRange;
use crate::sys::vulkan::{Buffer, Gpu, Place};
use crate::Error;

/// The buffers of a context.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<Vec<MappedRange>>);

impl Registry {
    pub(crate) fn ranges(&self) -> Vec<MappedRange> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<MappedRange>)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// A slice in Vulkan's own host-visible memory: [`SvmContext::buffer`](crate::SvmContext::buffer). It begins as zeroes, and derefs to `[T]`.
///
/// What a dispatch of that context names of it is used where it is, without a copy. It is no memory that migrates: a translated
/// kernel cannot use it.
pub struct SvmBuf<T: Pod> {
    buffer: Buffer,
    registry: Arc<Registry>,
    values: std::marker::PhantomData<T>,
}

impl<T: Pod> SvmBuf<T> {
    pub(super) fn new(gpu: &Arc<Gpu>, registry: &Arc<Registry>, len: usize) -> Result<Self, Error> {
        let refused = |answer: String| SvmError::Vulkan {
            attempt: "a buffer",
            answer,
        };
        let bytes = len
            .checked_mul(size_of::<T>())
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or_else(|| {
                refused(format!(
                    "{len} values of {} bytes cannot be counted",
                    size_of::<T>()
                ))
            })?;
        let mut buffer = Buffer::new(gpu, "a program's", bytes, Place::Back)?;
        buffer.bytes_mut().fill(0);
        let begin = buffer.bytes().as_ptr() as usize;
        if buffer.bytes().len() != bytes
            || bytemuck::try_cast_slice::<u8, T>(buffer.bytes()).is_err()
        {
            return Err(refused(String::from("it is not mapped as these values want it")).into());
        }
        registry.change(|ranges| {
            ranges.push(MappedRange {
                begin,
                end: begin + bytes,
                addr: buffer.addr(),
            });
        });
        Ok(Self {
            buffer,
            registry: Arc::clone(registry),
            values: std::marker::PhantomData,
        })
    }
}

impl<T: Pod> Drop for SvmBuf<T> {
    fn drop(&mut self) {
        let addr = self.buffer.addr();
        self.registry
            .change(|ranges| ranges.retain(|range| range.addr != addr));
    }
}

impl<T: Pod> Deref for SvmBuf<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(self.buffer.bytes())
    }
}

impl<T: Pod> DerefMut for SvmBuf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.buffer.bytes_mut())
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for SvmBuf<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SvmBuf").field(&&**self).finish()
    }
}
