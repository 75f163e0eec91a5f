//! Completes instructions that this host's KVM can't run.
//!
//! KVM runs some guest code by an emulator: all of it at CPL 0 on nested software KVM, MMIO and
//! sometimes real mode elsewhere. An instruction the emulator lacks ends in
//! `KVM_EXIT_INTERNAL_ERROR` with the sub-error
//! [`INTERNAL_ERROR_EMULATION`](hv_core::INTERNAL_ERROR_EMULATION) and usually the instruction's
//! bytes. [`Completer::complete`] decodes it and does what the processor would have done to
//! registers, flags and memory, exceptions included.
//!
//! One instruction per call, in bounded time, and all or nothing: what can't be done exactly is
//! left alone and said ([`NotCompleted`]). It must not run the vCPU, nor guess. Whether the guest's
//! CPUID has the instruction is not looked at: a KVM that emulates may show the guest the host's.

mod atomic;
mod bits;
mod counts;
mod cpu;
mod decode;
mod descriptors;
mod events;
mod fpu;
mod iret;
mod machine;
mod memory;
mod operands;
mod paging;
mod stop;
mod system;
#[cfg(test)]
mod testing;

use hv_core::Vcpu;
use iced_x86::{Instruction, Mnemonic};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use vm_memory::GuestMemoryBackend;

pub use counts::Counts;
pub use decode::disassemble;
pub use paging::{Mapped, look_up};
pub use stop::NotCompleted;

use cpu::Cpu;
use events::Event;
use machine::{Machine, cr4, rflags};
use stop::{Fault, Stop, vector};

/// DR6.BS: the debug exception is a single step.
const DR6_SINGLE_STEP: u64 = 1 << 14;

/// How a completed instruction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completed {
    /// The next instruction follows.
    Normally,
    /// The guest gets this exception, which is queued in KVM.
    Exception(u8),
}

/// Completes instructions for one vCPU and counts them.
#[derive(Debug, Default)]
pub struct Completer {
    counts: Counts,
}

impl Completer {
    /// Completes the instruction at CS:RIP of a vCPU that has just stopped with an emulation
    /// failure. `bytes` are the first bytes of the instruction, as far as they are known; what is
    /// missing is read from guest memory. The vCPU can be run again afterwards.
    ///
    /// # Errors
    /// [`NotCompleted`] says why not. The vCPU is as before then, unless a call that changes
    /// it failed ([`NotCompleted::Hypervisor`]).
    pub fn complete<V: Vcpu, M: GuestMemoryBackend>(
        &mut self,
        vcpu: &V,
        memory: &M,
        bytes: &[u8],
    ) -> Result<Completed, NotCompleted> {
        self.complete_on(vcpu, memory, bytes)
    }

    /// What was completed so far.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    fn complete_on<C: Cpu, M: GuestMemoryBackend>(
        &mut self,
        cpu: &C,
        memory: &M,
        bytes: &[u8],
    ) -> Result<Completed, NotCompleted> {
        let mut events = idle_events(cpu.events()?)?;
        let (regs, sregs) = (cpu.regs()?, cpu.sregs()?);
        let single_step = regs.rflags & rflags::TF != 0;
        if single_step {
            room_for_exception(&events)?;
        }
        let mut machine = Machine::new(regs, sregs, memory);
        let mut mnemonic = None;
        let result = machine.decode(bytes).and_then(|instruction| {
            mnemonic = Some(instruction.mnemonic());
            execute(&mut machine, cpu, &instruction)
        });
        let completed = match result {
            Ok(()) => {
                let trap = single_step && !machine.delivered;
                finish(cpu, &machine, &mut events, trap)?;
                if trap { Completed::Exception(vector::DB) } else { Completed::Normally }
            }
            Err(Stop::Fault(fault)) => {
                room_for_exception(&events)?;
                raise(cpu, regs, sregs, &mut events, fault)?;
                Completed::Exception(fault.vector)
            }
            Err(Stop::NotCompleted(reason)) => return Err(reason),
        };
        if let Some(mnemonic) = mnemonic {
            self.counts.count(mnemonic);
        }
        Ok(completed)
    }
}

