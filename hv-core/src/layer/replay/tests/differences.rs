//! What a VMM that does something else is told.

use super::super::{Difference, Why};
use super::{File, replay};
use crate::layer::{Interceptor, Record, Replay};
use crate::{
    Capability, Context, Errno, Error, Gsi, Hypervisor, IrqBackend, IrqchipId, Irqfd, Route,
    RouteTarget, Vm,
};

type Step<V> = fn(&V) -> Result<(), Error>;

/// One thread that sets up a VM, in the order of `steps`.
fn set_up<H: Hypervisor>(kvm: &H, steps: &[Step<H::Vm>]) -> Result<(), Error> {
    kvm.check_extension(Capability::IrqRouting)?;
    let vm = kvm.create_vm(0)?;
    steps.iter().try_for_each(|step| step(&vm))
}

fn tss<V: Vm>(vm: &V) -> Result<(), Error> {
    vm.set_tss_addr(0xfeff_d000)
}

fn other_tss<V: Vm>(vm: &V) -> Result<(), Error> {
    vm.set_tss_addr(0xfffb_d000)
}

fn irqchip<V: Vm>(vm: &V) -> Result<(), Error> {
    vm.create_irqchip()
}

fn routes<V: Vm>(vm: &V) -> Result<(), Error> {
    vm.set_gsi_routing(&pins(24))
}

fn other_routes<V: Vm>(vm: &V) -> Result<(), Error> {
    let mut routes = pins(23);
    routes[7].gsi = Gsi(9);
    vm.set_gsi_routing(&routes)
}

fn pins(n: u32) -> Vec<Route> {
    let pin = |pin| RouteTarget::Pin { chip: IrqchipId::IOAPIC, pin };
    (0..n).map(|n| Route { gsi: Gsi(n), target: pin(n) }).collect()
}

fn transcript() -> String {
    let file = File::default();
    let record = Record::new(file.clone());
    set_up(&record.over(super::guest::host()), &[tss, irqchip, routes]).unwrap();
    record.finish().unwrap();
    file.text()
}

fn stopped(kvm: &Replay, error: Error, line: u64) -> String {
    assert_eq!((error.errno, error.context), (Errno::EPROTO, Context::Transcript { line }));
    assert_eq!(kvm.api_version(), Err(error), "every later call fails the same way");
    let difference = kvm.finish().unwrap_err();
    assert_eq!(kvm.difference().unwrap().to_string(), difference.to_string());
    difference.to_string()
}

#[test]
fn the_same_calls_are_no_difference() {
    let kvm = replay(&transcript());
    set_up(&kvm, &[tss, irqchip, routes]).unwrap();
    kvm.finish().unwrap();
    assert!(kvm.difference().is_none());
}

#[test]
fn another_order() {
    let kvm = replay(&transcript());
    let error = set_up(&kvm, &[irqchip, tss, routes]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "KVM_CREATE_IRQCHIP at line 4 of the transcript failed: EPROTO (Protocol error); \
         what was expected there is told by the replay"
    );
    assert_eq!(
        stopped(&kvm, error, 4),
        "line 4 of the transcript is another call\n  \
         expected: KVM_SET_TSS_ADDR on vm0 {\"address\":\"0xfeffd000\"}\n  \
         actual:   KVM_CREATE_IRQCHIP on vm0\n  \
         (what the VMM called is line 5)"
    );
}

#[test]
fn another_argument() {
    let kvm = replay(&transcript());
    let error = set_up(&kvm, &[other_tss, irqchip, routes]).unwrap_err();
    assert_eq!(
        stopped(&kvm, error, 4),
        "line 4 of the transcript, KVM_SET_TSS_ADDR on vm0, differs\n  \
         args.address: expected \"0xfeffd000\", actual \"0xfffbd000\""
    );
}

