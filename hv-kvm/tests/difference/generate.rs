//! Random steps: mostly what makes sense, so that something happens, and some that do not.

use hv_core::{Capability, Gsi, IoAddress, IrqchipId, Msi, Route, RouteTarget};

use super::op::{Event, Op};
use super::world::{EVENTS, PAGES};

/// What a sequence is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Interrupts of a VM with PICs and I/O APIC in the kernel.
    Full,
    /// Interrupts of a VM with local APICs alone.
    Split,
    /// Slots, dirty logs, zones and ioeventfds.
    Memory,
    /// The same with dirty rings.
    Rings,
    /// What may be created when.
    Creation,
}

/// A generator of numbers (xorshift64*, seeded by splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ z >> 31) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Below `n`.
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// One sequence.
pub(crate) fn steps(profile: Profile, random: &mut Random) -> Vec<Op> {
    let mut steps = match profile {
        Profile::Full => vec![Op::CreateIrqchip],
        Profile::Split => vec![Op::EnableCap(Capability::SplitIrqchip, 24)],
        Profile::Memory => vec![Op::CreateVcpu(0)],
        // So large that no ring is ever full.
        Profile::Rings => vec![
            Op::EnableCap(Capability::DirtyLogRing, 0x8000),
            Op::CreateVcpu(0),
            Op::CreateVcpu(1),
        ],
        Profile::Creation => vec![],
    };
    if matches!(profile, Profile::Full | Profile::Split) {
        if random.one_in(3) {
            let flags = random.pick(&[0, 1, 3, 4, 5, 8]);
            steps.push(Op::EnableCap(Capability::X2apicApi, flags));
        }
        steps.extend((0..1 + random.below(VCPUS as usize) as u32).map(Op::CreateVcpu));
        steps.push(Op::SetGsiRouting(table(random, profile)));
    }
    let count = if profile == Profile::Creation { 20 } else { 60 };
    for _ in 0..count {
        match profile {
            Profile::Full | Profile::Split => interrupts(random, profile, &mut steps),
            Profile::Memory => memory(random, &mut steps),
            Profile::Rings if random.one_in(8) => steps.push(Op::TakeDirty),
            Profile::Rings => rings(random, &mut steps),
            Profile::Creation => creation(random, &mut steps),
        }
    }
    if profile != Profile::Creation {
        steps.push(Op::TakeEvents);
        steps.push(Op::TakeWrites);
    }
    if profile == Profile::Rings {
        steps.push(Op::TakeDirty);
    }
    steps
}

/// vCPUs there may be.
const VCPUS: u32 = 3;

const VECTORS: [u8; 10] = [0x20, 0x21, 0x31, 0x32, 0x41, 0x51, 0x61, 0x62, 0xf0, 0x05];

// Interrupts.

fn gsi(random: &mut Random) -> u32 {
    random.pick(&[0, 1, 1, 2, 3, 3, 4, 4, 4, 5, 8, 9, 9, 15, 16, 23, 23, 24, 24, 25, 4095, 4096])
}

/// The low word of a redirection entry, and the data of a message: vector, mode, trigger. Not SMI,
/// INIT and start-up, which take the guest elsewhere.
fn message_word(random: &mut Random) -> u32 {
    let vector = u32::from(random.pick(&VECTORS));
    let mode = random.pick(&[0u32, 0, 0, 0, 0, 1, 1, 3, 4, 7]) << 8;
    let trigger = random.pick(&[0u32, 0, 1, 3, 2]) << 14;
    vector | mode | trigger
}

fn destination(random: &mut Random) -> u32 {
    random.pick(&[0, 0, 0, 1, 1, 2, 3, 4, 5, 7, 0x11, 0x21, 0xff, 0x80])
}

fn msi(random: &mut Random) -> Msi {
    let flags = random.pick(&[0u32, 0, 0, 4, 4, 8, 12]);
    let high = if random.one_in(20) { random.pick(&[1u64 << 32, 1 << 40, 1 << 63]) } else { 0 };
    let device = random.one_in(10).then_some(7);
    let address = u64::from(0xfee0_0000 | destination(random) << 12 | flags) | high;
    Msi { address, data: message_word(random), device }
}

