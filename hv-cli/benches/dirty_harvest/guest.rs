//! A VM with 4 GiB of memory that is to log, and a guest that writes to one page in a thousand of it.

use std::sync::Arc;

use hv_core::{HostRange, Hypervisor, MemoryBackend, MemorySlot, SlotFlags, SlotId, Vm};
use hv_kvm::{Kvm, KvmVm};
use hv_memory::Mapping;
use vm_memory::GuestAddress;

use crate::writer::{Writer, own_memory};

pub(crate) use crate::writer::PAGE;

/// The memory that logs, and where it is.
pub(crate) const MEMORY: u64 = 4 << 30;
const START: u64 = 4 << 30;
pub(crate) const SLOT: SlotId = SlotId(1);

/// One page in a thousand.
const STEP: u64 = 1000;
pub(crate) const WRITTEN: u64 = (MEMORY / PAGE).div_ceil(STEP);

pub(crate) struct Guest {
    pub(crate) vm: Arc<KvmVm>,
    /// What the guest itself needs, in a slot.
    pub(crate) own: MemorySlot,
    /// What is to be in a slot.
    pub(crate) memory: MemorySlot,
    writer: Writer,
}

impl Guest {
    /// A guest whose VM has been changed by `prepare`.
    pub(crate) fn new(prepare: impl FnOnce(&KvmVm)) -> Self {
        let kvm = Kvm::open("/dev/kvm").unwrap();
        kvm.install_kick().unwrap();
        let vm = kvm.create_vm(0).unwrap();
        prepare(&vm);
        let (mapping, own) = own_memory(0, 0);
        vm.set_memory_slot(&own).unwrap();
        let memory = Arc::new(Mapping::anonymous(MEMORY).unwrap());
        let memory = MemorySlot {
            id: SLOT,
            guest: GuestAddress(START),
            host: HostRange::new(memory, 0, usize::try_from(MEMORY).unwrap()).unwrap(),
            flags: SlotFlags { log_dirty: true, readonly: false },
        };
        let writer = Writer::new(&kvm, vm.create_vcpu(0).unwrap(), mapping);
        Self { vm: Arc::new(vm), own, memory, writer }
    }

    /// Writes to [`WRITTEN`] pages, others than the time before.
    pub(crate) fn write(&mut self, turn: u64) {
        let pages = (0..WRITTEN).map(|n| turn % (STEP / 2) + n * STEP);
        let missed = self.writer.write(pages.map(|page| START + page * PAGE), turn, || {});
        assert_eq!(missed, 0, "all of it is memory");
    }
}
