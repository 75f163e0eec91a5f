//! Real-mode code on real KVM: every exit it can make, with all of its data, and the registers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod common;

use common::{CODE, UNMAPPED, begin, next_exit, real_mode, store, vm_with};
use hv_core::{
    Errno, ExitReply, Hypervisor, INTERNAL_ERROR_EMULATION, IoDirection, IoExit, Ioctl, MmioExit,
    Vcpu, VcpuExit, Vm,
};
use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_MP_STATE_RUNNABLE, kvm_guest_debug,
    kvm_mp_state, kvm_msr_entry,
};

const HLT: u8 = 0xf4;
const MSR_IA32_SYSENTER_CS: u32 = 0x174;
const MSR_IA32_SYSENTER_ESP: u32 = 0x175;

#[test]
fn port_output_of_every_size() {
    #[rustfmt::skip]
    let (_vm, mut vcpu, _) = real_mode(&[
        0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
        0xba, 0x34, 0x12,                   // mov dx, 0x1234
        0xee,                               // out dx, al
        0xef,                               // out dx, ax
        0x66, 0xef,                         // out dx, eax
        HLT,
    ]);
    for size in [1, 2, 4] {
        let direction = IoDirection::Out;
        let expected = IoExit { direction, port: 0x1234, size, count: 1 };
        assert_eq!(next_exit(&mut vcpu), VcpuExit::Io(expected));
        assert_eq!(vcpu.io_data(), &[0x78, 0x56, 0x34, 0x12][..usize::from(size)]);
    }
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
    assert!(vcpu.io_data().is_empty(), "a halt has no data");
}

#[test]
fn port_input_of_every_size() {
    #[rustfmt::skip]
    let (_vm, mut vcpu, _) = real_mode(&[
        0x66, 0x31, 0xc0, // xor eax, eax
        0xe4, 0x10,       // in al, 0x10
        0x88, 0xc3,       // mov bl, al
        0xe5, 0x10,       // in ax, 0x10
        0x89, 0xc1,       // mov cx, ax
        0x66, 0xe5, 0x10, // in eax, 0x10
        HLT,
    ]);
    for size in [1, 2, 4] {
        let direction = IoDirection::In;
        let expected = IoExit { direction, port: 0x10, size, count: 1 };
        assert_eq!(next_exit(&mut vcpu), VcpuExit::Io(expected));
        vcpu.io_data().copy_from_slice(&[0x11 * size, 0x22, 0x33, 0x44][..usize::from(size)]);
    }
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rbx & 0xff, regs.rcx & 0xffff, regs.rax), (0x11, 0x2222, 0x4433_2244));
}

#[test]
fn string_output_keeps_every_byte() {
    let text: Vec<u8> = (0..300u16).map(|n| n as u8).collect();
    #[rustfmt::skip]
    let (_vm, mut vcpu, memory) = real_mode(&[
        0xbe, 0x00, 0x18, // mov si, 0x1800
        0xb9, 0x2c, 0x01, // mov cx, 300
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xf3, 0x6e,       // rep outsb
        HLT,
    ]);
    store(&memory, 0x800, &text);
    let mut seen = Vec::new();
    while let VcpuExit::Io(io) = next_exit(&mut vcpu) {
        assert_eq!((io.direction, io.port, io.size), (IoDirection::Out, 0x3f8, 1));
        assert_eq!(vcpu.io_data().len(), io.count as usize);
        seen.extend_from_slice(vcpu.io_data());
    }
    assert_eq!(seen, text);
}

#[test]
fn string_input_fills_all_of_a_count() {
    #[rustfmt::skip]
    let (_vm, mut vcpu, memory) = real_mode(&[
        0xbf, 0x00, 0x18, // mov di, 0x1800
        0xb9, 0x64, 0x00, // mov cx, 100
        0xba, 0x60, 0x00, // mov dx, 0x60
        0xf3, 0x6d,       // rep insw
        HLT,
    ]);
    let (mut next, mut longest) = (0u16, 0);
    while let VcpuExit::Io(io) = next_exit(&mut vcpu) {
        assert_eq!((io.direction, io.port, io.size), (IoDirection::In, 0x60, 2));
        longest = longest.max(io.count);
        let data = vcpu.io_data();
        assert_eq!(data.len(), 2 * io.count as usize);
        for word in data.chunks_exact_mut(2) {
            word.copy_from_slice(&next.to_le_bytes());
            next += 1;
        }
    }
    assert_eq!(next, 100);
    assert!(longest > 1, "KVM reads ahead for a string instruction");
    let expected: Vec<u8> = (0..100u16).flat_map(u16::to_le_bytes).collect();
    assert_eq!(common::load(&memory, 0x800, 200), expected);
}

