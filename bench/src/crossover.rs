//! Where shared addressing beats copying, and where not, in words: computed from the measurements.

use std::fmt::Write;

use crate::plot::escaped;
use crate::record::{Measurement, Svm, KEPT};
use crate::summary::Summary;

/// What the spread of a case does not know of.
const CAVEAT: &str = "Strategies were measured one after the other: what else the machine did meanwhile is not in the spreads. On a busy one, compare two runs.";

/// Pointers that lead anywhere, and nobody names what a kernel touches.
const SHARED: [&str; 2] = ["translated", "native"];
/// Bytes go to the device's memory and back.
const COPYING: [&str; 3] = ["copy", "mapped", KEPT];

/// How two of them compare.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Shared addressing is so many times as fast.
    Beats(f64),
    /// Copying is.
    Loses(f64),
    /// The middle halves of both overlap.
    TooClose,
}

/// A kernel with a share of the data and a number of uses, and what it takes with the strategies that share addresses and with the best that copies.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The kernel.
    pub kernel: String,
    /// Uses of the same data.
    pub uses: u32,
    /// Percent of the pages that it touches.
    pub share: f64,
    /// Each strategy, and its middle time in nanoseconds.
    pub times: Vec<(String, f64)>,
    /// The best of those that copy.
    pub copying: String,
    /// Of each that shares addresses, beside that.
    pub verdicts: Vec<(String, Verdict)>,
}

/// What was measured of a kernel, with what it was measured with, and the share in percent.
pub fn measured<'a>(
    summary: &'a Summary,
    kernel: &'a str,
) -> impl Iterator<Item = (&'a Measurement, &'a Svm, f64)> {
    let all = summary.measurements.iter().filter(|m| m.workload == "svm");
    all.filter_map(|m| Some((m, m.svm.as_ref()?, m.at?)))
        .filter(move |(_, svm, _)| svm.kernel == kernel)
}

fn compare(shared: &Measurement, copying: &Measurement) -> Verdict {
    if shared.ns.high < copying.ns.low {
        Verdict::Beats(copying.ns.median / shared.ns.median)
    } else if copying.ns.high < shared.ns.low {
        Verdict::Loses(shared.ns.median / copying.ns.median)
    } else {
        Verdict::TooClose
    }
}

/// All rows, by kernel and uses, in which something can be compared.
pub fn rows(summary: &Summary) -> Vec<Row> {
    let mut groups: Vec<(Row, Vec<&Measurement>)> = Vec::new();
    let all = summary.measurements.iter().filter(|m| m.workload == "svm");
    for m in all {
        let (Some(svm), Some(share)) = (&m.svm, m.at) else {
            continue;
        };
        let is_it = |(row, _): &&mut (Row, Vec<_>)| {
            row.kernel == svm.kernel && row.uses == svm.uses && row.share == share
        };
        let time = (svm.strategy.clone(), m.ns.median);
        match groups.iter_mut().find(is_it) {
            Some((row, of)) => {
                row.times.push(time);
                of.push(m);
            }
            None => groups.push((
                Row {
                    kernel: svm.kernel.clone(),
                    uses: svm.uses,
                    share,
                    times: vec![time],
                    copying: String::new(),
                    verdicts: Vec::new(),
                },
                vec![m],
            )),
        }
    }
    let mut rows: Vec<Row> = groups
        .into_iter()
        .filter_map(|(row, of)| judged(row, &of))
        .collect();
    let first: Vec<String> = rows.iter().map(|row| row.kernel.clone()).collect();
    let order = |row: &Row| first.iter().position(|kernel| *kernel == row.kernel);
    rows.sort_by(|a, b| {
        (order(a), a.uses)
            .cmp(&(order(b), b.uses))
            .then(a.share.total_cmp(&b.share))
    });
    rows
}

fn judged(mut row: Row, of: &[&Measurement]) -> Option<Row> {
    let strategy = |m: &Measurement| {
        m.svm
            .as_ref()
            .map_or("", |svm| svm.strategy.as_str())
            .to_owned()
    };
    let copying = of
        .iter()
        .filter(|m| COPYING.contains(&strategy(m).as_str()))
        .min_by(|a, b| a.ns.median.total_cmp(&b.ns.median))?;
    row.copying = strategy(copying);
    row.verdicts = of
        .iter()
        .filter(|m| SHARED.contains(&strategy(m).as_str()))
        .map(|m| (strategy(m), compare(m, copying)))
        .collect();
    (!row.verdicts.is_empty()).then_some(row)
}

