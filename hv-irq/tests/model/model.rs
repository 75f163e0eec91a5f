//! What a router should be, said as simply as possible: plain maps, no irqfds, no batches, no ioctls.
//!
//! Each operation says what comes of it: what the guest receives, or why it is refused.

use std::collections::{BTreeMap, BTreeSet};

use hv_core::init::MsiMode;
use hv_core::{Gsi, Msi, Route, RouteTarget};
use hv_irq::{LegacyPins, RouteError, RouterError, pc_default_routes};

use crate::plan::{Setup, Step, Sub, To, USER_PINS, WrittenEntry};

/// An interrupt: which vCPU, which vector.
pub(crate) type Interrupt = (u8, u8);
pub(crate) type Interrupts = BTreeSet<Interrupt>;

/// Why something is refused before KVM is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    TableFull,
    IllegalMessage,
    EventInUse,
    RouteBound,
    NoSuchVector,
    NoKernelLine,
}

impl Refusal {
    pub(crate) fn of(error: &RouterError) -> Option<Self> {
        Some(match error {
            RouterError::Route(RouteError::TableFull { .. }) => Refusal::TableFull,
            RouterError::Route(RouteError::IllegalMessage { .. }) => Refusal::IllegalMessage,
            RouterError::EventInUse { .. } => Refusal::EventInUse,
            RouterError::RouteBound { .. } => Refusal::RouteBound,
            RouterError::NoSuchVector { .. } => Refusal::NoSuchVector,
            RouterError::NoKernelLine(_) => Refusal::NoKernelLine,
            _ => return None,
        })
    }
}

/// A route with an owner and an eventfd, which raises it or waits.
#[derive(Debug, Clone)]
pub(crate) struct OwnedRoute {
    pub(crate) gsi: u32,
    pub(crate) message: Msi,
    pub(crate) bound: bool,
    pub(crate) pending: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Vector {
    pub(crate) message: Msi,
    pub(crate) masked: bool,
    pub(crate) pending: bool,
    pub(crate) gsi: Option<u32>,
    /// The message it had when it was last open: that of its route.
    routed: Msi,
}

#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) enabled: bool,
    pub(crate) masked: bool,
    pub(crate) vectors: Vec<Vector>,
}

/// A device that drives a level-triggered pin.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Level {
    pub(crate) gsi: u32,
    pub(crate) pending: bool,
    /// It has been told of an end.
    pub(crate) ended: bool,
}

/// A pin of the I/O APIC in user space.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct UserPin {
    pub(crate) vcpu: u8,
    pub(crate) vector: u8,
    pub(crate) level: bool,
    pub(crate) masked: bool,
    pub(crate) line: bool,
    pub(crate) remote_irr: bool,
    /// It was written, so that it has a route.
    pub(crate) routed: bool,
}

impl UserPin {
    fn message(&self) -> Msi {
        let trigger = if self.level { 0xc000 } else { 0 };
        let message = message(To { vcpu: self.vcpu, garbage: false }, self.vector);
        Msi { data: message.data | trigger, ..message }
    }

    /// What comes of an asserted line.
    fn deliver_level(&mut self, received: &mut Interrupts) {
        if self.line && self.level && !self.masked && !self.remote_irr {
            self.remote_irr = true;
            received.insert((self.vcpu, self.vector));
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) setup: Setup,
    pub(crate) routes: BTreeMap<u32, OwnedRoute>,
    pub(crate) groups: BTreeMap<u32, Group>,
    /// Edge-triggered lines of the kernel that are bound, by GSI.
    pub(crate) pins: BTreeMap<u32, u32>,
    pub(crate) levels: BTreeMap<u32, Level>,
    pub(crate) user_pins: BTreeMap<u8, UserPin>,
    /// GSIs of messages without an owner.
    pub(crate) cached: BTreeMap<(u64, u32), u32>,
    made: u32,
}

pub(crate) fn message(to: To, vector: u8) -> Msi {
    let high = if to.garbage { 0x12_0000_0000 } else { 0 };
    let address = 0xfee0_0000 | u64::from(to.vcpu) << 12 | high;
    Msi { address, data: vector.into(), device: None }
}

/// The interrupt a message is.
pub(crate) fn interrupt(message: Msi) -> Interrupt {
    ((message.address >> 12) as u8, message.data as u8)
}

/// The interrupt of a line of the kernel, as the guests here program them.
pub(crate) fn line_interrupt(gsi: u32) -> Interrupt {
    let pin = if gsi == 0 { 2 } else { gsi as u8 };
    (pin % 2, 0x20 + pin)
}

/// Lines that are level-triggered.
pub(crate) const LEVEL_LINES: std::ops::Range<u32> = 20..24;

impl Model {
    pub(crate) fn new(setup: Setup) -> Self {
        let reset = UserPin {
            vcpu: 0,
            vector: 0,
            level: false,
            masked: true,
            line: false,
            remote_irr: false,
            routed: false,
        };
        let user_pins = match setup.pins {
            LegacyPins::Kernel => BTreeMap::new(),
            LegacyPins::Userspace => USER_PINS.iter().map(|&pin| (pin, reset.clone())).collect(),
        };
        Self {
            setup,
            routes: BTreeMap::new(),
            groups: BTreeMap::new(),
            pins: BTreeMap::new(),
            levels: BTreeMap::new(),
            user_pins,
            cached: BTreeMap::new(),
            made: 0,
        }
    }

