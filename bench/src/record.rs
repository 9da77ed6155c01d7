//! What a benchmark leaves: a line of JSON for each thing it has measured, in the file that `HMM_GPU_BENCH_RECORDS` names.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::comparison::Comparison;
use crate::spread::Spread;
use crate::PAGE;

/// One thing that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The benchmark: `migration`, `faults`, `mirror`, `pressure`, `scaling` or `svm`.
    pub workload: String,
    /// What of it: `to device`, say.
    pub case: String,
    /// `4 KiB` or `2 MiB`: what the kernel was asked for.
    pub pages: String,
    /// Bytes that one turn works on.
    pub bytes: u64,
    /// Where it is along the axis of the workload's plot, if that is not `bytes`: working set over VRAM, threads, or percent of the pages that
    /// a kernel touches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<f64>,
    /// Nanoseconds per 4 KiB page, or per what [`per`](Self::per) says; instructions on a clock that counts them.
    pub ns: Spread,
    /// `page`, `touch`, `fault`, `dispatch` or `search`.
    pub per: String,
    /// Of `svm`: what ran, how, and how often.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub svm: Option<Svm>,
    /// What else there is to say of it in numbers: shares of the phases, pages that were evicted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub more: BTreeMap<String, f64>,
}

/// What a kernel was measured with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Svm {
    /// The kernel.
    pub kernel: String,
    /// The strategy, as the library names it; or [`KEPT`].
    pub strategy: String,
    /// How often the same data was used before the CPU had it again.
    pub uses: u32,
}

/// The strategy `mapped` with data that was written to Vulkan's own memory once, for all its uses.
pub const KEPT: &str = "mapped, kept";

/// What was not measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The benchmark.
    pub workload: String,
    /// What of it: a strategy.
    pub what: String,
    /// Why.
    pub why: String,
}

/// What a file of records has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// What was measured, in the order in which it was.
    pub measurements: Vec<Measurement>,
    /// What was not.
    pub left_out: Vec<LeftOut>,
    /// What two drivers have done by turns.
    pub comparisons: Vec<Comparison>,
}

/// A line of it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Measured(Box<Measurement>),
    Compared(Box<Comparison>),
    LeftOut(LeftOut),
}

impl Measurement {
    /// Of `bytes`, of which each turn took one of `times`. `None` without any.
    pub fn of_turns(
        (workload, case): (&str, &str),
        pages: &str,
        bytes: usize,
        times: &[Duration],
    ) -> Option<Self> {
        let count = bytes.div_ceil(PAGE).max(1) as f64;
        let per_page = times.iter().map(|time| time.as_nanos() as f64 / count);
        Some(Self {
            workload: workload.to_owned(),
            case: case.to_owned(),
            pages: pages.to_owned(),
            bytes: bytes as u64,
            at: None,
            ns: Spread::of(per_page.collect())?,
            per: "page".to_owned(),
            svm: None,
            more: BTreeMap::new(),
        })
    }

    /// Bytes per second at the middle time; of what is measured by page.
    pub fn throughput(&self) -> f64 {
        PAGE as f64 / (self.ns.median * 1e-9)
    }
}

/// Where measurements go.
pub struct Records {
    file: Option<File>,
}

impl Records {
    /// As `HMM_GPU_BENCH_RECORDS` says; without it they go nowhere. What is in the file stays.
    pub fn from_env() -> io::Result<Self> {
        let file = match std::env::var_os("HMM_GPU_BENCH_RECORDS") {
            Some(path) => Some(File::options().create(true).append(true).open(path)?),
            None => None,
        };
        Ok(Self { file })
    }

    /// Writes one.
    pub fn add(&mut self, measurement: &Measurement) -> io::Result<()> {
        self.write(measurement)
    }

    /// Writes what two drivers have done by turns.
    pub fn compare(&mut self, comparison: &Comparison) -> io::Result<()> {
        self.write(comparison)
    }

    /// Writes that something is not measured, and why.
    pub fn leave_out(&mut self, what: &LeftOut) -> io::Result<()> {
        self.write(what)
    }

    fn write(&mut self, record: &impl Serialize) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            file.write_all(&line)?;
        }
        Ok(())
    }
}

/// Reads what was left.
pub fn read(path: &Path) -> io::Result<Found> {
    let text = std::fs::read_to_string(path)?;
    let mut found = Found::default();
    for line in text.lines().filter(|line| !line.is_empty()) {
        match serde_json::from_str(line)? {
            Line::Measured(measured) => found.measurements.push(*measured),
            Line::Compared(compared) => found.comparisons.push(*compared),
            Line::LeftOut(what) => found.left_out.push(what),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_given_per_page() {
        let times = [Duration::from_micros(8), Duration::from_micros(4)];
        let measured = Measurement::of_turns(("w", "c"), "4 KiB", 4 * PAGE, &times).unwrap();
        assert_eq!((measured.ns.least, measured.ns.most), (1000.0, 2000.0));
        assert_eq!(measured.ns.count, 2);
        assert_eq!(Measurement::of_turns(("w", "c"), "4 KiB", PAGE, &[]), None);
    }

    #[test]
    fn what_is_written_is_read() {
        let path = std::env::temp_dir().join(format!("hmm-gpu-records-{}", std::process::id()));
        let mut measured =
            Measurement::of_turns(("w", "c"), "2 MiB", 1 << 20, &[Duration::from_millis(1)])
                .unwrap();
        let mut records = Records {
            file: Some(File::create(&path).unwrap()),
        };
        records.add(&measured).unwrap();
        measured.at = Some(0.5);
        measured.more.insert("copy".to_owned(), 0.25);
        let what = LeftOut {
            workload: "w".to_owned(),
            what: "native".to_owned(),
            why: "it is another device".to_owned(),
        };
        records.leave_out(&what).unwrap();
        let what_two_did = ("to device", "4 KiB", 4096);
        let compared = Comparison::of(what_two_did, vec![1.0], vec![2.0], vec![0.5]).unwrap();
        records.compare(&compared).unwrap();
        records.add(&measured).unwrap();
        let found = read(&path).unwrap();
        std::fs::write(&path, "{\"workload\": 1}\n").unwrap();
        assert!(read(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(found.measurements.len(), 2);
        assert_eq!(found.measurements[1], measured);
        assert_eq!(found.measurements[0].at, None);
        assert_eq!(found.left_out, [what]);
        assert_eq!(found.comparisons, [compared]);
    }
}
