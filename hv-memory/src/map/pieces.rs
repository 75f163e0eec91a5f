//! Non-overlapping ranges of guest addresses and what is in each, joined where that goes on.

use std::collections::BTreeMap;
use std::ops::Range;

/// What is in a range.
pub(super) trait Piece: Clone {
    /// What is `by` bytes further on.
    fn advance(&mut self, by: u64);

    /// Forgets what is beyond `len` bytes.
    fn truncate(&mut self, len: u64);

    /// This, of `len` bytes, with `next` behind it, if the two are one.
    fn join(&self, len: u64, next: &Self) -> Option<Self>;
}

/// Pieces by address. Every change costs a logarithm of their number and what is changed.
#[derive(Debug, Clone)]
pub(super) struct Pieces<P> {
    /// By their first address; with the address behind the last.
    by_start: BTreeMap<u64, (u64, P)>,
}

impl<P: Piece> Pieces<P> {
    pub(super) fn new() -> Self {
        Self { by_start: BTreeMap::new() }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Range<u64>, &P)> {
        self.by_start.iter().map(|(&start, (end, piece))| (start..*end, piece))
    }

    /// The piece that has `address`.
    pub(super) fn at(&self, address: u64) -> Option<(Range<u64>, &P)> {
        let (&start, (end, piece)) = self.by_start.range(..=address).next_back()?;
        (address < *end).then_some((start..*end, piece))
    }

    /// The pieces that have an address of `window`, in order.
    pub(super) fn overlapping(
        &self,
        window: &Range<u64>,
    ) -> impl Iterator<Item = (Range<u64>, &P)> + use<'_, P> {
        let begins_before = self.at(window.start).filter(|(range, _)| range.start < window.start);
        let inside = self.by_start.range(window.clone());
        let inside = inside.map(|(&start, (end, piece))| (start..*end, piece));
        begins_before.into_iter().chain(inside)
    }

    /// Empties `window`. What begins before it or ends behind it stays outside of it.
    pub(super) fn clear(&mut self, window: &Range<u64>) {
        self.cut(window.start);
        self.cut(window.end);
        while let Some((&start, _)) = self.by_start.range(window.clone()).next() {
            self.by_start.remove(&start);
        }
    }

    /// Makes the piece that has `address` two, of which the second begins there.
    fn cut(&mut self, address: u64) {
        let Some((range, piece)) = self.at(address) else { return };
        if range.start == address {
            return;
        }
        let before = address - range.start;
        let (mut first, mut second) = (piece.clone(), piece.clone());
        first.truncate(before);
        second.advance(before);
        self.by_start.insert(range.start, (address, first));
        self.by_start.insert(address, (range.end, second));
    }

    /// Puts a piece where none is, and joins it with its neighbours if they are one.
    pub(super) fn put(&mut self, range: Range<u64>, piece: P) {
        let Range { mut start, mut end } = range;
        let mut joined = piece;
        if let Some((&before_start, (before_end, before))) =
            self.by_start.range(..start).next_back()
            && *before_end == start
            && let Some(both) = before.join(start - before_start, &joined)
        {
            self.by_start.remove(&before_start);
            (start, joined) = (before_start, both);
        }
        if let Some((after_end, after)) = self.by_start.get(&end)
            && let Some(both) = joined.join(end - start, after)
        {
            let after_end = *after_end;
            self.by_start.remove(&end);
            (end, joined) = (after_end, both);
        }
        self.by_start.insert(start, (end, joined));
    }
}
