//! Memory that is plugged into a VM and unplugged again, and what KVM is told for it.
//!
//! Runs without hardware, on the KVM in memory. Under a guest that runs on `/dev/kvm` it is hv-cli's example
//! `memory_hotplug_kvm`.

use std::error::Error;
use std::sync::Arc;

use hv_core::fake::{FakeKvm, Wrote};
use hv_core::init::{Config, init};
use hv_core::{HostRange, IoAddress, MemoryBackend};
use hv_memory::{
    AddressMap, GuestRange, LiveMap, Mapping, NewRegion, Plan, SlotRules, VcpusPaused, page_size,
};
use vm_memory::GuestAddress;

const MIB: u64 = 1 << 20;

/// Where memory is plugged.
const DIMM_AT: GuestAddress = GuestAddress(4096 * MIB);

/// Stops the vCPUs of a VMM for as long as it lives; here there are none that run by themselves.
struct Paused;
impl VcpusPaused for Paused {}

fn memory(bytes: u64) -> Result<HostRange, Box<dyn Error>> {
    let mapping = Arc::new(Mapping::anonymous(bytes)?);
    Ok(HostRange::new(mapping, 0, usize::try_from(bytes)?).ok_or("no such range")?)
}

fn main() -> Result<(), Box<dyn Error>> {
    // Before the VM: 128 MiB with the VGA window in it, which is a device, and the rest of that MiB.
    let mut map = AddressMap::new(46);
    let ram = memory(128 * MIB)?;
    map.edit(|edit| {
        edit.add(NewRegion::ram("RAM", ram).at(GuestAddress(0), 0))?;
        edit.add(NewRegion::mmio("VGA", 0x2_0000).at(GuestAddress(0xa_0000), 1))
    })?;
    println!("the map:");
    for flat in map.flat() {
        println!("  {} {}", flat.range, flat.name);
    }

    // Its slots are there before the irqchip is, and then the map's.
    let mut config = Config::new(page_size(), 1);
    config.slots = map.slots();
    let (_kvm, vm, record) = init(|_| Ok(FakeKvm::default()), &config)?.into_parts();
    let guest = vm.view();
    let mut memory_map = LiveMap::adopt(Arc::new(vm), map, SlotRules::from(&record))?;

    println!("without a DIMM the guest's write comes to the VMM:");
    println!("  {:?}", guest.guest_write(IoAddress::Mmio(DIMM_AT.0), b"hello"));

    println!("a DIMM is plugged; the guest may run meanwhile:");
    println!("  room for {} more slots", memory_map.manager().available());
    let dimm = NewRegion::ram("DIMM", memory(64 * MIB)?).at(DIMM_AT, 0);
    let dimm = commit(memory_map.edit(|edit| edit.add(dimm))?)?;
    if guest.guest_write(IoAddress::Mmio(DIMM_AT.0), b"hello") != Wrote::Memory {
        return Err("the guest does not have the DIMM".into());
    }

    println!("its first half becomes readonly, so that its slot has to go for a moment:");
    let half = NewRegion::alias("readonly half", dimm, 0, 32 * MIB).readonly().at(DIMM_AT, 1);
    let half = commit(memory_map.edit(|edit| edit.add(half))?)?;

    println!("what can't be is refused before KVM hears of it:");
    let another = NewRegion::ram("DIMM 2", memory(64 * MIB)?).at(GuestAddress(4128 * MIB), 0);
    match memory_map.edit(|edit| edit.add(another)) {
        Ok(_) => return Err("two DIMMs in one place".into()),
        Err(error) => println!("  {error}"),
    }

    println!("and out again:");
    commit(memory_map.edit(|edit| {
        edit.remove(half)?;
        edit.remove(dimm)
    })?)?;
    println!("  {:?}", guest.guest_write(IoAddress::Mmio(DIMM_AT.0), b"hello"));
    Ok(())
}

/// Shows a plan, and commits it.
fn commit<M: MemoryBackend, R>(plan: Plan<'_, M, R>) -> Result<R, Box<dyn Error>> {
    for operation in plan.operations() {
        println!("  {operation}");
    }
    let pause = |away: &[GuestRange]| {
        away.iter().for_each(|range| println!("  vCPUs paused: {range} is away for a moment"));
        Paused
    };
    Ok(plan.commit(pause)?)
}
