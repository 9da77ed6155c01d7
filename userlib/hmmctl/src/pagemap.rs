//! Where the pages of a process are, as the kernel tells: `/proc/PID/pagemap`, and `/proc/iomem` for whose pages those are.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::Error;
use crate::host::Host;
use crate::nodes;
use crate::pci::DRIVER;

/// The physical addresses of a device's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub end: u64,
    pub unit: u32,
}

/// Those of all devices. Root's to see: for others they are all 0 in `/proc/iomem`, and there are none.
pub fn ranges(host: &Host) -> Vec<Range> {
    let iomem = host.text("/proc/iomem").unwrap_or_default();
    let units: Vec<(u32, Option<String>, u64)> = nodes::all()
        .into_iter()
        .map(|(_, it)| (it.unit, it.pci.map(|pci| pci.to_string()), it.vram_bytes))
        .collect();
    units
        .into_iter()
        .filter_map(|(unit, pci, bytes)| {
            // A device of the kernel's own making has the name of its node.
            let name = pci.unwrap_or_else(|| format!("{DRIVER}{unit}"));
            range_of(&iomem, unit, &name, bytes)
        })
        .collect()
}

/// The range of a device in a text of `/proc/iomem`: addresses that were free (form `add`), or else those of the BAR.
fn range_of(iomem: &str, unit: u32, name: &str, bytes: u64) -> Option<Range> {
    let of_device = iomem.lines().filter_map(|line| {
        let (numbers, owner) = line.split_once(" : ")?;
        let (start, last) = numbers.trim().split_once('-')?;
        let (start, last) = (
            u64::from_str_radix(start, 16).ok()?,
            u64::from_str_radix(last, 16).ok()?,
        );
        let range = Range {
            start,
            end: last.checked_add(1)?,
            unit,
        };
        // What is not below something else is no BAR: those are in a window of their bus.
        let is_free = !line.starts_with(' ');
        (owner == name && last > start).then_some((is_free, range))
    });
    let all: Vec<(bool, Range)> = of_device.collect();
    let exact = |free: bool| {
        all.iter()
            .find(|(is_free, range)| *is_free == free && range.end - range.start == bytes)
    };
    let largest = || all.iter().max_by_key(|(_, range)| range.end - range.start);
    let (_, range) = exact(true).or_else(|| exact(false)).or_else(largest)?;
    Some(Range {
        end: range.end.min(range.start + bytes),
        ..*range
    })
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Spot {
    /// Nothing was ever put there.
    Nowhere,
    Ram,
    /// In the VRAM of the unit.
    Vram(u32),
    /// In the memory of a device of another driver.
    OtherVram,
    /// In system memory; a device has it to itself.
    Exclusive,
    /// On its way, at that moment.
    Moving,
    Swapped,
    /// Not in system memory: swapped, or in VRAM. Only root is told which.
    Away,
    /// Something else that the kernel notes in place of a page.
    Marked,
}

impl Spot {
    /// Decodes an entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst). The types of swap entries are those of
    /// include/linux/swap.h: the highest are the kernel's own, and the first 24 or 25 are swap files.
    fn decode(entry: u64, ranges: &[Range]) -> Self {
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        let frame = entry & ((1 << 55) - 1);
        let unit = |pfn: u64| {
            let at = pfn.checked_mul(4096)?;
            ranges
                .iter()
                .find(|range| (range.start..range.end).contains(&at))
                .map(|range| range.unit)
        };
        if entry & PRESENT != 0 {
            // Device-coherent pages are mapped as any.
            return unit(frame).map_or(Spot::Ram, Spot::Vram);
        }
        if entry & SWAPPED == 0 {
            return Spot::Nowhere;
        }
        let (kind, pfn) = (frame & 0x1f, frame >> 5);
        match kind {
            // The kernel hides it from who may not see physical addresses: the first page of a swap file holds its header, never a page of a process.
            0 if pfn == 0 => Spot::Away,
            28 | 29 => unit(pfn).map_or(Spot::OtherVram, Spot::Vram),
            30 => Spot::Exclusive,
            25..28 => Spot::Moving,
            31 => Spot::Marked,
            _ => Spot::Swapped,
        }
    }
}

/// A mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    pub permissions: String,
    pub name: String,
}

