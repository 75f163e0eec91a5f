//! How many instructions were completed, by kind, for the report at the end of a run.

use std::collections::BTreeMap;

use iced_x86::Mnemonic;

/// Completed instructions by mnemonic. An instruction that ended in an exception for the guest
/// counts: it did what a processor does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<Mnemonic, u64>);

impl Counts {
    pub(super) fn count(&mut self, mnemonic: Mnemonic) {
        let count = self.0.entry(mnemonic).or_default();
        *count = count.saturating_add(1);
    }

    /// Adds the counts of another vCPU.
    pub fn merge(&mut self, other: &Counts) {
        for (&mnemonic, &n) in &other.0 {
            let count = self.0.entry(mnemonic).or_default();
            *count = count.saturating_add(n);
        }
    }

    /// Mnemonic and count of every kind completed at least once.
    pub fn iter(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        self.0.iter().map(|(&mnemonic, &count)| (name(mnemonic), count))
    }

    /// Completed instructions of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().fold(0, |total, &count| total.saturating_add(count))
    }
}

/// The mnemonic as an assembler writes it.
pub(super) fn name(mnemonic: Mnemonic) -> String {
    match mnemonic {
        Mnemonic::Wait => "fwait".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_by_kind_and_merged() {
        let mut one = Counts::default();
        one.count(Mnemonic::Int3);
        one.count(Mnemonic::Wait);
        one.count(Mnemonic::Int3);
        let mut two = Counts::default();
        two.count(Mnemonic::Int3);
        two.count(Mnemonic::Popcnt);
        one.merge(&two);
        let mut all: Vec<_> = one.iter().collect();
        all.sort();
        assert_eq!(
            all,
            [("fwait".to_owned(), 1), ("int3".to_owned(), 3), ("popcnt".to_owned(), 1)]
        );
        assert_eq!(one.total(), 5);
    }
}
