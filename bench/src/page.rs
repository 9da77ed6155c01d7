//! The page with the plots that a reader wants first.

use std::fmt::Write;

use crate::comparison;
use crate::crossover;
use crate::plot::{self, escaped, lines, Axis, Line, Point, Scale};
use crate::record::Measurement;
use crate::summary::Summary;

/// A size in words: `2 MiB`.
pub fn size(bytes: f64) -> String {
    match bytes {
        bytes if bytes >= (1 << 30) as f64 => format!("{} GiB", bytes / (1 << 30) as f64),
        bytes if bytes >= (1 << 20) as f64 => format!("{} MiB", bytes / (1 << 20) as f64),
        bytes if bytes >= 1024.0 => format!("{} KiB", bytes / 1024.0),
        bytes => format!("{bytes} B"),
    }
}

fn plain(value: f64) -> String {
    format!("{}", (value * 1000.0).round() / 1000.0)
}

/// A number in few letters: `67.1M`.
fn short(value: f64) -> String {
    match value {
        value if value >= 1e9 => format!("{}G", (value / 1e8).round() / 10.0),
        value if value >= 1e6 => format!("{}M", (value / 1e5).round() / 10.0),
        value if value >= 1e4 => format!("{}k", (value / 1e2).round() / 10.0),
        value => plain(value),
    }
}

const BYTES: Axis = Axis {
    title: "bytes moved at once",
    scale: Scale::Log,
    label: size,
};

/// The plots: a name for the file, and the SVG.
pub fn plots(summary: &Summary) -> Vec<(&'static str, String)> {
    let (unit, per_second) = if summary.place.instructions {
        ("instructions per page", "MB per 10^9 instructions")
    } else {
        ("ns per 4 KiB page", "MB/s")
    };
    let throughput = |m: &Measurement| {
        let of = |ns: f64| crate::PAGE as f64 / ns * 1e3;
        (
            m.bytes as f64,
            of(m.ns.median),
            Some((of(m.ns.high), of(m.ns.low))),
        )
    };
    let cost = |m: &Measurement| (m.bytes as f64, m.ns.median, Some((m.ns.low, m.ns.high)));
    let along = |m: &Measurement| {
        (
            m.at.unwrap_or(m.bytes as f64),
            m.ns.median,
            Some((m.ns.low, m.ns.high)),
        )
    };
    let ns = |title| Axis {
        title,
        scale: Scale::Log,
        label: short,
    };
    let ratio = |title| Axis {
        title,
        scale: Scale::Log,
        label: plain,
    };
    vec![
        (
            "throughput",
            lines(
                "Migration: throughput over size",
                BYTES,
                ns(per_second),
                &by_case(summary, "migration", throughput),
            ),
        ),
        (
            "cost",
            lines(
                "Migration: cost of a page over size",
                BYTES,
                ns(unit),
                &by_case(summary, "migration", cost),
            ),
        ),
        ("latency", latency(summary)),
        (
            "pressure",
            lines(
                "Working sets larger than VRAM",
                ratio("working set / VRAM"),
                ns(unit),
                &by_case(summary, "pressure", along),
            ),
        ),
        (
            "scaling",
            lines(
                "Threads and processes on memory of their own",
                ratio("how many"),
                ns(unit),
                &by_case(summary, "scaling", along),
            ),
        ),
        (
            "compare",
            lines(
                "Beside the C module: how many times the cost",
                BYTES,
                ratio("C module / driver"),
                &comparison::lines(summary),
            ),
        ),
        ("crossover", crossing(summary, Reuse::Least)),
        ("crossover-reused", crossing(summary, Reuse::Most)),
    ]
}

/// A line for each case of a workload, with a point for each of its measurements.
fn by_case(summary: &Summary, workload: &str, point: impl Fn(&Measurement) -> Point) -> Vec<Line> {
    let measured = summary.measurements.iter();
    let measured = measured.filter(|m| m.workload == workload);
    plot::by_name(measured.map(|m| (format!("{}, {}", m.case, m.pages), point(m))))
}

