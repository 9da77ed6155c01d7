//! `summary.json`: all measurements of a run, and where they were taken.

use serde::{Deserialize, Serialize};

use crate::record::Measurement;

/// The number of the schema that is written. `Documentation/benchmarks.md` describes it.
pub const SCHEMA: u32 = 1;

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where it was measured.
    pub place: Place,
    /// What was measured, in the order in which it was.
    pub measurements: Vec<Measurement>,
}

/// Where measurements were taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// `quick`, `emulated` or `full`: how much was measured.
    pub plan: String,
    /// The kernel's release.
    pub kernel: String,
    /// The processor, as it names itself.
    pub processor: String,
    /// How many there are.
    pub processors: usize,
    /// In the virtual GPU host, emulated in software: only ratios mean something.
    pub emulated: bool,
    /// The clock counts instructions.
    pub instructions: bool,
    /// The device, as the driver describes it.
    pub device: String,
    /// The revision of the sources, as git names it.
    pub revision: String,
}

impl Place {
    /// Of this machine. What it cannot know is in the environment: `HMM_GPU_BENCH_EMULATED`, `HMM_GPU_ICOUNT`,
    /// `HMM_GPU_BENCH_REVISION`.
    pub fn here(device: String) -> Self {
        let is_set =
            |name| std::env::var(name).is_ok_and(|value| !["", "0"].contains(&value.as_str()));
        let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            plan: crate::plan::Plan::from_env().name().to_owned(),
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            processor: processor_of(&processors),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            emulated: is_set("HMM_GPU_BENCH_EMULATED"),
            instructions: is_set("HMM_GPU_ICOUNT"),
            device,
            revision: std::env::var("HMM_GPU_BENCH_REVISION")
                .unwrap_or_else(|_| "unknown".to_owned()),
        }
    }
}

fn processor_of(cpuinfo: &str) -> String {
    let name = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = name.and_then(|rest| rest.split_once(':'));
    name.map_or("unknown", |(_, name)| name.trim()).to_owned()
}

impl Summary {
    /// What is wrong with it; nothing if it can be used.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.schema != SCHEMA {
            problems.push(format!("schema {} is not {SCHEMA}", self.schema));
        }
        if self.measurements.is_empty() {
            problems.push("nothing was measured".to_owned());
        }
        for measured in &self.measurements {
            let ns = measured.ns;
            let ordered = [ns.least, ns.low, ns.median, ns.high, ns.p99, ns.most].is_sorted();
            if ns.count == 0 || ns.least < 0.0 || ns.median <= 0.0 || !ordered {
                problems.push(format!(
                    "{}, {}, {} bytes: these are no times: {ns:?}",
                    measured.workload, measured.case, measured.bytes
                ));
            }
        }
        problems
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::Duration;

    pub(crate) fn measured(workload: &str, case: &str, bytes: usize, us: u64) -> Measurement {
        let times = [us, us + 1, us + 2].map(Duration::from_micros);
        Measurement::of_turns((workload, case), "4 KiB", bytes, &times).unwrap()
    }

    pub(crate) fn summary(measurements: Vec<Measurement>) -> Summary {
        Summary {
            schema: SCHEMA,
            place: Place::here("a device".to_owned()),
            measurements,
        }
    }

    #[test]
    fn a_summary_comes_back_from_its_text() {
        let summary = summary(vec![measured("migration", "to device", 1 << 20, 900)]);
        let text = serde_json::to_string_pretty(&summary).unwrap();
        let back: Summary = serde_json::from_str(&text).unwrap();
        assert_eq!(back.problems(), Vec::<String>::new());
        assert_eq!(back.measurements.len(), 1);
        assert_eq!(back.place, summary.place);
    }

    #[test]
    fn what_cannot_be_is_told() {
        assert!(summary(vec![]).problems()[0].contains("nothing"));
        let mut wrong = summary(vec![measured("w", "c", 4096, 5)]);
        wrong.measurements[0].ns.low = 1e9;
        assert_eq!(wrong.problems().len(), 1);
        wrong.schema = 0;
        assert_eq!(wrong.problems().len(), 2);
    }

    #[test]
    fn a_processor_has_a_name() {
        let text = "processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n";
        assert_eq!(processor_of(text), "QEMU TCG CPU version 2.5+");
        assert_eq!(processor_of(""), "unknown");
    }
}
