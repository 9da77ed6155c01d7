//! Plots, as SVG text.

use std::fmt::Write;

/// Where the plot ends on the right; behind it are the names of the lines.
const END: f64 = 470.0;
const HEIGHT: f64 = 360.0;
/// Room for the labels: left, top, bottom.
const MARGINS: (f64, f64, f64) = (70.0, 30.0, 50.0);
/// What a letter of a name takes, at most.
const LETTER: f64 = 6.4;
/// Colours that can be told apart, also by who sees few.
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999",
];

/// How values lie along an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    Linear,
    /// By their logarithm: values are positive.
    Log,
}

/// Where along the axis, the value, and how far that may be off: lower and upper end.
pub type Point = (f64, f64, Option<(f64, f64)>);

/// One line of a plot.
#[derive(Clone, Debug)]
pub struct Line {
    /// What it is.
    pub name: String,
    /// Its points.
    pub points: Vec<Point>,
}

/// An axis.
#[derive(Clone, Copy)]
pub struct Axis {
    /// What is along it.
    pub title: &'static str,
    /// How.
    pub scale: Scale,
    /// What a value is called.
    pub label: fn(f64) -> String,
}

impl Axis {
    /// The values at which there is a mark, ascending, all within `least` and `most`.
    fn marks(&self, least: f64, most: f64) -> Vec<f64> {
        const MOST: usize = 8;

        let marks: Vec<f64> = match self.scale {
            Scale::Log => {
                let (from, to) = (least.log2().ceil() as i32, most.log2().floor() as i32);
                (from..=to).map(|power| 2f64.powi(power)).collect()
            }
            Scale::Linear => {
                let span = if most > least {
                    most - least
                } else {
                    least.abs().max(1.0)
                };
                let rough = span / 5.0;
                let power = 10f64.powf(rough.log10().floor());
                let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
                let step = *step.iter().find(|step| **step >= rough).unwrap_or(&rough);
                let first = (least / step).ceil() as i64;
                let marks = (first..).map(|n| n as f64 * step);
                marks.take_while(|mark| *mark <= most).take(64).collect()
            }
        };
        let every = marks.len().div_ceil(MOST).max(1);
        marks.into_iter().step_by(every).collect()
    }

    /// Where a value is, from 0 to 1.
    fn place(&self, least: f64, most: f64, value: f64) -> f64 {
        let of = |value: f64| match self.scale {
            Scale::Linear => value,
            Scale::Log => value.log2(),
        };
        let span = of(most) - of(least);
        if span > 0.0 {
            (of(value) - of(least)) / span
        } else {
            0.5
        }
    }
}

