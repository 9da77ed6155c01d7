//! What is at each page, and what the device page table has for it.

use std::fmt;

use crate::error::Attempt;
use crate::look::{look, room};
use crate::range::PAGE_BYTES;
use crate::uapi::{self, hmm_gpu_snapshot};
use crate::{Counts, Device, Error, Page, PageRange, Place, Residency};

/// What was at one page.
///
/// # Invariants
///
/// It is at one place: not on two devices, and on none if nothing is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct SnapshotPage(u64);

/// What a device page table has for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mirrored {
    /// The device may write to it.
    pub writable: bool,
    /// The device has the page to itself, in system memory: then it is at no [`Place`], since no CPU has it.
    pub exclusive: bool,
    /// The entry is for the very page that is there. A driver that keeps its word has no other entries.
    pub current: bool,
}

impl SnapshotPage {
    /// `None` for a word that the interface does not have.
    fn from_uapi(word: u64) -> Option<Self> {
        let places = uapi::HMM_GPU_SNAPSHOT_DEVICE | uapi::HMM_GPU_SNAPSHOT_OTHER_DEVICE;
        let valid = word & uapi::HMM_GPU_SNAPSHOT_VALID != 0;
        let known = match word & places {
            0 => true,
            both if both == places => false,
            _ => valid,
        };
        known.then_some(Self(word))
    }

    fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// The interface's word (`HMM_GPU_SNAPSHOT_*`).
    pub fn bits(self) -> u64 {
        self.0
    }

    /// Where it is.
    pub fn place(self) -> Place {
        if !self.has(uapi::HMM_GPU_SNAPSHOT_VALID) {
            Place::None
        } else if self.has(uapi::HMM_GPU_SNAPSHOT_DEVICE) {
            Place::Device
        } else if self.has(uapi::HMM_GPU_SNAPSHOT_OTHER_DEVICE) {
            Place::OtherDevice
        } else {
            Place::System
        }
    }

    /// Whether it can be written there without a further fault. Not so after `fork`, for example, until it is copied.
    pub fn is_writable(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_VALID) && self.has(uapi::HMM_GPU_SNAPSHOT_WRITABLE)
    }

    /// Whether it is the kernel's page of zeroes, which all memory shares that was read and never written. That is the page of
    /// 4 KiB: the huge one is not told from other memory.
    pub fn is_zero_page(self) -> bool {
        self.has(uapi::HMM_GPU_SNAPSHOT_VALID) && self.has(uapi::HMM_GPU_SNAPSHOT_ZERO)
    }

    /// log2 of the number of pages that it is mapped together with: 0 for a page of its own, 9 for a huge page of 2 MiB.
    pub fn order(self) -> u32 {
        let order = self.0 >> uapi::HMM_GPU_SNAPSHOT_ORDER_SHIFT;
        // CAST: a few bits.
        (order & uapi::HMM_GPU_SNAPSHOT_ORDER_MASK) as u32
    }

    /// The number of the page in the device's VRAM, if it is there: it begins at 4096 times that.
    pub fn vram_page(self) -> Option<u64> {
        (self.place() == Place::Device).then_some(self.0 >> uapi::HMM_GPU_SNAPSHOT_PAGE_SHIFT)
    }

    /// What the device page table of the opened device has for it, if that has an entry.
    pub fn mirrored(self) -> Option<Mirrored> {
        self.has(uapi::HMM_GPU_SNAPSHOT_MIRRORED).then(|| Mirrored {
            writable: self.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_WRITABLE),
            exclusive: self.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE),
            current: self.has(uapi::HMM_GPU_SNAPSHOT_MIRROR_CURRENT),
        })
    }
}

/// `VRAM page 17, writable, mirrored writable`.
impl fmt::Display for SnapshotPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place())?;
        if let Some(page) = self.vram_page() {
            write!(f, " page {page}")?;
        }
        if self.is_zero_page() {
            f.write_str(", zero page")?;
        }
        if self.is_writable() {
            f.write_str(", writable")?;
        }
        if self.order() != 0 {
            write!(f, ", order {}", self.order())?;
        }
        if let Some(mirrored) = self.mirrored() {
            f.write_str(", mirrored")?;
            if mirrored.writable {
                f.write_str(" writable")?;
            }
            if mirrored.exclusive {
                f.write_str(" exclusive")?;
            }
            if !mirrored.current {
                f.write_str(" but stale")?;
            }
        }
        Ok(())
    }
}

/// What was at each page of a range, and what the device page table had for it. Shown as one line of counts.
///
/// Looking moves nothing. Of each 512 pages (2 MiB, from the start of the range on) all were so at the same moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    addr: usize,
    pages: Vec<SnapshotPage>,
}

impl Snapshot {
    /// `None` if a word is none of the interface's.
    fn from_uapi(addr: usize, words: &[u64]) -> Option<Self> {
        let pages = words
            .iter()
            .map(|&word| SnapshotPage::from_uapi(word))
            .collect::<Option<_>>()?;
        Some(Self { addr, pages })
    }

