//! A stand-in for the kernel crate: its containers, over those of the standard library, and its errors.
//!
//! As in the kernel, a vector has exactly the room that was asked for, and any allocation may fail: see [`fail_allocation`].

use std::cell::Cell;

thread_local! {
    /// Allocations that succeed before one fails.
    static UNTIL_FAILURE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Lets the allocation after `count` others fail, once, on this thread. `None`: none fails.
pub(crate) fn fail_allocation(count: Option<usize>) {
    UNTIL_FAILURE.set(count);
}

fn allocate() -> Result<(), alloc::AllocError> {
    let left = UNTIL_FAILURE.get();
    UNTIL_FAILURE.set(left.and_then(|left| left.checked_sub(1)));
    match left {
        Some(0) => Err(alloc::AllocError),
        _ => Ok(()),
    }
}

/// `kernel::alloc`.
pub(crate) mod alloc {
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Flags;

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct AllocError;

    pub(crate) const GFP_KERNEL: Flags = Flags;
}

/// `kernel::prelude`.
pub(crate) mod prelude {
    use std::ops::{Deref, DerefMut};

    pub(crate) use super::alloc::GFP_KERNEL;
    use super::alloc::{AllocError, Flags};
    use super::allocate;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Error(i32);

    pub(crate) const EINVAL: Error = Error(-22);
    pub(crate) const ENOMEM: Error = Error(-12);
    pub(crate) const EIO: Error = Error(-5);
    pub(crate) const ENOSPC: Error = Error(-28);

    pub(crate) type Result<T = (), E = Error> = std::result::Result<T, E>;

    impl From<AllocError> for Error {
        fn from(_: AllocError) -> Self {
            ENOMEM
        }
    }

    impl From<std::num::TryFromIntError> for Error {
        fn from(_: std::num::TryFromIntError) -> Self {
            EINVAL
        }
    }

    /// `Vec<T, Kmalloc>` and `Vec<T, KVmalloc>`.
    pub(crate) struct KVec<T> {
        values: Vec<T>,
        capacity: usize,
    }

    pub(crate) type KVVec<T> = KVec<T>;

    #[derive(Debug)]
    pub(crate) struct PushError;

    #[derive(Debug)]
    pub(crate) struct RemoveError;

    impl<T> Default for KVec<T> {
        fn default() -> Self {
            Self::new()
        }
    }

    impl<T> KVec<T> {
        pub(crate) const fn new() -> Self {
            Self {
                values: Vec::new(),
                capacity: 0,
            }
        }

        pub(crate) fn retain(&mut self, f: impl FnMut(&mut T) -> bool) {
            self.values.retain_mut(f);
        }

        pub(crate) fn with_capacity(capacity: usize, _: Flags) -> Result<Self, AllocError> {
            allocate()?;
            let values = Vec::with_capacity(capacity);
            Ok(Self { values, capacity })
        }

        pub(crate) fn from_elem(value: T, count: usize, flags: Flags) -> Result<Self, AllocError>
        where
            T: Clone,
        {
            let mut these = Self::with_capacity(count, flags)?;
            these.values.resize(count, value);
            Ok(these)
        }

        pub(crate) fn push(&mut self, value: T, _: Flags) -> Result<(), AllocError> {
            if self.values.len() == self.capacity {
                allocate()?;
                self.capacity = (2 * self.capacity).max(4);
            }
            self.values.push(value);
            Ok(())
        }

        pub(crate) fn push_within_capacity(&mut self, value: T) -> Result<(), PushError> {
            if self.values.len() == self.capacity {
                return Err(PushError);
            }
            self.values.push(value);
            Ok(())
        }

        pub(crate) fn pop(&mut self) -> Option<T> {
            self.values.pop()
        }

        pub(crate) fn remove(&mut self, at: usize) -> Result<T, RemoveError> {
            if at >= self.values.len() {
                return Err(RemoveError);
            }
            Ok(self.values.remove(at))
        }
    }

    impl<T> Deref for KVec<T> {
        type Target = [T];

        fn deref(&self) -> &[T] {
            &self.values
        }
    }

    impl<T> DerefMut for KVec<T> {
        fn deref_mut(&mut self) -> &mut [T] {
            &mut self.values
        }
    }

    /// `Box<T, Kmalloc>`.
    pub(crate) struct KBox<T>(Box<T>);

    impl<T> KBox<T> {
        pub(crate) fn new(value: T, _: Flags) -> Result<Self, AllocError> {
            allocate()?;
            Ok(Self(Box::new(value)))
        }
    }

    impl<T> Deref for KBox<T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.0
        }
    }

    impl<T> DerefMut for KBox<T> {
        fn deref_mut(&mut self) -> &mut T {
            &mut self.0
        }
    }
}
