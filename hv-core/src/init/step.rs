//! The steps of the init sequence, by the number they have always had.

use std::fmt;

macro_rules! steps {
    ($($variant:ident = $number:literal $what:literal,)*) => {
        /// A step of [`super::init`]. The numbers name the steps of the sequence; they run in that
        /// order, except that memory slots, the first part of [`Step::Replay`], are set before
        /// [`Step::Irqchip`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Step {
            $(#[doc = concat!("Step ", $number, ": ", $what, ".")] $variant = $number,)*
        }

        impl Step {
            /// Every step, by number.
            pub const ALL: &[Step] = &[$(Step::$variant,)*];

            /// What it does, such as `"create the VM"`.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self { $(Step::$variant => $what,)* }
            }
        }
    };
}

steps! {
    PageSize = 0 "compare the page sizes",
    Open = 1 "open the device",
    ApiVersion = 2 "check the API version",
    VcpuLimits = 3 "check the vCPU limits",
    CreateVm = 4 "create the VM",
    RequiredCapabilities = 5 "check the required capabilities",
    CoalescedMmio = 6 "find the coalesced MMIO ring",
    MemoryRegions = 7 "find out how memory slots behave",
    StateIoctls = 8 "find out which vCPU state can be read and set",
    Msi = 9 "find out how MSIs are sent",
    Intx = 10 "find out how interrupt lines are set",
    Arch = 11 "set up the architecture",
    Irqchip = 12 "create the irqchip",
    Routing = 13 "set up interrupt routing",
    ArchRouting = 14 "find out what routing is good for",
    Replay = 15 "replay memory slots, ioeventfds and coalesced zones",
    ManyIoeventfds = 16 "probe for many ioeventfds",
    Kick = 17 "install the vCPU kick",
}

impl Step {
    /// Its number in the sequence, 0 to 17.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "init step {} ({})", self.number(), self.what())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_are_0_to_17() {
        let numbers: Vec<u8> = Step::ALL.iter().map(|s| s.number()).collect();
        assert_eq!(numbers, (0..=17).collect::<Vec<u8>>());
        assert_eq!(Step::CreateVm.to_string(), "init step 4 (create the VM)");
    }
}
