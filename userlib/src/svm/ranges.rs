//! Where the memory that arguments name is for the device: a sorted list of ranges, for kernels to translate by.

use crate::range::PAGE_BYTES;

/// Memory that a dispatch may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Named {
    pub(crate) begin: usize,
    pub(crate) end: usize,
    pub(crate) write: bool,
}

impl Named {
    /// The pages that it lies on.
    pub(crate) fn pages(self) -> Self {
        Self {
            begin: self.begin & !(PAGE_BYTES - 1),
            end: self.end.next_multiple_of(PAGE_BYTES),
            write: self.write,
        }
    }
}

/// Sorts, and joins what overlaps, or touches and is alike. What is empty is left out.
pub(crate) fn join(mut all: Vec<Named>) -> Vec<Named> {
    all.retain(|named| named.begin < named.end);
    all.sort_unstable();
    let mut joined: Vec<Named> = Vec::with_capacity(all.len());
    for named in all {
        match joined.last_mut() {
            Some(last)
                if named.begin < last.end
                    || (named.begin == last.end && named.write == last.write) =>
            {
                last.end = last.end.max(named.end);
                last.write |= named.write;
            }
            _ => joined.push(named),
        }
    }
    joined
}

/// What alignment a range keeps in a buffer: values of any type of the shaders are aligned there as they are here.
const KEPT: usize = 64;

/// Places ranges one after the other in a buffer: the offset of each, and how long the buffer is.
pub(crate) fn lay_out(ranges: &[Named]) -> (Vec<usize>, usize) {
    let mut end = 0_usize;
    let offsets = ranges
        .iter()
        .map(|range| {
            let offset = end.next_multiple_of(KEPT) + range.begin % KEPT;
            end = offset + (range.end - range.begin);
            offset
        })
        .collect();
    (offsets, end)
}

/// `SvmRange` of `hmm_svm.glsl`, as four words: the first is that of nothing, so that there is one before any address.
pub(crate) fn table(ranges: &[Named], deltas: &[u64]) -> Vec<[u64; 4]> {
    std::iter::once([0; 4])
        .chain(ranges.iter().zip(deltas).map(|(range, &delta)| {
            [
                range.begin as u64,
                range.end as u64,
                delta,
                u64::from(range.write),
            ]
        }))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    fn named(begin: usize, end: usize, write: bool) -> Named {
        Named { begin, end, write }
    }

    #[test]
    fn what_is_alike_is_joined_and_what_is_not_stays_apart() {
        let joined = join(vec![
            named(30, 40, true),
            named(0, 10, false),
            named(10, 20, false),
            named(20, 30, false),
            named(50, 50, true),
        ]);
        assert_eq!(joined, [named(0, 30, false), named(30, 40, true)]);
        // What overlaps must be one: an address is in one range only.
        assert_eq!(
            join(vec![named(0, 10, false), named(5, 8, true)]),
            [named(0, 10, true)]
        );
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches an address that is lost, that is in two ranges, or that may be written to where it was not named so.
        #[test]
        fn every_byte_that_was_named_is_in_one_range(all in prop::collection::vec((0_usize..200, 0_usize..40, any::<bool>()), 0..20)) {
            let all: Vec<_> = all.into_iter().map(|(begin, len, write)| named(begin, begin + len, write)).collect();
            let joined = join(all.clone());
            for byte in 0..250 {
                let inside = |range: &&Named| range.begin <= byte && byte < range.end;
                let of: Vec<_> = joined.iter().filter(inside).collect();
                prop_assert_eq!(of.len(), usize::from(all.iter().any(|range| inside(&range))));
                if all.iter().filter(inside).any(|range| range.write) {
                    prop_assert!(of[0].write);
                }
            }
            let (offsets, len) = lay_out(&joined);
            let mut end = 0;
            for (range, &offset) in joined.iter().zip(&offsets) {
                prop_assert!(offset >= end && offset % KEPT == range.begin % KEPT);
                end = offset + (range.end - range.begin);
            }
            prop_assert_eq!(end, len);
        }
    }
}
