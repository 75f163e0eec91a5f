//! The dirty ring: pages a vCPU writes, reported in memory it shares with the VMM.
//!
//! The entries and the order in which the two sides may touch them are here, for every backend and
//! every consumer (KVM API, section 8.29, `KVM_CAP_DIRTY_LOG_RING`). Where the next entry is, and
//! what becomes of a page, is the consumer's.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::SlotId;

/// `KVM_DIRTY_GFN_F_DIRTY`: KVM has reported a page in the entry.
const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: the VMM has collected it.
const RESET: u32 = 2;

/// A page that was written, as a dirty ring names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DirtyPage {
    /// The slot it was written through.
    pub slot: SlotId,
    /// The page of the slot, from 0.
    pub page: u64,
}

/// The dirty ring of a vCPU, from [`Vcpu::dirty_ring`](crate::Vcpu::dirty_ring).
///
/// Whoever holds it holds what the memory needs, the VM included.
pub trait DirtyRing: Send + Sync + fmt::Debug {
    /// The entries: always the same ones, a power of two of them. KVM fills them in order, from the
    /// first when the vCPU was created, and goes on with the first after the last.
    fn entries(&self) -> &[DirtyGfn];
}

/// An entry of a dirty ring (`struct kvm_dirty_gfn`), shared with KVM.
///
/// It goes round: empty, *dirty* when KVM has reported a page in it, *collected* when the VMM has
/// taken that, and empty again when KVM was told to look
/// ([`MemoryBackend::reset_dirty_rings`](crate::MemoryBackend::reset_dirty_rings)).
///
/// ```
/// use hv_core::{DirtyGfn, DirtyPage, SlotId};
///
/// let ring = [DirtyGfn::default(), DirtyGfn::default()];
/// let page = DirtyPage { slot: SlotId(1), page: 7 };
/// assert!(ring[0].publish(page)); // KVM
/// assert_eq!(ring[0].dirty(), Some(page)); // the VMM
/// ring[0].collect();
/// assert_eq!(ring[0].dirty(), None);
/// assert_eq!(ring[0].reset(), Some(page)); // KVM
/// assert_eq!(ring[1].dirty(), None);
/// ```
#[repr(C)]
#[derive(Debug, Default)]
pub struct DirtyGfn {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

impl DirtyGfn {
    /// The page KVM has reported and the VMM has not collected, with all that KVM did before it
    /// (load-acquire).
    ///
    /// KVM makes a page writable and reports it before the guest's write is made, and may report it
    /// more often than it had to.
    #[must_use]
    pub fn dirty(&self) -> Option<DirtyPage> {
        (self.flags.load(Ordering::Acquire) & (DIRTY | RESET) == DIRTY).then(|| self.page())
    }

    /// Gives an entry that was [`dirty`](Self::dirty) back to KVM (store-release): what was read of
    /// it has been read. Only the consumer of the ring may do this, once, and in the order of the
    /// ring: KVM stops at the first entry that is not collected.
    ///
    /// The page stays writable, and need not be reported again, until
    /// [`MemoryBackend::reset_dirty_rings`](crate::MemoryBackend::reset_dirty_rings). So its contents
    /// are to be read after that, not before: what changes later is reported again.
    pub fn collect(&self) {
        self.flags.store(RESET, Ordering::Release);
    }

    /// KVM's side, for a hypervisor in memory: reports a page. False if the entry is not empty.
    pub fn publish(&self, page: DirtyPage) -> bool {
        if self.flags.load(Ordering::Acquire) != 0 {
            return false;
        }
        self.slot.store(page.slot.0, Ordering::Relaxed);
        self.offset.store(page.page, Ordering::Relaxed);
        self.flags.store(DIRTY, Ordering::Release);
        true
    }

    /// KVM's side: empties an entry that was collected. The page it names is to be watched again.
    pub fn reset(&self) -> Option<DirtyPage> {
        if self.flags.load(Ordering::Acquire) & RESET == 0 {
            return None;
        }
        let page = self.page();
        self.flags.store(0, Ordering::Release);
        Some(page)
    }

    fn page(&self) -> DirtyPage {
        let slot = SlotId(self.slot.load(Ordering::Relaxed));
        DirtyPage { slot, page: self.offset.load(Ordering::Relaxed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings as k;
    use std::mem::offset_of;

    const PAGE: DirtyPage = DirtyPage { slot: SlotId(0x1_0002), page: u64::MAX };

    #[test]
    fn an_entry_is_laid_out_as_in_the_kernel_header() {
        assert_eq!(DIRTY | RESET, k::KVM_DIRTY_GFN_F_MASK);
        assert_eq!(size_of::<DirtyGfn>(), size_of::<k::kvm_dirty_gfn>());
        assert_eq!(align_of::<DirtyGfn>(), align_of::<k::kvm_dirty_gfn>());
        assert_eq!(offset_of!(DirtyGfn, flags), offset_of!(k::kvm_dirty_gfn, flags));
        assert_eq!(offset_of!(DirtyGfn, slot), offset_of!(k::kvm_dirty_gfn, slot));
        assert_eq!(offset_of!(DirtyGfn, offset), offset_of!(k::kvm_dirty_gfn, offset));
    }

    #[test]
    fn an_entry_goes_round_in_one_direction() {
        let entry = DirtyGfn::default();
        assert_eq!((entry.dirty(), entry.reset()), (None, None));
        assert!(entry.publish(PAGE));
        assert!(!entry.publish(DirtyPage { page: 0, ..PAGE }), "it is taken");
        assert_eq!((entry.reset(), entry.dirty()), (None, Some(PAGE)), "not collected yet");
        entry.collect();
        assert_eq!(entry.dirty(), None);
        assert!(!entry.publish(PAGE), "not reset yet");
        assert_eq!((entry.reset(), entry.reset()), (Some(PAGE), None));
        assert!(entry.publish(PAGE));
    }

    #[test]
    fn a_flag_nobody_knows_is_not_a_page_that_was_collected() {
        let entry = DirtyGfn::default();
        entry.flags.store(1 << 31, Ordering::Relaxed);
        assert_eq!((entry.dirty(), entry.reset()), (None, None));
        assert!(!entry.publish(PAGE));
    }
}
