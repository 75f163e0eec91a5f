//! `KVM_IRQFD`: what may be bound, and where events go.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use crate::conformance::bench::{Bench, Drive, irqfd, message, msi_route, pin_route};
use crate::conformance::expect::{refused, same};
use crate::conformance::{
    Case, Checked, Guest as _, Kernels, Miss, Platform, RawRequest, Seen, VmOf,
};
use crate::{Capability, Errno, EventFd, Gsi, IrqBackend, IrqchipId, Irqfd, Msi, VcpuExit, Vm};

pub(super) fn cases<P: Platform>() -> Vec<Case<P>> {
    let mut cases = binding();
    cases.extend(unbinding());
    cases.extend(closing());
    cases.extend(events());
    cases.extend(split());
    cases
}

/// A VM with an irqchip that takes irqfds, a guest on it, and an eventfd. GSI 30 leads to vector 0x51
/// of the guest.
fn routed<P: Platform>(p: &P) -> Checked<(VmOf<P>, P::Guest, EventFd)> {
    let vm = p.vm_with_irqchip()?;
    p.needs(&vm, Capability::Irqfd)?;
    let guest = p.guest_on(&vm, 0)?;
    vm.set_gsi_routing(&[msi_route(30, message(0, 0x51))])?;
    let event = p.eventfd()?;
    Ok((vm, guest, event))
}

/// An open descriptor that is no eventfd.
fn no_eventfd() -> Checked<EventFd> {
    let null = File::open("/dev/null");
    let null = null.map_err(|error| Miss::not_applicable(format!("/dev/null: {error}")))?;
    Ok(OwnedFd::from(null).into())
}

