//! The address map of a VM: edits become operations on slots.
//!
//! What KVM has is known from what it answered, never from what was meant: the next plan starts from
//! there, whatever failed before.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use hv_core::init::Record;
use hv_core::{HostRange, MemoryBackend, SlotFlags, SlotId};
use vm_memory::GuestAddress;

use super::commit::{PausedPlan, Plan, RunningPlan, Staged};
use super::edit::Edit;
use super::plan::{Have, SlotOperation, Steps, steps};
use super::slots::Wanted;
use super::view::coalesced;
use super::{AddressMap, AddressMapError, CommitError};
use crate::{GuestRange, NewSlot, Slot, SlotError, SlotInfo, SlotLimits, SlotManager};

/// What the slots of a host can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotRules {
    /// How many there can be (`KVM_CAP_NR_MEMSLOTS`).
    pub slots: u32,
    /// Whether a slot may be where several were (`KVM_CAP_JOIN_MEMORY_REGIONS_WORKS`).
    ///
    /// If not, slots stay as they were cut: one that has to go is made again as it was, and what is new
    /// beside it gets a slot of its own. Such a KVM takes the first address of a deleted slot for
    /// occupied by a slot around it, until the number of the deleted slot is used again.
    ///
    /// A VMM that would rather have more slots than ever pause vCPUs for memory that is added beside
    /// other memory can clear it on any host.
    pub joins: bool,
    /// Whether a slot may be readonly (`KVM_CAP_READONLY_MEM`).
    pub readonly: bool,
}

impl From<&Record> for SlotRules {
    fn from(record: &Record) -> Self {
        Self {
            slots: record.nr_memslots,
            joins: record.joins_memory_regions,
            readonly: record.readonly_memory,
        }
    }
}

/// The address map of a VM, and the slots that give its memory to the guest.
///
/// An edit becomes a [`Plan`]: the shortest sequence of slot operations that leads from the slots there
/// are to those the map is to have. Nothing has changed until the plan is committed, and nothing has if
/// the plan is dropped or an operation fails: then those before it are undone.
///
/// Memory that stays while its slot can't, because it is split, joined or made readonly, is away for a
/// moment. A vCPU that touches it then takes it for a device, so such a plan is a [`PausedPlan`], which
/// wants to be shown that no vCPU runs.
///
/// Dropping it leaves the slots to the VM, with which they go.
///
/// ```
/// use std::sync::Arc;
/// use hv_core::{HostRange, MemoryBackend};
/// use hv_memory::{AddressMap, LiveMap, Mapping, NewRegion, Plan, SlotRules, VcpusPaused};
/// use vm_memory::GuestAddress;
///
/// fn plug<M: MemoryBackend>(
///     memory: &mut LiveMap<M>,
///     pause: impl Fn() -> Paused,
/// ) -> Result<(), Box<dyn std::error::Error>> {
///     let mapping = Arc::new(Mapping::anonymous(1 << 30)?);
///     let host = HostRange::new(mapping, 0, 1 << 30).ok_or("no such range")?;
///     let dimm = NewRegion::ram("DIMM", host).at(GuestAddress(4 << 30), 0);
///     let dimm = match memory.edit(|edit| edit.add(dimm))? {
///         Plan::Running(plan) => plan.commit()?, // vCPUs may run
///         Plan::Paused(plan) => plan.commit(&pause())?,
///     };
///     // And out again.
///     memory.edit(|edit| edit.remove(dimm))?.commit(|_| pause())?;
///     Ok(())
/// }
///
/// /// Stops the vCPUs for as long as it lives.
/// struct Paused;
/// impl VcpusPaused for Paused {}
/// ```
pub struct LiveMap<M: MemoryBackend> {
    // The manager goes before the owners of slots, which then leave them to the VM.
    manager: SlotManager<M>,
    live: BTreeMap<u64, Live<M>>,
    map: AddressMap,
    rules: SlotRules,
    /// Where slots may differ from the map, because a commit failed halfway.
    unsettled: Vec<Range<u64>>,
    /// Where slots began that were deleted and whose numbers are not in use since.
    deleted: BTreeMap<SlotId, u64>,
}

