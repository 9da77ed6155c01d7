//! Where pages are.

use std::fmt;

use crate::map::Map;
use crate::range::PAGE_BYTES;
use crate::uapi;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// Nowhere: nothing is mapped, or it was never touched, or it is swapped out, or it may not be read, or a device has it to
    /// itself.
    None,
    /// In system memory.
    System,
    /// In the VRAM of the device that was asked.
    Device,
    /// In the VRAM of another device of the driver.
    OtherDevice,
}

impl Place {
    /// All places, in the order of the interface.
    pub const ALL: [Place; 4] = [
        Place::None,
        Place::System,
        Place::Device,
        Place::OtherDevice,
    ];
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Place::None => "nowhere",
            Place::System => "RAM",
            Place::Device => "VRAM",
            Place::OtherDevice => "VRAM of another device",
        })
    }
}

/// What is known of one page.
///
/// # Invariants
///
/// The bits under the mask are those of a [`Place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Page(u8);

impl Page {
    /// `None` for a byte that the interface does not know.
    fn from_uapi(byte: u8) -> Option<Self> {
        (byte & uapi::HMM_GPU_RESIDENT_MASK <= uapi::HMM_GPU_RESIDENT_OTHER_DEVICE)
            .then_some(Self(byte))
    }

    /// A page at a place.
    pub(crate) fn new(place: Place, writable: bool) -> Self {
        let place = match place {
            Place::None => uapi::HMM_GPU_RESIDENT_NONE,
            Place::System => uapi::HMM_GPU_RESIDENT_SYSTEM,
            Place::Device => uapi::HMM_GPU_RESIDENT_DEVICE,
            Place::OtherDevice => uapi::HMM_GPU_RESIDENT_OTHER_DEVICE,
        };
        let writable = if writable {
            uapi::HMM_GPU_RESIDENT_WRITABLE
        } else {
            0
        };
        Self(place | writable)
    }

    /// Where it is.
    pub fn place(self) -> Place {
        match self.0 & uapi::HMM_GPU_RESIDENT_MASK {
            uapi::HMM_GPU_RESIDENT_SYSTEM => Place::System,
            uapi::HMM_GPU_RESIDENT_DEVICE => Place::Device,
            uapi::HMM_GPU_RESIDENT_OTHER_DEVICE => Place::OtherDevice,
            _ => Place::None,
        }
    }

    /// Whether it can be written there without a further fault. Not so after `fork`, for example, until it is copied.
    pub fn is_writable(self) -> bool {
        self.0 & uapi::HMM_GPU_RESIDENT_WRITABLE != 0
    }
}

/// Where each page of a range was. Shown as one line of counts; [`map`](Self::map) draws it.
///
/// Looking moves nothing. Each page was there at one moment during the call, not all of them at the same moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    addr: usize,
    pages: Vec<Page>,
}

impl Residency {
    /// `None` if a byte is none of the interface's.
    pub(crate) fn from_uapi(addr: usize, bytes: &[u8]) -> Option<Self> {
        let pages = bytes
            .iter()
            .map(|&byte| Page::from_uapi(byte))
            .collect::<Option<_>>()?;
        Some(Self { addr, pages })
    }

    pub(crate) fn from_pages(addr: usize, pages: impl Iterator<Item = Page>) -> Self {
        let pages = pages.collect();
        Self { addr, pages }
    }

    /// Address of the first page.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// The pages, in the order of their addresses.
    pub fn pages(&self) -> &[Page] {
        &self.pages
    }

    /// The page that holds the byte at `addr`, if it is in the range.
    pub fn page_at(&self, addr: usize) -> Option<Page> {
        self.pages
            .get(addr.checked_sub(self.addr)? / PAGE_BYTES)
            .copied()
    }

    /// Whether every page is at `place`. True of no pages.
    pub fn all(&self, place: Place) -> bool {
        self.pages.iter().all(|page| page.place() == place)
    }

    /// How many pages are where.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for page in &self.pages {
            counts.add(page.place(), page.is_writable());
        }
        counts
    }

    /// A small picture of at most `width` marks a row, see [`Map`].
    pub fn map(&self, width: usize) -> Map<'_> {
        Map::new(self, width)
    }
}

impl fmt::Display for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts().fmt(f)
    }
}

/// How many pages are where. Shown as `68 pages: 60 VRAM, 8 RAM`; places without pages are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counts {
    /// Pages at [`Place::None`].
    pub none: usize,
    /// Pages at [`Place::System`].
    pub system: usize,
    /// Pages at [`Place::Device`].
    pub device: usize,
    /// Pages at [`Place::OtherDevice`].
    pub other_device: usize,
    /// Pages, of all these, that are writable where they are.
    pub writable: usize,
}

