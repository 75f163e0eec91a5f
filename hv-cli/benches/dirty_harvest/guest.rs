//! A guest with 4 GiB of memory that logs, and code that writes a byte to every so many pages of it.

use std::sync::Arc;

use hv_core::{
    HostRange, Hypervisor, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vcpu, VcpuExit, Vm,
};
use hv_kvm::{Kvm, KvmVcpu, KvmVm};
use hv_memory::Mapping;
use kvm_bindings::{kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress};

pub(crate) const PAGE: u64 = 4096;

/// The memory that logs, and where it is.
pub(crate) const MEMORY: u64 = 4 << 30;
pub(crate) const START: u64 = 4 << 30;
pub(crate) const SLOT: SlotId = SlotId(1);

/// One page in a thousand.
const STEP: u64 = 1000;
pub(crate) const WRITTEN: u64 = (MEMORY / PAGE).div_ceil(STEP);

/// `1: mov [rdi], al; add rdi, rsi; dec rcx; jnz 1b; hlt`
const CODE: [u8; 11] = [0x88, 0x07, 0x48, 0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf6, 0xf4];

/// The guest's own memory: code, a page map, a table of 1 GiB entries, and tables of 2 MiB pages
/// for the first 8 GiB.
const OWN: u64 = 0x10000;
const OWN_PAGES: u64 = 3 + 8;
const PML4: u64 = OWN + PAGE;
const PDPT: u64 = PML4 + PAGE;

pub(crate) struct Guest {
    pub(crate) vm: Arc<KvmVm>,
    /// Code and page tables, in a slot.
    pub(crate) own: MemorySlot,
    /// What is to be in a slot.
    pub(crate) memory: MemorySlot,
    vcpu: KvmVcpu,
}

impl Guest {
    /// A guest whose VM has been changed by `prepare`.
    pub(crate) fn new(prepare: impl FnOnce(&KvmVm)) -> Self {
        let kvm = Kvm::open("/dev/kvm").unwrap();
        kvm.install_kick().unwrap();
        let vm = kvm.create_vm(0).unwrap();
        prepare(&vm);
        let own = Arc::new(Mapping::anonymous(OWN_PAGES * PAGE).unwrap());
        fill(&own);
        let own = slot(SlotId(0), OWN, own, OWN_PAGES * PAGE, false);
        vm.set_memory_slot(&own).unwrap();
        let memory = Arc::new(Mapping::anonymous(MEMORY).unwrap());
        let memory = slot(SLOT, START, memory, MEMORY, true);
        let vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        enter_long_mode(&vcpu);
        Self { vm: Arc::new(vm), own, memory, vcpu }
    }

    /// Writes to [`WRITTEN`] pages, others than the time before.
    pub(crate) fn write(&mut self, turn: u64) {
        let first = START + turn % (STEP / 2) * PAGE;
        let regs = kvm_regs {
            rip: OWN,
            rdi: first,
            rsi: STEP * PAGE,
            rcx: WRITTEN,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => break,
                VcpuExit::Interrupted => {}
                exit => panic!("{exit:?}"),
            }
        }
    }
}

fn slot(id: SlotId, guest: u64, memory: Arc<Mapping>, len: u64, log_dirty: bool) -> MemorySlot {
    let host = HostRange::new(memory, 0, usize::try_from(len).unwrap()).unwrap();
    let flags = SlotFlags { log_dirty, readonly: false };
    MemorySlot { id, guest: GuestAddress(guest), host, flags }
}

/// Code and page tables.
fn fill(own: &Mapping) {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let memory = own.as_volatile_slice();
    let put = |at: u64, value: u64| {
        memory.write_obj(value, usize::try_from(at - OWN).unwrap()).unwrap();
    };
    memory.write_slice(&CODE, 0).unwrap();
    put(PML4, PDPT | PRESENT_WRITABLE);
    for gib in 0..8 {
        let directory = PDPT + (1 + gib) * PAGE;
        put(PDPT + gib * 8, directory | PRESENT_WRITABLE);
        for n in 0..512 {
            put(directory + n * 8, gib << 30 | n << 21 | LARGE | PRESENT_WRITABLE);
        }
    }
}

fn enter_long_mode(vcpu: &KvmVcpu) {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 8,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x10, type_: 3, db: 1, l: 0, ..code };
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.cs, sregs.ss) = (code, data);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data);
    sregs.cr0 = 0x8000_0011; // PG, ET, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&sregs).unwrap();
}
