//! `hmm-gpu-report RECORDS DIR`: makes `summary.json`, `index.html` and the plots of it in DIR, of what the benchmarks have left, and prints
//! a table. `hmm-gpu-report --check SUMMARY` says whether a summary is one, `--markdown SUMMARY` prints what is beside the C module in it as
//! the documentation has it.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use hmm_gpu_bench::summary::{Place, Summary, SCHEMA};
use hmm_gpu_bench::{comparison, crossover, page, record};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.as_slice() {
        [check, summary] if check == "--check" => check_summary(Path::new(summary)),
        [markdown, summary] if markdown == "--markdown" => {
            read(Path::new(summary)).map(|summary| print!("{}", comparison::markdown(&summary)))
        }
        [records, dir] => report(Path::new(records), Path::new(dir)),
        _ => Err("usage: hmm-gpu-report RECORDS DIR | --check SUMMARY | --markdown SUMMARY".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hmm-gpu-report: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(records: &Path, dir: &Path) -> Result<(), Box<dyn Error>> {
    let device = std::env::var("HMM_GPU_BENCH_DEVICE").unwrap_or_else(|_| "unknown".to_owned());
    let found = record::read(records)?;
    let summary = Summary {
        schema: SCHEMA,
        place: Place::here(device),
        measurements: found.measurements,
        left_out: found.left_out,
        comparisons: found.comparisons,
    };
    usable(&summary)?;
    std::fs::create_dir_all(dir)?;
    std::fs::write(
        dir.join("summary.json"),
        serde_json::to_string_pretty(&summary)? + "\n",
    )?;
    std::fs::write(dir.join("index.html"), page::page(&summary))?;
    for (name, svg) in page::plots(&summary) {
        std::fs::write(dir.join(format!("{name}.svg")), svg)?;
    }
    if !summary.measurements.is_empty() {
        print!("{}{}", page::table(&summary), crossover::text(&summary));
    }
    Ok(())
}

fn read(path: &Path) -> Result<Summary, Box<dyn Error>> {
    let summary: Summary = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    usable(&summary)?;
    Ok(summary)
}

fn check_summary(path: &Path) -> Result<(), Box<dyn Error>> {
    let summary = read(path)?;
    println!(
        "{} measurements, {} comparisons",
        summary.measurements.len(),
        summary.comparisons.len()
    );
    Ok(())
}

fn usable(summary: &Summary) -> Result<(), Box<dyn Error>> {
    match summary.problems().as_slice() {
        [] => Ok(()),
        problems => Err(problems.join("\n").into()),
    }
}
