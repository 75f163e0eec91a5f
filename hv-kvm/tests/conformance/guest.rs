//! A guest of the conformance suite: a vCPU in 64-bit mode that is started anew for every access.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use hv_core::conformance::{Checked, GUEST_MEMORY, Guest, Miss, Seen, pages};
use hv_core::{
    Capability, ExitReply, HostRange, Hypervisor, IoAddress, IoDirection, MemoryBackend,
    MemorySlot, SlotFlags, SlotId, Vcpu, VcpuExit, VcpuKick, Vm,
};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use vm_memory::GuestAddress;

use super::code::{self, Snippet};
use crate::common;

/// Bytes of guest-physical addresses each vCPU has for itself.
const BLOCK: u64 = 0x1_0000;

/// The end-of-interrupt register of the local APIC.
const EOI: u64 = 0xfee0_00b0;

/// How long a guest may take for one access on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the VMM answers where a guest reads what nothing serves.
const ALL_ONES: [u8; 8] = [0xff; 8];

const NMI: u8 = 2;

#[derive(Debug)]
pub(crate) struct KvmGuest {
    vcpu: KvmVcpu,
    /// Its code and tables.
    block: HostRange,
    base: u64,
    /// Interrupts that were taken when they were not asked for.
    early: Vec<u8>,
    /// Interrupts whose end the VMM was told of before the guest ended them.
    ///
    /// There are software KVMs that end an interrupt when it is taken. Cases that depend on it
    /// being in service look there; for the others it must make no difference.
    ended: Vec<u8>,
}

/// How a run of a snippet ended.
enum End {
    /// At its end, perhaps after one exit of the work itself.
    Done(Option<VcpuExit>),
    /// In the handler of an interrupt or exception.
    Took(u8),
}

impl KvmGuest {
    pub(crate) fn new(kvm: &Kvm, vm: &KvmVm, vcpu: KvmVcpu) -> Checked<Self> {
        let id = vcpu.id();
        let base = GUEST_MEMORY.start + u64::from(id) * BLOCK;
        if base + BLOCK > GUEST_MEMORY.end {
            return Err(Miss::failed(format!("no room for the guest of vCPU {id}")));
        }
        let block = pages(code::PAGES)?;
        common::store(&block, 0, &code::block(base));
        let slots = vm.check_extension(Capability::NrMemslots)?.unsigned_abs();
        vm.set_memory_slot(&MemorySlot {
            id: SlotId(slots.saturating_sub(1 + id)),
            guest: GuestAddress(base),
            host: block.clone(),
            flags: SlotFlags::default(),
        })
        .map_err(|error| Miss::from(error).during("the guest's own memory"))?;
        let guest = Self { vcpu, block, base, early: Vec::new(), ended: Vec::new() };
        guest.enter_long_mode(kvm)?;
        guest.enable_local_apic()?;
        Ok(guest)
    }

