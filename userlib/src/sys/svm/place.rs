//! Brings what a dispatch may reach to where the device reaches it, and back.

use std::ptr::NonNull;
use std::sync::Arc;

use crate::svm::ranges::{join, lay_out, table, Named};
use crate::sys::reach::Reach;
use crate::sys::vulkan::{Buffer, Copy, External, Gpu, Place};
use crate::{Error, Strategy, SvmError};

/// Memory that Vulkan has mapped for this process: where it begins and ends here, and where it begins for the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MappedRange {
    pub(crate) begin: usize,
    pub(crate) end: usize,
    pub(crate) addr: u64,
}

/// What the arguments of a dispatch name, for as long as it runs.
pub(crate) struct Placed {
    /// The list of ranges.
    pub(crate) table: Buffer,
    pub(crate) ranges: u32,
    pub(crate) bytes_in: u64,
    copied: Option<Copied>,
    // Held only.
    _imported: Vec<External>,
}

/// Ranges whose bytes are in buffers.
struct Copied {
    reaches: Vec<Reach>,
    ranges: Vec<Named>,
    offsets: Vec<usize>,
    /// Where the host writes and reads.
    host: Buffer,
    /// Where the device has them, if that is elsewhere.
    device: Option<Buffer>,
}

impl Placed {
    /// Places what is named. `strategy` is one that needs names.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        strategy: Strategy,
        reaches: &[Reach],
        mapped: &[MappedRange],
    ) -> Result<Self, Error> {
        let is_in = |named: Named, range: &MappedRange| {
            range.begin <= named.begin && named.end <= range.end
        };
        let mut elsewhere = reaches.to_vec();
        let mut all: Vec<(Named, u64)> = Vec::new();
        for range in mapped {
            let inside = |reach: &Reach| is_in(reach.named(), range);
            let before = elsewhere.len();
            let write = elsewhere
                .iter()
                .any(|reach| inside(reach) && reach.named().write);
            elsewhere.retain(|reach| !inside(reach));
            if elsewhere.len() < before {
                let (begin, end) = (range.begin, range.end);
                let delta = range.addr.wrapping_sub(begin as u64);
                all.push((Named { begin, end, write }, delta));
            }
        }

        let (mut bytes_in, mut copied, mut imported) = (0, None, Vec::new());
        if strategy == Strategy::Imported {
            for named in join(
                elsewhere
                    .iter()
                    .map(|reach| reach.named().pages())
                    .collect(),
            ) {
                let import = import(gpu, named)?;
                all.push((named, import.addr().wrapping_sub(named.begin as u64)));
                imported.push(import);
            }
        } else {
            let ranges = join(elsewhere.iter().map(Reach::named).collect());
            if !ranges.is_empty() {
                let new = Copied::new(gpu, strategy, elsewhere, ranges)?;
                bytes_in = new
                    .ranges
                    .iter()
                    .map(|range| (range.end - range.begin) as u64)
                    .sum();
                for (range, &offset) in new.ranges.iter().zip(&new.offsets) {
                    let delta = (new.addr() + offset as u64).wrapping_sub(range.begin as u64);
                    all.push((*range, delta));
                }
                copied = Some(new);
            }
        }
        all.sort_unstable_by_key(|(named, _)| named.begin);
        let (ranges, deltas): (Vec<Named>, Vec<u64>) = all.into_iter().unzip();
        let words = table(&ranges, &deltas);
        let mut buffer = Buffer::new(gpu, "ranges", size_of_val(&words[..]), Place::Host)?;
        buffer.put(0, &words);
        Ok(Self {
            table: buffer,
            ranges: u32::try_from(words.len()).unwrap_or(u32::MAX),
            bytes_in,
            copied,
            _imported: imported,
        })
    }

    /// Brings back what was named to be written to. Returns how many bytes that were.
    pub(crate) fn finish(self, gpu: &Gpu) -> Result<u64, Error> {
        self.copied.map_or(Ok(0), |copied| copied.back(gpu))
    }
}

impl Copied {
    fn new(
        gpu: &Arc<Gpu>,
        strategy: Strategy,
        reaches: Vec<Reach>,
        ranges: Vec<Named>,
    ) -> Result<Self, Error> {
        let (offsets, bytes) = lay_out(&ranges);
        // What is read back is wanted in memory that the host reads fast.
        let place = if ranges.iter().any(|range| range.write) {
            Place::Back
        } else {
            Place::Host
        };
        let mut host = Buffer::new(gpu, "arguments", bytes, place)?;
        let mut copied = {
            let to = host.bytes_mut();
            for reach in &reaches {
                if let Some(at) = find(&ranges, &offsets, reach.named().begin) {
                    reach.copy_to(to.get_mut(at..).unwrap_or(&mut []));
                }
            }
            Self {
                reaches,
                ranges,
                offsets,
                host,
                device: None,
            }
        };
        if strategy == Strategy::Copy {
            let device = Buffer::new(gpu, "arguments", bytes, Place::Device)?;
            gpu.copy(&[Copy {
                from: &copied.host,
                to: &device,
            }])?;
            copied.device = Some(device);
        }
        Ok(copied)
    }

    /// Its first byte for the device.
    fn addr(&self) -> u64 {
        self.device.as_ref().unwrap_or(&self.host).addr()
    }

    fn back(self, gpu: &Gpu) -> Result<u64, Error> {
        let written = |reach: &&Reach| reach.named().write;
        if !self.reaches.iter().any(|reach| written(&reach)) {
            return Ok(0);
        }
        if let Some(device) = &self.device {
            gpu.copy(&[Copy {
                from: device,
                to: &self.host,
            }])?;
        }
        let mut bytes = 0;
        for reach in self.reaches.iter().filter(written) {
            let named = reach.named();
            if let Some(at) = find(&self.ranges, &self.offsets, named.begin) {
                reach.copy_from(self.host.bytes().get(at..).unwrap_or(&[]));
                bytes += (named.end - named.begin) as u64;
            }
        }
        Ok(bytes)
    }
}

/// Where an address is in the buffer.
fn find(ranges: &[Named], offsets: &[usize], addr: usize) -> Option<usize> {
    let after = ranges.partition_point(|range| range.begin <= addr);
    let at = after.checked_sub(1)?;
    (addr < ranges[at].end).then(|| offsets[at] + (addr - ranges[at].begin))
}

fn import(gpu: &Arc<Gpu>, pages: Named) -> Result<External, Error> {
    let nothing = || SvmError::Vulkan {
        attempt: "to import memory of this process",
        answer: String::from("there is none at 0"),
    };
    let start =
        NonNull::new(std::ptr::with_exposed_provenance_mut(pages.begin)).ok_or_else(nothing)?;
    // SAFETY: the pages hold what is borrowed for the dispatch, and the import ends with it.
    unsafe { External::import(gpu, start, pages.end - pages.begin) }
}
