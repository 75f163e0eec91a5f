//! A set of dirty pages, and its ranges.
//!
//! Made to be filled again and again: it keeps its memory. It must not call KVM.

use std::{fmt, slice};

use vm_memory::GuestAddress;

use super::words::{Runs, SparsePages, SparseWords, numbered};
use crate::{GuestRange, page_size};

/// Pages that were written: what [`crate::SlotManager::harvest_dirty`] fills.
///
/// One that is used again needs no new memory unless there are more, or larger, slots that log.
#[derive(Default)]
pub struct DirtyPages {
    /// Of slots, by guest address. Those from `used` on only keep their memory.
    parts: Vec<Part>,
    used: usize,
    /// Of memory that was elsewhere when they were written.
    apart: SparsePages,
}

/// The pages of a slot.
#[derive(Debug, Default)]
struct Part {
    first: u64,
    words: Vec<u64>,
}

impl DirtyPages {
    /// No pages.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges().next().is_none()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.ranges().map(|range| range.len() / page_size()).sum()
    }

    /// The guest-physical ranges they make, in ascending order: each as long as it can be, none
    /// beside another.
    #[must_use]
    pub fn ranges(&self) -> DirtyRanges<'_> {
        self.runs(0, u64::MAX)
    }

    /// The part of [`Self::ranges`] that is in `within`.
    #[must_use]
    pub fn ranges_within(&self, within: GuestRange) -> DirtyRanges<'_> {
        let (first, end) = pages_of(within);
        self.runs(first, end)
    }

    /// The runs of pages from `first` to before `end`.
    pub(super) fn runs(&self, first: u64, end: u64) -> DirtyRanges<'_> {
        let parts = self.parts();
        let begin = parts.partition_point(|part| part.end() <= first);
        let parts = parts.get(begin..).unwrap_or_default().iter();
        let mut parts = Runs::new(PartWords { first, parts, words: &[], start: 0 });
        let mut apart = Runs::new(self.apart.words_from(first));
        let part = parts.next().unwrap_or(NONE);
        let separate = apart.next().unwrap_or(NONE);
        DirtyRanges { parts, apart, part, separate, first, end, page: page_size() }
    }

    fn parts(&self) -> &[Part] {
        self.parts.get(..self.used).unwrap_or_default()
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.apart.clear();
    }

    /// Room for `pages` pages from `first`, which is beyond those of the parts before. What is in the
    /// words is of no meaning.
    pub(super) fn part(&mut self, first: u64, pages: u64) -> &mut [u64] {
        if self.parts.len() == self.used {
            self.parts.push(Part::default());
        }
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or_default();
        match self.parts.get_mut(self.used) {
            Some(part) => {
                self.used += 1;
                part.first = first;
                part.words.resize(words, 0);
                &mut part.words
            }
            None => &mut [], // there is one: it was pushed
        }
    }

    /// Takes the last part back.
    pub(super) fn drop_part(&mut self) {
        self.used = self.used.saturating_sub(1);
    }

    /// Adds the pages of all parts to `to`.
    pub(super) fn copy_parts(&self, to: &mut SparsePages) {
        for part in self.parts() {
            numbered(part.first, &part.words).for_each(|(first, bits)| to.add(first, bits));
        }
    }

    pub(super) fn apart_mut(&mut self) -> &mut SparsePages {
        &mut self.apart
    }
}

impl Part {
    /// The page after the last that has a bit.
    fn end(&self) -> u64 {
        self.first.saturating_add(self.words.len() as u64 * 64)
    }
}

impl fmt::Debug for DirtyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.ranges().map(|range| range.to_string())).finish()
    }
}

impl<'a> IntoIterator for &'a DirtyPages {
    type Item = GuestRange;
    type IntoIter = DirtyRanges<'a>;

    fn into_iter(self) -> DirtyRanges<'a> {
        self.ranges()
    }
}

/// The first page that begins in a range or has its first byte, and the page after its last.
pub(super) fn pages_of(range: GuestRange) -> (u64, u64) {
    let page = page_size();
    (range.start().0 / page, range.last().0 / page + 1)
}

/// The ranges that dirty pages make ([`DirtyPages::ranges`]), found as they are asked for.
#[derive(Debug, Clone)]
pub struct DirtyRanges<'a> {
    parts: Runs<PartWords<'a>>,
    apart: Runs<SparseWords<'a>>,
    /// The next run of each.
    part: (u64, u64),
    separate: (u64, u64),
    /// Pages from here on, to before `end`.
    first: u64,
    end: u64,
    /// Bytes of one.
    page: u64,
}

/// No run: it begins after all others.
const NONE: (u64, u64) = (u64::MAX, u64::MAX);

