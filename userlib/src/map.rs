//! A small picture of where pages are.

use std::fmt;

use crate::range::PAGE_BYTES;
use crate::{Bytes, Place, Residency};

/// Rows that a picture has at most.
const MAX_ROWS: usize = 16;

/// The marks of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Glyphs {
    /// `█` VRAM, `▓` VRAM of another device, `░` RAM, `·` nowhere, `▒` several of these.
    Blocks,
    /// `#` VRAM, `o` VRAM of another device, `-` RAM, `.` nowhere, `%` several of these. For terminals without Unicode.
    Ascii,
}

impl Glyphs {
    /// What the terminal can show, by the locale in the environment: blocks if it is a UTF-8 one.
    pub fn detect() -> Self {
        Self::of_locale(|name| std::env::var(name).ok())
    }

    /// The first of these that is set and not empty decides, as for the C library.
    fn of_locale(variable: impl Fn(&str) -> Option<String>) -> Self {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| variable(name).filter(|value| !value.is_empty()))
            .unwrap_or_default()
            .to_ascii_lowercase();
        if locale.ends_with("utf-8") || locale.ends_with("utf8") || locale.contains("utf-8@") {
            Glyphs::Blocks
        } else {
            Glyphs::Ascii
        }
    }

    /// The mark of a place.
    pub fn of(self, place: Place) -> char {
        match (self, place) {
            (Glyphs::Blocks, Place::None) => '·',
            (Glyphs::Blocks, Place::System) => '░',
            (Glyphs::Blocks, Place::Device) => '█',
            (Glyphs::Blocks, Place::OtherDevice) => '▓',
            (Glyphs::Ascii, Place::None) => '.',
            (Glyphs::Ascii, Place::System) => '-',
            (Glyphs::Ascii, Place::Device) => '#',
            (Glyphs::Ascii, Place::OtherDevice) => 'o',
        }
    }

    /// The mark of several pages that are not all at one place.
    pub fn mixed(self) -> char {
        match self {
            Glyphs::Blocks => '▒',
            Glyphs::Ascii => '%',
        }
    }
}

/// Draws a [`Residency`]: a mark a page, or a mark for several where there are many, and a legend with counts.
///
/// ```text
/// ████████████████████████████████
/// ███░░███████░███████████████████
/// █ VRAM 61   ░ RAM 3   (a mark is a page of 4 KiB)
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Map<'a> {
    residency: &'a Residency,
    width: usize,
    glyphs: Glyphs,
    indent: usize,
}

impl<'a> Map<'a> {
    pub(crate) fn new(residency: &'a Residency, width: usize) -> Self {
        Self {
            residency,
            width: width.max(1),
            glyphs: Glyphs::Blocks,
            indent: 0,
        }
    }

    /// Draws with other marks than blocks.
    pub fn glyphs(self, glyphs: Glyphs) -> Self {
        Self { glyphs, ..self }
    }

    /// Begins each line with so many blanks.
    pub fn indent(self, indent: usize) -> Self {
        Self { indent, ..self }
    }

    /// Pages that one mark stands for: a power of two.
    pub fn pages_per_mark(&self) -> usize {
        let marks = self.width.saturating_mul(MAX_ROWS);
        self.residency
            .pages()
            .len()
            .div_ceil(marks)
            .next_power_of_two()
    }

    fn marks(&self) -> String {
        let mark = |pages: &[crate::Page]| {
            let mut places = pages.iter().map(|page| page.place());
            let first = places.next().unwrap_or(Place::None);
            if places.all(|place| place == first) {
                self.glyphs.of(first)
            } else {
                self.glyphs.mixed()
            }
        };
        self.residency
            .pages()
            .chunks(self.pages_per_mark())
            .map(mark)
            .collect()
    }

