//! Pages as bits of words: how bits get into words that begin elsewhere, and which runs they make.
//!
//! Pages are numbered by guest-physical address. Nothing here knows where bits come from.

use std::collections::{BTreeMap, btree_map};

/// Marks the pages `first + n` for each bit n of `bits` in words that begin with page 0. What is
/// beyond their end is left out.
pub(super) fn mark(words: &mut [u64], first: u64, bits: u64) {
    let Ok(at) = usize::try_from(first / 64) else { return };
    let shift = (first % 64) as u32;
    if let Some(word) = words.get_mut(at) {
        *word |= bits << shift;
    }
    // Nothing for a shift of 0: there is no bit 64.
    let rest = bits.checked_shr(64 - shift).unwrap_or(0);
    if rest != 0
        && let Some(word) = at.checked_add(1).and_then(|next| words.get_mut(next))
    {
        *word |= rest;
    }
}

/// Marks the pages from `first` to before `end` in words that begin with page 0.
pub(super) fn mark_run(words: &mut [u64], first: u64, end: u64) {
    let begin = usize::try_from(first / 64).unwrap_or(usize::MAX);
    for (n, word) in (first / 64..end.div_ceil(64)).zip(words.iter_mut().skip(begin)) {
        *word |= between(n * 64, first, end);
    }
}

/// The words that are not zero, each with the number of its first page.
pub(super) fn numbered(first: u64, words: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    let words = words.iter().enumerate().filter(|(_, word)| **word != 0);
    words.map(move |(n, word)| (first + n as u64 * 64, *word))
}

/// A set of pages with few of them, anywhere.
#[derive(Debug, Clone, Default)]
pub(super) struct SparsePages(BTreeMap<u64, u64>);

impl SparsePages {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds page `first + n` for each bit n of `bits`.
    pub(super) fn add(&mut self, first: u64, bits: u64) {
        let (at, shift) = (first / 64, (first % 64) as u32);
        for (at, bits) in [(at, bits << shift), (at + 1, bits.checked_shr(64 - shift).unwrap_or(0))]
        {
            if bits != 0 {
                *self.0.entry(at).or_default() |= bits;
            }
        }
    }

    /// Adds the pages from `first` to before `end`.
    pub(super) fn add_run(&mut self, first: u64, end: u64) {
        for at in first / 64..end.div_ceil(64) {
            *self.0.entry(at).or_default() |= between(at * 64, first, end);
        }
    }

    /// Removes the pages from `first` to before `end`.
    pub(super) fn remove(&mut self, first: u64, end: u64) {
        let emptied: Vec<u64> = self
            .0
            .range_mut(first / 64..end.div_ceil(64))
            .filter_map(|(&at, word)| {
                *word &= !between(at * 64, first, end);
                (*word == 0).then_some(at)
            })
            .collect();
        for at in emptied {
            self.0.remove(&at);
        }
    }

    /// The words from the one with page `first` on.
    pub(super) fn words_from(&self, first: u64) -> SparseWords<'_> {
        SparseWords(self.0.range(first / 64..))
    }
}

/// Words with the number of their first page.
#[derive(Debug, Clone)]
pub(super) struct SparseWords<'a>(btree_map::Range<'a, u64, u64>);

impl Iterator for SparseWords<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        self.0.next().map(|(at, word)| (at * 64, *word))
    }
}

/// The bits of the word that begins with page `start` for the pages from `first` to before `end`.
pub(super) fn between(start: u64, first: u64, end: u64) -> u64 {
    bits_from(first.saturating_sub(start)) & !bits_from(end.saturating_sub(start))
}

/// The bits from `n` on.
fn bits_from(n: u64) -> u64 {
    u32::try_from(n).ok().and_then(|n| u64::MAX.checked_shl(n)).unwrap_or(0)
}

/// The runs of set bits in numbered words: first page, and the page after the last. A run ends with
/// its word.
#[derive(Debug, Clone)]
pub(super) struct Runs<I> {
    words: I,
    start: u64,
    /// What is left of the word that begins with page `start`.
    left: u64,
}

impl<I: Iterator<Item = (u64, u64)>> Runs<I> {
    pub(super) fn new(words: I) -> Self {
        Self { words, start: 0, left: 0 }
    }
}

impl<I: Iterator<Item = (u64, u64)>> Iterator for Runs<I> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        while self.left == 0 {
            (self.start, self.left) = self.words.next()?;
        }
        let first = self.left.trailing_zeros();
        let len = (self.left >> first).trailing_ones();
        // The carry of the lowest bit clears the run.
        self.left &= self.left.wrapping_add(1 << first);
        let first = self.start + u64::from(first);
        Some((first, first + u64::from(len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(words: &[(u64, u64)]) -> Vec<(u64, u64)> {
        Runs::new(words.iter().copied()).collect()
    }

    #[test]
    fn runs_of_a_word() {
        assert_eq!(runs(&[(0, 0)]), []);
        assert_eq!(runs(&[(64, 0b1011_0110)]), [(65, 67), (68, 70), (71, 72)]);
        assert_eq!(runs(&[(0, u64::MAX), (64, 1 << 63)]), [(0, 64), (127, 128)]);
        assert_eq!(runs(&[(0, 0b111 << 61), (100, 1)]), [(61, 64), (100, 101)]);
    }

    #[test]
    fn bits_go_to_words_that_begin_elsewhere() {
        let mut words = [0; 2];
        mark(&mut words, 0, 0b101);
        mark(&mut words, 62, 0b111);
        mark(&mut words, 127, 0b11);
        mark(&mut words, 128, 1);
        mark(&mut words, 64, 1 << 10);
        assert_eq!(words, [0b101 | 0b11 << 62, 1 | 1 << 63 | 1 << 10]);
    }

    #[test]
    fn a_run_is_marked_up_to_the_end_of_the_words() {
        let mut words = [0; 2];
        mark_run(&mut words, 3, 3);
        assert_eq!(words, [0, 0]);
        mark_run(&mut words, 3, 5);
        mark_run(&mut words, 126, 1000);
        assert_eq!(words, [0b11000, 0b11 << 62]);
        mark_run(&mut words, 60, 65);
        assert_eq!(words, [0b11000 | 0b1111 << 60, 1 | 0b11 << 62]);
    }

    #[test]
    fn the_bits_of_a_word_between_two_pages() {
        assert_eq!(between(64, 0, 1000), u64::MAX);
        assert_eq!(between(64, 66, 68), 0b1100);
        assert_eq!(between(64, 127, 128), 1 << 63);
        assert_eq!(between(64, 128, 200), 0);
        assert_eq!(between(64, 0, 64), 0);
    }

    #[test]
    fn pages_are_added_and_removed() {
        let mut pages = SparsePages::default();
        pages.add_run(62, 66);
        pages.add((1 << 40) - 1, 0b11);
        pages.remove(63, 65);
        pages.remove((1 << 40) - 1, 1 << 40);
        let left: Vec<_> = Runs::new(pages.words_from(0)).collect();
        assert_eq!(left, [(62, 63), (65, 66), (1 << 40, (1 << 40) + 1)]);
        pages.remove(65, 66);
        pages.remove(0, 63);
        assert_eq!(pages.0.len(), 1, "a word without pages is not kept");
        assert!(pages.words_from(1 << 41).next().is_none());
    }
}
