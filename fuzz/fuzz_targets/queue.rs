//! A driver over the queues of each device: see [`hv_fuzz::queue`].

#![no_main]

libfuzzer_sys::fuzz_target!(
    init: hv_fuzz::queue::init(),
    |data: &[u8]| hv_fuzz::queue::run(data)
);
