//! `summary.json`: all measurements of a run, and where they were taken.

use serde::{Deserialize, Serialize};

use crate::comparison::Comparison;
use crate::record::{LeftOut, Measurement};
use hmm_gpu::Strategy;

/// The number of the schema that is written. `Documentation/benchmarks.md` describes it.
pub const SCHEMA: u32 = 3;

/// The kernels that each strategy is measured with.
pub const KERNELS: [&str; 4] = ["saxpy", "gather", "lists", "search"];

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Where it was measured.
    pub place: Place,
    /// What was measured, in the order in which it was.
    pub measurements: Vec<Measurement>,
    /// What was not measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// What was done on the driver and on the C module by turns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub comparisons: Vec<Comparison>,
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
        if self.measurements.is_empty() && self.comparisons.is_empty() {
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
        problems.extend(self.svm_problems());
        problems.extend(self.comparisons.iter().filter_map(Comparison::problem));
        problems
    }

    /// What is wrong with the measurements of shared virtual addressing, if there are any: each strategy has each kernel, or a reason.
    fn svm_problems(&self) -> Vec<String> {
        let of_svm = |workload: &str| workload == "svm";
        let measured = self.measurements.iter().filter(|m| of_svm(&m.workload));
        let left_out: Vec<&LeftOut> = self
            .left_out
            .iter()
            .filter(|what| of_svm(&what.workload))
            .collect();
        let mut problems = Vec::new();
        let mut seen = Vec::new();
        for m in measured {
            match (&m.svm, m.at) {
                (Some(svm), Some(share)) if svm.uses > 0 && share > 0.0 && share <= 100.0 => {
                    seen.push((svm.kernel.as_str(), svm.strategy.as_str()));
                }
                _ => problems.push(format!(
                    "svm, {}: it lacks a kernel with its uses, or its share is none: {:?}, {:?}",
                    m.case, m.svm, m.at
                )),
            }
        }
        if seen.is_empty() && left_out.is_empty() {
            return problems;
        }
        for strategy in Strategy::ALL.map(|strategy| strategy.to_string()) {
            match left_out.iter().find(|what| what.what == strategy) {
                Some(what) if what.why.is_empty() => {
                    problems.push(format!("svm: {strategy} is left out without a reason"));
                }
                Some(_) => {}
                None => problems.extend(
                    KERNELS
                        .iter()
                        .filter(|kernel| !seen.contains(&(kernel, strategy.as_str())))
                        .map(|kernel| format!("svm: no {kernel} with {strategy}, and no reason")),
                ),
            }
        }
        problems
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::record::Svm;
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
            left_out: Vec::new(),
            comparisons: Vec::new(),
        }
    }

    /// A turn of a kernel that took so many microseconds, within a tenth.
    pub(crate) fn svm(kernel: &str, strategy: &str, uses: u32, share: f64, us: u64) -> Measurement {
        let times = [us * 9 / 10, us, us * 11 / 10].map(Duration::from_micros);
        let case = format!("{kernel}, {strategy}, {uses}");
        let mut measured = Measurement::of_turns(("svm", &case), "4 KiB", 4096, &times).unwrap();
        measured.at = Some(share);
        measured.per = "dispatch".to_owned();
        measured.svm = Some(Svm {
            kernel: kernel.to_owned(),
            strategy: strategy.to_owned(),
            uses,
        });
        measured
    }

    #[test]
    fn each_strategy_is_measured_or_left_out_with_a_reason() {
        let all = |strategies: &[&str]| -> Vec<Measurement> {
            let of = |strategy| KERNELS.map(|kernel| svm(kernel, strategy, 1, 100.0, 50));
            strategies
                .iter()
                .flat_map(|strategy| of(*strategy))
                .collect()
        };
        let most = ["native", "imported", "mapped", "copy"];
        let mut summary = summary(all(&most));
        assert_eq!(summary.problems().len(), KERNELS.len());
        summary.left_out.push(LeftOut {
            workload: "svm".to_owned(),
            what: "translated".to_owned(),
            why: String::new(),
        });
        assert!(summary.problems()[0].contains("without a reason"));
        summary.left_out[0].why = "there is no driver".to_owned();
        assert_eq!(summary.problems(), Vec::<String>::new());
        let text = serde_json::to_string(&summary).unwrap();
        assert_eq!(serde_json::from_str::<Summary>(&text).unwrap(), summary);
        summary
            .measurements
            .retain(|m| !m.case.starts_with("lists, copy"));
        assert_eq!(
            summary.problems(),
            ["svm: no lists with copy, and no reason"]
        );
        summary.measurements[0].at = Some(101.0);
        summary.measurements[1].svm = None;
        assert!(summary.problems().len() > 2);
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
