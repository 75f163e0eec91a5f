//! The state of a vCPU by groups, with the rules KVM has for setting it.
//!
//! A group that is set is what is read back. Nothing here runs code; interrupts are the affair of
//! [`super::irq`].

use std::collections::BTreeMap;

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};

use crate::Errno;

/// `KVM_MAX_CPUID_ENTRIES`.
const MAX_CPUID_ENTRIES: usize = 256;
/// `MAX_IO_MSRS`: the entries of one `KVM_GET_MSRS`.
const MAX_MSR_ENTRIES: usize = 256;

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_EFER: u32 = 0xc000_0080;

const APIC_BASE_RESERVED: u64 = 0x2ff;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ENABLED: u64 = 1 << 11;

const CR0_PE: u64 = 1;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// The bits KVM knows of: VME to OSXMMEXCPT, UMIP, LA57, VMXE, FSGSBASE, PCIDE, OSXSAVE, SMEP,
/// SMAP, PKE, CET, LAM_SUP.
const CR4_KNOWN: u64 = 0x3fff | 1 << 16 | 1 << 17 | 1 << 18 | 0xf << 20 | 1 << 28;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Flags of `kvm_vcpu_events` that KVM knows.
const EVENT_FLAGS: u32 = 0x3f;
const EVENT_PAYLOAD: u32 = 16;
const EVENT_TRIPLE_FAULT: u32 = 32;
/// What KVM says is valid in what it returns: NMI pending, shadow, SMM.
const EVENT_RETURNED: u32 = 1 | 4 | 8;

/// What a run has made of a vCPU (`KVM_MP_STATE_*`), as far as x86 has it.
pub(super) const RUNNABLE: u32 = 0;
pub(super) const UNINITIALIZED: u32 = 1;
pub(super) const INIT_RECEIVED: u32 = 2;
pub(super) const HALTED: u32 = 3;
const SIPI_RECEIVED: u32 = 4;
const AP_RESET_HOLD: u32 = 9;

/// The registers of one vCPU.
#[derive(Debug, Clone)]
pub(super) struct Registers {
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcr0: u64,
    debugregs: kvm_debugregs,
    pub(super) mp_state: u32,
    events: kvm_vcpu_events,
    msrs: BTreeMap<u32, u64>,
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// A segment after a reset.
fn segment(type_: u8, s: u8) -> kvm_segment {
    kvm_segment { limit: 0xffff, type_, s, present: 1, ..Default::default() }
}

impl Registers {
    /// After a reset (Intel SDM volume 3, "Processor State After Reset"), as KVM creates vCPU `id`.
    pub(super) fn new(id: u32, irqchip: bool, msrs: &[u32]) -> Self {
        let boot = id == 0;
        let data = segment(3, 1);
        let table = kvm_dtable { limit: 0xffff, ..Default::default() };
        Self {
            // DX says which processor it is: without CPUID, family 6.
            regs: kvm_regs { rip: 0xfff0, rflags: 2, rdx: 0x600, ..Default::default() },
            sregs: kvm_sregs {
                cs: kvm_segment { base: 0xffff_0000, selector: 0xf000, ..segment(11, 1) },
                ds: data,
                es: data,
                fs: data,
                gs: data,
                ss: data,
                tr: segment(11, 0),
                ldt: segment(2, 0),
                gdt: table,
                idt: table,
                cr0: 0x6000_0010,
                apic_base: 0xfee0_0000 | APIC_BASE_ENABLED | if boot { 0x100 } else { 0 },
                ..Default::default()
            },
            fpu: kvm_fpu { fcw: 0x37f, ..Default::default() },
            xcr0: 1,
            debugregs: kvm_debugregs { dr6: 0xffff_0ff0, dr7: 0x400, ..Default::default() },
            mp_state: if irqchip && !boot { UNINITIALIZED } else { RUNNABLE },
            events: kvm_vcpu_events { flags: EVENT_RETURNED, ..Default::default() },
            msrs: msrs.iter().map(|&index| (index, 0)).collect(),
            cpuid: Vec::new(),
        }
    }

    /// INIT: reset but for what it leaves (SDM, "Processor State After INIT": x87 and SSE state, XCR0,
    /// MSRs). All but the boot processor then wait for a start-up message.
    pub(super) fn init(&mut self, id: u32, irqchip: bool) {
        let Registers { regs, sregs, debugregs, events, .. } = Self::new(id, irqchip, &[]);
        let apic_base = self.sregs.apic_base;
        self.regs = regs;
        self.sregs = kvm_sregs { apic_base, ..sregs };
        self.debugregs = debugregs;
        self.events = events;
        self.mp_state = if id == 0 { RUNNABLE } else { INIT_RECEIVED };
    }

