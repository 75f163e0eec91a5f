//! What a machine depends on besides its hypervisor: facts about the host it is built on.
//!
//! They are asked for in one place, so that a machine can be built as on another host: that is what
//! replaying a recorded run needs.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::MemorySize;

/// Facts about a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HostFacts {
    /// Physical address bits of its processors (CPUID leaf 0x80000008, EAX bits 0 to 7).
    pub physical_address_bits: u8,
    /// Its RAM.
    #[serde(skip, default = "memory")]
    pub memory: MemorySize,
    /// Whether its KVM interprets guest kernels in software, which can't run VMCALL there.
    pub software_kvm: bool,
}

impl HostFacts {
    /// This host.
    #[must_use]
    pub fn detect() -> Self {
        Self {
            physical_address_bits: physical_address_bits(),
            memory: memory(),
            software_kvm: Path::new("/sys/module/kvm_pvm").exists(),
        }
    }
}

fn memory() -> MemorySize {
    let info = rustix::system::sysinfo();
    MemorySize(info.totalram.saturating_mul(info.mem_unit.into()))
}

fn physical_address_bits() -> u8 {
    const ADDRESS_SIZES: u32 = 0x8000_0008;
    let highest = std::arch::x86_64::__cpuid(0x8000_0000).eax;
    if highest < ADDRESS_SIZES {
        return 36; // every 64-bit processor has at least these
    }
    std::arch::x86_64::__cpuid(ADDRESS_SIZES).eax as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_memory_and_the_address_bits_of_a_64_bit_processor() {
        let host = HostFacts::detect();
        assert!(host.memory.0 > 0);
        assert!((36..=52).contains(&host.physical_address_bits), "{host:?}");
    }

    #[test]
    fn what_is_recorded_comes_back_and_nothing_else_is_taken() {
        let host = HostFacts { software_kvm: true, ..HostFacts::detect() };
        let text = serde_json::to_string(&host).unwrap();
        assert_eq!(serde_json::from_str::<HostFacts>(&text).unwrap(), host);
        assert!(serde_json::from_str::<HostFacts>(r#"{"software-kvm":true}"#).is_err());
    }
}
