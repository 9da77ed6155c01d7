//! Numbers that vary: the middle one, and how far the others are from it.

use serde::{Deserialize, Serialize};

/// What is said of several numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// How many there were.
    pub count: usize,
    /// Their sum over how many there are: of touches of which few fault, what one costs.
    pub mean: f64,
    /// The smallest.
    pub least: f64,
    /// A quarter is smaller.
    pub low: f64,
    /// The middle one.
    pub median: f64,
    /// A quarter is larger.
    pub high: f64,
    /// One in a hundred is larger.
    pub p99: f64,
    /// The largest.
    pub most: f64,
}

impl Spread {
    /// Of numbers, of which there is one at least.
    pub fn of(mut numbers: Vec<f64>) -> Option<Self> {
        numbers.retain(|number| number.is_finite());
        numbers.sort_by(f64::total_cmp);
        let last = numbers.len().checked_sub(1)?;
        // The number that so much of all are not larger than.
        let at = |share: f64| numbers[((last as f64 * share).round() as usize).min(last)];
        Some(Self {
            count: numbers.len(),
            mean: numbers.iter().sum::<f64>() / numbers.len() as f64,
            least: numbers[0],
            low: at(0.25),
            median: at(0.5),
            high: at(0.75),
            p99: at(0.99),
            most: numbers[last],
        })
    }

    /// The same of each number times `factor`.
    pub fn times(self, factor: f64) -> Self {
        Self {
            count: self.count,
            mean: self.mean * factor,
            least: self.least * factor,
            low: self.low * factor,
            median: self.median * factor,
            high: self.high * factor,
            p99: self.p99 * factor,
            most: self.most * factor,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters_and_the_middle_are_found_in_any_order() {
        let spread = Spread::of((0..=100).rev().map(f64::from).collect()).unwrap();
        assert_eq!((spread.low, spread.median, spread.high), (25.0, 50.0, 75.0));
        assert_eq!((spread.least, spread.p99, spread.most), (0.0, 99.0, 100.0));
        assert_eq!((spread.count, spread.mean), (101, 50.0));
        assert_eq!(spread.times(2.0).high, 150.0);
    }

    #[test]
    fn few_numbers_do_too_and_none_is_nothing() {
        let one = Spread::of(vec![7.0]).unwrap();
        assert_eq!((one.least, one.median, one.p99), (7.0, 7.0, 7.0));
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![f64::NAN]), None);
    }
}
