//! What is said of several measurements of one thing.

/// The middle one of some measurements, and between which two the middle half of them is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    low: f64,
    middle: f64,
    high: f64,
}

impl Spread {
    /// Of measurements in any order, of which there is at least one.
    pub(crate) fn of(mut measured: Vec<f64>) -> Self {
        measured.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let place = part * (measured.len() - 1) as f64;
            let (below, above) = (
                measured[place.floor() as usize],
                measured[place.ceil() as usize],
            );
            below + (above - below) * place.fract()
        };
        Self {
            low: at(0.25),
            middle: at(0.5),
            high: at(0.75),
        }
    }

    /// For a table, with that many digits behind the point.
    pub(crate) fn text(&self, digits: usize) -> String {
        let Self { low, middle, high } = self;
        format!("{middle:.digits$} ({low:.digits$}-{high:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_half_of_measurements_in_any_order() {
        let spread = Spread::of(vec![5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!(spread.text(0), "3 (2-4)");
        assert_eq!(Spread::of(vec![7.0]).text(1), "7.0 (7.0-7.0)");
        assert_eq!(Spread::of(vec![1.0, 2.0]).text(2), "1.50 (1.25-1.75)");
    }

    #[test]
    fn one_measurement_that_is_far_off_changes_little() {
        assert_eq!(
            Spread::of(vec![10.0, 10.0, 10.0, 10.0, 9000.0]).text(0),
            "10 (10-10)"
        );
    }
}