    /// Starts at a page, as the start-up message says (SDM, "MP Initialization").
    pub(super) fn start_at(&mut self, vector: u8) {
        self.sregs.cs.selector = u16::from(vector) << 8;
        self.sregs.cs.base = u64::from(vector) << 12;
        self.regs.rip = 0;
        self.mp_state = RUNNABLE;
    }

    /// Leaf `function`, subleaf `index` of what the guest sees.
    fn leaf(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.cpuid.iter().find(|leaf| (leaf.function, leaf.index) == (function, index))
    }

    pub(super) fn set_regs(&mut self, regs: &kvm_regs) {
        self.regs = kvm_regs { rflags: regs.rflags | 2, ..*regs };
        self.events.exception = Default::default();
    }

    pub(super) fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        let has = |value: u64, bits: u64| value & bits == bits;
        let s = sregs;
        let long = if has(s.efer, EFER_LME) && has(s.cr0, CR0_PG) {
            has(s.cr4, CR4_PAE) && has(s.efer, EFER_LMA)
        } else {
            !has(s.efer, EFER_LMA) && s.cs.l == 0
        };
        let cr0 = s.cr0 >> 32 == 0
            && (!has(s.cr0, CR0_NW) || has(s.cr0, CR0_CD))
            && (!has(s.cr0, CR0_PG) || has(s.cr0, CR0_PE));
        if !long || !cr0 || s.cr4 & !CR4_KNOWN != 0 || !self.valid_apic_base(s.apic_base) {
            return Err(Errno::EINVAL);
        }
        self.sregs = *sregs;
        Ok(())
    }

    fn valid_apic_base(&self, base: u64) -> bool {
        let x2apic = self.leaf(1, 0).is_some_and(|leaf| leaf.ecx >> 21 & 1 != 0);
        let allowed = x2apic && base & APIC_BASE_ENABLED != 0;
        base & APIC_BASE_RESERVED == 0
            && base >> 52 == 0
            && (base & APIC_BASE_X2APIC == 0 || allowed)
    }

    /// Without MXCSR, which `KVM_GET_FPU` leaves out.
    pub(super) fn fpu(&self) -> kvm_fpu {
        self.fpu
    }

    pub(super) fn set_fpu(&mut self, fpu: &kvm_fpu) {
        self.fpu = kvm_fpu { mxcsr: 0, ..*fpu };
    }

    pub(super) fn xcrs(&self) -> kvm_xcrs {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        if let Some(first) = xcrs.xcrs.first_mut() {
            *first = kvm_xcr { value: self.xcr0, ..Default::default() };
        }
        xcrs
    }