/// A redirection entry: delivery status, polarity, remote IRR too; masked now and then.
fn redirection(random: &mut Random) -> u64 {
    let mut entry = u64::from(message_word(random) & 0x7ff);
    entry |= u64::from(destination(random)) << 56;
    entry |= random.pick(&[0, 0, 0, 1 << 11]); // logical
    entry |= random.pick(&[0, 1 << 15]); // level
    for (bit, rarity) in [(12, 16), (13, 4), (14, 8), (16, 5)] {
        if random.one_in(rarity) {
            entry |= 1 << bit;
        }
    }
    entry
}

fn target(random: &mut Random, profile: Profile) -> RouteTarget {
    let pins = profile == Profile::Full || random.one_in(20);
    if !pins || random.one_in(3) {
        return RouteTarget::Msi(msi(random));
    }
    let chip = random.pick(&[0, 1, 2, 2, 2, 2]);
    let chip = if random.one_in(60) { 3 } else { chip };
    let pin = match chip {
        2 => random.pick(&[0, 1, 2, 3, 4, 4, 8, 9, 16, 23]),
        _ => random.pick(&[0, 1, 2, 3, 4, 5, 7]),
    };
    let pin = if random.one_in(60) { pin + 20 } else { pin };
    RouteTarget::Pin { chip: IrqchipId(chip), pin }
}

fn table(random: &mut Random, profile: Profile) -> Vec<Route> {
    let mut routes: Vec<Route> = Vec::new();
    for _ in 0..random.below(14) {
        let gsi = gsi(random);
        let gsi = if gsi == 4096 && !random.one_in(5) { 6 } else { gsi };
        // Mostly one route for a GSI, or one by each chip.
        let taken = routes.iter().any(|route| route.gsi == Gsi(gsi));
        let route = Route { gsi: Gsi(gsi), target: target(random, profile) };
        let chip = |route: &Route| match route.target {
            RouteTarget::Pin { chip, .. } => Some(chip),
            _ => None,
        };
        let other_chip = chip(&route).is_some()
            && routes
                .iter()
                .filter(|other| other.gsi == route.gsi)
                .all(|other| chip(other).is_some_and(|chip_| Some(chip_) != chip(&route)));
        if !taken || other_chip || random.one_in(15) {
            routes.push(route);
        }
    }
    routes
}

fn event(random: &mut Random) -> Event {
    Event { number: random.below(EVENTS), copy: random.one_in(4) }
}

fn vcpu(random: &mut Random) -> u32 {
    random.pick(&[0, 0, 0, 1, 1, 2])
}

fn mmio(address: u64, value: u32) -> Op {
    Op::Write { vcpu: 0, address: IoAddress::Mmio(address), data: value.to_le_bytes().into() }
}

fn port(port: u16, value: u8) -> Op {
    Op::Write { vcpu: 0, address: IoAddress::Pio(port), data: vec![value] }
}

/// A register of the local APIC and a value for it, by the guest and by the VMM alike.
fn lapic_register(random: &mut Random) -> (u16, u32) {
    match random.below(9) {
        0 => (0x80, random.pick(&[0, 0, 0x20, 0x31, 0x40, 0xff])), // task priority
        1 | 2 => (0xd0, random.pick(&[1, 2, 4, 3, 0x11, 0x21, 0x12, 0, 0x80]) << 24),
        3 => (0xe0, random.pick(&[u32::MAX, u32::MAX, 0x0fff_ffff])),
        4 => (0xf0, random.pick(&[0x1ff, 0x1ff, 0x1ff, 0xff, 0x11ff])),
        5 => (0x350, random.pick(&[0x700, 0x1_0700, 0x41, 0x400, 0x8700])), // LINT0
        6 => (0x360, random.pick(&[0x400, 0x1_0400, 0x42])),
        _ => (0x80, 0),
    }
}

