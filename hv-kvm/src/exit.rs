//! From `struct kvm_run` to [`VcpuExit`], without losing anything KVM said.
//!
//! Pure functions of the page, so that every exit can be tested without hardware. An exit reason
//! without a name here is passed on by its number; what to do about it is the run loop's affair.

#![allow(unsafe_code, reason = "the payload of an exit is a C union")]

use std::ops::Range;

use hv_core::{ExitReply, InternalError, IoDirection, IoExit, MmioExit, VcpuExit};
use kvm_bindings as k;

use crate::run_page::Payload;

/// Reads a member of the payload.
macro_rules! member {
    ($payload:expr, $member:ident) => {{
        let payload: &Payload = $payload;
        // SAFETY: all members are integers and arrays of integers, for which every bit pattern is
        // a value, and the union is as large as the largest of them.
        unsafe { payload.$member }
    }};
}

/// The answer an exit waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owed {
    Mmio,
    Hypercall,
    Rdmsr,
    Wrmsr,
}

/// The exit with this reason and payload.
pub(crate) fn decode(reason: u32, payload: &Payload) -> VcpuExit {
    match reason {
        k::KVM_EXIT_UNKNOWN => {
            VcpuExit::Unknown { hardware_reason: member!(payload, hw).hardware_exit_reason }
        }
        k::KVM_EXIT_EXCEPTION => {
            let ex = member!(payload, ex);
            VcpuExit::Exception { exception: ex.exception, error_code: ex.error_code }
        }
        k::KVM_EXIT_IO => {
            let io = member!(payload, io);
            let direction = match u32::from(io.direction) {
                k::KVM_EXIT_IO_OUT => IoDirection::Out,
                _ => IoDirection::In,
            };
            VcpuExit::Io(IoExit { direction, port: io.port, size: io.size, count: io.count })
        }
        k::KVM_EXIT_HYPERCALL => {
            let call = member!(payload, hypercall);
            // SAFETY: as in `member`.
            let flags = unsafe { call.__bindgen_anon_1.flags };
            VcpuExit::Hypercall { nr: call.nr, args: call.args, flags }
        }
        k::KVM_EXIT_DEBUG => {
            let arch = member!(payload, debug).arch;
            VcpuExit::Debug { exception: arch.exception, pc: arch.pc, dr6: arch.dr6, dr7: arch.dr7 }
        }
        k::KVM_EXIT_HLT => VcpuExit::Hlt,
        k::KVM_EXIT_MMIO => {
            let mmio = member!(payload, mmio);
            let len = u8::try_from(mmio.len).unwrap_or(u8::MAX).min(8);
            // Behind the bytes written KVM leaves what was there before.
            let unused = u32::from(8 - len) * 8;
            let written = u64::MAX.checked_shr(unused).unwrap_or(0) & u64::from_le_bytes(mmio.data);
            VcpuExit::Mmio(MmioExit {
                address: mmio.phys_addr,
                len,
                written: (mmio.is_write != 0).then(|| written.to_le_bytes()),
            })
        }
        k::KVM_EXIT_IRQ_WINDOW_OPEN => VcpuExit::IrqWindowOpen,
        k::KVM_EXIT_SHUTDOWN => VcpuExit::Shutdown,
        k::KVM_EXIT_FAIL_ENTRY => {
            let fail = member!(payload, fail_entry);
            VcpuExit::FailEntry { reason: fail.hardware_entry_failure_reason, cpu: fail.cpu }
        }
        k::KVM_EXIT_INTR => VcpuExit::Interrupted,
        k::KVM_EXIT_SET_TPR => VcpuExit::SetTpr,
        k::KVM_EXIT_TPR_ACCESS => {
            let tpr = member!(payload, tpr_access);
            VcpuExit::TprAccess { rip: tpr.rip, write: tpr.is_write != 0 }
        }
        k::KVM_EXIT_NMI => VcpuExit::Nmi,
        k::KVM_EXIT_INTERNAL_ERROR => {
            let error = member!(payload, internal);
            VcpuExit::InternalError(InternalError {
                suberror: error.suberror,
                ndata: error.ndata,
                data: error.data,
            })
        }
        k::KVM_EXIT_SYSTEM_EVENT => {
            let event = member!(payload, system_event);
            // SAFETY: as in `member`.
            let data = unsafe { event.__bindgen_anon_1.data };
            VcpuExit::SystemEvent { kind: event.type_, ndata: event.ndata.min(16), data }
        }
        k::KVM_EXIT_IOAPIC_EOI => VcpuExit::IoapicEoi { vector: member!(payload, eoi).vector },
        k::KVM_EXIT_X86_RDMSR => {
            let msr = member!(payload, msr);
            VcpuExit::Rdmsr { index: msr.index, reason: msr.reason }
        }
        k::KVM_EXIT_X86_WRMSR => {
            let msr = member!(payload, msr);
            VcpuExit::Wrmsr { index: msr.index, reason: msr.reason, data: msr.data }
        }
        k::KVM_EXIT_DIRTY_RING_FULL => VcpuExit::DirtyRingFull,
        k::KVM_EXIT_AP_RESET_HOLD => VcpuExit::ApResetHold,
        k::KVM_EXIT_X86_BUS_LOCK => VcpuExit::BusLock,
        k::KVM_EXIT_NOTIFY => VcpuExit::Notify { flags: member!(payload, notify).flags },
        k::KVM_EXIT_MEMORY_FAULT => {
            let fault = member!(payload, memory_fault);
            VcpuExit::MemoryFault { flags: fault.flags, gpa: fault.gpa, size: fault.size }
        }
        reason => VcpuExit::Other { reason },
    }
}

