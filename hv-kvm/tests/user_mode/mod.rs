//! A guest at CPL 3, whose stores the processor makes itself on every KVM: also on those that
//! interpret a kernel. There is none here: nothing it does may fault.

use hv_core::{HostRange, Hypervisor, MemoryBackend, Vcpu, VcpuExit, Vm};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};
use kvm_bindings::{kvm_regs, kvm_segment};

use crate::common::{self, PAGE};

/// A store here ends the work: nothing is there.
pub(crate) const END: u64 = 0xe000_0000;

/// Guest-physical addresses of a guest's code and tables.
const BASE: u64 = 0xd000_0000;
const BLOCK: u64 = 0x1_0000;

// Pages of the block.
const PAGE_DIRECTORIES: u64 = 2;
const CODE: u64 = 6;
const GDT: u64 = 7;
const PAGES: usize = 8;

/// Stores a byte in each of `ecx` pages from `rdi`, then one at `rsi`.
const STORES: [u8; 17] = [
    0x88, 0x07, // mov [rdi], al
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 0x1000
    0xff, 0xc9, // dec ecx
    0x75, 0xf3, // jnz to the start
    0x88, 0x06, // mov [rsi], al
    0xeb, 0xfe, // jmp to itself
];

/// Null, 64-bit code and data, and both for CPL 3.
const DESCRIPTORS: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];

/// The guest of a vCPU, whose linear addresses up to 4 GiB are guest-physical ones.
pub(crate) struct UserGuest {
    pub(crate) vcpu: KvmVcpu,
    base: u64,
}

impl UserGuest {
    /// On a new vCPU of `vm`. Its block is slot `1000 + id`.
    pub(crate) fn new(kvm: &Kvm, vm: &KvmVm, id: u32) -> Self {
        let vcpu = vm.create_vcpu(id).unwrap();
        let base = BASE + u64::from(id) * BLOCK;
        vm.set_memory_slot(&common::slot(1000 + id, base, &block(base))).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        Self { vcpu, base }
    }

    /// Makes it about to store `value` in each of `count` pages from `address`.
    pub(crate) fn begin(&self, address: u64, count: u64, value: u8) {
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: 0x1b,
            type_: 0xb,
            present: 1,
            dpl: 3,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 0x23, type_: 3, db: 1, l: 0, ..code };
        let mut sregs = self.vcpu.sregs().unwrap();
        (sregs.cs, sregs.ss) = (code, data);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
        let limit = (DESCRIPTORS.len() * 8 - 1) as u16;
        (sregs.gdt.base, sregs.gdt.limit) = (self.base + GDT * PAGE as u64, limit);
        sregs.cr0 = 0x8000_0011; // PG, ET, PE
        sregs.cr3 = self.base;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LMA, LME
        self.vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: self.base + CODE * PAGE as u64,
            rax: value.into(),
            rcx: count,
            rdi: address,
            rsi: END,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// Runs until it has done its work; `None`, or another exit.
    pub(crate) fn run(&mut self) -> Option<VcpuExit> {
        match common::next_exit(&mut self.vcpu) {
            VcpuExit::Mmio(mmio) if mmio.address == END => None,
            exit => Some(exit),
        }
    }

    /// Stores a byte in each of `count` pages from `address`.
    pub(crate) fn store(&mut self, address: u64, count: u64) {
        self.begin(address, count, 1);
        assert_eq!(self.run(), None);
    }
}

/// Tables, code and descriptors for guest-physical address `base`.
fn block(base: u64) -> HostRange {
    const TABLE: u64 = 0x7; // present, writable, for CPL 3
    const LARGE: u64 = 0xe7; // the same, a page of 2 MiB, accessed and dirty
    let block = common::pages(PAGES);
    let put = |page: u64, entry: u64, value: u64| {
        let offset = page as usize * PAGE + entry as usize * 8;
        common::store(&block, offset, &value.to_le_bytes());
    };
    put(0, 0, (base + PAGE as u64) | TABLE);
    for gib in 0..4 {
        let directory = PAGE_DIRECTORIES + gib;
        put(1, gib, (base + directory * PAGE as u64) | TABLE);
        for entry in 0..512 {
            put(directory, entry, (gib << 30 | entry << 21) | LARGE);
        }
    }
    common::store(&block, CODE as usize * PAGE, &STORES);
    for (n, descriptor) in (0..).zip(DESCRIPTORS) {
        put(GDT, n, descriptor);
    }
    block
}