/// Lines of points that each have the name of their line: in the order in which the names come, each from left to right.
pub fn by_name(points: impl Iterator<Item = (String, Point)>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for (name, point) in points {
        match lines.iter_mut().find(|line| line.name == name) {
            Some(line) => line.points.push(point),
            None => lines.push(Line {
                name,
                points: vec![point],
            }),
        }
    }
    for line in &mut lines {
        line.points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

/// A plot of lines. Points that an axis has no place for are left out; without any, it says so.
pub fn lines(title: &str, x: Axis, y: Axis, lines: &[Line]) -> String {
    let (left, top, bottom) = MARGINS;
    let longest = lines.iter().map(|line| line.name.chars().count()).max();
    let right = 30.0 + LETTER * longest.unwrap_or(0) as f64;
    let (end, width) = (END, END + right.max(170.0));
    let fits =
        |axis: &Axis, value: f64| value.is_finite() && (axis.scale == Scale::Linear || value > 0.0);
    let points = |line: &Line| {
        let points = line.points.iter().copied();
        points
            .filter(|(at, value, _)| fits(&x, *at) && fits(&y, *value))
            .collect::<Vec<_>>()
    };
    let all: Vec<_> = lines.iter().flat_map(points).collect();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {HEIGHT}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<title>{0}</title>\n\
         <text x=\"{left}\" y=\"18\" font-size=\"14\">{0}</text>\n",
        escaped(title)
    );
    if all.is_empty() {
        let _ = write!(
            svg,
            "<text x=\"{left}\" y=\"60\">not measured</text>\n</svg>\n"
        );
        return svg;
    }
    let least_of = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::INFINITY, f64::min);
    let most_of = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::NEG_INFINITY, f64::max);
    let ends = |(_, value, spread): &Point| {
        spread
            .filter(|(low, high)| fits(&y, *low) && fits(&y, *high))
            .unwrap_or((*value, *value))
    };
    let (x0, x1) = (
        least_of(&mut all.iter().map(|point| point.0)),
        most_of(&mut all.iter().map(|point| point.0)),
    );
    let mut y0 = least_of(&mut all.iter().map(|point| ends(point).0));
    let mut y1 = most_of(&mut all.iter().map(|point| ends(point).1));
    match y.scale {
        Scale::Linear => (y0, y1) = (y0.min(0.0), y1 * 1.05),
        Scale::Log => (y0, y1) = (y0 / 1.2, y1 * 1.2),
    }
    let px = |value: f64| left + x.place(x0, x1, value) * (end - left);
    let py = |value: f64| HEIGHT - bottom - y.place(y0, y1, value) * (HEIGHT - top - bottom);
    let floor = HEIGHT - bottom;
    for mark in x.marks(x0, x1) {
        let _ = writeln!(
            svg,
            "<line x1=\"{0:.1}\" y1=\"{top}\" x2=\"{0:.1}\" y2=\"{floor}\" stroke=\"#ddd\"/>\
             <text x=\"{0:.1}\" y=\"{1}\" text-anchor=\"middle\">{2}</text>",
            px(mark),
            floor + 16.0,
            escaped(&(x.label)(mark))
        );
    }
    for mark in y.marks(y0, y1) {
        let _ = writeln!(
            svg,
            "<line x1=\"{left}\" y1=\"{0:.1}\" x2=\"{end}\" y2=\"{0:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{3}</text>",
            py(mark),
            left - 6.0,
            py(mark) + 4.0,
            escaped(&(y.label)(mark))
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
         <text transform=\"translate(16 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
        (left + end) / 2.0,
        HEIGHT - 12.0,
        escaped(x.title),
        (top + floor) / 2.0,
        escaped(y.title)
    );
    for (i, (line, colour)) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let n = i as f64;
        // Colours that come again are of another kind of line.
        let dashes = match i / COLOURS.len() {
            0 => "",
            _ => " stroke-dasharray=\"5 3\"",
        };
        let points = points(line);
        let path: Vec<String> = points
            .iter()
            .map(|(at, value, _)| format!("{:.1},{:.1}", px(*at), py(*value)))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>",
            path.join(" ")
        );
        for point in &points {
            let (low, high) = ends(point);
            let _ = writeln!(
                svg,
                "<line x1=\"{0:.1}\" y1=\"{1:.1}\" x2=\"{0:.1}\" y2=\"{2:.1}\" stroke=\"{colour}\"/>\
                 <circle cx=\"{0:.1}\" cy=\"{3:.1}\" r=\"2.5\" fill=\"{colour}\"/>",
                px(point.0),
                py(low),
                py(high),
                py(point.1)
            );
        }
        let _ = writeln!(
            svg,
            "<line x1=\"{0}\" y1=\"{1}\" x2=\"{5}\" y2=\"{1}\" stroke=\"{colour}\" stroke-width=\"3\"{dashes}/><text x=\"{2}\" y=\"{3}\">{4}</text>",
            end + 8.0,
            top + 5.5 + n * 16.0,
            end + 24.0,
            top + 9.0 + n * 16.0,
            escaped(&line.name),
            end + 21.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Text as it stands in XML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axis(scale: Scale) -> Axis {
        Axis {
            title: "title",
            scale,
            label: |value| value.to_string(),
        }
    }

    #[test]
    fn marks_are_round_and_few() {
        assert_eq!(axis(Scale::Log).marks(3.0, 17.0), [4.0, 8.0, 16.0]);
        assert_eq!(
            axis(Scale::Linear).marks(0.0, 10.0),
            [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
        );
        assert!(axis(Scale::Log).marks(1.0, 1e12).len() <= 8);
        assert!(axis(Scale::Linear).marks(5.0, 5.0).len() <= 64);
    }

    #[test]
    fn each_line_has_its_points_and_its_name() {
        let two = [
            Line {
                name: "a < b".to_owned(),
                points: vec![(1.0, 10.0, Some((9.0, 11.0))), (2.0, 20.0, None)],
            },
            Line {
                name: "c".to_owned(),
                points: vec![(4.0, 5.0, None), (0.0, 5.0, None)],
            },
        ];
        let svg = lines("t & u", axis(Scale::Log), axis(Scale::Linear), &two);
        assert!(svg.contains("a &lt; b") && svg.contains("t &amp; u"));
        // The point at zero has no place on a logarithmic axis.
        assert_eq!(svg.matches("<circle").count(), 3);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn points_lie_inside() {
        let x = axis(Scale::Log);
        assert_eq!(x.place(1.0, 16.0, 4.0), 0.5);
        assert_eq!(x.place(4.0, 4.0, 4.0), 0.5);
        assert_eq!(axis(Scale::Linear).place(0.0, 8.0, 2.0), 0.25);
    }

    #[test]
    fn nothing_is_told() {
        let svg = lines("t", axis(Scale::Log), axis(Scale::Log), &[]);
        assert!(svg.contains("not measured") && svg.ends_with("</svg>\n"));
    }
}
