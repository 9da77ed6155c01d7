//! The same calls on two drivers, by turns: on this one, and on its peer, the kernel's own C module.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::page::size;
use crate::plot::{self, escaped, Line};
use crate::spread::Spread;
use crate::summary::Summary;

/// One thing that both have done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What it was, and with it the direction: `to device`, `to system`. `bench/compare` says what each is.
    pub operation: String,
    /// `4 KiB` or `2 MiB`: what the kernel was asked for.
    pub pages: String,
    /// Bytes that one turn works on.
    pub bytes: u64,
    /// Nanoseconds per 4 KiB page; instructions on a clock that counts them.
    pub ours: Spread,
    /// The same of the peer.
    pub peer: Spread,
    /// The same of a plain copy of as many bytes.
    pub limit: Spread,
    /// How many times what it costs here it costs there. Made in each round of the two in it.
    pub ratio: Spread,
}

impl Comparison {
    /// Of what each round took. `None` without any.
    pub fn of(
        (operation, pages, bytes): (&str, &str, usize),
        ours: Vec<f64>,
        peer: Vec<f64>,
        limit: Vec<f64>,
    ) -> Option<Self> {
        let ratios = peer.iter().zip(&ours).map(|(peer, ours)| peer / ours);
        Some(Self {
            operation: operation.to_owned(),
            pages: pages.to_owned(),
            bytes: bytes as u64,
            ratio: Spread::of(ratios.collect())?,
            ours: Spread::of(ours)?,
            peer: Spread::of(peer)?,
            limit: Spread::of(limit)?,
        })
    }

    /// Whether it says which of the two costs less: the middle half of the ratios is on one side of 1.
    pub fn decides(&self) -> bool {
        self.ratio.low > 1.0 || self.ratio.high < 1.0
    }

    /// What is wrong with it.
    pub(crate) fn problem(&self) -> Option<String> {
        let all = [self.ours, self.peer, self.limit, self.ratio];
        let is_one = |it: &Spread| it.count > 0 && it.low <= it.median && it.median <= it.high;
        // What is a difference of two may be less than nothing, once.
        let positive = self.limit.median > 0.0 && self.ours.most > 0.0;
        (!all.iter().all(is_one) || !positive).then(|| {
            let Self {
                operation, bytes, ..
            } = self;
            format!("comparison of {operation}, {bytes} bytes: these are no times: {all:?}")
        })
    }
}

/// What is said of a ratio.
fn said(compared: &Comparison) -> String {
    let Spread {
        low, median, high, ..
    } = compared.ratio;
    let verdict = if compared.decides() {
        ""
    } else {
        ", too wide to conclude"
    };
    format!("{median:.2} ({low:.2}-{high:.2}{verdict})")
}

/// A line for each operation with each page size: the ratio over the size.
pub fn lines(summary: &Summary) -> Vec<Line> {
    plot::by_name(summary.comparisons.iter().map(|it| {
        let ratio = it.ratio;
        (
            format!("{}, {}", it.operation, it.pages),
            (it.bytes as f64, ratio.median, Some((ratio.low, ratio.high))),
        )
    }))
}

/// All of them as a table of a page.
pub fn html(summary: &Summary) -> String {
    if summary.comparisons.is_empty() {
        return String::new();
    }
    let mut html = String::from(
        "<h2>Beside the C module</h2>\n<table><tr><th>size<th>pages<th><th>plain copy<th>C module<th>driver<th>C module / driver</tr>\n",
    );
    for it in &summary.comparisons {
        let _ = writeln!(
            html,
            "<tr><td>{}<td>{}<td>{}<td>{:.0}<td>{:.0}<td>{:.0}<td>{}</tr>",
            size(it.bytes as f64),
            escaped(&it.pages),
            escaped(&it.operation),
            it.limit.median,
            it.peer.median,
            it.ours.median,
            said(it)
        );
    }
    html.push_str("</table>\n");
    html
}