    /// A name for what is made.
    pub(crate) fn id(&mut self) -> u32 {
        self.made += 1;
        self.made
    }

    fn is_legal(&self, message: Msi) -> bool {
        !(self.setup.x2apic && message.address >> 32 & 0xff != 0)
    }

    pub(crate) fn is_live(&self, group: &Group, vector: &Vector) -> bool {
        group.enabled && !group.masked && !vector.masked && self.is_legal(vector.message)
    }

    /// Legacy entries, which are kept free.
    fn legacy(&self) -> usize {
        match self.setup.pins {
            LegacyPins::Kernel => 38,
            LegacyPins::Userspace => 24,
        }
    }

    pub(crate) fn owned(&self) -> BTreeSet<u32> {
        let vectors = self.groups.values().flat_map(|group| &group.vectors);
        let vectors = vectors.filter_map(|vector| vector.gsi);
        self.routes.values().map(|route| route.gsi).chain(vectors).collect()
    }

    pub(crate) fn allocated(&self) -> BTreeSet<u32> {
        self.owned().into_iter().chain(self.cached.values().copied()).collect()
    }

    pub(crate) fn table(&self) -> BTreeSet<Route> {
        let msi = |gsi, message| Route { gsi: Gsi(gsi), target: RouteTarget::Msi(message) };
        let mut table = BTreeSet::new();
        if self.setup.pins == LegacyPins::Kernel {
            table.extend(pc_default_routes());
        }
        table.extend(self.routes.values().map(|route| msi(route.gsi, route.message)));
        for vector in self.groups.values().flat_map(|group| &group.vectors) {
            table.extend(vector.gsi.map(|gsi| msi(gsi, vector.routed)));
        }
        for (&pin, entry) in self.user_pins.iter().filter(|(_, entry)| entry.routed) {
            table.insert(msi(pin.into(), entry.message()));
        }
        for (&(address, data), &gsi) in &self.cached {
            table.insert(msi(gsi, Msi { address, data, device: None }));
        }
        table
    }

    /// Takes the lowest free GSIs, also for routes that `pending` names; those of the cache go if that
    /// makes the difference.
    fn allocate(&mut self, taken: &mut BTreeSet<u32>, n: usize) -> Result<Vec<u32>, Refusal> {
        let room = (self.setup.limit as usize).saturating_sub(self.legacy());
        if n > room.saturating_sub(taken.len()) {
            return Err(Refusal::TableFull);
        }
        if n > room - taken.len() - self.cached.len() {
            self.cached.clear();
        }
        let cached: BTreeSet<u32> = self.cached.values().copied().collect();
        let free = (24..).filter(|gsi| !taken.contains(gsi) && !cached.contains(gsi));
        let found: Vec<u32> = free.take(n).collect();
        taken.extend(&found);
        Ok(found)
    }