fn binding<P: Platform>() -> Vec<Case<P>> {
    let any_gsi = |name, rule, gsi| {
        Case::new(name, rule, move |p: &P| {
            let (vm, _guest, event) = routed(p)?;
            Ok(vm.irqfd_assign(&irqfd(&event, gsi))?)
        })
    };
    vec![
        Case::new(
            "irqfd-before-irqchip",
            "An irqfd is refused with EINVAL before there is an irqchip.",
            |p: &P| refused(p.vm()?.irqfd_assign(&irqfd(&p.eventfd()?, 4)), Errno::EINVAL),
        )
        .kernels(Kernels::Since(5, 2, "it is bound")),
        any_gsi("irqfd-unrouted-gsi", "An irqfd may be bound to a GSI without a route.", 31),
        any_gsi("irqfd-gsi-5000", "An irqfd may be bound to a GSI beyond the limit.", 5000),
        any_gsi("irqfd-last-gsi", "An irqfd may be bound to GSI 2^32 - 1.", u32::MAX),
        Case::new(
            "irqfd-twice-on-a-gsi",
            "One eventfd can't be bound twice to a GSI (EBUSY).",
            |p: &P| {
                let (vm, _guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                refused(vm.irqfd_assign(&irqfd(&event, 30)), Errno::EBUSY)
            },
        ),
        Case::new(
            "irqfd-on-two-gsis",
            "One eventfd can't be bound to two GSIs (EBUSY).",
            |p: &P| {
                let (vm, _guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                refused(vm.irqfd_assign(&irqfd(&event, 31)), Errno::EBUSY)
            },
        ),
        Case::new(
            "irqfd-duplicate-descriptor",
            "A duplicate of a bound descriptor is the same eventfd (EBUSY).",
            |p: &P| {
                let (vm, _guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                let copy = event.as_fd().try_clone_to_owned();
                let copy = copy.map_err(|error| Miss::failed(format!("dup: {error}")))?;
                refused(vm.irqfd_assign(&irqfd(&copy.into(), 31)), Errno::EBUSY)
            },
        ),
        Case::new(
            "irqfd-on-two-vms",
            "One eventfd can't be bound in two VMs (EBUSY); it can once the first has unbound it.",
            |p: &P| {
                let (vm, _guest, event) = routed(p)?;
                let other = p.vm_with_irqchip()?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                refused(other.irqfd_assign(&irqfd(&event, 4)), Errno::EBUSY)?;
                vm.irqfd_deassign(&event, Gsi(30))?;
                Ok(other.irqfd_assign(&irqfd(&event, 4))?)
            },
        )
        .kernels(Kernels::Since(6, 17, "it is bound in both")),
        Case::new(
            "irqfd-two-on-a-gsi",
            "Two eventfds may be bound to one GSI; each of them delivers.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                let second = p.eventfd()?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                vm.irqfd_assign(&irqfd(&second, 30))?;
                for event in [event, second] {
                    event.signal();
                    same("interrupts", guest.await_interrupts(1)?, vec![0x51])?;
                }
                Ok(())
            },
        ),
        Case::new(
            "irqfd-no-eventfd",
            "A descriptor that is no eventfd is refused with EINVAL.",
            |p: &P| {
                let (vm, _guest, _event) = routed(p)?;
                refused(vm.irqfd_assign(&irqfd(&no_eventfd()?, 30)), Errno::EINVAL)
            },
        ),
        Case::new(
            "irqfd-resample-no-eventfd",
            "A resample descriptor that is no eventfd is refused with EINVAL, and nothing is bound.",
            |p: &P| {
                let (vm, _guest, event) = routed(p)?;
                p.needs(&vm, Capability::IrqfdResample)?;
                let resample = Some(no_eventfd()?);
                refused(vm.irqfd_assign(&Irqfd { resample, ..irqfd(&event, 4) }), Errno::EINVAL)?;
                Ok(vm.irqfd_assign(&irqfd(&event, 30))?)
            },
        ),
        Case::new(
            "irqfd-closed-descriptor",
            "A descriptor that is not open is refused with EBADF.",
            |p: &P| {
                let request = RawRequest::Irqfd { fd: -1, gsi: 30, flags: 0, resample: 0 };
                p.raw_refused(&p.vm_with_irqchip()?, &request, Errno::EBADF)
            },
        ),
        Case::new("irqfd-unknown-flag", "An unknown flag is refused with EINVAL.", |p: &P| {
            let request = RawRequest::Irqfd { fd: -1, gsi: 30, flags: 1 << 20, resample: 0 };
            p.raw_refused(&p.vm_with_irqchip()?, &request, Errno::EINVAL)
        }),
    ]
}

fn unbinding<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "irqfd-unbound-from-another-gsi",
            "Unbinding from another GSI is no error and unbinds nothing.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                vm.irqfd_deassign(&event, Gsi(31))?;
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])
            },
        ),
        Case::new(
            "irqfd-unbound-that-was-not-bound",
            "Unbinding an eventfd that is not bound is no error.",
            |p: &P| {
                let (vm, _guest, event) = routed(p)?;
                Ok(vm.irqfd_deassign(&event, Gsi(30))?)
            },
        ),
        Case::new("irqfd-unbound-twice", "Unbinding twice is no error.", |p: &P| {
            let (vm, _guest, event) = routed(p)?;
            vm.irqfd_assign(&irqfd(&event, 30))?;
            vm.irqfd_deassign(&event, Gsi(30))?;
            Ok(vm.irqfd_deassign(&event, Gsi(30))?)
        }),
        Case::new(
            "irqfd-unbound-no-eventfd",
            "Unbinding what is no eventfd is refused with EINVAL.",
            |p: &P| {
                let (vm, _guest, _event) = routed(p)?;
                refused(vm.irqfd_deassign(&no_eventfd()?, Gsi(30)), Errno::EINVAL)
            },
        ),
        Case::new(
            "irqfd-unbound-by-duplicate",
            "A duplicate of the descriptor unbinds the eventfd.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                let copy = event.as_fd().try_clone_to_owned();
                let copy = copy.map_err(|error| Miss::failed(format!("dup: {error}")))?;
                vm.irqfd_deassign(&copy.into(), Gsi(30))?;
                event.signal();
                same("interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "irqfd-bound-again",
            "An eventfd that was unbound may be bound again, to another GSI.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 31))?;
                vm.irqfd_deassign(&event, Gsi(31))?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])
            },
        ),
    ]
}

fn closing<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "irqfd-ends-with-its-eventfd",
            "When the last descriptor of a bound eventfd closes it is unbound, and a line it held is \
             low again.",
            ends_with_its_eventfd,
        ),
        Case::new(
            "irqfd-lives-with-a-descriptor",
            "An eventfd stays bound while a descriptor of it is open, also if the others are closed.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                let other = event.clone();
                drop(event);
                other.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])
            },
        ),
        Case::new(
            "event-before-its-eventfd-closes",
            "An event from just before the last descriptor closes is delivered.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                event.signal();
                drop(event);
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])
            },
        ),
    ]
}

