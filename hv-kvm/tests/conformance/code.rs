//! The bytes a guest runs, and the tables it needs to run in 64-bit mode.
//!
//! Everything lies in one block of 64 KiB whose linear and guest-physical addresses are the same.
//! The code only uses instructions that software KVMs interpret too, never returns from an
//! interrupt, and ends every piece of work with a byte written to a port.

use hv_core::conformance::GUEST_PORTS;

/// Written when the work is done.
pub(crate) const DONE: u16 = GUEST_PORTS.start;

/// Written with its vector when an interrupt or exception was taken.
pub(crate) const TOOK: u16 = GUEST_PORTS.start + 1;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 0x20_0000;

// Pages of the block.
const PML4: u64 = 0;
const PDPT: u64 = PAGE;
const DIRECTORIES: u64 = 2 * PAGE; // four, for 4 GiB
const WINDOW_DIRECTORY: u64 = 6 * PAGE;
pub(crate) const IDT: u64 = 7 * PAGE;
const HANDLERS: u64 = 8 * PAGE;
pub(crate) const GDT: u64 = 9 * PAGE;
const SNIPPETS: u64 = GDT + 0x100;
pub(crate) const STACK_TOP: u64 = 11 * PAGE;

/// Pages of the block that need memory.
pub(crate) const PAGES: usize = 11;

/// Addresses from here are seen through a window that is moved; below, linear and
/// guest-physical addresses are the same.
pub(crate) const WINDOW: u64 = 1 << 32;

/// Bytes between the starts of two handlers, and of two snippets.
const STRIDE: u64 = 16;
const SNIPPET_STRIDE: u64 = 64;

/// What the guest can be told to do. Accesses are to `[rdi]` or port `dx`, with `rax`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Snippet {
    /// Write `1 << .0` bytes of memory.
    Store(u8),
    /// Read `1 << .0` bytes of memory.
    Load(u8),
    /// Write `1 << .0` bytes to a port.
    Out(u8),
    /// Read `1 << .0` bytes from a port.
    In(u8),
    /// Let interrupts come; they are off at its end.
    Wait,
}

impl Snippet {
    const ALL: [Snippet; 15] = [
        Snippet::Store(0),
        Snippet::Store(1),
        Snippet::Store(2),
        Snippet::Store(3),
        Snippet::Load(0),
        Snippet::Load(1),
        Snippet::Load(2),
        Snippet::Load(3),
        Snippet::Out(0),
        Snippet::Out(1),
        Snippet::Out(2),
        Snippet::In(0),
        Snippet::In(1),
        Snippet::In(2),
        Snippet::Wait,
    ];

    /// Where it starts in the block, if there is such a snippet.
    pub(crate) fn offset(self) -> Option<u64> {
        let index = Self::ALL.iter().position(|snippet| *snippet == self)?;
        Some(SNIPPETS + index as u64 * SNIPPET_STRIDE)
    }

    fn code(self) -> Vec<u8> {
        const INVLPG: [u8; 3] = [0x0f, 0x01, 0x3f]; // invlpg [rdi]: the window may have moved
        /// The opcode for bytes, and the one for more with the prefix that says how many.
        fn sized(log: u8, byte: u8, more: u8) -> Vec<u8> {
            match log {
                0 => vec![byte],
                1 => vec![0x66, more],
                2 => vec![more],
                _ => vec![0x48, more],
            }
        }
        let mut code = match self {
            Snippet::Store(log) => [&INVLPG[..], &sized(log, 0x88, 0x89), &[0x07]].concat(),
            Snippet::Load(log) => [&INVLPG[..], &sized(log, 0x8a, 0x8b), &[0x07]].concat(),
            Snippet::Out(log) => sized(log, 0xee, 0xef),
            Snippet::In(log) => sized(log, 0xec, 0xed),
            // Begun with interrupts on: nop, and cli.
            Snippet::Wait => [&[0x90; 16][..], &[0xfa]].concat(),
        };
        code.extend(tell(DONE));
        code
    }
}

/// `mov dx, port; out dx, al; jmp $`
fn tell(port: u16) -> [u8; 7] {
    let [low, high] = port.to_le_bytes();
    [0x66, 0xba, low, high, 0xee, 0xeb, 0xfe]
}

/// The block as it is at first, for guest-physical address `base`.
pub(crate) fn block(base: u64) -> Vec<u8> {
    const TABLE: u64 = 0x3; // present, writable
    const LARGE: u64 = 0x83; // the same, a page of 2 MiB
    let mut block = vec![0; PAGES * PAGE as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = at as usize;
        block[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(PML4, &u64::to_le_bytes((base + PDPT) | TABLE));
    for gib in 0..4 {
        let directory = DIRECTORIES + gib * PAGE;
        put(PDPT + gib * 8, &u64::to_le_bytes((base + directory) | TABLE));
        for entry in 0..512 {
            let page = (gib * 512 + entry) * LARGE_PAGE;
            put(directory + entry * 8, &u64::to_le_bytes(page | LARGE));
        }
    }
    put(PDPT + 4 * 8, &u64::to_le_bytes((base + WINDOW_DIRECTORY) | TABLE));
    // Null, 64-bit code, data.
    for (n, descriptor) in [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].iter().enumerate() {
        put(GDT + n as u64 * 8, &u64::to_le_bytes(*descriptor));
    }
    for vector in 0..=u8::MAX {
        let handler = HANDLERS + u64::from(vector) * STRIDE;
        let code: Vec<u8> = [0xb0, vector].into_iter().chain(tell(TOOK)).collect(); // mov al, vector
        put(handler, &code);
        put(IDT + u64::from(vector) * 16, &interrupt_gate(base + handler));
    }
    for snippet in Snippet::ALL {
        put(snippet.offset().expect("it is in ALL"), &snippet.code());
    }
    block
}

/// A 64-bit interrupt gate to `handler` in code segment 8: interrupts are off in it.
fn interrupt_gate(handler: u64) -> [u8; 16] {
    let low = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    let gate = u128::from(low) | u128::from(handler >> 32) << 64;
    gate.to_le_bytes()
}

/// Where the window must be to show `address`: what to put where in the block, and the linear
/// address then.
pub(crate) fn window(address: u64) -> (u64, [u8; 16], u64) {
    const LARGE: u64 = 0x83;
    let page = address & !(LARGE_PAGE - 1);
    // Two pages, for an access that crosses from one to the other.
    let entries = u128::from(page | LARGE) | u128::from((page + LARGE_PAGE) | LARGE) << 64;
    (WINDOW_DIRECTORY, entries.to_le_bytes(), WINDOW | (address & (LARGE_PAGE - 1)))
}
