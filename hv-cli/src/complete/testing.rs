//! A vCPU and a little guest memory for the tests: plain data, no KVM.

use std::cell::RefCell;
use std::collections::BTreeMap;

use hv_core::Error;
use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::cpu::Cpu;
use super::machine::{Machine, cr0, cr4, efer, rflags};
use super::{Completed, Completer, NotCompleted};

/// Where the instruction under test lies, unless RIP is changed.
pub(super) const CODE: u64 = 0x1000;
/// A page of data.
pub(super) const DATA: u64 = 0x8000;
/// The top of the current stack.
pub(super) const STACK: u64 = 0x4000;
pub(super) const TSS: u64 = 0x5000;
pub(super) const GDT: u64 = 0x6000;
pub(super) const IDT: u64 = 0x7000;
/// Page tables of the long mode guest; the first 2 MiB are mapped by 4 KiB pages.
pub(super) const PML4: u64 = 0x10_0000;
pub(super) const PDPT: u64 = 0x10_1000;
pub(super) const PD: u64 = 0x10_2000;
pub(super) const PT: u64 = 0x10_3000;
pub(super) const MEMORY: usize = 0x20_0000;

/// The state completion may read and change.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct FakeCpu {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) events: kvm_vcpu_events,
    pub(super) fpu: kvm_fpu,
    pub(super) debug: kvm_debugregs,
    pub(super) xcr0: u64,
    pub(super) msrs: BTreeMap<u32, u64>,
    /// CR4 of every `set_sregs`, in order.
    pub(super) cr4_writes: Vec<u64>,
}

/// A vCPU behind a shared reference, as the trait wants it.
pub(super) struct SharedCpu(RefCell<FakeCpu>);

impl SharedCpu {
    pub(super) fn new(cpu: FakeCpu) -> Self {
        Self(RefCell::new(cpu))
    }
}

impl Cpu for SharedCpu {
    fn regs(&self) -> Result<kvm_regs, Error> {
        Ok(self.0.borrow().regs)
    }
    fn set_regs(&self, regs: &kvm_regs) -> Result<(), Error> {
        let mut cpu = self.0.borrow_mut();
        cpu.regs = *regs;
        // As KVM does.
        cpu.events.exception.pending = 0;
        Ok(())
    }
    fn sregs(&self) -> Result<kvm_sregs, Error> {
        Ok(self.0.borrow().sregs)
    }
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        let mut cpu = self.0.borrow_mut();
        cpu.cr4_writes.push(sregs.cr4);
        cpu.sregs = *sregs;
        Ok(())
    }
    fn events(&self) -> Result<kvm_vcpu_events, Error> {
        Ok(self.0.borrow().events)
    }
    fn set_events(&self, events: &kvm_vcpu_events) -> Result<(), Error> {
        self.0.borrow_mut().events = *events;
        Ok(())
    }
    fn fpu(&self) -> Result<kvm_fpu, Error> {
        Ok(self.0.borrow().fpu)
    }
    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), Error> {
        self.0.borrow_mut().fpu = *fpu;
        Ok(())
    }
    fn debug_regs(&self) -> Result<kvm_debugregs, Error> {
        Ok(self.0.borrow().debug)
    }
    fn set_debug_regs(&self, regs: &kvm_debugregs) -> Result<(), Error> {
        self.0.borrow_mut().debug = *regs;
        Ok(())
    }
    fn xcr0(&self) -> Result<u64, Error> {
        Ok(self.0.borrow().xcr0)
    }
    fn msr(&self, index: u32) -> Result<Option<u64>, Error> {
        Ok(self.0.borrow().msrs.get(&index).copied())
    }
}

/// A stopped vCPU with its memory.
pub(super) struct Guest {
    pub(super) cpu: FakeCpu,
    pub(super) memory: GuestMemoryMmap<()>,
}

