//! Dirty pages as a set of numbers: which must be told, and which may be.
//!
//! The two differ only after clearing: a page that was written again since it was read may be told
//! once more, or not, as whoever clears copies it afterwards.

use std::collections::BTreeSet;

pub(crate) type Pages = BTreeSet<u64>;

#[derive(Debug, Default)]
pub(crate) struct Model {
    must: Pages,
    may: Pages,
    /// What was read last, and what was written since so that clearing may leave it.
    read: Pages,
    since: Pages,
}

impl Model {
    /// A page was written, or counts as such. `stays` says that clearing may leave it dirty if it
    /// was read before.
    pub(crate) fn write(&mut self, page: u64, stays: bool) {
        self.must.insert(page);
        self.may.insert(page);
        if stays {
            self.since.insert(page);
        }
    }

    /// What is wrong with what is told.
    pub(crate) fn check(&self, told: &Pages) -> Result<(), String> {
        let lost: Vec<_> = self.must.difference(told).collect();
        let invented: Vec<_> = told.difference(&self.may).collect();
        match (lost.is_empty(), invented.is_empty()) {
            (true, true) => Ok(()),
            _ => Err(format!("lost {lost:?}, invented {invented:?}")),
        }
    }

    pub(crate) fn harvested(&mut self) {
        self.must.clear();
        self.may.clear();
    }

    pub(crate) fn read(&mut self, told: &Pages) {
        self.must.clone_from(told);
        self.may.clone_from(told);
        self.read.clone_from(told);
        self.since.clear();
    }

    /// Reading failed: there is nothing to clear.
    pub(crate) fn unread(&mut self) {
        self.read.clear();
    }

    /// Those of the pages from `first` to before `end` that were read.
    pub(crate) fn asked(&self, first: u64, end: u64) -> Pages {
        self.read.iter().copied().filter(|page| (first..end).contains(page)).collect()
    }

    /// Clearing them failed: they may be told once more, though they were harvested since they were
    /// read.
    pub(crate) fn not_cleared(&mut self, asked: &Pages) {
        self.may.extend(asked);
    }

    pub(crate) fn clear(&mut self, asked: &Pages) {
        self.must.retain(|page| !asked.contains(page));
        self.may.retain(|page| !asked.contains(page) || self.since.contains(page));
    }
}
