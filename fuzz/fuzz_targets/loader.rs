//! Kernel files: see [`hv_fuzz::loader`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hv_fuzz::loader::run(data));
