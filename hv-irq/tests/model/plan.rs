//! What may happen to a router: operations, and the calls that fail while they are carried out.

use hv_core::Errno;
use hv_core::init::MsiMode;
use hv_core::layer::Faults;
use hv_irq::LegacyPins;
use proptest::prelude::*;
use std::num::NonZeroU32;

/// A machine to begin with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) pins: LegacyPins,
    /// GSIs, and entries of the table.
    pub(crate) limit: u32,
    pub(crate) msi: MsiMode,
    pub(crate) x2apic: bool,
}

pub(crate) fn setups() -> impl Strategy<Value = Setup> {
    let limit = prop_oneof![Just(44), Just(64), Just(4096)];
    (any::<bool>(), limit, any::<bool>(), any::<bool>()).prop_map(
        |(split, limit, direct, x2apic)| {
            let pins = if split { LegacyPins::Userspace } else { LegacyPins::Kernel };
            // A KVM without KVM_SIGNAL_MSI has no split irqchip.
            let msi = if direct || split { MsiMode::Direct } else { MsiMode::DynamicRoutes };
            Setup { pins, limit, msi, x2apic }
        },
    )
}

/// A message: to which vCPU, and whether its address is one no device would use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct To {
    pub(crate) vcpu: u8,
    pub(crate) garbage: bool,
}

/// Part of a batch.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Add {
        count: usize,
        bound: bool,
    },
    Retarget(usize, To),
    Bind(usize),
    /// Binds the eventfd of the second to the first.
    BindTaken(usize, usize),
    /// Binds another eventfd to one that is bound.
    BindSecond(usize),
    Unbind(usize),
    Remove(usize),
}

/// Part of a change of vectors.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sub {
    Enable,
    Disable,
    MaskAll,
    UnmaskAll,
    Mask(usize),
    Unmask(usize),
    Retarget(usize, To),
    OutOfRange,
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    // Single routes.
    Batch(Vec<Step>),
    SignalRoute(usize),
    DropRoute(usize),
    // Vectors of devices.
    Plug(usize),
    Change(usize, Vec<Sub>),
    SignalVector(usize, usize),
    Unplug(usize),
    /// A message without a route.
    Message {
        vcpu: u8,
        which: u8,
    },
    // Lines.
    BindPin(u32),
    SignalPin(usize),
    DropPin(usize),
    BindLevel(u8),
    Raise(usize),
    DropLevel(usize),
    // The I/O APIC in user space.
    WriteEntry {
        pin: u8,
        entry: WrittenEntry,
        upper: bool,
    },
    Line(u8, bool),
    /// The exit that tells of an end.
    End,
    // The whole router.
    Restore,
    Rebuild,
}

/// What a guest may write to a redirection entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WrittenEntry {
    pub(crate) vcpu: u8,
    pub(crate) vector: u8,
    pub(crate) level: bool,
    pub(crate) masked: bool,
}

/// Calls that fail during an operation.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// The one before which there were so many.
    Nth(u64, Errno),
    /// One in so many.
    Scattered(u64, NonZeroU32),
}

impl Fault {
    pub(crate) fn faults(self) -> Faults {
        match self {
            Fault::Nth(n, errno) => Faults::nth(n, errno),
            Fault::Scattered(seed, one_in) => Faults::seeded(seed, one_in),
        }
    }

    /// Whether undoing can fail, too.
    pub(crate) fn may_repeat(self) -> bool {
        matches!(self, Fault::Scattered(..))
    }
}

pub(crate) type Plan = Vec<(Op, Option<Fault>)>;

/// How many calls fail.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Failing {
    None,
    One,
    Several,
}

/// Pins of the I/O APIC in user space that are used.
pub(crate) const USER_PINS: [u8; 3] = [4, 9, 20];

fn to() -> impl Strategy<Value = To> {
    (0..2_u8, prop::bool::weighted(0.1)).prop_map(|(vcpu, garbage)| To { vcpu, garbage })
}

