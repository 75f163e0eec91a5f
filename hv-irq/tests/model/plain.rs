//! The invariants of the parts: the bitmap against a set of numbers, the table against a list of
//! routes and against what KVM says of it.

use std::collections::BTreeSet;

use hv_core::fake::{FakeHost, FakeKvm};
use hv_core::{
    Capability, Errno, Gsi, Hypervisor, IrqBackend, IrqchipId, Msi, Route, RouteTarget, Vm,
};
use hv_irq::{GsiBitmap, GsiError, RouteError, RoutingTable};
use proptest::prelude::*;

use crate::cases;

/// Around the sizes of words, and those KVM has.
const COUNTS: [u32; 10] = [0, 1, 31, 32, 33, 63, 64, 65, 1024, 4096];

#[derive(Debug, Clone)]
enum Use {
    Allocate,
    Many(u32),
    Run(u32),
    At(u32),
    Free(u32),
    Fill,
}

fn uses() -> impl Strategy<Value = Vec<Use>> {
    let any_gsi =
        prop_oneof![4 => 0..70_u32, 2 => 1000..1100_u32, 2 => 4000..4200_u32, 1 => any::<u32>()];
    let one = prop_oneof![
        8 => Just(Use::Allocate),
        2 => (0..80_u32).prop_map(Use::Many),
        2 => (0..80_u32).prop_map(Use::Run),
        3 => any_gsi.clone().prop_map(Use::At),
        8 => any_gsi.prop_map(Use::Free),
        1 => Just(Use::Fill),
    ];
    prop::collection::vec(one, 0..60)
}

/// A set of numbers below a count.
#[derive(Debug)]
struct Numbers {
    count: u32,
    reserved: u32,
    taken: BTreeSet<u32>,
}

impl Numbers {
    fn free(&self) -> impl Iterator<Item = u32> {
        (self.reserved..self.count).filter(|gsi| !self.taken.contains(gsi))
    }

    fn available(&self) -> usize {
        (self.count - self.reserved) as usize - self.taken.len()
    }

    fn run(&self, n: u32) -> Option<Vec<u32>> {
        let starts = self.reserved..(self.count + 1).saturating_sub(n);
        let mut runs = starts.map(|start| start..start + n);
        let is_free =
            |run: &std::ops::Range<u32>| run.clone().all(|gsi| !self.taken.contains(&gsi));
        runs.find(is_free).map(Iterator::collect)
    }
}

fn numbers(gsis: Vec<Gsi>) -> Vec<u32> {
    gsis.into_iter().map(|gsi| gsi.0).collect()
}

/// Does the same to both; they must agree.
fn take(bitmap: &mut GsiBitmap, model: &mut Numbers, how: &Use) -> Result<(), TestCaseError> {
    let (given, expected) = match *how {
        Use::Allocate => {
            (bitmap.allocate().map(|gsi| vec![gsi.0]), model.free().next().map(|g| vec![g]))
        }
        Use::Many(n) => {
            let lowest: Vec<u32> = model.free().take(n as usize).collect();
            let expected = (lowest.len() == n as usize).then_some(lowest);
            (bitmap.allocate_many(n).map(numbers), expected)
        }
        Use::Run(n) if n > 0 => (bitmap.allocate_run(n).map(Iterator::collect), model.run(n)),
        Use::Run(_) => (bitmap.allocate_run(0).map(Iterator::collect), Some(vec![])),
        Use::At(gsi) => {
            let free = (model.reserved..model.count).contains(&gsi) && !model.taken.contains(&gsi);
            (bitmap.allocate_at(Gsi(gsi)).map(|()| vec![gsi]), free.then(|| vec![gsi]))
        }
        Use::Fill => {
            let all: Vec<u32> = model.free().collect();
            (bitmap.allocate_many(bitmap.available()).map(numbers), Some(all))
        }
        Use::Free(gsi) => {
            let expected = if gsi >= model.count {
                Err(GsiError::OutOfRange { gsi: Gsi(gsi), count: model.count })
            } else if gsi < model.reserved {
                Err(GsiError::Reserved(Gsi(gsi)))
            } else if model.taken.remove(&gsi) {
                Ok(())
            } else {
                Err(GsiError::NotAllocated(Gsi(gsi)))
            };
            prop_assert_eq!(bitmap.free(Gsi(gsi)), expected);
            return Ok(());
        }
    };
    prop_assert_eq!(given.as_ref().ok(), expected.as_ref(), "{:?}: {:?}", how, given);
    model.taken.extend(expected.unwrap_or_default());
    Ok(())
}

#[derive(Debug, Clone)]
enum Edit {
    Insert(Route),
    Replace(Route),
    Remove(u32),
}