    /// Address of the first page.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// The pages, in the order of their addresses.
    pub fn pages(&self) -> &[SnapshotPage] {
        &self.pages
    }

    /// The page that holds the byte at `addr`, if it is in the range.
    pub fn page_at(&self, addr: usize) -> Option<SnapshotPage> {
        self.pages
            .get(addr.checked_sub(self.addr)? / PAGE_BYTES)
            .copied()
    }

    /// Whether every page is at `place`. True of no pages.
    pub fn all(&self, place: Place) -> bool {
        self.pages.iter().all(|page| page.place() == place)
    }

    /// Pages that the device page table has.
    pub fn mirrored_pages(&self) -> usize {
        self.pages
            .iter()
            .filter(|page| page.mirrored().is_some())
            .count()
    }

    /// How many pages are where.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for page in &self.pages {
            counts.add(page.place(), page.is_writable());
        }
        counts
    }

    /// Where the pages are, without the rest: to be drawn with [`Residency::map`].
    pub fn residency(&self) -> Residency {
        let pages = self.pages.iter();
        Residency::from_pages(
            self.addr,
            pages.map(|page| Page::new(page.place(), page.is_writable())),
        )
    }
}

/// `68 pages: 60 VRAM, 8 RAM; 68 mirrored`.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {} mirrored", self.counts(), self.mirrored_pages())
    }
}

impl Device {
    /// What is at each page that a slice lies on, and what the device page table of this opened device has for it. Moves
    /// nothing, and populates nothing.
    ///
    /// A slice without bytes has no pages and is no call.
    ///
    /// Errors: those of [`residency`](Self::residency), and `ENOTTY` (a driver without
    /// [`Capabilities::MIRROR`](crate::Capabilities::MIRROR)). The answer takes 8 bytes a page.
    ///
    /// ```no_run
    /// use hmm_gpu::{Device, Place, Policy};
    ///
    /// # fn main() -> Result<(), hmm_gpu::Error> {
    /// let device = Device::open_first()?;
    /// let (data, mut seen) = (vec![7u8; 1 << 20], vec![0; 1 << 20]);
    /// device.read(&data, &mut seen, Policy::Map)?; // the device faults, and the pages stay where they are
    /// let snapshot = device.snapshot(&data)?;
    /// println!("{snapshot}"); // 257 pages: 257 RAM; 257 mirrored
    /// assert!(snapshot.pages().iter().all(|page| page.mirrored().is_some()));
    /// # Ok(())
    /// # }
    /// ```
    pub fn snapshot<T>(&self, data: &[T]) -> Result<Snapshot, Error> {
        let range = PageRange::of(data);
        if range.is_empty() {
            return self.decode_snapshot(range.addr(), 0, &[]);
        }
        self.snapshot_range(range.addr(), range.bytes())
    }

    /// As [`snapshot`](Self::snapshot), for an address and a length in bytes that reach the driver as they are, in pieces of
    /// 64 MiB. The driver's `SNAPSHOT`.
    ///
    /// Errors: those of `snapshot`, and `EINVAL` (not whole pages, or none), `EFAULT` (it leaves user space).
    pub fn snapshot_range(&self, addr: usize, bytes: usize) -> Result<Snapshot, Error> {
        let mut words = room::<u64>(bytes)?;
        look(addr, bytes, &mut words, |addr, len, piece| {
            let mut argument = hmm_gpu_snapshot {
                addr,
                len,
                ..Default::default()
            };
            self.file().snapshot(&mut argument, piece)
        })
        .map_err(|errno| Error::call(self.path(), Attempt::Snapshot { addr, bytes }, errno))?;
        self.decode_snapshot(addr, bytes, &words)
    }

