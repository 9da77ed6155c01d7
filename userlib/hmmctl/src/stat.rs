//! Counters, once or as a stream.

use std::io::Write;
use std::time::Instant;

use hmm_gpu::Counters;
use serde_json::{json, Value};

use crate::cli::StatArgs;
use crate::error::Error;
use crate::nodes;

/// The verb `stat`.
pub fn run(args: &StatArgs, out: &mut dyn Write) -> Result<(), Error> {
    let device = nodes::open(args.device.as_deref())?;
    let mut before = device.counters()?;
    let Some(every) = args.every else {
        if args.json {
            writeln!(out, "{}", object(device.unit(), &before, None))?;
            return Ok(());
        }
        for (name, value) in before.iter() {
            writeln!(out, "{name:<20} {value}")?;
        }
        return Ok(());
    };
    let mut at = Instant::now();
    for line in 0..args.count.unwrap_or(u64::MAX) {
        if !args.json && line % 20 == 0 {
            writeln!(out, "{}", header())?;
        }
        // Before the wait, or who reads through a pipe is always one line behind.
        out.flush()?;
        std::thread::sleep(every);
        let (now, time) = (device.counters()?, at.elapsed());
        at = Instant::now();
        let work = now - before;
        before = now;
        if args.json {
            writeln!(
                out,
                "{}",
                object(device.unit(), &work, Some(time.as_secs_f64()))
            )?;
        } else {
            writeln!(out, "{}", row(&work, time.as_secs_f64()))?;
        }
    }
    Ok(())
}

/// A column: its title, and what is in it, as pages or events a second.
type Column = (&'static str, fn(&Counters) -> u64);

const COLUMNS: [Column; 9] = [
    ("req-to", |it| {
        it.to_device_pages - it.device_fault_pages.min(it.to_device_pages)
    }),
    ("fault-to", |it| it.device_fault_pages),
    ("req-back", |it| it.to_system_pages),
    ("touch-back", |it| it.fault_back_pages),
    ("pressure", |it| it.pressure_pages),
    ("skipped", |it| it.skipped_pages),
    ("cpu-faults", |it| it.cpu_faults),
    ("dev-faults", |it| it.device_faults),
    ("bounces", |it| it.bounces),
];

fn header() -> String {
    let titles = COLUMNS.iter().map(|(title, _)| format!("{title:>12}"));
    format!(
        "{:>10}{}   (pages or events a second)",
        "in VRAM",
        titles.collect::<String>()
    )
}

fn row(work: &Counters, seconds: f64) -> String {
    let cells = COLUMNS
        .iter()
        .map(|(_, of)| format!("{:>12.0}", of(work) as f64 / seconds));
    let vram = hmm_gpu::Bytes(work.live_pages * 4096).to_string();
    format!("{vram:>10}{}", cells.collect::<String>())
}

/// All counters. Of a stream: what happened in so many seconds.
fn object(unit: u32, counters: &Counters, seconds: Option<f64>) -> Value {
    let mut object = json!({ "unit": unit });
    if let Some(seconds) = seconds {
        object["seconds"] = seconds.into();
    }
    for (name, value) in counters.iter() {
        object[name] = value.into();
    }
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_as_wide_as_its_header() {
        let mut work = Counters::default();
        work.live_pages = 1 << 18;
        work.to_device_pages = 3000;
        work.device_fault_pages = 1000;
        let line = row(&work, 0.5);
        let cells: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(cells[..4], ["1", "GiB", "4000", "2000"]);
        assert!(header().starts_with(&format!("{:>10}{:>12}", "in VRAM", "req-to")));
        assert_eq!(line.chars().count(), header().find("   (").unwrap());
    }

    #[test]
    fn json_has_every_counter() {
        let counters = Counters::default();
        let value = object(3, &counters, Some(1.5));
        assert_eq!(
            value.as_object().unwrap().len(),
            counters.iter().count() + 2
        );
        assert_eq!(
            (&value["unit"], &value["seconds"]),
            (&json!(3), &json!(1.5))
        );
    }
}
