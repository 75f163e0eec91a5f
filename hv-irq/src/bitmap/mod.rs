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
    /// Fewer are free than were asked for.
    #[error("{asked} GSIs are needed and {available} of {count} are free")]
    TooFew {
        /// How many were asked for.
        asked: u32,
        /// How many are free.
        available: u32,
        /// How many there are.
        count: u32,
    },
    /// Enough are free, but not that many in a row.
    #[error("{asked} GSIs in a row are needed, and no {asked} of the {available} free ones are")]
    NoRun {
        /// How many were asked for.
        asked: u32,
        /// How many are free.
        available: u32,
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

    /// Takes the `n` lowest free GSIs, wherever they are.
    ///
    /// # Errors
    /// [`GsiError::TooFew`]; none is taken then.
    pub fn allocate_many(&mut self, n: u32) -> Result<Vec<Gsi>, GsiError> {
        self.check_available(n)?;
        let gsis = std::iter::from_fn(|| self.allocate().ok());
        Ok(gsis.take(n as usize).collect())
    }

    /// Takes the lowest `n` free GSIs that follow each other, and says which: for what derives
    /// the others from the first.
    ///
    /// # Errors
    /// [`GsiError::TooFew`] or [`GsiError::NoRun`]; none is taken then.
    pub fn allocate_run(&mut self, n: u32) -> Result<Range<u32>, GsiError> {
        self.check_available(n)?;
        if n == 0 {
            return Ok(0..0);
        }
        let no_run = GsiError::NoRun { asked: n, available: self.available() };
        let mut end = 0;
        loop {
            let start = first_zero_from(&self.taken, end).ok_or(no_run)?;
            // Over-allocated bits are set: where there are any, no run reaches beyond `count`.
            end = first_one_from(&self.taken, start).unwrap_or(self.count);
            if end - start >= n {
                let run = start..start + n;
                for gsi in run.clone().map(Gsi) {
                    self.set(gsi);
                }
                self.allocated += n;
                return Ok(run);
            }
        }
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

    fn check_available(&self, asked: u32) -> Result<(), GsiError> {
        let (available, count) = (self.available(), self.count);
        if asked <= available { Ok(()) } else { Err(GsiError::TooFew { asked, available, count }) }
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

/// The first bit from `from` on that is not set.
fn first_zero_from(words: &[u64], from: u32) -> Option<u32> {
    let (first, low) = (from / BITS, (1 << (from % BITS)) - 1);
    let mut words = (first..).zip(words.iter().skip(first as usize));
    let (index, word) = words.find_map(|(index, &word)| {
        let seen = if index == first { low } else { 0 };
        (word | seen != u64::MAX).then_some((index, word | seen))
    })?;
    Some(index * BITS + word.trailing_ones())
}

/// The first bit from `from` on that is set.
fn first_one_from(words: &[u64], from: u32) -> Option<u32> {
    let (first, low) = (from / BITS, (1 << (from % BITS)) - 1);
    let mut words = (first..).zip(words.iter().skip(first as usize));
    words.find_map(|(index, &word)| {
        let unseen = if index == first { word & !low } else { word };
        (unseen != 0).then(|| index * BITS + unseen.trailing_zeros())
    })
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
mod tests;
