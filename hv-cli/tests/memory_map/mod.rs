//! What a guest finds at which address while the map of its memory changes.
//!
//! Written for any hypervisor, so that the KVM in memory and `/dev/kvm` have to show the same bytes. The
//! guest writes a pattern of its own to each page; what it should have written where is kept beside, and
//! all memory of the host must be that, byte by byte.

#![allow(dead_code, reason = "every test binary uses a part of this")]

pub(crate) mod changes;

use std::sync::Arc;

use hv_core::conformance::{Guest, Seen};
use hv_core::layer::{Interceptor as _, LayeredVm, Trace};
use hv_core::{Capability, HostMemory as _, HostRange, Hypervisor, IoAddress, Ioctl, VcpuExit, Vm};
use hv_memory::{
    AddressMap, AddressMapError, Edit, LiveMap, Mapping, SlotOperation, SlotRules, VcpusPaused,
};

pub(crate) const PAGE: u64 = 4096;

/// Slots that guests keep for themselves.
const GUEST_SLOTS: u32 = 16;

/// A hypervisor, and guests that run on it.
pub(crate) trait Host {
    type Hypervisor: Hypervisor;
    type Guest: Guest;

    fn open() -> Self;

    fn hypervisor(&self) -> Self::Hypervisor;

    /// A guest on the first vCPU.
    fn guest(&self, vm: &VmOf<Self>) -> Self::Guest;

    /// Looks for what the hypervisor let pass, if it can say.
    fn check(&self);
}

pub(crate) type VmOf<H> = <<H as Host>::Hypervisor as Hypervisor>::Vm;

type Counted<H> = LayeredVm<VmOf<H>, Trace>;

/// The one vCPU runs only when it is told to.
pub(crate) struct Paused;
impl VcpusPaused for Paused {}

/// Memory of the host, and what it should have in it.
pub(crate) struct Memory {
    mapping: Arc<Mapping>,
    expected: Vec<u8>,
}

/// What a guest finds at an address.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum At {
    /// This byte of a memory.
    Ram(usize, u64),
    /// The same, which it can only read.
    Rom(usize, u64),
    /// Nothing, or a device: its accesses come to the VMM.
    Exit,
}

/// A machine with memory that is mapped by what a scenario says.
pub(crate) struct Machine<H: Host> {
    pub(crate) map: LiveMap<Counted<H>>,
    guest: H::Guest,
    trace: Trace,
    memories: Vec<Memory>,
    /// What was written last.
    pattern: u64,
}

impl<H: Host> Machine<H> {
    /// With memories of so many pages, and slots of at most so many.
    pub(crate) fn new(host: &H, pages: &[u64], max: u64) -> Self {
        let trace = Trace::new();
        let vm = trace.clone().over(host.hypervisor()).create_vm(0).unwrap();
        let guest = host.guest(vm.inner());
        let slots = vm.check_extension(Capability::NrMemslots).unwrap().cast_unsigned();
        let rules = SlotRules { slots: slots - GUEST_SLOTS, joins: true, readonly: true };
        let map = AddressMap::new(40).with_max_slot_size(max * PAGE);
        let map = LiveMap::adopt(Arc::new(vm), map, rules).unwrap();
        let memory = |&pages: &u64| Memory {
            mapping: Arc::new(Mapping::anonymous(pages * PAGE).unwrap()),
            expected: vec![0; usize::try_from(pages * PAGE).unwrap()],
        };
        let memories = pages.iter().map(memory).collect();
        Self { map, guest, trace, memories, pattern: 0 }
    }

    /// Bytes of a memory.
    pub(crate) fn host(&self, memory: usize, offset: u64, len: u64) -> HostRange {
        let bytes = |n: u64| usize::try_from(n).unwrap();
        let mapping = self.memories[memory].mapping.clone();
        HostRange::new(mapping, bytes(offset), bytes(len)).unwrap()
    }

