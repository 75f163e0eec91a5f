//! What the interrupts of a device with message-signalled interrupts have to be, whatever a guest
//! does to it: a model of a few lines, and random sequences against it.

use hv_irq::{LegacyPins, MsiVectors};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::{Counted, Host, Machine, NOBODY, Taken, VCPUS, msi};

const VECTORS: usize = 5;
const CASES: u32 = 24;
const STEPS: usize = 50;

/// How long a failing sequence is made shorter, in milliseconds: a lost interrupt is waited for each
/// time.
const SHRINKING: u32 = 60_000;

/// What a device, its driver or a monitor does.
#[derive(Debug, Clone, Copy)]
enum Step {
    Signal(usize),
    Mask(usize),
    Unmask(usize),
    /// To the vCPU with this APIC id, with the first or second vector number of this one.
    Retarget(usize, u32, bool),
    Enable,
    Disable,
    MaskAll,
    UnmaskAll,
}

/// The specification: an event waits while its vector is held back, and is delivered once, to where
/// the message of that time leads.
#[derive(Debug)]
struct Model {
    enabled: bool,
    all_masked: bool,
    vectors: [Vector; VECTORS],
}

#[derive(Debug, Clone, Copy)]
struct Vector {
    target: Taken,
    masked: bool,
    pending: bool,
}

/// The two vector numbers of a vector: no two share one, since a local APIC would merge them.
fn number(index: usize, second: bool) -> u8 {
    (if second { 0x60 } else { 0x40 }) + index as u8
}

impl Model {
    fn new() -> Self {
        let vector = |i| Vector { target: (0, number(i, false)), masked: true, pending: false };
        let vectors = std::array::from_fn(vector);
        Self { enabled: false, all_masked: false, vectors }
    }

    /// The interrupts that come of it.
    fn step(&mut self, step: Step) -> Vec<Taken> {
        match step {
            Step::Signal(i) => self.vectors[i].pending = true,
            Step::Mask(i) => self.vectors[i].masked = true,
            Step::Unmask(i) => self.vectors[i].masked = false,
            Step::Retarget(i, vcpu, second) => self.vectors[i].target = (vcpu, number(i, second)),
            Step::Enable => self.enabled = true,
            Step::Disable => self.enabled = false,
            Step::MaskAll => self.all_masked = true,
            Step::UnmaskAll => self.all_masked = false,
        }
        if !self.enabled || self.all_masked {
            return Vec::new();
        }
        let live = self.vectors.iter_mut().filter(|vector| vector.pending && !vector.masked);
        let mut come = Vec::new();
        for vector in live {
            vector.pending = false;
            come.push(vector.target);
        }
        come.retain(|(vcpu, _)| *vcpu < VCPUS);
        come
    }
}

fn apply<H: Host>(step: Step, device: &mut MsiVectors<Counted<H>>) {
    let done = match step {
        Step::Signal(i) => {
            device.event(i).unwrap().signal();
            Ok(())
        }
        Step::Mask(i) => device.mask(i),
        Step::Unmask(i) => device.unmask(i),
        Step::Retarget(i, vcpu, second) => device.retarget(i, msi(vcpu, number(i, second))),
        Step::Enable => device.enable(),
        Step::Disable => device.disable(),
        Step::MaskAll => device.change(|change| {
            change.mask_all();
            Ok(())
        }),
        Step::UnmaskAll => device.change(|change| {
            change.unmask_all();
            Ok(())
        }),
    };
    done.unwrap();
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vector = || 0..VECTORS;
    let apic = || prop_oneof![9 => 0..VCPUS, 1 => Just(NOBODY)];
    let step = prop_oneof![
        8 => vector().prop_map(Step::Signal),
        3 => vector().prop_map(Step::Mask),
        5 => vector().prop_map(Step::Unmask),
        4 => (vector(), apic(), any::<bool>()).prop_map(|(i, a, s)| Step::Retarget(i, a, s)),
        2 => Just(Step::Enable),
        1 => Just(Step::Disable),
        1 => Just(Step::MaskAll),
        1 => Just(Step::UnmaskAll),
    ];
    prop::collection::vec(step, 1..STEPS)
}

/// Runs a sequence on a new machine; the device is set up as its driver would, all vectors masked.
fn run<H: Host>(host: &H, pins: LegacyPins, steps: &[Step]) -> usize {
    let mut machine = Machine::new(host, pins);
    let router = machine.router();
    let start = (router.save(), machine.tables());
    let mut device = MsiVectors::new(&router, machine.events(VECTORS));
    device
        .change(|change| {
            change.enable();
            (0..VECTORS).try_for_each(|i| change.retarget(i, msi(0, number(i, false))))
        })
        .unwrap();
    assert_eq!(machine.tables(), start.1, "masked vectors need no routes");
    let (mut model, mut interrupts) = (Model::new(), 0);
    for step in [Step::Enable].iter().chain(steps) {
        let expected = model.step(*step);
        interrupts += expected.len();
        apply::<H>(*step, &mut device);
        machine.expect(expected, &format!("{pins:?}, {step:?}"));
        for (i, vector) in model.vectors.iter().enumerate() {
            assert_eq!(device.is_pending(i), Ok(vector.pending), "vector {i} after {step:?}");
        }
    }
    let events: Vec<_> = (0..VECTORS).map(|i| device.event(i).unwrap().clone()).collect();
    drop(device);
    machine.expect([], "without the device");
    assert_eq!(router.save(), start.0);
    host.assert_unbound(machine.vm.inner(), &events);
    interrupts
}

pub(crate) fn what_a_guest_does_to_its_device_has_the_interrupts_of_the_model<H: Host>(host: &H) {
    let config = Config {
        cases: CASES,
        max_shrink_time: SHRINKING,
        failure_persistence: None,
        ..Config::default()
    };
    let interrupts = std::cell::Cell::new(0);
    let split = prop_oneof![Just(LegacyPins::Kernel), Just(LegacyPins::Userspace)];
    let result = TestRunner::new(config).run(&(split, steps()), |(pins, steps)| {
        interrupts.set(interrupts.get() + run(host, pins, &steps));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(interrupts.get() > 0, "the sequences must interrupt now and then");
}
