//! The state of a vCPU: what it is after reset, and what can't be set. Measured on Linux 6.18 where
//! no manual says it.

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_DB, kvm_clock_data, kvm_cpuid_entry2, kvm_fpu,
    kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};

use super::{errno, vm_with_irqchip};
use crate::fake::{FakeKvm, FakeVcpu};
use crate::{Capability, Errno, Hypervisor, Vcpu, VcpuExit, Vm};

fn vcpu() -> FakeVcpu {
    FakeKvm::default().create_vm(0).unwrap().create_vcpu(0).unwrap()
}

const REFUSED: Result<(), Errno> = Err(Errno::EINVAL);

#[test]
fn after_reset() {
    let vm = vm_with_irqchip(&FakeKvm::default());
    let [boot, other] = [0, 1].map(|id| vm.create_vcpu(id).unwrap());
    let regs = boot.regs().unwrap();
    assert_eq!((regs.rip, regs.rflags, regs.rdx, regs.rax), (0xfff0, 2, 0x600, 0));
    let sregs = boot.sregs().unwrap();
    assert_eq!((sregs.cs.base, sregs.cs.selector, sregs.cs.type_), (0xffff_0000, 0xf000, 11));
    assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x6000_0010, 0, 0));
    assert_eq!((sregs.tr.type_, sregs.ldt.type_, sregs.gdt.limit), (11, 2, 0xffff));
    assert_eq!(sregs.apic_base, 0xfee0_0900);
    assert_eq!(other.sregs().unwrap().apic_base, 0xfee0_0800);
    assert_eq!(boot.fpu().unwrap().fcw, 0x37f);
    assert_eq!(
        (boot.debugregs().unwrap().dr6, boot.debugregs().unwrap().dr7),
        (0xffff_0ff0, 0x400)
    );
    let xcrs = boot.xcrs().unwrap();
    assert_eq!((xcrs.nr_xcrs, xcrs.xcrs[0].value), (1, 1));
    assert_eq!((boot.mp_state().unwrap().mp_state, other.mp_state().unwrap().mp_state), (0, 1));
    assert_eq!(boot.vcpu_events().unwrap().flags, 0xd);
    assert_eq!(vcpu().vcpu_events().unwrap().flags, 0xd);
    let lapic = boot.lapic().unwrap();
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[at + i] as u8));
    assert_eq!((word(0x30), word(0xe0), word(0xf0)), (0x5_0014, u32::MAX, 0xff));
    assert_eq!((word(0x350), word(0x360)), (0x700, 0x1_0000));
}

#[test]
fn what_is_set_is_read_back() {
    let vcpu = vcpu();
    let mut regs = vcpu.regs().unwrap();
    (regs.rax, regs.rip) = (1, 0x1000);
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.regs().unwrap(), regs);
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cr3, sregs.cr8) = (0x1000, 0x2000, 5);
    vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(vcpu.sregs().unwrap(), sregs);
    let fpu = kvm_fpu { fcw: 0x27f, ftwx: 3, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).unwrap();
    assert_eq!(vcpu.fpu().unwrap(), kvm_fpu { mxcsr: 0, ..fpu }, "KVM_GET_FPU has no MXCSR");
    let mut debugregs = vcpu.debugregs().unwrap();
    debugregs.db = [1, 2, 3, 4];
    vcpu.set_debugregs(&debugregs).unwrap();
    assert_eq!(vcpu.debugregs().unwrap(), debugregs);
}

#[test]
fn cr8_is_the_task_priority_of_the_local_apic() {
    let vcpu = vm_with_irqchip(&FakeKvm::default()).create_vcpu(0).unwrap();
    let sregs = vcpu.sregs().unwrap();
    vcpu.set_sregs(&kvm_sregs { cr8: 5, ..sregs }).unwrap();
    let mut lapic = vcpu.lapic().unwrap();
    assert_eq!(lapic.regs[0x80], 0x50);
    lapic.regs[0x80] = 0x30;
    vcpu.set_lapic(&lapic).unwrap();
    assert_eq!(vcpu.sregs().unwrap().cr8, 3);
}

