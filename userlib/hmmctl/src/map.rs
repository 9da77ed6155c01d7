//! Where every page of a process is, as a picture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write};

use hmm_gpu::{Bytes, Glyphs};
use serde_json::json;

use crate::cli::{MapArgs, When};
use crate::error::Error;
use crate::host::Host;
use crate::pagemap::{ranges, scan, Mapped, Spot};

/// The verb `map`.
pub fn run(host: &Host, args: &MapArgs, out: &mut dyn Write) -> Result<(), Error> {
    let ranges = ranges(host);
    let mappings = scan(host, args.pid, &ranges)?;
    if args.json {
        writeln!(out, "{}", object(args.pid, &mappings))?;
        return Ok(());
    }
    let width = args.width.unwrap_or_else(|| {
        let columns = ratatui::crossterm::terminal::size().map_or(80, |(columns, _)| columns);
        (columns.saturating_sub(4) / 8 * 8).clamp(16, 128)
    });
    let picture = Picture {
        glyphs: Glyphs::detect(),
        color: match args.color {
            When::Auto => std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
            When::Always => true,
            When::Never => false,
        },
        width: u64::from(width),
        rows: u64::from(args.rows),
    };
    let title = format!("process {} ({})", args.pid, host.comm(args.pid));
    out.write_all(picture.draw(&title, &mappings, args.all).as_bytes())?;
    Ok(())
}

/// What a mark shows: one of these kinds of places, or several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Vram(u32),
    Ram,
    Swapped,
    Other,
    Nowhere,
}

impl Kind {
    fn of(spot: Spot) -> Self {
        match spot {
            Spot::Vram(unit) => Kind::Vram(unit),
            Spot::Ram => Kind::Ram,
            Spot::Swapped | Spot::Away => Kind::Swapped,
            Spot::OtherVram | Spot::Exclusive | Spot::Moving | Spot::Marked => Kind::Other,
            Spot::Nowhere => Kind::Nowhere,
        }
    }

    /// SGR parameters of the terminal.
    fn color(self) -> &'static str {
        const UNITS: [&str; 6] = ["32", "35", "36", "34", "33", "31"];
        match self {
            Kind::Vram(unit) => UNITS[unit as usize % UNITS.len()],
            Kind::Ram => "37",
            Kind::Swapped => "33",
            Kind::Other => "31",
            Kind::Nowhere => "90",
        }
    }
}

/// A place in words.
fn name(spot: Spot) -> String {
    match spot {
        Spot::Nowhere => "nowhere".to_owned(),
        Spot::Ram => "RAM".to_owned(),
        Spot::Vram(unit) => format!("VRAM of hmm_gpu{unit}"),
        Spot::OtherVram => "memory of another driver's device".to_owned(),
        Spot::Exclusive => "RAM, a device's alone".to_owned(),
        Spot::Moving => "moving".to_owned(),
        Spot::Swapped => "swapped".to_owned(),
        Spot::Away => "swapped or VRAM (root sees which)".to_owned(),
        Spot::Marked => "marked".to_owned(),
    }
}

/// Bytes at each place, in the order to be told.
fn sums<'a>(mappings: impl IntoIterator<Item = &'a Mapped>) -> Vec<(Spot, u64)> {
    let mut sums = BTreeMap::new();
    for (spot, pages) in mappings.into_iter().flat_map(|it| &it.runs) {
        *sums.entry(*spot).or_insert(0) += pages * 4096;
    }
    let mut sums: Vec<(Spot, u64)> = sums.into_iter().collect();
    sums.sort_by_key(|(spot, _)| (Kind::of(*spot), *spot));
    sums
}

/// How it is drawn.
struct Picture {
    glyphs: Glyphs,
    color: bool,
    width: u64,
    rows: u64,
}

impl Picture {
    /// The whole picture.
    fn draw(&self, title: &str, mappings: &[Mapped], all: bool) -> String {
        let (shown, rest): (Vec<&Mapped>, Vec<&Mapped>) =
            mappings.iter().partition(|it| all || it.has_vram());
        let mut text = format!("{title}: {}\n", self.list(&sums(mappings)));
        for it in &shown {
            self.mapping(it, &mut text);
        }
        if !rest.is_empty() {
            let what = self.list(&sums(rest.iter().copied()));
            let more = if shown.is_empty() { "" } else { "more " };
            let _ = writeln!(
                text,
                "\n{} {more}mappings without a page in VRAM (--all draws them): {what}",
                rest.len()
            );
        }
        if !shown.is_empty() {
            let _ = writeln!(text, "\n{}", self.legend(&shown));
        }
        text
    }