/// Where in the mapping the data of a port access is. `None` if there is no such place.
pub(crate) fn io_data(payload: &Payload) -> Option<Range<usize>> {
    let io = member!(payload, io);
    let start = usize::try_from(io.data_offset).ok()?;
    let count = usize::try_from(io.count).ok()?;
    let len = count.checked_mul(usize::from(io.size))?;
    Some(start..start.checked_add(len)?)
}

/// The answer the exit with this reason and payload waits for. Not from the decoded exit: that is
/// only made where it is returned, as it is large enough for a copy of it to show in a run loop.
pub(crate) fn owed(reason: u32, payload: &Payload) -> Option<Owed> {
    match reason {
        k::KVM_EXIT_MMIO if member!(payload, mmio).is_write == 0 => Some(Owed::Mmio),
        k::KVM_EXIT_HYPERCALL => Some(Owed::Hypercall),
        k::KVM_EXIT_X86_RDMSR => Some(Owed::Rdmsr),
        k::KVM_EXIT_X86_WRMSR => Some(Owed::Wrmsr),
        _ => None,
    }
}

/// Writes `reply` to the payload of an exit that waits for `owed`. A reply to another kind of exit
/// would overwrite what this one has there, so it is ignored.
pub(crate) fn answer(payload: &mut Payload, owed: Option<Owed>, reply: ExitReply) {
    match (owed, reply) {
        (Some(Owed::Mmio), ExitReply::Mmio(bytes)) => {
            let mmio =
                k::kvm_run__bindgen_ty_1__bindgen_ty_6 { data: bytes, ..member!(payload, mmio) };
            payload.mmio = mmio;
        }
        (Some(Owed::Hypercall), ExitReply::Hypercall(ret)) => {
            payload.hypercall =
                k::kvm_run__bindgen_ty_1__bindgen_ty_8 { ret, ..member!(payload, hypercall) };
        }
        (Some(Owed::Rdmsr), ExitReply::Rdmsr(value)) => {
            payload.msr = k::kvm_run__bindgen_ty_1__bindgen_ty_23 {
                error: value.is_none().into(),
                data: value.unwrap_or(0),
                ..member!(payload, msr)
            };
        }
        (Some(Owed::Wrmsr), ExitReply::Wrmsr(taken)) => {
            payload.msr = k::kvm_run__bindgen_ty_1__bindgen_ty_23 {
                error: (!taken).into(),
                ..member!(payload, msr)
            };
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_page::{RunPage, without_vcpu};
    use kvm_bindings::{
        kvm_debug_exit_arch, kvm_run__bindgen_ty_1__bindgen_ty_2 as FailEntry,
        kvm_run__bindgen_ty_1__bindgen_ty_3 as Exception,
        kvm_run__bindgen_ty_1__bindgen_ty_4 as Io, kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio,
        kvm_run__bindgen_ty_1__bindgen_ty_8 as Hypercall,
        kvm_run__bindgen_ty_1__bindgen_ty_9 as TprAccess,
        kvm_run__bindgen_ty_1__bindgen_ty_13 as Internal,
        kvm_run__bindgen_ty_1__bindgen_ty_19 as SystemEvent,
        kvm_run__bindgen_ty_1__bindgen_ty_23 as Msr,
        kvm_run__bindgen_ty_1__bindgen_ty_27 as MemoryFault,
    };

    const LEN: usize = 3 * 4096;

    fn page() -> RunPage {
        without_vcpu(LEN).unwrap().0
    }

    /// The exit with this reason and what `write` puts in the payload.
    fn exit(reason: u32, write: impl FnOnce(&mut Payload)) -> VcpuExit {
        let mut page = page();
        page.fake_exit(reason, write);
        decode(page.exit_reason(), page.payload())
    }

    #[test]
    fn exits_without_data() {
        for (reason, expected) in [
            (k::KVM_EXIT_HLT, VcpuExit::Hlt),
            (k::KVM_EXIT_IRQ_WINDOW_OPEN, VcpuExit::IrqWindowOpen),
            (k::KVM_EXIT_SHUTDOWN, VcpuExit::Shutdown),
            (k::KVM_EXIT_INTR, VcpuExit::Interrupted),
            (k::KVM_EXIT_SET_TPR, VcpuExit::SetTpr),
            (k::KVM_EXIT_NMI, VcpuExit::Nmi),
            (k::KVM_EXIT_DIRTY_RING_FULL, VcpuExit::DirtyRingFull),
            (k::KVM_EXIT_AP_RESET_HOLD, VcpuExit::ApResetHold),
            (k::KVM_EXIT_X86_BUS_LOCK, VcpuExit::BusLock),
        ] {
            assert_eq!(exit(reason, |_| {}), expected, "{reason}");
        }
    }

    #[test]
    fn reasons_without_a_name_keep_their_number() {
        for reason in [k::KVM_EXIT_HYPERV, k::KVM_EXIT_XEN, k::KVM_EXIT_OSI, 4711, u32::MAX] {
            assert_eq!(exit(reason, |_| {}), VcpuExit::Other { reason });
        }
        let unknown = exit(k::KVM_EXIT_UNKNOWN, |p| p.hw.hardware_exit_reason = 0x8000_0021);
        assert_eq!(unknown, VcpuExit::Unknown { hardware_reason: 0x8000_0021 });
    }

    #[test]
    fn port_io_keeps_the_count_of_a_string_instruction() {
        let (direction, port) = (k::KVM_EXIT_IO_OUT as u8, 0x3f8);
        let io = Io { direction, size: 2, port, count: 7, data_offset: 4096 };
        let mut page = page();
        page.fake_exit(k::KVM_EXIT_IO, |p| p.io = io);
        let exit = decode(page.exit_reason(), page.payload());
        let direction = IoDirection::Out;
        assert_eq!(exit, VcpuExit::Io(IoExit { direction, port, size: 2, count: 7 }));
        assert_eq!(io_data(page.payload()), Some(4096..4110));
        assert!(page.bytes(4096..4110).is_some());

        page.fake_exit(k::KVM_EXIT_IO, |p| p.io = Io { direction: k::KVM_EXIT_IO_IN as u8, ..io });
        let exit = decode(page.exit_reason(), page.payload());
        assert!(matches!(exit, VcpuExit::Io(IoExit { direction: IoDirection::In, .. })));
    }

    #[test]
    fn port_io_that_points_outside_the_mapping_has_no_data() {
        let io = |count, data_offset| {
            let mut page = page();
            let io = Io { direction: 1, size: 4, port: 1, count, data_offset };
            page.fake_exit(k::KVM_EXIT_IO, |p| p.io = io);
            io_data(page.payload()).filter(|range| page.bytes(range.clone()).is_some())
        };
        assert_eq!(io(1, 8192 - 4), Some(8188..8192));
        assert_eq!(io(1, 8192 - 3), None, "what vCPUs share");
        assert_eq!(io(1, LEN as u64 - 4), None);
        assert_eq!(io(1, 0), None, "the structure itself, which holds immediate_exit");
        assert_eq!(io(u32::MAX, 4096), None);
        assert_eq!(io(1, u64::MAX), None);
        assert_eq!(io(u32::MAX, u64::MAX - 3), None);
    }

    #[test]
    fn mmio_keeps_all_eight_bytes_and_a_lying_length_is_cut() {
        let mmio = Mmio { phys_addr: 0xfee0_0000, data: *b"abcdefgh", len: 8, is_write: 1 };
        let write = exit(k::KVM_EXIT_MMIO, |p| p.mmio = mmio);
        let written = Some(*b"abcdefgh");
        assert_eq!(write, VcpuExit::Mmio(MmioExit { address: 0xfee0_0000, len: 8, written }));
        for (len, written) in [(1, *b"a\0\0\0\0\0\0\0"), (7, *b"abcdefg\0"), (0, [0; 8])] {
            let write = exit(k::KVM_EXIT_MMIO, |p| p.mmio = Mmio { len, ..mmio });
            let (address, len, written) = (0xfee0_0000, len as u8, Some(written));
            assert_eq!(write, VcpuExit::Mmio(MmioExit { address, len, written }), "no stale bytes");
        }
        for (len, cut) in [(4, 4), (9, 8), (256, 8), (u32::MAX, 8)] {
            let read = exit(k::KVM_EXIT_MMIO, |p| p.mmio = Mmio { len, is_write: 0, ..mmio });
            let expected = MmioExit { address: 0xfee0_0000, len: cut, written: None };
            assert_eq!(read, VcpuExit::Mmio(expected));
        }
    }

    #[test]
    fn only_what_the_guest_reads_is_owed() {
        let owed = |reason, is_write| {
            let mut page = page();
            page.fake_exit(reason, |p| p.mmio = Mmio { is_write, ..Default::default() });
            owed(page.exit_reason(), page.payload())
        };
        assert_eq!(owed(k::KVM_EXIT_MMIO, 0), Some(Owed::Mmio));
        assert_eq!(owed(k::KVM_EXIT_MMIO, 1), None);
        assert_eq!(owed(k::KVM_EXIT_X86_RDMSR, 0), Some(Owed::Rdmsr));
        assert_eq!(owed(k::KVM_EXIT_IO, 0), None, "port I/O is answered in its data");
    }

    #[test]
    fn an_internal_error_keeps_every_word() {
        let data = std::array::from_fn(|n| n as u64 * 0x0101_0101_0101_0101);
        let internal = Internal { suberror: 1, ndata: 14, data };
        assert_eq!(
            exit(k::KVM_EXIT_INTERNAL_ERROR, |p| p.internal = internal),
            VcpuExit::InternalError(InternalError { suberror: 1, ndata: 14, data })
        );
    }

    #[test]
    fn a_system_event_keeps_every_word_and_a_lying_count_is_cut() {
        let data = std::array::from_fn(|n| n as u64);
        for (ndata, cut) in [(2, 2), (17, 16)] {
            let mut event = SystemEvent { type_: 3, ndata, ..Default::default() };
            event.__bindgen_anon_1.data = data;
            assert_eq!(
                exit(k::KVM_EXIT_SYSTEM_EVENT, |p| p.system_event = event),
                VcpuExit::SystemEvent { kind: 3, ndata: cut, data }
            );
        }
    }

    #[test]
    fn the_other_exits_keep_their_fields() {
        let fail = FailEntry { hardware_entry_failure_reason: 0x8000_0022, cpu: 5 };
        assert_eq!(
            exit(k::KVM_EXIT_FAIL_ENTRY, |p| p.fail_entry = fail),
            VcpuExit::FailEntry { reason: 0x8000_0022, cpu: 5 }
        );
        assert_eq!(
            exit(k::KVM_EXIT_EXCEPTION, |p| p.ex = Exception { exception: 14, error_code: 2 }),
            VcpuExit::Exception { exception: 14, error_code: 2 }
        );
        let arch = kvm_debug_exit_arch { exception: 3, pad: 0, pc: 1, dr6: 2, dr7: 4 };
        assert_eq!(
            exit(k::KVM_EXIT_DEBUG, |p| p.debug.arch = arch),
            VcpuExit::Debug { exception: 3, pc: 1, dr6: 2, dr7: 4 }
        );
        let tpr = TprAccess { rip: 0x10_0000, is_write: 1, pad: 0 };
        assert_eq!(
            exit(k::KVM_EXIT_TPR_ACCESS, |p| p.tpr_access = tpr),
            VcpuExit::TprAccess { rip: 0x10_0000, write: true }
        );
        assert_eq!(
            exit(k::KVM_EXIT_IOAPIC_EOI, |p| p.eoi.vector = 0x31),
            VcpuExit::IoapicEoi { vector: 0x31 }
        );
        assert_eq!(exit(k::KVM_EXIT_NOTIFY, |p| p.notify.flags = 1), VcpuExit::Notify { flags: 1 });
        let fault = MemoryFault { flags: 8, gpa: 1 << 40, size: 4096 };
        assert_eq!(
            exit(k::KVM_EXIT_MEMORY_FAULT, |p| p.memory_fault = fault),
            VcpuExit::MemoryFault { flags: 8, gpa: 1 << 40, size: 4096 }
        );
    }

    #[test]
    fn replies_go_where_kvm_looks_for_them() {
        let mut page = page();
        let mut reply = |reason, write: fn(&mut Payload), reply| {
            page.fake_exit(reason, write);
            let owed = owed(page.exit_reason(), page.payload());
            answer(page.payload_mut(), owed, reply);
            *page.payload()
        };

        let mmio = reply(
            k::KVM_EXIT_MMIO,
            |p| p.mmio = Mmio { phys_addr: 1, data: [0; 8], len: 8, is_write: 0 },
            ExitReply::Mmio([1, 2, 3, 4, 5, 6, 7, 8]),
        );
        let mmio = member!(&mmio, mmio);
        assert_eq!((mmio.data, mmio.phys_addr, mmio.len), ([1, 2, 3, 4, 5, 6, 7, 8], 1, 8));

        let call = |p: &mut Payload| p.hypercall = Hypercall { nr: 9, ..Default::default() };
        let call = reply(k::KVM_EXIT_HYPERCALL, call, ExitReply::Hypercall(0x55));
        let call = member!(&call, hypercall);
        assert_eq!((call.nr, call.ret), (9, 0x55));

        let msr = |p: &mut Payload| p.msr = Msr { index: 0x10, data: 3, ..Default::default() };
        for (exit, answer, error, data) in [
            (k::KVM_EXIT_X86_RDMSR, ExitReply::Rdmsr(Some(42)), 0, 42),
            (k::KVM_EXIT_X86_RDMSR, ExitReply::Rdmsr(None), 1, 0),
            (k::KVM_EXIT_X86_WRMSR, ExitReply::Wrmsr(true), 0, 3),
            (k::KVM_EXIT_X86_WRMSR, ExitReply::Wrmsr(false), 1, 3),
        ] {
            let msr = reply(exit, msr, answer);
            let msr = member!(&msr, msr);
            assert_eq!((msr.error, msr.index, msr.data), (error, 0x10, data));
        }
    }

    #[test]
    fn a_reply_of_another_kind_changes_nothing() {
        let mut page = page();
        let io = Io { direction: 0, size: 1, port: 0x60, count: 1, data_offset: 4096 };
        page.fake_exit(k::KVM_EXIT_IO, |p| p.io = io);
        let owed = owed(page.exit_reason(), page.payload());
        answer(page.payload_mut(), owed, ExitReply::Mmio([0xff; 8]));
        answer(page.payload_mut(), None, ExitReply::Rdmsr(None));
        assert_eq!(member!(page.payload(), io), io);
    }
}