/// Looks at the line from the guest: pin 3 of the first PIC, level-triggered and masked, in its interrupt
/// request register (8259A manual, OCW1 and OCW3; port 0x4d0 is the edge/level control register).
fn ends_with_its_eventfd<P: Platform>(p: &P) -> Checked {
    const PIN: u8 = 3;
    let (vm, mut guest, event) = routed(p)?;
    p.needs(&vm, Capability::IrqfdResample)?;
    vm.set_gsi_routing(&[pin_route(PIN.into(), IrqchipId::PIC_MASTER, PIN.into())])?;
    for (port, byte) in [(0x4d0, 1 << PIN), (0x21, 0xff), (0x20, 0x0a)] {
        same("who serves the PIC", guest.port_out(port, &[byte])?, Seen::ByKernel)?;
    }
    let resample = Some(p.eventfd()?);
    vm.irqfd_assign(&Irqfd { resample, ..irqfd(&event, PIN.into()) })?;
    event.signal();
    guest.await_port(0x20, 1 << PIN)?;
    drop(event);
    guest.await_port(0x20, 0)
}

fn events<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "event-delivered-and-drained",
            "An event of a bound eventfd is delivered, and taken from its counter.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])?;
                same("the counter", event.take(), None)
            },
        )
        .kernels(Kernels::Since(5, 11, "it stays in the counter until it is unbound")),
        Case::new(
            "event-before-binding",
            "An event from before the binding is delivered by it, once, and stays in the counter.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                event.signal();
                vm.irqfd_assign(&irqfd(&event, 30))?;
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])?;
                same("the counter", event.take(), Some(1))?;
                same("further interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "event-before-binding-taken-by-unbinding",
            "An event from before the binding is taken from the counter by unbinding.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                event.signal();
                vm.irqfd_assign(&irqfd(&event, 30))?;
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])?;
                vm.irqfd_deassign(&event, Gsi(30))?;
                same("the counter", event.take(), None)
            },
        ),
        Case::new(
            "event-while-unbound",
            "Events that come while the eventfd is unbound stay in its counter, and the next \
             binding delivers one interrupt for them.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                vm.irqfd_deassign(&event, Gsi(30))?;
                event.signal();
                event.signal();
                same("interrupts while unbound", guest.interrupts()?, Vec::new())?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])?;
                same("further interrupts", guest.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "event-while-unrouted",
            "An event that comes while its GSI has no route is taken from the counter and lost.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 31))?;
                event.signal();
                // Any call: an implementation may look at signals when it is called.
                Vm::check_extension(&vm, Capability::Irqfd)?;
                same("the counter", event.take(), None)?;
                // Waits for what KVM has begun to do about the event.
                vm.irqfd_deassign(&event, Gsi(31))?;
                same("the counter once it is unbound", event.take(), None)?;
                vm.set_gsi_routing(&[msi_route(31, message(0, 0x52))])?;
                vm.irqfd_assign(&irqfd(&event, 31))?;
                same("interrupts", guest.interrupts()?, Vec::new())?;
                event.signal();
                same("interrupts of the next event", guest.await_interrupts(1)?, vec![0x52])
            },
        )
        .kernels(Kernels::Since(5, 11, "it stays in the counter until it is unbound")),
        Case::new(
            "event-after-the-route-is-gone",
            "A table without the GSI of a bound eventfd cuts it off.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                vm.set_gsi_routing(&[])?;
                event.signal();
                vm.irqfd_deassign(&event, Gsi(30))?;
                same("interrupts", guest.interrupts()?, Vec::new())?;
                same("the counter", event.take(), None)
            },
        ),
        Case::new(
            "event-by-the-new-route",
            "After a new table the next event of a bound eventfd goes by it, here to another vCPU.",
            |p: &P| {
                let (vm, mut first, event) = routed(p)?;
                let mut second = p.guest_on(&vm, 1)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                event.signal();
                same("interrupts of vCPU 0", first.await_interrupts(1)?, vec![0x51])?;
                vm.set_gsi_routing(&[msi_route(30, message(1, 0x53))])?;
                event.signal();
                same("interrupts of vCPU 1", second.await_interrupts(1)?, vec![0x53])?;
                same("further interrupts of vCPU 0", first.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "event-pending-keeps-its-vcpu",
            "An interrupt that is pending at a vCPU stays there when its route changes.",
            |p: &P| {
                let (vm, mut first, event) = routed(p)?;
                let mut second = p.guest_on(&vm, 1)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                event.signal();
                vm.set_gsi_routing(&[msi_route(30, message(1, 0x53))])?;
                same("interrupts of vCPU 0", first.await_interrupts(1)?, vec![0x51])?;
                same("interrupts of vCPU 1", second.interrupts()?, Vec::new())
            },
        ),
        Case::new(
            "events-are-one-until-taken",
            "Events of one vector are one interrupt until the guest takes it.",
            |p: &P| {
                let (vm, mut guest, event) = routed(p)?;
                vm.irqfd_assign(&irqfd(&event, 30))?;
                event.signal();
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])?;
                same("further interrupts", guest.interrupts()?, Vec::new())?;
                event.signal();
                same("interrupts of the next event", guest.await_interrupts(1)?, vec![0x51])
            },
        ),
        Case::new("event-before-a-refused-table", "A refused table loses no event.", |p: &P| {
            let (vm, mut guest, event) = routed(p)?;
            vm.irqfd_assign(&irqfd(&event, 30))?;
            event.signal();
            let twice = [msi_route(30, message(0, 0x52)), msi_route(30, message(0, 0x53))];
            refused(vm.set_gsi_routing(&twice), Errno::EINVAL)?;
            same("interrupts", guest.await_interrupts(1)?, vec![0x51])
        }),
    ]
}

