//! Looking at a range, piece by piece.

use rustix::io::{retry_on_intr, Errno};

use crate::range::PAGE_BYTES;
use crate::Error;

/// Bytes that one call looks at: 16384 pages, so that neither the call nor what it holds becomes long. A multiple of 2 MiB,
/// which is what one moment's answer of `SNAPSHOT` is about.
const LOOK_BYTES: usize = 64 << 20;

/// Room for one word a page of a range.
pub(crate) fn room<W: Copy + Default>(bytes: usize) -> Result<Vec<W>, Error> {
    let values = bytes.div_ceil(PAGE_BYTES);
    let mut words = Vec::new();
    words.try_reserve_exact(values).map_err(|_| Error::Memory {
        values,
        value_bytes: size_of::<W>(),
        errno: Errno::NOMEM,
    })?;
    words.resize(values, W::default());
    Ok(words)
}

/// Asks piece by piece (address, length in bytes, its words), and again where a signal interrupted. At least once, so that the
/// driver judges an empty range too.
pub(crate) fn look<W>(
    addr: usize,
    bytes: usize,
    words: &mut [W],
    mut call: impl FnMut(u64, u64, &mut [W]) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut done = 0;
    loop {
        let len = (bytes - done).min(LOOK_BYTES);
        let first = done / PAGE_BYTES;
        let piece = &mut words[first..first + len.div_ceil(PAGE_BYTES)];
        let from = (addr as u64).wrapping_add(done as u64);
        retry_on_intr(|| call(from, len as u64, piece))?;
        done += len;
        if done == bytes {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_range_is_looked_at_in_pieces_that_meet() {
        let (addr, bytes) = (0x7f00_0000_0000, 2 * LOOK_BYTES + PAGE_BYTES);
        let (look_bytes, page_bytes) = (LOOK_BYTES as u64, PAGE_BYTES as u64);
        let mut places = room::<u8>(bytes).unwrap();
        let mut asked = vec![];
        let mut signal = true;
        look(addr, bytes, &mut places, |from, len, piece| {
            assert_eq!(piece.len() as u64, len / PAGE_BYTES as u64);
            if std::mem::take(&mut signal) {
                return Err(Errno::INTR);
            }
            piece.fill(u8::try_from(asked.len()).unwrap());
            asked.push((from - addr as u64, len));
            Ok(())
        })
        .unwrap();
        let pieces = [
            (0, look_bytes),
            (look_bytes, look_bytes),
            (2 * look_bytes, page_bytes),
        ];
        assert_eq!(asked, pieces);
        let pages = LOOK_BYTES / PAGE_BYTES;
        assert_eq!(
            (
                places[0],
                places[pages - 1],
                places[pages],
                places[2 * pages]
            ),
            (0, 0, 1, 2)
        );
    }

    #[test]
    fn the_driver_judges_ranges_that_are_none() {
        for (bytes, room) in [(0, 0), (1, 1), (PAGE_BYTES + 1, 2)] {
            let mut seen = None;
            let refuse = |from: u64, len: u64, piece: &mut [u8]| {
                seen = Some((from, len, piece.len()));
                Err(Errno::INVAL)
            };
            assert_eq!(
                look(usize::MAX, bytes, &mut vec![0; room], refuse),
                Err(Errno::INVAL)
            );
            assert_eq!(seen, Some((u64::MAX, bytes as u64, room)));
        }
    }

    #[test]
    fn more_pages_than_memory_has_room_for_are_an_error() {
        assert!(matches!(
            room::<u64>(usize::MAX),
            Err(Error::Memory { value_bytes: 8, .. })
        ));
    }
}
