//! The same random steps done to the KVM in memory and to `/dev/kvm`.

mod generate;
mod in_memory;
mod op;
mod state;
mod world;

use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

pub(crate) use self::generate::{Profile, Random, steps};
use self::in_memory::InMemory;
use self::op::Op;
use self::world::World;
use crate::conformance::DevKvm;

/// Where the two part.
struct Difference {
    /// The step after which they differ.
    step: usize,
    /// How, for a person.
    how: String,
}

/// The two.
pub(crate) struct Pair {
    kvm: DevKvm,
    fake: InMemory,
}

impl Pair {
    pub(crate) fn open() -> Self {
        Self { kvm: DevKvm::open(), fake: InMemory::default() }
    }

    /// Does the steps to both, up to the first difference.
    fn run(&self, steps: &[Op]) -> Option<Difference> {
        let (mut kvm, mut fake) = (World::new(&self.kvm), World::new(&self.fake));
        for (step, op) in steps.iter().enumerate() {
            let (real, told) = (kvm.apply(op), fake.apply(op));
            if real != told {
                let how = format!("KVM answers {real}\nthe fake    {told}");
                return Some(Difference { step, how });
            }
            if real == world::STORM {
                return None;
            }
            let mut how = different(&mut kvm, &mut fake);
            if !how.is_empty() {
                // Should one of KVM's workers not have come to it yet.
                thread::sleep(Duration::from_millis(20));
                how = different(&mut kvm, &mut fake);
            }
            if !how.is_empty() {
                return Some(Difference { step, how });
            }
        }
        None
    }

    /// The steps that make a difference, as few as are easily found, and the difference; or none.
    pub(crate) fn compare(&self, mut steps: Vec<Op>) -> Option<String> {
        let mut found = self.run(&steps)?;
        steps.truncate(found.step + 1);
        let mut size = steps.len() / 2;
        while size > 0 {
            let mut at = 0;
            while at + size < steps.len() {
                let mut fewer = steps.clone();
                fewer.drain(at..at + size);
                match self.run(&fewer) {
                    Some(still) => {
                        fewer.truncate(still.step + 1);
                        (steps, found) = (fewer, still);
                    }
                    None => at += size,
                }
            }
            size /= 2;
        }
        let mut text = String::new();
        for op in &steps {
            writeln!(text, "  {op:x?}").unwrap();
        }
        Some(text + &found.how)
    }
}

/// The registers that differ.
fn different<P, Q>(kvm: &mut World<'_, P>, fake: &mut World<'_, Q>) -> String
where
    P: hv_core::conformance::Platform,
    Q: hv_core::conformance::Platform,
{
    let (real, told) = (kvm.state(), fake.state());
    let mut how = String::new();
    for (name, value) in real.iter().filter(|(name, value)| told.get(*name) != Some(*value)) {
        writeln!(how, "{name}: KVM has {value:#x}, the fake {:#x?}", told.get(name)).unwrap();
    }
    for name in told.keys().filter(|name| !real.contains_key(*name)) {
        writeln!(how, "{name}: KVM has none").unwrap();
    }
    how
}
