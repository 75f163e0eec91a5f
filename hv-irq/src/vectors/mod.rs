//! The message-signalled interrupts of a device (PCI local bus specification, MSI and MSI-X): a group
//! of vectors, each with an eventfd, a message and a mask.
//!
//! A guest writes messages and masks as it likes and as fast as it can. So what it writes costs a
//! bounded amount of work: one commit for whatever it changes at once, and a table written only if
//! a route differs. It must not know the registers of the device.

mod save;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Weak};

use hv_core::{EventFd, Gsi, IrqBackend, Irqfd, Msi, RouteTarget};

use crate::router::Shared;
use crate::state::{Op, State};
use crate::{IrqRouter, RouterError};
pub use save::{MsiVectorsState, VectorState};

/// The MSI or MSI-X vectors of a device.
///
/// After [`MsiVectors::new`], as after a reset, the group is disabled and every vector is masked.
/// An event of a vector that is masked, or whose group is disabled or masked as a whole, waits in its
/// eventfd and is delivered once, with the message of that time, when nothing holds it back any more.
///
/// A vector takes a GSI when it is first unmasked in an enabled group, keeps it while it is masked,
/// and gives it back when the group is disabled or dropped. A message that KVM would refuse holds
/// back its vector as a mask does.
///
/// Each method is one commit, so at most one `KVM_SET_GSI_ROUTING`, and none if no route differs;
/// [`MsiVectors::change`] is one for any number of changes. One that fails changes nothing: the guest's
/// write had no effect, and the VM goes on.
///
/// ```
/// # use std::sync::Arc;
/// # use hv_core::{EventFd, Msi, mock::MockVm};
/// # use hv_irq::{IrqRouter, LegacyPins, MsiVectors, RouterConfig};
/// # fn events(n: usize) -> Vec<EventFd> {
/// #     let file = || std::fs::File::open("/dev/null").unwrap();
/// #     (0..n).map(|_| EventFd::from(std::os::fd::OwnedFd::from(file()))).collect()
/// # }
/// let mut vm = MockVm::new();
/// vm.expect_set_gsi_routing().times(2).returning(|_| Ok(())); // the defaults, the vectors
/// vm.expect_irqfd_assign().times(256).returning(|_| Ok(()));
/// # vm.expect_drop().return_const(());
/// let router = IrqRouter::new(Arc::new(vm), RouterConfig::new(4096, LegacyPins::Kernel))?;
/// let mut vectors = MsiVectors::new(&router, events(256));
/// vectors.change(|change| {
///     change.enable();
///     for index in 0..256 {
///         change.retarget(index, Msi { address: 0xfee0_0000, data: 0x40, device: None })?;
///         change.unmask(index)?;
///     }
///     Ok(())
/// })?;
/// # drop(router);
/// # Ok::<(), hv_irq::RouterError>(())
/// ```
pub struct MsiVectors<V: IrqBackend> {
    router: Weak<Shared<V>>,
    control: Control,
    vectors: Vec<Vector>,
}

/// What concerns all vectors (the message control register).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Control {
    enabled: bool,
    masked: bool,
}

#[derive(Debug)]
struct Vector {
    event: EventFd,
    entry: Entry,
    /// The one it owns.
    gsi: Option<Gsi>,
}

/// What the guest says of a vector (its entry in the MSI-X table).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    message: Msi,
    masked: bool,
}

impl Entry {
    /// Whether events are to be delivered.
    fn is_live(self, control: Control, state: &State) -> bool {
        let open = control.enabled && !control.masked && !self.masked;
        open && state.table.check_message(self.message).is_ok()
    }
}

impl<V: IrqBackend> MsiVectors<V> {
    /// A vector for each eventfd. Nothing is allocated and KVM is told nothing.
    ///
    /// The eventfds must be non-blocking.
    #[must_use]
    pub fn new(router: &IrqRouter<V>, events: impl IntoIterator<Item = EventFd>) -> Self {
        let entry = Entry { message: Msi::default(), masked: true };
        let vectors = events.into_iter().map(|event| Vector { event, entry, gsi: None }).collect();
        let router = Arc::downgrade(&router.shared);
        Self { router, control: Control::default(), vectors }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Whether the group is enabled.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.control.enabled
    }

