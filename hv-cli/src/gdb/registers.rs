//! The registers of a vCPU as gdb sees them, and the description that tells it which there are.
//!
//! The order is that of `target.xml`: the core of gdbstub_arch, then what a kernel is debugged with.
//! Selectors can be read but not written: a selector means nothing without its descriptor.

use gdbstub::arch::{Arch, Registers};
use gdbstub_arch::x86::reg::id::X86_64CoreRegId;
use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use hv_core::{Errno, Error, Vcpu};
use kvm_bindings::{kvm_fpu, kvm_regs, kvm_sregs};

/// What gdb is told: a 64-bit x86 with system registers.
pub(super) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Regs;
    type RegId = X86_64CoreRegId;
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        Some(include_str!("target.xml"))
    }
}

/// Base addresses, control registers and EFER, in the order of `target.xml`.
const SYSTEM: usize = 8;

/// Bytes of the core registers in a `g` packet.
const CORE_LEN: usize = 0x218;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Regs {
    core: X86_64CoreRegs,
    system: [u64; SYSTEM],
}

impl Registers for Regs {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.core.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.core.gdb_serialize(&mut write_byte);
        for byte in self.system.iter().flat_map(|value| value.to_le_bytes()) {
            write_byte(Some(byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let (core, system) = bytes.split_at_checked(CORE_LEN).ok_or(())?;
        self.core.gdb_deserialize(core)?;
        let (words, rest) = system.as_chunks::<8>();
        if words.len() != SYSTEM || !rest.is_empty() {
            return Err(());
        }
        for (to, from) in self.system.iter_mut().zip(words) {
            *to = u64::from_le_bytes(*from);
        }
        Ok(())
    }
}

/// Why registers were not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WriteError {
    /// A segment selector would change.
    Selector,
    /// KVM refused the values.
    Hypervisor(Error),
}

impl WriteError {
    /// What the debugger is told.
    pub(super) fn errno(&self) -> Errno {
        match self {
            Self::Selector => Errno::EINVAL,
            Self::Hypervisor(error) => error.errno,
        }
    }
}

impl From<Error> for WriteError {
    fn from(error: Error) -> Self {
        Self::Hypervisor(error)
    }
}

/// The three groups of registers KVM keeps them in.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Groups {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
}

impl Groups {
    fn read<V: Vcpu>(vcpu: &V) -> Result<Self, Error> {
        Ok(Self { regs: vcpu.regs()?, sregs: vcpu.sregs()?, fpu: vcpu.fpu()? })
    }
}

/// Reads all registers of a vCPU.
pub(super) fn read<V: Vcpu>(vcpu: &V) -> Result<Regs, Error> {
    Ok(to_gdb(&Groups::read(vcpu)?))
}

/// Writes those that differ, group by group. If one is refused, the others may have been written.
pub(super) fn write<V: Vcpu>(vcpu: &V, new: &Regs) -> Result<(), WriteError> {
    let old = Groups::read(vcpu)?;
    if new.core.segments != to_gdb(&old).core.segments {
        return Err(WriteError::Selector);
    }
    let groups = from_gdb(new, &old);
    // First what KVM may refuse.
    if groups.sregs != old.sregs {
        vcpu.set_sregs(&groups.sregs)?;
    }
    if groups.fpu != old.fpu {
        vcpu.set_fpu(&groups.fpu)?;
    }
    if groups.regs != old.regs {
        vcpu.set_regs(&groups.regs)?;
    }
    Ok(())
}

fn to_gdb(groups: &Groups) -> Regs {
    let (r, s, f) = (&groups.regs, &groups.sregs, &groups.fpu);
    let selector = |segment: &kvm_bindings::kvm_segment| u32::from(segment.selector);
    let mut core = X86_64CoreRegs {
        regs: [
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ],
        // RFLAGS has no bits above 21.
        eflags: r.rflags as u32,
        rip: r.rip,
        segments: X86SegmentRegs {
            cs: selector(&s.cs),
            ss: selector(&s.ss),
            ds: selector(&s.ds),
            es: selector(&s.es),
            fs: selector(&s.fs),
            gs: selector(&s.gs),
        },
        st: Default::default(),
        fpu: X87FpuInternalRegs {
            fctrl: f.fcw.into(),
            fstat: f.fsw.into(),
            ftag: full_tags(f).into(),
            fiseg: (f.last_ip >> 32) as u32,
            fioff: f.last_ip as u32,
            foseg: (f.last_dp >> 32) as u32,
            fooff: f.last_dp as u32,
            fop: f.last_opcode.into(),
        },
        xmm: f.xmm.map(u128::from_le_bytes),
        mxcsr: f.mxcsr,
    };
    for (st, fpr) in core.st.iter_mut().zip(&f.fpr) {
        *st = value_of(fpr);
    }
    let system = [s.fs.base, s.gs.base, s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer];
    Regs { core, system }
}