impl Guest {
    pub(super) fn new(cpu: FakeCpu) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let guest = Self { cpu, memory };
        if guest.cpu.sregs.efer & efer::LMA != 0 {
            guest.poke_u64(PML4, PDPT | 7);
            guest.poke_u64(PDPT, PD | 7);
            guest.poke_u64(PD, PT | 7);
            for page in 0..512 {
                guest.poke_u64(PT + 8 * page, page << 12 | 7);
            }
        }
        guest
    }

    /// A view of the vCPU for the layers below completion.
    pub(super) fn machine(&self) -> Machine<'_, GuestMemoryMmap<()>> {
        Machine::new(self.cpu.regs, self.cpu.sregs, &self.memory)
    }

    pub(super) fn complete(&mut self, bytes: &[u8]) -> Result<Completed, NotCompleted> {
        let cpu = SharedCpu::new(self.cpu.clone());
        let result = Completer::default().complete_on(&cpu, &self.memory, bytes);
        self.cpu = cpu.0.into_inner();
        result
    }

    /// Completes an instruction that must end normally.
    pub(super) fn run(&mut self, bytes: &[u8]) {
        assert_eq!(self.complete(bytes), Ok(Completed::Normally), "{bytes:02x?}");
    }

    /// Completes an instruction that must fault, and gives the error code.
    pub(super) fn fault(&mut self, bytes: &[u8], vector: u8) -> u32 {
        assert_eq!(self.complete(bytes), Ok(Completed::Exception(vector)), "{bytes:02x?}");
        self.cpu.events.exception.error_code
    }

    pub(super) fn poke(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn poke_u64(&self, address: u64, value: u64) {
        self.poke(address, &value.to_le_bytes());
    }

    pub(super) fn peek<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(super) fn peek_u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.peek(address))
    }

    pub(super) fn peek_u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.peek(address))
    }

    /// The page table entry of a page below 2 MiB (long mode).
    pub(super) fn pte(&self, linear: u64) -> u64 {
        self.peek_u64(PT + 8 * (linear >> 12))
    }

    pub(super) fn set_pte(&self, linear: u64, entry: u64) {
        self.poke_u64(PT + 8 * (linear >> 12), entry);
    }

    pub(super) fn unmap(&self, linear: u64) {
        self.set_pte(linear, 0);
    }
}

fn segment(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// 32-bit protected mode at CPL 0 without paging, flat segments.
pub(super) fn protected_mode() -> FakeCpu {
    let data = segment(0x10, 3);
    FakeCpu {
        regs: kvm_regs { rip: CODE, rsp: STACK, rflags: rflags::FIXED, ..Default::default() },
        sregs: kvm_sregs {
            cs: segment(8, 11),
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: kvm_segment {
                base: TSS,
                limit: 103,
                selector: 0x28,
                type_: 11,
                present: 1,
                ..Default::default()
            },
            ldt: kvm_segment { unusable: 1, ..Default::default() },
            gdt: kvm_dtable { base: GDT, limit: 0xff, ..Default::default() },
            idt: kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() },
            cr0: cr0::PE,
            cr4: cr4::OSXSAVE,
            ..Default::default()
        },
        xcr0: 7,
        ..Default::default()
    }
}

/// 64-bit mode at CPL 0.
pub(super) fn long_mode() -> FakeCpu {
    let mut cpu = protected_mode();
    cpu.sregs.cr0 |= cr0::PG | cr0::WP;
    cpu.sregs.cr3 = PML4;
    cpu.sregs.cr4 |= cr4::PAE;
    cpu.sregs.efer = efer::LMA | efer::NXE | 1 << 8;
    cpu.sregs.cs.l = 1;
    cpu.sregs.cs.db = 0;
    cpu
}

/// Real mode, all segments at 0.
pub(super) fn real_mode() -> FakeCpu {
    let mut cpu = protected_mode();
    cpu.sregs.cr0 = 0;
    let real = kvm_segment { limit: 0xffff, db: 0, g: 0, selector: 0, ..cpu.sregs.ds };
    let sregs = &mut cpu.sregs;
    for segment in
        [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss]
    {
        *segment = real;
    }
    sregs.idt = kvm_dtable { base: 0, limit: 0x3ff, ..Default::default() };
    cpu
}