/// Which of the numbers of uses that there are.
#[derive(Clone, Copy)]
enum Reuse {
    Least,
    Most,
}

/// What a dispatch costs over the share of the data that it touches: where lines cross, another strategy is the better one.
fn crossing(summary: &Summary, reuse: Reuse) -> String {
    let measured = || crossover::measured(summary, "gather");
    let all = measured().map(|(_, svm, _)| svm.uses);
    let uses = match reuse {
        Reuse::Least => all.min(),
        Reuse::Most => all.max(),
    };
    let of_uses = measured().filter(|(_, svm, _)| Some(svm.uses) == uses);
    let lines = plot::by_name(of_uses.map(|(m, svm, share)| {
        let point = (share, m.ns.median, Some((m.ns.low, m.ns.high)));
        (svm.strategy.clone(), point)
    }));
    let title = match uses {
        None => "Strategy crossover: sparse gather".to_owned(),
        Some(1) => "Strategy crossover: sparse gather, data used once".to_owned(),
        Some(uses) => format!("Strategy crossover: sparse gather, data used {uses} times"),
    };
    plot::lines(
        &title,
        Axis {
            title: "% of the pages touched",
            scale: Scale::Log,
            label: plain,
        },
        Axis {
            title: if summary.place.instructions {
                "instructions per dispatch"
            } else {
                "ns per dispatch"
            },
            scale: Scale::Log,
            label: short,
        },
        &lines,
    )
}

/// What share of touches took no longer than that.
fn latency(summary: &Summary) -> String {
    let touched = summary
        .measurements
        .iter()
        .filter(|m| m.workload == "faults");
    let all = touched.map(|m| Line {
        name: m.case.clone(),
        points: [
            (0.0, m.ns.least),
            (25.0, m.ns.low),
            (50.0, m.ns.median),
            (75.0, m.ns.high),
            (99.0, m.ns.p99),
            (100.0, m.ns.most),
        ]
        .map(|(share, ns)| (share, ns, None))
        .to_vec(),
    });
    let share = Axis {
        title: "% that take no longer",
        scale: Scale::Linear,
        label: plain,
    };
    let ns = Axis {
        title: if summary.place.instructions {
            "instructions"
        } else {
            "ns"
        },
        scale: Scale::Log,
        label: short,
    };
    lines(
        "Faults: how long one takes",
        share,
        ns,
        &all.collect::<Vec<_>>(),
    )
}

/// The page: where it was measured, the plots, and all numbers.
pub fn page(summary: &Summary) -> String {
    let place = &summary.place;
    let mut html = String::from(
        "<!DOCTYPE html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>hmm-gpu: benchmarks</title>\n\
         <style>body{font-family:sans-serif;max-width:76em;margin:2em auto;padding:0 1em}svg{width:48%;min-width:32em}\
         table{border-collapse:collapse}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}\
         td:nth-child(-n+3),th:nth-child(-n+3){text-align:left}</style>\n<h1>hmm-gpu: benchmarks</h1>\n",
    );
    let _ = writeln!(
        html,
        "<p>{} &middot; Linux {} &middot; {} &times; {} &middot; revision {} &middot; plan: {}</p>",
        escaped(&place.device),
        escaped(&place.kernel),
        place.processors,
        escaped(&place.processor),
        escaped(&place.revision),
        escaped(&place.plan)
    );
    if place.emulated {
        html.push_str("<p><b>An emulated machine.</b> The numbers say nothing of hardware; ratios of two of them may.</p>\n");
    }
    if place.instructions {
        html.push_str("<p><b>Its clock counts instructions</b>: where a number is called ns it is instructions.</p>\n");
    }
    for (_, svg) in plots(summary) {
        html.push_str(&svg);
    }
    html.push_str(&comparison::html(summary));
    html.push_str(&crossover::html(summary));
    html.push_str(
        "<p>Lines are the middle of all turns, bars the middle half. <a href=\"criterion/report/index.html\">Criterion's report</a>, \
         <a href=\"summary.json\">summary.json</a></p>\n<table><tr><th>workload<th>case<th>pages<th>bytes<th>at<th>turns\
         <th>least<th>lower quarter<th>median<th>upper quarter<th>99 %<th>most<th>mean<th>per</tr>\n",
    );
    for m in &summary.measurements {
        let _ = write!(
            html,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}",
            escaped(&m.workload),
            escaped(&m.case),
            escaped(&m.pages),
            size(m.bytes as f64),
            m.at.map_or(String::new(), plain),
            m.ns.count
        );
        for ns in [
            m.ns.least,
            m.ns.low,
            m.ns.median,
            m.ns.high,
            m.ns.p99,
            m.ns.most,
            m.ns.mean,
        ] {
            let _ = write!(html, "<td>{ns:.0}");
        }
        let _ = writeln!(html, "<td>{}</tr>", escaped(&m.per));
    }
    html.push_str("</table></html>\n");
    html
}