#[test]
fn arguments_differ_field_by_field() {
    let kvm = replay(&transcript());
    let error = set_up(&kvm, &[tss, irqchip, other_routes]).unwrap_err();
    assert_eq!(
        stopped(&kvm, error, 6),
        "line 6 of the transcript, KVM_SET_GSI_ROUTING on vm0, differs\n  \
         args.routes[7].gsi: expected 7, actual 9\n  \
         args.routes[23]: expected {\"gsi\":23,\"pin\":{\"chip\":2,\"pin\":23}}, actual absent"
    );
}

#[test]
fn a_call_that_is_left_out_or_missing_at_the_end() {
    let kvm = replay(&transcript());
    let error = set_up(&kvm, &[tss, routes]).unwrap_err();
    assert!(stopped(&kvm, error, 5).contains("expected: KVM_CREATE_IRQCHIP on vm0\n"));

    let kvm = replay(&transcript());
    set_up(&kvm, &[tss, irqchip]).unwrap();
    let difference = kvm.finish().unwrap_err();
    assert!(matches!(*difference, Difference::Missing { line: 6, why: Why::Finished, .. }));
    assert!(difference.to_string().contains("KVM_SET_GSI_ROUTING"), "{difference}");
    assert!(kvm.api_version().is_err(), "what has finished goes on with nothing");
}

#[test]
fn a_call_more() {
    let kvm = replay(&transcript());
    let error = set_up(&kvm, &[tss, irqchip, routes, irqchip]).unwrap_err();
    assert_eq!(
        stopped(&kvm, error, 0),
        "the transcript has no more calls on vm0, but the VMM made one\n  \
         actual:   KVM_CREATE_IRQCHIP on vm0"
    );
}

#[test]
fn another_eventfd() {
    fn bind<H: Hypervisor>(kvm: &H, which: usize) -> Result<(), Error> {
        let events = [kvm.eventfd()?, kvm.eventfd()?];
        let vm = kvm.create_vm(0)?;
        let event = events[which].clone();
        vm.irqfd_assign(&Irqfd { event, gsi: Gsi(5), resample: None })
    }
    let file = File::default();
    let record = Record::new(file.clone());
    bind(&record.over(super::guest::host()), 1).unwrap();
    record.finish().unwrap();

    let kvm = replay(&file.text());
    bind(&kvm, 1).unwrap();
    kvm.finish().unwrap();
    let kvm = replay(&file.text());
    let error = bind(&kvm, 0).unwrap_err();
    assert_eq!(
        stopped(&kvm, error, 5),
        "line 5 of the transcript, KVM_IRQFD on vm0, differs\n  \
         args.eventfd: expected 1, actual 0"
    );
}

#[test]
fn long_differences_are_cut() {
    let (a, b) = ("ab".repeat(3000), "ab".repeat(2000) + &"cd".repeat(1000));
    let line = |data: &str| {
        format!(
            "{{\"hv-transcript\":1}}\n{{\"thread\":0,\"on\":\"system\",\"call\":\"KVM_CREATE_VM\",\
             \"args\":{{\"type\":\"{data}\",\"more\":{:?}}}}}\n{{\"end\":true}}\n",
            (0..40).collect::<Vec<_>>()
        )
    };
    let kvm = replay(&line(&a));
    assert!(kvm.create_vm(0).is_err());
    assert!(kvm.difference().unwrap().to_string().len() < 2000);
    // The place in two long texts.
    let made = |args: String| super::super::Made {
        on: crate::layer::Object::System,
        call: "KVM_CREATE_VM".to_owned(),
        args: Some(args),
    };
    let difference = Difference::Other {
        line: 2,
        expected: made(format!("[\"{a}\"]")),
        actual: made(format!("[\"{b}\"]")),
        later: None,
    };
    let text = difference.to_string();
    assert!(text.contains("args[0] from character 3992: expected ...\"abababab"), "{text}");
    assert!(text.contains("actual ...\"ababababcdcd"), "{text}");
}