#[test]
fn states_the_architecture_does_not_have() {
    let vcpu = vcpu();
    let sregs = vcpu.sregs().unwrap();
    for (what, change, answer) in [
        ("nothing", kvm_sregs { ..sregs }, Ok(())),
        ("PG without PE", kvm_sregs { cr0: 0x8000_0010, ..sregs }, REFUSED),
        ("NW without CD", kvm_sregs { cr0: 0x2000_0010, ..sregs }, REFUSED),
        ("high half of CR0", kvm_sregs { cr0: 1 << 32, ..sregs }, REFUSED),
        ("LMA alone", kvm_sregs { efer: 0x400, ..sregs }, REFUSED),
        ("LME alone", kvm_sregs { efer: 0x100, ..sregs }, Ok(())),
        ("CR4 bit 31", kvm_sregs { cr4: 1 << 31, ..sregs }, REFUSED),
        ("PAE", kvm_sregs { cr4: 1 << 5, ..sregs }, Ok(())),
        ("APIC_BASE bit 0", kvm_sregs { apic_base: 0xfee0_0901, ..sregs }, REFUSED),
        ("x2APIC without CPUID", kvm_sregs { apic_base: 0xfee0_0d00, ..sregs }, REFUSED),
        ("x2APIC off", kvm_sregs { apic_base: 0xfee0_0500, ..sregs }, REFUSED),
        ("long mode", kvm_sregs { cr0: 0x8000_0011, cr4: 1 << 5, efer: 0x500, ..sregs }, Ok(())),
        ("long mode without PAE", kvm_sregs { cr0: 0x8000_0011, efer: 0x500, ..sregs }, REFUSED),
    ] {
        assert_eq!(errno(vcpu.set_sregs(&change)), answer, "{what}");
    }
    let mut debugregs = vcpu.debugregs().unwrap();
    debugregs.flags = 1;
    assert_eq!(errno(vcpu.set_debugregs(&debugregs)), REFUSED);
    (debugregs.flags, debugregs.dr7) = (0, 1 << 32);
    assert_eq!(errno(vcpu.set_debugregs(&debugregs)), REFUSED);
}

#[test]
fn xcr0_must_be_what_cpuid_says() {
    let kvm = FakeKvm::default();
    let vcpu = kvm.create_vm(0).unwrap().create_vcpu(0).unwrap();
    let set = |value| {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = kvm_xcr { value, ..Default::default() };
        errno(vcpu.set_xcrs(&xcrs))
    };
    assert_eq!(set(7), REFUSED, "no CPUID yet");
    vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    assert_eq!((set(7), set(3), set(1)), (Ok(()), Ok(()), Ok(())));
    assert_eq!((set(0), set(5), set(15)), (REFUSED, REFUSED, REFUSED));
    let many = kvm_xcrs { nr_xcrs: 17, ..Default::default() };
    assert_eq!(errno(vcpu.set_xcrs(&many)), REFUSED);
}

#[test]
fn run_states() {
    let alone = vcpu();
    let beside = vm_with_irqchip(&FakeKvm::default()).create_vcpu(1).unwrap();
    for state in 0..=10 {
        let set = |vcpu: &FakeVcpu| errno(vcpu.set_mp_state(kvm_mp_state { mp_state: state }));
        assert_eq!(set(&alone), if state == 0 { Ok(()) } else { REFUSED }, "{state}");
        let allowed = matches!(state, 0..=4 | 9);
        assert_eq!(set(&beside), if allowed { Ok(()) } else { REFUSED }, "{state}");
        if allowed {
            // Having received its start-up message, a vCPU runs.
            let shown = if state == 4 { 0 } else { state };
            assert_eq!(beside.mp_state().unwrap().mp_state, shown);
        }
    }
}