/// What is said of a row.
fn words(row: &Row) -> String {
    let verdicts = row
        .verdicts
        .iter()
        .map(|(strategy, verdict)| match verdict {
            Verdict::Beats(times) => {
                format!("{strategy} beats {} {times:.1} times", row.copying)
            }
            Verdict::Loses(times) => {
                format!("{} beats {strategy} {times:.1} times", row.copying)
            }
            Verdict::TooClose => format!("{strategy} and {}: too close", row.copying),
        });
    verdicts.collect::<Vec<_>>().join("; ")
}

/// One sentence for each kernel, number of uses and strategy: at which shares it wins.
pub fn sentences(summary: &Summary) -> Vec<String> {
    let rows = rows(summary);
    let mut said = Vec::new();
    for of in rows.chunk_by(|a, b| a.kernel == b.kernel && a.uses == b.uses) {
        for strategy in SHARED {
            let shares = |is_it: fn(&Verdict) -> bool| {
                let of = of.iter().filter(|row| {
                    let mut verdicts = row.verdicts.iter();
                    verdicts.any(|(name, verdict)| name == strategy && is_it(verdict))
                });
                let shares = of.map(|row| percent(row.share)).collect::<Vec<_>>();
                shares.join(", ")
            };
            let parts = [
                ("beats copying", shares(|v| matches!(v, Verdict::Beats(_)))),
                ("is beaten", shares(|v| matches!(v, Verdict::Loses(_)))),
                ("is too close to tell", shares(|v| *v == Verdict::TooClose)),
            ];
            let parts: Vec<String> = parts
                .into_iter()
                .filter(|(_, shares)| !shares.is_empty())
                .map(|(what, shares)| format!("{what} at {shares}"))
                .collect();
            if !parts.is_empty() {
                let uses = uses(of[0].uses);
                let kernel = &of[0].kernel;
                said.push(format!("{kernel}, {uses}: {strategy} {}", parts.join(", ")));
            }
        }
    }
    said
}

fn percent(share: f64) -> String {
    format!("{} %", (share * 1000.0).round() / 1000.0)
}

fn uses(count: u32) -> String {
    if count == 1 {
        "1 use".to_owned()
    } else {
        format!("{count} uses")
    }
}

/// How long the shared strategies' fast path takes beside raw pointers, and its spread, if it was measured.
fn resident(summary: &Summary) -> Option<String> {
    let of = summary.measurements.iter().find_map(|m| {
        let more = |name: &str| m.more.get(name).copied();
        Some((more("ratio low")?, more("ratio")?, more("ratio high")?))
    })?;
    Some(format!(
        "saxpy on data in VRAM, by turns: translated takes {:.2} times as long as native (middle half {:.2} to {:.2})",
        of.1, of.0, of.2
    ))
}

fn lists(summary: &Summary) -> Vec<String> {
    let mut all = sentences(summary);
    all.extend(resident(summary));
    all.extend(
        summary
            .left_out
            .iter()
            .map(|of| format!("{}: {} is left out: {}", of.workload, of.what, of.why)),
    );
    all
}

/// The table, and what it says, as text.
pub fn text(summary: &Summary) -> String {
    let mut text = String::new();
    let all = rows(summary);
    if !all.is_empty() {
        text += "\nWhere shared addressing beats copying (the best of those that copy; medians per dispatch):\n";
    }
    for row in &all {
        let share = percent(row.share);
        let uses = uses(row.uses);
        let _ = writeln!(
            text,
            "{:<8}{share:>9}{uses:>10}  {}",
            row.kernel,
            words(row)
        );
    }
    for line in lists(summary) {
        let _ = writeln!(text, "- {line}.");
    }
    if !all.is_empty() {
        let _ = writeln!(text, "{CAVEAT}");
    }
    text
}

