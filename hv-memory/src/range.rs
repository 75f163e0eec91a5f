//! A range of guest-physical addresses that can't be empty and can't wrap.
//!
//! Errors of this crate name ranges, so the type also says how one is shown. It knows nothing of
//! pages: who needs alignment checks it.

use std::fmt;
use std::ops::Range;

use vm_memory::GuestAddress;

/// A range of guest-physical addresses: at least one byte, inside the 64-bit address space.
///
/// ```
/// use hv_memory::GuestRange;
/// use vm_memory::GuestAddress;
///
/// let range = GuestRange::new(GuestAddress(0x1000), 0x2000).unwrap();
/// assert_eq!(range.to_string(), "0x1000-0x2fff");
/// assert!(GuestRange::new(GuestAddress(0x1000), 0).is_none(), "empty");
/// assert!(GuestRange::new(GuestAddress(u64::MAX), 2).is_none(), "wraps");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestRange {
    start: u64,
    last: u64,
}

impl GuestRange {
    /// `len` bytes from `start`, or `None` if that is no byte or passes the last address.
    #[must_use]
    pub const fn new(start: GuestAddress, len: u64) -> Option<Self> {
        let Some(beyond_first) = len.checked_sub(1) else { return None };
        match start.0.checked_add(beyond_first) {
            Some(last) => Some(Self { start: start.0, last }),
            None => None,
        }
    }

    /// The addresses of a half-open range that has some, as this crate's own ranges do.
    pub(crate) fn of(range: &Range<u64>) -> Self {
        Self { start: range.start, last: range.end.saturating_sub(1).max(range.start) }
    }

    /// The first address.
    #[must_use]
    pub const fn start(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    /// The last address that still belongs to the range.
    #[must_use]
    pub const fn last(&self) -> GuestAddress {
        GuestAddress(self.last)
    }

    /// Bytes, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(&self) -> u64 {
        // The constructor took a u64 length, so that the sum fits.
        self.last.wrapping_sub(self.start).wrapping_add(1)
    }

    /// Whether `address` is in the range.
    #[must_use]
    pub const fn contains(&self, address: GuestAddress) -> bool {
        self.start <= address.0 && address.0 <= self.last
    }

    /// Whether the two have an address in common.
    #[must_use]
    pub const fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }
}

impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(GuestAddress(start), len).unwrap()
    }

    #[test]
    fn reaches_the_last_address_but_does_not_wrap() {
        let top = range(u64::MAX - 0xfff, 0x1000);
        assert_eq!((top.last().0, top.len()), (u64::MAX, 0x1000));
        assert_eq!(range(0, u64::MAX).len(), u64::MAX);
        assert!(GuestRange::new(GuestAddress(1), u64::MAX).is_some());
        assert!(GuestRange::new(GuestAddress(2), u64::MAX).is_none());
    }

    #[test]
    fn neighbours_do_not_overlap() {
        assert!(!range(0, 0x1000).overlaps(&range(0x1000, 0x1000)));
        assert!(range(0, 0x1001).overlaps(&range(0x1000, 0x1000)));
        assert!(range(0, 0x9000).overlaps(&range(0x1000, 0x1000)));
        assert!(range(0, 1).contains(GuestAddress(0)));
        assert!(!range(0, 1).contains(GuestAddress(1)));
    }
}
