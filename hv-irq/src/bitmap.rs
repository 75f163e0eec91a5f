//! Which GSIs are taken: a bitmap of words with a summary of the full ones above it.
//!
//! Only numbers. It must not know what a GSI is used for, nor issue an ioctl.

use std::ops::Range;

use hv_core::Gsi;
use thiserror::Error;

/// Why a GSI can't be taken or given back. The bitmap is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum GsiError {
    /// Every GSI is taken.
    #[error("all {count} GSIs are in use")]
    Exhausted {
        /// How many there are (`KVM_CAP_IRQ_ROUTING`).
        count: u32,
    },
    /// The host has no such GSI.
    #[error("GSI {gsi} is out of range: this VM has GSIs 0 to {}", .count.saturating_sub(1))]
    OutOfRange {
        /// The GSI.
        gsi: Gsi,
        /// How many there are.
        count: u32,
    },
    /// It is reserved for the legacy pins.
    #[error("GSI {0} is reserved")]
    Reserved(Gsi),
    /// It is taken already.
    #[error("GSI {0} is already allocated")]
    AlreadyAllocated(Gsi),
    /// It is given back though it is not taken.
    #[error("GSI {0} is not allocated")]
    NotAllocated(Gsi),
}

/// The GSIs of a VM: each is free, allocated or reserved.
///
/// ```
/// use hv_core::Gsi;
/// use hv_irq::{GsiBitmap, GsiError};
///
/// let mut gsis = GsiBitmap::new(1024);
/// gsis.reserve(0..24)?;
/// assert_eq!(gsis.allocate()?, Gsi(24));
/// assert_eq!(gsis.allocate()?, Gsi(25));
/// gsis.free(Gsi(24))?;
/// assert_eq!(gsis.allocate()?, Gsi(24), "the lowest free one");
/// assert_eq!(gsis.free(Gsi(3)), Err(GsiError::Reserved(Gsi(3))));
/// # Ok::<(), GsiError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GsiBitmap {
    count: u32,
    /// Bit n of word n / 64: GSI n is allocated or reserved. The bits of the last word from `count`
    /// on are set for ever, so that no search finds them.
    taken: Vec<u64>,
    /// The same for the reserved ones alone, without those bits.
    reserved: Vec<u64>,
    /// Bit n of word n / 64: word n of `taken` is full. Bits beyond the words are set.
    full: Vec<u64>,
    allocated: u32,
    reserved_count: u32,
}

const BITS: u32 = u64::BITS;

impl GsiBitmap {
    /// A bitmap of `count` GSIs (the value of `KVM_CAP_IRQ_ROUTING`), all free.
    #[must_use]
    pub fn new(count: u32) -> Self {
        let taken = zeros_then_ones(count);
        let words = taken.len() as u32; // at most u32::MAX / 64 + 1
        Self {
            count,
            reserved: vec![0; taken.len()],
            full: zeros_then_ones(words),
            taken,
            allocated: 0,
            reserved_count: 0,
        }
    }