    fn mapping(&self, it: &Mapped, text: &mut String) {
        let vma = &it.vma;
        let named = if vma.name.is_empty() {
            "anonymous"
        } else {
            &vma.name
        };
        let _ = writeln!(
            text,
            "\n{:x}-{:x} {} {}  {named}\n  {}",
            vma.start,
            vma.end,
            vma.permissions,
            Bytes(vma.bytes()),
            self.list(&sums([it]))
        );
        let each = self.pages_of_a_mark(vma.bytes() / 4096);
        let marks = marks(it, each);
        for row in marks.chunks(usize::try_from(self.width).unwrap_or(usize::MAX)) {
            text.push_str("  ");
            self.row(row, text);
            text.push('\n');
        }
        if each > 1 {
            let _ = writeln!(text, "  a mark is {}", Bytes(each * 4096));
        }
    }

    /// A power of two, so that a mapping fits.
    fn pages_of_a_mark(&self, pages: u64) -> u64 {
        pages
            .div_ceil(self.width * self.rows)
            .max(1)
            .next_power_of_two()
    }

    fn row(&self, marks: &[Mark], text: &mut String) {
        let mut last = None;
        for mark in marks {
            let color = mark.main.color();
            if self.color && last != Some(color) {
                let _ = write!(text, "\x1b[{color}m");
                last = Some(color);
            }
            text.push(self.glyph(mark));
        }
        if last.is_some() {
            text.push_str("\x1b[0m");
        }
    }

    fn glyph(&self, mark: &Mark) -> char {
        let blocks = self.glyphs == Glyphs::Blocks;
        let pick = |block, ascii| if blocks { block } else { ascii };
        match mark.main {
            Kind::Vram(_) if mark.mixed => pick('▄', '+'),
            Kind::Vram(_) => pick('█', '#'),
            Kind::Ram => pick('░', '-'),
            Kind::Swapped => 's',
            Kind::Other => '?',
            Kind::Nowhere => pick('·', '.'),
        }
    }

    /// `VRAM of hmm_gpu0 2 MiB, RAM 4 MiB`, coloured.
    fn list(&self, sums: &[(Spot, u64)]) -> String {
        let one = |&(spot, bytes): &(Spot, u64)| {
            let text = format!("{} {}", name(spot), Bytes(bytes));
            if self.color {
                format!("\x1b[{}m{text}\x1b[0m", Kind::of(spot).color())
            } else {
                text
            }
        };
        let parts: Vec<String> = sums.iter().map(one).collect();
        if parts.is_empty() {
            "no memory".to_owned()
        } else {
            parts.join(", ")
        }
    }

    /// What the marks that were drawn mean.
    fn legend(&self, shown: &[&Mapped]) -> String {
        let mut kinds: Vec<Kind> = sums(shown.iter().copied())
            .iter()
            .map(|(spot, _)| Kind::of(*spot))
            .collect();
        kinds.dedup();
        let mut words = vec![];
        for kind in kinds {
            let what = match kind {
                Kind::Vram(unit) => format!("VRAM of hmm_gpu{unit}"),
                Kind::Ram => "RAM".to_owned(),
                Kind::Swapped => "swapped".to_owned(),
                Kind::Other => "anything else".to_owned(),
                Kind::Nowhere => "nowhere".to_owned(),
            };
            let mut glyph = String::new();
            self.row(
                &[Mark {
                    main: kind,
                    mixed: false,
                }],
                &mut glyph,
            );
            words.push(format!("{glyph} {what}"));
        }
        let mixed = |it: &&&Mapped| {
            let each = self.pages_of_a_mark(it.vma.bytes() / 4096);
            marks(it, each)
                .iter()
                .any(|mark| mark.mixed && matches!(mark.main, Kind::Vram(_)))
        };
        if shown.iter().any(|it| mixed(&it)) {
            let mark = Mark {
                main: Kind::Vram(0),
                mixed: true,
            };
            words.push(format!("{} partly VRAM", self.glyph(&mark)));
        }
        words.join("   ")
    }
}

/// Some pages that are drawn as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    /// The first kind there is, so that a page in VRAM is never hidden by its neighbours.
    main: Kind,
    /// Whether there are others.
    mixed: bool,
}

/// The marks of a mapping, of so many pages each.
fn marks(it: &Mapped, each: u64) -> Vec<Mark> {
    let mut marks: Vec<Mark> = vec![];
    let mut at = 0;
    for (spot, pages) in &it.runs {
        let kind = Kind::of(*spot);
        let end = at + pages;
        while at < end {
            let next = (at / each + 1) * each;
            if at % each == 0 {
                marks.push(Mark {
                    main: kind,
                    mixed: false,
                });
            } else if let Some(mark) = marks.last_mut() {
                mark.mixed |= mark.main != kind;
                mark.main = mark.main.min(kind);
            }
            at = next.min(end);
        }
    }
    marks
}

