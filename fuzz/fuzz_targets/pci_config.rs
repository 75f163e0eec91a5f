//! Configuration space and BARs: see [`hv_fuzz::pci_config`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hv_fuzz::pci_config::run(data));