/// The same as a table of text.
pub fn table(summary: &Summary) -> String {
    let unit = if summary.place.instructions {
        "instr"
    } else {
        "ns"
    };
    let mut text = format!(
        "{:<11}{:<36}{:<7}{:>10}{:>8}{:>14}{:>12}{:>24}\n",
        "workload",
        "case",
        "pages",
        "bytes",
        "at",
        format!("{unit}, median"),
        "mean",
        "middle half"
    );
    for m in &summary.measurements {
        let _ = writeln!(
            text,
            "{:<11}{:<36}{:<7}{:>10}{:>8}{:>14.0}{:>12.0}{:>24}  per {}",
            m.workload,
            m.case,
            m.pages,
            size(m.bytes as f64),
            m.at.map_or(String::new(), plain),
            m.ns.median,
            m.ns.mean,
            format!("{:.0}-{:.0}", m.ns.low, m.ns.high),
            m.per
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::{measured, summary, svm};

    #[test]
    fn sizes_are_said_in_words() {
        assert_eq!(size(4096.0), "4 KiB");
        assert_eq!(size((64 << 20) as f64), "64 MiB");
        assert_eq!(size(100.0), "100 B");
        assert_eq!(
            [67_108_864.0, 32768.0, 512.0].map(short),
            ["67.1M", "32.8k", "512"]
        );
    }

    #[test]
    fn a_case_is_a_line_and_its_sizes_are_in_order() {
        let summary = summary(vec![
            measured("migration", "to device", 1 << 20, 900),
            measured("migration", "to device", 4096, 30),
            measured("migration", "to system", 4096, 20),
            measured("faults", "sequential", 4096, 9),
        ]);
        let lines = by_case(&summary, "migration", |m| {
            (m.bytes as f64, m.ns.median, None)
        });
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].points[0].0, 4096.0);
        assert_eq!(lines[0].points[1].0, (1 << 20) as f64);
    }

    #[test]
    fn strategies_are_lines_with_the_fewest_and_the_most_uses() {
        let all = [(1, 0.1), (1, 10.0), (16, 0.1)].map(|(uses, share)| {
            ["copy", "translated"].map(|strategy| svm("gather", strategy, uses, share, 50))
        });
        let summary = summary(all.into_iter().flatten().collect());
        let least = crossing(&summary, Reuse::Least);
        assert!(least.contains("data used once"));
        assert_eq!(least.matches("<polyline").count(), 2);
        assert_eq!(least.matches("<circle").count(), 4);
        let most = crossing(&summary, Reuse::Most);
        assert!(most.contains("data used 16 times"));
        assert_eq!(most.matches("<circle").count(), 2);
    }

    #[test]
    fn the_page_has_every_plot_and_every_measurement() {
        let mut summary = summary(vec![
            measured("migration", "to <device>", 4096, 30),
            measured("faults", "sequential", 4096, 9),
        ]);
        summary.place.emulated = true;
        let html = page(&summary);
        assert_eq!(html.matches("<svg").count(), plots(&summary).len());
        assert_eq!(html.matches("<tr><td>").count(), 2);
        assert!(html.contains("to &lt;device&gt;") && html.contains("An emulated machine"));
        assert_eq!(table(&summary).lines().count(), 3);
    }
}