fn interrupts(random: &mut Random, profile: Profile, steps: &mut Vec<Op>) {
    let step = match random.below(34) {
        0 | 1 => Op::SetGsiRouting(table(random, profile)),
        2..=6 => {
            let resample = random.one_in(3).then(|| random.below(2));
            Op::IrqfdAssign { event: event(random), gsi: gsi(random), resample }
        }
        7 | 8 => Op::IrqfdDeassign { event: event(random), gsi: gsi(random) },
        9..=12 => Op::Signal(random.below(EVENTS)),
        13..=16 => Op::IrqLine { gsi: gsi(random), level: !random.one_in(3) },
        17 | 18 => Op::SignalMsi(msi(random)),
        19 => Op::TakeEvents,
        20..=22 => Op::Take { vcpu: vcpu(random) },
        23 => Op::SetRedirection { pin: random.below(24), entry: redirection(random) },
        24 => {
            let (register, value) = lapic_register(random);
            Op::SetLapic { vcpu: vcpu(random), register: register.into(), value }
        }
        25 | 26 => {
            let (register, value) = lapic_register(random);
            let address = IoAddress::Mmio(0xfee0_0000 + u64::from(register));
            Op::Write { vcpu: vcpu(random), address, data: value.to_le_bytes().into() }
        }
        27 => {
            // An interrupt from one local APIC: fixed or NMI, to one, itself, all or others.
            let word = message_word(random) & 0x4ff | 0x4000;
            let shorthand = random.pick(&[0u32, 0, 1, 2, 3]) << 18;
            let vcpu = vcpu(random);
            let high = destination(random) << 24;
            let address = IoAddress::Mmio(0xfee0_0310);
            steps.push(Op::Write { vcpu, address, data: high.to_le_bytes().into() });
            let data = (word | shorthand).to_le_bytes().into();
            Op::Write { vcpu, address: IoAddress::Mmio(0xfee0_0300), data }
        }
        28 => mmio(0xfee0_00b0, 0), // end of interrupt
        29..=31 => {
            // A redirection entry, by the guest: it is in effect between the halves too.
            let pin = random.pick(&[0u32, 1, 2, 3, 4, 4, 8, 9, 16, 23, 24]);
            let entry = redirection(random);
            let halves = [(0x11, (entry >> 32) as u32), (0x10, entry as u32)];
            let halves = if random.one_in(3) { &halves[1..] } else { &halves[..] };
            for &(register, value) in halves {
                steps.push(mmio(0xfec0_0000, register + pin * 2));
                steps.push(mmio(0xfec0_0010, value));
            }
            Op::Read { vcpu: 0, address: IoAddress::Mmio(0xfec0_0010), len: 4 }
        }
        _ => return pic(random, steps),
    };
    steps.push(step);
}

/// A guest and the 8259 pair.
fn pic(random: &mut Random, steps: &mut Vec<Op>) {
    let chip = random.pick(&[0x20, 0x20, 0xa0]);
    match random.below(8) {
        0 | 1 => {
            let first = random.pick(&[0x11, 0x11, 0x11, 0x10, 0x13, 0x19]);
            steps.push(port(chip, first));
            let vectors = if chip == 0x20 { 0x70 } else { 0x78 };
            let wiring = if chip == 0x20 { 4 } else { 2 };
            let mode = random.pick(&[1, 1, 1, 3, 0x11]);
            for word in [vectors, wiring, mode].into_iter().take(3 - random.below(4) / 3) {
                steps.push(port(chip + 1, word));
            }
            steps.push(port(chip + 1, 0));
        }
        2 | 3 => steps.push(port(chip + 1, random.next() as u8)),
        4 | 5 => {
            let command = random.pick(&[0x20, 0x20, 0x60, 0xa0, 0xe0, 0xc0, 0x80, 0x00, 0x40]);
            steps.push(port(chip, command | random.below(8) as u8));
        }
        6 => steps.push(port(chip, random.pick(&[0x0a, 0x0b, 0x08, 0x68, 0x48]))),
        _ => {
            let register = random.pick(&[0x4d0, 0x4d1]);
            steps.push(port(register, random.next() as u8));
        }
    }
    let register = random.pick(&[chip, chip + 1, 0x4d0, 0x4d1]);
    steps.push(Op::Read { vcpu: 0, address: IoAddress::Pio(register), len: 1 });
}