    /// Whether the group is masked as a whole.
    #[must_use]
    pub fn is_all_masked(&self) -> bool {
        self.control.masked
    }

    /// Whether a vector itself is masked.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn is_masked(&self, index: usize) -> Result<bool, RouterError> {
        Ok(self.vector(index)?.entry.masked)
    }

    /// The message of a vector.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn message(&self, index: usize) -> Result<Msi, RouterError> {
        Ok(self.vector(index)?.entry.message)
    }

    /// What a device signals to raise a vector.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn event(&self, index: usize) -> Result<&EventFd, RouterError> {
        Ok(&self.vector(index)?.event)
    }

    /// The GSI of a vector, if it has needed one since the group was enabled.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn gsi(&self, index: usize) -> Result<Option<Gsi>, RouterError> {
        Ok(self.vector(index)?.gsi)
    }

    /// Whether an event of a vector is held back (its bit in the pending bit array).
    ///
    /// # Errors
    /// There is no such vector; or the router is gone.
    pub fn is_pending(&self, index: usize) -> Result<bool, RouterError> {
        let vector = self.vector(index)?;
        let shared = self.router.upgrade().ok_or(RouterError::RouterGone)?;
        // KVM takes what a bound eventfd has.
        let state = shared.state();
        if vector.entry.is_live(self.control, &state) || vector.event.take().is_none() {
            return Ok(false);
        }
        vector.event.signal();
        Ok(true)
    }

    /// Enables the group: vectors that are not masked get their routes and are delivered.
    ///
    /// # Errors
    /// Those of [`MsiVectors::change`].
    pub fn enable(&mut self) -> Result<(), RouterError> {
        self.change(|change| {
            change.enable();
            Ok(())
        })
    }

    /// Disables the group and gives all its GSIs back. Messages and masks stay.
    ///
    /// # Errors
    /// Those of [`MsiVectors::change`].
    pub fn disable(&mut self) -> Result<(), RouterError> {
        self.change(|change| {
            change.disable();
            Ok(())
        })
    }

    /// Masks a vector.
    ///
    /// # Errors
    /// Those of [`MsiVectors::change`].
    pub fn mask(&mut self, index: usize) -> Result<(), RouterError> {
        self.change(|change| change.mask(index))
    }

    /// Unmasks a vector. An event that waited is delivered with the message of now.
    ///
    /// # Errors
    /// Those of [`MsiVectors::change`].
    pub fn unmask(&mut self, index: usize) -> Result<(), RouterError> {
        self.change(|change| change.unmask(index))
    }

    /// Changes the message of a vector: an event that comes later, or has waited, finds the new one.
    ///
    /// # Errors
    /// Those of [`MsiVectors::change`].
    pub fn retarget(&mut self, index: usize, message: Msi) -> Result<(), RouterError> {
        self.change(|change| change.retarget(index, message))
    }

    /// Makes any number of changes in one commit, if `change` returns `Ok`.
    ///
    /// # Errors
    /// That of `change`; no GSI or table entry is free; an eventfd is bound already; KVM refuses; the
    /// router is gone. Nothing is changed then.
    pub fn change<T>(
        &mut self,
        change: impl FnOnce(&mut VectorChange<'_>) -> Result<T, RouterError>,
    ) -> Result<T, RouterError> {
        let mut wanted = VectorChange {
            vectors: &self.vectors,
            control: self.control,
            entries: BTreeMap::new(),
        };
        let result = change(&mut wanted)?;
        let (control, entries) = (wanted.control, wanted.entries);
        self.commit(control, entries)?;
        Ok(result)
    }

    fn commit(
        &mut self,
        control: Control,
        mut entries: BTreeMap<usize, Entry>,
    ) -> Result<(), RouterError> {
        let shared = self.router.upgrade().ok_or(RouterError::RouterGone)?;
        let (mut state, vm) = (shared.state(), shared.vm());
        if control != self.control {
            for (index, vector) in self.vectors.iter().enumerate() {
                entries.entry(index).or_insert(vector.entry);
            }
        }
        let entries: Vec<_> = entries
            .into_iter()
            .filter_map(|(index, entry)| Some((index, self.vectors.get(index)?, entry)))
            .collect();
        let needs_gsi =
            |vector: &Vector, entry: Entry| vector.gsi.is_none() && entry.is_live(control, &state);
        let new = entries.iter().filter(|&&(_, vector, entry)| needs_gsi(vector, entry)).count();
        let new = u32::try_from(new).unwrap_or(u32::MAX);
        let fresh = state.allocate_many(&*vm, new)?;

        let mut unused = fresh.iter().copied();
        let (mut ops, mut after, mut released) = (Vec::new(), Vec::new(), Vec::new());
        for (index, vector, entry) in entries {
            let live = entry.is_live(control, &state);
            let mut gsi = vector.gsi;
            if live {
                gsi = gsi.or_else(|| unused.next());
            }
            match gsi {
                Some(gsi) if live => {
                    ops.push(Op::Set(gsi, RouteTarget::Msi(entry.message)));
                    let irqfd = Irqfd { event: vector.event.clone(), gsi, resample: None };
                    ops.push(Op::Keep(irqfd));
                }
                Some(gsi) if control.enabled => ops.push(Op::Unbind(gsi)),
                Some(gsi) => {
                    ops.extend([Op::Unbind(gsi), Op::Clear(gsi)]);
                    released.push(gsi);
                }
                None => {}
            }
            after.push((index, entry, gsi.filter(|_| control.enabled)));
        }
        if let Err(error) = state.commit(&*vm, &ops) {
            state.release(&*vm, &fresh);
            return Err(error);
        }
        state.release(&*vm, &released);
        self.control = control;
        for (index, entry, gsi) in after {
            if let Some(vector) = self.vectors.get_mut(index) {
                (vector.entry, vector.gsi) = (entry, gsi);
            }
        }
        Ok(())
    }

    fn vector(&self, index: usize) -> Result<&Vector, RouterError> {
        vector(&self.vectors, index)
    }
}

