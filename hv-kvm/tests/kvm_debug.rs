//! Guest debugging (`KVM_SET_GUEST_DEBUG`) of 64-bit code at CPL 0 on real KVM: what a debugger may rely
//! on. Where software KVM, which interprets such code, answers otherwise than hardware
//! virtualization, either is right.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use common::{CODE, kvm, next_exit, store, vm_with};
use hv_core::{
    ExitReply, HostRange, Hypervisor, INTERNAL_ERROR_EMULATION, Vcpu, VcpuExit, VcpuKick,
};
use hv_kvm::{KvmVcpu, KvmVm};
use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug, kvm_regs, kvm_segment,
};

const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
const PD: u64 = 0x4000;
const DR6_B0: u64 = 1;

/// A vCPU about to run `code` in 64-bit mode; the first 2 MiB are mapped to themselves.
fn long_mode(code: &[u8]) -> (KvmVm, KvmVcpu, HostRange) {
    use hv_core::Vm;
    kvm().install_kick().unwrap();
    let (vm, memory) = vm_with(code, 4);
    for (table, entry) in [(PML4, PDPT | 3), (PDPT, PD | 3), (PD, 0x83)] {
        store(&memory, (table - CODE) as usize, &entry.to_le_bytes());
    }
    let vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.sregs().unwrap();
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x18,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 0x10, type_: 11, db: 0, l: 1, ..data };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, PML4, 0x20, 0x500);
    vcpu.set_sregs(&sregs).unwrap();
    let regs = kvm_regs { rip: CODE, rsp: PML4, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).unwrap();
    (vm, vcpu, memory)
}

fn set_debug(vcpu: &KvmVcpu, control: u32, breakpoint: Option<u64>) {
    let mut debug =
        kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | control, ..Default::default() };
    if let Some(address) = breakpoint {
        // Enabled globally, execution.
        (debug.arch.debugreg[0], debug.arch.debugreg[7]) = (address, 0x402);
    }
    vcpu.set_guest_debug(&debug).unwrap();
}

fn debug_exit(exit: VcpuExit) -> (u32, u64, u64) {
    match exit {
        VcpuExit::Debug { exception, pc, dr6, .. } => (exception, pc, dr6),
        other => panic!("no debug exit: {other:?}"),
    }
}

#[test]
fn a_hardware_breakpoint_stops_before_its_instruction_and_again_until_it_is_gone() {
    let (_vm, mut vcpu, _) = long_mode(&[0x90, 0x90, 0x90, 0xf4]); // nop, nop, nop, hlt
    set_debug(&vcpu, KVM_GUESTDBG_USE_HW_BP, Some(CODE + 2));
    for _ in 0..2 {
        let (exception, pc, dr6) = debug_exit(next_exit(&mut vcpu));
        assert_eq!((exception, pc, dr6 & 0xf), (1, CODE + 2, DR6_B0));
        assert_eq!(vcpu.regs().unwrap().rip, CODE + 2);
    }
    vcpu.set_guest_debug(&kvm_guest_debug::default()).unwrap();
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
}

#[test]
fn an_int3_leaves_the_vcpu_at_it() {
    let (_vm, mut vcpu, memory) = long_mode(&[0x90, 0xcc, 0xf4]); // nop, int3, hlt
    set_debug(&vcpu, KVM_GUESTDBG_USE_SW_BP, None);
    match next_exit(&mut vcpu) {
        VcpuExit::Debug { exception, pc, .. } => assert_eq!((exception, pc), (3, CODE + 1)),
        VcpuExit::InternalError(error) if error.suberror == INTERNAL_ERROR_EMULATION => {}
        other => panic!("an int3 became {other:?}"),
    }
    assert_eq!(vcpu.regs().unwrap().rip, CODE + 1);
    // What was there before is run when it is put back.
    store(&memory, 1, &[0x90]);
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
}

#[test]
fn a_step_over_an_access_ends_when_the_access_is_done() {
    // out 0x10, al; in al, 0x10; mov [0xe000], al; mov al, [0xe000]; hlt
    #[rustfmt::skip]
    let (_vm, mut vcpu, _) = long_mode(&[
        0xe6, 0x10,
        0xe4, 0x10,
        0x88, 0x04, 0x25, 0x00, 0xe0, 0x00, 0x00,
        0x8a, 0x04, 0x25, 0x00, 0xe0, 0x00, 0x00,
        0xf4,
    ]);
    set_debug(&vcpu, KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ, None);
    for next in [CODE + 2, CODE + 4, CODE + 11, CODE + 18] {
        // A kick of before may be left where KVM told the end of the step: that is passed over.
        let exit = next_exit(&mut vcpu);
        match exit {
            VcpuExit::Io(_) => vcpu.io_data().fill(1),
            VcpuExit::Mmio(_) => vcpu.reply(ExitReply::Mmio([2; 8])),
            other => panic!("{other:?}"),
        }
        vcpu.kicker().kick().unwrap();
        let exit = vcpu.run().unwrap();
        assert!(matches!(exit, VcpuExit::Interrupted | VcpuExit::Debug { .. }), "{exit:?}");
        assert_eq!(vcpu.regs().unwrap().rip, next);
    }
    assert_eq!(vcpu.regs().unwrap().rax & 0xff, 2);
}