/// The same for the page. Nothing, if nothing was measured or left out.
pub fn html(summary: &Summary) -> String {
    let (all, said) = (rows(summary), lists(summary));
    let mut html = String::new();
    if all.is_empty() && said.is_empty() {
        return html;
    }
    html.push_str("<h2>Where shared addressing beats copying</h2>\n");
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in all.iter().flat_map(|row| &row.times) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    if !all.is_empty() {
        html.push_str("<table class=\"crossover\"><tr><th>kernel<th>touched<th>uses");
        for name in &names {
            let _ = write!(html, "<th>{}", escaped(name));
        }
        html.push_str("<th>which</tr>\n");
    }
    for row in &all {
        let share = percent(row.share);
        let _ = write!(
            html,
            "<tr><th>{}<td>{share}<td>{}",
            escaped(&row.kernel),
            row.uses
        );
        for name in &names {
            let time = row.times.iter().find(|(of, _)| of == name);
            let time = time.map_or(String::new(), |(_, ns)| format!("{ns:.0}"));
            let _ = write!(html, "<td>{time}");
        }
        let _ = writeln!(html, "<td>{}</tr>", escaped(&words(row)));
    }
    if !all.is_empty() {
        html.push_str("</table>\n");
    }
    html.push_str("<ul>\n");
    for line in said {
        let _ = writeln!(html, "<li>{}.</li>", escaped(&line));
    }
    html.push_str("</ul>\n");
    if !all.is_empty() {
        let _ = writeln!(html, "<p>{CAVEAT}</p>");
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::LeftOut;
    use crate::summary::tests::{summary, svm};

    /// Copying takes 100 µs whatever the share, translation more the more it touches.
    fn crossing() -> Summary {
        let translated = [(0.1, 20), (1.0, 50), (10.0, 105), (100.0, 400)];
        let mut all = Vec::new();
        for (share, us) in translated {
            all.push(svm("gather", "translated", 1, share, us));
            all.push(svm("gather", "copy", 1, share, 100));
            all.push(svm("gather", "mapped", 1, share, 130));
        }
        all.push(svm("gather", "native", 4, 1.0, 60));
        all.push(svm("gather", KEPT, 4, 1.0, 30));
        summary(all)
    }

    #[test]
    fn who_wins_is_computed_and_an_overlap_is_too_close() {
        let rows = rows(&crossing());
        assert_eq!(rows.len(), 5);
        let verdicts: Vec<Verdict> = rows.iter().map(|row| row.verdicts[0].1).collect();
        assert_eq!(
            verdicts,
            [
                Verdict::Beats(5.0),
                Verdict::Beats(2.0),
                Verdict::TooClose,
                Verdict::Loses(4.0),
                Verdict::Loses(2.0)
            ]
        );
        assert_eq!(rows[0].copying, "copy");
        assert_eq!((rows[4].copying.as_str(), rows[4].uses), (KEPT, 4));
    }

    #[test]
    fn sentences_say_where() {
        let said = sentences(&crossing());
        assert_eq!(
            said,
            [
                "gather, 1 use: translated beats copying at 0.1 %, 1 %, is beaten at 100 %, is too close to tell at 10 %",
                "gather, 4 uses: native is beaten at 1 %"
            ]
        );
    }

    #[test]
    fn what_has_nothing_beside_it_is_no_row_and_what_is_left_out_is_said() {
        let mut alone = summary(vec![svm("saxpy", "translated", 1, 100.0, 10)]);
        assert_eq!(rows(&alone), []);
        assert_eq!((text(&alone), html(&alone)), (String::new(), String::new()));
        alone.left_out.push(LeftOut {
            workload: "svm".to_owned(),
            what: "copy".to_owned(),
            why: "a < b".to_owned(),
        });
        assert!(text(&alone).contains("svm: copy is left out: a < b."));
        assert!(html(&alone).contains("a &lt; b"));
    }

    #[test]
    fn the_ratio_is_said_with_its_spread() {
        let mut summary = crossing();
        assert_eq!(resident(&summary), None);
        let more = &mut summary.measurements[0].more;
        for (name, value) in [("ratio low", 1.5), ("ratio", 2.0), ("ratio high", 2.25)] {
            more.insert(name.to_owned(), value);
        }
        let said = resident(&summary).unwrap();
        assert!(
            said.contains("2.00 times") && said.contains("1.50 to 2.25"),
            "{said}"
        );
        assert!(text(&summary).contains(&said));
    }

    #[test]
    fn the_page_has_a_row_each() {
        let html = html(&crossing());
        assert_eq!(html.matches("<tr><th>gather").count(), 5);
        assert!(html.contains("translated beats copy 5.0 times") && html.contains("too close"));
        assert!(html.contains(CAVEAT) && text(&crossing()).contains(CAVEAT));
    }
}