    /// A batch. The first result is the GSIs of new routes, in order. `removed` are the handles it
    /// uses up, whatever becomes of it.
    pub(crate) fn batch(
        &mut self,
        steps: &[Step],
        removed: &mut Vec<u32>,
    ) -> Result<Interrupts, Refusal> {
        let before = self.clone();
        let mut taken = self.owned();
        // Errors in the order in which a batch makes them: GSIs at once, the rest when it is committed.
        let mut later = None;
        for step in steps {
            match *step {
                Step::Add { count, bound } => {
                    for _ in 0..count {
                        let gsi = self.allocate(&mut taken, 1)?[0];
                        let (id, to) = (self.id(), To { vcpu: 0, garbage: false });
                        let message = message(to, own_vector(id));
                        let route = OwnedRoute { gsi, message, bound, pending: false };
                        self.routes.insert(id, route);
                    }
                }
                Step::Retarget(i, to) => {
                    let Some(id) = nth(&self.routes, i) else { continue };
                    let message = message(to, own_vector(id));
                    if !self.is_legal(message) {
                        later = later.or(Some(Refusal::IllegalMessage));
                    }
                    self.routes.get_mut(&id).unwrap().message = message;
                }
                Step::Bind(i) => {
                    let Some(id) = nth(&self.routes, i) else { continue };
                    let route = self.routes.get_mut(&id).unwrap();
                    if std::mem::replace(&mut route.bound, true) {
                        later = later.or(Some(Refusal::EventInUse));
                    }
                }
                Step::BindTaken(i, of) => {
                    let (Some(_), Some(of)) = (nth(&self.routes, i), nth(&self.routes, of)) else {
                        continue;
                    };
                    if self.routes[&of].bound {
                        later = later.or(Some(Refusal::EventInUse));
                    }
                }
                Step::BindSecond(i) => {
                    let Some(id) = nth(&self.routes, i) else { continue };
                    if self.routes[&id].bound {
                        later = later.or(Some(Refusal::RouteBound));
                    }
                }
                Step::Unbind(i) => {
                    let Some(id) = nth(&self.routes, i) else { continue };
                    self.routes.get_mut(&id).unwrap().bound = false;
                }
                Step::Remove(i) => {
                    let Some(id) = nth(&self.routes, i) else { continue };
                    self.routes.remove(&id);
                    removed.push(id);
                }
            }
        }
        if let Some(refusal) = later {
            return Err(refusal);
        }
        let mut received = Interrupts::new();
        for (id, route) in &mut self.routes {
            let opened = route.bound && !before.routes.get(id).is_some_and(|route| route.bound);
            if opened && std::mem::take(&mut route.pending) {
                received.insert(interrupt(route.message));
            }
        }
        Ok(received)
    }

    pub(crate) fn plug(&mut self, n: usize) -> u32 {
        let to = To { vcpu: 0, garbage: false };
        let vectors = (0..n)
            .map(|_| {
                let message = message(to, own_vector(self.id()));
                Vector { message, masked: true, pending: false, gsi: None, routed: message }
            })
            .collect();
        let id = self.id();
        self.groups.insert(id, Group { enabled: false, masked: false, vectors });
        id
    }

    /// What a device's vectors are after a change, and what the guest receives.
    pub(crate) fn change(&mut self, id: u32, subs: &[Sub]) -> Result<Interrupts, Refusal> {
        let mut taken = self.owned();
        let mut group = self.groups[&id].clone();
        let n = group.vectors.len();
        for sub in subs {
            match *sub {
                Sub::Enable => group.enabled = true,
                Sub::Disable => group.enabled = false,
                Sub::MaskAll => group.masked = true,
                Sub::UnmaskAll => group.masked = false,
                Sub::Mask(i) => group.vectors[i % n].masked = true,
                Sub::Unmask(i) => group.vectors[i % n].masked = false,
                Sub::Retarget(i, to) => {
                    let vector = &mut group.vectors[i % n];
                    vector.message = message(to, vector.message.data as u8);
                }
                Sub::OutOfRange => return Err(Refusal::NoSuchVector),
            }
        }
        let live: Vec<bool> = group.vectors.iter().map(|v| self.is_live(&group, v)).collect();
        let needs = |(vector, live): &(&mut Vector, bool)| *live && vector.gsi.is_none();
        let new = group.vectors.iter_mut().zip(live.iter().copied()).filter(needs).count();
        let mut fresh = self.allocate(&mut taken, new)?.into_iter();
        let mut received = Interrupts::new();
        for (vector, &live) in group.vectors.iter_mut().zip(&live) {
            if live {
                vector.gsi = vector.gsi.or_else(|| fresh.next());
                vector.routed = vector.message;
                if std::mem::take(&mut vector.pending) {
                    received.insert(interrupt(vector.message));
                }
            }
            vector.gsi = vector.gsi.filter(|_| group.enabled);
        }
        self.groups.insert(id, group);
        Ok(received)
    }

    pub(crate) fn send(&mut self, message: Msi) -> Result<Interrupts, Refusal> {
        let key = (message.address, message.data);
        if self.setup.msi == MsiMode::DynamicRoutes && !self.cached.contains_key(&key) {
            let gsi = self.allocate(&mut self.owned(), 1)?[0];
            self.cached.insert(key, gsi);
        }
        Ok([interrupt(message)].into())
    }