impl Vma {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let (start, end) = words.next()?.split_once('-')?;
        let permissions = words.next()?.to_owned();
        let name = words.nth(3).unwrap_or_default().trim().to_owned();
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            permissions,
            name,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// Where the pages of a mapping are: runs of pages that are at the same place.
pub struct Mapped {
    pub vma: Vma,
    pub runs: Vec<(Spot, u64)>,
}

impl Mapped {
    /// Whether there is a page in the VRAM of a device of the driver.
    pub fn has_vram(&self) -> bool {
        self.runs
            .iter()
            .any(|(spot, _)| matches!(spot, Spot::Vram(_)))
    }
}

/// Looks at all pages of a process, mapping by mapping.
pub fn scan(host: &Host, pid: u32, ranges: &[Range]) -> Result<Vec<Mapped>, Error> {
    let maps = host
        .read(&format!("/proc/{pid}/maps"))
        .map_err(|error| match error {
            Error::File { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Error::Said(format!("there is no process {pid}"))
            }
            error => error,
        })?;
    let path = format!("/proc/{pid}/pagemap");
    let file = File::open(host.path(&path)).map_err(Error::of(&path))?;
    let vmas = maps.lines().filter_map(Vma::parse);
    vmas.map(|vma| {
        let runs = runs(&file, &vma, ranges).map_err(Error::of(&path))?;
        Ok(Mapped { vma, runs })
    })
    .collect()
}

fn runs(file: &File, vma: &Vma, ranges: &[Range]) -> io::Result<Vec<(Spot, u64)>> {
    let mut runs: Vec<(Spot, u64)> = vec![];
    let mut buffer = vec![0; 1 << 18];
    let mut page = vma.start / 4096;
    let last = vma.end / 4096;
    while page < last {
        let wanted =
            usize::try_from((last - page) * 8).map_or(buffer.len(), |n| n.min(buffer.len()));
        let got = file.read_at(&mut buffer[..wanted], page * 8)? / 8;
        if got == 0 {
            // The kernel's own page at the end of the addresses, of which some kernels tell nothing.
            runs.push((Spot::Nowhere, last - page));
            break;
        }
        for entry in buffer[..got * 8].chunks_exact(8) {
            let entry = entry
                .iter()
                .rev()
                .fold(0, |word, byte| (word << 8) | u64::from(*byte));
            let spot = Spot::decode(entry, ranges);
            match runs.last_mut() {
                Some((same, pages)) if *same == spot => *pages += 1,
                _ => runs.push((spot, 1)),
            }
        }
        page += got as u64;
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IOMEM: &str = "\
00001000-0009fbff : System RAM
c0000000-febfffff : PCI Bus 0000:00
  d0000000-dfffffff : 0000:00:10.0
    d0000000-dfffffff : hmm_gpu
  fea00000-fea07fff : 0000:00:10.0
fcec000000-fcefffffff : hmm_gpu0
fcf0000000-fcffffffff : 0000:00:10.0";

    #[test]
    fn a_devices_pages_are_at_the_addresses_that_were_free_or_at_those_of_its_bar() {
        let range = |start, end, unit| Some(Range { start, end, unit });
        let (mib64, mib256) = (64 << 20, 256 << 20);
        assert_eq!(
            range_of(IOMEM, 1, "0000:00:10.0", mib256),
            range(0xfc_f000_0000, 0xfd_0000_0000, 1)
        );
        assert_eq!(
            range_of(IOMEM, 0, "hmm_gpu0", mib64),
            range(0xfc_ec00_0000, 0xfc_f000_0000, 0)
        );
        let (bar_only, _) = IOMEM.rsplit_once('\n').unwrap();
        assert_eq!(
            range_of(bar_only, 1, "0000:00:10.0", mib256),
            range(0xd000_0000, 0xe000_0000, 1)
        );
        assert_eq!(range_of(IOMEM, 1, "0000:00:11.0", mib256), None);
        // As it is for others than root.
        let hidden = "00000000-00000000 : 0000:00:10.0";
        assert_eq!(range_of(hidden, 1, "0000:00:10.0", mib256), None);
    }

    #[test]
    fn a_mapping_is_read_with_and_without_a_name() {
        let vma = Vma::parse(
            "7f00000000-7f00002000 rw-p 00000000 00:00 0                          [stack]",
        )
        .unwrap();
        assert_eq!(
            (vma.start, vma.bytes(), vma.name.as_str()),
            (0x7f_0000_0000, 0x2000, "[stack]")
        );
        let vma =
            Vma::parse("7f00000000-7f00002000 r--p 00001000 fe:00 12 /a file (deleted)").unwrap();
        assert_eq!(vma.name, "/a file (deleted)");
        assert_eq!(
            Vma::parse("7f00000000-7f00002000 rw-p 00000000 00:00 0 ")
                .unwrap()
                .name,
            ""
        );
        assert_eq!(Vma::parse("VmFlags: rd"), None);
    }

    #[test]
    fn an_entry_says_where_a_page_is() {
        let ranges = [Range {
            start: 0x10_0000_0000,
            end: 0x10_4000_0000,
            unit: 7,
        }];
        let spot = |entry| Spot::decode(entry, &ranges);
        let swap = |kind: u64, offset: u64| (1 << 62) | kind | (offset << 5);
        assert_eq!(spot(0), Spot::Nowhere);
        assert_eq!(spot(1 << 55), Spot::Nowhere);
        assert_eq!(spot((1 << 63) | 0x1234), Spot::Ram);
        assert_eq!(spot((1 << 63) | 0x100_0000), Spot::Vram(7));
        for kind in [28, 29] {
            assert_eq!(spot(swap(kind, 0x100_0000)), Spot::Vram(7));
            assert_eq!(spot(swap(kind, 0x103_ffff)), Spot::Vram(7));
            assert_eq!(spot(swap(kind, 0x104_0000)), Spot::OtherVram);
        }
        assert_eq!(spot(swap(30, 5)), Spot::Exclusive);
        assert_eq!(spot(swap(26, 5)), Spot::Moving);
        assert_eq!(spot(swap(31, 1)), Spot::Marked);
        assert_eq!(spot(swap(0, 5)), Spot::Swapped);
        // To who may not see, the kernel gives nothing but the flags.
        assert_eq!(Spot::decode(1 << 62, &[]), Spot::Away);
    }

    proptest! {
        /// Catches arithmetic that overflows on what the kernel might say.
        #[test]
        fn any_entry_is_somewhere(entry in any::<u64>(), start in any::<u64>(), bytes in any::<u64>()) {
            let range = Range { start, end: start.saturating_add(bytes), unit: 1 };
            let spot = Spot::decode(entry, &[range]);
            prop_assert_eq!(spot == Spot::Nowhere, entry >> 62 == 0);
        }
    }
}
