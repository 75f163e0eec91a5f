//! Every answer, filled with values, survives being written as text and read back.

use kvm_bindings as k;
use serde_json::Value;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::answer::{Answer, DirtyLog, MsrsRead, Ran, RanBefore, Told, fill_dirty_log, fill_msrs};
use super::{Names, NewVcpu, NewVm};
use crate::{
    Call, Capability, CoalescedWrite, Context, Errno, Error, EventFd, Gsi, InternalError,
    InterruptState, IoAddress, IoDirection, IoExit, Ioctl, LineStatus, MmioExit, MsiStatus,
    MsrIndexList, SlotId, VcpuExit,
};

fn text<T: Answer>(answer: &T) -> String {
    serde_json::to_string(&answer.json(&Names::default())).unwrap()
}

/// What is read from the text of `answer`; the text must be the same when written again.
fn again<T: Told + Answer>(answer: &T) -> T {
    let written = text(answer);
    let value: Value = serde_json::from_str(&written).unwrap();
    let read = T::from_json(value).unwrap_or_else(|e| panic!("{e}: {written}"));
    assert_eq!(text(&read), written);
    read
}

/// Bytes none of which is 0, so that every field is filled.
fn filled<T: FromBytes>() -> T {
    let bytes: Vec<u8> = (0..size_of::<T>()).map(|n| (n % 255 + 1) as u8).collect();
    T::read_from_bytes(&bytes).unwrap()
}

fn structure<T: Told + Answer + FromBytes + IntoBytes + Immutable>() {
    let all_zero = T::read_from_bytes(&vec![0; size_of::<T>()]).unwrap();
    let all_ones = T::read_from_bytes(&vec![0xff; size_of::<T>()]).unwrap();
    for answer in [filled::<T>(), all_zero, all_ones] {
        let read = again(&answer);
        assert_eq!(read.as_bytes(), answer.as_bytes(), "{}", text(&answer));
    }
}

#[test]
fn structures_of_kvm_bit_for_bit() {
    structure::<k::kvm_regs>();
    structure::<k::kvm_sregs>();
    structure::<k::kvm_xcrs>();
    structure::<k::kvm_debugregs>();
    structure::<k::kvm_mp_state>();
    structure::<k::kvm_vcpu_events>();
    structure::<k::kvm_lapic_state>();
    structure::<k::kvm_irqchip>();
    structure::<k::kvm_pit_state2>();
    structure::<k::kvm_clock_data>();
}

#[test]
fn structures_that_have_no_bytes_by_their_fields() {
    let mut fpu = k::kvm_fpu { fcw: 0x37f, fsw: 1, ftwx: 2, pad1: 3, ..Default::default() };
    (fpu.last_opcode, fpu.last_ip, fpu.last_dp) = (4, u64::MAX, 6);
    (fpu.mxcsr, fpu.pad2) = (0x1f80, 7);
    fpu.fpr.iter_mut().flatten().zip(1u8..).for_each(|(to, n)| *to = n);
    fpu.xmm.iter_mut().flatten().zip((1u8..=255).cycle()).for_each(|(to, n)| *to = n);
    assert_eq!(again(&fpu), fpu);
    let translation = k::kvm_translation {
        linear_address: u64::MAX,
        physical_address: 2,
        valid: 1,
        writeable: 2,
        usermode: 3,
        pad: [0, 5, 0, 7, 0],
    };
    assert_eq!(again(&translation), translation);
}

#[test]
fn registers_are_named_and_unused_ones_left_out() {
    let regs = k::kvm_regs { rip: 0xfff0, rflags: 2, ..Default::default() };
    assert!(text(&regs).ends_with("\"rip\":\"0xfff0\",\"rflags\":\"0x2\"}"), "{}", text(&regs));
    assert!(!text(&k::kvm_sregs::default()).contains("padding"));
    assert!(text(&filled::<k::kvm_sregs>()).contains("padding"));
}

#[test]
fn numbers_lists_and_statuses() {
    again(&());
    for number in [0, -1, i32::MAX, i32::MIN] {
        assert_eq!(again(&number), number);
    }
    assert_eq!(again(&u32::MAX), u32::MAX);
    assert_eq!(again(&usize::MAX), usize::MAX);
    let list = MsrIndexList { available: 3, indices: vec![0x10, 0xc000_0080, u32::MAX] };
    assert_eq!(again(&list), list);
    let cpuid: Vec<k::kvm_cpuid_entry2> = vec![filled(), Default::default()];
    assert_eq!(again(&cpuid), cpuid);
    for status in [LineStatus::Delivered(7), LineStatus::Coalesced, LineStatus::Ignored] {
        assert_eq!(again(&status), status);
    }
    for status in [MsiStatus::Delivered, MsiStatus::Blocked, MsiStatus::NoTarget] {
        assert_eq!(again(&status), status);
    }
}

