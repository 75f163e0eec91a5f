//! The smallest VM: real-mode code that prints through a port, reads a number through another,
//! and halts. Needs `/dev/kvm`:
//!
//! ```text
//! cargo run -p hv-kvm --example real_mode_kvm
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use hv_core::{
    HostMemory, HostRange, Hypervisor, IoDirection, MemoryBackend, MemorySlot, SlotFlags, SlotId,
    Vcpu, VcpuExit, Vm,
};
use hv_kvm::Kvm;
use kvm_bindings::kvm_regs;
use vm_memory::GuestAddress;

const PAGE: usize = 4096;
const GUEST: GuestAddress = GuestAddress(0x1000);

/// Prints the string behind it with a string instruction, then the square of what port 0x11 gives.
const CODE: &[u8] = &[
    0xbe, 0x13, 0x10, //       mov si, text
    0xb9, 0x11, 0x00, //       mov cx, 17
    0xba, 0x10, 0x00, //       mov dx, 0x10
    0xf3, 0x6e, //             rep outsb
    0xe5, 0x11, //             in ax, 0x11
    0xf7, 0xe0, //             mul ax
    0xe7, 0x12, //             out 0x12, ax
    0xf4, //                   hlt
    0x90, //                   nop
    // text:
    b'H', b'e', b'l', b'l', b'o', b',', b' ', b'r', b'e', b'a', b'l', b' ', b'm', b'o', b'd', b'e',
    b'!',
];

/// Memory for a guest. A VMM takes it from `mmap`; a vector does for a page.
#[derive(Debug)]
struct Memory(Vec<AtomicU8>);

impl HostMemory for Memory {
    fn bytes(&self) -> &[AtomicU8] {
        &self.0
    }
}

/// One page of host memory, aligned, with `code` at its start.
fn page(code: &[u8]) -> Option<HostRange> {
    let memory = Memory((0..2 * PAGE).map(|_| AtomicU8::new(0)).collect());
    let offset = memory.0.as_ptr().align_offset(PAGE);
    for (to, from) in memory.0.iter().skip(offset).zip(code) {
        to.store(*from, Ordering::Relaxed);
    }
    HostRange::new(Arc::new(memory), offset, PAGE)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kvm = Kvm::open("/dev/kvm")?;
    let vm = kvm.create_vm(0)?;
    vm.set_memory_slot(&MemorySlot {
        id: SlotId(0),
        guest: GUEST,
        host: page(CODE).ok_or("no page of memory")?,
        flags: SlotFlags::default(),
    })?;

    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    // Bit 1 of RFLAGS is always set.
    vcpu.set_regs(&kvm_regs { rip: GUEST.0, rflags: 2, ..Default::default() })?;

    loop {
        match vcpu.run()? {
            VcpuExit::Io(io) if io.direction == IoDirection::Out && io.port == 0x10 => {
                print!("{}", String::from_utf8_lossy(vcpu.io_data()));
            }
            VcpuExit::Io(io) if io.direction == IoDirection::Out => {
                println!("\nthe guest wrote {:?} to port {:#x}", vcpu.io_data(), io.port);
            }
            VcpuExit::Io(_) => vcpu.io_data().copy_from_slice(&12u16.to_le_bytes()),
            VcpuExit::Hlt => break,
            // A signal of the terminal, say.
            VcpuExit::Interrupted => {}
            other => return Err(format!("unexpected exit: {other:?}").into()),
        }
    }
    println!("the guest halted");
    Ok(())
}
