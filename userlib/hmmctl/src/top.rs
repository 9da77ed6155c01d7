//! Who has the VRAM, and what moves, live.

mod draw;
mod state;

use std::io::Write;
use std::time::{Duration, Instant};

use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::Terminal;

use crate::cli::TopArgs;
use crate::error::Error;
use crate::host::Host;
use state::State;

/// The verb `top`.
pub fn run(host: &Host, args: &TopArgs, out: &mut dyn Write) -> Result<(), Error> {
    let mut state = State::new(host)?;
    if args.once {
        std::thread::sleep(args.every);
        state.look(host);
        out.write_all(text(&state, 100)?.as_bytes())?;
        return Ok(());
    }
    // It puts the terminal back also when it panics.
    let mut terminal = ratatui::try_init()?;
    let result = watch(host, args.every, &mut state, &mut terminal);
    ratatui::restore();
    result
}

fn watch(
    host: &Host,
    every: Duration,
    state: &mut State,
    terminal: &mut ratatui::DefaultTerminal,
) -> Result<(), Error> {
    let mut next = Instant::now() + every;
    loop {
        terminal.draw(|frame| draw::draw(frame, state))?;
        while event::poll(next.saturating_duration_since(Instant::now()))? {
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                        return Ok(())
                    }
                    _ => {}
                },
                Event::Resize(..) => {
                    terminal.draw(|frame| draw::draw(frame, state))?;
                }
                _ => {}
            }
        }
        state.look(host);
        next = Instant::now() + every;
    }
}

/// What a terminal of so many columns shows, without what is empty.
fn text(state: &State, columns: u16) -> Result<String, Error> {
    let mut terminal = Terminal::new(TestBackend::new(columns, draw::height(state)))?;
    terminal.draw(|frame| draw::draw(frame, state))?;
    let buffer = terminal.backend().buffer();
    let rows = buffer.content().chunks(usize::from(columns));
    let row = |cells: &[ratatui::buffer::Cell]| {
        let row: String = cells.iter().map(ratatui::buffer::Cell::symbol).collect();
        format!("{}\n", row.trim_end())
    };
    Ok(rows.map(row).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hmm_gpu::Counters;

    use super::state::{Gpu, Process};
    use super::*;

    fn process(pid: u32, comm: &str, vram: Option<&[(u32, u64)]>, is_client: bool) -> Process {
        let vram = vram.map(|vram| vram.iter().copied().collect::<BTreeMap<u32, u64>>());
        Process {
            pid,
            comm: comm.to_owned(),
            vram,
            is_client,
        }
    }

    fn gpu(live_pages: u64) -> Gpu {
        let mut counters = Counters::default();
        counters.live_pages = live_pages;
        counters.table_pages = 3;
        let mut work = Counters::default();
        work.to_device_pages = 16_000;
        work.device_fault_pages = 1_000;
        work.fault_back_pages = 250;
        work.bounces = 2;
        Gpu {
            facts: state::Facts {
                unit: 0,
                pci: Some("0000:00:10.0".to_owned()),
                vram: 256 << 20,
                free: (256 << 20) - live_pages * 4096,
            },
            counters,
            work,
            seconds: 0.5,
            past: (0..60).map(|n| n * 10).collect(),
        }
    }

    /// Catches a picture in which something is cut off, or stands in the wrong place.
    #[test]
    fn the_picture_shows_who_has_what_and_what_moves() {
        let processes = vec![
            process(412, "mirror", Some(&[(0, 64 << 20)]), true),
            process(77, "a child", Some(&[(0, 1 << 20)]), false),
        ];
        let state = State::of(vec![gpu(16384 + 256 + 3 + 512)], processes);
        let text = text(&state, 100).unwrap();
        println!("{text}");
        for words in [
            "hmm_gpu0  0000:00:10.0",
            "VRAM 67 MiB of 256 MiB",
            "by request       30000",
            "device fault      2000",
            "CPU touch          500",
            "bouncing             4",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
        let row = |name: &str| {
            text.lines()
                .find(|line| line.contains(name))
                .unwrap()
                .split_whitespace()
                .collect::<Vec<_>>()
        };
        assert_eq!(
            row("mirror"),
            ["│", "412", "mirror", "64", "MiB", "open", "│"]
        );
        assert_eq!(
            row("a child"),
            ["│", "77", "a", "child", "1", "MiB", "closed", "│"]
        );
        assert_eq!(row("others"), ["│", "others", "2", "MiB", "│"]);
    }

    #[test]
    fn what_cannot_be_seen_is_not_called_nothing() {
        let state = State::of(vec![gpu(3)], vec![process(1, "x", None, true)]);
        let shown = text(&state, 100).unwrap();
        assert!(shown.contains("?  open"), "{shown}");
        let state = State::of(vec![gpu(3)], vec![]);
        assert!(text(&state, 100).unwrap().contains("nobody"));
    }

    #[test]
    fn a_small_terminal_is_no_reason_to_panic() {
        let state = State::of(vec![gpu(100), gpu(100)], vec![process(1, "x", None, true)]);
        for (columns, rows) in [(1, 1), (10, 3), (30, 9), (200, 2)] {
            let mut terminal = Terminal::new(TestBackend::new(columns, rows)).unwrap();
            terminal.draw(|frame| draw::draw(frame, &state)).unwrap();
        }
    }
}
