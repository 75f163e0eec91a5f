//! What the tests of several modules share: eventfds, and a router over a mock that logs.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use hv_core::mock::MockVm;
use hv_core::{Errno, Error, EventFd, Gsi, Ioctl, Msi};
use rustix::event::{EventfdFlags, eventfd};

use crate::{IrqRouter, LegacyPins, RouterConfig};

/// A call that changes something, in the order of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Deassign(Gsi),
    Table(usize),
    Assign(Gsi),
    Line(Gsi),
}

pub(crate) type Log = Arc<Mutex<Vec<Told>>>;

/// A mock that logs what it is told, and refuses what `refuse` says.
pub(crate) fn logging_vm(
    refuse: impl Fn(Told) -> Option<Errno> + Clone + Send + 'static,
) -> (MockVm, Log) {
    let log = Log::default();
    let tell = {
        let log = log.clone();
        move |told, ioctl| {
            log.lock().unwrap().push(told);
            refuse(told).map_or(Ok(()), |errno| Err(Error::new(ioctl, errno)))
        }
    };
    let mut vm = MockVm::new();
    vm.expect_drop().return_const(());
    let tell_table = tell.clone();
    vm.expect_set_gsi_routing()
        .returning(move |routes| tell_table(Told::Table(routes.len()), Ioctl::SetGsiRouting));
    let tell_assign = tell.clone();
    vm.expect_irqfd_assign()
        .returning(move |irqfd| tell_assign(Told::Assign(irqfd.gsi), Ioctl::Irqfd));
    vm.expect_irqfd_deassign().returning(move |_, gsi| tell(Told::Deassign(gsi), Ioctl::Irqfd));
    (vm, log)
}

/// A router over such a mock, the pins in the kernel.
pub(crate) fn router(
    gsi_count: u32,
    refuse: impl Fn(Told) -> Option<Errno> + Clone + Send + 'static,
) -> (IrqRouter<MockVm>, Log) {
    let (vm, log) = logging_vm(refuse);
    let config = RouterConfig::new(gsi_count, LegacyPins::Kernel);
    let router = IrqRouter::new(Arc::new(vm), config).unwrap();
    assert_eq!(taken(&log), [Told::Table(38)], "one ioctl for the default routes");
    (router, log)
}

/// A router over a mock that refuses nothing.
pub(crate) fn willing() -> (IrqRouter<MockVm>, Log) {
    router(4096, |_| None)
}

pub(crate) fn taken(log: &Mutex<Vec<Told>>) -> Vec<Told> {
    std::mem::take(&mut log.lock().unwrap())
}

pub(crate) fn msi(data: u32) -> Msi {
    Msi { address: 0xfee0_0000, data, device: None }
}

pub(crate) fn event() -> EventFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap().into()
}

/// A descriptor in the place of an eventfd, and what reads the end of file once it is closed.
pub(crate) fn watched() -> (EventFd, UnixStream) {
    let (watch, event) = UnixStream::pair().unwrap();
    watch.set_nonblocking(true).unwrap();
    (OwnedFd::from(event).into(), watch)
}

pub(crate) fn is_closed(mut watch: &UnixStream) -> bool {
    watch.read(&mut [0]).is_ok_and(|bytes| bytes == 0)
}