    /// Only XCR0 is looked at; its bits must be of CPUID leaf 0xd.
    pub(super) fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        const X87: u64 = 1;
        const SSE: u64 = 2;
        const AVX: u64 = 4;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        let given = xcrs.xcrs.get(..count).ok_or(Errno::EINVAL)?;
        if xcrs.flags != 0 {
            return Err(Errno::EINVAL);
        }
        let Some(xcr0) = given.iter().find(|xcr| xcr.xcr == 0).map(|xcr| xcr.value) else {
            return Ok(());
        };
        let leaf = self.leaf(0xd, 0);
        let supported = leaf.map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
        let missing_sse = xcr0 & AVX != 0 && xcr0 & SSE == 0;
        if xcr0 & X87 == 0 || missing_sse || xcr0 & !(supported | X87) != 0 {
            return Err(Errno::EINVAL);
        }
        self.xcr0 = xcr0;
        Ok(())
    }

    pub(super) fn debugregs(&self) -> kvm_debugregs {
        self.debugregs
    }

    pub(super) fn set_debugregs(&mut self, debugregs: &kvm_debugregs) -> Result<(), Errno> {
        let d = debugregs;
        if d.flags != 0 || d.dr6 >> 32 != 0 || d.dr7 >> 32 != 0 {
            return Err(Errno::EINVAL);
        }
        self.debugregs = kvm_debugregs { reserved: Default::default(), ..*debugregs };
        Ok(())
    }

    pub(super) fn mp_state(&self) -> kvm_mp_state {
        kvm_mp_state { mp_state: self.mp_state }
    }

    /// All but running needs a local APIC in the kernel.
    pub(super) fn set_mp_state(&mut self, state: u32, irqchip: bool) -> Result<(), Errno> {
        match state {
            RUNNABLE => self.mp_state = RUNNABLE,
            UNINITIALIZED | INIT_RECEIVED | HALTED | AP_RESET_HOLD if irqchip => {
                self.mp_state = state;
            }
            // KVM starts it at once, at the vector of the message it did not get.
            SIPI_RECEIVED if irqchip => self.start_at(0),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    pub(super) fn events(&self, payload: bool) -> kvm_vcpu_events {
        let flags = EVENT_RETURNED | if payload { EVENT_PAYLOAD } else { 0 };
        kvm_vcpu_events { flags, ..self.events }
    }

    /// `payload`: whether `KVM_CAP_EXCEPTION_PAYLOAD` is enabled.
    pub(super) fn set_events(
        &mut self,
        events: &kvm_vcpu_events,
        payload: bool,
    ) -> Result<(), Errno> {
        const NMI: u8 = 2;
        let mut events = *events;
        let with_payload = events.flags & EVENT_PAYLOAD != 0;
        if events.flags & !EVENT_FLAGS != 0
            || (with_payload && !payload)
            || events.flags & EVENT_TRIPLE_FAULT != 0
        {
            return Err(Errno::EINVAL);
        }
        if !with_payload {
            events.exception.pending = 0;
            events.exception_has_payload = 0;
        } else if events.exception.pending != 0 {
            events.exception.injected = 0;
        } else {
            events.exception_has_payload = 0;
        }
        let raised = events.exception.injected != 0 || events.exception.pending != 0;
        if raised && (events.exception.nr > 31 || events.exception.nr == NMI) {
            return Err(Errno::EINVAL);
        }
        self.events = events;
        Ok(())
    }

    /// Whether an exception waits to be delivered.
    pub(super) fn exception_pending(&self) -> bool {
        self.events.exception.pending != 0 || self.events.exception.injected != 0
    }

    fn msr(&self, index: u32) -> Option<u64> {
        match index {
            MSR_APIC_BASE => Some(self.sregs.apic_base),
            MSR_EFER => Some(self.sregs.efer),
            index => self.msrs.get(&index).copied(),
        }
    }

    fn set_msr(&mut self, index: u32, value: u64) -> bool {
        match index {
            MSR_APIC_BASE if !self.valid_apic_base(value) => return false,
            MSR_APIC_BASE => self.sregs.apic_base = value,
            MSR_EFER => self.sregs.efer = value,
            index => match self.msrs.get_mut(&index) {
                Some(msr) => *msr = value,
                None => return false,
            },
        }
        true
    }

    /// Reads up to the first that does not exist.
    pub(super) fn msrs(&self, entries: &mut [kvm_msr_entry]) -> Result<usize, Errno> {
        if entries.len() >= MAX_MSR_ENTRIES {
            return Err(Errno::E2BIG);
        }
        let mut read = 0;
        for entry in entries {
            let Some(value) = self.msr(entry.index) else { break };
            entry.data = value;
            read += 1;
        }
        Ok(read)
    }

    /// Writes up to the first that does not exist or does not take its value.
    pub(super) fn set_msrs(&mut self, entries: &[kvm_msr_entry]) -> Result<usize, Errno> {
        if entries.len() >= MAX_MSR_ENTRIES {
            return Err(Errno::E2BIG);
        }
        Ok(entries.iter().take_while(|entry| self.set_msr(entry.index, entry.data)).count())
    }

    pub(super) fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        self.cpuid.clone()
    }

    /// `has_run`: from then on only what is set already can be set.
    pub(super) fn set_cpuid(
        &mut self,
        leaves: &[kvm_cpuid_entry2],
        has_run: bool,
    ) -> Result<(), Errno> {
        if leaves.len() > MAX_CPUID_ENTRIES {
            return Err(Errno::E2BIG);
        }
        // The linear address bits, where they are given, are 48 or 57.
        let sizes = leaves.iter().find(|leaf| leaf.function == 0x8000_0008);
        let bits = sizes.map_or(0, |leaf| leaf.eax >> 8 & 0xff);
        if !matches!(bits, 0 | 48 | 57) || (has_run && self.cpuid != leaves) {
            return Err(Errno::EINVAL);
        }
        self.cpuid = leaves.to_vec();
        Ok(())
    }
}
