//! A file that is said to be a kernel, loaded into a guest of 32 MiB.
//!
//! The first byte says as what it is to be loaded and with what beside it, and whether the rest is a
//! file or the payload of a bzImage, so that the decompressors get something to do.

use hv_cli::loader::{Format, Image, LINUX_CMDLINE, LoadRequest, MemoryMap, check, load};
use hv_memory::RamMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::Input;

const RAM: usize = 32 << 20;

/// What is given as the initrd.
const INITRD: [u8; 5000] = [1; 5000];

const FORMATS: [Format; 7] = [
    Format::Auto,
    Format::BzImage,
    Format::Elf,
    Format::Pvh,
    Format::Linux64,
    Format::Multiboot,
    Format::Flat,
];

/// Loads a file.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let Some(how) = input.byte() else { return };
    let format = FORMATS[usize::from(how % 8).min(FORMATS.len() - 1)];
    let (payload, extras, short) = (how & 0x10 != 0, how & 0x20 != 0, how & 0x40 != 0);
    let file = if payload { bz_image(input.rest()) } else { input.rest().to_vec() };
    let Ok(kernel) = Image::from_bytes("/boot/kernel", file) else { return };
    let initrd = Image::from_bytes("/boot/initrd", INITRD.to_vec()).ok().filter(|_| extras);

    // With little memory nothing has much room.
    let ram = if short { 2 << 20 } else { RAM };
    let memory = RamMemory::from_ranges(&[(GuestAddress(0), ram)]).expect("memory");
    let map = MemoryMap::new(&memory, &[]);
    let request = LoadRequest {
        format,
        cmdline: extras.then_some("console=ttyS0"),
        linux_cmdline: LINUX_CMDLINE,
        initrd: initrd.as_ref(),
        map: &map,
        rsdp: None,
    };
    let recognised = check(&kernel, format);
    match load(&memory, &kernel, &request) {
        Ok(boot) => {
            assert!(recognised.is_ok(), "loaded, but not recognised: {recognised:?}");
            // Between its segments there can be something else.
            assert!(boot.kernel.contains(&boot.entry), "{boot:?}");
            let is_ram = |at: &u64| map.ram().any(|ram| ram.contains(at));
            assert!(is_ram(&boot.kernel.start) && is_ram(&(boot.kernel.end - 1)), "{boot:?}");
            assert_eq!(boot.initrd.is_some(), extras, "{boot:?}");
            if let Some(initrd) = &boot.initrd {
                // Nothing was put over it.
                let mut bytes = vec![0; INITRD.len()];
                memory.read_slice(&mut bytes, GuestAddress(initrd.start)).expect("the initrd");
                assert!(bytes == INITRD, "{boot:?}");
            }
            let (mut sregs, mut regs) = Default::default();
            boot.apply(&mut sregs, &mut regs);
        }
        // A sentence, in one line.
        Err(error) => assert!(!error.to_string().contains(['\n', '\0']), "{error}"),
    }
}

/// A bzImage with this payload (Linux x86 boot protocol 2.15).
fn bz_image(payload: &[u8]) -> Vec<u8> {
    const PAYLOAD: usize = 0x40;
    const SETUP: usize = 1024;
    let code = (PAYLOAD + payload.len()).next_multiple_of(16);
    let mut file = vec![0; SETUP + code];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(code as u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x236, &[1, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &(PAYLOAD as u32).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &0x1_0000u32.to_le_bytes());
    put(SETUP + PAYLOAD, payload);
    file
}