#[test]
fn mmio_of_every_size() {
    #[rustfmt::skip]
    let (_vm, mut vcpu, _) = real_mode(&[
        0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
        0xa2, 0x00, 0xe0,                   // mov [0xe000], al
        0xa3, 0x00, 0xe0,                   // mov [0xe000], ax
        0x66, 0xa3, 0x00, 0xe0,             // mov [0xe000], eax
        0x66, 0xa1, 0x04, 0xe0,             // mov eax, [0xe004]
        HLT,
    ]);
    for len in [1, 2, 4] {
        let VcpuExit::Mmio(mmio) = next_exit(&mut vcpu) else { panic!("no MMIO exit") };
        assert_eq!((mmio.address, mmio.len), (UNMAPPED, len));
        let written = mmio.written.expect("a write");
        assert_eq!(written[..usize::from(len)], [0x78, 0x56, 0x34, 0x12][..usize::from(len)]);
    }
    let read = MmioExit { address: UNMAPPED + 4, len: 4, written: None };
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Mmio(read));
    vcpu.reply(ExitReply::Mmio([0xef, 0xbe, 0xad, 0xde, 0xff, 0xff, 0xff, 0xff]));
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Hlt);
    assert_eq!(vcpu.regs().unwrap().rax, 0xdead_beef);
}

#[test]
fn an_answer_is_taken_even_if_a_kick_ends_the_run() {
    use hv_core::VcpuKick;
    let (_vm, mut vcpu, _) = real_mode(&[0xe4, 0x10, HLT]); // in al, 0x10
    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Io(_)));
    vcpu.io_data()[0] = 0x5a;
    vcpu.kicker().kick().unwrap();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupted);
    assert!(vcpu.io_data().is_empty());
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rax & 0xff, regs.rip), (0x5a, CODE + 2));
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let (_vm, mut vcpu, _) = real_mode(&[0x0f, 0x0b]); // ud2
    let mut sregs = vcpu.sregs().unwrap();
    sregs.idt.limit = 0;
    vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(next_exit(&mut vcpu), VcpuExit::Shutdown);
}

#[test]
fn code_where_there_is_no_memory_is_an_emulation_failure() {
    let (_vm, mut vcpu, _) = real_mode(&[HLT]);
    begin(&vcpu, UNMAPPED);
    let VcpuExit::InternalError(error) = next_exit(&mut vcpu) else {
        panic!("no internal error");
    };
    assert_eq!(error.suberror, INTERNAL_ERROR_EMULATION);
}

#[test]
fn an_interrupt_is_injected_through_the_window() {
    #[rustfmt::skip]
    let (vm, memory) = vm_with(&[
        0xfa,                   // cli
        0xe6, 0x01,             // out 1, al
        0xfb,                   // sti
        0x90,                   // nop
        0x90,                   // nop
        0xeb, 0xfe,             // jmp $
        0xe6, 0x02,             // handler: out 2, al
        HLT,
    ], 1);
    // The vector table of real mode: vector 0x20 is at 0x80.
    let table = common::pages(1);
    store(&table, 0x80, &[0x08, 0x10, 0x00, 0x00]);
    use hv_core::MemoryBackend;
    vm.set_memory_slot(&common::slot(1, 0, &table)).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    assert_eq!(common::load(&memory, 8, 2), [0xe6, 0x02]);

    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Io(IoExit { port: 1, .. })));
    let state = vcpu.interrupt_state();
    assert!(!state.if_flag && !state.ready_for_injection, "{state:?}");
    vcpu.request_interrupt_window(true);
    assert_eq!(next_exit(&mut vcpu), VcpuExit::IrqWindowOpen);
    let state = vcpu.interrupt_state();
    assert!(state.if_flag && state.ready_for_injection, "{state:?}");
    vcpu.request_interrupt_window(false);
    vcpu.interrupt(0x20).unwrap();
    assert!(matches!(next_exit(&mut vcpu), VcpuExit::Io(IoExit { port: 2, .. })));
}

#[test]
fn a_single_step_is_a_debug_exit() {
    let (_vm, mut vcpu, _) = real_mode(&[0x90, 0x90, HLT]);
    vcpu.set_guest_debug(&kvm_guest_debug {
        control: KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP,
        ..Default::default()
    })
    .unwrap();
    let VcpuExit::Debug { exception, pc, .. } = next_exit(&mut vcpu) else {
        panic!("no debug exit");
    };
    assert_eq!((exception, pc), (1, CODE + 1));
}