/// Descriptors for the GDT: flat, present, accessed.
pub(super) mod descriptor {
    pub(in crate::complete) const CODE32: u64 = 0x00cf_9b00_0000_ffff;
    pub(in crate::complete) const CODE64: u64 = 0x00af_9b00_0000_ffff;
    pub(in crate::complete) const DATA: u64 = 0x00cf_9300_0000_ffff;
    pub(in crate::complete) const USER_CODE32: u64 = 0x00cf_fb00_0000_ffff;
    pub(in crate::complete) const USER_DATA: u64 = 0x00cf_f300_0000_ffff;
    pub(in crate::complete) const PRESENT: u64 = 1 << 47;
    pub(in crate::complete) const ACCESSED: u64 = 1 << 40;
}

/// Selectors of what [`Guest::with_tables`] puts into the GDT.
pub(super) mod selector {
    pub(in crate::complete) const CODE: u16 = 0x08;
    pub(in crate::complete) const DATA: u16 = 0x10;
    pub(in crate::complete) const USER_CODE: u16 = 0x1b;
    pub(in crate::complete) const USER_DATA: u16 = 0x23;
    /// Free for a test's own descriptor.
    pub(in crate::complete) const SPARE: u16 = 0x30;
}

/// A gate of the IDT.
#[derive(Clone, Copy)]
pub(super) struct TestGate {
    pub(super) selector: u16,
    pub(super) offset: u64,
    /// Type, DPL and present bit: byte 5 of the gate.
    pub(super) access: u8,
    pub(super) ist: u8,
}

/// A present interrupt gate of 32 or 64 bits with DPL 3 to `HANDLER`.
pub(super) const GATE: TestGate =
    TestGate { selector: selector::CODE, offset: HANDLER, access: 0xee, ist: 0 };
pub(super) const HANDLER: u64 = 0x9000;

impl Guest {
    /// A guest with a GDT whose code descriptor fits the mode.
    pub(super) fn with_tables(cpu: FakeCpu) -> Self {
        let long = cpu.sregs.efer & efer::LMA != 0;
        let guest = Self::new(cpu);
        let code = if long { descriptor::CODE64 } else { descriptor::CODE32 };
        guest.set_descriptor(selector::CODE, code);
        guest.set_descriptor(selector::DATA, descriptor::DATA);
        guest.set_descriptor(selector::USER_CODE, descriptor::USER_CODE32);
        guest.set_descriptor(selector::USER_DATA, descriptor::USER_DATA);
        guest
    }

    pub(super) fn set_descriptor(&self, selector: u16, descriptor: u64) {
        self.poke_u64(GDT + u64::from(selector & !7), descriptor);
    }

    pub(super) fn get_descriptor(&self, selector: u16) -> u64 {
        self.peek_u64(GDT + u64::from(selector & !7))
    }

    pub(super) fn set_gate(&self, vector: u64, gate: TestGate) {
        let low = gate.offset & 0xffff
            | u64::from(gate.selector) << 16
            | u64::from(gate.ist) << 32
            | u64::from(gate.access) << 40
            | (gate.offset & 0xffff_0000) << 32;
        if self.cpu.sregs.efer & efer::LMA != 0 {
            self.poke_u64(IDT + 16 * vector, low);
            self.poke_u64(IDT + 16 * vector + 8, gate.offset >> 32);
        } else {
            self.poke_u64(IDT + 8 * vector, low);
        }
    }

    /// Moves the vCPU to CPL 3 (32-bit code segment).
    pub(super) fn enter_user(&mut self) {
        let sregs = &mut self.cpu.sregs;
        sregs.cs = kvm_segment { dpl: 3, ..segment(selector::USER_CODE, 11) };
        sregs.ss = kvm_segment { dpl: 3, ..segment(selector::USER_DATA, 3) };
        (sregs.ds, sregs.es) = (sregs.ss, sregs.ss);
    }
}