    /// The guest writes half of a redirection entry.
    pub(crate) fn write_entry(
        &mut self,
        number: u8,
        entry: WrittenEntry,
        upper: bool,
    ) -> Interrupts {
        let pin = self.user_pins.get_mut(&number).unwrap();
        let before = pin.clone();
        if upper {
            pin.vcpu = entry.vcpu;
        } else {
            (pin.vector, pin.level, pin.masked) =
                (user_vector(number, entry.vector), entry.level, entry.masked);
        }
        pin.remote_irr &= pin.level;
        pin.routed = true;
        let opens = before.masked && !pin.masked;
        let gone = before.level && (before.vector != pin.vector || !pin.level);
        let mut received = Interrupts::new();
        for level in self.levels.values_mut().filter(|level| level.gsi == u32::from(number)) {
            if opens && std::mem::take(&mut level.pending) {
                if pin.level {
                    // Whoever drives a level is asked.
                    level.ended = true;
                } else {
                    received.insert((pin.vcpu, pin.vector));
                }
            }
            level.ended |= gone;
        }
        pin.deliver_level(&mut received);
        received
    }

    pub(crate) fn set_line(&mut self, number: u8, asserted: bool) -> Interrupts {
        let pin = self.user_pins.get_mut(&number).unwrap();
        let rises = !std::mem::replace(&mut pin.line, asserted) && asserted;
        let mut received = Interrupts::new();
        if rises && !pin.level && !pin.masked {
            received.insert((pin.vcpu, pin.vector));
        }
        pin.deliver_level(&mut received);
        received
    }

    /// The exit that says that a vector has ended.
    pub(crate) fn end(&mut self, vector: u8) -> Interrupts {
        let mut received = Interrupts::new();
        for (&number, pin) in &mut self.user_pins {
            if !pin.level || pin.vector != vector {
                continue;
            }
            for level in self.levels.values_mut().filter(|level| level.gsi == u32::from(number)) {
                level.ended = true;
            }
            if std::mem::take(&mut pin.remote_irr) {
                pin.deliver_level(&mut received);
            }
        }
        received
    }

    /// A device raises its level-triggered pin.
    pub(crate) fn raise(&mut self, id: u32) -> Interrupts {
        let gsi = self.levels[&id].gsi;
        match self.user_pins.get(&(gsi as u8)) {
            None => {
                // The guest ends it at once, and all who share the line are told.
                self.levels.values_mut().filter(|l| l.gsi == gsi).for_each(|l| l.ended = true);
                [line_interrupt(gsi)].into()
            }
            Some(pin) if pin.masked => {
                self.levels.get_mut(&id).unwrap().pending = true;
                Interrupts::new()
            }
            Some(pin) => [(pin.vcpu, pin.vector)].into(),
        }
    }

    /// Of the events that waited, those that a failed operation delivered wait no more.
    pub(crate) fn forget_delivered(&mut self, wanted: &Model, taken: &Interrupts) {
        for (id, route) in &mut self.routes {
            let target = wanted.routes.get(id).map(|route| interrupt(route.message));
            route.pending &= !target.is_some_and(|target| taken.contains(&target));
        }
        for (id, group) in &mut self.groups {
            for (vector, wanted) in group.vectors.iter_mut().zip(&wanted.groups[id].vectors) {
                vector.pending &= !taken.contains(&interrupt(wanted.message));
            }
        }
        for level in self.levels.values_mut().filter(|level| level.pending) {
            if let Some(pin) = wanted.user_pins.get(&(level.gsi as u8)) {
                level.pending = !taken.contains(&(pin.vcpu, pin.vector));
            }
        }
    }
}

/// The name of the `i`-th of what there is, counted around.
pub(crate) fn nth<T>(map: &BTreeMap<u32, T>, i: usize) -> Option<u32> {
    map.keys().nth(i.checked_rem(map.len())?).copied()
}

/// A vector of its own for each source, so that the guest knows who interrupts.
pub(crate) fn own_vector(id: u32) -> u8 {
    0x60 + (id % 0x90) as u8
}

pub(crate) fn user_vector(pin: u8, choice: u8) -> u8 {
    let index = USER_PINS.iter().position(|&p| p == pin).unwrap_or_default() as u8;
    0x38 + 4 * index + choice
}