impl DirtyRanges<'_> {
    /// The next run if it begins before `limit`.
    #[inline]
    fn run(&mut self, limit: u64) -> Option<(u64, u64)> {
        let run = if self.part.0 <= self.separate.0 { self.part } else { self.separate };
        if run.0 >= limit {
            return None;
        }
        if self.part.0 <= self.separate.0 {
            self.part = self.parts.next().unwrap_or(NONE);
        } else {
            self.separate = self.apart.next().unwrap_or(NONE);
        }
        Some(run)
    }

    /// The next pages in a row: the first, and the one after the last.
    #[inline]
    pub(super) fn next_pages(&mut self) -> Option<(u64, u64)> {
        loop {
            let (first, mut end) = self.run(self.end)?;
            while let Some((_, further)) = self.run(end.saturating_add(1)) {
                end = end.max(further);
            }
            let (first, end) = (first.max(self.first), end.min(self.end));
            if first < end {
                return Some((first, end));
            }
        }
    }
}

impl Iterator for DirtyRanges<'_> {
    type Item = GuestRange;

    #[inline]
    fn next(&mut self) -> Option<GuestRange> {
        let (first, end) = self.next_pages()?;
        // Pages have addresses that fit: they are those of slots.
        let start = first.checked_mul(self.page)?;
        GuestRange::new(GuestAddress(start), (end - first).checked_mul(self.page)?)
    }
}

/// The words of parts that are not zero, numbered.
#[derive(Debug, Clone)]
struct PartWords<'a> {
    /// What is before this page is of no interest.
    first: u64,
    parts: slice::Iter<'a, Part>,
    /// What is left of a part, and the page it begins with.
    words: &'a [u64],
    start: u64,
}

impl PartWords<'_> {
    /// The next word of the part.
    #[inline]
    fn word(&mut self) -> Option<(u64, u64)> {
        while let Some((word, rest)) = self.words.split_first() {
            let start = self.start;
            self.words = rest;
            self.start += 64;
            if *word != 0 {
                return Some((start, *word));
            }
        }
        None
    }
}

impl Iterator for PartWords<'_> {
    type Item = (u64, u64);

    #[inline]
    fn next(&mut self) -> Option<(u64, u64)> {
        loop {
            if let Some(word) = self.word() {
                return Some(word);
            }
            let part = self.parts.next()?;
            let skipped = self.first.saturating_sub(part.first) / 64;
            let words = usize::try_from(skipped).ok().and_then(|n| part.words.get(n..));
            self.words = words.unwrap_or_default();
            self.start = part.first + skipped * 64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(ranges: DirtyRanges<'_>) -> Vec<String> {
        ranges.map(|range| range.to_string()).collect()
    }

    fn pages(parts: &[(u64, &[u64])], apart: &[(u64, u64)]) -> DirtyPages {
        let mut pages = DirtyPages::new();
        for (first, words) in parts {
            pages.part(*first, words.len() as u64 * 64).copy_from_slice(words);
        }
        apart.iter().for_each(|(first, bits)| pages.apart.add(*first, *bits));
        pages
    }

    #[test]
    fn ranges_are_as_long_as_they_can_be_across_words_slots_and_what_is_apart() {
        let all = pages(&[(0, &[0b1101, 1 << 63]), (128, &[0b11])], &[(1, 1), (130, 1), (500, 1)]);
        assert_eq!(shown(all.ranges()), ["0x0-0x3fff", "0x7f000-0x82fff", "0x1f4000-0x1f4fff"]);
        assert_eq!((all.count(), all.is_empty()), (9, false));
        assert_eq!(format!("{all:?}"), r#"{"0x0-0x3fff", "0x7f000-0x82fff", "0x1f4000-0x1f4fff"}"#);
        let same = pages(&[(10, &[0b110])], &[(10, 0b10), (11, 0b10)]);
        assert_eq!((shown(same.ranges()), same.count()), (vec!["0xb000-0xcfff".into()], 2));
        assert!(DirtyPages::new().is_empty());
    }

    #[test]
    fn ranges_are_cut_where_the_asked_for_one_ends() {
        let all = pages(&[(3, &[u64::MAX, u64::MAX]), (1000, &[1])], &[(200, 0b111)]);
        let within = |start: u64, len: u64| {
            let range = GuestRange::new(GuestAddress(start), len).unwrap();
            shown(all.ranges_within(range))
        };
        assert_eq!(within(0, 0x3000), [""; 0]);
        assert_eq!(within(0, 0x4000), ["0x3000-0x3fff"]);
        assert_eq!(within(0x46000, 0x2000), ["0x46000-0x47fff"]);
        assert_eq!(within(0x82000, 0x46001), ["0x82000-0x82fff", "0xc8000-0xc8fff"]);
        assert_eq!(within(0xc9000, u64::MAX - 0xc9000), ["0xc9000-0xcafff", "0x3e8000-0x3e8fff"]);
        assert_eq!(within(0x3e9000, 0x1000), [""; 0]);
    }

    #[test]
    fn what_is_filled_again_has_only_the_new_and_no_new_memory() {
        let mut pages = pages(&[(0, &[1, 1]), (128, &[1])], &[(900, 1)]);
        let memory = pages.parts[0].words.as_ptr();
        pages.clear();
        assert!(pages.is_empty());
        pages.part(0, 128).copy_from_slice(&[0, 2]);
        assert_eq!(shown(pages.ranges()), ["0x41000-0x41fff"]);
        assert_eq!(pages.parts[0].words.as_ptr(), memory);
    }
}