fn vector(vectors: &[Vector], index: usize) -> Result<&Vector, RouterError> {
    vectors.get(index).ok_or(RouterError::NoSuchVector { index, count: vectors.len() })
}

impl<V: IrqBackend> Drop for MsiVectors<V> {
    fn drop(&mut self) {
        if let Some(shared) = self.router.upgrade() {
            let gsis: Vec<Gsi> = self.vectors.iter().filter_map(|vector| vector.gsi).collect();
            shared.state().release(&*shared.vm(), &gsis);
        }
    }
}

impl<V: IrqBackend> fmt::Debug for MsiVectors<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { control, vectors, .. } = self;
        f.debug_struct("MsiVectors").field("control", control).field("vectors", vectors).finish()
    }
}

/// Changes to a group of vectors that are made together; see [`MsiVectors::change`].
#[derive(Debug)]
pub struct VectorChange<'a> {
    vectors: &'a [Vector],
    control: Control,
    /// The entries that are written.
    entries: BTreeMap<usize, Entry>,
}

impl VectorChange<'_> {
    /// Enables the group.
    pub fn enable(&mut self) {
        self.control.enabled = true;
    }

    /// Disables the group.
    pub fn disable(&mut self) {
        self.control.enabled = false;
    }

    /// Masks the group as a whole (function mask).
    pub fn mask_all(&mut self) {
        self.control.masked = true;
    }

    /// Ends that; vectors that are masked themselves stay so.
    pub fn unmask_all(&mut self) {
        self.control.masked = false;
    }

    /// Masks a vector.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn mask(&mut self, index: usize) -> Result<(), RouterError> {
        self.entry(index)?.masked = true;
        Ok(())
    }

    /// Unmasks a vector.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn unmask(&mut self, index: usize) -> Result<(), RouterError> {
        self.entry(index)?.masked = false;
        Ok(())
    }

    /// Changes the message of a vector.
    ///
    /// # Errors
    /// There is no such vector.
    pub fn retarget(&mut self, index: usize, message: Msi) -> Result<(), RouterError> {
        self.entry(index)?.message = message;
        Ok(())
    }

    fn entry(&mut self, index: usize) -> Result<&mut Entry, RouterError> {
        let vector = vector(self.vectors, index)?;
        Ok(self.entries.entry(index).or_insert(vector.entry))
    }
}

#[cfg(test)]
mod tests;
