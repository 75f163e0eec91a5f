//! The state of a vCPU as JSON: KVM's register structures by field name.

use kvm_bindings as k;

use super::{Blob, Form, Hex, Short, form};

form! {
    /// General registers.
    RegsForm = k::kvm_regs as k::kvm_regs {
        rax: Hex, rbx: Hex, rcx: Hex, rdx: Hex, rsi: Hex, rdi: Hex, rsp: Hex, rbp: Hex,
        r8: Hex, r9: Hex, r10: Hex, r11: Hex, r12: Hex, r13: Hex, r14: Hex, r15: Hex,
        rip: Hex, rflags: Hex,
        ;
    }
}

form! {
    /// A segment register.
    SegmentForm = k::kvm_segment as k::kvm_segment {
        base: Hex, limit: Hex<u32>, selector: Hex<u16>, type_: u8, present: u8, dpl: u8, db: u8,
        s: u8, l: u8, g: u8, avl: u8, unusable: u8,
        ; padding: u8,
    }
}

form! {
    /// A descriptor table register.
    TableForm = k::kvm_dtable as k::kvm_dtable {
        base: Hex, limit: Hex<u16>,
        ; padding: Short<u16, 3>,
    }
}

form! {
    /// Segments, descriptor tables and control registers.
    SregsForm = k::kvm_sregs as k::kvm_sregs {
        cs: SegmentForm, ds: SegmentForm, es: SegmentForm, fs: SegmentForm, gs: SegmentForm,
        ss: SegmentForm, tr: SegmentForm, ldt: SegmentForm, gdt: TableForm, idt: TableForm,
        cr0: Hex, cr2: Hex, cr3: Hex, cr4: Hex, cr8: Hex, efer: Hex, apic_base: Hex,
        ; interrupt_bitmap: Short<Hex, 4>,
    }
}

form! {
    /// The x87 and SSE state.
    FpuForm = k::kvm_fpu as k::kvm_fpu {
        fpr: [Blob<16>; 8], fcw: Hex<u16>, fsw: Hex<u16>, ftwx: Hex<u8>, last_opcode: Hex<u16>,
        last_ip: Hex, last_dp: Hex, xmm: [Blob<16>; 16], mxcsr: Hex<u32>,
        ; pad1: u8, pad2: u32,
    }
}

form! {
    /// An extended control register.
    #[derive(Default)]
    XcrForm = k::kvm_xcr as k::kvm_xcr {
        xcr: u32, value: Hex,
        ; reserved: u32,
    }
}

form! {
    /// The extended control registers.
    XcrsForm = k::kvm_xcrs as k::kvm_xcrs {
        nr_xcrs: u32, flags: Hex<u32>, xcrs: Short<XcrForm, 16>,
        ; padding: Short<Hex, 16>,
    }
}

form! {
    /// The debug registers.
    DebugregsForm = k::kvm_debugregs as k::kvm_debugregs {
        db: [Hex; 4], dr6: Hex, dr7: Hex, flags: Hex,
        ; reserved: Short<Hex, 9>,
    }
}

form! {
    /// Whether a vCPU runs.
    MpStateForm = k::kvm_mp_state as k::kvm_mp_state { mp_state: u32, ; }
}

form! {
    /// A pending exception.
    ExceptionForm = k::kvm_vcpu_events__bindgen_ty_1 as k::kvm_vcpu_events__bindgen_ty_1 {
        injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: Hex<u32>,
        ;
    }
}

form! {
    /// A pending interrupt.
    InterruptForm = k::kvm_vcpu_events__bindgen_ty_2 as k::kvm_vcpu_events__bindgen_ty_2 {
        injected: u8, nr: u8, soft: u8, shadow: u8,
        ;
    }
}

form! {
    /// A pending non-maskable interrupt.
    NmiForm = k::kvm_vcpu_events__bindgen_ty_3 as k::kvm_vcpu_events__bindgen_ty_3 {
        injected: u8, pending: u8, masked: u8,
        ; pad: u8,
    }
}

form! {
    /// System management mode.
    SmiForm = k::kvm_vcpu_events__bindgen_ty_4 as k::kvm_vcpu_events__bindgen_ty_4 {
        smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8,
        ;
    }
}

form! {
    /// A pending triple fault.
    TripleFaultForm = k::kvm_vcpu_events__bindgen_ty_5 as k::kvm_vcpu_events__bindgen_ty_5 {
        pending: u8,
        ;
    }
}

form! {
    /// Pending exceptions, interrupts and shadows.
    EventsForm = k::kvm_vcpu_events as k::kvm_vcpu_events {
        exception: ExceptionForm, interrupt: InterruptForm, nmi: NmiForm, sipi_vector: Hex<u32>,
        flags: Hex<u32>, smi: SmiForm, triple_fault: TripleFaultForm, exception_has_payload: u8,
        exception_payload: Hex,
        ; reserved: Short<u8, 26>,
    }
}

/// The register page of a local APIC.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::layer) struct LapicForm {
    regs: Blob<1024>,
}

impl Form<k::kvm_lapic_state> for LapicForm {
    fn of(value: &k::kvm_lapic_state) -> Self {
        Self { regs: Blob(value.regs.map(i8::cast_unsigned)) }
    }
    fn value(self) -> k::kvm_lapic_state {
        k::kvm_lapic_state { regs: self.regs.0.map(u8::cast_signed) }
    }
}

form! {
    /// A model-specific register.
    MsrForm = k::kvm_msr_entry as k::kvm_msr_entry {
        index: Hex<u32>, data: Hex,
        ; reserved: u32,
    }
}

form! {
    /// A CPUID leaf.
    CpuidForm = k::kvm_cpuid_entry2 as k::kvm_cpuid_entry2 {
        function: Hex<u32>, index: u32, flags: u32, eax: Hex<u32>, ebx: Hex<u32>, ecx: Hex<u32>,
        edx: Hex<u32>,
        ; padding: Short<u32, 3>,
    }
}

form! {
    /// A translated address.
    TranslationForm = k::kvm_translation as k::kvm_translation {
        linear_address: Hex, physical_address: Hex, valid: u8, writeable: u8, usermode: u8,
        ; pad: Short<u8, 5>,
    }
}

form! {
    /// Hardware breakpoints.
    DebugArchForm = k::kvm_guest_debug_arch as k::kvm_guest_debug_arch {
        debugreg: [Hex; 8],
        ;
    }
}

form! {
    /// Breakpoints and single step.
    GuestDebugForm = k::kvm_guest_debug as k::kvm_guest_debug {
        control: Hex<u32>, arch: DebugArchForm,
        ; pad: u32,
    }
}
