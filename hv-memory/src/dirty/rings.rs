//! The dirty rings of the vCPUs: where each is read next, and what was read and not yet reset.
//!
//! Which page of the guest an entry names is known only as long as its slot is where it was, so rings
//! are read before a slot changes, and what came meanwhile right after.

use std::collections::BTreeMap;
use std::sync::Arc;

use hv_core::{DirtyPage, DirtyRing, Errno, Error, Ioctl, MemoryBackend};

/// How often KVM may be interrupted while it resets rings, before that is an error.
const INTERRUPTIONS: u32 = 16;

/// The rings of the vCPUs, by id.
#[derive(Debug, Default)]
pub(super) struct Rings {
    rings: BTreeMap<u32, Ring>,
    /// Entries that were collected and not reset.
    collected: u64,
}

#[derive(Debug)]
struct Ring {
    ring: Arc<dyn DirtyRing>,
    next: usize,
    /// Pages that were taken from it, and how many these were when its vCPU last stopped.
    taken: u64,
    at_stop: u64,
}

impl Rings {
    /// A vCPU's ring. That it was there already makes no difference: it has one place to be read from.
    pub(super) fn add(&mut self, vcpu: u32, ring: Arc<dyn DirtyRing>) {
        self.rings.entry(vcpu).or_insert(Ring { ring, next: 0, taken: 0, at_stop: 0 });
    }

    pub(super) fn has(&self, vcpu: u32) -> bool {
        self.rings.contains_key(&vcpu)
    }

    /// Takes all pages the vCPUs have told of.
    pub(super) fn collect(&mut self, mut take: impl FnMut(DirtyPage)) {
        for Ring { ring, next, taken, .. } in self.rings.values_mut() {
            let entries = ring.entries();
            // KVM does not go round before the entries are reset.
            for _ in 0..entries.len() {
                let Some(entry) = entries.get(*next) else { break };
                let Some(page) = entry.dirty() else { break };
                take(page);
                entry.collect();
                self.collected += 1;
                *taken += 1;
                *next = if *next + 1 == entries.len() { 0 } else { *next + 1 };
            }
        }
    }

    /// A vCPU stopped because its ring is full, and all rings were collected since. Whether that made
    /// room: whoever took what was in it, something has to have been.
    pub(super) fn made_room(&mut self, vcpu: u32) -> bool {
        self.rings.get_mut(&vcpu).is_some_and(|ring| {
            let before = std::mem::replace(&mut ring.at_stop, ring.taken);
            ring.taken != before
        })
    }

    /// Lets KVM watch the pages again that were collected. What is in them is to be read after this.
    pub(super) fn reset<M: MemoryBackend>(&mut self, vm: &M) -> Result<(), Error> {
        let mut interruptions = 0;
        while self.collected > 0 {
            match vm.reset_dirty_rings()? {
                0 if interruptions == INTERRUPTIONS => {
                    return Err(Error::new(Ioctl::ResetDirtyRings, Errno::EINTR));
                }
                0 => interruptions += 1,
                reset => self.collected = self.collected.saturating_sub(reset.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::mock::MockVm;
    use hv_core::{DirtyGfn, SlotId};

    #[derive(Debug)]
    struct Entries(Vec<DirtyGfn>);

    impl DirtyRing for Entries {
        fn entries(&self) -> &[DirtyGfn] {
            &self.0
        }
    }

    fn ring(entries: usize) -> Arc<Entries> {
        Arc::new(Entries((0..entries).map(|_| DirtyGfn::default()).collect()))
    }

    fn page(page: u64) -> DirtyPage {
        DirtyPage { slot: SlotId(3), page }
    }

    fn collected(rings: &mut Rings) -> Vec<u64> {
        let mut pages = Vec::new();
        rings.collect(|page| pages.push(page.page));
        pages
    }

    #[test]
    fn a_ring_is_read_round_and_round_by_one_reader() {
        let (ring, mut rings) = (ring(4), Rings::default());
        rings.add(7, ring.clone());
        rings.add(7, ring.clone());
        assert!(rings.has(7) && !rings.has(0));
        for n in 0..50 {
            let entries = [2 * n % 4, (2 * n + 1) % 4].map(|n| &ring.0[n as usize]);
            assert!(entries[0].publish(page(2 * n)) && entries[1].publish(page(2 * n + 1)));
            assert_eq!(collected(&mut rings), [2 * n, 2 * n + 1]);
            assert_eq!(collected(&mut rings), [0; 0]);
            assert!(entries.into_iter().all(|entry| entry.reset().is_some()));
        }
    }

    #[test]
    fn a_full_ring_and_one_without_entries_end() {
        let (full, mut rings) = (ring(4), Rings::default());
        full.0.iter().zip(0..).for_each(|(entry, n)| assert!(entry.publish(page(n))));
        rings.add(0, ring(0));
        rings.add(1, full);
        assert_eq!(collected(&mut rings), [0, 1, 2, 3]);
        assert_eq!(collected(&mut rings), [0; 0]);
    }

    #[test]
    fn a_ring_that_is_full_of_nothing_is_found_out() {
        let (full, mut rings) = (ring(4), Rings::default());
        rings.add(0, full.clone());
        assert!(full.0[0].publish(page(0)) && !rings.made_room(1));
        collected(&mut rings);
        assert!(rings.made_room(0));
        collected(&mut rings);
        assert!(!rings.made_room(0), "nothing came since");
        assert!(full.0[1].publish(page(1)));
        collected(&mut rings);
        collected(&mut rings);
        assert!(rings.made_room(0), "whoever took it");
    }

    #[test]
    fn resetting_goes_on_until_all_is_reset_but_not_for_ever() {
        let with = |answers: Vec<u32>| {
            let mut vm = MockVm::new();
            let calls = answers.len();
            let mut answers = answers.into_iter();
            vm.expect_reset_dirty_rings()
                .times(calls)
                .returning(move || Ok(answers.next().unwrap()));
            vm.expect_drop().return_const(());
            vm
        };
        let mut rings = Rings::default();
        rings.reset(&with(vec![])).unwrap();
        rings.collected = 5;
        rings.reset(&with(vec![2, 0, 0, 1, 2])).unwrap();
        rings.collected = 1;
        let error = rings.reset(&with(vec![0; 17])).unwrap_err();
        assert_eq!((error.call, error.errno), (Ioctl::ResetDirtyRings.into(), Errno::EINTR));
        rings.reset(&with(vec![1])).unwrap();
        rings.reset(&with(vec![])).unwrap();
    }
}
