//! Memory that a dispatch may reach, for who copies it.

use std::ptr::NonNull;

use crate::svm::ranges::Named;

/// Memory of the program that is borrowed for a dispatch.
///
/// # Invariants
///
/// Who makes one keeps the borrow for as long as it is: [`Args`](crate::Args) has it as a lifetime. `write` only if it is borrowed alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reach {
    start: NonNull<u8>,
    bytes: usize,
    write: bool,
}

// SAFETY: it gives out copies of the bytes only; that others do not change them meanwhile is in its invariant.
unsafe impl Send for Reach {}
// SAFETY: as above.
unsafe impl Sync for Reach {}

impl Reach {
    pub(crate) fn of<T: ?Sized>(value: &T) -> Self {
        let start = NonNull::from(value).cast::<u8>();
        let _ = start.as_ptr().expose_provenance();
        Self {
            start,
            bytes: size_of_val(value),
            write: false,
        }
    }

    pub(crate) fn of_mut<T: ?Sized>(value: &mut T) -> Self {
        let bytes = size_of_val(value);
        let start = NonNull::from(value).cast::<u8>();
        let _ = start.as_ptr().expose_provenance();
        Self {
            start,
            bytes,
            write: true,
        }
    }

    pub(crate) fn named(&self) -> Named {
        let begin = self.start.as_ptr().addr();
        Named {
            begin,
            end: begin + self.bytes,
            write: self.write,
        }
    }

    /// Copies all of it to the beginning of `to`, as far as that goes.
    pub(crate) fn copy_to(&self, to: &mut [u8]) {
        let bytes = self.bytes.min(to.len());
        // SAFETY: it is borrowed, so its bytes are there, and not `to`'s. They are copied as they are, padding too.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr(), to.as_mut_ptr(), bytes) };
    }

    /// Copies the beginning of `from` to all of it, if it may be written to.
    pub(crate) fn copy_from(&self, from: &[u8]) {
        if !self.write {
            return;
        }
        let bytes = self.bytes.min(from.len());
        // SAFETY: it is borrowed alone. That what is written is valid there is the promise of who dispatches.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.start.as_ptr(), bytes) };
    }
}