#[test]
fn collected_writes() {
    again(&None::<CoalescedWrite>);
    for len in 1..=8 {
        let bytes = &[0, 1, 2, 3, 4, 5, 6, 0xff][..len];
        for address in [IoAddress::Mmio(u64::MAX), IoAddress::Pio(u16::MAX)] {
            let write = CoalescedWrite::new(address, bytes);
            assert_eq!(again(&write), write);
        }
    }
    use serde_json::json;
    for wrong in [
        json!({"mmio": "0x1", "data": ""}),
        json!({"mmio": "0x1", "data": "00".repeat(9)}),
        json!({"data": "00"}),
        json!({"mmio": "0x1", "pio": "0x1", "data": "00"}),
        json!({"pio": "0x10000", "data": "00"}),
        json!({"pio": "0x1"}),
    ] {
        assert!(Option::<CoalescedWrite>::from_json(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn errors_keep_call_errno_and_context() {
    let contexts = [
        Context::None,
        Context::Vcpu(3),
        Context::Gsi(Gsi(4)),
        Context::Routes(4096),
        Context::Slot { slot: SlotId(1), guest: u64::MAX, size: 0x1000 },
        Context::SlotId(SlotId(9)),
        Context::Address(0xfee0_0000),
        Context::Msr(0xc000_0080),
    ];
    for context in contexts {
        let error = Error::new(Ioctl::Irqfd, Errno::EBUSY).about(context);
        assert_eq!(again(&error), error);
    }
    for cap in Capability::ALL {
        let error = Error::new(Ioctl::EnableCap, Errno::EINVAL).about(Context::Capability(*cap));
        assert_eq!(again(&error), error);
    }
    for call in Call::all() {
        let error = Error::new(call, Errno(4000));
        assert_eq!(again(&error), error);
    }
    for errno in (0..5000).map(Errno) {
        let error = Error::new(Call::Mmap, errno);
        assert_eq!(again(&error), error);
    }
}

#[test]
fn dirty_logs_of_the_size_asked_for() {
    let bitmap = [0, u64::MAX, 0, 1 << 63, 0];
    let value: Value = serde_json::from_str(&text(&DirtyLog(&bitmap))).unwrap();
    let mut read = [7; 5];
    fill_dirty_log(value.clone(), &mut read).unwrap();
    assert_eq!(read, bitmap);
    assert!(fill_dirty_log(value, &mut [0; 4]).is_err());
    let beyond = serde_json::json!({"words": 1, "dirty": [[1, "0x1"]]});
    assert!(fill_dirty_log(beyond, &mut [0]).is_err());
    let huge = serde_json::json!({"words": u64::MAX, "dirty": []});
    assert!(fill_dirty_log(huge, &mut [0]).is_err());
}

#[test]
fn msrs_of_the_number_asked_for() {
    let entries: [k::kvm_msr_entry; 3] = [filled(), Default::default(), filled()];
    let written = text(&MsrsRead { count: 2, entries: &entries });
    let value: Value = serde_json::from_str(&written).unwrap();
    let mut read = [k::kvm_msr_entry::default(); 3];
    assert_eq!(fill_msrs(value.clone(), &mut read).unwrap(), 2);
    assert_eq!(read, entries);
    assert!(fill_msrs(value, &mut read[..2]).is_err());
    let lie = serde_json::json!({"count": 2, "entries": [{"index": "0x1", "data": "0x0"}]});
    assert!(fill_msrs(lie, &mut read[..1]).is_err());
}

#[test]
fn exits_with_their_data_and_the_state_of_interrupts() {
    let io = |direction| VcpuExit::Io(IoExit { direction, port: 0x3f8, size: 4, count: 3 });
    let mmio = |written| VcpuExit::Mmio(MmioExit { address: u64::MAX, len: 8, written });
    let data = std::array::from_fn(|n| if n % 3 == 0 { 0 } else { n as u64 });
    let exits = [
        io(IoDirection::In),
        io(IoDirection::Out),
        mmio(None),
        mmio(Some([0, 1, 2, 3, 4, 5, 6, 255])),
        VcpuExit::Hlt,
        VcpuExit::Interrupted,
        VcpuExit::IrqWindowOpen,
        VcpuExit::Shutdown,
        VcpuExit::FailEntry { reason: u64::MAX, cpu: 1 },
        VcpuExit::InternalError(InternalError { suberror: 1, ndata: 4, data }),
        VcpuExit::SystemEvent { kind: 2, ndata: 99, data },
        VcpuExit::IoapicEoi { vector: 0xff },
        VcpuExit::Debug { exception: 1, pc: 2, dr6: 3, dr7: 4 },
        VcpuExit::Exception { exception: 14, error_code: u32::MAX },
        VcpuExit::Hypercall { nr: 1, args: [0, 2, 0, 4, 0, 6], flags: 1 },
        VcpuExit::Rdmsr { index: u32::MAX, reason: 2 },
        VcpuExit::Wrmsr { index: 1, reason: 2, data: u64::MAX },
        VcpuExit::TprAccess { rip: 1, write: true },
        VcpuExit::SetTpr,
        VcpuExit::Nmi,
        VcpuExit::DirtyRingFull,
        VcpuExit::BusLock,
        VcpuExit::Notify { flags: 1 },
        VcpuExit::ApResetHold,
        VcpuExit::MemoryFault { flags: 1, gpa: 2, size: 3 },
        VcpuExit::Unknown { hardware_reason: 77 },
        VcpuExit::Other { reason: 99 },
    ];
    let states = [
        InterruptState::default(),
        InterruptState { ready_for_injection: true, if_flag: true, cr8: 15 },
    ];
    for exit in exits {
        for (interrupts, data) in states.into_iter().zip([&[][..], &[0, 1, 0xff]]) {
            let written = text(&Ran { exit: &exit, data, interrupts: Some(interrupts) });
            let read = RanBefore::from_json(serde_json::from_str(&written).unwrap());
            let read = read.unwrap_or_else(|e| panic!("{e}: {written}"));
            assert_eq!(read, RanBefore { exit, data: data.to_vec(), interrupts }, "{written}");
        }
    }
}

#[test]
fn what_is_made_goes_by_number() {
    assert_eq!(text(&NewVm { number: 3, vm: "a VM" }), "3");
    assert_eq!(text(&NewVcpu("a vCPU")), "null");
    let no_eventfd =
        EventFd::from(std::os::fd::OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
    assert_eq!(text(&no_eventfd), "null");
}

#[test]
fn what_was_never_written_is_not_read() {
    fn refused<T: Told>(values: &[Value]) {
        for value in values {
            assert!(T::from_json(value.clone()).is_err(), "{value}");
        }
    }
    use serde_json::json;
    refused::<i32>(&[json!("1"), json!(1u64 << 40), json!(null), json!(1.5)]);
    refused::<k::kvm_mp_state>(&[
        json!({}),
        json!({"mp_state": -1}),
        json!({"mp_state": 0, "x": 1}),
    ]);
    let msr = |index: Value| {
        json!([{"function": index, "index": 0, "flags": 0, "eax": "0x0",
        "ebx": "0x0", "ecx": "0x0", "edx": "0x0"}])
    };
    assert!(Vec::<k::kvm_cpuid_entry2>::from_json(msr(json!("0x1"))).is_ok());
    refused::<Vec<k::kvm_cpuid_entry2>>(&[
        msr(json!(1)),
        msr(json!("1")),
        msr(json!("0x")),
        msr(json!("0x01")),
        msr(json!("0x1F")),
        msr(json!("0x+1")),
        msr(json!("0x100000000")),
        msr(json!("0x10000000000000000")),
    ]);
    refused::<k::kvm_lapic_state>(&[
        json!({"regs": ""}),
        json!({"regs": "0".repeat(2047)}),
        json!({"regs": "0".repeat(2050)}),
        json!({"regs": "G".repeat(2048)}),
    ]);
    refused::<RanBefore>(&[
        json!({"exit": "never"}),
        json!({"exit": {"io_in": {"port": "0x10000", "size": 1, "count": 1}}}),
        json!({"exit": "hlt", "data": "AB"}),
        json!({"exit": {"internal_error": {"suberror": 1, "ndata": 0, "data": vec!["0x1"; 17]}}}),
    ]);
    refused::<Error>(&[
        json!({"errno": "EWHAT", "call": "KVM_RUN"}),
        json!({"errno": 22, "call": "KVM_RUN"}),
        json!({"errno": "EINVAL", "call": "KVM_WALK"}),
    ]);
}
