// SPDX-License-Identifier: GPL-2.0

//! Sorting.

use crate::sys::bindings;

/// Sorts pairs, by the first and then by the second of each (`sort`).
///
/// The sorts of `core` have paths that panic, should an order contradict itself.
pub(crate) fn sort_pairs(pairs: &mut [[u64; 2]]) {
    // SAFETY: The array is ours alone, and its elements are of the type that is sorted.
    unsafe { bindings::hmm_gpu_sort_pairs(pairs.as_mut_ptr(), pairs.len()) };
}
