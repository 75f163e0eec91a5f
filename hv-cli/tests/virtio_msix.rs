//! The interrupts of a virtio device have to be those of a model, whatever its driver does to MSI-X and
//! to the device: from the doorbell to the local APIC, on the strict KVM in memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod virtio;

use hv_cli::virtio::{DeviceConfig, DeviceError, Session, VirtioDevice};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use virtio::*;
use vm_memory::{Bytes, GuestAddress};

const QUEUES: usize = 3;
/// One for each queue and one for the configuration.
const VECTORS: usize = QUEUES + 1;
const NO_VECTOR: u16 = 0xffff;
const BUFFER: u64 = 0x8_0000;

/// Completes requests; one that begins with a 1 changes the configuration, too.
struct Device;

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16; QUEUES]
    }
    fn config(&self) -> DeviceConfig {
        DeviceConfig::new([0])
    }
    fn queue_ready(&mut self, session: &mut Session, queue: usize) -> Result<(), DeviceError> {
        while let Some(request) = session.queue(queue)?.pop()? {
            let changes = request.read_obj::<u8>(0)? == 1;
            session.queue(queue)?.push(request, 0)?;
            if changes {
                session.change_config(0, &[1]);
            }
        }
        Ok(())
    }
}

/// What a driver does.
#[derive(Debug, Clone)]
enum Step {
    Mask(usize),
    Unmask(usize),
    /// To a vCPU, with the first or second vector number of this one.
    Retarget(usize, u32, bool),
    /// MSI-X on or off, all vectors masked or not.
    Control(bool, bool),
    /// A request in a queue, which may change the configuration.
    Request(usize, bool),
    /// Queues share vectors or have none.
    QueueVector(usize, u16),
    ConfigVector(u16),
    /// Reset, and ready again with these vectors, perhaps not yet.
    Reset([u16; QUEUES], u16, bool),
}

#[derive(Debug, Clone, Copy)]
struct Vector {
    target: (u32, u8),
    masked: bool,
    pending: bool,
}

/// The specification.
#[derive(Debug)]
struct Model {
    enabled: bool,
    all_masked: bool,
    /// Between `DRIVER_OK` and the reset.
    active: bool,
    vectors: [Vector; VECTORS],
    queues: [u16; QUEUES],
    config: u16,
    /// Interrupts sent, and those for which there was nothing to send.
    sent: u64,
    suppressed: u64,
}

/// No two vectors share a number: a local APIC would merge them.
fn number(index: usize, second: bool) -> u8 {
    (if second { 0x60 } else { 0x40 }) + index as u8
}

impl Model {
    fn new() -> Self {
        let vector = |i| Vector { target: (0, number(i, false)), masked: true, pending: false };
        Self {
            enabled: false,
            all_masked: false,
            active: false,
            vectors: std::array::from_fn(vector),
            queues: [NO_VECTOR; QUEUES],
            config: NO_VECTOR,
            sent: 0,
            suppressed: 0,
        }
    }

    fn signal(&mut self, vector: u16) {
        match self.vectors.get_mut(usize::from(vector)) {
            Some(vector) if self.enabled => {
                vector.pending = true;
                self.sent += 1;
            }
            _ => self.suppressed += 1,
        }
    }