fn execute<C: Cpu, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, M>,
    cpu: &C,
    instruction: &Instruction,
) -> Result<(), Stop> {
    machine.regs.rip = machine.wrap_ip(instruction.next_ip());
    machine.set_flags(rflags::RF, 0);
    match instruction.mnemonic() {
        Mnemonic::Int3 => machine.deliver(Event { vector: vector::BP, software: true }),
        Mnemonic::Int => {
            machine.deliver(Event { vector: instruction.immediate8(), software: true })
        }
        Mnemonic::Into if !machine.flag(rflags::OF) => Ok(()),
        Mnemonic::Into => machine.deliver(Event { vector: vector::OF, software: true }),
        Mnemonic::Int1 => machine.deliver(Event { vector: vector::DB, software: false }),
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => machine.iret(instruction),
        Mnemonic::Cmpxchg16b => machine.cmpxchg16b(instruction),
        other => machine
            .bit_instruction(instruction)
            .or_else(|| machine.system_instruction(instruction, cpu))
            .or_else(|| machine.fpu_instruction(instruction, cpu))
            .unwrap_or(Err(NotCompleted::Unknown(other).into())),
    }
}

/// Takes back the #UD that KVM queues along with an emulation failure: the vCPU is as it was before
/// the instruction, and can be run again from there.
///
/// # Errors
/// Those of the ioctls.
pub fn withdraw<V: Vcpu>(vcpu: &V) -> Result<(), hv_core::Error> {
    let mut events = vcpu.vcpu_events()?;
    let exception = &mut events.exception;
    if exception.nr != vector::UD || (exception.injected == 0 && exception.pending == 0) {
        return Ok(());
    }
    *exception = Default::default();
    events.exception_has_payload = 0;
    events.flags &= KVM_VCPUEVENT_VALID_PAYLOAD;
    vcpu.set_vcpu_events(&events)
}

/// The events of the vCPU without the #UD that KVM queues along with an emulation failure, with
/// the interrupt shadow ended, and marked so that setting them touches nothing that another thread
/// may change meanwhile (pending NMI, SIPI, SMM).
fn idle_events(mut events: kvm_vcpu_events) -> Result<kvm_vcpu_events, NotCompleted> {
    let exception = &mut events.exception;
    if (exception.injected != 0 || exception.pending != 0) && exception.nr != vector::UD {
        return Err(NotCompleted::EventInFlight(exception.nr));
    }
    *exception = Default::default();
    events.exception_has_payload = 0;
    events.interrupt.shadow = 0;
    events.flags &= KVM_VCPUEVENT_VALID_PAYLOAD;
    events.flags |= KVM_VCPUEVENT_VALID_SHADOW;
    Ok(events)
}

/// KVM delivers one event at a time and would lose this one.
fn room_for_exception(events: &kvm_vcpu_events) -> Result<(), NotCompleted> {
    if events.interrupt.injected != 0 {
        return Err(NotCompleted::EventInFlight(events.interrupt.nr));
    }
    if events.nmi.injected != 0 {
        return Err(NotCompleted::EventInFlight(2));
    }
    Ok(())
}

/// Gives the vCPU the state after the instruction, and the single-step trap if one is due.
fn finish<C: Cpu, M>(
    cpu: &C,
    machine: &Machine<'_, M>,
    events: &mut kvm_vcpu_events,
    trap: bool,
) -> Result<(), NotCompleted> {
    if machine.flush_tlb {
        // KVM rebuilds its MMU, TLB included, when CR4 changes, and does nothing when CR3 is
        // set to what it is.
        let cr4 = machine.sregs.cr4 ^ cr4::PGE;
        cpu.set_sregs(&kvm_sregs { cr4, ..machine.sregs })?;
    }
    if machine.sregs_changed || machine.flush_tlb {
        cpu.set_sregs(&machine.sregs)?;
    }
    cpu.set_regs(&machine.regs)?;
    if machine.nmi_unblocked {
        events.nmi.masked = 0;
    }
    if trap {
        let mut debug = cpu.debug_regs()?;
        debug.dr6 |= DR6_SINGLE_STEP;
        cpu.set_debug_regs(&debug)?;
        events.exception.injected = 1;
        events.exception.nr = vector::DB;
    }
    // Last: setting the registers clears a pending exception.
    Ok(cpu.set_events(events)?)
}

