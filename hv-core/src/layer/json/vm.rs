//! What a VM is told and answers as JSON: interrupt controllers, timer, clock, routes, dirty pages,
//! collected writes.

use kvm_bindings as k;
use serde::{Deserialize, Serialize, de};

use super::{Blob, Form, Hex, OwnedBytes, Short, form};
use crate::{
    CoalescedWrite, Gsi, IoAddress, IrqchipId, LineStatus, Msi, MsiStatus, MsrIndexList, Route,
    RouteTarget,
};

form! {
    /// An interrupt controller.
    IrqchipForm = k::kvm_irqchip as k::kvm_irqchip {
        chip_id: u32, chip: ChipForm,
        ; pad: u32,
    }
}

/// The state of an interrupt controller as the bytes KVM gave: it is a C union, so all is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct ChipForm(Blob<512>);

impl Form<k::kvm_irqchip__bindgen_ty_1> for ChipForm {
    fn of(value: &k::kvm_irqchip__bindgen_ty_1) -> Self {
        Self(Blob(zerocopy::transmute!(*value)))
    }
    fn value(self) -> k::kvm_irqchip__bindgen_ty_1 {
        zerocopy::transmute!(self.0.0)
    }
}

form! {
    /// How a timer is made.
    PitConfigForm = k::kvm_pit_config as k::kvm_pit_config {
        flags: u32,
        ; pad: Short<u32, 15>,
    }
}

form! {
    /// A channel of the timer.
    ChannelForm = k::kvm_pit_channel_state as k::kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
        count_load_time: i64,
        ;
    }
}

form! {
    /// The timer.
    PitForm = k::kvm_pit_state2 as k::kvm_pit_state2 {
        channels: [ChannelForm; 3], flags: u32,
        ; reserved: Short<u32, 9>,
    }
}

form! {
    /// The clock.
    ClockForm = k::kvm_clock_data as k::kvm_clock_data {
        clock: u64, flags: Hex<u32>, realtime: u64, host_tsc: u64,
        ; pad0: u32, pad: Short<u32, 4>,
    }
}

form! {
    /// A message signalled interrupt.
    MsiForm = Msi as Msi {
        address: Hex, data: Hex<u32>,
        ; device: Option<u32>,
    }
}

impl Form<Option<u32>> for Option<u32> {
    fn of(value: &Option<u32>) -> Self {
        *value
    }
    fn value(self) -> Option<u32> {
        self
    }
}

/// An entry of the routing table: its GSI, and the one place it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(in crate::layer) struct RouteForm {
    gsi: u32,
    #[serde(flatten)]
    target: TargetForm,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum TargetForm {
    Pin { chip: u32, pin: u32 },
    Msi(MsiForm),
    HvSint { vcpu: u32, sint: u32 },
}

impl RouteForm {
    pub(in crate::layer) fn of(&Route { gsi: Gsi(gsi), target }: &Route) -> Self {
        let target = match target {
            RouteTarget::Pin { chip: IrqchipId(chip), pin } => TargetForm::Pin { chip, pin },
            RouteTarget::Msi(msi) => TargetForm::Msi(MsiForm::of(&msi)),
            RouteTarget::HypervSint { vcpu, sint } => TargetForm::HvSint { vcpu, sint },
        };
        Self { gsi, target }
    }
}

/// What became of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::layer) enum LineStatusForm {
    Delivered(u32),
    Coalesced,
    Ignored,
}

impl Form<LineStatus> for LineStatusForm {
    fn of(value: &LineStatus) -> Self {
        match *value {
            LineStatus::Delivered(vcpus) => Self::Delivered(vcpus),
            LineStatus::Coalesced => Self::Coalesced,
            LineStatus::Ignored => Self::Ignored,
        }
    }
    fn value(self) -> LineStatus {
        match self {
            Self::Delivered(vcpus) => LineStatus::Delivered(vcpus),
            Self::Coalesced => LineStatus::Coalesced,
            Self::Ignored => LineStatus::Ignored,
        }
    }
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::layer) enum MsiStatusForm {
    Delivered,
    Blocked,
    NoTarget,
}

impl Form<MsiStatus> for MsiStatusForm {
    fn of(value: &MsiStatus) -> Self {
        match value {
            MsiStatus::Delivered => Self::Delivered,
            MsiStatus::Blocked => Self::Blocked,
            MsiStatus::NoTarget => Self::NoTarget,
        }
    }
    fn value(self) -> MsiStatus {
        match self {
            Self::Delivered => MsiStatus::Delivered,
            Self::Blocked => MsiStatus::Blocked,
            Self::NoTarget => MsiStatus::NoTarget,
        }
    }
}

/// The registers that can be saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct MsrIndexForm {
    available: usize,
    indices: Vec<Hex<u32>>,
}

impl Form<MsrIndexList> for MsrIndexForm {
    fn of(value: &MsrIndexList) -> Self {
        Self { available: value.available, indices: Form::of(&value.indices) }
    }
    fn value(self) -> MsrIndexList {
        MsrIndexList { available: self.available, indices: self.indices.value() }
    }
}

/// A write that a coalesced zone collected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct WriteForm {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mmio: Option<Hex>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pio: Option<Hex<u16>>,
    data: OwnedBytes,
}

impl WriteForm {
    pub(in crate::layer) fn of(write: &CoalescedWrite) -> Self {
        let data = OwnedBytes(write.bytes().to_vec());
        match write.address {
            IoAddress::Mmio(address) => Self { mmio: Some(Hex(address)), pio: None, data },
            IoAddress::Pio(port) => Self { mmio: None, pio: Some(Hex(port)), data },
        }
    }

    /// The write, unless it is none: it has one address, and 1 to 8 bytes.
    pub(in crate::layer) fn value(self) -> Result<CoalescedWrite, serde_json::Error> {
        let address = match (self.mmio, self.pio) {
            (Some(Hex(address)), None) => Some(IoAddress::Mmio(address)),
            (None, Some(Hex(port))) => Some(IoAddress::Pio(port)),
            _ => None,
        };
        let write = address.and_then(|address| CoalescedWrite::new(address, &self.data.0));
        write.ok_or_else(|| {
            <serde_json::Error as de::Error>::custom("no write to one address of 1 to 8 bytes")
        })
    }
}

/// A bitmap of dirty pages: how many words, and those that are not zero with their places. Most
/// are zero, and a reader must not have to allocate what a line merely claims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct DirtyForm {
    words: usize,
    dirty: Vec<(usize, Hex)>,
}

impl DirtyForm {
    pub(in crate::layer) fn of(bitmap: &[u64]) -> Self {
        let words = bitmap.iter().enumerate().filter(|(_, word)| **word != 0);
        let dirty = words.map(|(place, word)| (place, Hex(*word))).collect();
        Self { words: bitmap.len(), dirty }
    }

    /// Fills `bitmap` with it; `false` if it is of another size.
    #[must_use]
    pub(in crate::layer) fn fill(&self, bitmap: &mut [u64]) -> bool {
        bitmap.fill(0);
        self.words == bitmap.len()
            && self
                .dirty
                .iter()
                .all(|(place, word)| bitmap.get_mut(*place).map(|to| *to = word.0).is_some())
    }
}