    /// The interrupts that come of a step.
    fn step(&mut self, step: &Step) -> Vec<(u32, u8)> {
        let exists = |vector: u16| if usize::from(vector) < VECTORS { vector } else { NO_VECTOR };
        match *step {
            Step::Mask(i) => self.vectors[i].masked = true,
            Step::Unmask(i) => self.vectors[i].masked = false,
            Step::Retarget(i, vcpu, second) => self.vectors[i].target = (vcpu, number(i, second)),
            Step::Control(enabled, masked) => (self.enabled, self.all_masked) = (enabled, masked),
            Step::Request(queue, changes) if self.active => {
                if changes {
                    self.signal(self.config);
                }
                self.signal(self.queues[queue]);
            }
            Step::Request(..) => {}
            Step::QueueVector(queue, vector) => self.queues[queue] = exists(vector),
            Step::ConfigVector(vector) => self.config = exists(vector),
            Step::Reset(queues, config, active) => {
                self.vectors.iter_mut().for_each(|vector| vector.pending = false);
                (self.queues, self.config) = (queues.map(exists), exists(config));
                self.active = active;
            }
        }
        if !self.enabled || self.all_masked || !self.active {
            return Vec::new();
        }
        let live = self.vectors.iter_mut().filter(|vector| vector.pending && !vector.masked);
        let come = live.map(|vector| {
            vector.pending = false;
            vector.target
        });
        come.collect()
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let (vector, queue) = (|| 0..VECTORS, || 0..QUEUES);
    let chosen = || prop_oneof![8 => 0..VECTORS as u16, 1 => Just(NO_VECTOR), 1 => any::<u16>()];
    let step = prop_oneof![
        8 => (queue(), prop::bool::weighted(0.3)).prop_map(|(q, c)| Step::Request(q, c)),
        3 => vector().prop_map(Step::Mask),
        5 => vector().prop_map(Step::Unmask),
        4 => (vector(), 0..VCPUS, any::<bool>()).prop_map(|(i, a, s)| Step::Retarget(i, a, s)),
        2 => (prop::bool::weighted(0.7), prop::bool::weighted(0.3)).prop_map(|(e, m)| Step::Control(e, m)),
        1 => (queue(), chosen()).prop_map(|(q, v)| Step::QueueVector(q, v)),
        1 => chosen().prop_map(Step::ConfigVector),
        1 => ([chosen(), chosen(), chosen()], chosen(), prop::bool::weighted(0.8))
            .prop_map(|(q, c, active)| Step::Reset(q, c, active)),
    ];
    prop::collection::vec(step, 1..60)
}

fn apply(step: &Step, driver: &Driver<'_>, rings: &[Ring], model: &Model) {
    match *step {
        Step::Mask(i) => driver.msix_mask(i as u16, true),
        Step::Unmask(i) => driver.msix_mask(i as u16, false),
        Step::Retarget(i, vcpu, second) => {
            // As the specification wants it: masked, or an interrupt might go to half a message.
            driver.msix_message(i as u16, vcpu, number(i, second));
        }
        Step::Control(enabled, masked) => driver.msix_control(enabled, masked),
        Step::Request(queue, changes) => {
            let machine = driver.machine;
            let before = driver.counters().requests;
            machine.memory.write_obj(u8::from(changes), GuestAddress(BUFFER)).unwrap();
            if model.active {
                rings[queue].offer(0);
            }
            driver.ring(queue as u16);
            if model.active {
                driver.wait_for_requests(before + 1);
            }
        }
        Step::QueueVector(queue, vector) => driver.set_queue_vector(queue as u16, vector),
        Step::ConfigVector(vector) => driver.set_config_vector(vector),
        Step::Reset(queues, config, active) => {
            driver.reset();
            driver.negotiate(VERSION_1);
            for ((index, ring), vector) in (0..).zip(rings).zip(queues) {
                ring.clear();
                ring.descriptor(0, BUFFER, 1, 0, 0);
                driver.set_up_queue(index, ring, vector);
            }
            driver.set_config_vector(config);
            if active {
                let tables = driver.machine.tables();
                driver.driver_ok();
                assert!(driver.machine.tables() <= tables + 1, "one table a device enable");
            }
        }
    }
}

/// Runs a driver's program on a new machine; the device is found as firmware leaves it.
fn run(steps: &[Step]) -> u64 {
    let machine = Machine::new();
    let driver = machine.add(Device);
    let rings: Vec<_> =
        (0..QUEUES as u64).map(|n| Ring::new(&machine, 0x1_0000 + n * 0x1000, 16)).collect();
    // The line is nobody's here.
    driver.config_write(5, &[4]);
    for vector in 0..VECTORS {
        driver.msix_message(vector as u16, 0, number(vector, false));
    }
    let start = [Step::Control(true, false), Step::Reset([0, 1, 2], 3, true)];
    let (mut model, mut interrupts) = (Model::new(), 0);
    for step in start.iter().chain(steps) {
        let mut expected = model.step(step);
        apply(step, &driver, &rings, &model);
        // After it has told, or not told, of everything.
        driver.wait_for_signals(model.sent + model.suppressed);
        let mut got = machine.take_all();
        expected.sort_unstable();
        got.sort_unstable();
        assert_eq!(got, expected, "{step:?}");
        interrupts += got.len() as u64;
        for (index, vector) in model.vectors.iter().enumerate() {
            assert_eq!(driver.msix_pending(index as u16), vector.pending, "{index} after {step:?}");
        }
        let counters = driver.counters();
        assert_eq!((counters.interrupts, counters.suppressed), (model.sent, model.suppressed));
    }
    assert_eq!(driver.counters().needs_reset, 0, "{}", driver.failure());
    // Whatever waits then goes with the device.
    machine.end(|_| false);
    interrupts
}

#[test]
fn what_a_driver_does_has_the_interrupts_of_the_model() {
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    let interrupts = std::cell::Cell::new(0);
    let result = TestRunner::new(config).run(&steps(), |steps| {
        interrupts.set(interrupts.get() + run(&steps));
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    assert!(interrupts.get() > 0, "the programs must interrupt now and then");
}
