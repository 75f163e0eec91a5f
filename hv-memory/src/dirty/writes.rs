//! What the VMM itself writes to guest memory: KVM only knows of the guest's writes.
//!
//! Every mapping has such a log, off until a slot with its memory logs. It must not cost the
//! VMM's data path more than a fence while it is off, nor a lock ever. vm-memory's own `AtomicBitmap`
//! would do for the marks, but gives its words out only in a new vector for each harvest.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

use super::words::between;
use crate::backing::Pages;
use crate::page_size;

/// Which pages of a mapping the VMM has written through vm-memory, while somebody wants to know.
///
/// It comes with each [`crate::Mapping`] and is read with the dirty pages of slots:
/// [`crate::SlotManager::harvest_dirty`].
#[derive(Debug, Default)]
pub struct WriteLog {
    bytes: usize,
    page_shift: u32,
    /// How many want to know.
    watchers: AtomicUsize,
    /// From the first watcher on.
    marks: OnceLock<Marks>,
    /// What stays mapped for as long as the region of vm-memory that this log is in.
    _pages: Option<Arc<Pages>>,
}

#[derive(Debug)]
struct Marks {
    /// A bit for each page.
    words: Box<[AtomicU64]>,
    /// A bit for each word that may have one: whoever takes marks has little to look at. It is set
    /// after the word, and cleared before the word is.
    groups: Box<[AtomicU64]>,
}

impl Marks {
    fn new(pages: usize) -> Self {
        let zeros = |bits: usize| (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let words: Box<[AtomicU64]> = zeros(pages);
        Self { groups: zeros(words.len()), words }
    }

    /// The pages from `first` to before `end`.
    fn set(&self, first: u64, end: u64) {
        let numbers = first / 64..end.div_ceil(64);
        for (n, word) in numbers.clone().zip(self.words.iter().skip(index(first))) {
            set(word, between(n * 64, first, end));
        }
        let (first, end) = (numbers.start, numbers.end.min(self.words.len() as u64));
        let numbers = first / 64..end.div_ceil(64);
        for (n, group) in numbers.zip(self.groups.iter().skip(index(first))) {
            set(group, between(n * 64, first, end));
        }
    }

    /// Takes those of the pages from `first` to before `end`, word by word.
    fn take(&self, first: u64, end: u64, mut take: impl FnMut(u64, u64)) {
        let (from, to) = (first / 64, end.div_ceil(64));
        for (n, group) in (from / 64..to.div_ceil(64)).zip(self.groups.iter().skip(index(from))) {
            let mut left = group.load(Ordering::Acquire) & between(n * 64, from, to);
            while left != 0 {
                let (bit, number) = (left & left.wrapping_neg(), left.trailing_zeros());
                left ^= bit;
                let number = n * 64 + u64::from(number);
                let Some(word) = usize::try_from(number).ok().and_then(|n| self.words.get(n))
                else {
                    continue;
                };
                let mask = between(number * 64, first, end);
                group.fetch_and(!bit, Ordering::SeqCst);
                let taken = word.fetch_and(!mask, Ordering::SeqCst);
                if taken & !mask != 0 {
                    group.fetch_or(bit, Ordering::SeqCst);
                }
                if taken & mask != 0 {
                    take(number * 64, taken & mask);
                }
            }
        }
        // The other half of the one in `WriteLog::marked`.
        fence(Ordering::SeqCst);
    }
}

/// Sets bits. Most are set already, and then nobody else has to hear of it.
fn set(word: &AtomicU64, mask: u64) {
    if word.load(Ordering::Relaxed) & mask != mask {
        word.fetch_or(mask, Ordering::SeqCst);
    }
}

/// The word of a page, or the group of a word.
fn index(n: u64) -> usize {
    usize::try_from(n / 64).unwrap_or(usize::MAX)
}

impl WriteLog {
    /// The log of `bytes` bytes of `pages`, which it keeps mapped: vm-memory's regions hold nothing
    /// else that could.
    pub(crate) fn keeping(pages: Arc<Pages>, bytes: usize) -> Self {
        Self { _pages: Some(pages), ..Self::with_len(bytes) }
    }

    /// From now on writes are marked.
    pub(super) fn watch(&self) {
        self.marks.get_or_init(|| Marks::new(self.bytes.div_ceil(1 << self.page_shift)));
        self.watchers.fetch_add(1, Ordering::SeqCst);
    }

