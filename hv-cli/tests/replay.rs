//! Runs recorded on `/dev/kvm` are repeated call by call, bit for bit, without hardware and on any
//! host; see `transcripts/README.md`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod common;
mod replaying;

use std::io::Cursor;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::Image;
use hv_cli::config::IrqchipMode;
use hv_cli::exit_code::StopReason;
use hv_cli::guest::Status;
use hv_cli::machine::Machine;
use hv_cli::machine::host::HostFacts;
use hv_cli::observe::recorded_host;
use hv_core::layer::{Difference, Replay};
use hv_core::mock::{MockHypervisor, MockVm};
use hv_core::{Hypervisor, Vm};
use replaying::{Replaying, built_in, with_kernel};

/// A file of `transcripts`.
fn stored(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts").join(name))
        .unwrap()
}

/// The numbers of the lines of a transcript that have `text`.
fn lines_with(transcript: &[u8], text: &str) -> Vec<usize> {
    let lines = std::str::from_utf8(transcript).unwrap().lines();
    lines.zip(1..).filter(|(line, _)| line.contains(text)).map(|(_, number)| number).collect()
}

/// Replays a run of the built-in guest; its results must be those `hv` gave when it was recorded.
fn replays(name: &str, cpus: u32, irqchip: IrqchipMode, passed: usize) {
    let transcript = stored(&format!("{name}.jsonl"));
    let replaying = Replaying::new(&transcript);
    let replayed = replaying.run(&built_in(cpus, irqchip));
    replaying.assert_same();
    assert_eq!(replayed.outcome.reason, StopReason::PowerOff);
    let runs = lines_with(&transcript, "\"KVM_RUN\"").len();
    assert_eq!(replayed.outcome.exits.total(), runs as u64);
    assert_eq!(replayed.outcome.completed.total(), 0, "guest memory is not in a transcript");

    let report = replayed.report.unwrap();
    assert_eq!((report.count(Status::Passed), report.count(Status::Failed)), (passed, 0));
    let recorded: serde_json::Value =
        serde_json::from_slice(&stored(&format!("{name}.report.json"))).unwrap();
    assert_eq!(serde_json::to_value(&report).unwrap(), recorded);
}

#[test]
fn the_built_in_guest_on_one_processor() {
    replays("built-in-1-cpu", 1, IrqchipMode::Kernel, 18);
}

#[test]
fn the_built_in_guest_on_two_processors_however_they_are_scheduled() {
    for _ in 0..20 {
        replays("built-in-2-cpus", 2, IrqchipMode::Kernel, 20);
    }
}

#[test]
fn the_built_in_guest_with_a_split_irqchip() {
    replays("built-in-split", 1, IrqchipMode::Split, 17);
}

/// A replay by itself, and the host it was recorded on.
fn replay_of(transcript: &[u8]) -> (Replay, HostFacts) {
    let replay = Replay::new(Cursor::new(transcript.to_vec())).unwrap();
    let host = recorded_host(replay.meta()).unwrap();
    (replay, host)
}

/// The calls depend on the kernel's entry alone, so one of a page stands in for the recorded Linux;
/// that it does is tested on `/dev/kvm`.
#[test]
fn the_set_up_of_a_linux_boot() {
    let transcript = stored("linux-set-up.jsonl");
    let kernel = Image::linux(&[0xf4]);
    let replaying = Replaying::new(&transcript);
    let machine = replaying.build(&with_kernel(kernel.path().into(), 2));
    // The transcript ends where the guest begins, so before the machine goes.
    replaying.assert_same();
    drop(machine);
    assert_eq!(lines_with(&transcript, "\"KVM_CREATE_VCPU\"").len(), 2);
    assert_eq!(lines_with(&transcript, "\"rip\":\"0x1000000\"").len(), 1, "the entry of Linux");
}

/// A hypervisor that replays, to which the task state segment's address is set before the identity
/// map's: init with these two steps in the other order.
fn swapped(replay: &Replay) -> MockHypervisor {
    let mut kvm = MockHypervisor::new();
    let its = replay.clone();
    kvm.expect_api_version().returning(move || its.api_version());
    let its = replay.clone();
    kvm.expect_check_extension().returning(move |cap| its.check_extension(cap));
    let its = replay.clone();
    kvm.expect_msr_index_list().returning(move |room| its.msr_index_list(room));
    let its = replay.clone();
    kvm.expect_create_vm().returning(move |vm_type| {
        let vm = Arc::new(its.create_vm(vm_type)?);
        let later = Arc::new(Mutex::new(None));
        let mut swapped = MockVm::new();
        swapped.expect_drop().return_const(());
        let its = vm.clone();
        swapped.expect_check_extension().returning(move |cap| its.check_extension(cap));
        let identity_map = later.clone();
        swapped.expect_set_identity_map_addr().returning(move |address| {
            *identity_map.lock().unwrap() = Some(address);
            Ok(())
        });
        swapped.expect_set_tss_addr().returning(move |address| {
            vm.set_tss_addr(address)?;
            vm.set_identity_map_addr(later.lock().unwrap().take().unwrap())
        });
        Ok(swapped)
    });
    kvm
}

#[test]
fn another_order_of_init_is_shown_by_its_line_with_both_sides() {
    let transcript = stored("built-in-1-cpu.jsonl");
    let (replay, host) = replay_of(&transcript);
    let config = built_in(1, IrqchipMode::Kernel);
    let error = Machine::build(|_| Ok(swapped(&replay)), &config, &host).err().unwrap();

    let [line] = lines_with(&transcript, "KVM_SET_IDENTITY_MAP_ADDR\"")[..] else { panic!() };
    assert_eq!(lines_with(&transcript, "\"KVM_SET_TSS_ADDR\""), [line + 1]);
    let shown = replay.difference().unwrap().to_string();
    assert_eq!(
        shown,
        format!(
            "line {line} of the transcript is another call\n  \
             expected: KVM_SET_IDENTITY_MAP_ADDR on vm0 {{\"address\":\"0xfeffc000\"}}\n  \
             actual:   KVM_SET_TSS_ADDR on vm0 {{\"address\":\"0xfeffd000\"}}\n  \
             (what the VMM called is line {})",
            line + 1
        )
    );
    // And the program that is replayed says where it failed.
    let error = error.to_string();
    for part in ["init step 11", "KVM_SET_TSS_ADDR", "EPROTO", &format!("line {line}")] {
        assert!(error.contains(part), "{part:?} is missing: {error}");
    }
}

#[test]
fn a_machine_built_as_on_another_host_is_another_machine() {
    let transcript = stored("built-in-1-cpu.jsonl");
    let (replay, host) = replay_of(&transcript);
    let other = HostFacts { software_kvm: !host.software_kvm, ..host };
    let config = built_in(1, IrqchipMode::Kernel);
    assert!(Machine::build(|_| Ok(replay.clone()), &config, &other).is_err());
    let difference = replay.difference().unwrap();
    let Difference::Other { expected, actual, .. } = &*difference else { panic!("{difference}") };
    assert_eq!([&expected.call, &actual.call], ["KVM_SET_CPUID2"; 2]);
    let shown = difference.to_string();
    assert_eq!(shown.lines().count(), 2, "only the leaf of KVM's own features: {shown}");
}