/// A slot of the map.
struct Live<M: MemoryBackend> {
    name: Arc<str>,
    range: Range<u64>,
    host: HostRange,
    flags: SlotFlags,
    slot: Slot<M>,
}

impl<M: MemoryBackend> Live<M> {
    fn new_slot(&self) -> NewSlot {
        NewSlot {
            name: self.name.clone(),
            guest: GuestAddress(self.range.start),
            host: self.host.clone(),
            flags: self.flags,
        }
    }
}

/// How an operation is undone.
enum Undo {
    Add(SlotId, NewSlot),
    Delete(u64),
    Move { start: u64, back: u64 },
    LogDirty { start: u64, log_dirty: bool },
}

impl<M: MemoryBackend> LiveMap<M> {
    /// The map of a VM that has the [slots](AddressMap::slots) of this map, and no others: what
    /// `hv_core::init` installed. KVM is not asked.
    ///
    /// # Errors
    /// KVM can't have accepted these slots under these rules; the VM is left alone.
    pub fn adopt(vm: Arc<M>, map: AddressMap, rules: SlotRules) -> Result<Self, SlotError> {
        let limits = SlotLimits { slots: rules.slots, address_bits: map.address_bits() };
        let slots: Vec<_> =
            map.slots().into_iter().map(|slot| (map.name_at(slot.guest.0), slot)).collect();
        let (manager, owners) = SlotManager::adopt(vm, slots.clone(), limits)?;
        let live = slots.into_iter().zip(owners).map(|((name, slot), owner)| {
            let start = slot.guest.0;
            let range = start..start.saturating_add(slot.host.len() as u64);
            let live = Live { name, range, host: slot.host, flags: slot.flags, slot: owner };
            (start, live)
        });
        let live = live.collect();
        let (unsettled, deleted) = (Vec::new(), BTreeMap::new());
        Ok(Self { manager, live, map, rules, unsettled, deleted })
    }

    /// Makes changes together, as [`AddressMap::edit`] does, and says what KVM has to be told.
    ///
    /// An edit that changes nothing repairs what is [unsettled](Self::unsettled).
    ///
    /// # Errors
    /// Those of [`AddressMap::edit`]; more slots than there are; readonly memory without readonly slots.
    pub fn edit<R>(
        &mut self,
        change: impl FnOnce(&mut Edit<'_>) -> Result<R, AddressMapError>,
    ) -> Result<Plan<'_, M, R>, AddressMapError> {
        let (made, changes) = self.map.stage(change)?;
        let windows = self.unsettled.iter().chain(&changes.windows).cloned().collect();
        let steps = self.plan(coalesced(windows));
        if let Err(error) = self.check(&steps) {
            self.map.undo(changes);
            return Err(error);
        }
        let Steps { operations, holes, .. } = steps;
        let staged = Staged::new(self, changes, operations);
        Ok(match holes.is_empty() {
            true => Plan::Running(RunningPlan::new(staged, made)),
            false => Plan::Paused(PausedPlan::new(staged, made, holes)),
        })
    }

    /// The map: what was committed.
    #[must_use]
    pub fn map(&self) -> &AddressMap {
        &self.map
    }

    /// The manager, for slots that are not of the map.
    #[must_use]
    pub fn manager(&self) -> &SlotManager<M> {
        &self.manager
    }

    /// The slots of the map as KVM has them, by guest address.
    #[must_use]
    pub fn slots(&self) -> Vec<SlotInfo> {
        self.live.values().filter_map(|live| live.slot.info()).collect()
    }

    /// Where slots may differ from the map, because a commit failed and could not be undone. The
    /// next commit repairs it.
    #[must_use]
    pub fn unsettled(&self) -> Vec<GuestRange> {
        self.unsettled.iter().map(GuestRange::of).collect()
    }

    /// What it takes to have the slots of the map in these windows.
    fn plan(&self, windows: Vec<Range<u64>>) -> Steps {
        let shape = &self.map.shape;
        let windows = coalesced(windows.iter().map(|window| shape.around(window)).collect());
        let (mut have, mut wanted) = (BTreeMap::new(), BTreeMap::new());
        for window in &windows {
            let there: Vec<Have> = self.have(window).collect();
            let slots = match self.rules.joins {
                true => self.map.wanted(window),
                false => self.fragments(window, &there),
            };
            have.extend(there.into_iter().map(|have| (have.range.start, have)));
            wanted.extend(slots.into_iter().map(|slot| (slot.range.start, slot)));
        }
        steps(have, wanted, |address| self.map.name_at(address))
    }

