//! A run loop over a vCPU that is not there, for counting instructions: by calling the stub's own
//! functions (`direct`), through [`hv_core::Vcpu`] (`traits`), and through a layer that does nothing
//! (`layer`). What the traits add must be nothing.
//!
//! ```text
//! valgrind --tool=callgrind stub_loop traits 100000
//! ```
//!
//! All loops are the same text. `cargo xtask bench traits` runs each with two numbers of exits, so
//! that what the process does besides drops out, and compares.

mod stub;

use std::hint::black_box;
use std::process::ExitCode;

use hv_core::layer::{Answer, Interceptor, Layered, Object, Request};
use hv_core::{Error, ExitReply, Hypervisor, IoDirection, IoExit, MmioExit, Vcpu, VcpuExit, Vm};

use crate::stub::{StubHypervisor, StubVcpu};

/// What a loop has seen: it depends on everything it was told, so that nothing can be left out.
#[derive(Debug, PartialEq)]
struct Seen {
    written: u64,
    asked: u64,
    halted: u64,
}

/// Drives a vCPU as a VMM does: finds out why it stopped, takes what it wrote, answers what it asks.
///
/// A method a type has itself goes before that of a trait: with a `StubVcpu` these are its own
/// functions, with a `V: Vcpu` those of the trait.
macro_rules! drive {
    ($vcpu:ident, $exits:ident) => {{
        let mut seen = Seen { written: 0, asked: 0, halted: 0 };
        for _ in 0..$exits {
            match $vcpu.run() {
                Ok(VcpuExit::Io(IoExit { direction: IoDirection::Out, .. })) => {
                    for &byte in $vcpu.io_data().iter() {
                        seen.written = seen.written.wrapping_mul(31).wrapping_add(byte.into());
                    }
                }
                Ok(VcpuExit::Io(IoExit { port, .. })) => {
                    $vcpu.io_data().fill(port as u8);
                    seen.asked += 1;
                }
                Ok(VcpuExit::Mmio(MmioExit { written: Some(data), .. })) => {
                    seen.written = seen.written.wrapping_add(u64::from_le_bytes(data));
                }
                Ok(VcpuExit::Mmio(MmioExit { address, .. })) => {
                    $vcpu.reply(ExitReply::Mmio(address.to_le_bytes()));
                    seen.asked += 1;
                }
                Ok(VcpuExit::Interrupted) if !$vcpu.interrupt_state().if_flag => seen.halted += 1,
                Ok(VcpuExit::Hlt) => seen.halted += 1,
                Ok(_) => {}
                Err(_) => break,
            }
        }
        seen
    }};
}

#[inline(never)]
fn direct(vcpu: &mut StubVcpu, exits: u64) -> Seen {
    drive!(vcpu, exits)
}

#[inline(never)]
fn traits<V: Vcpu>(vcpu: &mut V, exits: u64) -> Seen {
    drive!(vcpu, exits)
}

/// A layer that does nothing.
#[derive(Clone)]
struct Nothing;

impl Interceptor for Nothing {
    fn call<T: Answer>(
        &self,
        _: Object,
        _: Request<'_>,
        real: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        real()
    }
}

fn main() -> Result<ExitCode, Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (name, exits) = match arguments.as_slice() {
        [name, exits] => (*name, exits.parse().ok()),
        _ => ("", None),
    };
    // The stub's last answer is read too, or it need not keep it.
    let (seen, replied) = match (name, exits) {
        ("direct", Some(exits)) => {
            let mut vcpu = black_box(StubVcpu::new());
            (direct(&mut vcpu, exits), vcpu.replied())
        }
        ("traits", Some(exits)) => {
            let mut vcpu = black_box(StubVcpu::new());
            (traits(&mut vcpu, exits), vcpu.replied())
        }
        ("layer", Some(exits)) => {
            let vm = Layered::new(StubHypervisor, Nothing).create_vm(0)?;
            let mut vcpu = black_box(vm.create_vcpu(0)?);
            (traits(&mut vcpu, exits), vcpu.inner().replied())
        }
        _ => {
            // Also what `cargo bench` gets: there is nothing to time here.
            eprintln!("stub_loop (direct | traits | layer) EXITS: run it under callgrind");
            return Ok(ExitCode::SUCCESS);
        }
    };
    println!("{name}: {seen:?}, {replied:?}");
    Ok(ExitCode::SUCCESS)
}