    fn legend(&self, marks: &str) -> String {
        let counts = self.residency.counts();
        let mut parts: Vec<String> = [
            Place::Device,
            Place::OtherDevice,
            Place::System,
            Place::None,
        ]
        .into_iter()
        // A person looks for these two first, so they are there even when they are not.
        .filter(|&place| counts.at(place) != 0 || matches!(place, Place::Device | Place::System))
        .map(|place| format!("{} {place} {}", self.glyphs.of(place), counts.at(place)))
        .collect();
        if marks.contains(self.glyphs.mixed()) {
            parts.push(format!("{} several of these", self.glyphs.mixed()));
        }
        let pages = self.pages_per_mark();
        let bytes = Bytes((pages * PAGE_BYTES) as u64);
        parts.push(match pages {
            1 => format!("(a mark is a page of {bytes})"),
            _ => format!("(a mark is {pages} pages, {bytes})"),
        });
        parts.join("   ")
    }
}

impl fmt::Display for Map<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (marks, indent) = (self.marks(), " ".repeat(self.indent));
        let each: Vec<char> = marks.chars().collect();
        for row in each.chunks(self.width) {
            writeln!(f, "{indent}{}", row.iter().collect::<String>())?;
        }
        write!(f, "{indent}{}", self.legend(&marks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn residency(bytes: &[u8]) -> Residency {
        Residency::from_uapi(0x1000, bytes).unwrap()
    }

    #[test]
    fn a_small_range_has_a_mark_a_page() {
        let residency = residency(&[2, 2, 1, 0, 3, 2]);
        assert_eq!(
            residency.map(4).to_string(),
            "██░·\n▓█\n█ VRAM 3   ▓ VRAM of another device 1   ░ RAM 1   · nowhere 1   (a mark is a page of 4 KiB)"
        );
        assert_eq!(
            residency.map(99).glyphs(Glyphs::Ascii).indent(2).to_string(),
            "  ##-.o#\n  # VRAM 3   o VRAM of another device 1   - RAM 1   . nowhere 1   (a mark is a page of 4 KiB)"
        );
    }

    #[test]
    fn vram_and_ram_are_in_the_legend_even_when_nothing_is_there() {
        let text = residency(&[1]).map(8).to_string();
        assert!(text.contains("█ VRAM 0   ░ RAM 1"), "{text}");
    }

    #[test]
    fn a_big_range_stays_a_small_picture() {
        let mut bytes = vec![1; 4096];
        bytes[..1024].fill(2);
        bytes[4095] = 2;
        let residency = residency(&bytes);
        let map = residency.map(32);
        assert_eq!(map.pages_per_mark(), 8);
        let text = map.to_string();
        assert_eq!(text.lines().count(), MAX_ROWS + 1);
        assert!(
            text.lines().take(4).all(|row| row == "█".repeat(32)),
            "{text}"
        );
        assert!(text.lines().nth(15).unwrap().ends_with("░▒"), "{text}");
        assert!(
            text.ends_with(
                "█ VRAM 1025   ░ RAM 3071   ▒ several of these   (a mark is 8 pages, 32 KiB)"
            ),
            "{text}"
        );
    }

    #[test]
    fn nothing_and_no_width_can_be_drawn() {
        assert_eq!(
            residency(&[]).map(8).to_string(),
            "█ VRAM 0   ░ RAM 0   (a mark is a page of 4 KiB)"
        );
        assert!(residency(&[1, 2]).map(0).to_string().starts_with("░\n█\n"));
    }

    #[test]
    fn the_locale_decides_the_marks() {
        let of = |set: &[(&str, &str)]| {
            Glyphs::of_locale(|name| {
                set.iter()
                    .find(|(key, _)| *key == name)
                    .map(|(_, value)| value.to_string())
            })
        };
        assert_eq!(of(&[]), Glyphs::Ascii);
        assert_eq!(of(&[("LANG", "C")]), Glyphs::Ascii);
        assert_eq!(of(&[("LANG", "en_US.ISO-8859-1")]), Glyphs::Ascii);
        assert_eq!(of(&[("LANG", "C.UTF-8")]), Glyphs::Blocks);
        assert_eq!(of(&[("LANG", "C.UTF-8"), ("LC_ALL", "C")]), Glyphs::Ascii);
        assert_eq!(
            of(&[("LC_CTYPE", "de_DE.utf8"), ("LC_ALL", "")]),
            Glyphs::Blocks
        );
    }
}