    /// How many GSIs there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many are allocated.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.allocated
    }

    /// Whether none is allocated.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.allocated == 0
    }

    /// How many are free.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.count - self.allocated - self.reserved_count
    }

    /// Whether `gsi` is allocated.
    #[must_use]
    pub fn is_allocated(&self, gsi: Gsi) -> bool {
        gsi.0 < self.count && bit(&self.taken, gsi.0) && !bit(&self.reserved, gsi.0)
    }

    /// Whether `gsi` is reserved.
    #[must_use]
    pub fn is_reserved(&self, gsi: Gsi) -> bool {
        bit(&self.reserved, gsi.0)
    }

    /// The allocated GSIs, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Gsi> + '_ {
        let words = (0_u32..).zip(self.taken.iter().zip(&self.reserved));
        words.flat_map(|(index, (taken, reserved))| {
            ones(taken & !reserved)
                .map(move |bit| Gsi(index * BITS + bit))
                .take_while(|gsi| gsi.0 < self.count)
        })
    }

    /// Takes the lowest free GSI.
    ///
    /// # Errors
    /// [`GsiError::Exhausted`].
    pub fn allocate(&mut self) -> Result<Gsi, GsiError> {
        let exhausted = GsiError::Exhausted { count: self.count };
        let word = first_zero(&self.full).ok_or(exhausted)?;
        let taken = self.taken.get(word as usize).ok_or(exhausted)?;
        let gsi = Gsi(word * BITS + taken.trailing_ones());
        self.set(gsi);
        self.allocated += 1;
        Ok(gsi)
    }

    /// Takes this GSI.
    ///
    /// # Errors
    /// It is out of range, reserved or taken.
    pub fn allocate_at(&mut self, gsi: Gsi) -> Result<(), GsiError> {
        self.check_range(gsi)?;
        if bit(&self.reserved, gsi.0) {
            return Err(GsiError::Reserved(gsi));
        }
        if bit(&self.taken, gsi.0) {
            return Err(GsiError::AlreadyAllocated(gsi));
        }
        self.set(gsi);
        self.allocated += 1;
        Ok(())
    }

    /// Reserves a range: none of it can be allocated or freed from now on. What is reserved already
    /// stays so.
    ///
    /// # Errors
    /// Part of it is out of range or allocated; nothing is reserved then.
    pub fn reserve(&mut self, gsis: Range<u32>) -> Result<(), GsiError> {
        if !gsis.is_empty() {
            self.check_range(Gsi(gsis.end - 1))?;
        }
        if let Some(gsi) = gsis.clone().map(Gsi).find(|&gsi| self.is_allocated(gsi)) {
            return Err(GsiError::AlreadyAllocated(gsi));
        }
        for gsi in gsis {
            if bit(&self.reserved, gsi) {
                continue;
            }
            self.set(Gsi(gsi));
            if let Some(word) = self.reserved.get_mut((gsi / BITS) as usize) {
                *word |= 1 << (gsi % BITS);
            }
            self.reserved_count += 1;
        }
        Ok(())
    }

    /// Gives an allocated GSI back.
    ///
    /// # Errors
    /// It is out of range, reserved, or not allocated.
    pub fn free(&mut self, gsi: Gsi) -> Result<(), GsiError> {
        self.check_range(gsi)?;
        if bit(&self.reserved, gsi.0) {
            return Err(GsiError::Reserved(gsi));
        }
        if !bit(&self.taken, gsi.0) {
            return Err(GsiError::NotAllocated(gsi));
        }
        let word = gsi.0 / BITS;
        if let Some(bits) = self.taken.get_mut(word as usize) {
            *bits &= !(1 << (gsi.0 % BITS));
        }
        if let Some(bits) = self.full.get_mut((word / BITS) as usize) {
            *bits &= !(1 << (word % BITS));
        }
        self.allocated -= 1;
        Ok(())
    }

    fn check_range(&self, gsi: Gsi) -> Result<(), GsiError> {
        if gsi.0 < self.count {
            Ok(())
        } else {
            Err(GsiError::OutOfRange { gsi, count: self.count })
        }
    }

    /// Sets the bit of a GSI in range, and that of its word once it is full.
    fn set(&mut self, gsi: Gsi) {
        let word = gsi.0 / BITS;
        let Some(bits) = self.taken.get_mut(word as usize) else { return };
        *bits |= 1 << (gsi.0 % BITS);
        if *bits == u64::MAX
            && let Some(bits) = self.full.get_mut((word / BITS) as usize)
        {
            *bits |= 1 << (word % BITS);
        }
    }
}

/// Whole words with bits from `count` on set.
fn zeros_then_ones(count: u32) -> Vec<u64> {
    let mut words = vec![0; count.div_ceil(BITS) as usize];
    let used = count % BITS;
    if used != 0
        && let Some(last) = words.last_mut()
    {
        *last = u64::MAX << used;
    }
    words
}

fn bit(words: &[u64], index: u32) -> bool {
    words.get((index / BITS) as usize).is_some_and(|word| word & (1 << (index % BITS)) != 0)
}

fn first_zero(words: &[u64]) -> Option<u32> {
    let (index, word) = (0..).zip(words).find(|&(_, &word)| word != u64::MAX)?;
    Some(index * BITS + word.trailing_ones())
}