    /// The slots there are with an address of `window`.
    fn have(&self, window: &Range<u64>) -> impl Iterator<Item = Have> + use<'_, M> {
        let before = self.live.range(..window.start).next_back();
        let before = before.filter(|(_, live)| live.range.end > window.start);
        let all = before.into_iter().chain(self.live.range(window.clone()));
        all.map(|(_, live)| Have {
            range: live.range.clone(),
            host: live.host.clone(),
            flags: live.flags,
        })
    }

    /// The slots to be in `window` if none may be joined: those that are right stay, and the rest is
    /// filled, around the first address of no slot that was deleted.
    fn fragments(&self, window: &Range<u64>, there: &[Have]) -> Vec<Wanted> {
        let shape = &self.map.shape;
        let start = there.iter().map(|have| have.range.start).fold(window.start, u64::min);
        let end = there.iter().map(|have| have.range.end).fold(window.end, u64::max);
        let mut cuts: Vec<u64> = self.deleted.values().copied().collect();
        cuts.extend(there.iter().map(|have| have.range.start));
        cuts.sort_unstable();
        let mut slots = Vec::new();
        for (range, run) in self.map.view().runs().overlapping(&(start..end)) {
            let aligned = shape.aligned(&range);
            let mut filled = aligned.start.max(start);
            let end = aligned.end.min(end);
            for have in there.iter().filter(|have| have.flags.readonly == run.flags.readonly) {
                let inside = aligned.start <= have.range.start && have.range.end <= aligned.end;
                let offset = have.range.start.saturating_sub(range.start);
                let host = run.part(offset, have.host.len() as u64).filter(|_| inside);
                let Some(host) = host.filter(|host| *host == have.host) else { continue };
                let gap = filled..have.range.start;
                slots.extend(shape.cut(&gap, cuts.iter().copied(), range.start, run));
                slots.push(Wanted { range: have.range.clone(), host, flags: run.flags });
                filled = have.range.end;
            }
            slots.extend(shape.cut(&(filled..end), cuts.iter().copied(), range.start, run));
        }
        slots
    }

    /// Whether KVM can have these slots.
    fn check(&self, steps: &Steps) -> Result<(), AddressMapError> {
        let new = |operation: &SlotOperation| match operation {
            SlotOperation::Add(new) => {
                let range = GuestRange::new(new.guest, new.host.len() as u64)?;
                Some((new.name.clone(), range, new.flags))
            }
            _ => None,
        };
        let mut added = steps.operations.iter().filter_map(new);
        let readonly = added.clone().find(|(.., flags)| flags.readonly && !self.rules.readonly);
        if let Some((name, range, _)) = readonly {
            return Err(AddressMapError::NoReadonlySlots { name, range });
        }
        let available = self.manager.available() as usize;
        match (usize::try_from(steps.more), added.next()) {
            (Ok(needed), Some((name, range, _))) if needed > available => {
                Err(AddressMapError::TooManySlots { name, range, needed, available })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn map_mut(&mut self) -> &mut AddressMap {
        &mut self.map
    }

    /// Carries a plan out, or undoes what of it was done.
    pub(super) fn execute(&mut self, operations: &[SlotOperation]) -> Result<(), CommitError> {
        let touched = operations.iter().flat_map(ranges);
        let touched = coalesced(touched.chain(self.unsettled.iter().cloned()).collect());
        let before = std::mem::replace(&mut self.unsettled, touched);
        let mut undo = Vec::with_capacity(operations.len());
        for operation in operations {
            let Err(error) = self.apply(operation, &mut undo) else { continue };
            return Err(match self.roll_back(undo) {
                Ok(()) => {
                    self.unsettled = before;
                    CommitError::Refused(error)
                }
                Err(rollback) => {
                    let (rollback, ranges) = (Box::new(rollback), self.unsettled());
                    CommitError::RollbackFailed { error, rollback, ranges }
                }
            });
        }
        self.unsettled.clear();
        Ok(())
    }

    fn apply(&mut self, operation: &SlotOperation, undo: &mut Vec<Undo>) -> Result<(), SlotError> {
        undo.push(match operation {
            SlotOperation::Delete { range } => {
                let Some((id, gone)) = self.delete(range.start().0)? else { return Ok(()) };
                Undo::Add(id, gone)
            }
            SlotOperation::Move { range, to } => {
                self.relocate(range.start().0, to.0)?;
                Undo::Move { start: to.0, back: range.start().0 }
            }
            SlotOperation::LogDirty { range, log_dirty } => {
                let start = range.start().0;
                self.log(start, *log_dirty)?;
                Undo::LogDirty { start, log_dirty: !log_dirty }
            }
            SlotOperation::Add(new) => {
                let start = new.guest.0;
                let slot = self.manager.add(new.clone())?;
                self.insert(new.clone(), slot);
                Undo::Delete(start)
            }
        });
        Ok(())
    }

    /// Undoes what was done, as far as that can be done.
    fn roll_back(&mut self, undo: Vec<Undo>) -> Result<(), SlotError> {
        let mut first = Ok(());
        for step in undo.into_iter().rev() {
            let undone = match step {
                Undo::Add(id, new) => {
                    self.manager.add_as(id, new.clone()).map(|slot| self.insert(new, slot))
                }
                Undo::Delete(start) => self.delete(start).map(drop),
                Undo::Move { start, back } => self.relocate(start, back),
                Undo::LogDirty { start, log_dirty } => self.log(start, log_dirty),
            };
            first = first.and(undone);
        }
        first
    }

    fn insert(&mut self, new: NewSlot, slot: Slot<M>) {
        self.deleted.remove(&slot.id());
        let NewSlot { name, guest, host, flags } = new;
        let range = guest.0..guest.0.saturating_add(host.len() as u64);
        self.live.insert(guest.0, Live { name, range, host, flags, slot });
    }

    /// Deletes the slot at an address. None if there is none, because it could not be made.
    fn delete(&mut self, start: u64) -> Result<Option<(SlotId, NewSlot)>, SlotError> {
        let Some(mut live) = self.live.remove(&start) else { return Ok(None) };
        let (id, new) = (live.slot.id(), live.new_slot());
        match live.slot.try_remove() {
            Ok(()) => {
                self.deleted.insert(id, start);
                Ok(Some((id, new)))
            }
            Err((slot, error)) => {
                live.slot = slot;
                self.live.insert(start, live);
                Err(error)
            }
        }
    }

    fn relocate(&mut self, start: u64, to: u64) -> Result<(), SlotError> {
        let Some(mut live) = self.live.remove(&start) else { return Ok(()) };
        let moved = live.slot.move_to(GuestAddress(to));
        if moved.is_ok() {
            live.range = to..to.saturating_add(live.host.len() as u64);
        }
        self.live.insert(live.range.start, live);
        moved
    }

    fn log(&mut self, start: u64, log_dirty: bool) -> Result<(), SlotError> {
        let Some(live) = self.live.get_mut(&start) else { return Ok(()) };
        live.slot.set_log_dirty(log_dirty)?;
        live.flags.log_dirty = log_dirty;
        Ok(())
    }
}

/// Where an operation changes slots.
fn ranges(operation: &SlotOperation) -> impl Iterator<Item = Range<u64>> {
    let half_open = |start: GuestAddress, len: u64| start.0..start.0.saturating_add(len);
    let (from, to) = match operation {
        SlotOperation::Delete { range } | SlotOperation::LogDirty { range, .. } => {
            (half_open(range.start(), range.len()), None)
        }
        SlotOperation::Move { range, to } => {
            (half_open(range.start(), range.len()), Some(half_open(*to, range.len())))
        }
        SlotOperation::Add(new) => (half_open(new.guest, new.host.len() as u64), None),
    };
    std::iter::once(from).chain(to)
}

impl<M: MemoryBackend> fmt::Debug for LiveMap<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveMap").field("map", &self.map).field("slots", &self.slots()).finish()
    }
}