/// A VM with a split irqchip, a guest on it, and an eventfd.
fn split_vm<P: Platform>(p: &P) -> Checked<(VmOf<P>, P::Guest, EventFd)> {
    let vm = p.vm_with_split_irqchip(24)?;
    let guest = p.guest_on(&vm, 0)?;
    Ok((vm, guest, p.eventfd()?))
}

/// A level-triggered message of `vector` to vCPU 0 (Intel SDM volume 3, "Message Data Register
/// Format": trigger mode and level).
fn level(vector: u8) -> Msi {
    Msi { data: u32::from(vector) | 1 << 15 | 1 << 14, ..message(0, vector) }
}

fn split<P: Platform>() -> Vec<Case<P>> {
    vec![
        Case::new(
            "split-irqfd-delivers",
            "With the split irqchip an irqfd delivers by the message of its GSI.",
            |p: &P| {
                let (vm, mut guest, event) = split_vm(p)?;
                vm.set_gsi_routing(&[msi_route(4, message(0, 0x51))])?;
                vm.irqfd_assign(&irqfd(&event, 4))?;
                event.signal();
                same("interrupts", guest.await_interrupts(1)?, vec![0x51])
            },
        ),
        Case::new(
            "split-irqfd-resample",
            "With the split irqchip a resample irqfd is refused with EINVAL.",
            |p: &P| {
                let (vm, _guest, event) = split_vm(p)?;
                let resample = Some(p.eventfd()?);
                refused(vm.irqfd_assign(&Irqfd { resample, ..irqfd(&event, 4) }), Errno::EINVAL)
            },
        )
        .kernels(Kernels::Since(5, 2, "it is bound, and never resamples")),
        Case::new(
            "split-level-message-tells-its-end",
            "The end of an interrupt by a level-triggered message of a reserved GSI is told to the \
             VMM, with the vector.",
            |p: &P| {
                let (vm, mut guest, event) = split_vm(p)?;
                vm.set_gsi_routing(&[msi_route(4, level(0x51))])?;
                vm.irqfd_assign(&irqfd(&event, 4))?;
                event.signal();
                same("interrupts", guest.await_taken()?, vec![0x51])?;
                let told = Seen::ByVmm(VcpuExit::IoapicEoi { vector: 0x51 });
                same("who sees its end", guest.end_of_interrupt(0x51)?, told)
            },
        ),
        Case::new(
            "split-edge-message-does-not",
            "The end of an interrupt by an edge-triggered message is not told.",
            |p: &P| {
                let (vm, mut guest, event) = split_vm(p)?;
                vm.set_gsi_routing(&[msi_route(4, message(0, 0x51))])?;
                vm.irqfd_assign(&irqfd(&event, 4))?;
                event.signal();
                same("interrupts", guest.await_taken()?, vec![0x51])?;
                same("who sees its end", guest.end_of_interrupt(0x51)?, Seen::ByKernel)
            },
        ),
        Case::new(
            "split-level-message-beyond-the-pins",
            "The end of an interrupt by a message of a GSI that is not reserved is not told.",
            |p: &P| {
                let (vm, mut guest, event) = split_vm(p)?;
                vm.set_gsi_routing(&[msi_route(24, level(0x51))])?;
                vm.irqfd_assign(&irqfd(&event, 24))?;
                event.signal();
                same("interrupts", guest.await_taken()?, vec![0x51])?;
                same("who sees its end", guest.end_of_interrupt(0x51)?, Seen::ByKernel)
            },
        ),
    ]
}