    fn decode_snapshot(&self, addr: usize, bytes: usize, words: &[u64]) -> Result<Snapshot, Error> {
        Snapshot::from_uapi(addr, words).ok_or_else(|| {
            let attempt = Attempt::Snapshot { addr, bytes };
            Error::answer(self.path(), attempt, "a page that is at no one place")
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uapi::{
        HMM_GPU_SNAPSHOT_DEVICE as DEVICE, HMM_GPU_SNAPSHOT_MIRRORED as MIRRORED,
        HMM_GPU_SNAPSHOT_MIRROR_CURRENT as CURRENT, HMM_GPU_SNAPSHOT_MIRROR_EXCLUSIVE as EXCLUSIVE,
        HMM_GPU_SNAPSHOT_MIRROR_WRITABLE as MIRROR_WRITABLE,
        HMM_GPU_SNAPSHOT_OTHER_DEVICE as OTHER_DEVICE, HMM_GPU_SNAPSHOT_VALID as VALID,
        HMM_GPU_SNAPSHOT_WRITABLE as WRITABLE, HMM_GPU_SNAPSHOT_ZERO as ZERO,
    };

    use super::*;
    use crate::testing::config;

    #[test]
    fn a_page_says_all_that_is_known_of_it() {
        let shown = |word| SnapshotPage::from_uapi(word).unwrap().to_string();
        assert_eq!(shown(0), "nowhere");
        assert_eq!(shown(VALID | ZERO), "RAM, zero page");
        assert_eq!(shown(VALID | WRITABLE | (9 << 8)), "RAM, writable, order 9");
        assert_eq!(
            shown(VALID | WRITABLE | DEVICE | MIRRORED | MIRROR_WRITABLE | CURRENT | (17 << 20)),
            "VRAM page 17, writable, mirrored writable"
        );
        assert_eq!(
            shown(VALID | OTHER_DEVICE | MIRRORED | CURRENT),
            "VRAM of another device, mirrored"
        );
        assert_eq!(
            shown(MIRRORED | EXCLUSIVE | CURRENT),
            "nowhere, mirrored exclusive"
        );
        // What no driver should ever say is said all the same.
        assert_eq!(shown(MIRRORED), "nowhere, mirrored but stale");
    }

    #[test]
    fn a_page_at_two_places_or_none_is_refused() {
        for word in [
            VALID | DEVICE | OTHER_DEVICE,
            DEVICE,
            OTHER_DEVICE,
            DEVICE | OTHER_DEVICE,
        ] {
            assert_eq!(Snapshot::from_uapi(0, &[VALID, word]), None, "{word:#x}");
        }
    }

    #[test]
    fn a_snapshot_is_counted_found_and_drawn() {
        let words = [VALID | DEVICE | MIRRORED | CURRENT, VALID | WRITABLE, 0];
        let snapshot = Snapshot::from_uapi(0x5000, &words).unwrap();
        assert_eq!(
            snapshot.to_string(),
            "3 pages: 1 VRAM, 1 RAM, 1 nowhere; 1 mirrored"
        );
        let place = |addr| snapshot.page_at(addr).map(SnapshotPage::place);
        assert_eq!((place(0x4fff), place(0x8000)), (None, None));
        assert_eq!(
            (place(0x5fff), place(0x6000)),
            (Some(Place::Device), Some(Place::System))
        );
        assert_eq!(snapshot.residency().addr(), 0x5000);
        assert_eq!(snapshot.residency().counts(), snapshot.counts());
        assert!(!snapshot.all(Place::Device));
        assert!(Snapshot::from_uapi(0, &words[..1])
            .unwrap()
            .all(Place::Device));
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches a field of the word that is read from another's bits.
        #[test]
        fn what_is_put_into_a_word_comes_out_of_it(
            place in prop::sample::select(&Place::ALL[..]),
            (writable, zero) in any::<(bool, bool)>(),
            mirrored in prop::option::of(any::<(bool, bool, bool)>()),
            order in 0u32..32,
            vram_page in 0u64..1 << 44,
        ) {
            let bit = |set: bool, bit: u64| if set { bit } else { 0 };
            let (mirror_writable, exclusive, current) = mirrored.unwrap_or_default();
            let there = place != Place::None;
            let word = bit(there, VALID)
                | bit(there && writable, WRITABLE)
                | bit(there && zero, ZERO)
                | bit(place == Place::Device, DEVICE | (vram_page << uapi::HMM_GPU_SNAPSHOT_PAGE_SHIFT))
                | bit(place == Place::OtherDevice, OTHER_DEVICE)
                | bit(mirrored.is_some(), MIRRORED)
                | bit(mirror_writable, MIRROR_WRITABLE)
                | bit(exclusive, EXCLUSIVE)
                | bit(current, CURRENT)
                | (u64::from(order) << uapi::HMM_GPU_SNAPSHOT_ORDER_SHIFT);
            let page = SnapshotPage::from_uapi(word).unwrap();
            prop_assert_eq!(page.bits(), word);
            prop_assert_eq!(page.place(), place);
            prop_assert_eq!(page.is_writable(), there && writable);
            prop_assert_eq!(page.is_zero_page(), there && zero);
            prop_assert_eq!(page.order(), order);
            prop_assert_eq!(page.vram_page(), (place == Place::Device).then_some(vram_page));
            let expected = mirrored.map(|(writable, exclusive, current)| Mirrored {
                writable,
                exclusive,
                current,
            });
            prop_assert_eq!(page.mirrored(), expected);
            let residency = Snapshot::from_uapi(0, &[word]).unwrap().residency();
            let same = residency.pages()[0];
            prop_assert_eq!((same.place(), same.is_writable()), (place, there && writable));
        }

        /// Catches a word that is taken although it says two things, and one that is refused for a bit that a newer driver set.
        #[test]
        fn any_word_is_refused_or_at_one_place(word in any::<u64>()) {
            let valid = word & VALID != 0;
            let (device, other) = (word & DEVICE != 0, word & OTHER_DEVICE != 0);
            let known = !(device && other) && (valid || !(device || other));
            let page = SnapshotPage::from_uapi(word);
            prop_assert_eq!(page.is_some(), known);
            if let Some(page) = page {
                prop_assert_eq!(page.place() == Place::None, !valid);
                prop_assert_eq!(page.vram_page().is_some(), device);
            }
        }
    }
}
