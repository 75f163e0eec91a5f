//! What a benchmark found, as one table: a ratio per row, its target, and whether it is met.

use std::fmt;

use super::paired::Spread;

/// A measured ratio: what something costs, over what it is compared with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// What was compared with what.
    pub(crate) what: &'static str,
    /// The ratio, and how far it spreads if it was measured more than once.
    pub(crate) ratio: f64,
    pub(crate) spread: Option<Spread>,
    /// The largest ratio that is good enough; `None` for what is only shown.
    pub(crate) target: Option<f64>,
}

impl Row {
    pub(crate) fn is_missed(&self) -> bool {
        self.target.is_some_and(|target| self.ratio > target || self.ratio.is_nan())
    }

    fn verdict(&self) -> &'static str {
        match self.target {
            None => "",
            Some(_) if self.is_missed() => "MISSED",
            Some(_) => "met",
        }
    }
}

/// The rows, aligned.
pub(crate) struct Table<'a>(pub(crate) &'a [Row]);

impl Table<'_> {
    /// How many targets are not met.
    pub(crate) fn missed(&self) -> usize {
        self.0.iter().filter(|row| row.is_missed()).count()
    }
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|row| row.what.len()).max().unwrap_or(0).max("what".len());
        write!(f, "{:width$}   ratio  half of the rounds  target", "what")?;
        for row in self.0 {
            let Row { what, ratio, spread, .. } = row;
            let spread = spread.map(|Spread { low, high }| format!("{low:.3} to {high:.3}"));
            let target = row.target.map(|target| format!("<= {target:.2}"));
            let line = format!(
                "{what:width$}  {ratio:6.4}  {:18}  {:7}  {}",
                spread.unwrap_or_default(),
                target.unwrap_or_default(),
                row.verdict()
            );
            write!(f, "\n{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ratio: f64, target: Option<f64>) -> Row {
        Row { what: "a / b", ratio, spread: None, target }
    }

    #[test]
    fn a_target_is_met_up_to_and_with_itself() {
        assert!(!row(1.02, Some(1.02)).is_missed());
        assert!(row(1.0201, Some(1.02)).is_missed());
        assert!(row(f64::NAN, Some(1.02)).is_missed());
        assert!(!row(9.0, None).is_missed());
    }

    #[test]
    fn the_table_is_aligned_and_says_what_is_missed() {
        let spread = Some(Spread { low: 0.981, high: 1.0349 });
        let rows = [
            Row { what: "traits / raw", ratio: 1.00312, spread, target: Some(1.02) },
            row(1.5, Some(1.05)),
            row(1.0, None),
        ];
        let table = Table(&rows);
        assert_eq!(table.missed(), 1);
        assert_eq!(
            table.to_string(),
            "what           ratio  half of the rounds  target\n\
             traits / raw  1.0031  0.981 to 1.035      <= 1.02  met\n\
             a / b         1.5000                      <= 1.05  MISSED\n\
             a / b         1.0000"
        );
    }
}