    fn enter_long_mode(&self, kvm: &Kvm) -> Checked {
        let vcpu = &self.vcpu;
        if vcpu.cpuid()?.is_empty() {
            vcpu.set_cpuid(&kvm.supported_cpuid()?)?;
        }
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: 8,
            type_: 0xb,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 0x10, type_: 3, db: 1, l: 0, ..code };
        let mut sregs = vcpu.sregs()?;
        (sregs.cs, sregs.ss) = (code, data);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
        (sregs.gdt.base, sregs.gdt.limit) = (self.base + code::GDT, 3 * 8 - 1);
        (sregs.idt.base, sregs.idt.limit) = (self.base + code::IDT, 256 * 16 - 1);
        sregs.cr0 = 0x8000_0011; // PG, ET, PE
        sregs.cr3 = self.base;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LMA, LME
        Ok(vcpu.set_sregs(&sregs)?)
    }

    /// If it is in the kernel. A vCPU that would wait to be started need not.
    fn enable_local_apic(&self) -> Checked {
        let Ok(mut lapic) = self.vcpu.lapic() else { return Ok(()) };
        // The spurious interrupt vector register: vector 0xff, enabled.
        (lapic.regs[0xf0], lapic.regs[0xf1]) = (0xffu8.cast_signed(), 1);
        self.vcpu.set_lapic(&lapic)?;
        Ok(self.vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?)
    }

    /// Runs `snippet` from its start to its end or the first interrupt.
    fn run(&mut self, snippet: Snippet, regs: kvm_regs) -> Checked<End> {
        let offset = snippet.offset().ok_or_else(|| {
            Miss::failed(format!("the suite asks for an access no guest can make: {snippet:?}"))
        })?;
        let interrupts = if snippet == Snippet::Wait { 1 << 9 } else { 0 };
        self.vcpu.set_regs(&kvm_regs {
            rip: self.base + offset,
            rsp: self.base + code::STACK_TOP,
            rflags: 2 | interrupts,
            ..regs
        })?;
        let mut work = None;
        loop {
            let exit = self.next_exit()?;
            if let VcpuExit::Io(io) = exit {
                match (io.port, self.vcpu.io_data()) {
                    (code::DONE, _) => return Ok(End::Done(work)),
                    (code::TOOK, &mut [vector]) => return Ok(End::Took(vector)),
                    (_, data) if io.direction == IoDirection::In => data.fill(0xff),
                    _ => {}
                }
            }
            // Before or after the work: the vCPU is stopped where it is.
            if let (VcpuExit::DirtyRingFull, None) = (exit, work) {
                return Ok(End::Done(Some(exit)));
            }
            if let (VcpuExit::IoapicEoi { vector }, Snippet::Wait) = (exit, snippet) {
                self.ended.push(vector);
                continue;
            }
            self.vcpu.reply(ExitReply::Mmio(ALL_ONES));
            if let Some(first) = work.replace(exit) {
                return Err(Miss::failed(format!(
                    "the guest exits twice in {snippet:?}: {first:?}, then {exit:?}"
                )));
            }
        }
    }

    /// The next exit; a guest that never comes back is stopped.
    fn next_exit(&mut self) -> Checked<VcpuExit> {
        let kick = self.vcpu.kicker();
        let late = AtomicBool::new(false);
        let (returned, returns) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let late = &late;
            scope.spawn(move || {
                // Nothing is ever sent: either the other end goes, or time runs out.
                if returns.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                    late.store(true, Ordering::SeqCst);
                    kick.kick()
                } else {
                    Ok(())
                }
            });
            let exit = loop {
                match self.vcpu.run() {
                    Ok(VcpuExit::Interrupted) if !late.load(Ordering::SeqCst) => {}
                    exit => break exit,
                }
            };
            drop(returned);
            match exit? {
                VcpuExit::Interrupted => {
                    Err(Miss::failed(format!("the guest did not come back within {PATIENCE:?}")))
                }
                exit => Ok(exit),
            }
        })
    }

    /// Runs the snippet of an access to its end. Only non-maskable interrupts can come between.
    fn access(&mut self, snippet: Snippet, regs: kvm_regs) -> Checked<Option<VcpuExit>> {
        for _ in 0..16 {
            match self.run(snippet, regs)? {
                End::Done(exit) => return Ok(exit),
                End::Took(NMI) => {
                    self.early.push(NMI);
                    self.unblock_nmis()?;
                }
                End::Took(vector) => {
                    return Err(Miss::failed(format!(
                        "the guest took exception {vector} in {snippet:?}"
                    )));
                }
            }
        }
        Err(Miss::failed(format!("non-maskable interrupts keep coming in {snippet:?}")))
    }

    /// As an IRET would, which handlers here don't do.
    fn unblock_nmis(&self) -> Checked {
        let mut events = self.vcpu.vcpu_events()?;
        events.nmi.masked = 0;
        Ok(self.vcpu.set_vcpu_events(&events)?)
    }

    /// The registers and the linear address with which the guest reaches `address`.
    fn reach(&mut self, address: IoAddress) -> kvm_regs {
        match address {
            IoAddress::Pio(port) => kvm_regs { rdx: port.into(), ..Default::default() },
            IoAddress::Mmio(address) if address < code::WINDOW => {
                kvm_regs { rdi: address, ..Default::default() }
            }
            IoAddress::Mmio(address) => {
                let (offset, entries, linear) = code::window(address);
                common::store(&self.block, offset as usize, &entries);
                kvm_regs { rdi: linear, ..Default::default() }
            }
        }
    }
}

