//! The picture.

use hmm_gpu::Bytes;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table};
use ratatui::Frame;

use super::state::{Gpu, State, PAST};

/// Rows of a device: its frame, how full it is, and what it does.
const GPU_ROWS: u16 = 7;

/// Rows that all of it takes.
pub fn height(state: &State) -> u16 {
    let processes = u16::try_from(state.processes.len()).unwrap_or(u16::MAX);
    let gpus = u16::try_from(state.gpus.len()).unwrap_or(u16::MAX);
    // Two rows of the frame, a header, those of whom nothing is known, the keys.
    gpus.saturating_mul(GPU_ROWS)
        .saturating_add(processes)
        .saturating_add(5)
}

/// Draws it.
pub fn draw(frame: &mut Frame, state: &State) {
    let mut rows: Vec<Constraint> = state
        .gpus
        .iter()
        .map(|_| Constraint::Length(GPU_ROWS))
        .collect();
    rows.extend([Constraint::Min(3), Constraint::Length(1)]);
    let areas = Layout::vertical(rows).split(frame.area());
    for (gpu, area) in state.gpus.iter().zip(areas.iter()) {
        device(frame, gpu, *area);
    }
    if let [.., list, keys] = &areas[..] {
        processes(frame, state, *list);
        frame.render_widget(Line::from("q quits").dim(), *keys);
    }
}

/// Colours of units, as `map` has them.
fn color(unit: u32) -> Color {
    const UNITS: [Color; 6] = [
        Color::Green,
        Color::Magenta,
        Color::Cyan,
        Color::Blue,
        Color::Yellow,
        Color::Red,
    ];
    UNITS[unit as usize % UNITS.len()]
}

fn device(frame: &mut Frame, gpu: &Gpu, area: Rect) {
    let it = &gpu.facts;
    let place = it.pci.as_deref().unwrap_or("a soft device");
    let block = Block::bordered().title(format!(" hmm_gpu{}  {place} ", it.unit));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [full, rest] = Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(inner);

    let used = it.vram.saturating_sub(it.free);
    let label = format!("VRAM {} of {} ", Bytes(used), Bytes(it.vram));
    let room = u64::from(full.width).saturating_sub(label.len() as u64);
    // What is used at all is seen.
    let filled = match it.vram {
        0 => 0,
        vram => (room * used).div_ceil(vram).min(room),
    };
    let bar = |glyph: &str, marks: u64| glyph.repeat(usize::try_from(marks).unwrap_or(0));
    let gauge = Line::from(vec![
        Span::from(label),
        Span::from(bar("█", filled)).fg(color(it.unit)),
        Span::from(bar("░", room - filled)).dim(),
    ]);
    frame.render_widget(gauge, full);

    let [to, back, faults, past] = Layout::horizontal([
        Constraint::Length(26),
        Constraint::Length(26),
        Constraint::Length(24),
        Constraint::Min(0),
    ])
    .areas(rest);
    let work = &gpu.work;
    let requested = work.to_device_pages.saturating_sub(work.device_fault_pages);
    lines(
        frame,
        to,
        gpu,
        "pages/s to VRAM",
        &[
            ("by request", requested),
            ("device fault", work.device_fault_pages),
            ("skipped", work.skipped_pages),
        ],
    );
    lines(
        frame,
        back,
        gpu,
        "pages/s to RAM",
        &[
            ("by request", work.to_system_pages),
            ("CPU touch", work.fault_back_pages),
            ("pressure", work.pressure_pages),
        ],
    );
    lines(
        frame,
        faults,
        gpu,
        "faults/s",
        &[
            ("CPU", work.cpu_faults),
            ("device", work.device_faults),
            ("bouncing", work.bounces + work.kept_pages),
        ],
    );
    if past.width >= 12 {
        let [title, bars] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(0)]).areas(past);
        frame.render_widget(Line::from("pages moved, lately").dim(), title);
        let width = usize::from(bars.width).min(PAST);
        let skip = gpu.past.len().saturating_sub(width);
        let past: Vec<u64> = gpu.past.iter().skip(skip).copied().collect();
        frame.render_widget(
            Sparkline::default()
                .data(past)
                .style(Style::new().fg(color(it.unit))),
            bars,
        );
    }
}

/// A title, and below it names with their rates.
fn lines(frame: &mut Frame, area: Rect, gpu: &Gpu, title: &str, counts: &[(&str, u64)]) {
    let mut text = vec![Line::from(title.to_owned()).dim()];
    for (name, count) in counts {
        let rate = gpu.rate(*count);
        let number = Span::from(format!("{:>9}", short(rate)));
        let number = if *count > 0 {
            number.add_modifier(Modifier::BOLD)
        } else {
            number.dim()
        };
        text.push(Line::from(vec![Span::from(format!("{name:<13}")), number]));
    }
    frame.render_widget(Paragraph::new(text), area);
}

/// A number in a few characters.
fn short(number: f64) -> String {
    match number {
        n if n >= 1e7 => format!("{:.0}M", n / 1e6),
        n if n >= 1e5 => format!("{:.0}k", n / 1e3),
        n if n > 0.0 && n < 1.0 => format!("{n:.1}"),
        n => format!("{n:.0}"),
    }
}

fn processes(frame: &mut Frame, state: &State, area: Rect) {
    let units: Vec<u32> = state.gpus.iter().map(|gpu| gpu.facts.unit).collect();
    let mut header = vec!["    PID".to_owned(), "process".to_owned()];
    header.extend(
        units
            .iter()
            .map(|unit| format!("{:>11}", format!("hmm_gpu{unit}"))),
    );
    header.push("node".to_owned());
    let mut rows: Vec<Row> = state
        .processes
        .iter()
        .map(|it| {
            let mut cells = vec![format!("{:>7}", it.pid), it.comm.clone()];
            cells.extend(units.iter().map(|unit| {
                let cell = match it
                    .vram
                    .as_ref()
                    .map(|vram| vram.get(unit).copied().unwrap_or(0))
                {
                    None => "?".to_owned(),
                    Some(0) => "-".to_owned(),
                    Some(bytes) => Bytes(bytes).to_string(),
                };
                format!("{cell:>11}")
            }));
            cells.push(if it.is_client { "open" } else { "closed" }.to_owned());
            Row::new(cells)
        })
        .collect();
    if state.gpus.iter().any(|gpu| state.unseen(gpu) > 0) {
        let mut cells = vec![String::new(), "others".to_owned()];
        cells.extend(
            state
                .gpus
                .iter()
                .map(|gpu| format!("{:>11}", Bytes(state.unseen(gpu)).to_string())),
        );
        rows.push(Row::new(cells).dim());
    }
    if rows.is_empty() {
        rows.push(Row::new(["", "nobody"]).dim());
    }
    let mut widths = vec![Constraint::Length(7), Constraint::Length(16)];
    widths.extend(units.iter().map(|_| Constraint::Length(11)));
    widths.push(Constraint::Length(7));
    let table = Table::new(rows, widths)
        .header(Row::new(header).dim())
        .column_spacing(2)
        .block(Block::bordered().title(" VRAM by process "));
    frame.render_widget(table, area);
}
