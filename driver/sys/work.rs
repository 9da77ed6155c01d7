// SPDX-License-Identifier: GPL-2.0

//! Work that is done later, on a thread of the kernel's own: what the kernel crate lacks of it.

use crate::sys::bindings;
use kernel::{
    sync::Arc,
    workqueue::{HasWork, Work},
};

/// Waits until the work of `item` is neither waiting nor running (`flush_work`). Nobody may have it
/// wait again meanwhile.
///
/// To be called before what the work is about goes, and before the module does.
pub(crate) fn flush<T: HasWork<T>>(item: &Arc<T>) {
    let item: *const T = &**item;
    // SAFETY: The item is valid while the reference is, and its work is initialised since it is in
    // an `Arc`. Only the kernel writes to it, under its own locks.
    unsafe {
        let work = T::raw_get_work(item.cast_mut());
        bindings::flush_work(Work::raw_get(work));
    }
}
