//! What is done to both: calls of the traits, and accesses of a guest, as plain data.

use hv_core::{Capability, IoAddress, Msi, Route};

/// An eventfd of a world, by its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) number: usize,
    /// By another descriptor of the same eventfd.
    pub(crate) copy: bool,
}

/// One step. What it names may not exist.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    CheckExtension(Capability),
    EnableCap(Capability, u64),
    CreateIrqchip,
    CreatePit2 {
        flags: u32,
    },
    CreateVcpu(u32),
    SetTssAddr(u64),
    SetIdentityMapAddr(u64),
    SetNrMmuPages(u64),

    SetGsiRouting(Vec<Route>),
    IrqfdAssign {
        event: Event,
        gsi: u32,
        resample: Option<usize>,
    },
    IrqfdDeassign {
        event: Event,
        gsi: u32,
    },
    /// Somebody writes to the eventfd, and KVM has had the time to hear it.
    Signal(usize),
    IrqLine {
        gsi: u32,
        level: bool,
    },
    SignalMsi(Msi),
    /// `KVM_SET_IRQCHIP` with one redirection entry of the I/O APIC changed.
    SetRedirection {
        pin: usize,
        entry: u64,
    },
    /// `KVM_SET_LAPIC` with one register changed.
    SetLapic {
        vcpu: u32,
        register: usize,
        value: u32,
    },

    SetMemorySlot {
        id: u32,
        guest: u64,
        /// Which part of the host memory: first byte and bytes.
        host: (usize, usize),
        log_dirty: bool,
        readonly: bool,
    },
    DeleteMemorySlot(u32),
    DirtyLog {
        id: u32,
        words: usize,
    },
    ClearDirtyLog {
        id: u32,
        first: u64,
        pages: u32,
        bits: u64,
    },
    CoalescedZone {
        register: bool,
        address: IoAddress,
        size: u32,
    },
    Ioeventfd {
        assign: bool,
        event: Event,
        address: IoAddress,
        length: u32,
        datamatch: Option<u64>,
    },

    /// A guest writes.
    Write {
        vcpu: u32,
        address: IoAddress,
        data: Vec<u8>,
    },
    /// A guest reads.
    Read {
        vcpu: u32,
        address: IoAddress,
        len: usize,
    },
    /// A guest takes and ends interrupts until no other comes.
    Take {
        vcpu: u32,
    },
    /// The VMM looks at its eventfds.
    TakeEvents,
    /// The VMM takes what zones have collected.
    TakeWrites,
    /// The VMM collects what is in the dirty rings, and resets them.
    TakeDirty,
}