    /// Ends what [`Self::watch`] began.
    pub(super) fn unwatch(&self) {
        self.watchers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Takes the marks of `pages` pages from `first`: up to 64 each time, with the number of the
    /// lowest counted from `first`.
    pub(super) fn drain(&self, first: u64, pages: u64, mut take: impl FnMut(u64, u64)) {
        let Some(marks) = self.marks.get() else { return };
        marks.take(first, first.saturating_add(pages), |start, bits| {
            let low = bits.trailing_zeros();
            take(start + u64::from(low) - first, bits >> low);
        });
    }

    fn marked(&self) -> Option<&Marks> {
        // The bytes are written before their page is marked. With this fence between them, whoever
        // begins to watch, or takes a mark that is still to be seen here, sees the bytes.
        fence(Ordering::SeqCst);
        match self.watchers.load(Ordering::Relaxed) {
            0 => None,
            _ => self.marks.get(),
        }
    }
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(marks) = self.marked() else { return };
        let Some(beyond_first) = len.checked_sub(1) else { return };
        let first = (offset >> self.page_shift) as u64;
        let last = (offset.saturating_add(beyond_first) >> self.page_shift) as u64;
        marks.set(first, last + 1);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (offset >> self.page_shift) as u64;
        let word = self.marks.get().and_then(|marks| marks.words.get(index(page)));
        word.is_some_and(|word| word.load(Ordering::Acquire) & 1 << (page % 64) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, Self>;
}

impl NewBitmap for WriteLog {
    fn with_len(bytes: usize) -> Self {
        let page_shift = page_size().trailing_zeros();
        Self { bytes, page_shift, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const PAGE: usize = 4096;

    fn drained(log: &WriteLog, first: u64, pages: u64) -> BTreeSet<u64> {
        let mut all = BTreeSet::new();
        log.drain(first, pages, |at, bits| {
            assert_ne!(bits & 1, 0);
            all.extend((0..64).filter(|n| bits >> n & 1 != 0).map(|n| at + n));
        });
        all
    }

    #[test]
    fn nothing_is_marked_or_allocated_before_somebody_watches() {
        let log = WriteLog::with_len(100 * PAGE);
        log.mark_dirty(0, 100 * PAGE);
        assert!(log.marks.get().is_none() && !log.dirty_at(0));
        log.watch();
        assert_eq!(drained(&log, 0, 100), BTreeSet::new());
        log.unwatch();
        log.mark_dirty(0, 1);
        assert!(!log.dirty_at(0));
    }

    #[test]
    fn each_page_with_a_byte_of_the_write_is_marked_and_no_other() {
        let log = WriteLog::with_len(200 * PAGE);
        log.watch();
        for (offset, len, pages) in [
            (0, 0, 0..0),
            (5, 1, 0..1),
            (PAGE - 1, 2, 0..2),
            (63 * PAGE, 2 * PAGE, 63..65),
            (64 * PAGE, 64 * PAGE, 64..128),
            (10 * PAGE, 150 * PAGE, 10..160),
            (199 * PAGE, usize::MAX, 199..200),
            (500 * PAGE, PAGE, 0..0),
        ] {
            log.mark_dirty(offset, len);
            assert!(
                (0..200).all(|page| log.dirty_at(page as usize * PAGE) == pages.contains(&page))
            );
            assert_eq!(drained(&log, 0, 200), pages.collect(), "{offset:#x}, {len:#x}");
            assert_eq!(drained(&log, 0, 200), BTreeSet::new());
        }
    }

    #[test]
    fn a_part_is_taken_and_the_rest_stays() {
        let log = WriteLog::with_len(200 * PAGE);
        log.watch();
        log.mark_dirty(0, 200 * PAGE);
        assert_eq!(drained(&log, 60, 10), (0..10).collect());
        assert_eq!(drained(&log, 3, 1), [0].into());
        assert_eq!(drained(&log, 64, 128), (6..128).collect());
        let rest: BTreeSet<u64> = (0..60).chain(192..200).filter(|&page| page != 3).collect();
        assert_eq!(drained(&log, 0, 1000), rest);
    }

    #[test]
    fn what_many_write_while_others_take_is_taken_once_each() {
        const PAGES: u64 = 64 * 64 * 3 + 70;
        let log = WriteLog::with_len(PAGES as usize * PAGE);
        log.watch();
        let (log, marking) = (&log, &AtomicUsize::new(2));
        let taken = std::thread::scope(|scope| {
            for thread in 0..2 {
                scope.spawn(move || {
                    for page in (thread..PAGES as usize).step_by(2) {
                        log.mark_dirty(page * PAGE, 1);
                    }
                    marking.fetch_sub(1, Ordering::SeqCst);
                });
            }
            // Two halves that share a word, and a group.
            let half = PAGES / 2;
            let takers = [(0, half), (half, PAGES - half)].map(|(first, pages)| {
                scope.spawn(move || {
                    let mut taken = Vec::new();
                    loop {
                        let done = marking.load(Ordering::SeqCst) == 0;
                        taken.extend(drained(log, first, pages).iter().map(|page| first + page));
                        if done {
                            return taken;
                        }
                    }
                })
            });
            takers.map(|taker| taker.join().unwrap()).concat()
        });
        assert_eq!(taken.len() as u64, PAGES, "no mark is taken twice");
        assert_eq!(taken.into_iter().collect::<BTreeSet<_>>(), (0..PAGES).collect());
    }

    #[test]
    fn a_slice_marks_where_it_is() {
        let log = WriteLog::with_len(4 * PAGE);
        log.watch();
        log.slice_at(PAGE).slice_at(PAGE).mark_dirty(5, 1);
        assert_eq!(drained(&log, 0, 4), [2].into());
    }
}