fn step() -> impl Strategy<Value = Step> {
    let i = any::<usize>();
    prop_oneof![
        3 => (1..5_usize, any::<bool>()).prop_map(|(count, bound)| Step::Add { count, bound }),
        3 => (i, to()).prop_map(|(i, to)| Step::Retarget(i, to)),
        4 => i.prop_map(Step::Bind),
        1 => (i, i).prop_map(|(i, of)| Step::BindTaken(i, of)),
        1 => i.prop_map(Step::BindSecond),
        4 => i.prop_map(Step::Unbind),
        2 => i.prop_map(Step::Remove),
    ]
}

fn sub() -> impl Strategy<Value = Sub> {
    let i = any::<usize>();
    prop_oneof![
        6 => Just(Sub::Enable),
        1 => Just(Sub::Disable),
        1 => Just(Sub::MaskAll),
        2 => Just(Sub::UnmaskAll),
        4 => i.prop_map(Sub::Mask),
        8 => i.prop_map(Sub::Unmask),
        6 => (i, to()).prop_map(|(i, to)| Sub::Retarget(i, to)),
        1 => Just(Sub::OutOfRange),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let (i, pin) = (any::<usize>(), prop::sample::select(&USER_PINS[..]));
    let entry = (0..2_u8, 0..3_u8, any::<bool>(), any::<bool>());
    let entry = entry.prop_map(|(vcpu, vector, level, masked)| WrittenEntry {
        vcpu,
        vector,
        level,
        masked,
    });
    let routes = prop_oneof![
        6 => prop::collection::vec(step(), 0..6).prop_map(Op::Batch),
        4 => i.prop_map(Op::SignalRoute),
        2 => i.prop_map(Op::DropRoute),
    ];
    // Drivers enable what they use, most of the time.
    let change = (i, prop::bool::weighted(0.6), prop::collection::vec(sub(), 0..8));
    let change = change.prop_map(|(i, enable, mut subs)| {
        if enable {
            subs.splice(0..0, [Sub::Enable, Sub::UnmaskAll, Sub::Unmask(i / 7)]);
        }
        Op::Change(i, subs)
    });
    let vectors = prop_oneof![
        2 => (1..9_usize).prop_map(Op::Plug),
        9 => change,
        8 => (i, i).prop_map(|(i, vector)| Op::SignalVector(i, vector)),
        1 => i.prop_map(Op::Unplug),
        2 => (0..2_u8, 0..12_u8).prop_map(|(vcpu, which)| Op::Message { vcpu, which }),
    ];
    let lines = prop_oneof![
        2 => (0..26_u32).prop_map(Op::BindPin),
        3 => i.prop_map(Op::SignalPin),
        1 => i.prop_map(Op::DropPin),
        2 => (20..25_u8).prop_map(Op::BindLevel),
        3 => i.prop_map(Op::Raise),
        1 => i.prop_map(Op::DropLevel),
    ];
    let ioapic = prop_oneof![
        6 => (pin.clone(), entry, any::<bool>())
            .prop_map(|(pin, entry, upper)| Op::WriteEntry { pin, entry, upper }),
        3 => (pin, any::<bool>()).prop_map(|(pin, level)| Op::Line(pin, level)),
        3 => Just(Op::End),
    ];
    let whole = prop_oneof![Just(Op::Restore), Just(Op::Rebuild)];
    prop_oneof![6 => routes, 8 => vectors, 4 => lines, 5 => ioapic, 1 => whole]
}

/// Sequences of operations.
pub(crate) fn plans(failing: Failing) -> impl Strategy<Value = Plan> {
    let errno = prop::sample::select(&[Errno::ENOMEM, Errno::EINVAL, Errno::EIO][..]);
    let nth = (0..8_u64, errno).prop_map(|(n, errno)| Fault::Nth(n, errno));
    let scattered = (any::<u64>(), 1..4_u32)
        .prop_map(|(seed, one_in)| Fault::Scattered(seed, NonZeroU32::new(one_in).unwrap()));
    let fault = match failing {
        Failing::None => Just(None).boxed(),
        Failing::One => prop_oneof![3 => Just(None), 1 => nth.prop_map(Some)].boxed(),
        Failing::Several => prop_oneof![3 => Just(None), 1 => scattered.prop_map(Some)].boxed(),
    };
    prop::collection::vec((op(), fault), 0..40)
}