// Memory.

fn address(random: &mut Random) -> IoAddress {
    let offset = random.below(12) as u64;
    match random.below(3) {
        0 => IoAddress::Pio(0x100 + offset as u16),
        _ => IoAddress::Mmio(0xa000_0000 + offset),
    }
}

fn memory(random: &mut Random, steps: &mut Vec<Op>) {
    const PAGE: usize = 4096;
    const BASE: u64 = 0x10_0000;
    let id = |random: &mut Random| match random.one_in(20) {
        true => random.pick(&[32764, 65536, u32::MAX]),
        false => random.below(4) as u32,
    };
    let step = match random.below(24) {
        0..=4 => {
            let pages = random.pick(&[1, 1, 2, 3, 64, 70]);
            let (first, len) = (random.below(PAGES - pages) * PAGE, pages * PAGE);
            let host = match random.one_in(25) {
                true => random.pick(&[(first + 8, len), (first, len - 8), (first, 0)]),
                false => (first, len),
            };
            let mut guest = BASE + random.below(10) as u64 * PAGE as u64;
            match random.below(30) {
                0 => guest += 0x800,
                1 => guest = (1 << 52) - PAGE as u64,
                2 => guest = 0u64.wrapping_sub(PAGE as u64),
                _ => {}
            }
            let (log_dirty, readonly) = (random.one_in(2), random.one_in(6));
            Op::SetMemorySlot { id: id(random), guest, host, log_dirty, readonly }
        }
        5 => {
            // What is likely there, changed in one thing.
            let last = steps.iter().rev().find(|op| matches!(op, Op::SetMemorySlot { .. }));
            let Some(Op::SetMemorySlot { id, guest, host, log_dirty, readonly }) = last.cloned()
            else {
                return;
            };
            match random.below(4) {
                0 => Op::SetMemorySlot { id, guest: guest ^ 0x2000, host, log_dirty, readonly },
                1 => Op::SetMemorySlot { id, guest, host, log_dirty: !log_dirty, readonly },
                2 => Op::SetMemorySlot { id, guest, host, log_dirty, readonly: !readonly },
                _ => Op::SetMemorySlot { id, guest, host, log_dirty, readonly },
            }
        }
        6 => Op::DeleteMemorySlot(id(random)),
        7..=9 => Op::DirtyLog { id: id(random), words: random.pick(&[2, 2, 2, 1, 0]) },
        10 | 11 => Op::ClearDirtyLog {
            id: id(random),
            first: random.pick(&[0, 0, 0, 0, 64, 1]),
            pages: random.pick(&[1, 2, 3, 64, 70, 6, 0]),
            bits: random.next(),
        },
        12 if random.one_in(3) => {
            Op::EnableCap(Capability::ManualDirtyLogProtect2, random.pick(&[0, 1, 3, 2, 4]))
        }
        12..=14 => Op::CoalescedZone {
            register: !random.one_in(3),
            address: address(random),
            size: random.pick(&[0, 1, 2, 4, 8, 12]),
        },
        15..=17 => Op::Ioeventfd {
            assign: !random.one_in(4),
            event: event(random),
            address: address(random),
            length: random.pick(&[0, 1, 1, 2, 4, 4, 8, 3]),
            datamatch: random.one_in(3).then(|| random.below(3) as u64),
        },
        18 if random.one_in(2) => Op::TakeWrites,
        18 => Op::TakeEvents,
        19 | 20 => {
            let address = address(random);
            let len = random.pick(&[1, 2, 4, 8]);
            let len = if matches!(address, IoAddress::Pio(_)) { len.min(4) } else { len };
            let value = random.below(3) as u64;
            Op::Write { vcpu: 0, address, data: value.to_le_bytes()[..len].into() }
        }
        n => {
            let page = random.pick(&[0, 1, 2, 3, 5, 9, 12, 64, 66, 70]);
            let offset = random.pick(&[0u64, 8, 0xffe, 0xff8]);
            let address = IoAddress::Mmio(BASE + page * PAGE as u64 + offset);
            match n {
                21 => Op::Read { vcpu: 0, address, len: random.pick(&[1, 2]) },
                _ => Op::Write { vcpu: 0, address, data: vec![random.next() as u8; 2] },
            }
        }
    };
    steps.push(step);
}