/// Few GSIs, so that routes meet, and some that don't exist.
fn route() -> impl Strategy<Value = Route> {
    let gsi = prop_oneof![20 => 0..6_u32, 2 => 60..66_u32, 1 => any::<u32>()];
    let pin = (0..4_u32, 0..26_u32)
        .prop_map(|(chip, pin)| RouteTarget::Pin { chip: IrqchipId(chip), pin });
    let address = prop_oneof![3 => Just(0xfee0_0000), 1 => Just(0x12_fee0_0000), 1 => any::<u64>()];
    let device = prop::option::of(any::<u32>());
    let msi = (address, 0..3_u32, device)
        .prop_map(|(address, data, device)| RouteTarget::Msi(Msi { address, data, device }));
    // KVM looks at neither; the table knows how many sources there are.
    let sint =
        (any::<u32>(), 0..16_u32).prop_map(|(vcpu, sint)| RouteTarget::HypervSint { vcpu, sint });
    (gsi, prop_oneof![4 => pin, 4 => msi, 1 => sint])
        .prop_map(|(gsi, target)| Route { gsi: Gsi(gsi), target })
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        8 => route().prop_map(Edit::Insert),
        3 => route().prop_map(Edit::Replace),
        2 => (0..6_u32).prop_map(Edit::Remove),
    ];
    prop::collection::vec(edit, 0..60)
}

const GSIS: u32 = 64;
const ENTRIES: u32 = 9;

/// Whether KVM takes this table.
fn is_accepted(vm: &impl IrqBackend, routes: &[Route]) -> bool {
    match vm.set_gsi_routing(routes) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.errno, Errno::EINVAL);
            false
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    /// 2, 3. Whatever the count, only what exists is given out, the lowest first, and given back once.
    #[test]
    fn a_bitmap_gives_out_what_there_is_once(
        count in prop::sample::select(&COUNTS[..]), reserved in 0..40_u32, uses in uses()
    ) {
        let mut bitmap = GsiBitmap::new(count);
        let mut model = Numbers { count, reserved: 0, taken: BTreeSet::new() };
        match bitmap.reserve(0..reserved) {
            Ok(()) => model.reserved = reserved,
            Err(error) => prop_assert_eq!(
                error, GsiError::OutOfRange { gsi: Gsi(reserved - 1), count }
            ),
        }
        let unused = bitmap.clone();
        for how in &uses {
            let before = bitmap.clone();
            take(&mut bitmap, &mut model, how)?;
            let taken: Vec<u32> = model.taken.iter().copied().collect();
            prop_assert_eq!(numbers(bitmap.iter().collect()), taken, "{:?}", how);
            prop_assert_eq!(bitmap.len() as usize, model.taken.len());
            prop_assert_eq!(bitmap.available() as usize, model.available());
            prop_assert!((count..count + 64).all(|gsi| !bitmap.is_allocated(Gsi(gsi))));
            if let Ok(gsi) = bitmap.allocate() {
                bitmap.free(gsi).unwrap();
            }
            if before.len() == bitmap.len() {
                prop_assert_eq!(&before, &bitmap, "nothing was taken, so nothing changed");
            }
        }
        for gsi in model.taken {
            prop_assert_eq!(bitmap.free(Gsi(gsi)), Ok(()));
            prop_assert_eq!(bitmap.free(Gsi(gsi)), Err(GsiError::NotAllocated(Gsi(gsi))));
        }
        prop_assert_eq!(bitmap, unused);
    }

    /// 6, 7. A table is a list of routes without those KVM refuses, and all of a GSI goes at once.
    #[test]
    fn a_table_is_what_kvm_accepts(
        edits in edits(), kernel in any::<bool>(), x2apic in any::<bool>()
    ) {
        let host = FakeHost::default().with(Capability::IrqRouting, GSIS as i32);
        let vm = FakeKvm::new(host).create_vm(0).unwrap();
        if kernel {
            vm.create_irqchip().unwrap();
        } else {
            vm.enable_cap(Capability::SplitIrqchip, [24, 0, 0, 0]).unwrap();
        }
        if x2apic {
            vm.enable_cap(Capability::X2apicApi, [1, 0, 0, 0]).unwrap();
        }
        let mut table = RoutingTable::new(GSIS, ENTRIES, kernel).with_x2apic_format(x2apic);
        let mut list: Vec<Route> = Vec::new();
        for edit in &edits {
            let mut next = list.clone();
            let answer = match *edit {
                Edit::Insert(route) => {
                    next.push(route);
                    table.insert(route)
                }
                Edit::Replace(route) => {
                    next.retain(|other| other.gsi != route.gsi);
                    next.push(route);
                    table.replace(route)
                }
                Edit::Remove(gsi) => {
                    next.retain(|other| other.gsi.0 != gsi);
                    let removed = table.remove(Gsi(gsi));
                    prop_assert_eq!(removed as usize, list.len() - next.len(), "all of them");
                    prop_assert_eq!(table.remove(Gsi(gsi)), 0, "once");
                    Ok(())
                }
            };
            let full = next.len() > ENTRIES as usize;
            prop_assert_eq!(answer.is_ok(), !full && is_accepted(&vm, &next), "{:?}", answer);
            let said_full = matches!(answer, Err(RouteError::TableFull { .. }));
            prop_assert!(full || !said_full);
            if answer.is_ok() {
                list = next;
            }
            let sorted: BTreeSet<Route> = list.iter().copied().collect();
            prop_assert_eq!(table.len() as usize, list.len());
            prop_assert_eq!(table.routes().into_iter().collect::<BTreeSet<_>>(), sorted);
        }
    }
}
