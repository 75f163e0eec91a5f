//! The bitmap against plain sets.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// The last ones need two summary words, and all of a word of them.
const COUNTS: [u32; 14] =
    [0, 1, 31, 32, 33, 63, 64, 65, 127, 1024, 4096, 4097, 8192, 3 * 64 * 64 + 5];

#[test]
fn gives_out_exactly_its_count_whatever_the_count() {
    for count in COUNTS {
        let mut gsis = GsiBitmap::new(count);
        let given: Vec<u32> = std::iter::from_fn(|| gsis.allocate().ok().map(|g| g.0)).collect();
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
fn a_run_is_the_lowest_that_fits_and_may_cross_words() {
    let mut gsis = GsiBitmap::new(200);
    gsis.reserve(0..24).unwrap();
    gsis.allocate_at(Gsi(60)).unwrap();
    assert_eq!(gsis.allocate_run(36), Ok(24..60));
    assert_eq!(gsis.allocate_run(100), Ok(61..161), "over two word boundaries");
    let before = gsis.clone();
    assert_eq!(
        gsis.allocate_run(40),
        Err(GsiError::TooFew { asked: 40, available: 39, count: 200 })
    );
    gsis.free(Gsi(30)).unwrap();
    assert_eq!(gsis.allocate_run(40), Err(GsiError::NoRun { asked: 40, available: 40 }));
    assert_eq!(gsis.allocate_run(39), Ok(161..200), "up to the last one");
    assert_eq!(gsis.allocate_run(0), Ok(0..0));
    assert_eq!(gsis.allocate_many(1), Ok(vec![Gsi(30)]));
    for gsi in 161..200 {
        gsis.free(Gsi(gsi)).unwrap();
    }
    assert_eq!(gsis, before);
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
    AllocateMany(u32),
    AllocateRun(u32),
    Reserve(u32, u32),
    Free(u32),
}

fn ops(count: u32) -> impl Strategy<Value = Vec<Op>> {
    let gsi = 0..count + 70;
    let size = prop_oneof![4 => 0..9_u32, 2 => 60..70_u32, 1 => 0..count + 2];
    let op = prop_oneof![
        6 => Just(Op::Allocate),
        2 => gsi.clone().prop_map(Op::AllocateAt),
        2 => size.clone().prop_map(Op::AllocateMany),
        2 => size.prop_map(Op::AllocateRun),
        1 => (gsi.clone(), 0..40_u32).prop_map(|(start, len)| Op::Reserve(start, len)),
        4 => gsi.prop_map(Op::Free),
    ];
    prop::collection::vec(op, 0..200)
}

/// What a bitmap should answer, from three sets.
struct Model {
    count: u32,
    free: BTreeSet<u32>,
    allocated: BTreeSet<u32>,
    reserved: BTreeSet<u32>,
}

impl Model {
    fn new(count: u32) -> Self {
        let (allocated, reserved) = Default::default();
        Self { count, free: (0..count).collect(), allocated, reserved }
    }

    fn take(&mut self, gsis: Vec<u32>) -> Vec<u32> {
        for gsi in &gsis {
            assert!(self.free.remove(gsi) && self.allocated.insert(*gsi));
        }
        gsis
    }

    /// Why `gsi` can't be taken or given back, if that does not depend on whether it is taken.
    fn check(&self, gsi: u32) -> Result<(), GsiError> {
        if gsi >= self.count {
            return Err(GsiError::OutOfRange { gsi: Gsi(gsi), count: self.count });
        }
        if self.reserved.contains(&gsi) { Err(GsiError::Reserved(Gsi(gsi))) } else { Ok(()) }
    }

    fn check_available(&self, asked: u32) -> Result<u32, GsiError> {
        let (available, count) = (self.free.len() as u32, self.count);
        if asked > available {
            return Err(GsiError::TooFew { asked, available, count });
        }
        Ok(available)
    }

    /// The GSIs that are taken; none if they are those that were asked for.
    fn apply(&mut self, op: &Op) -> Result<Vec<u32>, GsiError> {
        match *op {
            Op::Allocate => {
                let lowest = self.free.first().copied();
                let gsi = lowest.ok_or(GsiError::Exhausted { count: self.count })?;
                Ok(self.take(vec![gsi]))
            }
            Op::AllocateMany(n) => {
                self.check_available(n)?;
                let lowest = self.free.iter().copied().take(n as usize).collect();
                Ok(self.take(lowest))
            }
            Op::AllocateRun(n) => {
                let available = self.check_available(n)?;
                let Some(span) = n.checked_sub(1) else { return Ok(vec![]) };
                let free: Vec<u32> = self.free.iter().copied().collect();
                let run = free.windows(n as usize).find(|run| run[span as usize] - run[0] == span);
                let run = run.ok_or(GsiError::NoRun { asked: n, available })?;
                Ok(self.take(run.to_vec()))
            }
            Op::AllocateAt(gsi) => {
                self.check(gsi)?;
                if self.allocated.contains(&gsi) {
                    return Err(GsiError::AlreadyAllocated(Gsi(gsi)));
                }
                self.take(vec![gsi]);
                Ok(vec![])
            }
            Op::Reserve(start, len) => {
                if let Some(last) = len.checked_sub(1) {
                    match self.check(start + last) {
                        Ok(()) | Err(GsiError::Reserved(_)) => {}
                        Err(error) => return Err(error),
                    }
                }
                if let Some(&gsi) = self.allocated.range(start..start + len).next() {
                    return Err(GsiError::AlreadyAllocated(Gsi(gsi)));
                }
                self.free.retain(|gsi| !(start..start + len).contains(gsi));
                self.reserved.extend(start..start + len);
                Ok(vec![])
            }
            Op::Free(gsi) => {
                self.check(gsi)?;
                if !self.allocated.remove(&gsi) {
                    return Err(GsiError::NotAllocated(Gsi(gsi)));
                }
                self.free.insert(gsi);
                Ok(vec![])
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn answers_as_plain_sets_do(
        (count, ops) in prop::sample::select(&COUNTS).prop_flat_map(|c| (Just(c), ops(c)))
    ) {
        let mut gsis = GsiBitmap::new(count);
        let mut model = Model::new(count);
        for op in &ops {
            let numbers = |gsis: Vec<Gsi>| gsis.into_iter().map(|gsi| gsi.0).collect();
            let got: Result<Vec<u32>, GsiError> = match *op {
                Op::Allocate => gsis.allocate().map(|gsi| vec![gsi.0]),
                Op::AllocateAt(gsi) => gsis.allocate_at(Gsi(gsi)).map(|()| vec![]),
                Op::AllocateMany(n) => gsis.allocate_many(n).map(numbers),
                Op::AllocateRun(n) => gsis.allocate_run(n).map(Iterator::collect),
                Op::Reserve(start, len) => gsis.reserve(start..start + len).map(|()| vec![]),
                Op::Free(gsi) => gsis.free(Gsi(gsi)).map(|()| vec![]),
            };
            prop_assert_eq!(got, model.apply(op), "{:?}", op);
            prop_assert_eq!(gsis.len() as usize, model.allocated.len());
            prop_assert_eq!(gsis.available() as usize, model.free.len());
        }
        let allocated: Vec<u32> = gsis.iter().map(|gsi| gsi.0).collect();
        prop_assert_eq!(allocated, model.allocated.iter().copied().collect::<Vec<_>>());
        for gsi in 0..count + 70 {
            prop_assert_eq!(gsis.is_reserved(Gsi(gsi)), model.reserved.contains(&gsi));
            prop_assert_eq!(gsis.is_allocated(Gsi(gsi)), model.allocated.contains(&gsi));
        }
    }
}
