//! What can be asked of a machine from outside, and what it answers: the data of the API.
//!
//! Field names are those of the JSON. Registers are hexadecimal text there, since JSON's readers are not
//! all exact beyond 53 bits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::ApiError;
use crate::stats::Stats;

/// The machine, as the API sees it. Calls come from several threads, and none may wait for longer than a
/// few seconds.
#[cfg_attr(test, mockall::automock)]
pub trait Control: Send + Sync {
    /// What it is and does.
    fn info(&self) -> Info;

    /// Stops all vCPUs until [`resume`](Self::resume). Nothing happens if they are.
    ///
    /// # Errors
    /// A vCPU can't be stopped now; then none is. The machine is stopping.
    fn pause(&self) -> Result<(), ApiError>;

    /// Ends a pause. Nothing happens if there is none.
    fn resume(&self);

    /// What was counted until now.
    fn stats(&self) -> Stats<'static>;

    /// Presses the power button.
    fn power_button(&self) -> PowerButton;

    /// Ends the machine.
    fn stop(&self);

    /// The registers of a vCPU, which is stopped for the moment.
    ///
    /// # Errors
    /// There is no such vCPU, it can't be stopped now, or KVM fails.
    fn registers(&self, vcpu: usize) -> Result<Registers, ApiError>;

    /// The memory balloon.
    ///
    /// # Errors
    /// There is none.
    fn balloon(&self) -> Result<Balloon, ApiError>;

    /// Asks for a balloon of so many bytes.
    ///
    /// # Errors
    /// There is none, or the guest has less memory.
    fn set_balloon(&self, target: u64) -> Result<Balloon, ApiError>;
}

/// A memory balloon. What is in it, the host has and the guest does without. The guest's driver does
/// what it can to reach the target, and may never.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Balloon {
    /// Bytes that were asked for.
    pub target: u64,
    /// Bytes that the driver says are in it.
    pub actual: u64,
    /// Bytes given back to the host so far, those that the guest reported as free included. Pages count again
    /// when they are given back again.
    pub given_back: u64,
    /// What the driver told last about the guest's memory, by name. It is asked with each look, and so are
    /// the numbers of the last one.
    pub statistics: BTreeMap<String, u64>,
}

/// What a balloon is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// Bytes, of which whole pages of 4 KiB are taken.
    pub target: u64,
}

/// What a machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It runs, unless a debugger keeps it.
    Running,
    /// No vCPU executes anything until it is resumed.
    Paused,
    /// It is coming to its end.
    Stopping,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        })
    }
}

/// The answer to what changes the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateReply {
    /// What the machine does now.
    pub state: State,
}

/// What a machine is and does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// What it does.
    pub state: State,
    /// Whether a debugger keeps vCPUs from running.
    pub held_by_debugger: bool,
    /// The version of hv.
    pub version: String,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its RAM in bytes.
    pub memory: u64,
    /// The process.
    pub pid: u32,
    /// Milliseconds since it was made, pauses included.
    pub uptime_ms: u64,
}

/// The answer to the power button.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PowerButton {
    /// Whether the guest has asked for its interrupt. One that has not may never notice.
    pub enabled: bool,
}

/// The registers of a vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Registers {
    /// The vCPU.
    pub vcpu: usize,
    /// What it does: runnable, halted, not started.
    pub activity: String,
    /// General registers.
    pub general: General,
    /// Segment registers.
    pub segments: Segments,
    /// Control registers and tables.
    pub system: System,
}

macro_rules! fields {
    ($(#[$doc:meta])* $name:ident: $type:ty { $($field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name {
            $(#[doc = concat!("`", stringify!($field), "`")] pub $field: $type,)*
        }

        impl $name {
            /// Names and values, in the order of the fields.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, &$type)> {
                [$((stringify!($field), &self.$field),)*].into_iter()
            }
        }
    };
}

fields! {
    /// The general registers, as hexadecimal text.
    General: String {
        rip, rflags, rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15,
    }
}

fields! {
    /// The segment registers.
    Segments: Segment { cs, ds, es, fs, gs, ss, tr, ldt, }
}

/// A segment register with what the processor keeps of its descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Segment {
    /// The selector, as hexadecimal text.
    pub selector: String,
    /// The base, likewise.
    pub base: String,
    /// The limit in bytes, likewise.
    pub limit: String,
    /// The type field of the descriptor.
    pub r#type: u8,
    /// The privilege level.
    pub dpl: u8,
    /// Whether it is present.
    pub present: bool,
    /// Whether it is a 64-bit code segment (L).
    pub long: bool,
    /// Whether its operands have 32 bits (D/B).
    pub default_32: bool,
}

/// Control registers and descriptor tables, as hexadecimal text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct System {
    /// `CR0`
    pub cr0: String,
    /// `CR2`
    pub cr2: String,
    /// `CR3`
    pub cr3: String,
    /// `CR4`
    pub cr4: String,
    /// `CR8`
    pub cr8: String,
    /// `IA32_EFER`
    pub efer: String,
    /// `IA32_APIC_BASE`
    pub apic_base: String,
    /// The global descriptor table.
    pub gdt: Descriptor,
    /// The interrupt descriptor table.
    pub idt: Descriptor,
}

/// Where a descriptor table is, as hexadecimal text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its linear address.
    pub base: String,
    /// Its last byte.
    pub limit: String,
}