/// The snippet for an access of `len` bytes.
fn snippet(address: IoAddress, len: usize, write: bool) -> Checked<Snippet> {
    if !len.is_power_of_two() || len > 8 {
        return Err(Miss::failed(format!("no instruction accesses {len} bytes at once")));
    }
    let log = len.trailing_zeros() as u8;
    Ok(match (address, write) {
        (IoAddress::Mmio(_), true) => Snippet::Store(log),
        (IoAddress::Mmio(_), false) => Snippet::Load(log),
        (IoAddress::Pio(_), true) => Snippet::Out(log),
        (IoAddress::Pio(_), false) => Snippet::In(log),
    })
}

/// Checks that `exit` is the access to `address`, and nothing else came to the VMM.
fn seen(
    exit: Option<VcpuExit>,
    address: IoAddress,
    len: usize,
    data: Option<&[u8]>,
) -> Checked<Seen> {
    let Some(exit) = exit else { return Ok(Seen::ByKernel) };
    if exit == VcpuExit::DirtyRingFull {
        return Ok(Seen::ByVmm(exit));
    }
    let is_the_access = match (exit, address) {
        (VcpuExit::Io(io), IoAddress::Pio(port)) => {
            let out = io.direction == IoDirection::Out;
            (io.port, usize::from(io.size), io.count, out) == (port, len, 1, data.is_some())
        }
        (VcpuExit::Mmio(mmio), IoAddress::Mmio(address)) => {
            let written = mmio.written.as_ref().and_then(|bytes| bytes.get(..len));
            (mmio.address, usize::from(mmio.len), written) == (address, len, data)
        }
        _ => false,
    };
    if is_the_access {
        Ok(Seen::ByVmm(exit))
    } else {
        Err(Miss::failed(format!(
            "for {len} bytes ({data:x?}) at {address:x?} the VMM was told {exit:x?}"
        )))
    }
}

impl Guest for KvmGuest {
    type Vcpu = KvmVcpu;

    fn vcpu(&mut self) -> &mut KvmVcpu {
        &mut self.vcpu
    }

    fn write(&mut self, address: IoAddress, data: &[u8]) -> Checked<Seen> {
        let snippet = snippet(address, data.len(), true)?;
        let mut rax = [0; 8];
        rax[..data.len()].copy_from_slice(data);
        let regs = kvm_regs { rax: u64::from_le_bytes(rax), ..self.reach(address) };
        let exit = self.access(snippet, regs)?;
        seen(exit, address, data.len(), Some(data))
    }

    fn read(&mut self, address: IoAddress, data: &mut [u8]) -> Checked<Seen> {
        let snippet = snippet(address, data.len(), false)?;
        let regs = self.reach(address);
        let exit = self.access(snippet, regs)?;
        let rax = self.vcpu.regs()?.rax.to_le_bytes();
        data.copy_from_slice(&rax[..data.len()]);
        seen(exit, address, data.len(), None)
    }

    fn take_interrupts(&mut self) -> Checked<Vec<u8>> {
        let mut taken = std::mem::take(&mut self.early);
        // More than a local APIC and two PICs can hold.
        for _ in 0..512 {
            match self.run(Snippet::Wait, kvm_regs::default())? {
                End::Done(None) => return Ok(taken),
                End::Done(Some(exit)) => {
                    return Err(Miss::failed(format!("the guest stops with {exit:x?}")));
                }
                // In service it would hold itself back: it was ended when it was taken, and came
                // again, which a line that is still high does for ever.
                End::Took(vector) if taken.contains(&vector) => {
                    self.early.push(vector);
                    return Ok(taken);
                }
                End::Took(vector) => taken.push(vector),
            }
            if taken.last() == Some(&NMI) {
                self.unblock_nmis()?;
            }
        }
        Err(Miss::failed(format!("interrupts keep coming: {taken:#x?}")))
    }

    fn end_of_interrupt(&mut self, vector: u8) -> Checked<Seen> {
        let regs = kvm_regs { rdi: EOI, ..Default::default() };
        let exit = self.access(Snippet::Store(2), regs)?;
        let early = self.ended.iter().position(|ended| *ended == vector);
        let early = early.map(|at| VcpuExit::IoapicEoi { vector: self.ended.remove(at) });
        match exit.or(early) {
            None => Ok(Seen::ByKernel),
            Some(exit @ VcpuExit::IoapicEoi { vector: ended }) if ended == vector => {
                Ok(Seen::ByVmm(exit))
            }
            Some(exit) => Err(Miss::failed(format!(
                "ending interrupt {vector:#x}, the VMM was told {exit:x?}"
            ))),
        }
    }
}