/// Queues an exception at the instruction, with the registers as they were before it.
fn raise<C: Cpu>(
    cpu: &C,
    mut regs: kvm_regs,
    mut sregs: kvm_sregs,
    events: &mut kvm_vcpu_events,
    fault: Fault,
) -> Result<(), NotCompleted> {
    if let Some(address) = fault.cr2 {
        sregs.cr2 = address;
        cpu.set_sregs(&sregs)?;
    }
    // The saved image of a fault has RF set, so that a code breakpoint does not hit again.
    regs.rflags |= rflags::RF;
    cpu.set_regs(&regs)?;
    let exception = &mut events.exception;
    exception.injected = 1;
    exception.nr = fault.vector;
    let protected = sregs.cr0 & machine::cr0::PE != 0;
    if let Some(code) = fault.error_code.filter(|_| protected) {
        exception.has_error_code = 1;
        exception.error_code = code;
    }
    Ok(cpu.set_events(events)?)
}

#[cfg(test)]
mod tests {
    use hv_core::mock::MockVcpu;
    use hv_core::{Errno, Error, Ioctl};

    use super::testing::{CODE, Guest, SharedCpu, long_mode, protected_mode, real_mode};
    use super::*;

    const NOP_LIKE: &[u8] = &[0x9b]; // fwait