#[test]
fn cpuid_before_the_first_run() {
    let kvm = FakeKvm::default();
    let mut vcpu = kvm.create_vm(0).unwrap().create_vcpu(0).unwrap();
    let leaves = kvm.supported_cpuid().unwrap();
    assert_eq!(errno(vcpu.set_cpuid(&vec![leaves[0]; 257])), Err(Errno::E2BIG));
    assert_eq!(errno(vcpu.set_cpuid(&vec![leaves[0]; 256])), Ok(()));
    let odd = kvm_cpuid_entry2 { function: 0x8000_0008, eax: 0x2830, ..Default::default() };
    assert_eq!(errno(vcpu.set_cpuid(&[odd])), REFUSED, "40 linear address bits");
    vcpu.set_cpuid(&leaves).unwrap();
    // A run that is kicked at once has not run.
    crate::VcpuKick::kick(&vcpu.kicker()).unwrap();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupted));
    assert_eq!(errno(vcpu.set_cpuid(&leaves[1..])), Ok(()));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Hlt));
    assert_eq!(errno(vcpu.set_cpuid(&leaves[1..])), Ok(()), "the same");
    assert_eq!(errno(vcpu.set_cpuid(&leaves)), REFUSED);
    assert_eq!(vcpu.cpuid().unwrap(), &leaves[1..]);
}

#[test]
fn events() {
    let kvm = FakeKvm::default();
    let vm = kvm.create_vm(0).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let set = |flags, injected, pending, nr| {
        let mut events = kvm_vcpu_events { flags, ..Default::default() };
        (events.exception.injected, events.exception.pending) = (injected, pending);
        events.exception.nr = nr;
        errno(vcpu.set_vcpu_events(&events))
    };
    // Measured.
    assert_eq!((set(0, 0, 0, 0), set(13, 0, 0, 0)), (Ok(()), Ok(())));
    for flags in [16, 32, 64] {
        assert_eq!(set(flags, 0, 0, 0), REFUSED);
    }
    assert_eq!((set(0, 1, 0, 2), set(0, 1, 0, 32)), (REFUSED, REFUSED));
    assert_eq!(set(0, 0, 1, 40), Ok(()), "pending is not looked at without the payload flag");
    assert_eq!(set(0, 1, 0, 13), Ok(()));
    assert_eq!(vcpu.vcpu_events().unwrap().exception.nr, 13);

    let debug = |control| kvm_guest_debug { control, ..Default::default() };
    let inject = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_INJECT_DB;
    assert_eq!(errno(vcpu.set_guest_debug(&debug(inject))), Err(Errno::EBUSY));
    vcpu.set_regs(&vcpu.regs().unwrap()).unwrap();
    assert_eq!(errno(vcpu.set_guest_debug(&debug(inject))), Ok(()), "KVM_SET_REGS clears it");

    vm.enable_cap(Capability::ExceptionPayload, [1, 0, 0, 0]).unwrap();
    assert_eq!(set(16, 0, 1, 14), Ok(()));
    assert_eq!(vcpu.vcpu_events().unwrap().flags, 0xd | 16);
    assert_eq!(set(16, 0, 1, 40), REFUSED);
}

#[test]
fn msrs_up_to_the_first_that_does_not_exist() {
    let vcpu = vcpu();
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let list = [entry(0x10, 7), entry(0x174, 8), entry(0x4711, 9), entry(0x175, 10)];
    assert_eq!(vcpu.set_msrs(&list), Ok(2));
    let mut read = [entry(0x174, 0), entry(0x175, 99), entry(0x1b, 0), entry(0x4711, 5)];
    assert_eq!(vcpu.msrs(&mut read), Ok(3));
    assert_eq!(read.map(|entry| entry.data), [8, 0, 0xfee0_0900, 5]);
    assert_eq!(errno(vcpu.msrs(&mut vec![entry(0x10, 0); 256])), Err(Errno::E2BIG));
    assert_eq!(vcpu.msrs(&mut vec![entry(0x10, 0); 255]), Ok(255));
    assert_eq!(vcpu.set_msrs(&[entry(0x1b, 1)]), Ok(0));
}

#[test]
fn the_clock_stands_still() {
    let vm = FakeKvm::default().create_vm(0).unwrap();
    let clock = |flags| kvm_clock_data { clock: 5, flags, ..Default::default() };
    assert_eq!(
        (errno(vm.set_clock(&clock(1))), errno(vm.set_clock(&clock(16)))),
        (REFUSED, REFUSED)
    );
    vm.set_clock(&clock(2)).unwrap();
    assert_eq!(vm.clock(), Ok(clock(0)));
}

#[test]
fn translation_without_paging() {
    let answer = vcpu().translate(0x1234).unwrap();
    assert_eq!((answer.physical_address, answer.valid), (0x1234, 1));
}