fn from_gdb(new: &Regs, old: &Groups) -> Groups {
    let Groups { mut regs, mut sregs, mut fpu } = *old;
    let core = &new.core;
    let general = [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rbp,
        &mut regs.rsp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
    ];
    for (to, from) in general.into_iter().zip(core.regs) {
        *to = from;
    }
    regs.rip = core.rip;
    regs.rflags = core.eflags.into();

    let system = [
        &mut sregs.fs.base,
        &mut sregs.gs.base,
        &mut sregs.cr0,
        &mut sregs.cr2,
        &mut sregs.cr3,
        &mut sregs.cr4,
        &mut sregs.cr8,
        &mut sregs.efer,
    ];
    for (to, from) in system.into_iter().zip(new.system) {
        *to = from;
    }

    // The fields of the registers have 16 bits, of the opcode 11; gdb gives them 32.
    fpu.fcw = core.fpu.fctrl as u16;
    fpu.fsw = core.fpu.fstat as u16;
    fpu.ftwx = used(core.fpu.ftag as u16);
    fpu.last_ip = u64::from(core.fpu.fiseg) << 32 | u64::from(core.fpu.fioff);
    fpu.last_dp = u64::from(core.fpu.foseg) << 32 | u64::from(core.fpu.fooff);
    fpu.last_opcode = core.fpu.fop as u16;
    fpu.xmm = core.xmm.map(u128::to_le_bytes);
    fpu.mxcsr = core.mxcsr;
    for (fpr, st) in fpu.fpr.iter_mut().zip(&core.st) {
        for (to, from) in fpr.iter_mut().zip(st) {
            *to = *from;
        }
    }
    Groups { regs, sregs, fpu }
}

/// The 80 bits of an x87 register in their 128-bit place.
fn value_of(fpr: &[u8; 16]) -> [u8; 10] {
    fpr.first_chunk().copied().unwrap_or_default()
}

/// The tag word of FNSAVE: two bits for each physical register, 0 valid, 1 zero, 2 special, 3 empty
/// (Intel SDM volume 1, "x87 FPU Tag Word"). KVM has the form of FXSAVE, a bit for each that is used.
fn full_tags(fpu: &kvm_fpu) -> u16 {
    let top = fpu.fsw >> 11 & 7;
    let mut tags = 0;
    for physical in 0..8u16 {
        let tag = if fpu.ftwx & 1 << physical == 0 {
            0b11
        } else {
            // Registers are kept by their place in the stack.
            let place = usize::from(physical.wrapping_sub(top) & 7);
            fpu.fpr.get(place).map_or(0b11, |fpr| tag(&value_of(fpr)))
        };
        tags |= tag << (2 * physical);
    }
    tags
}

/// The tag of a register that is not empty.
fn tag(value: &[u8; 10]) -> u16 {
    let [mantissa @ .., e0, e1] = *value;
    let mantissa = u64::from_le_bytes(mantissa);
    match u16::from_le_bytes([e0, e1]) & 0x7fff {
        0 if mantissa == 0 => 0b01,
        0 | 0x7fff => 0b10,
        // Without the integer bit it is unnormal.
        _ if mantissa >> 63 == 0 => 0b10,
        _ => 0b00,
    }
}

