//! A running virtual machine: its buses, its vCPU threads and how it stops.

pub mod bus;
pub mod cpu;
pub mod crash;
pub mod exits;
pub mod stop;
pub mod vcpu;