/// The same for dirty rings, by two vCPUs. Logs never begin full: then what is reported depends on
/// who makes the guest's writes, the processor or KVM.
fn rings(random: &mut Random, steps: &mut Vec<Op>) {
    let before = steps.len();
    memory(random, steps);
    for step in steps.iter_mut().skip(before) {
        match step {
            Op::EnableCap(Capability::ManualDirtyLogProtect2, flags) => *flags &= 1,
            Op::Write { vcpu, .. } => *vcpu = random.below(2) as u32,
            _ => {}
        }
    }
}

// Creation.

fn creation(random: &mut Random, steps: &mut Vec<Op>) {
    use Capability as C;
    let step = match random.below(24) {
        0 | 1 => Op::CreateIrqchip,
        2 => Op::EnableCap(C::SplitIrqchip, random.pick(&[24, 24, 0, 4096, 4097])),
        3 => Op::CreatePit2 { flags: random.pick(&[0, 1, 2]) },
        4 | 5 => Op::CreateVcpu(random.pick(&[0, 1, 2, 7, 255, 4095, 4096])),
        6 => Op::SetTssAddr(random.pick(&[0, 0xfffb_d000, 0xffff_d000, 0xffff_d001, 1 << 32])),
        7 => Op::SetIdentityMapAddr(random.pick(&[0, 0xfffb_c000, 0xfeff_c000, 1])),
        8 => Op::SetNrMmuPages(random.pick(&[0, 1, 63, 64, 1000])),
        9 => Op::EnableCap(C::X2apicApi, random.pick(&[0, 1, 2, 3, 4, 8, 12, 16])),
        10 => Op::EnableCap(C::MaxVcpuId, random.pick(&[0, 1, 8, 4096, 4097])),
        11 => Op::EnableCap(C::ManualDirtyLogProtect2, random.pick(&[0, 1, 2, 3, 4])),
        12 => Op::EnableCap(
            random.pick(&[C::DirtyLogRing, C::DirtyLogRingAcqRel]),
            random.pick(&[0, 0x1000, 0x8000, 0x10_0000, 0x20_0000, 0x1001]),
        ),
        13 => Op::EnableCap(C::ExceptionPayload, random.pick(&[0, 1])),
        14 => Op::EnableCap(random.pick(Capability::ALL), 1),
        15 => Op::CheckExtension(random.pick(&[
            C::X2apicApi,
            C::NrMemslots,
            C::IrqRouting,
            C::ManualDirtyLogProtect2,
            C::DirtyLogRing,
            C::SplitIrqchip,
            C::CoalescedMmio,
        ])),
        16 => Op::SetGsiRouting(table(random, Profile::Full)),
        17 => Op::SetGsiRouting(table(random, Profile::Split)),
        18 => {
            let resample = random.one_in(2).then_some(0);
            Op::IrqfdAssign { event: event(random), gsi: gsi(random), resample }
        }
        19 => Op::IrqfdDeassign { event: event(random), gsi: gsi(random) },
        20 => Op::IrqLine { gsi: gsi(random), level: true },
        21 => Op::SignalMsi(msi(random)),
        22 => Op::DirtyLog { id: 0, words: 2 },
        _ => Op::SetMemorySlot {
            id: random.below(2) as u32,
            guest: random.pick(&[0, 0x1000]),
            host: (0, 4096),
            log_dirty: random.one_in(2),
            readonly: false,
        },
    };
    steps.push(step);
}
