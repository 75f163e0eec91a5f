//! A VM with a page or more of real-mode code, and memory that tells when it goes.

#![allow(dead_code, reason = "every test binary uses a part of this")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hv_core::{
    HostMemory, HostRange, Hypervisor, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vcpu,
    VcpuExit, Vm,
};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};
use kvm_bindings::kvm_regs;
use vm_memory::GuestAddress;

pub(crate) const PAGE: usize = 4096;

/// Where the code of [`real_mode`] is, in slot 0.
pub(crate) const CODE: u64 = 0x1000;

/// A guest-physical address without memory in every VM made here.
pub(crate) const UNMAPPED: u64 = 0xe000;

/// KVM. A test that needs it fails without.
pub(crate) fn kvm() -> Kvm {
    match Kvm::open("/dev/kvm") {
        Ok(kvm) => kvm,
        Err(error) => panic!("this test needs a usable /dev/kvm: {error}"),
    }
}

/// How many [`Memory`] objects made with it are still there.
#[derive(Debug, Clone, Default)]
pub(crate) struct Alive(Arc<AtomicUsize>);

impl Alive {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// `pages` pages of host memory, zero.
    pub(crate) fn pages(&self, pages: usize) -> HostRange {
        self.0.fetch_add(1, Ordering::SeqCst);
        let bytes = (0..(pages + 1) * PAGE).map(|_| AtomicU8::new(0)).collect();
        let memory = Memory { bytes, alive: self.clone() };
        let offset = memory.bytes.as_ptr().align_offset(PAGE);
        HostRange::new(Arc::new(memory), offset, pages * PAGE).expect("a page more than needed")
    }
}

#[derive(Debug)]
struct Memory {
    bytes: Vec<AtomicU8>,
    alive: Alive,
}

impl HostMemory for Memory {
    fn bytes(&self) -> &[AtomicU8] {
        &self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.alive.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// `pages` pages of host memory, zero.
pub(crate) fn pages(pages: usize) -> HostRange {
    Alive::default().pages(pages)
}

pub(crate) fn store(memory: &HostRange, offset: usize, bytes: &[u8]) {
    for (to, from) in memory.bytes()[offset..].iter().zip(bytes) {
        to.store(*from, Ordering::Relaxed);
    }
}

pub(crate) fn load(memory: &HostRange, offset: usize, len: usize) -> Vec<u8> {
    memory.bytes()[offset..offset + len].iter().map(|b| b.load(Ordering::Relaxed)).collect()
}

pub(crate) fn slot(id: u32, guest: u64, host: &HostRange) -> MemorySlot {
    MemorySlot {
        id: SlotId(id),
        guest: GuestAddress(guest),
        host: host.clone(),
        flags: SlotFlags::default(),
    }
}

/// A VM with `code` at [`CODE`] in slot 0, and its memory of `memory_pages` pages.
pub(crate) fn vm_with(code: &[u8], memory_pages: usize) -> (KvmVm, HostRange) {
    let vm = kvm().create_vm(0).unwrap();
    // What an Intel host without "unrestricted guest" needs to run real mode.
    vm.set_tss_addr(0xfffb_d000).unwrap();
    let memory = pages(memory_pages);
    store(&memory, 0, code);
    vm.set_memory_slot(&slot(0, CODE, &memory)).unwrap();
    (vm, memory)
}

/// Makes `vcpu` begin at `ip` in segment 0 of real mode.
pub(crate) fn begin(vcpu: &KvmVcpu, ip: u64) {
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&kvm_regs { rip: ip, rsp: CODE + 0x1000, rflags: 2, ..Default::default() })
        .unwrap();
}

/// A VM with `code` and a vCPU about to run it.
pub(crate) fn real_mode(code: &[u8]) -> (KvmVm, KvmVcpu, HostRange) {
    let (vm, memory) = vm_with(code, 1);
    let vcpu = vm.create_vcpu(0).unwrap();
    begin(&vcpu, CODE);
    (vm, vcpu, memory)
}

/// The next exit that is not an interruption.
pub(crate) fn next_exit(vcpu: &mut KvmVcpu) -> VcpuExit {
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Interrupted => {}
            exit => return exit,
        }
    }
}

/// Waits for something that must happen. The limit only turns a hang into a failure.
pub(crate) fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(120), "{what} did not happen");
        std::thread::yield_now();
    }
}
