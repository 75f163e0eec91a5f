//! A guest that writes where it is told, at full speed: a list of addresses for each run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hv_core::{
    HostMemory as _, HostRange, Hypervisor, MemorySlot, SlotFlags, SlotId, Vcpu, VcpuExit,
};
use hv_kvm::{Kvm, KvmVcpu};
use hv_memory::Mapping;
use kvm_bindings::{kvm_regs, kvm_segment};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

pub(crate) const PAGE: u64 = 4096;

/// Most addresses of a list.
pub(crate) const LIST: usize = 2048;

/// ```text
/// 1:  mov rax, [rsi]
///     mov [rax], rbx
///     add rsi, 8
///     dec rcx
///     jnz 1b
///     hlt
/// ```
const CODE: [u8; 16] = [
    0x48, 0x8b, 0x06, 0x48, 0x89, 0x18, 0x48, 0x83, 0xc6, 0x08, 0x48, 0xff, 0xc9, 0x75, 0xf1, 0xf4,
];

/// Guest-physical addresses of the first vCPU's own memory, and bytes from one to the next.
const OWN: u64 = 0x10_0000;
const STRIDE: u64 = 0x10_0000;

// Pages of it: code, page tables that map 8 GiB to itself, the list.
const PML4: u64 = PAGE;
const PDPT: u64 = 2 * PAGE;
const DIRECTORIES: u64 = 3 * PAGE;
const GIB: u64 = 8;
const ADDRESSES: u64 = DIRECTORIES + GIB * PAGE;
const BYTES: u64 = ADDRESSES + LIST as u64 * 8;

pub(crate) struct Writer {
    vcpu: KvmVcpu,
    own: Arc<Mapping>,
}

/// The memory of the guest on vCPU `id` itself, which is to be slot `slot`.
pub(crate) fn own_memory(id: u32, slot: u32) -> (Arc<Mapping>, MemorySlot) {
    let own = Arc::new(Mapping::anonymous(BYTES).unwrap());
    fill(&own, OWN + u64::from(id) * STRIDE);
    let host = HostRange::new(own.clone(), 0, usize::try_from(BYTES).unwrap()).unwrap();
    let guest = GuestAddress(OWN + u64::from(id) * STRIDE);
    let flags = SlotFlags::default();
    (own, MemorySlot { id: SlotId(slot), guest, host, flags })
}

impl Writer {
    /// A guest on a vCPU that has not run, with [`own_memory`] of its id.
    pub(crate) fn new(kvm: &Kvm, vcpu: KvmVcpu, own: Arc<Mapping>) -> Self {
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        enter_long_mode(&vcpu, OWN + u64::from(vcpu.id()) * STRIDE);
        Self { vcpu, own }
    }

    /// Writes `value` to each address; `full` is what empties a dirty ring that is full. How often a
    /// write found no memory.
    pub(crate) fn write(
        &mut self,
        addresses: impl IntoIterator<Item = u64>,
        value: u64,
        mut full: impl FnMut(),
    ) -> u64 {
        let mut count = 0;
        let list = usize::try_from(ADDRESSES).unwrap();
        for address in addresses {
            assert!(count < LIST, "more addresses than a list has");
            self.own.as_volatile_slice().write_obj(address, list + count * 8).unwrap();
            count += 1;
        }
        let own = OWN + u64::from(self.vcpu.id()) * STRIDE;
        let regs = kvm_regs {
            rip: own,
            rsi: own + ADDRESSES,
            rbx: value,
            rcx: count as u64,
            rflags: 2,
            ..Default::default()
        };
        let mut missed = 0;
        if count == 0 {
            return missed;
        }
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => return missed,
                VcpuExit::Mmio(mmio) if mmio.written.is_some() => missed += 1,
                VcpuExit::DirtyRingFull => full(),
                VcpuExit::Interrupted => {}
                exit => panic!("{exit:x?}"),
            }
        }
    }
}

/// The 8 bytes a guest wrote at the start of a page of a mapping, whoever else writes there.
pub(crate) fn value_at(memory: &Mapping, page: u64) -> u64 {
    let slice = memory.as_volatile_slice();
    let cell = slice.get_atomic_ref::<AtomicU64>(usize::try_from(page * PAGE).unwrap()).unwrap();
    cell.load(Ordering::Relaxed)
}

/// Code and page tables.
fn fill(own: &Mapping, base: u64) {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    assert_eq!(own.bytes().len() as u64, BYTES);
    let memory = own.as_volatile_slice();
    let put = |at: u64, value: u64| {
        memory.write_obj(value, usize::try_from(at).unwrap()).unwrap();
    };
    memory.write_slice(&CODE, 0).unwrap();
    put(PML4, base + PDPT | PRESENT_WRITABLE);
    for gib in 0..GIB {
        let directory = DIRECTORIES + gib * PAGE;
        put(PDPT + gib * 8, base + directory | PRESENT_WRITABLE);
        for n in 0..512 {
            put(directory + n * 8, gib << 30 | n << 21 | LARGE | PRESENT_WRITABLE);
        }
    }
}

fn enter_long_mode(vcpu: &KvmVcpu, base: u64) {
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
    sregs.cr3 = base + PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&sregs).unwrap();
}
