//! Step 16: whether one port takes many ioeventfds.
//!
//! Old kernels had room for six devices on an I/O bus. The probe is never an error and leaves the VM
//! as it was.

use super::ManyIoeventfds;
use crate::{Errno, Hypervisor, IoAddress, IoEvent, IoEventBackend};

/// One more than fitted on a bus of an old kernel.
const EVENTS: u64 = 7;

/// What came of it, and how many ioeventfds could not be removed again.
pub(super) fn probe<H: Hypervisor>(system: &H, vm: &H::Vm) -> (ManyIoeventfds, u32) {
    let mut assigned = Vec::new();
    let mut answer = ManyIoeventfds::Yes;
    for value in 0..EVENTS {
        let Ok(eventfd) = system.eventfd() else {
            answer = ManyIoeventfds::NotProbed;
            break;
        };
        let event = IoEvent {
            address: IoAddress::Pio(0),
            length: 2,
            datamatch: Some(value),
            event: eventfd,
        };
        match vm.ioeventfd_assign(&event) {
            Ok(()) => assigned.push(event),
            Err(error) => {
                // Anything but lack of room says nothing about room.
                answer = match error.errno {
                    Errno::ENOSPC => ManyIoeventfds::No,
                    _ => ManyIoeventfds::NotProbed,
                };
                break;
            }
        }
    }
    let mut left = 0;
    for event in assigned.into_iter().rev() {
        left += u32::from(vm.ioeventfd_deassign(&event).is_err());
    }
    (answer, left)
}
