// SPDX-License-Identifier: GPL-2.0

//! Lending something that will be taken away.

use core::ops::Deref;
use kernel::{
    new_srcu,
    prelude::*,
    sync::{
        atomic::{Acquire, Atomic, Release},
        srcu, Arc, Srcu,
    },
};

/// Where others find a `T` that somebody else owns, as long as its owner lets them.
///
/// Users may sleep while they have it. The owner's [`Lent`] waits for them when it is dropped.
///
/// # Invariants
///
/// `value` is null, or valid until it has been made null and then all sections of `srcu` that began
/// before have ended.
#[pin_data]
pub(crate) struct Gate<T> {
    value: Atomic<*mut T>,
    #[pin]
    srcu: Srcu,
}

/// A way in through an open [`Gate`].
pub(crate) struct Entered<'a, T> {
    value: &'a T,
    _section: srcu::Guard<'a>,
}

impl<T> Gate<T> {
    /// A gate that is closed.
    fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            try_pin_init!(Self {
                value: Atomic::new(core::ptr::null_mut()),
                srcu <- new_srcu!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Whether the gate is open and leads to `value`.
    pub(crate) fn leads_to(&self, value: &T) -> bool {
        core::ptr::eq(self.value.load(Acquire), value)
    }

    /// The value, until the guard is dropped. Fails with `ENODEV` once it has been taken away.
    ///
    /// The owner waits for the guard: nothing that waits for user space without limit may be done
    /// with it (no user copy).
    pub(crate) fn enter(&self) -> Result<Entered<'_, T>> {
        let section = self.srcu.read_lock();
        let value = self.value.load(Acquire);
        // SAFETY: By the type invariants it is null, or valid until the section ends, which is when
        // the guard is dropped.
        let value = unsafe { value.as_ref() }.ok_or(ENODEV)?;
        Ok(Entered {
            value,
            _section: section,
        })
    }
}

impl<T> Deref for Entered<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

/// Owns a value that others may be lent.
///
/// # Safety
///
/// What `lend` returns is the same at every call, and valid until the owner is dropped, also when
/// the owner is moved.
pub(crate) unsafe trait Lend {
    /// What is lent.
    type Target: Sync;

    /// The value.
    fn lend(&self) -> &Self::Target;

    /// No more will enter: those inside are to come to an end.
    fn closing(&self);
}

/// An owner whose value is lent out through a [`Gate`].
///
/// Dropping it closes the gate, waits for those inside, and then drops the owner.
pub(crate) struct Lent<O: Lend> {
    gate: Arc<Gate<O::Target>>,
    owner: O,
}

impl<O: Lend> Lent<O> {
    /// Opens a new gate to what `owner` lends.
    pub(crate) fn new(owner: O) -> Result<Self> {
        let gate = Gate::new()?;
        // INVARIANT: Valid until the owner is dropped, as `Lend` promises; `drop` does what the
        // gate asks for before that.
        gate.value
            .store(core::ptr::from_ref(owner.lend()).cast_mut(), Release);
        Ok(Self { gate, owner })
    }

    /// The way to the value.
    pub(crate) fn gate(&self) -> &Arc<Gate<O::Target>> {
        &self.gate
    }

    /// The owner.
    pub(crate) fn owner(&self) -> &O {
        &self.owner
    }
}

impl<O: Lend> Drop for Lent<O> {
    fn drop(&mut self) {
        self.gate.value.store(core::ptr::null_mut(), Release);
        self.owner.closing();
        self.gate.srcu.synchronize();
    }
}
