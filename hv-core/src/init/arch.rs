//! Step 11: what x86 needs before the first vCPU.

use super::capabilities::Capabilities;
use super::config::GUEST_PAGE_SIZE;
use super::{Config, InitErrorKind, Reserved};
use crate::{Capability, Errno, Error, Hypervisor, Ioctl, Vm};

/// Where the identity map goes if it can be moved: below a firmware of up to 16 MiB.
const IDENTITY_MAP: u64 = 0xfeff_c000;

/// Where it stays if it can't (KVM API documentation, `KVM_SET_IDENTITY_MAP_ADDR`).
const FIXED_IDENTITY_MAP: u64 = 0xfffb_c000;

/// How often the MSR list is asked for, should it grow meanwhile.
const MSR_LIST_TRIES: u32 = 4;

/// The registers that can be saved: asked for with no room first, which says how much is needed.
pub(super) fn msrs<H: Hypervisor>(system: &H) -> Result<Vec<u32>, Error> {
    let mut room = 0;
    for _ in 0..MSR_LIST_TRIES {
        let list = system.msr_index_list(room)?;
        if list.available <= room {
            return Ok(list.indices);
        }
        room = list.available;
    }
    Err(Error::new(Ioctl::GetMsrIndexList, Errno::E2BIG))
}

/// Identity map, task state segment and the limit of MMU pages.
pub(super) fn addresses<H: Hypervisor>(
    caps: &mut Capabilities<'_, H>,
    vm: &H::Vm,
    config: &Config,
) -> Result<Reserved, InitErrorKind> {
    let identity_map = if caps.has(Capability::SetIdentityMapAddr)? {
        vm.set_identity_map_addr(IDENTITY_MAP)?;
        IDENTITY_MAP
    } else {
        FIXED_IDENTITY_MAP
    };
    let tss = identity_map + GUEST_PAGE_SIZE;
    vm.set_tss_addr(tss)?;
    if let Some(pages) = config.nr_mmu_pages {
        vm.set_nr_mmu_pages(pages)?;
    }
    Ok(Reserved { identity_map, tss, len: 4 * GUEST_PAGE_SIZE })
}
