//! The order of devices on a bus, and how KVM finds those at an address.
//!
//! The devices are in an order that is total only if none contains another, and found by halving.
//! So a device inside another hides it from some writes: with a zone at 0x1000 of 0x100 bytes and
//! then an ioeventfd at 0x1010, the zone gets the write to 0x1010, and nobody that to 0x1020.
//! Measured on Linux 6.18; a library that nests devices has to see it here too.

use std::cmp::Ordering;

/// Addresses of a device or of an access.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start: u64,
    /// Bytes; for a device, 0 is any access that begins here.
    pub(super) len: u32,
}

impl Span {
    /// The address after the last. KVM counts the bytes of a device with a sign, and does not
    /// look for overflow.
    fn end(&self) -> u64 {
        self.start.wrapping_add_signed(i64::from(self.len.cast_signed()))
    }

    /// Where this is from a device: before it, inside, or after.
    fn relative_to(&self, device: &Span) -> Ordering {
        let after = match device.len {
            0 => self.start > device.start,
            _ => self.end() > device.end(),
        };
        if self.start < device.start {
            Ordering::Less
        } else if after {
            Ordering::Greater
        } else {
            Ordering::Equal
        }
    }
}

/// The devices of a bus.
#[derive(Debug)]
pub(super) struct Bus<D>(Vec<(Span, D)>);

impl<D> Default for Bus<D> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<D> Bus<D> {
    /// Puts a device before the first that is not before or around it.
    pub(super) fn add(&mut self, span: Span, device: D) {
        let after = |(there, _): &(Span, D)| there.relative_to(&span) == Ordering::Greater;
        let index = self.0.iter().position(after).unwrap_or(self.0.len());
        self.0.insert(index, (span, device));
    }

    /// Removes the devices that `keep` does not keep.
    pub(super) fn retain(&mut self, keep: impl Fn(&D) -> bool) {
        self.0.retain(|(_, device)| keep(device));
    }

    pub(super) fn devices(&self) -> impl Iterator<Item = &D> {
        self.0.iter().map(|(_, device)| device)
    }

    /// The devices an access is offered to, in order.
    pub(super) fn at(&self, access: Span) -> impl Iterator<Item = &D> {
        let here = move |(span, _): &&(Span, D)| access.relative_to(span) == Ordering::Equal;
        let found = self.find(access).and_then(|found| self.0.split_at_checked(found));
        let (before, after) = found.unwrap_or_default();
        // The neighbours before the one that was found come first.
        let first = before.iter().rev().take_while(here).count();
        let before = before.get(before.len() - first..).unwrap_or_default();
        before.iter().chain(after.iter().take_while(here)).map(|(_, device)| device)
    }

    /// A device at an access. In which places it is looked for matters.
    fn find(&self, access: Span) -> Option<usize> {
        let (mut first, mut count) = (0, self.0.len());
        while count > 0 {
            let half = count / 2;
            let middle = first + half;
            match access.relative_to(&self.0.get(middle)?.0) {
                Ordering::Equal => return Some(middle),
                Ordering::Less => count = half,
                Ordering::Greater => {
                    first = middle + 1;
                    count -= half + 1;
                }
            }
        }
        None
    }
}
