//! Pages and bytes.

use std::fmt;

use crate::uapi;

/// Bytes of a page.
pub(crate) const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == uapi::HMM_GPU_PAGE_BYTES);

/// Whole pages: all that some bytes lie on.
///
/// Pages move, not bytes. So what lies beside a small value moves with it; that is invisible to a program, because addresses
/// and bytes stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    addr: usize,
    bytes: usize,
}

impl PageRange {
    /// The pages that a slice lies on; none for one without bytes.
    pub fn of<T>(slice: &[T]) -> Self {
        Self::covering(slice.as_ptr() as usize, size_of_val(slice))
    }

    /// The pages that `bytes` bytes at `addr` lie on; none if `bytes` is 0.
    ///
    /// A range that would wrap around the end of the address space ends at its last page.
    pub fn covering(addr: usize, bytes: usize) -> Self {
        let start = addr - addr % PAGE_BYTES;
        if bytes == 0 {
            return Self {
                addr: start,
                bytes: 0,
            };
        }
        let last = addr.saturating_add(bytes - 1);
        // The end may be one byte more than a usize counts, the length never is: `start` is 0 then for all memory only.
        let bytes = (last - last % PAGE_BYTES - start).saturating_add(PAGE_BYTES);
        Self { addr: start, bytes }
    }

    /// Address of the first page.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Length in pages.
    pub fn pages(&self) -> usize {
        self.bytes / PAGE_BYTES
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

/// A number of bytes, shown as a person says it: `4 KiB`, `1.5 MiB`, `17 bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = match self.0.checked_ilog2().unwrap_or(0) {
            0..10 => return f.pad(&format!("{} bytes", self.0)),
            10..20 => (1u64 << 10, "KiB"),
            20..30 => (1 << 20, "MiB"),
            30..40 => (1 << 30, "GiB"),
            _ => (1 << 40, "TiB"),
        };
        let (whole, rest) = (self.0 / unit, self.0 % unit);
        // Rounded down: a progress report must not say more than was done.
        match rest * 10 / unit {
            0 => f.pad(&format!("{whole} {name}")),
            tenths => f.pad(&format!("{whole}.{tenths} {name}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    fn covering(addr: usize, bytes: usize) -> (usize, usize) {
        let range = PageRange::covering(addr, bytes);
        (range.addr(), range.bytes())
    }

    #[test]
    fn a_range_is_rounded_outward() {
        assert_eq!(covering(0x5000, 0x1000), (0x5000, 0x1000));
        assert_eq!(covering(0x5001, 1), (0x5000, 0x1000));
        assert_eq!(covering(0x5fff, 1), (0x5000, 0x1000));
        assert_eq!(covering(0x5fff, 2), (0x5000, 0x2000));
        assert_eq!(covering(0x5800, 0x1000), (0x5000, 0x2000));
        assert_eq!(covering(0x5000, 0x1001), (0x5000, 0x2000));
    }

    #[test]
    fn no_bytes_are_no_pages() {
        assert!(PageRange::covering(0x5123, 0).is_empty());
        assert!(PageRange::of::<u64>(&[]).is_empty());
        assert!(PageRange::of(&[(), (), ()]).is_empty());
    }

    #[test]
    fn the_end_of_the_address_space_does_not_wrap() {
        let last = usize::MAX - (PAGE_BYTES - 1);
        assert_eq!(covering(usize::MAX, 1), (last, PAGE_BYTES));
        assert_eq!(covering(last, usize::MAX), (last, PAGE_BYTES));
        assert_eq!(covering(0, usize::MAX).0, 0);
    }

    #[test]
    fn the_pages_of_a_slice_hold_all_of_it() {
        let data = vec![0u16; 10_000];
        let range = PageRange::of(&data);
        assert!(range.addr() <= data.as_ptr() as usize);
        assert!(range.addr() + range.bytes() >= data.as_ptr() as usize + 20_000);
        assert!(range.pages() <= 6);
    }

    #[test]
    fn bytes_read_as_a_person_says_them() {
        let shown: Vec<String> = [
            0,
            17,
            1023,
            1024,
            1536,
            4096,
            16 << 20,
            (3 << 30) + (1 << 29),
            5 << 40,
        ]
        .map(|n| Bytes(n).to_string())
        .to_vec();
        let expected = [
            "0 bytes",
            "17 bytes",
            "1023 bytes",
            "1 KiB",
            "1.5 KiB",
            "4 KiB",
            "16 MiB",
            "3.5 GiB",
            "5 TiB",
        ];
        assert_eq!(shown, expected);
        assert_eq!(Bytes((1 << 20) - 1).to_string(), "1023.9 KiB");
        assert_eq!(format!("{:>8}", Bytes(4096)), "   4 KiB");
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches a byte that is left out, a page too many, and arithmetic that wraps.
        #[test]
        fn pages_cover_the_bytes_and_no_more(
            addr in prop_oneof![any::<usize>(), 0..1usize << 47, usize::MAX - 10_000..],
            bytes in prop_oneof![1..20_000usize, 1..usize::MAX],
        ) {
            let range = PageRange::covering(addr, bytes);
            let page = PAGE_BYTES as u128;
            let start = addr as u128 / page * page;
            let end = (addr as u128 + bytes as u128).div_ceil(page) * page;
            let end = end.min(1 << usize::BITS);
            prop_assert_eq!(range.addr() as u128, start);
            // All of memory has one byte more than a usize counts.
            prop_assert_eq!(range.bytes() as u128, (end - start).min(usize::MAX as u128));
            prop_assert_eq!(range.pages(), range.bytes() / PAGE_BYTES);
        }

        /// Catches a length that is said to be more than it is, or that loses more than the tenth that is not shown.
        #[test]
        fn a_length_is_never_said_to_be_more(bytes in prop_oneof![any::<u64>(), 0..1u64 << 40, 0..1u64 << 20]) {
            let shown = Bytes(bytes).to_string();
            let (number, unit) = shown.split_once(' ').unwrap();
            let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
            let unit = match unit {
                "bytes" => 1u128,
                "KiB" => 1 << 10,
                "MiB" => 1 << 20,
                "GiB" => 1 << 30,
                _ => 1 << 40,
            };
            let tenths = whole.parse::<u128>().unwrap() * 10 + tenths.parse::<u128>().unwrap();
            let bytes = u128::from(bytes) * 10;
            prop_assert!(tenths * unit <= bytes && bytes < (tenths + 1) * unit.max(10), "{}", shown);
        }
    }
}