#[test]
fn register_groups_are_read_as_they_were_set() {
    let (_vm, vcpu, _) = real_mode(&[HLT]);

    let mut regs = vcpu.regs().unwrap();
    (regs.rax, regs.r15) = (0x0123_4567_89ab_cdef, u64::MAX);
    vcpu.set_regs(&regs).unwrap();
    assert_eq!(vcpu.regs().unwrap(), regs);

    let mut sregs = vcpu.sregs().unwrap();
    sregs.gdt.base = 0x1234_5000;
    vcpu.set_sregs(&sregs).unwrap();
    assert_eq!(vcpu.sregs().unwrap(), sregs);

    let mut fpu = vcpu.fpu().unwrap();
    fpu.fcw = 0x027f;
    fpu.xmm[3] = [7; 16];
    vcpu.set_fpu(&fpu).unwrap();
    let read = vcpu.fpu().unwrap();
    assert_eq!((read.fcw, read.xmm[3]), (0x027f, [7; 16]));

    let mut debugregs = vcpu.debugregs().unwrap();
    debugregs.db[0] = 0x4000;
    vcpu.set_debugregs(&debugregs).unwrap();
    assert_eq!(vcpu.debugregs().unwrap().db[0], 0x4000);

    let xcrs = vcpu.xcrs().unwrap();
    vcpu.set_xcrs(&xcrs).unwrap();

    let mut events = vcpu.vcpu_events().unwrap();
    assert_eq!(events.nmi.pending, 0);
    events.nmi.pending = 1;
    events.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING;
    vcpu.set_vcpu_events(&events).unwrap();
    assert_eq!(vcpu.vcpu_events().unwrap().nmi.pending, 1);

    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    vcpu.set_mp_state(runnable).unwrap();
    assert_eq!(vcpu.mp_state().unwrap().mp_state, KVM_MP_STATE_RUNNABLE);

    assert!(vcpu.tsc_khz().unwrap() > 0);
    let translation = vcpu.translate(CODE + 5).unwrap();
    assert_eq!((translation.physical_address, translation.valid), (CODE + 5, 1));
}

#[test]
fn a_non_maskable_interrupt_becomes_pending() {
    let (_vm, vcpu, _) = real_mode(&[HLT]);
    vcpu.nmi().unwrap();
    let nmi = vcpu.vcpu_events().unwrap().nmi;
    assert_eq!(nmi.pending + nmi.injected, 1);
}

#[test]
fn registers_are_counted_up_to_the_first_that_fails() {
    let (_vm, vcpu, _) = real_mode(&[HLT]);
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let (cs, esp, none) = (MSR_IA32_SYSENTER_CS, MSR_IA32_SYSENTER_ESP, 0x4b4b_4b4b);

    let set = [entry(cs, 8), entry(none, 1), entry(esp, 9)];
    assert_eq!(vcpu.set_msrs(&set).unwrap(), 1);
    let mut read = [entry(cs, 0), entry(esp, 1), entry(none, 77)];
    assert_eq!(vcpu.msrs(&mut read).unwrap(), 2);
    assert_eq!(read.map(|e| e.data), [8, 0, 77]);
    assert_eq!(vcpu.msrs(&mut []).unwrap(), 0);

    let many = vec![entry(cs, 0); 257];
    let error = vcpu.set_msrs(&many).unwrap_err();
    assert_eq!((error.call, error.errno), (Ioctl::SetMsrs.into(), Errno::E2BIG));
}

#[test]
fn cpuid_is_what_was_set() {
    let leaves = common::kvm().supported_cpuid().unwrap();
    assert!(leaves.iter().any(|leaf| leaf.function == 0x8000_0000));
    let (_vm, vcpu, _) = real_mode(&[HLT]);
    vcpu.set_cpuid(&leaves).unwrap();
    let functions = |leaves: &[kvm_bindings::kvm_cpuid_entry2]| -> Vec<(u32, u32)> {
        leaves.iter().map(|leaf| (leaf.function, leaf.index)).collect()
    };
    assert_eq!(functions(&vcpu.cpuid().unwrap()), functions(&leaves));

    let many = vec![leaves[0]; 257];
    assert_eq!(vcpu.set_cpuid(&many).unwrap_err().errno, Errno::E2BIG);
}

#[test]
fn errors_name_the_ioctl_the_vcpu_and_the_errno() {
    let (vm, vcpu, _) = real_mode(&[HLT]);
    let text = vcpu.lapic().unwrap_err().to_string();
    assert!(text.starts_with("KVM_GET_LAPIC on vCPU 0 failed: EINVAL"), "{text}");
    let text = vm.create_vcpu(0).unwrap_err().to_string();
    assert!(text.starts_with("KVM_CREATE_VCPU on vCPU 0 failed: EEXIST"), "{text}");
    let text = vm.create_vcpu(u32::MAX).unwrap_err().to_string();
    assert!(text.starts_with("KVM_CREATE_VCPU on vCPU 4294967295 failed: EINVAL"), "{text}");
}