/// A bit for each register whose tag is not "empty".
fn used(tags: u16) -> u8 {
    (0..8).filter(|n| tags >> (2 * n) & 0b11 != 0b11).fold(0, |bits, n| bits | 1 << n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hv_core::Ioctl;
    use hv_core::mock::MockVcpu;

    fn groups() -> Groups {
        let regs = kvm_regs {
            rax: 1,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            rsi: 5,
            rdi: 6,
            rbp: 7,
            rsp: 8,
            r8: 9,
            r9: 10,
            r10: 11,
            r11: 12,
            r12: 13,
            r13: 14,
            r14: 15,
            r15: 16,
            rip: 0xffff_8000_0000_0000,
            rflags: 0x246,
        };
        let mut sregs = kvm_sregs {
            cr0: 17,
            cr2: 18,
            cr3: 19,
            cr4: 20,
            cr8: 21,
            efer: 22,
            ..Default::default()
        };
        (sregs.fs.base, sregs.gs.base) = (23, 24);
        (sregs.cs.selector, sregs.gs.selector) = (0x10, 0x18);
        let mut fpu = kvm_fpu {
            fcw: 0x37f,
            fsw: 7 << 11,
            ftwx: 0x80,
            last_opcode: 25,
            last_ip: 26 << 32 | 27,
            last_dp: 28 << 32 | 29,
            mxcsr: 0x1f80,
            ..Default::default()
        };
        // 1.0 in ST0, which is R7.
        fpu.fpr[0][7..10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        fpu.xmm[15] = [30; 16];
        Groups { regs, sregs, fpu }
    }

    fn serialized(regs: &Regs) -> Vec<u8> {
        let mut bytes = Vec::new();
        regs.gdb_serialize(|byte| bytes.push(byte.unwrap()));
        bytes
    }

    #[test]
    fn what_gdb_writes_back_unchanged_is_unchanged() {
        let old = groups();
        let bytes = serialized(&to_gdb(&old));
        let mut new = Regs::default();
        new.gdb_deserialize(&bytes).unwrap();
        assert_eq!(from_gdb(&new, &old), old);
    }

    #[test]
    fn the_description_has_the_registers_in_their_order_and_size() {
        let xml = X86::target_description_xml().unwrap();
        let bits: usize = xml
            .lines()
            .filter(|line| line.contains("<reg "))
            .map(|line| line.split("bitsize=\"").nth(1).unwrap().split('"').next().unwrap())
            .map(|bits| bits.parse::<usize>().unwrap())
            .sum();
        let bytes = serialized(&to_gdb(&groups()));
        assert_eq!(bits, bytes.len() * 8);
        assert_eq!(bytes.len(), CORE_LEN + 8 * SYSTEM);
        // What gdb finds by its place.
        let mut offset = 0;
        let mut place = std::collections::HashMap::new();
        for line in xml.lines().filter(|line| line.contains("<reg ")) {
            let attribute = |name: &str| {
                line.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap()
            };
            place.insert(attribute("name"), offset);
            offset += attribute("bitsize").parse::<usize>().unwrap() / 8;
        }
        for (name, value) in [
            ("rax", 1),
            ("r15", 16),
            ("eflags", 0x46),
            ("cs", 0x10),
            ("gs", 0x18),
            ("fctrl", 0x7f),
            ("fop", 25),
            ("xmm15", 30),
            ("mxcsr", 0x80),
            ("cr0", 17),
            ("cr3", 19),
            ("efer", 22),
            ("fs_base", 23),
            ("gs_base", 24),
        ] {
            assert_eq!(bytes[place[name]], value, "{name}");
        }
    }

    #[test]
    fn packets_of_a_wrong_size_are_refused() {
        let bytes = serialized(&Regs::default());
        for len in (0..bytes.len()).chain([bytes.len() + 1]) {
            let packet = [&bytes[..], &[0]].concat()[..len].to_vec();
            assert_eq!(Regs::default().gdb_deserialize(&packet), Err(()), "{len}");
        }
    }

    #[test]
    fn tags_say_what_is_in_a_register() {
        let fpu = groups().fpu;
        assert_eq!(full_tags(&fpu), 0x3fff, "R7 valid, the others empty");
        assert_eq!(used(0x3fff), 0x80);
        let special = |bytes: [u8; 10]| tag(&bytes);
        assert_eq!(special([0; 10]), 1);
        assert_eq!(special([0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f]), 2, "infinity");
        assert_eq!(special([1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 2, "denormal");
        assert_eq!(special([1, 0, 0, 0, 0, 0, 0, 0, 1, 0]), 2, "unnormal");
        assert_eq!(special([0, 0, 0, 0, 0, 0, 0, 0x80, 1, 0x80]), 0);
        let mut fpu = kvm_fpu { ftwx: 0xff, fsw: 3 << 11, ..Default::default() };
        fpu.fpr[5][7..10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        assert_eq!(full_tags(&fpu), 0x5555 & !0b11, "ST5 is R0");
    }

    fn vcpu() -> MockVcpu {
        let mut vcpu = MockVcpu::new();
        vcpu.expect_regs().returning(|| Ok(groups().regs));
        vcpu.expect_sregs().returning(|| Ok(groups().sregs));
        vcpu.expect_fpu().returning(|| Ok(groups().fpu));
        vcpu
    }

    #[test]
    fn only_what_changed_is_written() {
        let regs = read(&vcpu()).unwrap();
        write(&vcpu(), &regs).unwrap();

        let mut changed = regs.clone();
        changed.core.regs[1] = 77;
        let mut it = vcpu();
        it.expect_set_regs().withf(|r| (r.rax, r.rbx) == (1, 77)).once().returning(|_| Ok(()));
        write(&it, &changed).unwrap();

        let mut changed = regs.clone();
        changed.system[4] = 0x5000;
        let mut it = vcpu();
        it.expect_set_sregs()
            .withf(|s| (s.cr3, s.cr0) == (0x5000, 17))
            .once()
            .returning(|_| Ok(()));
        write(&it, &changed).unwrap();

        let mut changed = regs;
        changed.core.xmm[2] = 7;
        let mut it = vcpu();
        it.expect_set_fpu().withf(|f| f.xmm[2][0] == 7).once().returning(|_| Ok(()));
        write(&it, &changed).unwrap();
    }

    #[test]
    fn what_can_not_be_written_is_an_error() {
        let mut changed = read(&vcpu()).unwrap();
        changed.core.segments.cs = 8;
        assert_eq!(write(&vcpu(), &changed), Err(WriteError::Selector));
        let mut changed = read(&vcpu()).unwrap();
        (changed.system[2], changed.core.regs[0]) = (u64::MAX, 7);
        let error = Error::new(Ioctl::SetSregs, Errno::EINVAL);
        let mut it = vcpu();
        it.expect_set_sregs().once().returning(move |_| Err(error));
        assert_eq!(write(&it, &changed), Err(WriteError::Hypervisor(error)), "no other is written");
    }
}
