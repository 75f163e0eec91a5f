//! A driver over the queues of each device: see [`hv_fuzz::queue`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hv_fuzz::queue::run(data));
