//! `KVM_IOEVENTFD`: which writes signal an eventfd, and which events are legal.

use crate::conformance::bench::{Bench, Drive};
use crate::conformance::expect::{holds, same};
use crate::conformance::{Case, Checked, Platform, Seen};
use crate::{IoAddress, IoEvent, IoEventBackend};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    vec![Case::new(
        "ioevent-takes-its-value-only",
        "A write of the value signals the eventfd and does not exit; another value exits, and so does a read.",
        takes_its_value_only,
    )]
}

fn takes_its_value_only<P: Platform>(p: &P) -> Checked {
    let vm = p.vm()?;
    let mut guest = p.guest_on(&vm, 0)?;
    let event = p.eventfd()?;
    let doorbell = IoEvent {
        address: IoAddress::Pio(0x70),
        length: 1,
        datamatch: Some(7),
        event: event.clone(),
    };
    vm.ioeventfd_assign(&doorbell)?;
    same("writing the value", guest.port_out(0x70, &[7])?, Seen::ByKernel)?;
    same("signals", event.take(), Some(1))?;
    let (all_ones, read) = guest.port_in(0x70)?;
    holds("a read exits", matches!(read, Seen::ByVmm(_)))?;
    same("what it reads", all_ones, [0xff])?;
    let other = guest.port_out(0x70, &[8])?;
    holds("another value exits", matches!(other, Seen::ByVmm(_)))?;
    same("signals of another value", event.take(), None)
}
