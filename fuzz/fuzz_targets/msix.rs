//! MSI-X against a model: see [`hv_fuzz::msix`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hv_fuzz::msix::run(data));
