//! Dirty bits of slots: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, and what changes how they work.
//!
//! There is no page protection here, and none is needed: KVM protects a page when it clears the
//! page's bit, so that the next write is noticed. Here every write is.

use super::{Memory, Slot};
use crate::{Errno, SlotId};

const ENABLE: u64 = 1;
const INITIALLY_SET: u64 = 2;

/// A bit for each page of a slot.
#[derive(Debug)]
pub(super) struct DirtyLog(Vec<u64>);

impl DirtyLog {
    /// For a slot of `pages` pages, all of them dirty or none. A slot's pages are backed by host
    /// memory 32768 times as large.
    pub(super) fn new(pages: u64, full: bool) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or_default();
        let mut log = vec![if full { u64::MAX } else { 0 }; words];
        if let (Some(last), true) = (log.last_mut(), full) {
            // The last word may have bits beyond the last page.
            *last >>= (64 - pages % 64) % 64;
        }
        Self(log)
    }

    /// Marks a page; whether it was not marked before.
    pub(super) fn mark(&mut self, page: u64) -> bool {
        let Some(word) = self.word(page) else { return false };
        let was = *word;
        *word |= 1 << (page % 64);
        *word != was
    }

    /// Takes the mark of a page away.
    pub(super) fn unmark(&mut self, page: u64) {
        if let Some(word) = self.word(page) {
            *word &= !(1 << (page % 64));
        }
    }

    fn word(&mut self, page: u64) -> Option<&mut u64> {
        usize::try_from(page / 64).ok().and_then(|word| self.0.get_mut(word))
    }
}

impl Memory {
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with its argument.
    pub(in crate::fake) fn enable_manual_protect(&mut self, flags: u64) -> Result<(), Errno> {
        let allowed = match flags & ENABLE {
            0 => ENABLE,
            _ => self.limits.manual_protect,
        };
        if self.limits.manual_protect == 0 || flags & !allowed != 0 {
            return Err(Errno::EINVAL);
        }
        self.manual_protect = flags;
        Ok(())
    }

    /// `KVM_GET_DIRTY_LOG`. Words of `bitmap` that the slot has no pages for stay as they are.
    pub(in crate::fake) fn dirty_log(
        &mut self,
        id: SlotId,
        bitmap: &mut [u64],
    ) -> Result<(), Errno> {
        // The one rule that is not the kernel's, which believes that the bitmap is long enough.
        let short = |slot: &Slot| (bitmap.len() as u64) < slot.region.pages().div_ceil(64);
        if self.slots.get(&id).is_some_and(short) {
            return Err(Errno::EINVAL);
        }
        let keep = self.manual_protect != 0;
        for (to, from) in bitmap.iter_mut().zip(self.log(id)?) {
            *to = *from;
            if !keep {
                *from = 0;
            }
        }
        Ok(())
    }

    /// `KVM_CLEAR_DIRTY_LOG`, which works without manual protection as well.
    pub(in crate::fake) fn clear_dirty_log(
        &mut self,
        id: SlotId,
        first: u64,
        pages: u32,
        bitmap: &[u64],
    ) -> Result<(), Errno> {
        if self.limits.manual_protect == 0 {
            return Err(Errno::ENOTTY);
        }
        // As for reading: the length is ours.
        if (bitmap.len() as u64) < u64::from(pages).div_ceil(64) {
            return Err(Errno::EINVAL);
        }
        if self.rings.is_none() && !first.is_multiple_of(64) {
            return Err(Errno::EINVAL);
        }
        let slot_pages = self.slots.get(&id).map_or(0, |slot| slot.region.pages());
        let log = self.log(id)?;
        let rest = slot_pages.checked_sub(first).ok_or(Errno::EINVAL)?;
        let pages = u64::from(pages);
        if pages > rest || (pages < rest && !pages.is_multiple_of(64)) {
            return Err(Errno::EINVAL);
        }
        let words = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::EINVAL)?;
        let skip = usize::try_from(first / 64).map_err(|_| Errno::EINVAL)?;
        for (word, clear) in log.iter_mut().skip(skip).zip(bitmap).take(words) {
            *word &= !clear;
        }
        Ok(())
    }

    /// How many pages of a slot are dirty and not yet asked for; 0 for one that does not log, or whose
    /// log can't be asked for.
    pub(in crate::fake) fn dirty_pages(&self, id: SlotId) -> u64 {
        if self.rings.is_some() {
            return 0;
        }
        let log = self.slots.get(&id).and_then(|slot| slot.dirty.as_ref());
        log.map_or(0, |log| log.0.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Whether a log begins with all pages dirty.
    pub(super) fn logs_begin_full(&self) -> bool {
        self.manual_protect & INITIALLY_SET != 0
    }

    /// The log of a slot, by the rules that reading and clearing share.
    fn log(&mut self, id: SlotId) -> Result<&mut [u64], Errno> {
        if self.rings.is_some() {
            return Err(Errno::ENXIO);
        }
        self.check_id(id)?;
        let slot = self.slots.get_mut(&id).ok_or(Errno::ENOENT)?;
        let log = slot.dirty.as_mut().ok_or(Errno::ENOENT)?;
        Ok(&mut log.0)
    }
}