/// The positions of the set bits, ascending.
fn ones(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let position = (word != 0).then(|| word.trailing_zeros())?;
        word &= word - 1;
        Some(position)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const COUNTS: [u32; 12] = [0, 1, 31, 32, 33, 63, 64, 65, 127, 1024, 4096, 4097];

    #[test]
    fn gives_out_exactly_its_count_whatever_the_count() {
        for count in COUNTS {
            let mut gsis = GsiBitmap::new(count);
            let given: Vec<u32> =
                std::iter::from_fn(|| gsis.allocate().ok().map(|g| g.0)).collect();
            assert_eq!(given, (0..count).collect::<Vec<_>>(), "count {count}");
            assert_eq!(gsis.allocate(), Err(GsiError::Exhausted { count }));
            assert_eq!((gsis.len(), gsis.available()), (count, 0));
            assert_eq!(gsis.iter().count() as u32, count);
        }
    }

    #[test]
    fn over_allocated_bits_can_not_be_seen_taken_or_freed() {
        for count in COUNTS {
            let mut gsis = GsiBitmap::new(count);
            let fresh = gsis.clone();
            for gsi in [count, count + 1, (count | 63) + 1, u32::MAX].map(Gsi) {
                let out = Err(GsiError::OutOfRange { gsi, count });
                assert_eq!(gsis.allocate_at(gsi), out);
                assert_eq!(gsis.free(gsi), out);
                assert!(gsis.reserve(0..gsi.0.saturating_add(1)).is_err(), "{gsi}");
                gsis = fresh.clone();
                assert!(!gsis.is_allocated(gsi) && !gsis.is_reserved(gsi));
            }
            assert_eq!(gsis.iter().next(), None);
        }
    }

    #[test]
    fn reserving_is_all_or_nothing() {
        let mut gsis = GsiBitmap::new(100);
        gsis.allocate_at(Gsi(70)).unwrap();
        let before = gsis.clone();
        assert_eq!(gsis.reserve(60..80), Err(GsiError::AlreadyAllocated(Gsi(70))));
        let out = GsiError::OutOfRange { gsi: Gsi(100), count: 100 };
        assert_eq!(gsis.reserve(90..101), Err(out));
        assert_eq!(gsis, before);
        gsis.reserve(0..24).unwrap();
        gsis.reserve(10..30).unwrap();
        assert_eq!(gsis.available(), 100 - 30 - 1);
        assert_eq!(gsis.allocate(), Ok(Gsi(30)));
    }

    #[test]
    fn errors_say_which_gsi_and_what_the_range_is() {
        let error = GsiBitmap::new(4096).free(Gsi(5000)).unwrap_err();
        assert_eq!(error.to_string(), "GSI 5000 is out of range: this VM has GSIs 0 to 4095");
    }

    #[derive(Debug, Clone)]
    enum Op {
        Allocate,
        AllocateAt(u32),
        Reserve(u32, u32),
        Free(u32),
    }

    fn ops(count: u32) -> impl Strategy<Value = Vec<Op>> {
        let gsi = 0..count + 70;
        let op = prop_oneof![
            6 => Just(Op::Allocate),
            2 => gsi.clone().prop_map(Op::AllocateAt),
            1 => (gsi.clone(), 0..40_u32).prop_map(|(start, len)| Op::Reserve(start, len)),
            4 => gsi.prop_map(Op::Free),
        ];
        prop::collection::vec(op, 0..200)
    }

    /// What a bitmap should answer, from two sets.
    #[derive(Default)]
    struct Model {
        count: u32,
        allocated: BTreeSet<u32>,
        reserved: BTreeSet<u32>,
    }

    impl Model {
        fn apply(&mut self, op: &Op) -> Result<Option<Gsi>, GsiError> {
            let count = self.count;
            let in_range = |gsi| match gsi < count {
                true => Ok(()),
                false => Err(GsiError::OutOfRange { gsi: Gsi(gsi), count }),
            };
            match *op {
                Op::Allocate => {
                    let taken =
                        |gsi: &u32| self.allocated.contains(gsi) || self.reserved.contains(gsi);
                    let gsi = (0..count).find(|gsi| !taken(gsi));
                    let gsi = gsi.ok_or(GsiError::Exhausted { count })?;
                    self.allocated.insert(gsi);
                    Ok(Some(Gsi(gsi)))
                }
                Op::AllocateAt(gsi) => {
                    in_range(gsi)?;
                    if self.reserved.contains(&gsi) {
                        return Err(GsiError::Reserved(Gsi(gsi)));
                    }
                    match self.allocated.insert(gsi) {
                        true => Ok(None),
                        false => Err(GsiError::AlreadyAllocated(Gsi(gsi))),
                    }
                }
                Op::Reserve(start, len) => {
                    if len > 0 {
                        in_range(start + len - 1)?;
                    }
                    if let Some(&gsi) = self.allocated.range(start..start + len).next() {
                        return Err(GsiError::AlreadyAllocated(Gsi(gsi)));
                    }
                    self.reserved.extend(start..start + len);
                    Ok(None)
                }
                Op::Free(gsi) => {
                    in_range(gsi)?;
                    if self.reserved.contains(&gsi) {
                        return Err(GsiError::Reserved(Gsi(gsi)));
                    }
                    match self.allocated.remove(&gsi) {
                        true => Ok(None),
                        false => Err(GsiError::NotAllocated(Gsi(gsi))),
                    }
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
        #[test]
        fn answers_as_two_plain_sets_do(
            (count, ops) in prop::sample::select(&COUNTS[..10]).prop_flat_map(|c| (Just(c), ops(c)))
        ) {
            let mut gsis = GsiBitmap::new(count);
            let mut model = Model { count, ..Model::default() };
            for op in &ops {
                let got = match *op {
                    Op::Allocate => gsis.allocate().map(Some),
                    Op::AllocateAt(gsi) => gsis.allocate_at(Gsi(gsi)).map(|()| None),
                    Op::Reserve(start, len) => gsis.reserve(start..start + len).map(|()| None),
                    Op::Free(gsi) => gsis.free(Gsi(gsi)).map(|()| None),
                };
                prop_assert_eq!(got, model.apply(op), "{:?}", op);
                prop_assert_eq!(gsis.len() as usize, model.allocated.len());
                let free = count as usize - model.allocated.len() - model.reserved.len();
                prop_assert_eq!(gsis.available() as usize, free);
            }
            let allocated: Vec<u32> = gsis.iter().map(|gsi| gsi.0).collect();
            prop_assert_eq!(allocated, model.allocated.iter().copied().collect::<Vec<_>>());
            for gsi in 0..count + 70 {
                prop_assert_eq!(gsis.is_reserved(Gsi(gsi)), model.reserved.contains(&gsi));
                prop_assert_eq!(gsis.is_allocated(Gsi(gsi)), model.allocated.contains(&gsi));
            }
        }
    }
}
