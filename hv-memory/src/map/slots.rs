//! Which slots the runs of memory become.

use std::ops::Range;

use hv_core::{HostRange, SlotFlags};

use super::view::Run;

/// A slot there is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) range: Range<u64>,
    pub(super) host: HostRange,
    pub(super) flags: SlotFlags,
}

/// What shape slots may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    /// Bytes of a page.
    pub(super) page: u64,
    /// Bytes of a slot at most, a multiple of pages. Slots are cut at multiples of it.
    pub(super) max: u64,
}

impl Shape {
    /// The whole pages of a range; empty if it has none.
    pub(super) fn aligned(&self, range: &Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(self.page);
        let end = range.end.saturating_sub(range.end % self.page);
        start..end.max(start)
    }

    /// The window in which slots may change if what is seen in `window` does: slots that end or begin a
    /// part of a page away from it may, too.
    pub(super) fn around(&self, window: &Range<u64>) -> Range<u64> {
        let page = self.page;
        let start = window.start.saturating_sub(window.start % page).saturating_sub(page);
        let end = window.end.next_multiple_of(page).saturating_add(page);
        start..end
    }

    /// The slots of a run that have an address of `window`.
    pub(super) fn slots(&self, range: &Range<u64>, run: &Run, window: &Range<u64>) -> Vec<Wanted> {
        let aligned = self.aligned(range);
        let part = aligned.start.max(window.start)..aligned.end.min(window.end);
        if part.is_empty() {
            return Vec::new();
        }
        let first = part.start.saturating_sub(part.start % self.max);
        let last = part.end.next_multiple_of(self.max);
        let whole = first.max(aligned.start)..last.min(aligned.end);
        self.cut(&whole, [].into_iter(), range.start, run)
    }

    /// The slots of a part of a run, whole pages, cut at `also` as well, which is in order.
    pub(super) fn cut(
        &self,
        part: &Range<u64>,
        also: impl Iterator<Item = u64>,
        run_start: u64,
        run: &Run,
    ) -> Vec<Wanted> {
        let mut slots = Vec::new();
        let mut also = also.filter(|cut| part.contains(cut)).peekable();
        let mut start = part.start;
        while start < part.end {
            while also.next_if(|cut| *cut <= start).is_some() {}
            let multiple = (start / self.max).saturating_add(1).saturating_mul(self.max);
            let end = multiple.min(part.end).min(also.peek().copied().unwrap_or(part.end));
            let host = run.part(start.saturating_sub(run_start), end.saturating_sub(start));
            // A run has the bytes of its range.
            let Some(host) = host else { break };
            slots.push(Wanted { range: start..end, host, flags: run.flags });
            start = end;
        }
        slots
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mapping;
    use std::sync::Arc;

    const SHAPE: Shape = Shape { page: 0x1000, max: 0x4000 };

    fn run(len: u64) -> Run {
        let memory = Arc::new(Mapping::anonymous(len).unwrap());
        let host = HostRange::new(memory, 0, usize::try_from(len).unwrap()).unwrap();
        Run { host, flags: SlotFlags::default() }
    }

    fn ranges(slots: &[Wanted]) -> Vec<Range<u64>> {
        slots.iter().map(|slot| slot.range.clone()).collect()
    }

    #[test]
    fn whole_pages_are_in_slots_of_at_most_the_size() {
        let run = run(0xb000);
        let range = 0x2800..0xd800;
        let slots = SHAPE.slots(&range, &run, &(0..u64::MAX));
        assert_eq!(
            ranges(&slots),
            [0x3000..0x4000, 0x4000..0x8000, 0x8000..0xc000, 0xc000..0xd000]
        );
        for slot in &slots {
            assert_eq!(slot.host.address() - run.host.address(), slot.range.start - range.start);
            assert_eq!(slot.host.len() as u64, slot.range.end - slot.range.start);
        }
        let inside = SHAPE.slots(&range, &run, &(0x4800..0x8001));
        assert_eq!(ranges(&inside), [0x4000..0x8000, 0x8000..0xc000]);
        assert_eq!(SHAPE.slots(&range, &run, &(0xd000..0xe000)), [], "no whole page");
    }

    #[test]
    fn what_has_no_whole_page_has_no_slot() {
        assert!(SHAPE.aligned(&(0x1001..0x2fff)).is_empty());
        assert_eq!(SHAPE.aligned(&(0x1001..0x3000)), 0x2000..0x3000);
        assert!(SHAPE.aligned(&(0x1001..0x1fff)).is_empty(), "within a page");
    }

    #[test]
    fn further_cuts_are_made_where_they_are_inside() {
        let run = run(0x8000);
        let cuts = [0x1000, 0x2000, 0x3000, 0x4000, 0x9000];
        let slots = SHAPE.cut(&(0x2000..0x7000), cuts.into_iter(), 0, &run);
        assert_eq!(ranges(&slots), [0x2000..0x3000, 0x3000..0x4000, 0x4000..0x7000]);
    }

    #[test]
    fn around_a_window_is_a_page_more_on_each_side() {
        assert_eq!(SHAPE.around(&(0x2001..0x2002)), 0x1000..0x4000);
        assert_eq!(SHAPE.around(&(0..0x1000)), 0..0x2000);
    }
}