impl Counts {
    /// Counts a page.
    pub(crate) fn add(&mut self, place: Place, writable: bool) {
        *match place {
            Place::None => &mut self.none,
            Place::System => &mut self.system,
            Place::Device => &mut self.device,
            Place::OtherDevice => &mut self.other_device,
        } += 1;
        self.writable += usize::from(writable);
    }

    /// Pages in all.
    pub fn total(&self) -> usize {
        self.none + self.system + self.device + self.other_device
    }

    /// Pages at a place.
    pub fn at(&self, place: Place) -> usize {
        match place {
            Place::None => self.none,
            Place::System => self.system,
            Place::Device => self.device,
            Place::OtherDevice => self.other_device,
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}",
            self.total(),
            if self.total() == 1 { "page" } else { "pages" }
        )?;
        let places = [
            Place::Device,
            Place::OtherDevice,
            Place::System,
            Place::None,
        ];
        for (nth, place) in places
            .into_iter()
            .filter(|&place| self.at(place) != 0)
            .enumerate()
        {
            write!(
                f,
                "{} {} {place}",
                if nth == 0 { ":" } else { "," },
                self.at(place)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::config;

    #[test]
    fn every_byte_of_the_interface_is_decoded() {
        let writable = uapi::HMM_GPU_RESIDENT_WRITABLE;
        for (byte, place) in (0u8..).zip(Place::ALL) {
            let (plain, with) = (
                Page::from_uapi(byte).unwrap(),
                Page::from_uapi(byte | writable).unwrap(),
            );
            assert_eq!((plain.place(), plain.is_writable()), (place, false));
            assert_eq!((with.place(), with.is_writable()), (place, true));
        }
        assert_eq!(Residency::from_uapi(0, &[1, 4, 1]), None);
    }

    #[test]
    fn pages_are_counted_by_place() {
        let residency = Residency::from_uapi(0x1000, &[2, 2, 0x12, 1, 0x11, 3, 0]).unwrap();
        let counts = residency.counts();
        assert_eq!(
            counts,
            Counts {
                none: 1,
                system: 2,
                device: 3,
                other_device: 1,
                writable: 2
            }
        );
        assert_eq!(counts.total(), residency.pages().len());
        assert_eq!(
            residency.to_string(),
            "7 pages: 3 VRAM, 1 VRAM of another device, 2 RAM, 1 nowhere"
        );
        assert_eq!(Residency::from_uapi(0, &[]).unwrap().to_string(), "0 pages");
        assert_eq!(
            Residency::from_uapi(0, &[1]).unwrap().to_string(),
            "1 page: 1 RAM"
        );
    }

    #[test]
    fn a_page_is_found_by_any_of_its_addresses() {
        let residency = Residency::from_uapi(0x5000, &[1, 2]).unwrap();
        let place = |addr| residency.page_at(addr).map(Page::place);
        assert_eq!(place(0x4fff), None);
        assert_eq!(place(0x5000), Some(Place::System));
        assert_eq!(place(0x5fff), Some(Place::System));
        assert_eq!(place(0x6000), Some(Place::Device));
        assert_eq!(place(0x7000), None);
    }

    #[test]
    fn all_is_about_every_page() {
        assert!(Residency::from_uapi(0, &[2, 0x12])
            .unwrap()
            .all(Place::Device));
        assert!(!Residency::from_uapi(0, &[2, 1]).unwrap().all(Place::Device));
        assert!(Residency::from_uapi(0, &[]).unwrap().all(Place::Device));
    }

    proptest! {
        #![proptest_config(config())]

        /// Catches a page that is counted twice, not at all, or at another place, and a byte of a newer driver that is taken for
        /// a place, or refused for a bit that the place does not need.
        #[test]
        fn every_page_is_counted_at_its_place(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let known = |byte: &u8| byte & uapi::HMM_GPU_RESIDENT_MASK <= uapi::HMM_GPU_RESIDENT_OTHER_DEVICE;
            let decoded = Residency::from_uapi(0x5000, &bytes);
            prop_assert_eq!(decoded.is_some(), bytes.iter().all(known));
            let bytes: Vec<u8> = bytes.into_iter().filter(known).collect();
            let residency = Residency::from_uapi(0x5000, &bytes).unwrap();
            let counts = residency.counts();
            prop_assert_eq!(counts.total(), bytes.len());
            for place in Place::ALL {
                let there = residency.pages().iter().filter(|page| page.place() == place).count();
                prop_assert_eq!(counts.at(place), there);
                prop_assert_eq!(residency.all(place), there == bytes.len());
            }
            for (page, byte) in residency.pages().iter().zip(&bytes) {
                prop_assert_eq!(Page::new(page.place(), page.is_writable()).0, byte & 0x1f);
            }
            let writable = bytes.iter().filter(|&byte| byte & 0x10 != 0).count();
            prop_assert_eq!(counts.writable, writable);
        }
    }
}