/// All of them as a table of Markdown, for the documentation: a row for each size with each page size, a column for each operation.
pub fn markdown(summary: &Summary) -> String {
    let mut operations: Vec<&str> = Vec::new();
    let mut rows: Vec<Vec<&Comparison>> = Vec::new();
    for it in &summary.comparisons {
        if !operations.contains(&it.operation.as_str()) {
            operations.push(&it.operation);
        }
        match rows
            .iter_mut()
            .find(|row| (row[0].bytes, &row[0].pages) == (it.bytes, &it.pages))
        {
            Some(row) => row.push(it),
            None => rows.push(vec![it]),
        }
    }
    // With the same size, as they were made.
    rows.sort_by_key(|row| row[0].bytes);
    let cell = |it: &&Comparison| {
        let (peer, ours, ratio) = (it.peer.median, it.ours.median, it.ratio.median);
        // Where a clock counts instructions, one round is as good as many.
        if summary.place.instructions {
            format!("{peer:.0} / {ours:.0} = {ratio:.2}")
        } else {
            format!("{peer:.0} / {ours:.0}: {}", said(it))
        }
    };
    let mut text = format!(
        "| size | pages | plain copy | {} |\n|{}\n",
        operations.join(" | "),
        "---|".repeat(operations.len() + 3)
    );
    for row in rows {
        let of = |name: &&str| {
            row.iter()
                .find(|it| it.operation == *name)
                .map_or(String::new(), cell)
        };
        let cells: Vec<String> = operations.iter().map(of).collect();
        let (bytes, pages, limit) = (row[0].bytes as f64, &row[0].pages, row[0].limit.median);
        let (size, cells) = (size(bytes), cells.join(" | "));
        let _ = writeln!(text, "| {size} | {pages} | {limit:.0} | {cells} |");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::tests::summary;

    fn compared(bytes: usize, ours: &[f64], peer: &[f64]) -> Comparison {
        let what = ("to device", "4 KiB", bytes);
        Comparison::of(what, ours.to_vec(), peer.to_vec(), vec![2.0]).unwrap()
    }

    #[test]
    fn a_ratio_is_made_in_each_round() {
        let it = compared(4096, &[10.0, 20.0, 30.0], &[20.0, 40.0, 60.0]);
        assert_eq!(
            (it.ratio.low, it.ratio.median, it.ratio.high),
            (2.0, 2.0, 2.0)
        );
        assert!(it.decides() && it.problem().is_none());
        let none = Comparison::of(("", "", 1), vec![], vec![], vec![]);
        assert_eq!(none, None);
    }

    #[test]
    fn what_is_on_both_sides_decides_nothing() {
        let it = compared(4096, &[10.0; 4], &[9.0, 9.0, 11.0, 11.0]);
        assert!(!it.decides());
        assert!(said(&it).contains("too wide"));
        assert!(compared(4096, &[10.0; 3], &[9.0; 3]).decides());
    }

    #[test]
    fn every_one_is_in_the_plot_and_the_tables() {
        let mut summary = summary(vec![]);
        assert_eq!(html(&summary), "");
        summary.comparisons = vec![
            compared(1 << 20, &[10.0], &[20.0]),
            compared(4096, &[10.0], &[30.0]),
        ];
        assert_eq!(summary.problems(), Vec::<String>::new());
        let lines = lines(&summary);
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].points[0].0, lines[0].points[0].1), (4096.0, 3.0));
        assert_eq!(html(&summary).matches("<tr><td>").count(), 2);
        summary.place.instructions = true;
        let table = markdown(&summary);
        let rows: Vec<&str> = table.lines().skip(2).collect();
        assert_eq!(rows[0], "| 4 KiB | 4 KiB | 2 | 30 / 10 = 3.00 |");
        assert_eq!(rows[1], "| 1 MiB | 4 KiB | 2 | 20 / 10 = 2.00 |");
        summary.comparisons[0].limit.median = -1.0;
        assert_eq!(summary.problems().len(), 1);
    }
}