    #[test]
    fn the_ud_of_the_failed_emulation_is_taken_back() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.events.exception.injected = 1;
        guest.cpu.events.exception.nr = 6;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Normally));
        assert_eq!(guest.cpu.events.exception, Default::default());
        assert_eq!(guest.cpu.regs.rip, CODE + 1);
    }

    #[test]
    fn a_failed_emulation_can_be_withdrawn_and_nothing_else_is() {
        let events = |nr, injected| {
            let mut events = kvm_vcpu_events::default();
            (events.exception.nr, events.exception.injected) = (nr, injected);
            events.interrupt.shadow = 1;
            events
        };
        let mut vcpu = MockVcpu::new();
        vcpu.expect_vcpu_events().once().return_const(Ok(events(6, 1)));
        vcpu.expect_set_vcpu_events()
            .withf(|it| it.exception == Default::default() && it.interrupt.shadow == 1)
            .once()
            .return_const(Ok(()));
        withdraw(&vcpu).unwrap();
        for (nr, injected) in [(6, 0), (14, 1), (0, 0)] {
            vcpu.expect_vcpu_events().once().return_const(Ok(events(nr, injected)));
            withdraw(&vcpu).unwrap();
        }
    }

    #[test]
    fn another_exception_in_flight_is_left_alone() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.events.exception.pending = 1;
        guest.cpu.events.exception.nr = 14;
        let before = guest.cpu.clone();
        assert_eq!(guest.complete(NOP_LIKE), Err(NotCompleted::EventInFlight(14)));
        assert_eq!(guest.cpu, before);
    }

    #[test]
    fn the_interrupt_shadow_ends_and_foreign_events_are_not_set() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.events.interrupt.shadow = 1;
        guest.cpu.events.nmi.masked = 1;
        guest.cpu.events.flags = 0xf;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Normally));
        assert_eq!(guest.cpu.events.interrupt.shadow, 0);
        assert_eq!(guest.cpu.events.nmi.masked, 1);
        assert_eq!(guest.cpu.events.flags, KVM_VCPUEVENT_VALID_SHADOW);
    }

    #[test]
    fn an_interrupt_in_flight_stays_but_leaves_no_room_for_an_exception() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.events.interrupt.injected = 1;
        guest.cpu.events.interrupt.nr = 0x30;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Normally));
        assert_eq!(guest.cpu.events.interrupt.injected, 1);
        let before = guest.cpu.clone();
        assert_eq!(guest.complete(&[0x0f, 0x0b]), Err(NotCompleted::EventInFlight(0x30)));
        assert_eq!(guest.cpu, before);
        guest.cpu.regs.rflags |= rflags::TF;
        assert_eq!(guest.complete(NOP_LIKE), Err(NotCompleted::EventInFlight(0x30)));
    }

    #[test]
    fn single_stepping_traps_after_the_instruction() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.regs.rflags |= rflags::TF;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Exception(1)));
        assert_eq!(guest.cpu.regs.rip, CODE + 1);
        let exception = guest.cpu.events.exception;
        assert_eq!((exception.injected, exception.nr, exception.has_error_code), (1, 1, 0));
        assert_eq!(guest.cpu.debug.dr6, 1 << 14);
        assert_eq!(guest.cpu.regs.rflags & rflags::RF, 0);
    }

    #[test]
    fn rf_is_cleared_by_completion_and_set_by_a_fault() {
        let mut guest = Guest::new(long_mode());
        guest.cpu.regs.rflags |= rflags::RF;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Normally));
        assert_eq!(guest.cpu.regs.rflags & rflags::RF, 0);
        assert_eq!(guest.complete(&[0x0f, 0x0b]), Ok(Completed::Exception(6)), "ud2");
        assert_ne!(guest.cpu.regs.rflags & rflags::RF, 0);
        assert_eq!(guest.cpu.regs.rip, CODE + 1, "at the ud2");
    }

    #[test]
    fn error_codes_exist_in_protected_mode_only() {
        // movbe [bx], ax beyond the data segment.
        let bytes = [0x0f, 0x38, 0xf1, 0x07];
        let mut guest = Guest::new(real_mode());
        guest.cpu.regs.rbx = 0xffff;
        assert_eq!(guest.complete(&bytes), Ok(Completed::Exception(13)));
        assert_eq!(guest.cpu.events.exception.has_error_code, 0);

        let mut guest = Guest::new(protected_mode());
        guest.cpu.regs.rdi = 0xffff;
        guest.cpu.sregs.ds.limit = 0xffff;
        assert_eq!(guest.complete(&bytes), Ok(Completed::Exception(13)));
        assert_eq!(guest.cpu.events.exception.has_error_code, 1);
        assert_eq!(guest.cpu.events.exception.error_code, 0);
    }

    #[test]
    fn the_instruction_pointer_wraps_with_its_width() {
        let mut guest = Guest::new(real_mode());
        guest.cpu.regs.rip = 0xffff;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Normally));
        assert_eq!(guest.cpu.regs.rip, 0);
        let mut guest = Guest::new(protected_mode());
        guest.cpu.regs.rip = 0xffff_ffff;
        assert_eq!(guest.complete(NOP_LIKE), Ok(Completed::Normally));
        assert_eq!(guest.cpu.regs.rip, 0);
    }

    #[test]
    fn a_call_that_fails_is_named() {
        let failed = Error::new(Ioctl::GetSregs, Errno::EIO);
        let mut vcpu = MockVcpu::new();
        vcpu.expect_vcpu_events().return_const(Ok(kvm_vcpu_events::default()));
        vcpu.expect_regs().return_const(Ok(kvm_regs::default()));
        vcpu.expect_sregs().return_const(Err(failed));
        let guest = Guest::new(long_mode());
        let result = Completer::default().complete(&vcpu, &guest.memory, NOP_LIKE);
        assert_eq!(result, Err(NotCompleted::Hypervisor(failed)));
    }

    #[test]
    fn completions_are_counted_and_failures_are_not() {
        let guest = Guest::new(long_mode());
        let cpu = SharedCpu::new(guest.cpu.clone());
        let mut completer = Completer::default();
        for bytes in [NOP_LIKE, &[0x0f, 0x0b], NOP_LIKE] {
            completer.complete_on(&cpu, &guest.memory, bytes).unwrap();
        }
        completer.complete_on(&cpu, &guest.memory, &[0x0f, 0x58, 0xc1]).unwrap_err();
        let mut counts: Vec<_> = completer.counts().iter().collect();
        counts.sort();
        assert_eq!(counts, [("fwait".to_owned(), 2), ("ud2".to_owned(), 1)]);
    }
}