    /// Makes changes, which take these operations: deletions, moves, changes of logging, additions.
    pub(crate) fn edit<R>(
        &mut self,
        operations: [usize; 4],
        change: impl FnOnce(&mut Edit<'_>) -> Result<R, AddressMapError>,
    ) -> R {
        let calls = self.calls();
        let plan = self.map.edit(change).unwrap();
        let of = |kind: fn(&SlotOperation) -> bool| {
            plan.operations().iter().filter(|operation| kind(operation)).count()
        };
        let planned = [
            of(|operation| matches!(operation, SlotOperation::Delete { .. })),
            of(|operation| matches!(operation, SlotOperation::Move { .. })),
            of(|operation| matches!(operation, SlotOperation::LogDirty { .. })),
            of(|operation| matches!(operation, SlotOperation::Add(_))),
        ];
        assert_eq!(planned, operations, "{plan:?}");
        let made = plan.commit(|_| Paused).unwrap();
        let sum: usize = operations.iter().sum();
        assert_eq!(self.calls() - calls, sum as u64);
        made
    }

    /// How often `KVM_SET_USER_MEMORY_REGION` was called.
    fn calls(&self) -> u64 {
        self.trace.counts().get(Ioctl::SetUserMemoryRegion).calls
    }

    /// The guest writes to the beginning and the end of each page from an address on, and finds there
    /// what is said: the first byte of each page in turn, and all that is beside it.
    pub(crate) fn expect(&mut self, address: u64, found: impl IntoIterator<Item = At>) {
        for (n, at) in (0..).zip(found) {
            let page = address + n * PAGE;
            for offset in [0, PAGE / 2, PAGE - 8] {
                self.expect_at(page + offset, at.plus(offset));
            }
        }
        self.compare();
    }

    /// The guest writes 8 bytes to an address and reads them again.
    pub(crate) fn expect_at(&mut self, address: u64, found: At) {
        self.pattern += 0x0101_0101_0101_0101;
        let data = self.pattern.to_le_bytes();
        let wrote = self.guest.write(IoAddress::Mmio(address), &data).unwrap();
        let mut read = [0; 8];
        let seen = self.guest.read(IoAddress::Mmio(address), &mut read).unwrap();
        let exits = |seen: &Seen| matches!(seen, Seen::ByVmm(VcpuExit::Mmio(exit)) if exit.address == address);
        match found {
            At::Ram(memory, offset) => {
                self.remembered(memory, offset).copy_from_slice(&data);
                assert_eq!((wrote, seen), (Seen::ByKernel, Seen::ByKernel), "{address:#x}");
                assert_eq!(read, data, "{address:#x}");
            }
            At::Rom(memory, offset) => {
                assert!(exits(&wrote), "{address:#x} is readonly: {wrote:?}");
                assert_eq!(seen, Seen::ByKernel, "{address:#x}");
                assert_eq!(read, *self.remembered(memory, offset), "{address:#x}");
            }
            At::Exit => {
                assert!(exits(&wrote), "{address:#x}: {wrote:?}");
                assert!(exits(&seen), "{address:#x}: {seen:?}");
            }
        }
    }

    fn remembered(&mut self, memory: usize, offset: u64) -> &mut [u8] {
        let offset = usize::try_from(offset).unwrap();
        &mut self.memories[memory].expected[offset..offset + 8]
    }

    /// All memory is what it should be.
    fn compare(&self) {
        for (n, memory) in self.memories.iter().enumerate() {
            let bytes = memory.mapping.bytes().iter();
            let bytes = bytes.map(|byte| byte.load(std::sync::atomic::Ordering::Relaxed));
            let differs = bytes.zip(&memory.expected).position(|(is, expected)| is != *expected);
            assert_eq!(differs, None, "the first byte of memory {n} that should be something else");
        }
    }
}

impl At {
    fn plus(self, offset: u64) -> Self {
        match self {
            At::Ram(memory, first) => At::Ram(memory, first + offset),
            At::Rom(memory, first) => At::Rom(memory, first + offset),
            At::Exit => At::Exit,
        }
    }
}

/// Pages of a memory from one on.
pub(crate) fn ram(memory: usize, pages: std::ops::Range<u64>) -> impl Iterator<Item = At> {
    pages.map(move |page| At::Ram(memory, page * PAGE))
}

/// The same, readonly.
pub(crate) fn rom(memory: usize, pages: std::ops::Range<u64>) -> impl Iterator<Item = At> {
    pages.map(move |page| At::Rom(memory, page * PAGE))
}

/// So many pages of nothing.
pub(crate) fn exits(pages: usize) -> impl Iterator<Item = At> {
    std::iter::repeat_n(At::Exit, pages)
}

/// All scenarios as tests on a [`Host`].
macro_rules! scenarios {
    ($host:ty: $($scenario:ident),* $(,)?) => {$(
        #[test]
        fn $scenario() {
            let host = <$host as $crate::memory_map::Host>::open();
            $crate::memory_map::changes::$scenario(&host);
            $crate::memory_map::Host::check(&host);
        }
    )*};
    ($host:ty) => {
        $crate::memory_map::scenarios! { $host:
            memory_is_split_and_joined_around_a_device,
            memory_moves,
            memory_becomes_readonly_and_writable_again,
            aliases_show_the_same_bytes,
            what_is_hidden_comes_back,
            parts_of_pages_exit,
            much_memory_is_in_many_slots,
            slots_change_places,
        }
    };
}
pub(crate) use scenarios;
