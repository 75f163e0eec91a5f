//! Starts a VM on a made-up host and shows what init found: no KVM, no root.
//!
//! `cargo run -p hv-core --example init_record --features mock [KVM_CAP_... to leave out]`

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use hv_core::init::{Config, InitError, InitializedVm, init};
use hv_core::mock::{MockHypervisor, MockVm};
use hv_core::{Capability, MsrIndexList};

/// What this host says of a capability.
fn value(cap: Capability, lacking: &[String]) -> i32 {
    match cap {
        _ if lacking.iter().any(|name| name == cap.name()) => 0,
        Capability::MaxVcpus => 1024,
        Capability::NrVcpus => 4,
        Capability::MaxVcpuId | Capability::IrqRouting => 4096,
        Capability::CoalescedMmio => 2,
        Capability::NrMemslots => 32764,
        _ => 1,
    }
}

fn vm(lacking: Vec<String>) -> MockVm {
    let mut vm = MockVm::new();
    vm.expect_check_extension().returning(move |cap| Ok(value(cap, &lacking)));
    vm.expect_set_identity_map_addr().returning(|_| Ok(()));
    vm.expect_set_tss_addr().returning(|_| Ok(()));
    vm.expect_create_irqchip().returning(|| Ok(()));
    vm.expect_create_pit2().returning(|_| Ok(()));
    vm.expect_ioeventfd_assign().returning(|_| Ok(()));
    vm.expect_ioeventfd_deassign().returning(|_| Ok(()));
    vm.expect_drop().returning(|| println!("The VM is closed."));
    vm
}

fn hypervisor(lacking: Vec<String>) -> MockHypervisor {
    let mut hypervisor = MockHypervisor::new();
    hypervisor.expect_api_version().returning(|| Ok(12));
    let asked = lacking.clone();
    hypervisor.expect_check_extension().returning(move |cap| Ok(value(cap, &asked)));
    hypervisor.expect_msr_index_list().returning(|room| {
        let msrs = vec![0x10, 0x174, 0x175];
        let available = msrs.len();
        let indices = if available <= room { msrs } else { Vec::new() };
        Ok(MsrIndexList { available, indices })
    });
    hypervisor.expect_create_vm().returning(move |_| Ok(vm(lacking.clone())));
    hypervisor.expect_eventfd().returning(|| {
        let file = std::fs::File::open("/dev/null");
        file.map(|file| OwnedFd::from(file).into())
            .map_err(|e| hv_core::Error::new(hv_core::Call::Eventfd, (&e).into()))
    });
    hypervisor.expect_install_kick().returning(|| Ok(()));
    hypervisor
}

fn start(lacking: Vec<String>) -> Result<InitializedVm<MockHypervisor>, InitError> {
    let mut config = Config::new(4096, 2);
    config.probe_many_ioeventfds = true;
    init(|_device| Ok(hypervisor(lacking)), &config)
}

fn main() -> ExitCode {
    let lacking: Vec<String> = std::env::args().skip(1).collect();
    match start(lacking) {
        Ok(vm) => {
            println!("{:#?}", vm.record());
            for consequence in &vm.record().consequences {
                println!("{consequence}.");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}.");
            ExitCode::FAILURE
        }
    }
}