fn object(pid: u32, mappings: &[Mapped]) -> serde_json::Value {
    let place = |spot: Spot| match spot {
        Spot::Nowhere => "nowhere",
        Spot::Ram => "ram",
        Spot::Vram(_) => "vram",
        Spot::OtherVram => "other_vram",
        Spot::Exclusive => "exclusive",
        Spot::Moving => "moving",
        Spot::Swapped => "swapped",
        Spot::Away => "away",
        Spot::Marked => "marked",
    };
    let mapping = |it: &Mapped| {
        let runs = it.runs.iter().map(|(spot, pages)| {
            let mut run = json!({ "place": place(*spot), "pages": pages });
            if let Spot::Vram(unit) = spot {
                run["unit"] = (*unit).into();
            }
            run
        });
        json!({
            "start": it.vma.start, "end": it.vma.end, "permissions": it.vma.permissions, "name": it.vma.name,
            "runs": runs.collect::<Vec<_>>(),
        })
    };
    json!({ "pid": pid, "mappings": mappings.iter().map(mapping).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pagemap::Vma;

    fn mapped(name: &str, runs: &[(Spot, u64)]) -> Mapped {
        let pages: u64 = runs.iter().map(|(_, pages)| pages).sum();
        let start = 0x7f00_0000_0000;
        let vma = Vma {
            start,
            end: start + pages * 4096,
            permissions: "rw-p".to_owned(),
            name: name.to_owned(),
        };
        Mapped {
            vma,
            runs: runs.to_vec(),
        }
    }

    const PLAIN: Picture = Picture {
        glyphs: Glyphs::Blocks,
        color: false,
        width: 16,
        rows: 2,
    };

    #[test]
    fn a_process_is_drawn_mapping_by_mapping() {
        let mappings = [
            mapped(
                "",
                &[
                    (Spot::Vram(0), 12),
                    (Spot::Ram, 4),
                    (Spot::Vram(1), 1),
                    (Spot::Nowhere, 3),
                    (Spot::Swapped, 1),
                ],
            ),
            mapped("[heap]", &[(Spot::Ram, 512)]),
        ];
        assert_eq!(
            PLAIN.draw("process 7 (x)", &mappings, false),
            "process 7 (x): VRAM of hmm_gpu0 48 KiB, VRAM of hmm_gpu1 4 KiB, RAM 2 MiB, swapped 4 KiB, nowhere 12 KiB\n\
             \n\
             7f0000000000-7f0000015000 rw-p 84 KiB  anonymous\n  \
               VRAM of hmm_gpu0 48 KiB, VRAM of hmm_gpu1 4 KiB, RAM 16 KiB, swapped 4 KiB, nowhere 12 KiB\n  \
               ████████████░░░░\n  \
               █···s\n\
             \n\
             1 more mappings without a page in VRAM (--all draws them): RAM 2 MiB\n\
             \n\
             █ VRAM of hmm_gpu0   █ VRAM of hmm_gpu1   ░ RAM   s swapped   · nowhere\n"
        );
    }

    #[test]
    fn a_page_in_vram_is_not_hidden_by_its_neighbours() {
        let many = mapped(
            "",
            &[(Spot::Ram, 200), (Spot::Vram(2), 1), (Spot::Nowhere, 55)],
        );
        let text = PLAIN.draw("p", std::slice::from_ref(&many), false);
        // 8 pages a mark; page 200 is the first of mark 25.
        assert!(
            text.contains("  ░░░░░░░░░░░░░░░░\n  ░░░░░░░░░▄······\n  a mark is 32 KiB\n"),
            "{text}"
        );
        assert!(text.contains("▄ partly VRAM"), "{text}");
    }

    #[test]
    fn colours_tell_devices_apart_and_end_with_the_row() {
        let it = mapped("", &[(Spot::Vram(0), 2), (Spot::Vram(1), 2)]);
        let mut text = String::new();
        Picture {
            color: true,
            ..PLAIN
        }
        .row(&marks(&it, 1), &mut text);
        assert_eq!(text, "\x1b[32m██\x1b[35m██\x1b[0m");
    }

    proptest! {
        /// Catches pages that are drawn twice or not at all.
        #[test]
        fn every_page_is_in_its_mark(
            spots in prop::collection::vec((prop::sample::select(&[Spot::Nowhere, Spot::Ram, Spot::Vram(0), Spot::Vram(1)][..]), 1u64..40), 1..20),
            shift in 0u32..6,
        ) {
            let it = mapped("", &spots);
            let each = 1 << shift;
            let pages: Vec<Kind> =
                spots.iter().flat_map(|(spot, pages)| (0..*pages).map(|_| Kind::of(*spot))).collect();
            let expected: Vec<Mark> = pages
                .chunks(each)
                .map(|some| Mark {
                    main: *some.iter().min().unwrap(),
                    mixed: some.iter().any(|kind| *kind != some[0]),
                })
                .collect();
            prop_assert_eq!(marks(&it, each as u64), expected);
        }
    }
}
